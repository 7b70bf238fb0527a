"""Changing the drop rate while training; the linear scheme of Table 2."""

from collections.abc import Sequence

from torch import nn

from rblock_fx.converted import find_converted
from rblock_fx.errors import SettingError
from rblock_fx.settings import check_drop_prob, one_per_site


def set_drop_prob(model: nn.Module, p: float | Sequence[float]) -> None:
    """Change the drop probability of every site, or of each; no graph is compiled anew.

    Args:
        model: a converted model, also inside DistributedDataParallel or torch.compile.
        p: one value in [0, 1), or one per site in the order in which apply_rblock was given them.

    Raises:
        SettingError: a value outside its range, or not one per site; no site is changed then.
        ConversionError: the model is not converted.
    """
    _, rblock = find_converted(model, "set_drop_prob")
    order = rblock.conversion.order
    values = one_per_site("drop_prob", p, len(order))
    for value in values:
        check_drop_prob(value, rblock.conversion.method)
    for position, asked in enumerate(order):
        for mask in rblock.masks_of(position):
            mask.set_drop_prob(float(values[asked]))


class DropSchedule:
    """Raise (or lower) the drop probability linearly over training (Table 2; Scheduled DropPath).

    Before the first step the probability is `start`; after `total_steps` steps and from then on it is `end`.

    Args:
        model: a converted model.
        start: drop probability at the beginning, in [0, 1).
        end: drop probability at the end, in [0, 1).
        total_steps: number of calls of `step` over the whole training, at least 1.

    Raises:
        SettingError: a value outside its range.
        ConversionError: the model is not converted.
    """

    def __init__(self, model: nn.Module, start: float, end: float, total_steps: int) -> None:
        if isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps < 1:
            raise SettingError(
                f"total_steps={total_steps!r} is not a positive number of steps: DropSchedule(model, 0.0, 0.2, 1000)"
            )
        _, rblock = find_converted(model, "DropSchedule")
        for value in (start, end):
            check_drop_prob(value, rblock.conversion.method)
        self.model = model
        self.start = float(start)
        self.end = float(end)
        self.total_steps = total_steps
        self.steps_done = 0
        set_drop_prob(model, self.drop_prob)

    @property
    def drop_prob(self) -> float:
        """The drop probability at the present step, in [start, end]."""
        share = min(self.steps_done / self.total_steps, 1.0)
        return (1 - share) * self.start + share * self.end

    def step(self) -> None:
        """Go one step on; call it once after each optimizer step."""
        self.steps_done += 1
        set_drop_prob(self.model, self.drop_prob)

    def state_dict(self) -> dict[str, float | int]:
        """The position and the line, to be saved with a checkpoint."""
        return {"start": self.start, "end": self.end, "total_steps": self.total_steps, "steps_done": self.steps_done}

    def load_state_dict(self, state: dict[str, float | int]) -> None:
        """Go to a saved position, and set the model's drop probability accordingly.

        Raises:
            SettingError: the state lacks one of the four values; nothing is changed then.
        """
        missing = [name for name in self.state_dict() if name not in state]
        if missing:
            raise SettingError(f"the state of a DropSchedule lacks {missing}; pass what state_dict() gave: got {state}")
        self.start, self.end = float(state["start"]), float(state["end"])
        self.total_steps, self.steps_done = int(state["total_steps"]), int(state["steps_done"])
        set_drop_prob(self.model, self.drop_prob)
