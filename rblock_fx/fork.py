"""The graph pass: insert the masks, and double the batch as late as the graph allows."""

import dataclasses
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from rblock_fx.probe import Growths
from rblock_fx.trace import Record


@dataclasses.dataclass(frozen=True)
class Fork:
    """What the pass did: the mask modules that fork, and why the batch had to double at the input, if it had."""

    forking: frozenset[str]
    reason: str | None


class _CannotForkLateError(Exception):
    """A value from before the fork is used behind it and cannot be doubled."""


def insert_masks(graph: fx.Graph, masked: Mapping[str, Record]) -> dict[fx.Node, str]:
    """Put a call of each mask module (by its path) behind its map, in place; give the calls with the module's path.

    An item of a list that nothing uses is not masked, and not taken from the list.
    """
    calls: dict[fx.Node, str] = {}
    for target, record in masked.items():
        if record.item is not None and not record.node.users:
            continue
        with graph.inserting_before(record.consumer if record.consumer is not None else record.node.next):
            call = graph.call_module(target, (record.node,))
        calls[call] = target
        if record.consumer is not None:
            record.consumer.replace_input_with(record.node, call)
        else:
            _use_instead(record.node, call)
    for node in reversed(graph.nodes):
        if node.target is operator.getitem and not node.users:
            graph.erase_node(node)
    return calls


def fork_batch(graph: fx.Graph, calls: Mapping[fx.Node, str], growths: Growths) -> Fork:
    """Double the batch at the first mask on every path, in place; at the input where that cannot be done.

    A node is paired if an input of it is. Where a paired node takes an unpaired value that grows with the batch, that
    value is doubled there, once: a tensor by concatenation, a number (a size read before the fork) by two.
    """
    try:
        _plan(graph, calls, growths, edit=False)
    except _CannotForkLateError as reason:
        inputs = [node for node in graph.nodes if node.op == "placeholder"]
        for node in [node for node in inputs if growths.of(node) == "rows"]:
            _double(graph, node, node.next, torch.cat, ([node, node],), all_users=True)
        return Fork(frozenset(), str(reason))
    return Fork(frozenset(_plan(graph, calls, growths, edit=True)), None)


def _plan(graph: fx.Graph, calls: Mapping[fx.Node, str], growths: Growths, *, edit: bool) -> set[str]:
    """Walk the graph in order; give the targets of the masks that fork."""
    paired: set[fx.Node] = set()
    doubled: dict[fx.Node, fx.Node] = {}
    forking: set[str] = set()
    for node in list(graph.nodes):
        inputs = node.all_input_nodes
        if node in calls:
            if inputs[0] not in paired:
                forking.add(calls[node])
            paired.add(node)
            continue
        if not paired or not (paired.intersection(inputs) or node.op == "output"):
            continue
        paired.add(node)
        for value in inputs:
            growth = "fixed" if value in paired else growths.of(value)
            if growth == "fixed":
                continue
            if growth == "other":
                raise _CannotForkLateError(
                    f"{value.name!r}, computed before the first mask, is used behind it, and has no batch axis to "
                    "double or is changed in place"
                )
            if edit:
                if value not in doubled:
                    function, args = (torch.cat, ([value, value],)) if growth == "rows" else (operator.mul, (value, 2))
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
