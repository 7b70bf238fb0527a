"""Record a forward of a weightless copy: its module calls, its operations, its FLOPs, and where the batch is."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from rblock_fx.network.replica import (
    Shape,
    Structure,
    dry_run,
    first_shape,
    meta_batch,
    shape_of,
    structure_of,
    tensors_in,
)

# The rows of a recorded batch. An axis holds the batch if its length is a multiple of the prime, as no other axis of a
# network is; the twelve is for networks that split their batch into two, three or four parts.
PRIME = 997
ROWS = 12 * PRIME

_STACKS = ("cat", "stack", "repeat", "tile")
_MIXES = ("flip", "roll", "index_select", "gather", "sort", "cumsum", "_softmax", "_log_softmax")
_ARITHMETIC = ("add", "sub", "rsub", "mul", "div", "pow", "remainder", "fmod")
_FACTORIES = ("new_", "empty", "zeros", "ones", "full", "rand")


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the batch is in a tensor."""

    batch: int  # the rows that it was computed from: ROWS, or behind the fork 2 * ROWS
    is_rows: bool  # whether the batch is axis 0, or the outer part of it, in its order


@dataclasses.dataclass(frozen=True)
class Operation:
    """One dispatched operation on values computed from the input, which are numbered in order."""

    name: str
    numbers: tuple[float, ...]
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    shapes: tuple[Shape, ...]

    def __str__(self) -> str:
        return f"{self.name}({', '.join(map(str, self.numbers))}) of shape {' and '.join(map(str, self.shapes))}"


@dataclasses.dataclass(frozen=True)
class Mixing:
    """An operation behind the fork that reduces, splits or reorders the batch."""

    path: str | None  # of the innermost module that ran it; None for a forward that was traced through
    operation: str
    node: str


@dataclasses.dataclass(frozen=True, eq=False)
class ModuleRun:
    """One call of one module. Shapes are without the batch axis."""

    path: str  # qualified name
    output: Shape | list[Shape | None] | None  # of the returned tensor; for a list or tuple, those of its items
    structure: "Structure"  # for a list or tuple, its type and the structures of its items
    input_shape: Shape | None  # of the first argument, if it is a tensor
    input_layout: Layout | None  # of the first tensor of its arguments
    values: tuple[int, ...]  # numbers of the returned tensors
    first: int  # its first operation, as an index into `Recorder.operations`
    last: int  # one past its last operation
    flops_before: int  # FLOPs of the network until it was called; `flops`, until it returned
    flops: int
    own_flops: int  # its own, without those of the modules inside it

    @property
    def value(self) -> int:
        """Number of the (first) returned tensor; -1 without one."""
        return self.values[0] if self.values else -1


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records everything that a forward of a weightless copy computes from its input."""

    def __init__(self, replica: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[Operation] = []  # an in-place operation makes a new value
        self.runs: list[ModuleRun] = []  # in order of return
        self.flops = 0
        self.layouts: dict[int, Layout] = {}  # by the id of a tensor, if it has the batch
        self.changed: dict[int, int] = {}  # the last position at which each storage was changed in place
        self.mixings: list[Mixing] = []  # behind the fork
        self.position, self.node = -1, ""  # of the node that runs, if a graph runs
        self.is_quiet = False  # records no mixings
        self._paths = {module: path for path, module in replica.named_modules()}
        self._running: list[tuple[str, int, int, int, Layout | None]] = []
        self._numbers: dict[int, int] = {}
        self._row_numbers: set[int] = set()  # ids of arange(N)
        self._alive: list[Tensor] = []  # keeps ids and storages unique; on the meta device it holds no memory

    def follow(self, tensor: Tensor, layout: Layout | None) -> int:
        """Number a tensor that depends on the input; returns the number."""
        self._numbers[id(tensor)] = len(self._alive)
        self._alive.append(tensor)
        self.layouts.pop(id(tensor), None)
        self.layouts |= {id(tensor): layout} if layout is not None else {}
        return len(self._alive) - 1

    def number_of(self, tensor: Tensor) -> int:
        """The number of a tensor; -1 if it does not depend on the input."""
        return self._numbers.get(id(tensor), -1)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = tensors_in((args, kwargs))
        known = [tensor for tensor in inputs if id(tensor) in self._numbers]
        reads = tuple(map(self.number_of, known))
        layouts = [self.layouts[id(tensor)] for tensor in known if id(tensor) in self.layouts]
        result = func(*args, **kwargs)
        self.flops += _flops(func, args, kwargs, result)
        results = tensors_in(result)
        name = str(func.overloadpacket.__name__).rstrip("_")  # x += y is traced as itself or as x + y
        if func._schema.is_mutable and inputs:
            self.changed[inputs[0].untyped_storage()._cdata] = self.position
        found = [_layout(name, tuple(tensor.shape), layouts) for tensor in results]
        paired = layouts and results and max(layout.batch for layout in layouts) > ROWS
        is_checked = paired and not self.is_quiet and not name.startswith(_FACTORIES)
        if is_checked and (not any(found) or self._is_mixed(name, args, results, layouts)):
            self.mixings.append(Mixing(self._running[-1][0] if self._running else None, name, self.node))
        self._row_numbers.update(id(tensor) for tensor in results if name == "arange")
        writes = tuple(map(self.follow, results, found)) if known or any(found) else ()
        if known:
            shapes = tuple(tuple(tensor.shape) for tensor in results)
            self.operations.append(Operation(name, tuple(_numbers_in((args, kwargs))), reads, writes, shapes))
        return result

    def _is_mixed(self, name: str, args: Any, results: list[Tensor], inputs: list[Layout]) -> bool:
        """Whether an operation on a paired batch relates samples to one another."""
        batch = max(layout.batch for layout in inputs)
        for tensor in results:
            axes = _axes_of_batch(tensor.shape)
            is_split = any(tensor.shape[axis] % batch for axis in axes)
            if len(axes) > 1 or (is_split and any(layout.is_rows for layout in inputs)):
                return True
        if name in _ARITHMETIC and any(_counts_rows(number) for number in _numbers_in(args)):
            return True
        axes = _axes_of_batch(args[0].shape) if args and isinstance(args[0], Tensor) else []
        if not axes or any(kind in name for kind in ("conv", "pool", "upsample")):
            return bool(axes) and axes[0] > 0
        if name in ("native_layer_norm", "native_group_norm"):
            return bool(_axes_of_batch(args[1] if name == "native_layer_norm" else args[4:5]))
        if name == "index":  # x[rows] has a tensor in the first place
            first = args[1][0]
            return axes[0] == 0 and isinstance(first, Tensor) and id(first) not in self._row_numbers
        place = 2 if name == "roll" else 1
        rest = args[place] if name in _MIXES and len(args) > place else ()
        given = rest if isinstance(rest, list | tuple) else [rest]
        return any(isinstance(axis, int) and axis % args[0].dim() in axes for axis in given)

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Record while the context is open, with one hook for all modules: one for each takes longer than a forward."""
        with contextlib.ExitStack() as stack:
            stack.callback(register_module_forward_pre_hook(self._enter).remove)
            stack.callback(register_module_forward_hook(self._leave).remove)
            with dry_run(), self:
                yield

    def _enter(self, module: nn.Module, inputs: Any) -> None:
        if module in self._paths:
            first = next(iter(tensors_in(inputs)), None)
            layout = None if first is None else self.layouts.get(id(first))
            self._running.append((self._paths[module], len(self.operations), self.flops, len(self.runs), layout))

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if module not in self._paths:
            return
        path, first, flops_before, runs_before, layout = self._running.pop()
        inside = sum(run.own_flops for run in self.runs[runs_before:])
        if layout is None and first < len(self.operations):  # global hooks do not see keyword arguments
            layout = self.layouts.get(id(self._alive[self.operations[first].reads[0]]))
        run = ModuleRun(
            path=path,
            output=shape_of(output),
            structure=structure_of(output),
            input_shape=first_shape(shape_of(inputs[0])) if inputs else None,
            input_layout=layout,
            values=tuple(map(self.number_of, tensors_in(output))),
            first=first,
            last=len(self.operations),
            flops_before=flops_before,
            flops=self.flops,
            own_flops=self.flops - flops_before - inside,
        )
        self.runs.append(run)


def record_forward(replica: nn.Module, input_size: Shape) -> tuple[Recorder, Any]:
    """Record a forward on ROWS samples; returns the recorder (value 0 is the input) and the output."""
    recorder, x = Recorder(replica), meta_batch(replica, ROWS, input_size)
    recorder.follow(x, Layout(ROWS, True))
    with recorder.recording():
        return recorder, replica(x)


def _flops(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    formula = flop_registry.get(func.overloadpacket)
    raw = getattr(formula, "__wrapped__", None)  # without mapping shapes over a pytree first, which takes long
    if formula is None:
        return 0
    if raw is None or kwargs or not isinstance(result, Tensor):
        return int(formula(*args, **kwargs, out_val=result))
    return int(raw(*(arg.shape if isinstance(arg, Tensor) else arg for arg in args), out_shape=result.shape))


def _layout(name: str, shape: Shape, inputs: list[Layout]) -> Layout | None:
    """Where the batch is in a result, from its shape and the inputs' layouts."""
    axes = _axes_of_batch(shape)
    if not axes:
        return None
    batch = max((layout.batch for layout in inputs), default=shape[0] if shape[0] in (ROWS, 2 * ROWS) else ROWS)
    if axes != [0]:
        return Layout(batch, False)
    in_order = all(layout.is_rows for layout in inputs) and name not in _STACKS
    return Layout(batch, shape[0] == batch or (shape[0] % batch == 0 and in_order))


def _axes_of_batch(shape: Shape) -> list[int]:
    return [axis for axis, length in enumerate(shape) if length and length % PRIME == 0]


def _counts_rows(number: float) -> bool:
    """Whether a number, or one over it, is a multiple of the number of rows."""
    parts = (1 / number if 0 < abs(number) < 1 else number) / PRIME
    return round(parts) != 0 and abs(parts - round(parts)) < 1e-9


def _numbers_in(nested: Any) -> Iterator[float]:
    if isinstance(nested, int | float):
        yield nested
    elif isinstance(nested, list | tuple | dict):
        for item in nested.values() if isinstance(nested, dict) else nested:
            yield from _numbers_in(item)
