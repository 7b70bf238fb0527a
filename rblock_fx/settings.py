"""Check the user's settings before the model is touched."""

import dataclasses
import difflib
import numbers
from collections.abc import Sequence
from typing import Any

from rblock_fx.masks.coverage import CALIBRATIONS
from rblock_fx.errors import SettingError
from rblock_fx.masks.methods import METHODS, Mask

BATCH_NORMS = ("joint", "per_submodel")


@dataclasses.dataclass(frozen=True)
class Settings:
    """The checked keyword arguments of apply_rblock; the last two hold one value, or one per site."""

    method: str
    calibration: str
    batch_norm: str
    drop_prob: float | Sequence[float]
    block_size: int | Sequence[int]

    @property
    def mask_class(self) -> type[Mask]:
        """The mask class of the method."""
        return METHODS[self.method]


def check_settings(
    method: str, drop_prob: float | Sequence[float], block_size: int | Sequence[int], calibration: str, batch_norm: str
) -> Settings:
    """Check all settings that do not depend on the model.

    Raises:
        SettingError: a name is unknown or a value is outside its range.
    """
    _check_choice("method", method, tuple(METHODS))
    _check_choice("calibration", calibration, CALIBRATIONS)
    _check_choice("batch_norm", batch_norm, BATCH_NORMS)
    for value in _as_values(drop_prob):
        check_drop_prob(value, method)
    for size in _as_values(block_size):
        if not is_integer(size) or size < 1 or size % 2 == 0:
            raise SettingError(f"apply_rblock: block_size must be an odd positive integer, got {show(size)}")
    return Settings(method, calibration, batch_norm, drop_prob, block_size)


def check_drop_prob(value: Any, method: str, call: str = "apply_rblock") -> None:
    """Check one drop probability; `call` starts the message.

    Raises:
        SettingError: value is not a number in [0, 1), or exceeds the method's largest drop probability.
    """
    if not is_real(value) or not 0 <= value < 1:
        hint = f" (did you mean {float(value) / 100:g}?)" if is_real(value) and 1 < value < 100 else ""
        raise SettingError(f"{call}: drop_prob must be in [0, 1), got {show(value)}{hint}")
    largest = METHODS[method].largest_drop_prob
    if value > largest:
        raise SettingError(
            f"{call}: drop_prob must be at most {largest} for method={method!r}, whose sub-models drop disjoint sets "
            f"of that size, got {show(value)}"
        )


def is_real(value: Any) -> bool:
    """Whether value is a real number, NumPy's included, and not a bool."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def is_integer(value: Any) -> bool:
    """Whether value is an integer, NumPy's included, and not a bool."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def show(value: Any) -> str:
    """Format a number as its value, without NumPy's type, and anything else as its repr."""
    return f"{value}" if isinstance(value, numbers.Real) else repr(value)


def one_per_site(name: str, value: Any, sites: int, call: str = "apply_rblock") -> list[Any]:
    """Repeat one value for all sites, or check that there is one value per site.

    Raises:
        SettingError: the number of values differs from the number of sites.
    """
    values = _as_values(value)
    if len(values) == 1 and values[0] is value:
        return values * sites
    if len(values) != sites:
        shown = ", ".join(map(show, values))
        raise SettingError(f"{call}: {name} must be one value or one per site ({sites}), got {len(values)}: [{shown}]")
    return values


def _as_values(value: Any) -> list[Any]:
    """The values of a list or tuple; any other object is one value."""
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise SettingError(f"apply_rblock: {name} must be one of {', '.join(choices)}, got {value!r}{hint}")
