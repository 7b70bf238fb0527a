"""Which places of a network can carry masks: its stages."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from rblock_fx.errors import ConversionError, SettingError
from rblock_fx.replica import weightless_copy
from rblock_fx.survey import ModuleRun, Shape, Survey, survey_forward
from rblock_fx.tables import format_table


@dataclasses.dataclass(frozen=True)
class Site:
    """A place for masks.

    Attributes:
        index: number of the stage, 0-based in forward order; None for a place that is no stage.
        path: qualified name of the module whose output is masked; for the head, of the classifier, whose input is.
        shape: shape of one sample's map.
        channel_axis: 1 for (N, C, *S), -1 for (N, *S, C).
        cost_before: share of the forward FLOPs that comes before it, which a fork here does not double.
        is_head: whether this is the classifier's input.
    """

    index: int | None
    path: str
    shape: Shape
    channel_axis: int
    cost_before: float
    is_head: bool = False


class SiteList(tuple[Site, ...]):
    """Sites in forward order, printed as a table."""

    def __str__(self) -> str:
        rows = [
            (site.index, site.path, "x".join(map(str, site.shape)), site.channel_axis, f"{site.cost_before:.1%}")
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
        input_size: shape of one sample, (channels, *spatial); default the model's pretrained_cfg, else (3, 224, 224).

    Raises:
        ConversionError: the model does not run on a batch of this size.
    """
    return stages(model, survey_model(model, weightless_copy(model), input_size))


def survey_model(model: nn.Module, replica: nn.Module, input_size: Sequence[int] | None) -> Survey:
    """Record the forward of a model's weightless copy, by default on the input size of its pretrained_cfg.

    Raises:
        SettingError: the input size is no shape of a sample.
        ConversionError: the model does not run on a batch of this size.
    """
    if input_size is not None:
        size = tuple(input_size) if isinstance(input_size, Iterable) else ()
        if len(size) < 2 or not all(isinstance(length, int) and length > 0 for length in size):
            raise SettingError(
                f"input_size={input_size!r} is not the shape of one sample; expected (channels, *spatial), e.g. "
                "input_size=(3, 224, 224)"
            )
        return survey_forward(replica, size)
    config = getattr(model, "pretrained_cfg", None)
    size = tuple((config.get("input_size") if isinstance(config, dict) else None) or (3, 224, 224))
    try:
        return survey_forward(replica, size)
    except ConversionError:
        # timm's pretrained_cfg keeps its three channels under create_model(in_chans=1).
        stem = next((m for m in model.modules() if isinstance(m, nn.modules.conv._ConvNd)), None)
        if stem is None or stem.in_channels == size[0]:
            raise
        return survey_forward(replica, (stem.in_channels, *size[1:]))


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
        Site(
            index,
            run.path,
            shape_of(run),
            _channel_axis(run, survey, channels, channels_last),
            share(run.flops, survey),
        )
        for index, (run, channels) in enumerate(found)
    )


def is_map(run: ModuleRun, survey: Survey) -> bool:
    """Whether a module gave one tensor with channels and as many spatial axes as the input has."""
    return run.output_shape is not None and len(run.output_shape) == len(survey.input_size)


def _feature_info(model: nn.Module) -> list[dict[str, Any]]:
    described = getattr(model, "feature_info", None) or []
    entries = getattr(described, "info", described)  # timm's FeatureInfo, or the list it is made of
    return [entry for entry in entries if isinstance(entry, dict)]


def _last_cut_of_each_resolution(survey: Survey) -> list[ModuleRun]:
    """The last map of each resolution that everything passes through, at which the network computes.

    Where the network is built of blocks (modules of two and more convolutions) only their outputs count, so that a
    stem, a transition or a last 1x1 convolution is no stage; of nested modules with one output the outermost is meant.
    """
    maps = [
        run
        for run in survey.runs
        if is_map(run, survey) and run.value in survey.cuts and max(shape_of(run)[1:]) > 1 and run.path
    ]
    blocks = [
        run for run in maps if len(convolutions := _convolutions(run, survey)) > 1 and shape_of(run)[1:] in convolutions
    ]
    computed = [operation.convolution for operation in survey.operations if operation.convolution is not None]
    # A single convolution is the patch embedding of a network of tokens.
    candidates = blocks or [run for run in maps if shape_of(run)[1:] in computed and len(computed) > 1]
    last: dict[Shape, ModuleRun] = {}
    for run in candidates:
        several = any(
            run.first <= other.first and other.last < run.last and shape_of(other)[1:] != shape_of(run)[1:]
            for other in blocks
        )
        if not several:
            # Modules return innermost first, so of equal values the later one is the outer.
            last[shape_of(run)[1:]] = run
    return sorted(last.values(), key=lambda run: run.last)


def _convolutions(run: ModuleRun, survey: Survey) -> list[Shape]:
    operations = survey.operations[run.first : run.last]
    return [operation.convolution for operation in operations if operation.convolution is not None]


def _channel_axis(run: ModuleRun, survey: Survey, channels: int | None, channels_last: bool) -> int:
    """The axis that does not grow with the image; else the one of timm's num_chs; else by the model's output_fmt."""
    found = survey.channel_axis(run)
    if found is not None:
        return found
    shape = shape_of(run)
    matches = {axis for axis, size in ((1, shape[0]), (-1, shape[-1])) if size == channels}
    return matches.pop() if len(matches) == 1 else -1 if channels_last else 1


def shape_of(run: ModuleRun) -> Shape:
    """The shape that a module gave, without the batch axis; () where it gave no single tensor."""
    return run.output_shape or ()


def share(flops: int, survey: Survey) -> float:
    """FLOPs as a share of the whole forward."""
    return flops / survey.flops if survey.flops else 0.0
