"""Changing the class of a module in place, so that its copies and pickles are changed alike."""

import copy
import functools
from typing import Any, ClassVar

from torch import nn


class SwappedClass:
    """Mixin of a module whose class was exchanged for a subclass made at run time.

    A class made at run time has no importable name, so pickle is given the original class and how to swap it again.
    """

    original_class: ClassVar[type[nn.Module]]

    @classmethod
    def swapped_class(cls, module: nn.Module) -> type[nn.Module]:
        """Make the class that `module` gets."""
        raise NotImplementedError

    @classmethod
    def swap(cls, module: nn.Module) -> None:
        """Exchange the class of `module`."""
        module.__class__ = cls.swapped_class(module)

    def __copy__(self) -> Any:
        duplicate = self.__class__.__new__(self.__class__)
        duplicate.__dict__.update(self.__dict__)
        return duplicate

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        duplicate = self.__class__.__new__(self.__class__)
        memo[id(self)] = duplicate
        duplicate.__dict__.update({name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()})
        return duplicate

    def __reduce_ex__(self, protocol: Any) -> Any:
        mixin = next(base for base in type(self).__bases__ if issubclass(base, SwappedClass))
        restore = functools.partial(_restore, mixin)
        return _blank, (self.original_class,), self.__dict__.copy(), None, None, restore


def _blank(original_class: type[nn.Module]) -> nn.Module:
    return original_class.__new__(original_class)


def _restore(mixin: type[SwappedClass], module: nn.Module, state: dict[str, Any]) -> None:
    module.__setstate__(state)  # type: ignore[no-untyped-call]
    mixin.swap(module)


def unswap(module: nn.Module) -> None:
    """Give a module its own class again."""
    changed: Any = module
    if isinstance(module, SwappedClass):
        changed.__class__ = module.original_class
