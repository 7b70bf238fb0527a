"""Run a traced graph on the meta device: its operations, its FLOPs, and where the batch is in every value."""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from rblock_fx.network.record import FlopCounter, Shape, tensors_in
from rblock_fx.network.replica import dry_run, meta_batch

# The batch of a probe. An axis holds the batch if its length is a multiple of the prime, which no other axis of a
# network is; the twelve is for networks that split their batch into two, three or four parts.
_PRIME = 997
ROWS = 12 * _PRIME

# How a value changes with the batch: not at all; a tensor by rows (the batch is axis 0, or its outer part); a number
# in proportion; otherwise ("other"): doubling it would need to know more.
Growth = Literal["fixed", "rows", "count", "other"]

_STACKS = ("cat", "stack", "repeat", "tile")
_MIXES = ("flip", "roll", "index", "index_select", "gather", "sort", "cumsum", "_softmax", "_log_softmax")
_FACTORIES = ("new_", "empty", "zeros", "ones", "full", "rand")


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the batch is in a tensor.

    Attributes:
        batch: the rows of the batch that it was computed from, ROWS or behind the fork 2 * ROWS.
        is_rows: whether the batch is axis 0, or the outer part of it, in its order.
    """

    batch: int
    is_rows: bool


@dataclasses.dataclass(frozen=True)
class Mixing:
    """An operation behind the fork that reduces, splits or reorders the batch.

    Attributes:
        path: the innermost module that ran it; None for a forward that was traced through.
        operation: its name.
        node: the node of the graph that it belongs to.
    """

    path: str | None
    operation: str
    node: str


@dataclasses.dataclass
class Probe:
    """One run of a graph on ROWS samples.

    Attributes:
        output: the returned value, without data.
        operations: the operations on values computed from the input, with their numbers and shapes.
        flops: FLOPs of the forward.
        node_flops: FLOPs of each node.
        values: the value of each node.
        layouts: where the batch is, by the id of a tensor; tensors without the batch are left out.
        changed: for each storage that was changed in place, the position of the last node that did it.
        mixings: the operations behind the fork that mix the samples of a batch.
        calls: for each module, where the batch was in the first tensor of each of its calls.
    """

    output: Any = None
    operations: list[str] = dataclasses.field(default_factory=list)
    flops: int = 0
    node_flops: dict[fx.Node, int] = dataclasses.field(default_factory=dict)
    values: dict[fx.Node, Any] = dataclasses.field(default_factory=dict)
    layouts: dict[int, Layout] = dataclasses.field(default_factory=dict)
    changed: dict[int, int] = dataclasses.field(default_factory=dict)
    mixings: list[Mixing] = dataclasses.field(default_factory=list)
    calls: dict[str, list[Layout | None]] = dataclasses.field(default_factory=dict)

    def growth_of(self, node: fx.Node) -> Growth:
        """How the value of a node changes with the batch."""
        value = self.values[node]
        if isinstance(value, int) and not isinstance(value, bool):
            return "count" if value and value % _PRIME == 0 else "fixed"
        layouts = [self.layouts[id(tensor)] for tensor in tensors_in(value) if id(tensor) in self.layouts]
        if not layouts:
            return "fixed"
        # Integers may be the numbers of rows, which differ in a batch of twice as many.
        is_index = isinstance(value, Tensor) and value.dtype in (torch.int64, torch.int32)
        return "rows" if isinstance(value, Tensor) and layouts[0].is_rows and not is_index else "other"

    def is_changed_from(self, node: fx.Node, position: int) -> bool:
        """Whether the value of a node is changed in place by the node at a position of the graph or a later one."""
        storages = (tensor.untyped_storage()._cdata for tensor in tensors_in(self.values[node]))
        return any(self.changed.get(storage, -1) >= position for storage in storages)


def probe_model(replica: nn.Module, input_size: Shape) -> Probe:
    """Run the copy itself, to compare its operations and its output with those of a graph."""
    probe = Probe()
    tracker = _Tracker(probe)
    with dry_run(), tracker:
        probe.output = replica(tracker.follow(meta_batch(replica, ROWS, input_size), Layout(ROWS, True)))
    return probe


def probe_graph(
    graph: fx.Graph, replica: nn.Module, input_size: Shape, batches: Mapping[fx.Node, int], known: Probe | None = None
) -> Probe:
    """Run a graph of the copy.

    Args:
        graph: the graph.
        replica: the copy, in train mode.
        input_size: shape of one sample.
        batches: for masks and for copies at the fork, the rows of the batch behind them, ROWS or 2 * ROWS; 0 for a
            mask to be skipped, as one that drops nothing.
        known: a run of the graph with every mask skipped; the part before the masks is taken from there.
    """
    probe = Probe() if known is None else Probe(layouts=dict(known.layouts))
    tracker = _Tracker(probe)
    interpreter = _Interpreter(replica, graph, tracker, batches)
    before: dict[fx.Node, Any] = {}
    if known is not None:
        for node in graph.nodes:
            if node in known.values and not batches.get(node) and all(value in before for value in node.all_input_nodes):
                before[node] = known.values[node]
                probe.flops += known.node_flops[node]
        before = {node: value for node, value in before.items() if node.op != "output"}
    with dry_run(), _modules_followed(replica, tracker), tracker:
        x = tracker.follow(meta_batch(replica, ROWS, input_size), Layout(ROWS, True))
        for tensor in tensors_in(list(before.values())):
            tracker.follow(tensor, tracker.layout_of(tensor))
        probe.output = interpreter.run(x, initial_env=before)
    probe.flops += tracker.flops
    return probe


class _Interpreter(fx.Interpreter):
    """Run a graph node by node; on the meta device keeping every value takes no memory."""

    def __init__(
        self, replica: nn.Module, graph: fx.Graph, tracker: "_Tracker", batches: Mapping[fx.Node, int]
    ) -> None:
        super().__init__(replica, garbage_collect_values=False, graph=graph)
        self.tracker = tracker
        self.batches = batches

    def run_node(self, n: fx.Node) -> Any:
        self.tracker.position += 1
        self.tracker.node = n.name
        flops_before = self.tracker.flops
        batch = self.batches.get(n)
        self.tracker.is_quiet = batch is not None
        value = self.env[n.all_input_nodes[0]] if batch == 0 else super().run_node(n)
        if batch:
            self.tracker.follow(value, Layout(batch, True))
        self.tracker.probe.values[n] = value
        self.tracker.probe.node_flops[n] = self.tracker.flops - flops_before
        return value

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> Any:
        """Pass modules lists that they may change, as the generated code does; a graph's own are immutable."""
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        return tuple(map(_mutable, args)), {name: _mutable(value) for name, value in kwargs.items()}


def _mutable(value: Any) -> Any:
    return list(map(_mutable, value)) if isinstance(value, fx.immutable_collections.immutable_list) else value


class _Tracker(FlopCounter):  # type: ignore[no-untyped-call]
    """Record each operation on values computed from the input, and follow the batch through it."""

    def __init__(self, probe: Probe) -> None:
        super().__init__()
        self.probe = probe
        self.position = -1
        self.node = ""
        self.running: list[str] = []
        self.is_quiet = False
        self._counter = itertools.count()
        self._versions: dict[int, int] = {}
        self._followed: dict[int, Tensor] = {}  # also keeps the tensors alive, so that ids and storages stay unique

    def follow(self, tensor: Tensor, layout: Layout | None) -> Tensor:
        """Note that a tensor depends on the input, and where the batch is in it."""
        self._followed[id(tensor)] = tensor
        self._versions.setdefault(id(tensor), next(self._counter))
        if layout is None:
            self.probe.layouts.pop(id(tensor), None)
        else:
            self.probe.layouts[id(tensor)] = layout
        return tensor

    def layout_of(self, tensor: Tensor) -> Layout | None:
        return self.probe.layouts.get(id(tensor))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = tensors_in((args, kwargs))
        known = [tensor for tensor in inputs if id(tensor) in self._followed]
        result = super().__torch_dispatch__(func, types, args, kwargs)
        results = tensors_in(result)
        name = str(func.overloadpacket.__name__).rstrip("_")  # x += y is traced as itself or as x + y
        if func._schema.is_mutable and inputs:
            self.probe.changed[inputs[0].untyped_storage()._cdata] = self.position
        if known:
            reads = [self._versions[id(tensor)] for tensor in known]
            numbers = ", ".join(map(str, _numbers_in((args, kwargs))))
            shapes = [tuple(tensor.shape) for tensor in results]
            self.probe.operations.append(f"{name}({numbers}) of values {reads} -> {shapes}")
            # In place or not, a result is a new value, which whoever holds the tensor reads from now on.
            self._versions.update({id(tensor): next(self._counter) for tensor in results})
        layouts = [layout for layout in map(self.layout_of, known) if layout is not None]
        found = [_layout(name, tuple(tensor.shape), layouts) for tensor in results]
        paired = not self.is_quiet and layouts and results and max(layout.batch for layout in layouts) > ROWS
        if paired and not name.startswith(_FACTORIES) and (not any(found) or _is_mixed(name, args, results, layouts)):
            self.probe.mixings.append(Mixing(self.running[-1] if self.running else None, name, self.node))
        for tensor, layout in zip(results, found, strict=True):
            if known or layout is not None:
                self.follow(tensor, layout)
        return result


def _layout(name: str, shape: Shape, inputs: list[Layout]) -> Layout | None:
    """Where the batch is in a result, from its shape and the inputs' layouts."""
    axes = [axis for axis, length in enumerate(shape) if length and length % _PRIME == 0]
    if not axes:
        return None
    batch = max((layout.batch for layout in inputs), default=shape[0] if shape[0] in (ROWS, 2 * ROWS) else ROWS)
    if axes != [0]:
        return Layout(batch, False)
    in_order = all(layout.is_rows for layout in inputs) and name not in _STACKS
    return Layout(batch, shape[0] == batch or (shape[0] % batch == 0 and in_order))


def _is_mixed(name: str, args: Any, results: list[Tensor], inputs: list[Layout]) -> bool:
    """Whether an operation on a paired batch relates samples to one another."""
    batch = max(layout.batch for layout in inputs)
    for tensor in results:
        axes = [axis for axis, length in enumerate(tensor.shape) if length and length % _PRIME == 0]
        if len(axes) > 1 or (axes == [0] and len(tensor) % batch and any(layout.is_rows for layout in inputs)):
            return True
    if name not in _MIXES or not isinstance(args[0], Tensor) or not results[0].shape or len(results[0]) != batch:
        return False
    if name == "index":  # x[rows] has a tensor in the first place
        return bool(args[1]) and isinstance(args[1][0], Tensor)
    rest = args[1] if len(args) > 1 and name != "roll" else args[2:3] and args[2]
    axes = rest if isinstance(rest, list | tuple) else [rest]
    return any(isinstance(axis, int) and axis % max(args[0].dim(), 1) == 0 for axis in axes)


def _numbers_in(nested: Any) -> Iterator[Any]:
    if isinstance(nested, int | float):
        yield nested
    elif isinstance(nested, list | tuple):
        for item in nested:
            yield from _numbers_in(item)
    elif isinstance(nested, dict):
        yield from _numbers_in(tuple(nested.values()))


@contextlib.contextmanager
def _modules_followed(replica: nn.Module, tracker: _Tracker) -> Iterator[None]:
    """Record the calls of modules, and the one that runs."""
    paths = {module: path for path, module in replica.named_modules()}

    def before(module: nn.Module, inputs: Any) -> None:
        if module in paths:
            first = next(iter(tensors_in(inputs)), None)
            layout = None if first is None else tracker.layout_of(first)
            tracker.probe.calls.setdefault(paths[module], []).append(layout)
            tracker.running.append(paths[module])

    def after(module: nn.Module, _inputs: Any, _output: Any) -> None:
        if module in paths:
            tracker.running.pop()

    handles = register_module_forward_pre_hook(before), register_module_forward_hook(after)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
