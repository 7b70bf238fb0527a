"""Everything that a traced forward takes for granted: recorded while tracing, checked in every training forward."""

import collections
import dataclasses
import enum
import functools
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from rblock_fx.errors import ConversionError

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.memory_format, enum.Enum)
FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, type)
_SEQUENCES = (list, tuple, set, frozenset, collections.deque)
_DEPTH, _ITEMS = 4, 1000

CHILDREN = "_modules"
MODES: dict[Any, Callable[[], Any]] = {
    torch.is_grad_enabled: torch.is_grad_enabled,
    torch.is_inference_mode_enabled: torch.is_inference_mode_enabled,
    torch.is_autocast_enabled: lambda: (torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")),
}


class Missing(enum.Enum):
    """The value of an attribute that does not exist."""

    ATTRIBUTE = "no attribute"


def snapshot(value: Any, depth: int = _DEPTH) -> Any:
    """The plain numbers, names and functions inside a value, as data that compares and pickles.

    Tensors and modules count by their type: the generated forward reads them from the model each time.
    """
    if isinstance(value, _PLAIN):
        return type(value), value if value == value else "nan"  # noqa: PLR0124
    if isinstance(value, FUNCTIONS):
        return value
    if isinstance(value, types.MethodType):
        return getattr(value.__func__, "__wrapped__", value.__func__)
    if depth == 0 or isinstance(value, Tensor | nn.Module | fx.Proxy):
        return type(value)
    if isinstance(value, Mapping):
        items = list(value.items())[:_ITEMS]
        return type(value), len(value), [(snapshot(key), snapshot(item, depth - 1)) for key, item in items]
    if isinstance(value, _SEQUENCES):
        items = sorted(value, key=repr) if isinstance(value, set | frozenset) else list(value)[:_ITEMS]
        return type(value), len(value), [snapshot(item, depth - 1) for item in items]
    if isinstance(value, functools.partial):
        return value.func, snapshot((value.args, value.keywords), depth - 1)
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        return type(value), snapshot(value.tolist(), depth - 1)
    source = type(value).__module__.split(".")[0]
    if hasattr(value, "__dict__") and (source not in {*sys.stdlib_module_names, "torch"} or source == "types"):
        return type(value), snapshot(vars(value), depth)
    return type(value)


@dataclasses.dataclass(frozen=True)
class Setting:
    """A plain value that the traced forward read.

    Attributes:
        owner: path of the module of which it is an attribute; the name of a Python module for a global name.
        name: the attribute or the global name.
        expected: its snapshot.
        is_global: whether it is a global name.
    """

    owner: str
    name: str
    expected: Any
    is_global: bool = False

    @property
    def label(self) -> str:
        """The setting as seen from the model."""
        name = "layers" if self.name == CHILDREN else self.name
        return f"{self.owner}.{name}" if self.owner and not self.is_global else name

    def read(self, model: nn.Module) -> Any:
        """The snapshot of its present value."""
        if self.is_global:
            return snapshot(getattr(sys.modules.get(self.owner), self.name, Missing.ATTRIBUTE))
        module = model.get_submodule(self.owner)
        if self.name == CHILDREN:
            return tuple(module._modules)
        return snapshot(getattr(module, self.name, Missing.ATTRIBUTE))


@dataclasses.dataclass(frozen=True)
class Guards:
    """Everything that one traced forward takes for granted.

    Attributes:
        settings: plain attributes of modules, names of children that it looped over, global names.
        modes: the switches of torch that it asked for (is_grad_enabled, ...), by name, with their values.
        inlined: the modules around the sites, whose code the forward contains, with their forward functions.
    """

    settings: tuple[Setting, ...]
    modes: tuple[tuple[str, Any], ...]
    inlined: Mapping[str, Any]

    def check(self, model: nn.Module) -> None:
        """Compare with the model as it is now.

        Raises:
            ConversionError: something has changed since the conversion.
        """
        for path, forward in self.inlined.items():
            try:
                module = model.get_submodule(path)
            except AttributeError:
                raise _changed(path, "is missing") from None
            if forward_of(module) is not forward:
                raise _changed(path, "has another forward")
            refuse_hooks(module, path)
        for setting in self.settings:
            if setting.read(model) != setting.expected:
                raise _changed(setting.label, "has changed")
        for name, value in self.modes:
            if MODES[getattr(torch, name)]() != value:
                raise ConversionError(
                    f"the forward reads torch.{name}(), which was {value} at the conversion and has changed; convert in "
                    "the context in which you train: with torch.autocast('cpu'): apply_rblock(model)"
                )


def forward_of(module: nn.Module) -> Any:
    """The function that a call of the module runs."""
    own = vars(module).get("forward", type(module).forward)
    return getattr(getattr(own, "__func__", own), "__wrapped__", getattr(own, "__func__", own))


def refuse_hooks(module: nn.Module, path: str) -> None:
    """Refuse hooks on a module around a site: the training forward contains its code and does not call it.

    Raises:
        ConversionError: naming the module.
    """
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        raise ConversionError(
            f"{path!r} has hooks that would not run in train mode, because a site lies inside it; hook (for FSDP2: "
            f"shard) the modules inside it or the whole model, or choose it as the site: apply_rblock(model, [{path!r}])"
        )


def _changed(label: str, how: str) -> ConversionError:
    return ConversionError(
        f"{label!r} {how} since the training forward was traced; set it back, or convert again: "
        "apply_rblock(remove_rblock(model), ...)"
    )
