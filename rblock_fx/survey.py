"""What runs in a model, in which order, and through which maps everything passes: one recorded forward pass."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from rblock_fx.errors import ConversionError
from rblock_fx.replica import dry_run, meta_batch

Shape = tuple[int, ...]

# Any batch will do; a size that no network uses for anything else makes shapes in messages readable.
_ROWS = 2


@dataclasses.dataclass(frozen=True)
class ModuleRun:
    """One call of one module: what it gave and took, without the batch axis, and when.

    `value` numbers the tensor it gave; `first` and `last` are the operations that it ran, as indices into
    `Survey.operations`; `flops_before` and `flops` are what the network had computed when it began and returned.
    """

    path: str
    output_shape: Shape | None
    input_shape: Shape | None
    value: int
    first: int
    last: int
    flops_before: int
    flops: int


@dataclasses.dataclass(frozen=True)
class Operation:
    """One dispatched operation: the values it read and wrote, and for convolutions the map it gave."""

    reads: tuple[int, ...]
    writes: tuple[int, ...]
    convolution: Shape | None


@dataclasses.dataclass(frozen=True)
class Survey:
    """The evaluation forward of a model, recorded.

    `cuts` are the values through which every path from the input to the (first) output runs; `grown` the shapes that
    modules give for samples of twice the size, as far as the network runs on such.
    """

    input_size: Shape
    runs: tuple[ModuleRun, ...]
    operations: tuple[Operation, ...]
    cuts: frozenset[int]
    flops: int
    grown: dict[str, Shape | None]

    def runs_of(self, path: str) -> list[ModuleRun]:
        """The calls of one module, in order."""
        return [run for run in self.runs if run.path == path]

    def channel_axis(self, run: ModuleRun) -> int | None:
        """The axis of a map that does not grow with the image: 1 for (N, C, *S), -1 for (N, *S, C), None if unclear."""
        small, large = run.output_shape, self.grown.get(run.path)
        if small is None or large is None or len(small) != len(large):
            return None
        grows = [before != after for before, after in zip(small, large, strict=True)]
        if not grows[0] and all(grows[1:]):
            return 1
        return -1 if not grows[-1] and all(grows[:-1]) else None

    def position(self, path: str) -> int:
        """Where a module stands in forward order: of modules that end together the inner comes first."""
        return max(index for index, run in enumerate(self.runs) if run.path == path)


def survey_forward(replica: nn.Module, input_size: Shape) -> Survey:
    """Record one forward of a weightless copy in eval mode; the copy's mode is put back.

    Raises:
        ConversionError: the model does not run on a batch of this input size.
    """
    recorder = _Recorder(replica)
    modes = {module: module.training for module in replica.modules()}
    replica.eval()
    try:
        with dry_run(), recorder.hooked():
            x = meta_batch(replica, _ROWS, input_size)
            recorder.start(x)
            with recorder:
                output = replica(x)
        grown = _grown_shapes(replica, input_size)
    except Exception as error:
        raise ConversionError(
            f"{type(replica).__name__} does not run on a batch of {('N', *input_size)}: {type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else ''}\nPass the shape of one sample: "
            "input_size=(channels, height, width); a model whose forward takes no image batch (detection, text) "
            "cannot be converted, but its backbone can, passed alone."
        ) from error
    finally:
        for module, training in modes.items():
            module.training = training
    return recorder.survey(input_size, output, grown)


class FlopCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts FLOPs by torch's own formulas, without the per-module bookkeeping of its FlopCounterMode."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=result)
        return result


class _Recorder(FlopCounter):  # type: ignore[no-untyped-call]
    """Numbers every tensor value; an in-place operation makes a new one."""

    def __init__(self, replica: nn.Module) -> None:
        super().__init__()
        self.replica = replica
        self.values: dict[int, int] = {}
        self.alive: list[Tensor] = []  # ids stay unique while the tensors live; on meta they hold no memory
        self.operations: list[Operation] = []
        self.runs: list[ModuleRun] = []
        self.count = 0

    def start(self, x: Tensor) -> None:
        self.new_value(x)

    def new_value(self, tensor: Tensor) -> int:
        self.alive.append(tensor)
        self.values[id(tensor)] = self.count
        self.count += 1
        return self.count - 1

    def value_of(self, tensor: Tensor) -> int:
        return self.values[id(tensor)] if id(tensor) in self.values else self.new_value(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        reads = tuple(map(self.value_of, _tensors((args, kwargs))))
        result = super().__torch_dispatch__(func, types, args, kwargs)
        writes = tuple(map(self.new_value, _tensors(result)))
        is_convolution = func.overloadpacket is torch.ops.aten.convolution
        convolution = tuple(result.shape[2:]) if is_convolution else None
        self.operations.append(Operation(reads, writes, convolution))
        return result

    @contextlib.contextmanager
    def hooked(self) -> Iterator[None]:
        """Record every module call of the copy while the context is open."""
        started: list[tuple[int, int, Shape | None]] = []
        handles = []
        for path, module in self.replica.named_modules():

            def before(_module: nn.Module, inputs: Any) -> None:
                started.append((len(self.operations), self.flops, _sample_shape(inputs[0]) if inputs else None))

            def after(_module: nn.Module, _inputs: Any, output: Any, path: str = path) -> None:
                first, flops_before, input_shape = started.pop()
                self.runs.append(
                    ModuleRun(
                        path=path,
                        output_shape=_sample_shape(output),
                        input_shape=input_shape,
                        value=self.value_of(output) if isinstance(output, Tensor) else -1,
                        first=first,
                        last=len(self.operations),
                        flops_before=flops_before,
                        flops=self.flops,
                    )
                )

            handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def survey(self, input_size: Shape, output: Any, grown: dict[str, Shape | None]) -> Survey:
        outputs = _tensors(output)
        if not outputs:
            name = type(self.replica).__name__
            raise ConversionError(f"{name} gives {type(output).__name__} without a tensor; expected logits or a map.")
        cuts = _cuts(self.operations, source=0, sink=self.value_of(outputs[0]))
        return Survey(input_size, tuple(self.runs), tuple(self.operations), frozenset(cuts), self.flops, grown)


def _grown_shapes(replica: nn.Module, input_size: Shape) -> dict[str, Shape | None]:
    """The shapes that modules give for samples of twice the size along every spatial axis."""
    shapes: dict[str, Shape | None] = {}
    handles = []
    for path, module in replica.named_modules():

        def record(_module: nn.Module, _inputs: Any, output: Any, path: str = path) -> None:
            shapes[path] = _sample_shape(output)

        handles.append(module.register_forward_hook(record))
    try:
        # A network may run on one size only; what it gave until then tells enough.
        with dry_run(), contextlib.suppress(Exception):
            replica(meta_batch(replica, _ROWS, (input_size[0], *(2 * length for length in input_size[1:]))))
    finally:
        for handle in handles:
            handle.remove()
    return shapes


def _cuts(operations: list[Operation], source: int, sink: int) -> set[int]:
    """The values that every path from source to sink runs through.

    Such a value is the only one alive, of those that lie on a path, at some moment of any order of the operations.
    """
    reached = {source}
    for operation in operations:
        if reached.intersection(operation.reads):
            reached.update(operation.writes)
    needed = {sink}
    last_use = {sink: len(operations)}
    for index in reversed(range(len(operations))):
        operation = operations[index]
        if needed.intersection(operation.writes):
            needed.update(operation.reads)
            for value in operation.reads:
                last_use.setdefault(value, index)
    cuts = set()
    alive = {source}
    for index, operation in enumerate(operations):
        alive.update(value for value in operation.writes if value in reached and value in needed)
        alive = {value for value in alive if last_use.get(value, -1) > index}
        if len(alive) == 1:
            cuts.update(alive)
    return cuts


def _tensors(nested: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(nested) if isinstance(leaf, Tensor)]


def _sample_shape(value: Any) -> Shape | None:
    return tuple(value.shape[1:]) if isinstance(value, Tensor) and value.dim() > 0 else None
