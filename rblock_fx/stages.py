"""Which places of a network can carry masks: its stages."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from rblock_fx.cuts import is_map, is_map_shape, last_cut_of_each_resolution
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
        found = [(run, None) for run in last_cut_of_each_resolution(survey)]
    return SiteList(
        site_at(run, survey, index=index, channel_axis=channel_axis(run, survey, channels, channels_last))
        for index, (run, channels) in enumerate(found)
    )


def site_at(run: ModuleRun, survey: Survey, *, index: int | None, channel_axis: int) -> Site:
    """The site behind one call of a module that gives a map, or several in a list or tuple."""
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


def _feature_info(model: nn.Module) -> list[dict[str, Any]]:
    described = getattr(model, "feature_info", None) or []
    entries = getattr(described, "info", described)  # timm's FeatureInfo, or the list it is made of
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
    # On a network of one image size: of a square image, the axis that is unlike the others.
    shape = shapes[0]
    square = len(set(survey.input_size[1:])) == 1 and len(shape) > 2
    unlike = [axis for axis, rest in ((1, shape[1:]), (-1, shape[:-1])) if len(set(rest)) == 1]
    return unlike[0] if square and len(unlike) == 1 else -1 if channels_last else 1


def share(flops: int, survey: Survey) -> float:
    """FLOPs as a share of the whole forward."""
    return flops / survey.flops if survey.flops else 0.0
