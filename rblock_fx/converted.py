"""A converted model: the class that its training forward and its masks live in."""

import copy
import functools
import inspect
import sys
import textwrap
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from rblock_fx.errors import ConversionError
from rblock_fx.masks.methods import METHODS
from rblock_fx.surgery.code import compile_function
from rblock_fx.surgery.conversion import Conversion, Generated, RBlock
from rblock_fx.surgery.trace import MASKS
from rblock_fx.swap import Swapped, guarded_methods, plain_slices, refuse_replaced, restore_class, unmasked


class RBlockModel(Swapped):
    """Mixin of a converted model: in train mode it runs the generated forward, in eval mode its own."""

    rblock: RBlock

    @classmethod
    def _rblock_class(cls, module: nn.Module) -> Any:
        """A subclass of the model's own class, with its training forward."""
        original: Any = type(module)
        conversion: Conversion = vars(module)[MASKS].conversion
        members = guarded_methods(original)
        for name, generated in conversion.forwards.items():
            if name != "forward":
                members[name] = _switching_method(original, name, generated, conversion)
        members |= plain_slices(original) | {
            "forward": _switching_forward(original, conversion),
            "_rblock_original": original,
            "__module__": original.__module__,
            "__doc__": original.__doc__,
            "_apply": _apply_with_masks(original),
            "__repr__": _repr_with_masks(original),
            "__prepare_scriptable__": _scriptable,
        }
        return type(f"RBlock{original.__name__}", (cls, original), members)


def _apply_with_masks(original: Any) -> Callable[..., Any]:
    def _apply(self: Any, fn: Any, *args: Any, **kwargs: Any) -> Any:
        original._apply(self, fn, *args, **kwargs)
        vars(self)[MASKS]._apply(fn)
        return self

    return _apply


def _repr_with_masks(original: Any) -> Callable[..., str]:
    def __repr__(self: Any) -> str:  # noqa: N807
        lines = original.__repr__(self).splitlines()
        masks = textwrap.indent(f"({MASKS}): {vars(self)[MASKS]!r}", "  ")
        return "\n".join([*lines[:-1], masks, lines[-1]] if len(lines) > 1 else [*lines, masks])

    return __repr__


def _scriptable(self: Any) -> nn.Module:
    """torch.jit.script asks for the module to script: the plain network, since a script cannot hold the masks."""
    if self.training:
        raise ConversionError(
            "torch.jit.script of a converted model in train mode would train without masks; script the plain network "
            "for inference: torch.jit.script(model.eval())"
        )
    plain: nn.Module = copy.deepcopy(self)
    vars(plain).pop("forward", None)  # that of a tool
    del vars(plain)[MASKS]
    for module in plain.modules():
        restore_class(module)
    return plain


def _switching_forward(original: Any, conversion: Conversion) -> Callable[..., Any]:
    """Make forward(self, ...) with the parameters of the original, which runs the one or the other.

    It is written as source because tools read a forward's parameters from its code (torch.fx), and unwrap a function
    that has a __wrapped__ (Accelerate's unwrap_model).
    """
    specialised = conversion.specialised
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
    given = ", ".join([f"{name}={name}" for name in specialised])
    images = next((p.name for p in parameters if p.kind not in stars), "None")
    source = (
        f"def forward({', '.join(['self', *written])}):\n"
        f"    if self.training:\n"
        f"        rblock_check(self, {images}, dict({given}))\n"
        f"        return rblock_training_forward({', '.join(['self', *traced])})\n"
        f"    return rblock_original.forward({', '.join(['self', *passed.values()])})\n"
    )
    names = {
        "rblock_training_forward": _training_forward(original, conversion.forwards["forward"]),
        "rblock_original": original,
        "rblock_check": functools.partial(_check, conversion),
    }
    forward = compile_function(source, names | defaults, f"forward of RBlock{original.__name__}")
    forward.rblock_source = (original, "forward")  # type: ignore[attr-defined]
    forward.__doc__ = original.forward.__doc__
    forward.__annotations__ = dict(original.forward.__annotations__)
    return forward


def _switching_method(original: Any, name: str, generated: Generated, conversion: Conversion) -> Callable[..., Any]:
    """A method that takes the images, as forward_features: in train mode the generated one."""
    training_forward = _training_forward(getattr(original, name), generated)

    @functools.wraps(getattr(original, name))
    def method(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.training:
            return getattr(original, name)(self, x, *args, **kwargs)
        if args or kwargs:
            raise unmasked(self, f"{name} with more arguments than the images")
        _check(conversion, self, x, {})
        return training_forward(self, x)

    method.rblock_source = (original, name)  # type: ignore[attr-defined]
    return method


def _training_forward(original: Any, generated: Generated) -> Callable[..., Any]:
    """The generated forward; the one with checkpointing where the model's switch is on."""
    clean = generated.clean.compile(original.__name__)
    if generated.checkpointing is None:
        return clean
    checkpointing = generated.checkpointing.compile(f"{original.__name__} with activation checkpointing")
    switches = [switch.rpartition(".") for switch in generated.switches]

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        is_on = not switches or any(getattr(self.get_submodule(path), name) for path, _, name in switches)
        return (checkpointing if is_on else clean)(self, *args, **kwargs)

    return forward


def _check(conversion: Conversion, model: Any, images: Any, given: dict[str, Any]) -> None:
    """Refuse a training forward that would not be the network's, or whose rows would be misread."""
    name = model._rblock_original.__name__
    if isinstance(images, fx.Proxy):
        raise ConversionError(
            f"torch.fx cannot trace the converted {name} in train mode; trace the plain network, e.g. "
            "create_feature_extractor(remove_rblock(copy.deepcopy(model)), ...)"
        )
    if getattr(model, "_is_replica", False):
        raise ConversionError(
            f"{name} is converted and runs inside nn.DataParallel, which would gather the rows of the sub-models in "
            "the wrong order; use one process per GPU: DistributedDataParallel(apply_rblock(model))"
        )
    if METHODS[conversion.method].parts == 2 and not torch.compiler.is_compiling():
        _refuse_detector(name)
    conversion.guards.check(model)
    refuse_replaced(model, conversion.halved)
    for argument, value in given.items():
        expected = conversion.specialised[argument]
        if value is not expected and not (type(value) is type(expected) and value == expected):
            raise ConversionError(
                f"{name} was converted with {argument}={expected!r}, got {argument} of type {type(value).__name__}; "
                f"in train mode call model(images) without it. If {argument} has a row for each image, its rows must "
                "be doubled: convert the part that takes the images alone, and pass torch.cat([rows, rows])"
            )


def _refuse_detector(name: str) -> None:
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        if str(frame.f_globals.get("__name__", "")).startswith("torchvision.models.detection"):
            raise ConversionError(
                f"{name} is converted and runs inside a torchvision detector, which has N targets for the 2N rows of "
                "the sub-models; use a method that does not double the batch: method='dropblock'"
            )
        frame = frame.f_back


def find_converted(model: nn.Module, call: str) -> tuple[Any, RBlock]:
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
                f"{call}: {type(model).__name__} is not converted; expected a model from apply_rblock: "
                "model = apply_rblock(model, sites=['layer3', 'layer4'])"
            )
    return inner, vars(inner)[MASKS]
