"""Running the traced graph on a weightless copy: what each node gives and costs, and how it grows with the batch."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from rblock_fx.dry_run import dry_run, meta_batch
from rblock_fx.survey import FlopCounter, Shape, tensors_in

# How a value changes with the batch: not at all; its first axis (or, a number, itself) grows in proportion; otherwise,
# which is also said of a tensor that is changed in place later on, so that a doubled copy of it would go stale.
Growth = Literal["fixed", "rows", "count", "other"]

# Two batches that tell what grows with the batch from what does not. Even, for networks that split their batch.
PROBE_ROWS = (4, 6)


@dataclasses.dataclass(frozen=True)
class Probe:
    """One run of a graph.

    Attributes:
        values: what each node gave.
        summaries: its shapes and numbers, as they were when it gave them.
        flops: FLOPs of each node.
        changed_later: the nodes whose tensor was changed in place after they had given it.
        batch_norm_rows: how many rows each batch norm saw in each of its calls, by its path.
        output: what the graph gave.
        operations: what was computed of the input; nothing where another run was known.
        used_within: the nodes whose module computed something else of the very tensor that it gave; likewise.
    """

    values: dict[fx.Node, Any]
    summaries: dict[fx.Node, Any]
    flops: dict[fx.Node, int]
    changed_later: frozenset[fx.Node]
    batch_norm_rows: dict[str, list[int]]
    output: Any
    operations: list[str]
    used_within: frozenset[fx.Node]


def operations_of(replica: nn.Module, input_size: Shape) -> list[str]:
    """What the copy itself computes of the smaller batch, to be compared with what its graph does."""
    computed = _Computed()
    with dry_run(), computed:
        x = meta_batch(replica, PROBE_ROWS[0], input_size)
        computed.follow(x)
        replica(x)
    return computed.operations


def run_graph(graph: fx.Graph, replica: nn.Module, input_size: Shape, known: Probe | None = None) -> Probe:
    """Run a graph of a weightless copy on the smaller batch.

    Args:
        graph: the graph.
        replica: the copy, in the mode in which it is to run.
        input_size: shape of one sample.
        known: a run of the graph as it was before it was changed; what has not changed is taken from there.
    """
    computed = _Computed()
    recording = _Recording(replica, graph, computed)
    compared = computed if known is None else contextlib.nullcontext()
    with dry_run(), _batch_norm_rows(replica) as rows, recording.counter, compared:
        x = meta_batch(replica, PROBE_ROWS[0], input_size)
        computed.follow(x)
        output = recording.run(x, initial_env=None if known is None else _unchanged(graph, known))
    return Probe(
        recording.values,
        recording.summaries,
        recording.flops,
        recording.changed_later(),
        rows,
        output,
        computed.operations,
        frozenset(recording.used_within),
    )


def _unchanged(graph: fx.Graph, known: Probe) -> dict[fx.Node, Any]:
    """The known values of the nodes that nothing new leads to."""
    unchanged: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        if node in known.values and node.op != "output" and all(value in unchanged for value in node.all_input_nodes):
            unchanged[node] = known.values[node]
    return unchanged


class _Computed(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Names the operations that depend on the input, with the shapes that they give."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[str] = []
        self._followed: dict[int, Tensor] = {}  # which also keeps their ids from being used again
        self._read: set[tuple[int, int]] = set()

    def follow(self, tensor: Tensor) -> None:
        """Take a tensor for one that depends on the input."""
        self._followed[id(tensor)] = tensor

    def has_read(self, tensor: Tensor) -> bool:
        """Whether an operation took the tensor as it is now."""
        return (id(tensor), tensor._version) in self._read

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        followed = [tensor for tensor in tensors_in((args, kwargs)) if id(tensor) in self._followed]
        self._read.update((id(tensor), tensor._version) for tensor in followed)
        depends = bool(followed)
        result = func(*args, **(kwargs or {}))
        if depends:
            results = tensors_in(result)
            for tensor in results:
                self.follow(tensor)
            # x += y is traced as x + y or as itself, depending on what y is.
            name = str(func.overloadpacket.__name__).rstrip("_")
            self.operations.append(f"{name} {[tuple(tensor.shape) for tensor in results]}")
        return result


class Growths:
    """How the values of a graph grow with the batch, found by a second run, of as much as is asked for."""

    def __init__(self, graph: fx.Graph, replica: nn.Module, input_size: Shape, small: Probe) -> None:
        self._graph = graph
        self._small = small
        self._larger = _Recording(replica, graph)
        self._larger.args_iter = iter([meta_batch(replica, PROBE_ROWS[1], input_size)])

    def of(self, node: fx.Node) -> Growth:
        """How one value grows; not for nodes behind a mask."""
        if node in self._small.changed_later and node.op != "placeholder":
            return "other"
        leads_here = {node}
        for earlier in reversed(self._graph.nodes):
            if earlier in leads_here:
                leads_here.update(earlier.all_input_nodes)
        with dry_run():
            for earlier in self._graph.nodes:
                if earlier in leads_here and earlier not in self._larger.env:
                    self._larger.env[earlier] = self._larger.run_node(earlier)
        return _growth(self._small.summaries[node], self._larger.summaries[node])


class _Recording(fx.Interpreter):
    """Runs a graph and keeps what each node gives; on the meta device that holds no memory."""

    def __init__(self, replica: nn.Module, graph: fx.Graph, computed: _Computed | None = None) -> None:
        super().__init__(replica, garbage_collect_values=False, graph=graph)
        self.computed = computed
        self.used_within: set[fx.Node] = set()
        self.counter = FlopCounter()
        self.values: dict[fx.Node, Any] = {}
        self.summaries: dict[fx.Node, Any] = {}
        self.flops: dict[fx.Node, int] = {}
        self.versions: dict[fx.Node, tuple[Tensor, int]] = {}

    def run_node(self, n: fx.Node) -> Any:
        flops_before = self.counter.flops
        value = super().run_node(n)
        self.values[n] = value
        self.summaries[n] = _summary(value)
        self.flops[n] = self.counter.flops - flops_before
        if isinstance(value, Tensor):
            self.versions[n] = (value, value._version)
            if self.computed is not None and self.computed.has_read(value):
                self.used_within.add(n)
        return value

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> Any:
        """Give modules lists that they may change, as the generated code does; a graph's own are immutable."""
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        return tuple(map(_mutable, args)), {name: _mutable(value) for name, value in kwargs.items()}

    def changed_later(self) -> frozenset[fx.Node]:
        return frozenset(node for node, (tensor, version) in self.versions.items() if tensor._version != version)


def _mutable(value: Any) -> Any:
    return list(map(_mutable, value)) if isinstance(value, fx.immutable_collections.immutable_list) else value


def _summary(value: Any) -> Any:
    """Keep of a value what tells how it grows."""
    if isinstance(value, Tensor):
        # Whole numbers may be the numbers of rows, which are others in a batch of twice as many.
        whole = value.dtype in (torch.int64, torch.int32)
        return ("whole numbers" if whole else "tensor", tuple(value.shape))
    if isinstance(value, tuple | list):
        return ("nested", [_summary(item) for item in value])
    if isinstance(value, dict):
        return ("nested", [_summary(item) for item in value.values()])
    if isinstance(value, int | float) and not isinstance(value, bool):
        return ("number", value)
    return ("constant", None)


def _growth(small: Any, large: Any) -> Growth:
    if small == large:
        return "fixed"
    (kind, first), (_, second) = small, large
    few, many = PROBE_ROWS
    if kind == "tensor" and first[1:] == second[1:] and first[0] * many == second[0] * few:
        return "rows"
    if kind == "number" and first * many == second * few:
        return "count"
    return "other"


@contextlib.contextmanager
def _batch_norm_rows(replica: nn.Module) -> Iterator[dict[str, list[int]]]:
    """Record how many rows each batch norm sees."""
    rows: dict[str, list[int]] = {}
    handles = []
    for path, module in replica.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):

            def record(_module: nn.Module, args: Any, kwargs: Any, path: str = path) -> None:
                tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
                rows.setdefault(path, []).append(len(tensors[0]))

            handles.append(module.register_forward_pre_hook(record, with_kwargs=True))
    try:
        yield rows
    finally:
        for handle in handles:
            handle.remove()
