"""Checking what the user asked for, before anything is done."""

import dataclasses
import difflib
import math
import numbers
from collections.abc import Sequence
from typing import Any

from rblock_fx.errors import SettingError
from rblock_fx.masks.coverage import CALIBRATIONS
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
        """What the method draws."""
        return METHODS[self.method]


def check_settings(
    method: str, drop_prob: float | Sequence[float], block_size: int | Sequence[int], calibration: str, batch_norm: str
) -> Settings:
    """Check every setting that can be checked without the model.

    Raises:
        SettingError: an unknown name or a value outside its range.
    """
    _check_choice("method", method, tuple(METHODS))
    _check_choice("calibration", calibration, CALIBRATIONS)
    _check_choice("batch_norm", batch_norm, BATCH_NORMS)
    for value in _as_values(drop_prob):
        check_drop_prob(value, method)
    for size in _as_values(block_size):
        if isinstance(size, bool) or not isinstance(size, numbers.Integral) or size < 1 or size % 2 == 0:
            raise SettingError(
                f"block_size={size!r} is no odd positive integer: a block needs a centre, e.g. block_size=3"
            )
    return Settings(method, calibration, batch_norm, drop_prob, block_size)


def check_drop_prob(value: Any, method: str) -> None:
    """Check one drop probability.

    Raises:
        SettingError: no number, not in [0, 1), or above what the method can do.
    """
    largest = METHODS[method].largest_drop_prob
    if isinstance(value, bool) or not is_real(value) or math.isnan(value) or not 0 <= value < 1:
        raise SettingError(f"drop_prob={value!r} is no probability in [0, 1), e.g. drop_prob=0.2")
    if value > largest:
        raise SettingError(
            f"drop_prob={value!r} is too large for method={method!r}, whose two sub-models drop disjoint sets of that "
            f"size each; expected at most {largest}"
        )


def is_real(value: Any) -> bool:
    """Whether a value is a number that compares, NumPy's included."""
    return isinstance(value, numbers.Real)


def one_per_site(name: str, value: Any, sites: int) -> list[Any]:
    """Spread one value over the sites, or check that there is one per site.

    Raises:
        SettingError: another number of values.
    """
    values = _as_values(value)
    if len(values) == 1 and values[0] is value:
        return values * sites
    if len(values) != sites:
        raise SettingError(f"{name} has {len(values)} values {values} for {sites} sites; give one value, or {sites}")
    return values


def _as_values(value: Any) -> list[Any]:
    """The values of a list or tuple; anything else is one value."""
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise SettingError(f"unknown {name} {value!r}; expected one of {', '.join(map(repr, choices))}{hint}")
