"""Change the drop rate during training; the linear scheme of Table 2."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from rblock_fx.converted import find_converted
from rblock_fx.errors import SettingError
from rblock_fx.settings import check_drop_prob, is_integer, one_per_site, show


def set_drop_prob(model: nn.Module, p: float | Sequence[float]) -> None:
    """Set the drop probability of all sites, or of each site. Compiled graphs are reused.

    Args:
        model: a converted model; wrapped (DistributedDataParallel, torch.compile) or bare.
        p: one value in [0, 1), or one per site in the order of apply_rblock's `sites`.

    Raises:
        SettingError: a value is outside its range, or their number is not the number of sites. No site is changed.
        ConversionError: the model was not converted by apply_rblock.
    """
    _, rblock = find_converted(model, "set_drop_prob")
    order = rblock.conversion.order
    values = one_per_site("drop_prob", p, len(order), "set_drop_prob")
    for value in values:
        check_drop_prob(value, rblock.conversion.method, "set_drop_prob")
    for position, asked in enumerate(order):
        for mask in rblock.masks_of(position):
            mask.set_drop_prob(float(values[asked]))


class DropSchedule:
    """Change the drop probability linearly over training (the linear scheme of Table 2).

    Before the first step the probability is `start`; after `total_steps` steps and from then on it is `end`.

    Args:
        model: a converted model; wrapped or bare.
        start: drop probability at the beginning, in [0, 1).
        end: drop probability at the end, in [0, 1).
        total_steps: number of calls of `step` over the whole training, at least 1.

    Raises:
        SettingError: a value is outside its range.
        ConversionError: the model was not converted by apply_rblock.
    """

    def __init__(self, model: nn.Module, start: float, end: float, total_steps: int) -> None:
        self.model = model
        self._go_to("DropSchedule", start, end, total_steps, 0)

    @property
    def drop_prob(self) -> float:
        """The drop probability at the present step, between start and end."""
        share = min(self.steps_done / self.total_steps, 1.0)
        return (1 - share) * self.start + share * self.end

    def step(self) -> None:
        """Advance by one step; call it once after each optimizer step."""
        self.steps_done += 1
        set_drop_prob(self.model, self.drop_prob)

    def state_dict(self) -> dict[str, float | int]:
        """Return start, end, total_steps and steps_done, for a checkpoint."""
        return {"start": self.start, "end": self.end, "total_steps": self.total_steps, "steps_done": self.steps_done}

    def load_state_dict(self, state: Mapping[str, float | int]) -> None:
        """Restore the state that `state_dict` returned, and set the model's drop probability accordingly.

        Raises:
            SettingError: a value is missing or outside its range. The schedule and the model are unchanged.
        """
        names = list(self.state_dict())
        missing = [name for name in names if name not in state] if isinstance(state, Mapping) else names
        if missing:
            raise SettingError(
                f"DropSchedule.load_state_dict: the state lacks {', '.join(missing)}, got {state!r}; "
                "pass the result of schedule.state_dict()"
            )
        self._go_to("DropSchedule.load_state_dict", *(state[name] for name in names))

    def _go_to(self, call: str, start: Any, end: Any, total_steps: Any, steps_done: Any) -> None:
        """Check all values, then set the schedule and the model."""
        _, rblock = find_converted(self.model, call)
        for value in (start, end):
            check_drop_prob(value, rblock.conversion.method, call)
        for name, value, least in (("total_steps", total_steps, 1), ("steps_done", steps_done, 0)):
            if not is_integer(value) or value < least:
                raise SettingError(f"{call}: {name} must be an integer >= {least}, got {show(value)}")
        self.start, self.end = float(start), float(end)
        self.total_steps, self.steps_done = int(total_steps), int(steps_done)
        set_drop_prob(self.model, self.drop_prob)
