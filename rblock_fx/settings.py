"""The settings of a converted model: describe them, change the drop rate, schedule it."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from rblock_fx.checks import check_drop_prob, is_integer, one_per_site, show
from rblock_fx.converted import find_converted
from rblock_fx.errors import SettingError
from rblock_fx.masks.mask import Mask
from rblock_fx.network.stages import Site, format_table


@dataclasses.dataclass(frozen=True)
class SiteDescription:
    """One site of a converted model.

    Attributes:
        path: qualified name of the module whose output is masked; for the head, of the classifier, whose input is.
        is_head: whether this is the classifier's input.
        shape: shape of one sample's map; the first, if the site returns several.
        channel_axis: 1 for (N, C, *S), -1 for (N, *S, C).
        drop_prob: present drop probability, in [0, 1).
        block_size: side of a block; None for methods without blocks.
        gamma: present probability of a block centre; None for methods without blocks.
        cost_before: share of the forward's FLOPs before the site, in [0, 1].
        forks: whether the batch doubles here.
        masks: the mask modules in the order of their calls; forward hooks on them work. A mask of a site that returns a
            list has the index of its map as `place`.
        loses_nothing: share of samples whose (first) map keeps everything at the present rate, in [0, 1].
        loses_everything: share of samples whose (first) map is dropped whole, in [0, 1].
    """

    path: str
    is_head: bool
    shape: tuple[int, ...]
    channel_axis: int
    drop_prob: float
    block_size: int | None
    gamma: float | None
    cost_before: float
    forks: bool
    masks: tuple[Mask, ...]
    loses_nothing: float
    loses_everything: float


@dataclasses.dataclass(frozen=True)
class Description:
    """A converted model.

    Attributes:
        model: name of the model's own class.
        method: the method.
        calibration: how gamma follows from the drop probability.
        batch_norm: "joint" or "per_submodel".
        input_size: shape of one sample, for which the maps' shapes hold.
        sites: the sites in forward order.
        cost: FLOPs of a training step over those of the plain model.
        early_fork_reason: why the batch doubles at the input; None where it doubles at the first mask.
        code: the generated training forward; self is the model.
    """

    model: str
    method: str
    calibration: str
    batch_norm: str
    input_size: tuple[int, ...]
    sites: tuple[SiteDescription, ...]
    cost: float
    early_fork_reason: str | None
    code: str

    def __str__(self) -> str:
        header = ("site", "shape", "channel_axis", "drop_prob", "block_size", "gamma", "cost_before", "forks")
        rows = [
            (
                f"{site.path} (input)" if site.is_head else site.path,
                ", ".join("x".join(map(str, mask.shape)) for mask in site.masks),
                site.channel_axis,
                f"{site.drop_prob:g}",
                site.block_size,
                None if site.gamma is None else f"{site.gamma:.5f}",
                f"{site.cost_before:.1%}",
                "yes" if site.forks else "no",
                f"{site.loses_nothing:.1%}",
                f"{site.loses_everything:.1%}",
            )
            for site in self.sites
        ]
        lines = [
            f"{self.model} with {self.method} (calibration {self.calibration}, batch norm {self.batch_norm}), "
            f"for samples of {'x'.join(map(str, self.input_size))}",
            format_table((*header, "loses nothing", "loses everything"), rows),
            f"a training step costs {self.cost:.2f} x the FLOPs of the plain model",
        ]
        if self.early_fork_reason is not None:
            lines.append(f"the batch doubles at the input: {self.early_fork_reason}")
        lines.append("the training forward: print(describe(model).code)")
        return "\n".join(lines)

    __repr__ = __str__


def describe(model: nn.Module) -> Description:
    """Describe what apply_rblock did to a model.

    Args:
        model: a converted model, also inside DistributedDataParallel or torch.compile.

    Raises:
        ConversionError: the model is not converted.
    """
    inner, rblock = find_converted(model, "describe")
    conversion = rblock.conversion
    return Description(
        model=inner._rblock_original.__name__,
        method=conversion.method,
        calibration=conversion.calibration,
        batch_norm=conversion.batch_norm,
        input_size=conversion.input_size,
        sites=tuple(
            _describe_site(site, tuple(rblock.masks_of(position)))
            for position, (site, _) in enumerate(conversion.masks)
        ),
        cost=conversion.cost,
        early_fork_reason=conversion.early_fork_reason,
        code=conversion.forwards["forward"].clean.readable,
    )


def _describe_site(site: Site, masks: tuple[Mask, ...]) -> SiteDescription:
    first = masks[0]
    nothing, everything = first.fit_shares()
    return SiteDescription(
        path=site.path,
        is_head=site.is_head,
        shape=first.shape,
        channel_axis=site.channel_axis,
        drop_prob=first.drop_prob,
        block_size=first.block_size if first.has_blocks else None,
        gamma=first.compute_gamma(first.map_size, first.drop_prob) if first.has_blocks else None,
        cost_before=site.cost_before,
        forks=any(mask.forks for mask in masks),
        masks=masks,
        loses_nothing=nothing,
        loses_everything=everything,
    )


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
