"""From a graph to Python: the clean training forward, and the one with activation checkpointing."""

import contextlib
import dataclasses
import importlib
import inspect
import keyword
import re
import sys
import threading
import types
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch.utils.checkpoint
from torch import fx, nn

from rblock_fx.errors import ConversionError
from rblock_fx.network.replica import CHECKPOINTING

# fx frees each value behind its last use, on the same line; the source that people read leaves that out.
_RELEASE = re.compile(r";  (\w+ = )+None(?=\s*(#.*)?$)", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class TrainingForward:
    """A generated forward(self, x); self is the original model.

    Attributes:
        source: Python source.
        names: the global names that it uses.
    """

    source: str
    names: dict[str, Any]

    @property
    def readable(self) -> str:
        """The source without the statements that free memory."""
        return _RELEASE.sub("", self.source).strip()

    def compile(self, owner: str) -> Callable[..., Any]:
        """Make the function."""
        return compile_function(self.source, self.names, f"training forward of {owner}")

    def __getstate__(self) -> dict[str, Any]:
        """Python modules cannot be pickled; their names can."""
        names = {
            key: _ModuleName(value.__name__) if isinstance(value, types.ModuleType) else value
            for key, value in self.names.items()
        }
        return {"source": self.source, "names": names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        names = {
            key: importlib.import_module(value.name) if isinstance(value, _ModuleName) else value
            for key, value in state["names"].items()
        }
        self.__dict__.update(state, names=names)


@dataclasses.dataclass(frozen=True)
class _ModuleName:
    name: str


class _Source:
    """A module loader that shows a generated function's source in tracebacks; it lives as long as the function."""

    def __init__(self, source: str) -> None:
        self.source = source

    def get_source(self, _name: str) -> str:
        """The source, as linecache asks for it."""
        return self.source


def compile_function(source: str, names: dict[str, Any], title: str) -> Callable[..., Any]:
    """Make a function called forward of its source."""
    scope = {"__name__": "rblock_fx.generated", "__loader__": _Source(source), **names}
    exec(compile(source, f"rblock_fx: {title}", "exec"), scope)
    function: Callable[..., Any] = scope["forward"]
    return function


def generate(graph: fx.Graph, comments: dict[str, str]) -> TrainingForward:
    """Write a graph as Python.

    Args:
        graph: the graph.
        comments: comments to put behind the lines of nodes, by the names of the nodes.

    Raises:
        ConversionError: the name of a module is not one that Python code can use as it is.
    """
    for node in graph.nodes:
        for name in str(node.target).split(".") if node.op in ("call_module", "get_attr") else ():
            if name.isidentifier() and (keyword.iskeyword(name) or unicodedata.normalize("NFKC", name) != name):
                raise ConversionError(
                    f"the module name {name!r} (of {node.target!r}) cannot be written in Python code; rename it, e.g. "
                    "nn.ModuleDict({'inner': ...}) rather than 'in'"
                )
    code = graph.python_code("self")
    source = code.src
    for name, comment in comments.items():
        source = re.sub(rf"^(    {name} = .*)$", rf"\1  # {comment}", source, flags=re.MULTILINE)
    return TrainingForward(source, code.globals)


def identifier(path: str) -> str:
    """A name for generated code that is made of the path of a module."""
    name = re.sub(r"\W", "_", unicodedata.normalize("NFKC", path))
    return name if name.isidentifier() else f"site_{name}"


class Checkpoints:
    """Records which modules run under activation checkpointing while a forward is traced.

    Args:
        ancestors: the modules that are traced through, with their paths.

    Attributes:
        modules: the modules, each with the attribute of the model that switches it; None where it is always on.
    """

    def __init__(self, ancestors: Mapping[nn.Module, str]) -> None:
        self.modules: dict[str, str | None] = {}
        self._ancestors = ancestors
        self._around = list(ancestors)[:1]
        self._depth = 0

    def can_be_switched(self) -> bool:
        """Whether one of the modules that are traced through has the switch."""
        return any(CHECKPOINTING in vars(module) for module in self._ancestors)

    def note_call(self, path: str) -> None:
        """Record a call of a module that is not traced through."""
        if self._depth:
            switches = (module for module in reversed(self._around) if vars(module).get(CHECKPOINTING))
            switch = next((f"{self._ancestors[module]}.{CHECKPOINTING}".lstrip(".") for module in switches), None)
            self.modules[path] = switch

    @contextlib.contextmanager
    def inside(self, module: nn.Module) -> Iterator[None]:
        """Know the modules around the one that is called."""
        self._around += [module] if module in self._ancestors else []
        yield
        self._around = self._around[:-1] if module in self._ancestors else self._around

    @contextlib.contextmanager
    def noticed(self, enabled: bool) -> Iterator[None]:
        """Run checkpointed code directly and record it, with the switches of the modules traced through set."""
        original = torch.utils.checkpoint.checkpoint
        options = inspect.signature(original).parameters
        thread = threading.get_ident()

        def checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != thread:
                return original(function, *args, **kwargs)
            self._depth += 1
            try:
                return function(*args, **{name: kwargs[name] for name in kwargs if name not in options})
            finally:
                self._depth -= 1

        modules = (sys.modules.get(type(module).__module__) for module in self._ancestors)
        scopes = [vars(torch.utils.checkpoint), *(vars(module) for module in modules if module is not None)]
        names = [(scope, name) for scope in scopes for name, value in scope.items() if value is original]
        switches = {m: vars(m)[CHECKPOINTING] for m in self._ancestors if CHECKPOINTING in vars(m)}
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


def checkpoint_modules(graph: fx.Graph, checkpointed: Mapping[str, str | None], replica: nn.Module) -> None:
    """Call each module of a graph that may be checkpointed through `run_checkpointed`, in place."""
    switches: dict[str, fx.Node] = {}
    for node in [node for node in graph.nodes if node.op == "call_module"]:
        inside = {path: _relative(path, node.target) for path in checkpointed}
        parts = tuple(part for part in inside.values() if part is not None)
        if not parts:
            continue
        if not _runs_in_sequence(replica.get_submodule(node.target), parts):
            parts = ("",)
        switch = next(checkpointed[path] for path, part in inside.items() if part is not None)
        with graph.inserting_before(node):
            module = graph.create_node("get_attr", node.target, name=f"{node.name}_module")
            if switch is not None and switch not in switches:
                switches[switch] = graph.get_attr(switch)
        enabled = True if switch is None else switches[switch]
        node.op, node.target = "call_function", run_checkpointed
        node.args = (module, parts, enabled, *node.args)


def run_checkpointed(module: nn.Module, parts: tuple[str, ...], enabled: bool, *args: Any, **kwargs: Any) -> Any:
    """Call a module, or where `enabled` its parts in sequence, the named ones under activation checkpointing.

    Args:
        module: the module; unless it is itself the part (""), a sequence of modules.
        parts: paths inside the module.
        enabled: whether checkpointing is on.
        args: the module's arguments.
        kwargs: the module's keyword arguments.
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
