"""From a graph to Python: the generated training forwards."""

import dataclasses
import importlib
import keyword
import operator
import re
import types
import unicodedata
from collections.abc import Callable, Collection
from typing import Any

from torch import Tensor, fx, nn

from rblock_fx.errors import ConversionError

# fx frees each value behind its last use, on the same line; the source that people read leaves that out.
_RELEASE = re.compile(r";  (\w+ = )+None(?=\s*(#.*)?$)", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class TrainingForward:
    """A generated forward(self, x), in which self is the original model.

    Attributes:
        source: Python source.
        names: the global names that it uses.
    """

    source: str
    names: dict[str, Any]

    @property
    def readable(self) -> str:
        """The source without the statements that free memory."""
        return _RELEASE.sub("", self.source)

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


def identifier(path: str) -> str:
    """A name for generated code that is made of the path of a module."""
    name = re.sub(r"\W", "_", unicodedata.normalize("NFKC", path))
    return name if name.isidentifier() else f"site_{name}"
