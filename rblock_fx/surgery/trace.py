"""Trace the training forward of a network, with a mask behind every site.

Only the modules around a site are traced through; every other module stays a leaf.
"""

import contextlib
import dataclasses
import inspect
import sys
import threading
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from rblock_fx.errors import ConversionError, first_line
from rblock_fx.network.replica import Shape, Structure, random_state_kept
from rblock_fx.network.stages import Site, containers_of
from rblock_fx.network.survey import Survey
from rblock_fx.surgery.code import Checkpoints, identifier
from rblock_fx.surgery.conversion import Guards, RBlock, forward_of
from rblock_fx.surgery.fork import erase_unused, take_constants
from rblock_fx.surgery.watch import Draws, GuardedProxy, Watch

# The attribute of a converted model that holds its masks.
MASKS = "rblock"


@dataclasses.dataclass(frozen=True)
class MaskCall:
    """A mask that a traced forward calls.

    Attributes:
        name: its name under `model.rblock`.
        site: its site.
        place: the place of its map in the list that the site returns; None where the site returns the map itself.
        shape: shape of one sample's map.
    """

    name: str
    site: Site
    place: int | None
    shape: Shape


@dataclasses.dataclass(frozen=True)
class Trace:
    """A traced training forward.

    Attributes:
        graph: the graph, with its masks.
        masks: the calls of the masks, in forward order.
        specialised: the optional arguments of the forward with the defaults that the graph takes for granted.
        constants: tensors that the forward makes of numbers alone, by their name under `model.rblock`.
        guards: everything else that the graph takes for granted.
        methods: for each method that the forward calls with the images, its output and its last node.
        checkpointed: the modules that run under activation checkpointing, each with the attribute of the model that
            switches it; None where it is always on.
    """

    graph: fx.Graph
    masks: dict[fx.Node, MaskCall]
    specialised: dict[str, Any]
    constants: dict[str, Tensor]
    guards: Guards
    methods: dict[str, tuple[Any, fx.Node]]
    checkpointed: dict[str, str | None]


class SiteTracer(fx.Tracer):
    """Trace through the modules around sites, and call a mask on every map that a site returns (a head: takes)."""

    # A buffer that a forward reads must be read each time, like a parameter.
    proxy_buffer_attributes = True

    def __init__(self, root: nn.Module, sites: Sequence[Site], survey: Survey) -> None:
        # timm marks the functions that fx cannot trace; they become nodes, as in timm's own feature extraction.
        timm_layers = sys.modules.get("timm.layers")
        super().__init__(autowrap_functions=tuple(timm_layers.get_notrace_functions()) if timm_layers else ())
        self.masks: dict[fx.Node, MaskCall] = {}
        self.calls = dict.fromkeys(sites, 0)
        self.methods: dict[str, tuple[Any, fx.Node]] = {}
        self.ancestors = {root.get_submodule(path): path for path in ("", *containers_of(sites))}
        self._sites = {(root.get_submodule(site.path), site.is_head): site for site in sites}
        self._structures = {run.path: run.structure for run in survey.runs}
        self.checkpoints = Checkpoints(self.ancestors)
        self.watch: Watch | None = None
        self._thread = threading.get_ident()
        with torch.enable_grad():
            self._modes = _modes()

    def create_args_for_root(self, *args: Any, **kwargs: Any) -> Any:
        """Start watching: fx runs the forward next."""
        if self.watch is not None:
            self.watch.start()
        return super().create_args_for_root(*args, **kwargs)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:  # noqa: ARG002
        """Only a module around a site is traced through."""
        return m not in self.ancestors

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Record a call of a module, with masks if it is a site. fx patches every thread: others pass through."""
        is_new = m not in (self.submodule_paths or {})  # a slice of a container, made by the forward
        if is_new or threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        if m not in self.ancestors:
            self.checkpoints.note_call(self.path_of_module(m))
        head, site = self._sites.get((m, True)), self._sites.get((m, False))
        if head is not None:
            args = (self._mask(head, None, args[0] if args else None), *args[1:])
            self.calls[head] += 1
        with self.checkpoints.inside(m):
            output: Any = super().call_module(m, forward, args, kwargs)
        if isinstance(output, fx.Proxy):
            output = _unpack(output, self._structures.get(self.path_of_module(m)))
        if site is not None:
            output = self._mask_output(site, output)
            self.calls[site] += 1
        return output

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Make a proxy."""
        return GuardedProxy(node, self)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Read a parameter or buffer as a proxy, in the thread that traces."""
        is_other = threading.get_ident() != self._thread
        return attr_val if is_other else super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Refuse operations in another mode than the whole, which a graph does not record."""
        if _modes() != self._modes:
            raise RuntimeError("it switches gradients, autocast or inference mode on or off")
        return super().create_node(*args, **kwargs)

    def create_arg(self, a: Any) -> Any:
        """Keep the class of a dictionary, list or tuple of another class; fx makes a plain one of it."""
        if isinstance(a, dict) and type(a) is not dict and not dataclasses.is_dataclass(a):
            items = [self.create_arg(item) for item in a.items()]
            return self.create_node("call_function", type(a), (items,), {})
        if isinstance(a, list | tuple) and type(a) not in (list, tuple, torch.Size) and not hasattr(a, "_fields"):
            return self.create_node("call_function", type(a), ([self.create_arg(item) for item in a],), {})
        return super().create_arg(a)

    def follow_method(self, method: types.MethodType) -> Callable[..., Any]:
        """Record the output of a method of the model if it is called with the images alone."""

        def call(*args: Any, **kwargs: Any) -> Any:
            is_proxy = len(args) == 1 and not kwargs and isinstance(args[0], fx.Proxy)
            output = method(*args, **kwargs)
            if is_proxy and args[0].node.op == "placeholder" and isinstance(output, fx.Proxy):
                self.methods[method.__name__] = output.node, next(iter(reversed(self.graph.nodes)))
            return output

        return call

    def _mask_output(self, site: Site, output: Any) -> Any:
        if site.maps and isinstance(output, list | tuple) and len(output) == len(site.maps):
            masked = [
                self._mask(site, place, item) if place in site.shapes else item for place, item in enumerate(output)
            ]
            kind: Any = type(output)
            return kind(*masked) if hasattr(output, "_fields") else kind(masked)
        return self._mask(site, None, output)

    def _mask(self, site: Site, place: int | None, value: Any) -> fx.Proxy:
        if not isinstance(value, fx.Proxy) or place not in site.shapes:
            raise _NoMapError(f"site {site.path!r} does not return a tensor")
        name = identifier(site.path + ("" if place is None else f"_map{place}"))
        name += f"_call{self.calls[site]}" if self.calls[site] else ""
        while name in {call.name for call in self.masks.values()} | {*dir(RBlock()), "conversion"}:
            name += "_"
        mask = self.create_proxy("call_module", f"{MASKS}.{name}", (value,), {})
        self.masks[mask.node] = MaskCall(name, site, place, site.shapes[place])
        return mask


class _NoMapError(Exception):
    """A site does not return a map when the forward is traced."""


def trace_forward(replica: nn.Module, sites: Sequence[Site], survey: Survey) -> Trace:
    """Trace the training forward of a copy; a second trace finds the modules that checkpointing would recompute.

    Raises:
        ConversionError: the forward of the model, or of a module around a site, cannot be traced, draws random numbers
            or has side effects, or a site returns no map in train mode.
    """
    tracer = SiteTracer(replica, sites, survey)
    watch = tracer.watch = Watch(replica, tracer.ancestors, tracer.follow_method)
    parameters = list(inspect.signature(replica.forward).parameters.values())
    defaults = {p.name: p.default for p in parameters[1:] if p.default is not p.empty}
    inlined = {path: forward_of(module) for module, path in tracer.ancestors.items()}
    replica.train()
    try:
        with random_state_kept(), torch.enable_grad(), tracer.checkpoints.noticed(False):
            draws = Draws()  # type: ignore[no-untyped-call]
            with watch.watching(), draws:
                graph = tracer.trace(replica, concrete_args=defaults)
            if draws.seen or watch.draws:
                raise RuntimeError("it draws random numbers, which tracing would freeze")
        constants = take_constants(graph, replica, MASKS)
        for site, calls in tracer.calls.items():
            expected = len(survey.runs_of(site.path))
            if calls < expected:
                raise _NoMapError(f"site {site.path!r} runs {expected} times but was traced {calls} times")
    except _NoMapError as error:
        name = type(replica).__name__
        raise ConversionError(f"{error} in the traced forward of {name}; choose another: list_sites(model)") from None
    except Exception as error:
        raise ConversionError(_untraceable(replica, sites, f"{type(error).__name__}: {first_line(error)}")) from error
    guards = Guards(tuple(watch.settings.values()), tuple(watch.modes.items()), inlined)
    on_demand = SiteTracer(replica, sites, survey)
    if on_demand.checkpoints.can_be_switched():
        with on_demand.checkpoints.noticed(True), random_state_kept(), contextlib.suppress(Exception):
            on_demand.trace(replica, concrete_args=defaults)
    checkpointed = on_demand.checkpoints.modules | tracer.checkpoints.modules
    kept = {node for ends in tracer.methods.values() for node in ends}
    erase_unused(graph, tracer.masks, kept, defaults)
    return Trace(graph, tracer.masks, defaults, constants, guards, tracer.methods, checkpointed)


def _modes() -> tuple[bool, ...]:
    autocast = (torch.is_autocast_enabled(device) for device in ("cpu", "cuda"))
    return (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast)


def _unpack(proxy: Any, structure: Structure) -> Any:
    """Make a list of proxies of a proxy for a list: the network may loop over it, measure it, and write into it."""
    if structure is None:
        return proxy
    kind, items = structure
    unpacked = [_unpack(proxy[place], item) for place, item in enumerate(items)]
    return kind(*unpacked) if hasattr(kind, "_fields") else kind(unpacked)


def _untraceable(replica: nn.Module, sites: Sequence[Site], reason: str) -> str:
    part = next((site.path.split(".")[0] for site in sites if "." in site.path), "backbone")
    return (
        f"the forward of {type(replica).__name__}, or of a module around the sites {[site.path for site in sites]}, "
        f"cannot be traced ({reason}). Choose sites that lie less deep (modules without a site inside are not traced), "
        f"or convert the part that computes the maps: apply_rblock(model.{part})"
    )
