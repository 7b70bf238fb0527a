"""A description of a converted model, as data that prints as a table."""

import dataclasses

from torch import nn

from rblock_fx.converted import find_converted
from rblock_fx.masks.methods import Mask
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
        code: the generated training forward, in which self is the model.
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
    nothing, everything = first.fit_shares() if hasattr(first, "fit_shares") else (0.0, 0.0)
    return SiteDescription(
        path=site.path,
        is_head=site.is_head,
        shape=first.shape,
        channel_axis=site.channel_axis,
        drop_prob=first.drop_prob,
        block_size=first.block_size if first.has_blocks else None,
        gamma=first.block_centre_probability(first.map_size) if first.has_blocks else None,
        cost_before=site.cost_before,
        forks=any(mask.forks for mask in masks),
        masks=masks,
        loses_nothing=nothing,
        loses_everything=everything,
    )
