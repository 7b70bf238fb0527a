"""The graph pass: insert the masks, and double the batch as late as the graph allows."""

import dataclasses
import operator
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from rblock_fx.replica import dry_run, meta_batch

# How a value changes with the batch: not at all; its first axis (or, a number, itself) grows in proportion; otherwise,
# which is also said of a tensor that is changed in place later on, so that a doubled copy of it would go stale.
Growth = Literal["fixed", "rows", "count", "other"]

# Two batches that tell what grows with the batch from what does not. Even, for networks that split their batch.
PROBE_ROWS = (4, 6)


@dataclasses.dataclass(frozen=True)
class MaskedNode:
    """A node whose value is to be masked by the module `target`, for one consumer or (None) for all."""

    node: fx.Node
    consumer: fx.Node | None
    target: str


@dataclasses.dataclass(frozen=True)
class Fork:
    """What the pass did: the mask modules that fork, and why the batch had to double at the input, if it had."""

    forking: frozenset[str]
    reason: str | None


class _CannotForkLateError(Exception):
    """A value from before the fork is used behind it and cannot be doubled."""


def probe_growth(graph: fx.Graph, replica: nn.Module, input_size: tuple[int, ...]) -> dict[fx.Node, Growth]:
    """Run the traced graph of a weightless copy on two batches and compare what each node gives."""
    small, large = (_values(graph, replica, meta_batch(replica, rows, input_size)) for rows in PROBE_ROWS)
    growth = {node: _growth(small.values[node], large.values[node]) for node in small.values}
    stale: dict[fx.Node, Growth] = {node: "other" for node in small.changed_later if node.op != "placeholder"}
    return growth | stale


def insert_masks(graph: fx.Graph, masked: Sequence[MaskedNode]) -> dict[fx.Node, MaskedNode]:
    """Put a call of each mask module behind its node, in place."""
    calls = {}
    for entry in masked:
        before = entry.consumer if entry.consumer is not None else entry.node.next
        with graph.inserting_before(before):
            call = graph.call_module(entry.target, (entry.node,))
        if entry.consumer is not None:
            entry.consumer.replace_input_with(entry.node, call)
        else:
            _use_instead(entry.node, call)
        calls[call] = entry
    return calls


def fork_batch(graph: fx.Graph, calls: dict[fx.Node, MaskedNode], growth: dict[fx.Node, Growth]) -> Fork:
    """Double the batch at the first mask on every path, in place; at the input where that cannot be done.

    A node is paired if an input of it is. Where a paired node takes an unpaired value that grows with the batch, that
    value is doubled there, once: a tensor by concatenation, a number (a size read before the fork) by two.
    """
    try:
        _plan(graph, calls, growth, edit=False)
    except _CannotForkLateError as reason:
        for node in [node for node in graph.nodes if node.op == "placeholder" and growth.get(node) == "rows"]:
            _double(graph, node, node.next, torch.cat, ([node, node],), all_users=True)
        return Fork(frozenset(), str(reason))
    return Fork(frozenset(_plan(graph, calls, growth, edit=True)), None)


def _plan(graph: fx.Graph, calls: dict[fx.Node, MaskedNode], growth: dict[fx.Node, Growth], *, edit: bool) -> set[str]:
    """Walk the graph in order; give the targets of the masks that fork."""
    paired: set[fx.Node] = set()
    doubled: dict[fx.Node, fx.Node] = {}
    forking: set[str] = set()
    for node in list(graph.nodes):
        inputs = node.all_input_nodes
        if node in calls:
            if calls[node].node not in paired:
                forking.add(calls[node].target)
            paired.add(node)
            continue
        if not paired or not (paired.intersection(inputs) or node.op == "output"):
            continue
        paired.add(node)
        for value in inputs:
            if value in paired or growth.get(value, "fixed") == "fixed":
                continue
            if growth[value] == "other":
                raise _CannotForkLateError(
                    f"{value.name!r}, computed before the first mask, is used behind it, and has no batch axis to "
                    "double or is changed in place"
                )
            if edit:
                if value not in doubled:
                    function, args = (
                        (torch.cat, ([value, value],)) if growth[value] == "rows" else (operator.mul, (value, 2))
                    )
                    doubled[value] = _double(graph, value, node, function, args)
                node.replace_input_with(value, doubled[value])
    return forking


def _double(
    graph: fx.Graph,
    value: fx.Node,
    before: fx.Node,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    *,
    all_users: bool = False,
) -> fx.Node:
    with graph.inserting_before(before):
        twice = graph.call_function(function, args)
    if all_users:
        _use_instead(value, twice)
    return twice


def _use_instead(value: fx.Node, replacement: fx.Node) -> None:
    """Give the replacement to everything that uses the value, but for the replacement itself."""
    value.replace_all_uses_with(replacement, delete_user_cb=lambda user: user is not replacement)


class _Recording(fx.Interpreter):
    """Runs a graph and keeps the shape of everything."""

    def __init__(self, replica: nn.Module, graph: fx.Graph) -> None:
        super().__init__(replica, graph=graph)
        self.values: dict[fx.Node, Any] = {}
        self.versions: dict[fx.Node, tuple[Tensor, int]] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.values[n] = _summary(value)
        if isinstance(value, Tensor):
            self.versions[n] = (value, value._version)
        return value

    @property
    def changed_later(self) -> set[fx.Node]:
        """The nodes whose tensor was changed in place after they had given it."""
        return {node for node, (tensor, version) in self.versions.items() if tensor._version != version}


def _values(graph: fx.Graph, replica: nn.Module, x: Tensor) -> _Recording:
    recording = _Recording(replica, graph)
    with dry_run():
        recording.run(x)
    return recording


def _summary(value: Any) -> Any:
    """Keep of a value what tells how it grows; not the tensor, which the run may free."""
    if isinstance(value, Tensor):
        return ("tensor", tuple(value.shape))
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
