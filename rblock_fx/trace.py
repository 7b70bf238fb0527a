"""Ancestors-only tracing: a graph in which every module that holds no site inside stays a leaf."""

import dataclasses
import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from rblock_fx.errors import ConversionError
from rblock_fx.replica import random_state_kept
from rblock_fx.stages import Site


class SiteTracer(fx.Tracer):
    """Traces through the modules that contain a site and records what the sites give (or, for a head, take)."""

    # A buffer read in a forward must be read anew each time, like a parameter.
    proxy_buffer_attributes = True

    def __init__(self, root: nn.Module, sites: Sequence[Site]) -> None:
        # timm marks the functions that fx cannot look into; they become nodes, as in timm's own feature extraction.
        timm_layers = sys.modules.get("timm.layers")
        wrapped = timm_layers.get_notrace_functions() if timm_layers else ()
        super().__init__(autowrap_functions=tuple(wrapped))
        self.recorded: dict[Site, list[tuple[Any, fx.Node | None]]] = {site: [] for site in sites}
        self._sites = {(root.get_submodule(site.path), site.is_head): site for site in sites}
        self._ancestors = {
            root.get_submodule(".".join(names[:depth]))
            for names in (site.path.split(".") for site in sites)
            for depth in range(len(names))
        }

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:  # noqa: ARG002
        """Only a module around a site is looked into."""
        return m not in self._ancestors

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Record each call of a site, leaf or looked into, and of a classifier with its input."""
        output = super().call_module(m, forward, args, kwargs)
        if (m, False) in self._sites:
            self.recorded[self._sites[m, False]].append((output, None))
        if (m, True) in self._sites:
            consumer = output.node if isinstance(output, fx.Proxy) else None
            self.recorded[self._sites[m, True]].append((args[0] if args else None, consumer))
        return output


@dataclasses.dataclass(frozen=True)
class Trace:
    """A traced training forward.

    Attributes:
        graph: the graph.
        nodes: for each site the nodes of its maps, each with the only consumer to mask it for (a classifier) or None
            for all consumers.
        specialised: the optional arguments of the forward and their defaults, which the graph has taken for granted.
        constants: tensors that the forward makes of numbers alone, by their name under `rblock`.
    """

    graph: fx.Graph
    nodes: dict[Site, list[tuple[fx.Node, fx.Node | None]]]
    specialised: dict[str, Any]
    constants: dict[str, Tensor]


def trace_ancestors(replica: nn.Module, sites: Sequence[Site]) -> Trace:
    """Trace the training forward of a weightless copy.

    Raises:
        ConversionError: the forward of the model, or of a module around a site, cannot be traced or draws
            random numbers, or a site gives no single tensor in train mode.
    """
    tracer = SiteTracer(replica, sites)
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(replica.forward).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    replica.train()
    try:
        with random_state_kept() as random_drawn, torch.no_grad():
            graph = tracer.trace(replica, concrete_args=defaults)
            frozen_draw = random_drawn()
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise ConversionError(_untraceable(replica, sites, reason)) from error
    if frozen_draw:
        raise ConversionError(_untraceable(replica, sites, "it draws random numbers, which tracing would freeze"))
    nodes = {}
    for site, records in tracer.recorded.items():
        if not records or not all(isinstance(value, fx.Proxy) for value, _ in records):
            reason = "gives no single tensor" if records else "is not called in train mode"
            raise ConversionError(
                f"site {site.path!r} {reason} in the traced forward of {type(replica).__name__}; choose another stage: "
                "list_sites(model)."
            )
        nodes[site] = [(value.node, consumer) for value, consumer in records]
    return Trace(graph, nodes, defaults, _take_constants(graph, replica))


def _take_constants(graph: fx.Graph, replica: nn.Module) -> dict[str, Tensor]:
    """Take along the tensors that the forward makes of numbers alone, which fx leaves on what it traced."""
    constants = {}
    for node in graph.nodes:
        if node.op == "get_attr" and node.target.startswith("_tensor_constant"):
            name = node.target.removeprefix("_")
            constants[name] = getattr(replica, node.target)
            node.target = f"rblock.{name}"
    return constants


def _untraceable(replica: nn.Module, sites: Sequence[Site], reason: str) -> str:
    paths = [site.path for site in sites]
    return (
        f"the forward of {type(replica).__name__}, or of a module around the sites {paths}, cannot be traced "
        f"({reason}). Choose sites that lie less deep (modules that hold no site are not traced), or pass the part of "
        "the model that computes the maps, e.g. apply_rblock(model.backbone)."
    )
