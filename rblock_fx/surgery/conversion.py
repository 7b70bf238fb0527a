"""A conversion as data: its masks, its training forwards, and everything that these take for granted."""

import collections
import dataclasses
import enum
import functools
import inspect
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from rblock_fx.errors import ConversionError
from rblock_fx.masks.mask import Mask
from rblock_fx.network.replica import Shape
from rblock_fx.network.stages import Site
from rblock_fx.surgery.code import TrainingForward

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.memory_format, enum.Enum)
FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, type)
_SEQUENCES = (list, tuple, set, frozenset, collections.deque)
_DEPTH, _ITEMS = 8, 10_000

CHILDREN = "_modules"
MODES: dict[Any, Callable[[], Any]] = {
    torch.is_grad_enabled: torch.is_grad_enabled,
    torch.is_inference_mode_enabled: torch.is_inference_mode_enabled,
    torch.is_autocast_enabled: lambda: (torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")),
    torch.is_autocast_cpu_enabled: lambda: torch.is_autocast_enabled("cpu"),
    torch.get_autocast_dtype: lambda: (torch.get_autocast_dtype("cpu"), torch.get_autocast_dtype("cuda")),
    torch.get_default_dtype: torch.get_default_dtype,
}


class Missing(enum.Enum):
    """The value of an attribute that does not exist."""

    ATTRIBUTE = "no attribute"


def snapshot(value: Any, depth: int = _DEPTH, exact: bool = False) -> Any:
    """The plain numbers, names and functions inside a value, as data that compares and pickles.

    Tensors and modules count by their type: the generated forward reads them from the model each time. If `exact`, they
    count by their identity and version, which shows that something was written into.
    """
    if isinstance(value, _PLAIN):
        return type(value), value if value == value else "nan"
    if isinstance(value, types.MethodType):
        return snapshot(value.__func__)
    if isinstance(value, FUNCTIONS):
        return getattr(*value.rblock_source) if hasattr(value, "rblock_source") else inspect.unwrap(value)
    if depth == 0 or isinstance(value, Tensor | nn.Module | fx.Proxy):
        return (id(value), value._version if isinstance(value, Tensor) else 0) if exact else type(value)
    if isinstance(value, Mapping):
        items = list(value.items())[:_ITEMS]
        return type(value), len(value), [(snapshot(key), snapshot(item, depth - 1, exact)) for key, item in items]
    if isinstance(value, _SEQUENCES):
        items = sorted(value, key=repr) if isinstance(value, set | frozenset) else list(value)[:_ITEMS]
        return type(value), len(value), [snapshot(item, depth - 1, exact) for item in items]
    if isinstance(value, functools.partial):
        return snapshot(value.func), snapshot((value.args, value.keywords), depth - 1, exact)
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        return type(value), snapshot(value.tolist(), depth - 1)
    if type(value).__module__.split(".")[0] not in {*sys.stdlib_module_names, "torch"} - {"types", "argparse"}:
        slots = [name for kind in type(value).__mro__ for name in vars(kind).get("__slots__", ()) if name[:2] != "__"]
        fields = {name: getattr(value, name, None) for name in slots} | getattr(value, "__dict__", {})
        return type(value), snapshot(fields, depth, exact)
    return type(value)


@dataclasses.dataclass(frozen=True)
class Setting:
    """A plain value that the traced forward read.

    Attributes:
        owner: path of the module that has the attribute; for a global name, the name of its Python module.
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
            value: Any = sys.modules.get(self.owner)
            for name in self.name.split("."):
                value = getattr(value, name, Missing.ATTRIBUTE)
            return snapshot(value)
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
            kind: Any = type(module)
            # Tools patch the forward of the whole model (Accelerate); theirs calls the class's.
            present = forward_of(module) if path else snapshot(kind._rblock_original.forward)
            if present is not forward:
                raise _changed(path or type(module).__name__, "has another forward")
            if path:
                refuse_hooks(module, path)
        for setting in self.settings:
            if setting.read(model) != setting.expected:
                raise _changed(setting.label, "has changed")
        for name, value in self.modes:
            if MODES[getattr(torch, name)]() != value:
                raise ConversionError(
                    f"the forward reads torch.{name}(), which was {value} at the conversion and has changed; convert "
                    "in the context in which you train: with torch.autocast('cpu'): apply_rblock(model)"
                )


def forward_of(module: nn.Module) -> Any:
    """The function that a call of the module runs, without a conversion's."""
    return snapshot(vars(module).get("forward", type(module).forward))


def refuse_hooks(module: nn.Module, path: str) -> None:
    """Refuse hooks on a module around a site: the training forward contains its code and does not call it.

    Raises:
        ConversionError: naming the module.
    """
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        raise ConversionError(
            f"{path!r} has hooks that would not run in train mode, because a site lies inside it; hook (for FSDP2: "
            f"shard) the modules inside it or the model, or choose it as the site: apply_rblock(model, [{path!r}])"
        )


def _changed(label: str, how: str) -> ConversionError:
    return ConversionError(
        f"{label!r} {how} since the training forward was traced; set it back, or convert again: "
        "apply_rblock(remove_rblock(model), ...)"
    )


@dataclasses.dataclass(frozen=True)
class Generated:
    """The training forwards of one method of a model.

    Attributes:
        clean: without activation checkpointing.
        checkpointing: with it; None where the model has none.
        switches: the attributes of the model that switch it; empty where it is always on.
    """

    clean: TrainingForward
    checkpointing: TrainingForward | None
    switches: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What apply_rblock was asked for and did.

    Attributes:
        method: name of the method.
        calibration: how gamma follows from the drop probability.
        batch_norm: "joint" or "per_submodel".
        input_size: shape of one sample.
        masks: each site, in forward order, with the names of its masks under `model.rblock`.
        order: for each of them, its place in the user's order.
        forwards: the generated training forwards by the name of the method: "forward", often "forward_features".
        maskless: the methods that the forward calls before its last mask, which have no training forward.
        specialised: the optional arguments of the forward, with the defaults that the graph takes for granted.
        guards: everything else that it takes for granted.
        halved: the modules that run on each half of the batch: batch norms with "per_submodel", and layers other than
            batch norm that relate the samples of a batch.
        early_fork_reason: why the batch doubles at the input; None where it doubles at the first mask.
        cost: FLOPs of the training forward over those of the plain one.
    """

    method: str
    calibration: str
    batch_norm: str
    input_size: Shape
    masks: tuple[tuple[Site, tuple[str, ...]], ...]
    order: tuple[int, ...]
    forwards: Mapping[str, Generated]
    maskless: tuple[str, ...]
    specialised: Mapping[str, Any]
    guards: Guards
    halved: tuple[str, ...]
    early_fork_reason: str | None
    cost: float


class RBlock(nn.Module):
    """The masks of a converted model: no parameters, no persistent buffers."""

    conversion: Conversion

    def masks_of(self, position: int) -> list[Mask]:
        """The masks of one site, numbered in forward order, in the order of their calls."""
        names = self.conversion.masks[position][1]
        return [mask for name in names if isinstance(mask := self.get_submodule(name), Mask)]

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the masks alone, with the arguments of torch.compile; the network around them stays eager.

        Masks of one shape share a graph, and a change of drop_prob keeps it. A compiled mask reads its map once.
        """
        for mask in self.children():
            mask.compile(*args, **kwargs)

    def extra_repr(self) -> str:
        """The settings that all masks share."""
        return f"method={self.conversion.method!r}, batch_norm={self.conversion.batch_norm!r}"
