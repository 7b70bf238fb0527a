"""Storing a masked map once: a ReLU in front of a mask saves what the mask gives instead of what itself gave."""

import operator
import sys
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules import module
from torch.utils import _pytree as pytree

from rblock_fx.probe import Probe

# What autograd calls F.relu, in place or not, and F.leaky_relu in place: they save their result and ask for its sign.
SIGN_ONLY = ("ReluBackward0", "LeakyReluBackward1")


def share_saved_maps(
    graph: fx.Graph, masks: Collection[fx.Node], plain: Probe, converted: Probe, replica: nn.Module
) -> None:
    """Call `save_masked_only` behind each of these masks, in place.

    Not where the masked map is changed in place later on, or is given to the caller, who may change it: the ReLU would
    need it as it was. And not where the mask is not all that uses the ReLU's map, so that a gradient comes in from
    elsewhere: another node, the module that gave it, an attribute in which a module keeps it, or a node that has the
    same memory, as the input of a ReLU in place has.

    Args:
        graph: the graph.
        masks: the calls of the masks behind the fork. One that forks gives another number of rows than the ReLU.
        plain: a run of the graph without masks.
        converted: a run of the graph.
        replica: the copy of the model that ran.
    """
    given = [leaf for leaf in pytree.tree_leaves(converted.output) if isinstance(leaf, Tensor)]
    kept = {id(value) for part in replica.modules() for value in vars(part).values() if isinstance(value, Tensor)}
    values = plain.values | converted.values  # what lies before the first mask has not run again
    for mask in masks:
        (x,) = mask.all_input_nodes
        masked = values[mask]
        if mask in converted.changed_later or any(_is_same_memory(masked, leaf) for leaf in given):
            continue
        if set(x.users) != {mask} or x in plain.used_within or id(values[x]) in kept:
            continue
        if _is_used_by_another_name(x, values):
            continue
        giver = x.args[0] if x.target is operator.getitem else x
        with graph.inserting_after(mask):
            call = graph.call_function(save_masked_only, (x, mask))
        callers = [mask, giver] if isinstance(giver, fx.Node) and giver.op == "call_module" else [mask]
        with graph.inserting_before(call):
            call.args = (x, mask, *(graph.get_attr(str(caller.target)) for caller in callers))


def save_masked_only(x: Tensor, masked: Tensor, *modules: nn.Module) -> None:
    """Let the ReLU that gave x save `masked` for backward in place of x, which then need not be kept.

    A ReLU (and a leaky one in place) saves its result, and asks of it in backward only where it is positive; the layer
    behind the mask saves the masked map. Where a mask keeps, it scales by a positive number, so the one is positive
    where the other is; where it drops, the gradient that arrives is zero, if all of it comes through the mask. So the
    gradients are the same, and one map is stored instead of two.

    Nothing happens where x is no ReLU's; where someone else holds it, or hooks may have seen it or may change its
    gradient, so that not all of it comes through the mask; where its saved tensor belongs to other hooks (activation
    checkpointing, `save_on_cpu`); and under torch.compile, which decides by itself what to recompute.

    Args:
        x: the map, (2N, C, *S).
        masked: the same, masked.
        *modules: the mask, and the module whose output x is.

    Raises:
        RuntimeError: in backward, if the masked map was changed in place after the mask.
    """
    if torch.compiler.is_compiling() or not isinstance(x, Tensor) or x.grad_fn is None:
        return
    if x.grad_fn.name() not in SIGN_ONLY or x._backward_hooks or any(map(_has_hooks, modules)):
        return
    if sys.getrefcount(x) > _HELD_BY_ITS_CALLER or module._has_any_global_hook():  # type: ignore[no-untyped-call]
        return
    kept = masked.detach()
    version = kept._version

    def unpack(_nothing: None) -> Tensor:
        if kept._version != version:
            raise RuntimeError(
                f"a masked map of shape {tuple(kept.shape)}, which a ReLU needs for its backward, was changed in place "
                "after the forward; change a copy, e.g. x.clone()"
            )
        return kept

    saved: Any = x.grad_fn._raw_saved_result  # type: ignore[attr-defined]
    try:
        saved.register_hooks(lambda _x: None, unpack)
    except RuntimeError:
        return


def _is_same_memory(first: Tensor, second: Tensor) -> bool:
    return first.untyped_storage() is second.untyped_storage()


def _is_used_by_another_name(x: fx.Node, values: Mapping[fx.Node, Any]) -> bool:
    """Whether a node that gave x's memory, as the input of a ReLU in place does, is used for more than to make x."""

    def has_memory_of_x(node: fx.Node) -> bool:
        leaves = pytree.tree_leaves(values.get(node))
        return any(isinstance(leaf, Tensor) and _is_same_memory(leaf, values[x]) for leaf in leaves)

    names = {node for node in values if node is not x and has_memory_of_x(node)}
    for name in names:
        users = set(name.users) - names - {x}
        if not isinstance(values[name], Tensor):  # who takes an item that has x's memory is a name itself
            users = {user for user in users if user.target is not operator.getitem}
        if users:
            return True
    return False


def _has_hooks(part: nn.Module) -> bool:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(inner, kind) for inner in part.modules() for kind in kinds)


def _count_as_called(x: Tensor) -> int:
    return sys.getrefcount(x)


def _count_of_a_local() -> int:
    x = torch.empty(0)
    return _count_as_called(x)


# How often a tensor counts that its caller alone holds, in a variable; this differs between versions of Python.
_HELD_BY_ITS_CALLER = _count_of_a_local()
