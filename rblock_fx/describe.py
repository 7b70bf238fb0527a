"""What apply_rblock did to a model, as data that prints as a table."""

import dataclasses

from torch import nn

from rblock_fx.conversion import find_converted
from rblock_fx.masks.methods import Mask
from rblock_fx.stages import Site
from rblock_fx.tables import format_table


@dataclasses.dataclass(frozen=True)
class SiteDescription:
    """One site of a converted model.

    Attributes:
        path: qualified name of the masked module (of the classifier, for the head), "[i]" behind it where the module
            gives a list and this is its item i.
        shape: shape of one sample's map.
        channel_axis: 1 for (N, C, *S), -1 for (N, *S, C).
        drop_prob: present drop probability.
        block_size: side of a block; None for methods without blocks.
        gamma: present probability of a block centre; None for methods without blocks.
        cost_before: share of the forward FLOPs before the site.
        forks: whether the batch doubles here.
    """

    path: str
    shape: tuple[int, ...]
    channel_axis: int
    drop_prob: float
    block_size: int | None
    gamma: float | None
    cost_before: float
    forks: bool


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
        early_fork_reason: why the batch had to double at the input; None where it doubles at the first mask.
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
                site.path,
                "x".join(map(str, site.shape)),
                site.channel_axis,
                f"{site.drop_prob:g}",
                site.block_size,
                None if site.gamma is None else f"{site.gamma:.5f}",
                f"{site.cost_before:.1%}",
                "yes" if site.forks else "no",
            )
            for site in self.sites
        ]
        lines = [
            f"{self.model} with {self.method} (calibration {self.calibration}, batch norm {self.batch_norm}), "
            f"for samples of {'x'.join(map(str, self.input_size))}",
            format_table(header, rows),
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
        model=inner.original_class.__name__,
        method=conversion.method,
        calibration=conversion.calibration,
        batch_norm=conversion.batch_norm,
        input_size=conversion.input_size,
        sites=tuple(
            _describe_site(site, mask, place)
            for position, (site, places) in enumerate(conversion.masks)
            for mask, place in zip(rblock.masks_of(position), places.values(), strict=True)
        ),
        cost=conversion.cost,
        early_fork_reason=conversion.early_fork_reason,
        code=conversion.forward.source,
    )


def _describe_site(site: Site, mask: Mask, place: int | None) -> SiteDescription:
    item = "" if place is None else f"[{place}]"
    return SiteDescription(
        path=f"{site.path} (input)" if site.is_head else site.path + item,
        shape=mask.shape,
        channel_axis=site.channel_axis,
        drop_prob=mask.drop_prob,
        block_size=mask.block_size if mask.has_blocks else None,
        gamma=mask.compute_gamma(mask.map_size, mask.drop_prob) if mask.has_blocks else None,
        cost_before=site.cost_before,
        forks=mask.forks,
    )
