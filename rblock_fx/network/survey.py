"""What one forward of a network consists of: its module calls, and the maps that every path passes through."""

import contextlib
import dataclasses
import functools
import operator
from collections.abc import Sequence
from typing import Any

from torch import nn

from rblock_fx.errors import ConversionError, SettingError, first_line
from rblock_fx.network.record import ModuleRun, Operation, Recorder, Shape, after_calls, first_shape, output_shape
from rblock_fx.network.record import tensors_in
from rblock_fx.network.replica import dry_run, eval_mode, meta_batch

_ROWS = 2


@dataclasses.dataclass(frozen=True)
class Paths:
    """The values on the paths from the input to one value, and those that every path passes through."""

    values: frozenset[int]
    cuts: frozenset[int]


@dataclasses.dataclass(frozen=True, eq=False)
class Survey:
    """The evaluation forward of a model, recorded.

    Attributes:
        replica: the weightless copy that ran.
        input_size: shape of one sample.
        runs: the calls of modules, in the order in which they returned.
        operations: the operations, in order.
        source: the input's value.
        outputs: the value and the shape (without the batch axis) of every tensor in the output.
        flops: FLOPs of the forward for the rows of the survey.
    """

    replica: nn.Module
    input_size: Shape
    runs: tuple[ModuleRun, ...]
    operations: tuple[Operation, ...]
    source: int
    outputs: tuple[tuple[int, Shape], ...]
    flops: int

    def runs_of(self, path: str) -> list[ModuleRun]:
        """The calls of one module, in order."""
        return [run for run in self.runs if run.path == path]

    def channel_axis(self, run: ModuleRun) -> int | None:
        """The axis of a map that does not grow with the image: 1 for (N, C, *S), -1 for (N, *S, C), None if unclear."""
        small, large = first_shape(run.output), self._grown.get(run.path)
        if small is None or large is None or len(small) != len(large):
            return None
        grows = [before != after for before, after in zip(small, large, strict=True)]
        if not grows[0] and all(grows[1:]):
            return 1
        return -1 if not grows[-1] and all(grows[:-1]) else None

    def position(self, path: str) -> int:
        """Position of a module in forward order; of modules that end together the inner one comes first."""
        return max(index for index, run in enumerate(self.runs) if run.path == path)

    @functools.cache  # noqa: B019 - a survey lives as long as one conversion
    def paths_to(self, sink: int) -> Paths:
        """The paths from the input to a value.

        Every path passes through a value if, at some moment, it is the only one alive of those that lie on a path.
        """
        reached = {self.source}
        for operation in self.operations:
            if reached.intersection(operation.reads):
                reached.update(operation.writes)
        needed = {sink}
        last_use = {sink: len(self.operations)}
        for index in reversed(range(len(self.operations))):
            operation = self.operations[index]
            if needed.intersection(operation.writes):
                needed.update(operation.reads)
                for value in operation.reads:
                    last_use.setdefault(value, index)
        cuts = set()
        alive = {self.source}
        for index, operation in enumerate(self.operations):
            alive.update(value for value in operation.writes if value in reached and value in needed)
            alive = {value for value in alive if last_use.get(value, -1) > index}
            if len(alive) == 1:
                cuts.update(alive)
        return Paths(frozenset(reached & needed), frozenset(cuts))

    @functools.cached_property
    def _grown(self) -> dict[str, Shape | None]:
        """The shapes that modules return for samples of twice the size along every spatial axis."""
        shapes: dict[str, Shape | None] = {}

        def record(path: str, _inputs: Any, output: Any) -> None:
            shapes[path] = first_shape(output_shape(output))

        size = (self.input_size[0], *(2 * length for length in self.input_size[1:]))
        # A network may run on one size only; what ran until the error is recorded.
        with eval_mode(self.replica), after_calls(self.replica, record), dry_run(), contextlib.suppress(Exception):
            self.replica(meta_batch(self.replica, _ROWS, size))
        return shapes


def survey_forward(replica: nn.Module, input_size: Shape) -> Survey:
    """Record one forward of a weightless copy in eval mode; the copy's modes are restored.

    Raises:
        ConversionError: the model does not run on a batch of this input size.
    """
    recorder = Recorder(replica)
    name = type(replica).__name__
    try:
        with eval_mode(replica), dry_run(), recorder.hooked():
            x = meta_batch(replica, _ROWS, input_size)
            source = recorder.value_of(x)
            with recorder:
                output = replica(x)
    except Exception as error:
        raise ConversionError(
            f"{name} does not run on a batch of {('N', *input_size)}: {type(error).__name__}: {first_line(error)}\n"
            "Pass the shape of one sample: input_size=(channels, height, width), for video (channels, frames, height, "
            "width). A model whose forward takes no image batch (text, lists of images) cannot be converted."
        ) from error
    tensors = [tensor for tensor in tensors_in(output) if tensor.dim() > 0]
    if not tensors:
        raise ConversionError(f"{name} returns {type(output).__name__} without a tensor; expected logits or a map")
    outputs = tuple((recorder.value_of(tensor), tuple(tensor.shape[1:])) for tensor in tensors)
    operations, runs = tuple(recorder.operations), tuple(recorder.runs)
    return Survey(replica, input_size, runs, operations, source, outputs, recorder.flops)


def survey_model(model: nn.Module, replica: nn.Module, input_size: Sequence[int] | None) -> Survey:
    """Record the forward of a model's weightless copy, by default on the input size of its pretrained_cfg.

    Raises:
        SettingError: the input size is not the shape of a sample.
        ConversionError: the model does not run on a batch of this size.
    """
    if input_size is not None:
        return survey_forward(replica, _check_input_size(input_size))
    refusal: ConversionError | None = None
    for size in _usual_input_sizes(model):
        try:
            return survey_forward(replica, size)
        except ConversionError as error:
            refusal = refusal or error
    assert refusal is not None  # there is always a usual size
    raise refusal


def _check_input_size(input_size: Any) -> Shape:
    try:
        size = tuple(operator.index(length) for length in input_size)
    except TypeError:
        size = ()
    if len(size) < 2 or min(size) < 1:
        raise SettingError(
            f"input_size must be the shape of one sample, (channels, *spatial), got {input_size!r}; e.g. "
            "input_size=(3, 224, 224)"
        )
    return size


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
