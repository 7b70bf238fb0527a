"""The stages of a network that does not name them: maps through which every path from input to output runs."""

from collections.abc import Iterable

from torch import nn

from rblock_fx.survey import ModuleRun, Shape, Survey, first_shape


def last_cut_of_each_resolution(survey: Survey) -> list[ModuleRun]:
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
    if not isinstance(run.output, tuple) or not is_map_shape(run.output, survey):
        return ()
    return run.output[:-1] if survey.channel_axis(run) == -1 else run.output[1:]


def is_map(run: ModuleRun, survey: Survey) -> bool:
    """Whether a module gave a tensor with channels and as many spatial axes as the input has, or a list with such."""
    shapes = run.output if isinstance(run.output, list) else [run.output]
    return any(is_map_shape(shape, survey) for shape in shapes)


def is_map_shape(shape: Shape | None, survey: Survey) -> bool:
    """Whether a shape (without the batch axis) has channels and as many spatial axes as the input has."""
    return shape is not None and len(shape) == len(survey.input_size)
