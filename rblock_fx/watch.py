"""What a forward does besides computing while it is traced, which the generated forward would not do or not notice."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from rblock_fx.replica import CHECKPOINTING

_PLAIN = (bool, int, float, str, tuple, type(None), torch.dtype, torch.device)
_OF_EVERY_MODULE = set(vars(nn.Module())) - {"training"}


@dataclasses.dataclass(frozen=True)
class Setting:
    """A plain attribute of a module that its forward read, and so took for granted."""

    path: str
    name: str
    value: Any

    def holds(self, model: nn.Module) -> bool:
        """Whether the attribute still has its value."""
        present = vars(model.get_submodule(self.path)).get(self.name, _OF_EVERY_MODULE)
        return present is self.value or (type(present) is type(self.value) and bool(present == self.value))

    @property
    def label(self) -> str:
        """The attribute as seen from the model."""
        return f"{self.path}.{self.name}" if self.path else self.name


@contextlib.contextmanager
def attributes_watched(modules: Mapping[nn.Module, str]) -> Iterator[dict[tuple[str, str], Setting]]:
    """Collect the plain attributes that are read of modules (with their paths) while the context is open.

    Raises:
        RuntimeError: an attribute is assigned.
    """
    read: dict[tuple[str, str], Setting] = {}
    classes = {module: type(module) for module in modules}
    for module, path in modules.items():
        module.__class__ = _watched_class(classes[module], path, read)
    try:
        yield read
    finally:
        for module, original in classes.items():
            object.__setattr__(module, "__class__", original)


def _watched_class(original: Any, path: str, read: dict[tuple[str, str], Setting]) -> Any:
    def getattribute(self: nn.Module, name: str) -> Any:
        value = original.__getattribute__(self, name)
        own = name in original.__getattribute__(self, "__dict__") and name not in _OF_EVERY_MODULE
        if own and isinstance(value, _PLAIN) and name != CHECKPOINTING:
            read[path, name] = Setting(path, name, value)
        return value

    def setattribute(self: nn.Module, name: str, value: Any) -> None:
        if not name.startswith("_tensor_constant"):  # fx keeps those there
            where = f"{path}.{name}" if path else name
            raise RuntimeError(f"it assigns {where!r}, which the generated training forward would not do")
        original.__setattr__(self, name, value)

    return type(original.__name__, (original,), {"__getattribute__": getattribute, "__setattr__": setattribute})
