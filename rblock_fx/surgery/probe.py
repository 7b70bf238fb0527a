"""Run a traced graph on the meta device, and how its values change with the batch."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from rblock_fx.network.record import PRIME, ROWS, Layout, Recorder, Shape, tensors_in
from rblock_fx.network.replica import meta_batch

# How a value changes with the batch: not at all; a tensor by rows (the batch is axis 0, or its outer part); a number
# in proportion; otherwise ("other"): doubling it would need to know more.
Growth = Literal["fixed", "rows", "count", "other"]


class Probe(fx.Interpreter):
    """One run of a graph on ROWS samples.

    Args:
        graph: the graph.
        replica: the copy, in train mode.
        input_size: shape of one sample.
        batches: for masks and for copies at the fork, the rows of the batch behind them, ROWS or 2 * ROWS; 0 for a mask
            to be skipped, as one that drops nothing.
        known: a run of the graph with every mask skipped; the part before the masks is taken from there.

    Attributes:
        output: the returned value, without data.
        values: the value of each node.
        recorder: everything that was computed.
        flops: FLOPs of the forward.
    """

    def __init__(
        self,
        graph: fx.Graph,
        replica: nn.Module,
        input_size: Shape,
        batches: Mapping[fx.Node, int],
        known: "Probe | None" = None,
    ) -> None:
        super().__init__(replica, garbage_collect_values=False, graph=graph)
        self.batches = batches
        self.values: dict[fx.Node, Any] = {}
        self.node_flops: dict[fx.Node, int] = {}
        self.recorder = Recorder(replica)
        before: dict[fx.Node, Any] = {}
        for node in graph.nodes if known is not None else ():
            is_new = node not in known.values or batches.get(node) or node.op == "output"  # type: ignore[union-attr]
            if not is_new and all(value in before for value in node.all_input_nodes):
                before[node] = known.values[node]  # type: ignore[union-attr]
                self.node_flops[node] = known.node_flops[node]  # type: ignore[union-attr]
        with self.recorder.recording():
            x = meta_batch(replica, ROWS, input_size)
            self.recorder.follow(x, Layout(ROWS, True))
            for tensor in tensors_in(list(before.values())):
                self.recorder.follow(tensor, known.recorder.layouts.get(id(tensor)))  # type: ignore[union-attr]
            self.output = self.run(x, initial_env=before)

    @property
    def flops(self) -> int:
        """FLOPs of the forward."""
        return sum(self.node_flops.values())

    def run_node(self, n: fx.Node) -> Any:
        """Run one node; the graph's own lists are immutable, but modules may change the lists that they take."""
        recorder, batch = self.recorder, self.batches.get(n)
        recorder.position += 1
        recorder.node, recorder.is_quiet = n.name, batch is not None
        flops_before = recorder.flops
        value = self.env[n.all_input_nodes[0]] if batch == 0 else super().run_node(n)
        if batch:
            recorder.follow(value, Layout(batch, True))
        self.values[n] = value
        self.node_flops[n] = recorder.flops - flops_before
        return value

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> Any:
        """Copy the graph's lists."""
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        return tuple(map(_mutable, args)), {name: _mutable(value) for name, value in kwargs.items()}

    def growth_of(self, node: fx.Node) -> Growth:
        """How the value of a node changes with the batch."""
        value = self.values[node]
        if isinstance(value, int) and not isinstance(value, bool):
            return "count" if value and value % PRIME == 0 else "fixed"
        layouts = [self.recorder.layouts.get(id(tensor)) for tensor in tensors_in(value)]
        if not any(layouts):
            return "fixed"
        # Integers may be the numbers of rows, which differ in a batch of twice as many.
        is_index = isinstance(value, Tensor) and value.dtype in (torch.int64, torch.int32)
        is_rows = layouts[0] is not None and layouts[0].is_rows
        return "rows" if isinstance(value, Tensor) and is_rows and not is_index else "other"

    def is_changed_from(self, node: fx.Node, position: int) -> bool:
        """Whether the value of a node is changed in place by the node at a position of the graph or a later one."""
        storages = (tensor.untyped_storage()._cdata for tensor in tensors_in(self.values[node]))
        return any(self.recorder.changed.get(storage, -1) >= position for storage in storages)


def _mutable(value: Any) -> Any:
    return list(map(_mutable, value)) if isinstance(value, fx.immutable_collections.immutable_list) else value
