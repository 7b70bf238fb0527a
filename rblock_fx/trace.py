"""Ancestors-only tracing: a graph in which every module that holds no site inside stays a leaf."""

import contextlib
import dataclasses
import inspect
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, fx, nn

from rblock_fx.dry_run import random_state_kept
from rblock_fx.errors import ConversionError, first_line
from rblock_fx.replica import CHECKPOINTING
from rblock_fx.stages import Site, containers_of
from rblock_fx.survey import Shape, Structure, Survey
from rblock_fx.watch import Setting, attributes_watched


@dataclasses.dataclass(frozen=True)
class Record:
    """A map to be masked.

    Attributes:
        node: what gives it.
        item: its place in the list that the module gives; None where it gives the map itself.
        shape: its shape, without the batch axis.
        consumer: the only consumer to mask it for (a classifier); None for all consumers.
    """

    node: fx.Node
    item: int | None
    shape: Shape
    consumer: fx.Node | None


@dataclasses.dataclass(frozen=True)
class Trace:
    """A traced training forward.

    Attributes:
        graph: the graph.
        records: for each site its maps.
        specialised: the optional arguments of the forward and their defaults, which the graph has taken for granted.
        constants: tensors that the forward makes of numbers alone, by their name under `rblock`.
        settings: the plain attributes that the forwards in the graph have read.
        checkpointed: the modules that run under activation checkpointing, each with the attribute of the model that
            switches it; None where it is always on.
    """

    graph: fx.Graph
    records: dict[Site, list[Record]]
    specialised: dict[str, Any]
    constants: dict[str, Tensor]
    settings: tuple[Setting, ...]
    checkpointed: dict[str, str | None]


class SiteTracer(fx.Tracer):
    """Traces through the modules that contain a site and records what the sites give (or, for a head, take)."""

    # A buffer read in a forward must be read anew each time, like a parameter.
    proxy_buffer_attributes = True

    def __init__(self, root: nn.Module, sites: Sequence[Site], survey: Survey) -> None:
        # timm marks the functions that fx cannot look into; they become nodes, as in timm's own feature extraction.
        timm_layers = sys.modules.get("timm.layers")
        wrapped = timm_layers.get_notrace_functions() if timm_layers else ()
        super().__init__(autowrap_functions=tuple(wrapped))
        self.outputs: dict[Site, list[tuple[Any, fx.Node | None]]] = {site: [] for site in sites}
        self.checkpointed: dict[str, str | None] = {}
        self._sites = {(root.get_submodule(site.path), site.is_head): site for site in sites}
        self.ancestors = {root.get_submodule(path): path for path in ("", *containers_of(sites))}
        self._structures = {run.path: run.structure for run in survey.runs}
        self._around = [""]
        self._checkpoints = 0
        with torch.enable_grad():
            self._modes = _modes()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:  # noqa: ARG002
        """Only a module around a site is looked into."""
        return m not in self.ancestors

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Record each call of a site, leaf or looked into, and of a classifier with its input."""
        if self._checkpoints and m not in self.ancestors:
            self.checkpointed[self.path_of_module(m)] = self._switch()
        self._around.append(self.ancestors.get(m, ""))
        output: Any = super().call_module(m, forward, args, kwargs)
        self._around.pop()
        if isinstance(output, fx.Proxy):
            output = _unpacked(output, self._structures.get(self.path_of_module(m)))
        if (m, False) in self._sites:
            self.outputs[self._sites[m, False]].append((_as_it_is_now(output), None))
        if (m, True) in self._sites:
            consumer = output.node if isinstance(output, fx.Proxy) else None
            self.outputs[self._sites[m, True]].append((args[0] if args else None, consumer))
        return output

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Refuse what is computed in another mode than the whole, which a graph does not tell of."""
        if _modes() != self._modes:
            raise RuntimeError("it switches gradients, autocast or inference mode on or off")
        return super().create_node(*args, **kwargs)

    def create_arg(self, a: Any) -> Any:
        """Keep the type of a dictionary, of which fx makes a plain one."""
        if isinstance(a, OrderedDict):
            items = [self.create_arg(item) for item in a.items()]
            return self.create_node("call_function", type(a), (items,), {})
        return super().create_arg(a)

    def _switch(self) -> str | None:
        """The attribute of the innermost module around that switches checkpointing, if it was that that did."""
        for path in reversed(self._around):
            if vars(self.root.get_submodule(path)).get(CHECKPOINTING):
                return f"{path}.{CHECKPOINTING}" if path else CHECKPOINTING
        return None

    @contextlib.contextmanager
    def checkpoints_noticed(self, enabled: bool) -> Iterator[None]:
        """Run what is checkpointed as it stands, and notice it; with the switches of the modules looked into set."""

        def checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            options = inspect.signature(original).parameters
            self._checkpoints += 1
            try:
                return function(*args, **{name: kwargs[name] for name in kwargs if name not in options})
            finally:
                self._checkpoints -= 1

        original = torch.utils.checkpoint.checkpoint
        scopes = [vars(torch.utils.checkpoint), *(vars(sys.modules[type(m).__module__]) for m in self.ancestors)]
        names = [(scope, name) for scope in scopes for name, value in scope.items() if value is original]
        switches = {m: vars(m)[CHECKPOINTING] for m in self.ancestors if CHECKPOINTING in vars(m)}
        for scope, name in names:
            scope[name] = checkpoint
        for module in switches:
            setattr(module, CHECKPOINTING, enabled)
        try:
            yield
        finally:
            for scope, name in names:
                scope[name] = original
            for module, value in switches.items():
                setattr(module, CHECKPOINTING, value)


def trace_ancestors(replica: nn.Module, sites: Sequence[Site], survey: Survey) -> Trace:
    """Trace the training forward of a weightless copy, with activation checkpointing off.

    What would be checkpointed if it were on comes from a second trace.

    Raises:
        ConversionError: the forward of the model, or of a module around a site, cannot be traced or draws
            random numbers, or a site gives no map in train mode.
    """
    tracer = SiteTracer(replica, sites, survey)
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(replica.forward).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    replica.train()
    try:
        with random_state_kept() as random_drawn, torch.enable_grad(), tracer.checkpoints_noticed(False):
            with attributes_watched(tracer.ancestors) as settings:
                graph = tracer.trace(replica, concrete_args=defaults)
            frozen_draw = random_drawn()
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ConversionError(_untraceable(replica, sites, reason)) from error
    if frozen_draw:
        raise ConversionError(_untraceable(replica, sites, "it draws random numbers, which tracing would freeze"))
    return Trace(
        graph=graph,
        records={
            site: _records(site, outputs, replica, calls=len(survey.runs_of(site.path)))
            for site, outputs in tracer.outputs.items()
        },
        specialised=defaults,
        constants=_take_constants(graph, replica, sites),
        settings=tuple(settings.values()),
        checkpointed=_checkpointed_on_demand(replica, sites, survey, defaults) | tracer.checkpointed,
    )


def _checkpointed_on_demand(
    replica: nn.Module, sites: Sequence[Site], survey: Survey, defaults: dict[str, Any]
) -> dict[str, str | None]:
    """Which modules run under activation checkpointing when it is switched on; none where it cannot be."""
    tracer = SiteTracer(replica, sites, survey)
    if not any(CHECKPOINTING in vars(module) for module in tracer.ancestors):
        return {}
    with random_state_kept(), torch.enable_grad(), tracer.checkpoints_noticed(True), contextlib.suppress(Exception):
        tracer.trace(replica, concrete_args=defaults)
        return tracer.checkpointed
    return {}


def _records(site: Site, outputs: list[tuple[Any, fx.Node | None]], replica: nn.Module, calls: int) -> list[Record]:
    """The maps of each call of a site."""
    if len(outputs) < calls:
        raise _no_map(site, replica, f"runs {calls} times, of which {len(outputs)} can be masked,")
    records = []
    for value, consumer in outputs:
        for place, shape in site.shapes.items():
            several = isinstance(value, list | tuple) and place is not None and place < len(value)
            item = value[place] if several else value
            if not isinstance(item, fx.Proxy):
                raise _no_map(site, replica, "gives no single tensor")
            records.append(Record(item.node, place, shape, consumer))
    if not records:
        raise _no_map(site, replica, "is not called in train mode")
    return records


def _modes() -> tuple[bool, ...]:
    autocast = (torch.is_autocast_enabled(device) for device in ("cpu", "cuda"))
    return (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast)


def _unpacked(proxy: Any, structure: Structure) -> Any:
    """Make of a list a list of proxies: the network may go through it, measure it, and write into it."""
    if structure is None:
        return proxy
    kind, items = structure
    unpacked = [_unpacked(proxy[place], item) for place, item in enumerate(items)]
    return kind(*unpacked) if hasattr(kind, "_fields") else kind(unpacked)


def _as_it_is_now(output: Any) -> Any:
    """A list may be written into later."""
    return list(output) if isinstance(output, list) else output


def _no_map(site: Site, replica: nn.Module, reason: str) -> ConversionError:
    return ConversionError(
        f"site {site.path!r} {reason} in the traced forward of {type(replica).__name__}; choose another stage: "
        "list_sites(model)."
    )


def _take_constants(graph: fx.Graph, replica: nn.Module, sites: Sequence[Site]) -> dict[str, Tensor]:
    """Take along the tensors that the forward makes of numbers alone, which fx leaves on what it traced."""
    constants = {}
    for node in graph.nodes:
        if node.op == "get_attr" and node.target.startswith("_tensor_constant"):
            name = node.target.removeprefix("_")
            constants[name] = getattr(replica, node.target)
            if constants[name].is_meta:
                raise ConversionError(_untraceable(replica, sites, "it uses a tensor that a module has left behind"))
            node.target = f"rblock.{name}"
    return constants


def _untraceable(replica: nn.Module, sites: Sequence[Site], reason: str) -> str:
    paths = [site.path for site in sites]
    return (
        f"the forward of {type(replica).__name__}, or of a module around the sites {paths}, cannot be traced "
        f"({reason}). Choose sites that lie less deep (modules that hold no site are not traced), or pass the part of "
        "the model that computes the maps, e.g. apply_rblock(model.backbone)."
    )
