"""Record one forward of a weightless copy: its module calls, its operations and its FLOPs."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

Shape = tuple[int, ...]
Structure = tuple[type, "list[Structure]"] | None


@dataclasses.dataclass(frozen=True, eq=False)
class ModuleRun:
    """One call of one module. Shapes are without the batch axis.

    Attributes:
        path: qualified name of the module.
        output: shape of the returned tensor; for a list or tuple, the shapes of its items (None for an item that is not
            a tensor); None for anything else.
        structure: for a list or tuple, its type and the structures of its items; otherwise None.
        input_shape: shape of the first argument; None if that is not a tensor.
        values: numbers of the returned tensors.
        first: its first operation, as an index into `Survey.operations`.
        last: one past its last operation.
        flops_before: FLOPs of the network until it was called.
        flops: FLOPs of the network until it returned.
        own_flops: its FLOPs without those of the modules inside it.
    """

    path: str
    output: Shape | list[Shape | None] | None
    structure: "Structure"
    input_shape: Shape | None
    values: tuple[int, ...]
    first: int
    last: int
    flops_before: int
    flops: int
    own_flops: int

    @property
    def value(self) -> int:
        """Number of the (first) returned tensor; -1 without one."""
        return self.values[0] if self.values else -1


@dataclasses.dataclass(frozen=True)
class Operation:
    """One dispatched operation: the values it read and wrote."""

    reads: tuple[int, ...]
    writes: tuple[int, ...]


class FlopCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Count FLOPs by torch's formulas, without the bookkeeping per module of torch's FlopCounterMode."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            # The registered formula maps shapes over a pytree first, which takes longer than the operation.
            shapes = [arg.shape if isinstance(arg, Tensor) else arg for arg in args]
            raw = getattr(formula, "__wrapped__", None)
            is_simple = raw is not None and not kwargs and isinstance(result, Tensor)
            self.flops += raw(*shapes, out_shape=result.shape) if is_simple else formula(*args, **kwargs, out_val=result)
        return result


class Recorder(FlopCounter):  # type: ignore[no-untyped-call]
    """Number every tensor value; an in-place operation makes a new one."""

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
            shape = output_shape(output)
            self.runs.append(
                ModuleRun(
                    path=path,
                    output=shape,
                    structure=structure_of(output),
                    input_shape=first_shape(output_shape(inputs[0])) if inputs else None,
                    values=tuple(map(self.value_of, tensors_in(output))),
                    first=first,
                    last=len(self.operations),
                    flops_before=flops_before,
                    flops=self.flops,
                    own_flops=self.flops - flops_before - inside,
                )
            )

        handle = register_module_forward_pre_hook(before)
        try:
            with after_calls(self.replica, after):
                yield
        finally:
            handle.remove()


@contextlib.contextmanager
def after_calls(replica: nn.Module, record: Callable[[str, Any, Any], None]) -> Iterator[None]:
    """Call `record(path, inputs, output)` after every module call of the copy while the context is open.

    One hook for all modules: registering one with each takes longer than the forward.
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


def first_shape(output: Shape | list[Shape | None] | None) -> Shape | None:
    """The shape of a single tensor, or of the first in a list."""
    if isinstance(output, list):
        return next((shape for shape in output if shape is not None), None)
    return output


def structure_of(value: Any) -> Structure:
    named = isinstance(value, tuple) and hasattr(value, "_fields")
    if type(value) in (list, tuple) or named:
        return type(value), [structure_of(item) for item in value]
    return None


def tensors_in(nested: Any) -> list[Tensor]:
    """Every tensor of any nesting, in order; also inside dataclasses."""
    if isinstance(nested, Tensor):
        return [nested]
    if isinstance(nested, tuple | list):  # pytree is ten times slower, and this runs at every operation
        return [tensor for item in nested for tensor in tensors_in(item)]
    if isinstance(nested, dict):
        return [tensor for item in nested.values() for tensor in tensors_in(item)]
    if dataclasses.is_dataclass(nested) and not isinstance(nested, type):
        return [tensor for item in vars(nested).values() for tensor in tensors_in(item)]
    if nested is None or isinstance(nested, int | float | str):
        return []
    return [leaf for leaf in pytree.tree_leaves(nested) if isinstance(leaf, Tensor)]


def output_shape(value: Any) -> Shape | list[Shape | None] | None:
    if isinstance(value, Tensor):
        return tuple(value.shape[1:]) if value.dim() > 0 else None
    if isinstance(value, list | tuple):
        shapes = [output_shape(item) for item in value]
        return None if any(isinstance(shape, list) for shape in shapes) else shapes  # type: ignore[return-value]
    return None
