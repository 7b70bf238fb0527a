"""Activation checkpointing in the training forward: what the model's own forward would recompute, it recomputes too."""

from typing import Any

import torch.utils.checkpoint
from torch import nn

from rblock_fx.trace import Trace


def keep_checkpointing(trace: Trace, replica: nn.Module) -> None:
    """Call each module that may be checkpointed by way of `run_checkpointed`, in place."""
    graph = trace.graph
    for node in [node for node in graph.nodes if node.op == "call_module"]:
        inside = {path: _relative(path, node.target) for path in trace.checkpointed}
        parts = tuple(part for part in inside.values() if part is not None)
        if not parts:
            continue
        if not _runs_in_sequence(replica.get_submodule(node.target), parts):
            parts = ("",)
        switch = next(trace.checkpointed[path] for path, part in inside.items() if part is not None)
        with graph.inserting_before(node):
            module = graph.get_attr(node.target)
            enabled = True if switch is None else graph.get_attr(switch)
            call = graph.call_function(run_checkpointed, (module, parts, enabled, *node.args), node.kwargs)
        node.replace_all_uses_with(call)
        graph.erase_node(node)


def run_checkpointed(module: nn.Module, parts: tuple[str, ...], enabled: bool, *args: Any, **kwargs: Any) -> Any:
    """Call a module, or where `enabled` its parts in sequence, those named under activation checkpointing.

    Args:
        module: the module; unless it is itself the part (""), a sequence of modules.
        parts: paths inside the module.
        enabled: whether checkpointing is on.
        args: what the module takes.
        kwargs: what it takes by name.
    """
    if not enabled or not parts:
        return module(*args, **kwargs)
    if "" in parts:
        return torch.utils.checkpoint.checkpoint(module, *args, use_reentrant=False, **kwargs)
    (x,) = args
    for name, child in module.named_children():
        inside = tuple(part for path in parts if (part := _relative(path, name)) is not None)
        x = run_checkpointed(child, inside, enabled, x)
    return x


def _relative(path: str, container: str) -> str | None:
    """The path of a module inside a container, "" for the container itself, None for one outside."""
    if path == container:
        return ""
    return path.removeprefix(container + ".") if path.startswith(container + ".") else None


def _runs_in_sequence(module: nn.Module, parts: tuple[str, ...]) -> bool:
    """Whether the parts can be reached by calling the children of sequences one after the other."""
    if "" in parts:
        return True
    children = dict(module.named_children())
    inside = {name: tuple(p for path in parts if (p := _relative(path, name)) is not None) for name in children}
    nested = all(_runs_in_sequence(children[name], inside[name]) for name in children if inside[name])
    return type(module).forward is nn.Sequential.forward and nested
