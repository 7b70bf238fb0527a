"""What a converted model is: its masks under `model.rblock`, its generated training forward, its class."""

import dataclasses
import inspect
import itertools
import linecache
import types
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rblock_fx.errors import ConversionError
from rblock_fx.guards import refuse_changed_settings, refuse_hooks, refuse_replaced_batch_norms
from rblock_fx.masks.methods import Mask
from rblock_fx.stages import Site
from rblock_fx.swap import SwappedClass
from rblock_fx.watch import Setting

_numbers = itertools.count()


@dataclasses.dataclass(frozen=True)
class TrainingForward:
    """The generated forward(self, ...), in which self is the original model.

    Attributes:
        source: Python source.
        names: the global names that it uses.
        specialised: the optional arguments of the original forward, and the values that the graph was traced with.
    """

    source: str
    names: dict[str, Any]
    specialised: dict[str, Any]

    def compile(self, owner: str) -> Callable[..., Any]:
        """Make the function; its source shows in tracebacks and under inspect.getsource."""
        return _compile_function(self.source, self.names, f"training forward of {owner}")

    def __getstate__(self) -> dict[str, Any]:
        """Python modules cannot be pickled; their names can."""
        names = {
            key: _ModuleName(value.__name__) if isinstance(value, types.ModuleType) else value
            for key, value in self.names.items()
        }
        return {"source": self.source, "names": names, "specialised": self.specialised}

    def __setstate__(self, state: dict[str, Any]) -> None:
        names = {
            key: __import__(value.name, fromlist=["_"]) if isinstance(value, _ModuleName) else value
            for key, value in state["names"].items()
        }
        self.__dict__.update(state, names=names)


@dataclasses.dataclass(frozen=True)
class _ModuleName:
    name: str


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What apply_rblock was asked for and did.

    Attributes:
        method: name of the method.
        calibration: how gamma follows from the drop probability.
        batch_norm: "joint" or "per_submodel".
        input_size: shape of one sample.
        masks: each site, in forward order, with its masks: their names under `model.rblock`, and the place of the map
            in the list that the module gives (None where it gives one); several where it is called several times.
        order: for each of them, its place in the order in which the user named the sites.
        forward: the generated training forward.
        settings: the plain attributes that the generated forward takes for granted.
        inlined: the modules around the sites, which the generated forward contains instead of calling them.
        paired_batch_norms: the batch norms behind the fork.
        early_fork_reason: why the batch doubles at the input; None where it doubles at the first mask.
        cost: FLOPs of the training forward over those of the plain one.
    """

    method: str
    calibration: str
    batch_norm: str
    input_size: tuple[int, ...]
    masks: tuple[tuple[Site, dict[str, int | None]], ...]
    order: tuple[int, ...]
    forward: TrainingForward
    settings: tuple[Setting, ...]
    inlined: tuple[str, ...]
    paired_batch_norms: tuple[str, ...]
    early_fork_reason: str | None
    cost: float


class RBlock(nn.Module):
    """The masks of a converted model: no parameters, no persistent buffers, nothing in the state_dict."""

    conversion: Conversion

    def masks_of(self, position: int) -> list[Mask]:
        """The masks of one site, numbered in forward order."""
        return [
            mask for name in self.conversion.masks[position][1] if isinstance(mask := self.get_submodule(name), Mask)
        ]

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the masks alone, with the arguments of torch.compile; the network around them stays eager.

        Masks of one shape share a graph, and a change of drop_prob keeps it. A compiled mask reads its map once.
        """
        for mask in self.children():
            mask.compile(*args, **kwargs)

    def extra_repr(self) -> str:
        """What all masks share."""
        return f"method={self.conversion.method!r}, batch_norm={self.conversion.batch_norm!r}"


class RBlockModel(SwappedClass):
    """Mixin of a converted model: in train mode it runs the generated forward, in eval mode its own."""

    rblock: RBlock

    @classmethod
    def swapped_class(cls, module: nn.Module) -> type[nn.Module]:
        """A subclass of the model's own class, with its training forward."""
        original = type(module)
        if not isinstance(module.rblock, RBlock):
            raise TypeError("the masks must be in place before the class is swapped")
        generated = module.rblock.conversion.forward
        training_forward = generated.compile(original.__name__)
        forward = _switching_forward(original, training_forward, module.rblock.conversion)
        members = {
            "forward": forward,
            "training_forward": training_forward,
            "original_class": original,
            "__module__": original.__module__,
            "__doc__": original.__doc__,
        }
        if issubclass(original, nn.Sequential):
            members |= _sequence_without_masks()
        return type(f"RBlock{original.__name__}", (cls, original), members)


def _sequence_without_masks() -> dict[str, Callable[..., Any]]:
    """Keep the length, the layers and the slices of a sequence, of whose children the masks are the last."""

    def layers(self: nn.Module) -> dict[str, Any]:
        return {name: module for name, module in self._modules.items() if name != "rblock"}

    def getitem(self: nn.Module, index: Any) -> Any:
        # By way of nn.Sequential, since a subclass may be made of other things than layers.
        return nn.Sequential(OrderedDict(layers(self)))[index]

    def refuse(self: nn.Module, *_args: Any, **_kwargs: Any) -> Any:
        raise ConversionError(
            f"the layers of a converted {type(self).__name__.removeprefix('RBlock')} are part of its training forward; "
            "change them first: apply_rblock(remove_rblock(model).append(layer), ...)"
        )

    surgery = ("append", "extend", "insert", "pop", "__delitem__", "__iadd__", "__imul__")
    return {
        "__len__": lambda self: len(layers(self)),
        "__iter__": lambda self: iter(layers(self).values()),
        "__getitem__": getitem,
        **dict.fromkeys(surgery, refuse),
    }


def _switching_forward(
    original: type[nn.Module], training_forward: Callable[..., Any], conversion: Conversion
) -> Callable[..., Any]:
    """Make forward(self, ...) with the very parameters of the original, which runs the one or the other.

    It is written out because tools read a forward's parameters from its code (torch.fx), and take a function that names
    another as __wrapped__ for a wrapper to be peeled off (Accelerate's unwrap_model).
    """
    specialised = conversion.forward.specialised
    parameters = list(inspect.signature(original.forward).parameters.values())[1:]
    stars: dict[Any, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    defaults = {f"rblock_default_{p.name}": p.default for p in parameters if p.default is not p.empty}
    written = [
        stars.get(p.kind, "") + p.name + (f"=rblock_default_{p.name}" if f"rblock_default_{p.name}" in defaults else "")
        for p in parameters
    ]
    keyword_only = [index for index, p in enumerate(parameters) if p.kind is p.KEYWORD_ONLY]
    if keyword_only and not any(p.kind is p.VAR_POSITIONAL for p in parameters):
        written.insert(keyword_only[0], "*")
    passed = {p.name: stars.get(p.kind, f"{p.name}=" if p.kind is p.KEYWORD_ONLY else "") + p.name for p in parameters}
    traced = [argument for name, argument in passed.items() if name not in specialised]
    checked = ", ".join(["self", *(f"{name}={name}" for name in specialised)])
    source = (
        f"def forward({', '.join(['self', *written])}):\n"
        f"    if self.training:\n"
        f"        rblock_check({checked})\n"
        f"        return rblock_training_forward({', '.join(['self', *traced])})\n"
        f"    return rblock_original_forward({', '.join(['self', *passed.values()])})\n"
    )

    def check(model: nn.Module, **given: Any) -> None:
        refuse_hooks(model, conversion.inlined)
        refuse_changed_settings(model, conversion.settings)
        if conversion.batch_norm == "per_submodel":
            refuse_replaced_batch_norms(model, conversion.paired_batch_norms)
        for name, value in given.items():
            expected = specialised[name]
            if value is not expected and not (type(value) is type(expected) and value == expected):
                raise ConversionError(
                    f"{original.__name__} was converted with {name}={expected!r}, got {name} of type "
                    f"{type(value).__name__}; in train mode call model(images) without {name}, or remove_rblock(model)"
                )

    names = {
        "rblock_training_forward": training_forward,
        "rblock_original_forward": original.forward,
        "rblock_check": check,
    }
    forward = _compile_function(source, names | defaults, f"forward of RBlock{original.__name__}")
    forward.__doc__ = original.forward.__doc__
    forward.__annotations__ = dict(original.forward.__annotations__)
    return forward


def _compile_function(source: str, names: dict[str, Any], title: str) -> Callable[..., Any]:
    """Make a function called forward whose source shows in tracebacks and under inspect.getsource."""
    filename = f"<rblock_fx {next(_numbers)}: {title}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    scope = dict(names)
    exec(compile(source, filename, "exec"), scope)
    function: Callable[..., Any] = scope["forward"]
    return function


def find_converted(model: nn.Module, call: str) -> tuple[RBlockModel, RBlock]:
    """Find the converted model and its masks, also inside DistributedDataParallel, torch.compile and the like.

    Raises:
        ConversionError: there is none.
    """
    inner: Any = model
    while not isinstance(inner, RBlockModel):
        children = inner._modules if isinstance(inner, nn.Module) else {}
        inner = children.get("module", children.get("_orig_mod"))
        if inner is None:
            raise ConversionError(
                f"{call}: {type(model).__name__} is not converted; expected a model that went through "
                "apply_rblock: model = apply_rblock(model, sites=['layer3', 'layer4'])"
            )
    return inner, inner.rblock


def device_of(model: nn.Module) -> torch.device:
    """Where a model's first parameter or buffer lies."""
    first: Tensor | None = next(itertools.chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if first is None else first.device
