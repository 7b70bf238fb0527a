"""Which places of a network can carry masks: its stages."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from rblock_fx.errors import ConversionError, SettingError
from rblock_fx.replica import weightless_copy
from rblock_fx.survey import ModuleRun, Shape, Survey, first_shape, survey_forward
from rblock_fx.tables import format_table
from rblock_fx.unsuitable import refuse_unsuitable


@dataclasses.dataclass(frozen=True)
class Site:
    """A place for masks.

    Attributes:
        index: number of the stage, 0-based in forward order; None for a place that is no stage.
        path: qualified name of the module whose output is masked; for the head, of the classifier, whose input is.
        shape: shape of one sample's map; the first, if there are several.
        channel_axis: 1 for (N, C, *S), -1 for (N, *S, C).
        cost_before: share of the forward FLOPs that comes before it, which a fork here does not double.
        is_head: whether this is the classifier's input.
        maps: for a module that gives a list or tuple, the shape of each item, None for an item that is no map.
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
        """The shapes of its maps by their place in the list; None stands for the one map of a module that gives one."""
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


def list_sites(model: nn.Module, input_size: Sequence[int] | None = None) -> SiteList:
    """List the stages of a model that can carry masks, in forward order; the model is left as it is.

    Stages are timm's `feature_info` where the model has it, numbered like timm's `out_indices`. For other models they
    are the last map of each resolution through which every path from input to output runs.

    Args:
        model: any CNN.
        input_size: shape of one sample, (channels, *spatial); default the model's pretrained_cfg, else (3, 224, 224)
            or, for networks of 3-D convolutions, (3, 16, 112, 112) or (3, 16, 224, 224).

    Raises:
        ConversionError: the model does not run on a batch of this size.
    """
    return stages(model, survey_model(model, weightless_copy(model), input_size))


def survey_model(model: nn.Module, replica: nn.Module, input_size: Sequence[int] | None) -> Survey:
    """Record the forward of a model's weightless copy, by default on the input size of its pretrained_cfg.

    Raises:
        SettingError: the input size is no shape of a sample.
        ConversionError: the model does not run on a batch of this size, or is none that could be converted.
    """
    refuse_unsuitable(model)
    if input_size is not None:
        size = tuple(input_size) if isinstance(input_size, Iterable) else ()
        if len(size) < 2 or not all(isinstance(length, int) and length > 0 for length in size):
            raise SettingError(
                f"input_size={input_size!r} is not the shape of one sample; expected (channels, *spatial), e.g. "
                "input_size=(3, 224, 224)"
            )
        return survey_forward(replica, size)
    refusal: ConversionError | None = None
    for size in _usual_input_sizes(model):
        try:
            return survey_forward(replica, size)
        except ConversionError as error:
            refusal = refusal or error
    assert refusal is not None  # there is always a usual size
    raise refusal


def _usual_input_sizes(model: nn.Module) -> list[Shape]:
    """The size of timm's pretrained_cfg, also with another number of channels; else ImageNet's, or Kinetics'."""
    stem = next((module for module in model.modules() if isinstance(module, nn.modules.conv._ConvNd)), None)
    channels = 3 if stem is None else stem.in_channels
    config = getattr(model, "pretrained_cfg", None)
    size = tuple((config.get("input_size") if isinstance(config, dict) else None) or ())
    if size:
        return [size, (channels, *size[1:])]
    if isinstance(stem, nn.Conv3d):
        return [(channels, 16, 112, 112), (channels, 16, 224, 224)]
    return [(channels, 224, 224)]


def stages(model: nn.Module, survey: Survey) -> SiteList:
    """Take timm's feature_info where it names maps, else cut the graph."""
    channels_last = getattr(model, "output_fmt", None) == "NHWC"
    described = [(entry, survey.runs_of(entry.get("module", ""))) for entry in _feature_info(model)]
    found: list[tuple[ModuleRun, int | None]]
    if any(runs for _, runs in described):
        # Where what timm calls stages are tokens, a patch embedding is no stage either.
        found = [(runs[-1], entry.get("num_chs")) for entry, runs in described if runs and is_map(runs[-1], survey)]
    else:
        found = [(run, None) for run in _last_cut_of_each_resolution(survey)]
    return SiteList(
        site_at(run, survey, index=index, channel_axis=_channel_axis(run, survey, channels, channels_last))
        for index, (run, channels) in enumerate(found)
    )


def site_at(run: ModuleRun, survey: Survey, *, index: int | None, channel_axis: int) -> Site:
    """The site behind one call of a module that gives a map, or several in a list or tuple."""
    maps = (
        tuple(shape if _is_map_shape(shape, survey) else None for shape in run.output)
        if isinstance(run.output, list)
        else ()
    )
    first = next((shape for shape in maps if shape is not None), None) or first_shape(run.output) or ()
    return Site(index, run.path, first, channel_axis, share(run.flops, survey), maps=maps)


def containers_of(sites: Iterable[Site]) -> tuple[str, ...]:
    """The paths of the modules around sites, without the model itself."""
    names = [site.path.split(".") for site in sites]
    return tuple(dict.fromkeys(".".join(path[:depth]) for path in names for depth in range(1, len(path))))


def is_map(run: ModuleRun, survey: Survey) -> bool:
    """Whether a module gave a tensor with channels and as many spatial axes as the input has, or a list with such."""
    shapes = run.output if isinstance(run.output, list) else [run.output]
    return any(_is_map_shape(shape, survey) for shape in shapes)


def _is_map_shape(shape: Shape | None, survey: Survey) -> bool:
    return shape is not None and len(shape) == len(survey.input_size)


def _feature_info(model: nn.Module) -> list[dict[str, Any]]:
    described = getattr(model, "feature_info", None) or []
    entries = getattr(described, "info", described)  # timm's FeatureInfo, or the list it is made of
    return [entry for entry in entries if isinstance(entry, dict)]


def _last_cut_of_each_resolution(survey: Survey) -> list[ModuleRun]:
    """The last map of each resolution that everything passes through, at which the network computes, but for its head.

    Where the network is built of blocks (modules with two and more layers that compute on maps) only their outputs
    count, so that a stem, a transition or a last 1x1 convolution is no stage; of nested modules with one output the
    outermost is meant. A network that computes more on tokens than on maps has no stages.
    """
    sizes = {run: _resolution(run, survey) for run in survey.runs if not isinstance(run.output, list) and run.path}
    layers = [run for run, size in sizes.items() if run.own_flops and size]
    tokens = [run for run in sizes if len(first_shape(run.output) or ()) == 2 < len(survey.input_size)]
    # A single layer is the patch embedding of a network of tokens.
    if len(layers) < 2 or _own_flops(tokens) > _own_flops(layers):
        return []
    maps = [run for run, size in sizes.items() if run.value in survey.cuts and max(size, default=1) > 1]
    maps = _before_the_head(maps, sizes, survey)
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


def _before_the_head(maps: list[ModuleRun], sizes: dict[ModuleRun, Shape], survey: Survey) -> list[ModuleRun]:
    """Leave out the maps of a head: of logits, as in segmentation, and of the module that computes them.

    The head is the outermost module around the last layer that takes the coarsest map. A network whose output is such a
    map is a backbone, without a head.
    """
    coarsest = min((sizes[run] for run in maps), default=())
    layer = last_layer(survey)
    if layer is None or coarsest in (survey.output_shape[1:], survey.output_shape[:-1]):
        return maps
    around = [run for run in survey.runs if run.first <= layer.first and layer.last <= run.last]
    reached = min((run.last for run in maps if sizes[run] == coarsest), default=0)
    heads = [
        run
        for run in around
        if run.first >= reached and run.input_shape and coarsest in (run.input_shape[1:], run.input_shape[:-1])
    ]
    first = min(run.first for run in [*heads, layer])
    return [run for run in maps if run not in around and run.first < first]


def last_layer(survey: Survey) -> ModuleRun | None:
    """The last linear layer or convolution on the way to the (first) output."""
    modules = dict(survey.replica.named_modules())
    weighted = (nn.Linear, nn.modules.conv._ConvNd)
    on_the_way = (run for run in reversed(survey.runs) if run.value in survey.used)
    return next((run for run in on_the_way if isinstance(modules[run.path], weighted)), None)


def _own_flops(runs: Iterable[ModuleRun]) -> int:
    return sum(run.own_flops for run in runs)


def _resolution(run: ModuleRun, survey: Survey) -> Shape:
    """The spatial part of a map; () for what is none."""
    if not isinstance(run.output, tuple) or not _is_map_shape(run.output, survey):
        return ()
    return run.output[:-1] if survey.channel_axis(run) == -1 else run.output[1:]


def _channel_axis(run: ModuleRun, survey: Survey, channels: int | None, channels_last: bool) -> int:
    """The axis that is timm's num_chs; else the one that does not grow with the image; else by timm's output_fmt."""
    shapes = [shape for shape in (run.output if isinstance(run.output, list) else [run.output]) if shape]
    matches = {axis for shape in shapes for axis, size in ((1, shape[0]), (-1, shape[-1])) if size == channels}
    if len(matches) == 1:
        return matches.pop()
    return survey.channel_axis(run) or (-1 if channels_last else 1)


def share(flops: int, survey: Survey) -> float:
    """FLOPs as a share of the whole forward."""
    return flops / survey.flops if survey.flops else 0.0
