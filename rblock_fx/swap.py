"""Modules whose class is replaced at run time by a subclass: how, and which layers of a converted model."""

import copy
import functools
import types
from collections import OrderedDict
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from rblock_fx.errors import ConversionError
from rblock_fx.surgery.trace import MASKS

# The converted model, in the attributes of the modules around its sites.
OWNER = "_rblock_owner"


class Swapped:
    """Mixin of a module whose class was replaced by a subclass made at run time, so that copies and pickles have it.

    A class made at run time cannot be imported, so pickle stores the original class and makes the subclass again. All
    names start with `_rblock`: the others belong to the model.
    """

    _rblock_original: ClassVar[Any]

    @classmethod
    def _rblock_class(cls, module: nn.Module) -> Any:
        """Make the class for a module."""
        raise NotImplementedError

    def __copy__(self) -> Any:
        duplicate = object.__new__(self.__class__)
        duplicate.__dict__.update(self.__dict__)
        return duplicate

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        duplicate = object.__new__(self.__class__)
        memo[id(self)] = duplicate
        duplicate.__dict__.update({name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()})
        return duplicate

    def __reduce_ex__(self, protocol: Any) -> Any:
        mixin = next(base for base in type(self).__mro__ if Swapped in base.__bases__)
        return _blank, (self._rblock_original,), self.__dict__.copy(), None, None, functools.partial(_restore, mixin)


def _blank(original: Any) -> Any:
    return object.__new__(original)


def _restore(mixin: type[Swapped], module: nn.Module, state: dict[str, Any]) -> None:
    module.__setstate__(state)  # type: ignore[no-untyped-call]
    object.__setattr__(module, "__class__", mixin._rblock_class(module))


def swap_classes(swaps: list[tuple[nn.Module, type[Swapped], str]]) -> None:
    """Replace the class of every module, or of none.

    Args:
        swaps: modules with the mixin that each gets, and its path.

    Raises:
        ConversionError: naming a module whose class refuses it.
    """
    before = [(module, type(module)) for module, _, _ in swaps]
    for module, mixin, path in swaps:
        try:
            object.__setattr__(module, "__class__", mixin._rblock_class(module))
        except Exception as error:
            for changed, original in before:
                object.__setattr__(changed, "__class__", original)
            raise ConversionError(
                f"{path or 'the model'!r} is a {type(module).__name__}, which cannot be subclassed "
                f"({type(error).__name__}: {error}); wrap it in a module whose forward calls it, or use "
                "batch_norm='joint' for a batch norm"
            ) from error


def restore_class(module: nn.Module) -> None:
    """Give a module its own class again; a subclass that another tool made since (a parametrization) stays."""
    vars(module).pop(OWNER, None)
    swapped: Any = next((kind for kind in type(module).__mro__ if "_rblock_original" in vars(kind)), None)

    def without_swap(kind: Any) -> Any:
        if kind is swapped:
            return kind._rblock_original
        if not issubclass(kind, swapped):
            return kind
        members = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
        return type(kind.__name__, tuple(map(without_swap, kind.__bases__)), members)

    if swapped is not None:
        object.__setattr__(module, "__class__", without_swap(type(module)))


class Inlined(Swapped):
    """Mixin of a module around a site: the training forward contains its code, so nobody else may call it then."""

    @classmethod
    def _rblock_class(cls, module: nn.Module) -> Any:
        kind: Any = type(module)
        return _inlined_class(kind)


@functools.cache
def _inlined_class(original: Any) -> Any:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.training and self._rblock_owner.training:
            raise unmasked(self._rblock_owner, f"{original.__name__}, a module around a site,")
        return original.forward(self, *args, **kwargs)

    forward.rblock_source = (original, "forward")  # type: ignore[attr-defined]
    members = {"forward": forward, "_rblock_original": original, "__module__": original.__module__}
    return type(original.__name__, (Inlined, original), guarded_methods(original) | plain_slices(original) | members)


def guarded_methods(original: Any) -> dict[str, Any]:
    """The methods of a class, which in train mode must not run a site without its mask."""
    names = {
        name: None
        for kind in original.__mro__
        for name, function in vars(kind).items()
        if isinstance(function, types.FunctionType) and name[:2] != "__" and kind.__module__.split(".")[0] != "torch"
    }
    return {name: _guarded(original, name) for name in names}


def _guarded(original: Any, name: str) -> Any:
    @functools.wraps(getattr(original, name))
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        function = getattr(original, name)  # the class may have been patched since
        owner = vars(self).get(OWNER, self)
        if not self.training or not owner.training or MASKS not in vars(owner):
            return function(self, *args, **kwargs)
        conversion = vars(owner)[MASKS].conversion
        if name != "forward_head" and name in conversion.maskless:
            raise unmasked(owner, f"{name}, which runs before the last mask,")
        if torch.compiler.is_compiling():  # hooks cannot be registered while compiling
            if "forward" in name:
                raise unmasked(owner, name)
            return function(self, *args, **kwargs)

        def refuse(_module: nn.Module, _inputs: Any) -> None:
            raise unmasked(owner, f"{name}, which runs a site,")

        handles = [owner.get_submodule(site.path).register_forward_pre_hook(refuse) for site, _ in conversion.masks]
        try:
            return function(self, *args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()

    method.rblock_source = (original, name)  # type: ignore[attr-defined]
    return method


def plain_slices(original: Any) -> dict[str, Any]:
    """Members of a subclass of a container whose slices are containers of their own class, without the conversion."""

    def getitem(self: Any, index: Any) -> Any:
        if not isinstance(index, slice):
            return original.__getitem__(self, index)
        if issubclass(original, nn.ModuleList):
            return nn.ModuleList(list(self._modules.values())[index])
        return nn.Sequential(OrderedDict(list(self._modules.items())[index]))

    return {"__getitem__": getitem} if issubclass(original, nn.Sequential | nn.ModuleList) else {}


def unmasked(model: nn.Module, what: str) -> ConversionError:
    """The error for a call that would run a site without its mask."""
    name = getattr(type(model), "_rblock_original", type(model)).__name__
    return ConversionError(
        f"{what} of the converted {name} was called in train mode outside the training forward, where it would run "
        "without masks; call model(images), or call model.eval() first, or convert the part alone: "
        "apply_rblock(remove_rblock(model).part)"
    )


class Halved(Swapped):
    """Mixin of a module behind the fork that runs on each half of the batch in train mode.

    Batch norms with batch_norm="per_submodel" are such modules, and layers that relate the samples of a batch (timm's
    SplitBatchNorm2d). Running statistics are updated by sub-model 1, then by sub-model 2. Frozen by .eval(), and in
    eval mode, it is the layer that it was.
    """

    @classmethod
    def _rblock_class(cls, module: nn.Module) -> Any:
        kind: Any = type(module)
        return _halved_class(kind)


@functools.cache
def _halved_class(original: Any) -> Any:
    # The parameters are the layer's own: torch calls its map `input`, timm `x`, and users may add conditions.
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        if not self.training:
            return original.forward(self, *args, **kwargs)  # type: ignore[no-any-return]
        halves = (_half((args, kwargs), submodel) for submodel in (0, 1))
        return torch.cat([original.forward(self, *half_args, **half_kwargs) for half_args, half_kwargs in halves])

    members = {"forward": forward, "_rblock_original": original, "__module__": original.__module__}
    return type(f"PerSubmodel{original.__name__}", (Halved, original), members)


def _half(arguments: Any, submodel: int) -> Any:
    """The rows of one sub-model, 0 or 1, of every tensor among a layer's arguments."""
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.chunk(2)[submodel], arguments)


def refuse_replaced(model: nn.Module, paths: tuple[str, ...]) -> None:
    """Refuse to train with joint statistics where those of each sub-model were asked for.

    Raises:
        ConversionError: naming the first layer that was replaced, as a conversion to SyncBatchNorm does.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    for path in paths:
        layer = modules.get(path)
        # A frozen layer, of another class, has no statistics to lose.
        if layer is None or (isinstance(layer, _BatchNorm) and not isinstance(layer, Halved)):
            kind = "missing" if layer is None else f"a {type(layer).__name__}"
            raise ConversionError(
                f"the layer {path!r} ran on each sub-model alone and is {kind} now; change layers before the "
                "conversion: apply_rblock(convert_sync_batchnorm(model), batch_norm='per_submodel')"
            )
