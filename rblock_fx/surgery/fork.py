"""The graph pass that doubles the batch, as late as the graph allows."""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from rblock_fx.surgery.probe import Probe


class Fork:
    """Where the batch of a graph doubles.

    Attributes:
        masks: the mask calls at which it doubles.
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

    A node is paired if one of its inputs is. Where a paired node takes an unpaired value that grows with the batch, that
    value is doubled there, once: a tensor by concatenation, a number (a size read before the fork) by two.

    Args:
        graph: the graph with its masks.
        masks: the calls of the masks.
        plain: a probe of the graph in which the masks are skipped.
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
