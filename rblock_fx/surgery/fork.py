"""Passes over a graph: double its batch as late as its values allow, cut it, erase what nothing uses."""

import operator
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from rblock_fx.network.record import PRIME, ROWS, Layout, Mixing, Recorder
from rblock_fx.network.replica import Shape, meta_batch, tensors_in

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
        result: the returned value, without data.
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
        x = meta_batch(replica, ROWS, input_size)
        self.recorder.follow(x, Layout(ROWS, True))
        for tensor in tensors_in(list(before.values())):
            self.recorder.follow(tensor, known.recorder.layouts.get(id(tensor)))  # type: ignore[union-attr]
        with self.recorder.recording():
            self.result = self.run(x, initial_env=before)

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
            layout = recorder.layouts.get(id(self.env[n.all_input_nodes[0]]))
            if batch > ROWS and not (layout is not None and layout.is_rows):
                recorder.mixings.append(Mixing(None, "a mask on rows in another order", n.name))
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
            counts = [item for item in pytree.tree_leaves(value) if isinstance(item, int) and item]
            return "other" if any(count % PRIME == 0 for count in counts) else "fixed"
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


class Fork:
    """Where the batch of a graph doubles.

    Attributes:
        masks: the mask calls that double it.
        copies: the nodes that double a value of the unpaired batch.
        reason: why the batch doubles at the input; None where it doubles at the first mask.
    """

    def __init__(self) -> None:
        self.masks: set[fx.Node] = set()
        self.copies: set[fx.Node] = set()
        self.reason: str | None = None


class _CannotForkLateError(Exception):
    """A value from before the fork is used behind it and cannot be doubled."""


def fork_batch(graph: fx.Graph, masks: set[fx.Node], plain: Probe) -> Fork:
    """Double the batch at the first mask on every path, in place; at the input where that is not possible.

    A node is paired if one of its inputs is. Where a paired node takes an unpaired value that grows with the batch,
    that value is doubled there, once: a tensor by concatenation, a number (a size read before the fork) by two.

    Args:
        graph: the graph with its masks.
        masks: the calls of the masks.
        plain: a probe of the graph that skips the masks.
    """
    try:
        _walk(graph, masks, plain, Fork(), edit=False)
    except _CannotForkLateError as error:
        fork = Fork()
        fork.reason = str(error)
        for node in [node for node in graph.nodes if node.op == "placeholder" and plain.growth_of(node) == "rows"]:
            twice = _double(graph, node.next, torch.cat, ([node, node],))
            node.replace_all_uses_with(twice, delete_user_cb=lambda user, twice=twice: user is not twice)
            fork.copies.add(twice)
        return fork
    return _walk(graph, masks, plain, Fork(), edit=True)


def _walk(graph: fx.Graph, masks: set[fx.Node], plain: Probe, fork: Fork, *, edit: bool) -> Fork:
    paired: set[fx.Node] = set()
    doubled: dict[fx.Node, fx.Node] = {}
    for position, node in enumerate(list(graph.nodes)):
        inputs = node.all_input_nodes
        if node in masks:
            if inputs[0] not in paired:
                fork.masks.add(node)
            paired.add(node)
            continue
        if not paired or not (paired.intersection(inputs) or node.op == "output"):
            continue
        paired.add(node)
        for value in inputs:
            growth = "fixed" if value in paired else plain.growth_of(value)
            if growth == "fixed":
                continue
            if growth == "other":
                raise _CannotForkLateError(
                    f"{value.name!r}, computed before the first mask and used behind it, does not have the batch as "
                    "its first axis"
                )
            if growth == "rows" and plain.is_changed_from(value, position):
                raise _CannotForkLateError(
                    f"{value.name!r}, computed before the first mask and used behind it, is changed in place there"
                )
            if edit:
                if value not in doubled:
                    function, args = (torch.cat, ([value, value],)) if growth == "rows" else (operator.mul, (value, 2))
                    doubled[value] = _double(graph, node, function, args)
                    if growth == "rows":
                        fork.copies.add(doubled[value])
                node.replace_input_with(value, doubled[value])
    return fork


def _double(graph: fx.Graph, before: fx.Node, function: Callable[..., Any], args: tuple[Any, ...]) -> fx.Node:
    with graph.inserting_before(before):
        return graph.call_function(function, args)


def truncated(graph: fx.Graph, output: fx.Node, last: fx.Node) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """Copy a graph up to its node `last`, with another output; also returns the copies of its nodes."""
    copy = fx.Graph()
    nodes: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node.op == "output":
            break
        nodes[node] = copy.node_copy(node, nodes.__getitem__)
        if node is last:
            break
    copy.output(nodes[output])
    return copy, nodes


def erase_unused(
    graph: fx.Graph, masks: dict[fx.Node, Any], kept: Collection[fx.Node], specialised: Collection[str]
) -> None:
    """Erase masks of maps that nothing uses, unused items of lists, and the arguments that were specialised."""
    arguments = {f"{name}_1" for name in specialised}
    for node in [node for node in graph.nodes if node.op == "placeholder" and node.target in arguments]:
        checks = list(node.users)  # fx asserts that each has its default
        for user in [*(user for check in checks for user in check.users), *checks, node]:
            graph.erase_node(user)
    for node in reversed(graph.nodes):
        is_item = node.op == "call_function" and node.target is operator.getitem
        if not node.users and node not in kept and (node in masks or is_item):
            masks.pop(node, None)
            graph.erase_node(node)


def take_constants(graph: fx.Graph, replica: nn.Module, holder: str) -> dict[str, Tensor]:
    """Move the tensors that the forward makes of numbers alone, which fx leaves on the traced module, to `holder`."""
    constants = {}
    for node in graph.nodes:
        if node.op == "get_attr" and node.target.startswith("_tensor_constant"):
            name = node.target.removeprefix("_")
            constants[name] = getattr(replica, node.target)
            if constants[name].is_meta:
                raise RuntimeError("it uses a tensor that a module keeps as a plain attribute")
            node.target = f"{holder}.{name}"
    return constants
