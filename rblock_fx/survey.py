"""What runs in a model, in which order, and through which maps everything passes: one recorded forward pass."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from rblock_fx.dry_run import dry_run, eval_mode, meta_batch
from rblock_fx.errors import ConversionError, first_line

Shape = tuple[int, ...]
Structure = tuple[type, "list[Structure]"] | None

# Any batch will do; a size that no network uses for anything else makes shapes in messages readable.
_ROWS = 2


@dataclasses.dataclass(frozen=True, eq=False)
class ModuleRun:
    """One call of one module: what it gave and took, without the batch axis, and when.

    Attributes:
        path: qualified name of the module.
        output: the shape of the tensor that it gave; of a list or tuple, the shapes of its items (None for what is no
            tensor); None for anything else.
        structure: of a list or tuple, its type and the structures of its items; else None.
        input_shape: shape of its first argument; None where that is no tensor.
        value: the number of the tensor that it gave, of several the first; -1 if there is none.
        first: its first operation, as an index into `Survey.operations`.
        last: one past its last operation.
        flops_before: what the network had computed when it was called.
        flops: what the network had computed when it returned.
        own_flops: what it computed itself, not by modules inside it.
    """

    path: str
    output: Shape | list[Shape | None] | None
    structure: "Structure"
    input_shape: Shape | None
    value: int
    first: int
    last: int
    flops_before: int
    flops: int
    own_flops: int


@dataclasses.dataclass(frozen=True)
class Operation:
    """One dispatched operation: the values it read and wrote."""

    reads: tuple[int, ...]
    writes: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Survey:
    """The evaluation forward of a model, recorded.

    Attributes:
        replica: the weightless copy that ran.
        input_size: shape of one sample.
        runs: the calls of modules, in the order in which they returned.
        operations: the operations, in order.
        used: the values on the paths from the input to the (first) output.
        cuts: those of them through which every path runs.
        flops: FLOPs of the forward for the rows of the survey.
        output_shape: shape of the (first) output, without the batch axis.
    """

    replica: nn.Module
    input_size: Shape
    runs: tuple[ModuleRun, ...]
    operations: tuple[Operation, ...]
    used: frozenset[int]
    cuts: frozenset[int]
    flops: int
    output_shape: Shape

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
        """Where a module stands in forward order: of modules that end together the inner comes first."""
        return max(index for index, run in enumerate(self.runs) if run.path == path)

    @functools.cached_property
    def _grown(self) -> dict[str, Shape | None]:
        """The shapes that modules give for samples of twice the size along every spatial axis."""
        shapes: dict[str, Shape | None] = {}

        def record(path: str, _inputs: Any, output: Any) -> None:
            shapes[path] = first_shape(_output_shape(output))

        size = (self.input_size[0], *(2 * length for length in self.input_size[1:]))
        # A network may run on one size only; what it gave until then tells enough.
        with eval_mode(self.replica), _after_calls(self.replica, record), dry_run(), contextlib.suppress(Exception):
            self.replica(meta_batch(self.replica, _ROWS, size))
        return shapes


def survey_forward(replica: nn.Module, input_size: Shape) -> Survey:
    """Record one forward of a weightless copy in eval mode; the copy's mode is put back.

    Raises:
        ConversionError: the model does not run on a batch of this input size.
    """
    recorder = _Recorder(replica)
    name = type(replica).__name__
    try:
        with eval_mode(replica), dry_run(), recorder.hooked():
            x = meta_batch(replica, _ROWS, input_size)
            source = recorder.value_of(x)
            with recorder:
                output = replica(x)
    except Exception as error:
        raise ConversionError(
            f"{name} does not run on a batch of {('N', *input_size)}: {type(error).__name__}: "
            f"{first_line(error)}\nPass the shape of one sample: "
            "input_size=(channels, height, width), for video (channels, frames, height, width); a model whose forward "
            "takes no image batch (detection, text) cannot be converted, but its backbone can, passed alone."
        ) from error
    outputs = tensors_in(output)
    if not outputs:
        raise ConversionError(f"{name} gives {type(output).__name__} without a tensor; expected logits or a map.")
    used, cuts = _paths(recorder.operations, source, sink=recorder.value_of(outputs[0]))
    operations, runs = tuple(recorder.operations), tuple(recorder.runs)
    shape = tuple(outputs[0].shape[1:])
    return Survey(replica, input_size, runs, operations, used, cuts, recorder.flops, shape)


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

    def new_value(self, tensor: Tensor) -> int:
        self.values[id(tensor)] = len(self.alive)
        self.alive.append(tensor)
        return len(self.alive) - 1

    def value_of(self, tensor: Tensor) -> int:
        return self.values[id(tensor)] if id(tensor) in self.values else self.new_value(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        reads = tuple(map(self.value_of, tensors_in((args, kwargs))))
        result = super().__torch_dispatch__(func, types, args, kwargs)
        self.operations.append(Operation(reads, tuple(map(self.new_value, tensors_in(result)))))
        return result

    @contextlib.contextmanager
    def hooked(self) -> Iterator[None]:
        """Record every module call of the copy while the context is open."""
        started: list[tuple[int, int]] = []
        flops_inside = [0]  # of the modules that returned during each of the running calls

        modules = set(self.replica.modules())

        def before(module: nn.Module, _inputs: Any) -> None:
            if module not in modules:
                return
            started.append((len(self.operations), self.flops))
            flops_inside.append(0)

        def after(path: str, inputs: Any, output: Any) -> None:
            first, flops_before = started.pop()
            inside = flops_inside.pop()
            flops_inside[-1] += self.flops - flops_before
            shape = _output_shape(output)
            self.runs.append(
                ModuleRun(
                    path=path,
                    output=shape,
                    structure=_structure(output),
                    input_shape=first_shape(_output_shape(inputs[0])) if inputs else None,
                    value=-1 if first_shape(shape) is None else self.value_of(tensors_in(output)[0]),
                    first=first,
                    last=len(self.operations),
                    flops_before=flops_before,
                    flops=self.flops,
                    own_flops=self.flops - flops_before - inside,
                )
            )

        handle = register_module_forward_pre_hook(before)
        try:
            with _after_calls(self.replica, after):
                yield
        finally:
            handle.remove()


@contextlib.contextmanager
def _after_calls(replica: nn.Module, record: Callable[[str, Any, Any], None]) -> Iterator[None]:
    """Have `record(path, inputs, output)` called after every module call of the copy while the context is open.

    One hook for all modules, since registering one with each takes longer than the forward.
    """
    paths = {module: path for path, module in replica.named_modules()}

    def after(module: nn.Module, inputs: Any, output: Any) -> None:
        if module in paths:
            record(paths[module], inputs, output)

    handle = register_module_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


def _paths(operations: list[Operation], source: int, sink: int) -> tuple[frozenset[int], frozenset[int]]:
    """The values on the paths from source to sink, and those of them that every path runs through.

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
    return frozenset(reached & needed), frozenset(cuts)


def first_shape(output: Shape | list[Shape | None] | None) -> Shape | None:
    """The shape of a single tensor, or of the first in a list."""
    if isinstance(output, list):
        return next((shape for shape in output if shape is not None), None)
    return output


def _structure(value: Any) -> Structure:
    named = isinstance(value, tuple) and hasattr(value, "_fields")
    if type(value) in (list, tuple) or named:
        return type(value), [_structure(item) for item in value]
    return None


def tensors_in(nested: Any) -> list[Tensor]:
    """Every tensor of any nesting, in order."""
    if isinstance(nested, Tensor):
        return [nested]
    if isinstance(nested, tuple | list):  # pytree is ten times slower, and this runs at every operation
        return [tensor for item in nested for tensor in tensors_in(item)]
    if isinstance(nested, dict):
        return [tensor for item in nested.values() for tensor in tensors_in(item)]
    return [leaf for leaf in pytree.tree_leaves(nested) if isinstance(leaf, Tensor)]


def _output_shape(value: Any) -> Shape | list[Shape | None] | None:
    if isinstance(value, Tensor):
        return tuple(value.shape[1:]) if value.dim() > 0 else None
    if isinstance(value, list | tuple):
        shapes = [_output_shape(item) for item in value]
        return None if any(isinstance(shape, list) for shape in shapes) else shapes  # type: ignore[return-value]
    return None
