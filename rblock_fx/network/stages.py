"""The places of a network that can carry masks: its stages."""

import dataclasses
from collections.abc import Iterable
from typing import Any

from torch import nn

from rblock_fx.network.record import ModuleRun
from rblock_fx.network.replica import Shape, first_shape
from rblock_fx.network.survey import Survey


@dataclasses.dataclass(frozen=True)
class Site:
    """A place for masks.

    Attributes:
        index: number of the stage, 0-based in forward order; None for a place that is not a stage.
        path: qualified name of the module whose output is masked; for the head, of the classifier, whose input is.
        shape: shape of one sample's map; the first, if there are several.
        channel_axis: 1 for (N, C, *S), -1 for (N, *S, C).
        cost_before: share of the forward's FLOPs before it, which a fork here does not double, in [0, 1].
        is_head: whether this is the classifier's input.
        maps: for a module that returns a list or tuple, the shape of each item, None for an item that is not a map.
    """

    index: int | None
    path: str
    shape: Shape
    channel_axis: int
    cost_before: float
    is_head: bool = False
    maps: tuple[Shape | None, ...] = ()

    @property
    def shapes(self) -> dict[int | None, Shape]:
        """The shapes of its maps by their place in the returned list; {None: shape} for a module that returns one."""
        return {place: shape for place, shape in enumerate(self.maps) if shape is not None} or {None: self.shape}


class SiteList(tuple[Site, ...]):
    """Sites in forward order, printed as a table."""

    def __str__(self) -> str:
        rows = [
            (
                site.index,
                site.path,
                ", ".join("x".join(map(str, shape)) for shape in site.shapes.values()),
                site.channel_axis,
                f"{site.cost_before:.1%}",
            )
            for site in self
        ]
        return format_table(("index", "path", "shape", "channel_axis", "cost_before"), rows)

    __repr__ = __str__


def format_table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A plain text table with columns aligned left; None prints as a dash."""
    cells = [list(header), *([("-" if cell is None else str(cell)) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def find_stages(model: nn.Module, survey: Survey) -> SiteList:
    """Stages from timm's feature_info where it names maps, otherwise the last cut of each resolution."""
    channels_last = getattr(model, "output_fmt", None) == "NHWC"
    described = [(entry, _runs_of_stage(entry.get("module"), survey)) for entry in _feature_info(model)]
    found: list[tuple[ModuleRun, int | None]]
    if any(runs for _, runs in described):
        # Where timm's stages are tokens, a patch embedding is not a stage either.
        found = [
            (runs[-1], entry.get("num_chs")) for entry, runs in described if runs and is_used_map(runs[-1], survey)
        ]
    else:
        found = [(run, None) for run in _last_cut_of_each_resolution(survey)]
    return SiteList(
        site_at(run, survey, index=index, channel_axis=channel_axis(run, survey, channels, channels_last))
        for index, (run, channels) in enumerate(found)
    )


def site_at(run: ModuleRun, survey: Survey, *, index: int | None, channel_axis: int) -> Site:
    """The site behind one call of a module that returns a map, or several in a list or tuple."""
    maps = (
        tuple(shape if is_map_shape(shape, survey) else None for shape in run.output)
        if isinstance(run.output, list)
        else ()
    )
    first = next((shape for shape in maps if shape is not None), None) or first_shape(run.output) or ()
    return Site(index, run.path, first, channel_axis, share(run.flops, survey), maps=maps)


def containers_of(sites: Iterable[Site]) -> tuple[str, ...]:
    """The paths of the modules around sites, without the model itself."""
    names = [site.path.split(".") for site in sites]
    return tuple(dict.fromkeys(".".join(path[:depth]) for path in names for depth in range(1, len(path))))


def _runs_of_stage(name: str | None, survey: Survey) -> list[ModuleRun]:
    """The calls of a module in timm's feature_info; features_only models have it under another name."""
    names = (name, name.replace(".", "_"), f"model.{name}") if name else ()
    return next((runs for runs in map(survey.runs_of, names) if runs), [])


def _feature_info(model: nn.Module) -> list[dict[str, Any]]:
    described = getattr(model, "feature_info", None) or []
    entries = getattr(described, "info", described)  # timm's FeatureInfo, or the list inside it
    return [entry for entry in entries if isinstance(entry, dict)]


def channel_axis(run: ModuleRun, survey: Survey, channels: int | None, channels_last: bool) -> int:
    """The axis that is timm's num_chs; else the one that does not grow with the image; else by shape or output_fmt."""
    shapes = [shape for shape in (run.output if isinstance(run.output, list) else [run.output]) if shape]
    matches = {axis for shape in shapes for axis, size in ((1, shape[0]), (-1, shape[-1])) if size == channels}
    if len(matches) == 1:
        return matches.pop()
    grown = survey.channel_axis(run)
    if grown is not None:
        return grown
    # The network runs on one image size only: of a square image, take the axis that differs from the others.
    shape = shapes[0]
    square = len(set(survey.input_size[1:])) == 1 and len(shape) > 2
    unlike = [axis for axis, rest in ((1, shape[1:]), (-1, shape[:-1])) if len(set(rest)) == 1]
    return unlike[0] if square and len(unlike) == 1 else -1 if channels_last else 1


def share(flops: int, survey: Survey) -> float:
    """FLOPs as a share of the whole forward."""
    return flops / survey.flops if survey.flops else 0.0


def is_map(run: ModuleRun, survey: Survey) -> bool:
    """Whether a module returned a map (channels and the spatial axes of the input), or a list with one."""
    shapes = run.output if isinstance(run.output, list) else [run.output]
    return any(is_map_shape(shape, survey) for shape in shapes)


def is_used_map(run: ModuleRun, survey: Survey) -> bool:
    """Whether anything behind a module uses a map that it returned."""
    shapes = [shape for shape in (run.output if isinstance(run.output, list) else [run.output]) if shape is not None]
    return any(is_map_shape(shape, survey) and survey.is_used(run, place) for place, shape in enumerate(shapes))


def is_map_shape(shape: Shape | None, survey: Survey) -> bool:
    """Whether a shape (without the batch axis) has channels and as many spatial axes as the input."""
    return shape is not None and len(shape) == len(survey.input_size)


def _last_cut_of_each_resolution(survey: Survey) -> list[ModuleRun]:
    """The last map of each resolution that everything passes through on the way to the end of the encoder.

    Where the network consists of blocks (modules with two or more layers that compute on maps) only their outputs
    count, so that a stem, a transition or a last 1x1 convolution is not a stage; of nested modules with one output the
    outermost counts. A network that computes more on tokens than on maps has no stages.
    """
    sizes = {run: _resolution(run, survey) for run in survey.runs if not isinstance(run.output, list) and run.path}
    layers = [run for run, size in sizes.items() if run.own_flops and size]
    tokens = [run for run in sizes if len(first_shape(run.output) or ()) == 2 < len(survey.input_size)]
    # A single layer is the patch embedding of a network of tokens.
    if len(layers) < 2 or _own_flops(tokens) > _own_flops(layers):
        return []
    end, before = _encoder_end(survey, sizes)
    cuts = survey.paths_to(end).cuts
    maps = [run for run, size in sizes.items() if run.value in cuts and max(size, default=1) > 1 and run.first < before]
    inside = {run: [layer for layer in layers if run.first <= layer.first and layer.last <= run.last] for run in maps}
    blocks = [run for run in maps if len(inside[run]) > 1 and sizes[run] in map(sizes.get, inside[run])]
    last: dict[Shape, ModuleRun] = {}
    for run in blocks or [run for run in maps if sizes[run] in map(sizes.get, layers)]:
        several = any(
            run.first <= other.first and other.last < run.last and sizes[other] != sizes[run] for other in blocks
        )
        if not several:
            # Modules return innermost first, so of equal values the later one is the outer.
            last[sizes[run]] = run
    return sorted(last.values(), key=lambda run: run.last)


def _encoder_end(survey: Survey, sizes: dict[ModuleRun, Shape]) -> tuple[int, int]:
    """The value with which the encoder ends, and the operation at which the head begins (one past all without a head).

    A classifier's encoder ends with its output, as does a backbone's, whose (deepest) output is its coarsest map.
    Otherwise a decoder refines the coarsest map, and the encoder ends with the last such map before the head.
    """
    output, shape = survey.outputs[0]
    spatial = {run: size for run, size in sizes.items() if max(size, default=1) > 1 and run.value >= 0}
    if not is_map_shape(shape, survey):
        cuts = survey.paths_to(output).cuts
        coarsest = min((size for run, size in spatial.items() if run.value in cuts), default=())
        return output, _head_start(survey, spatial, coarsest)
    coarsest = min(spatial.values(), default=())
    for value, shape in survey.outputs:
        if coarsest in (shape[1:], shape[:-1]):
            return value, len(survey.operations) + 1
    head = _head_start(survey, spatial, coarsest)
    last = [run for run, size in spatial.items() if size == coarsest and run.last <= head]
    return (last[-1].value if last else output), head


def _head_start(survey: Survey, sizes: dict[ModuleRun, Shape], coarsest: Shape) -> int:
    """The first operation of the head: the outermost module around the last layer that takes the coarsest map."""
    layer = last_layer(survey)
    if layer is None:
        return len(survey.operations) + 1
    reached = min((run.last for run, size in sizes.items() if size == coarsest), default=0)
    heads = [
        run
        for run in survey.runs
        if run.first <= layer.first
        and layer.last <= run.last
        and run.first >= reached
        and run.input_shape
        and coarsest in (run.input_shape[1:], run.input_shape[:-1])
    ]
    return min(run.first for run in [*heads, layer])


def last_layer(survey: Survey) -> ModuleRun | None:
    """The last linear layer or convolution on the way to the (first) output."""
    modules = dict(survey.replica.named_modules())
    weighted = (nn.Linear, nn.modules.conv._ConvNd)
    used = survey.paths_to(survey.outputs[0][0]).values
    on_the_way = (run for run in reversed(survey.runs) if run.value in used)
    return next((run for run in on_the_way if isinstance(modules[run.path], weighted)), None)


def _own_flops(runs: Iterable[ModuleRun]) -> int:
    return sum(run.own_flops for run in runs)


def _resolution(run: ModuleRun, survey: Survey) -> Shape:
    """The spatial part of a map; () for anything else."""
    if not isinstance(run.output, tuple) or not is_map_shape(run.output, survey):
        return ()
    return run.output[:-1] if survey.channel_axis(run) == -1 else run.output[1:]
