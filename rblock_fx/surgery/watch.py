"""Watch a forward while it is traced: the settings that it reads, and the values that it writes."""

import contextlib
import dis
import functools
import gc
import random
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from rblock_fx.network.replica import CHECKPOINTING
from rblock_fx.surgery.conversion import CHILDREN, FUNCTIONS, MODES, Missing, Setting, snapshot

_LIBRARIES = {"torch", "rblock_fx", *sys.stdlib_module_names}
_NOT_VARIABLES = (types.ModuleType, nn.Module, Missing, *FUNCTIONS)
_DESCRIPTORS = (property, classmethod, staticmethod, functools.cached_property)
_OF_EVERY_MODULE = set(vars(nn.Module())) - {"training", CHILDREN}
_SKIPPED = {"__class__", "__dict__", CHECKPOINTING} | _OF_EVERY_MODULE


class Watch:
    """Records the settings that the code of traced forwards reads, and detects the values that it writes.

    Args:
        replica: the copy that is traced.
        ancestors: the modules whose code is traced, with their paths.
        on_method: called with each method of the replica that its code reads; returns the one to use instead.
    """

    def __init__(
        self, replica: nn.Module, ancestors: Mapping[nn.Module, str], on_method: Callable[[types.MethodType], Any]
    ) -> None:
        self.replica = replica
        self.draws = False
        self.on_method = on_method
        self.settings: dict[tuple[str, str], Setting] = {}
        self.modes: dict[str, Any] = {}
        self._variables: dict[tuple[str, str], tuple[Any, Any]] = {}
        self._paths = {id(module): path for path, module in replica.named_modules()}
        self._codes: set[types.CodeType] = set()
        # Code can reach the attributes of a class without a read that is seen: type(self).log.append(x).
        self._of_classes = {
            (path, name): (value, snapshot(value, exact=True))
            for module, path in ancestors.items()
            for kind in type(module).__mro__
            for name, value in vars(kind).items()
            if not _is_library(kind.__module__) and not name.startswith("__") and not isinstance(value, _NOT_VARIABLES)
        }

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watch while the context is open, from `start` on.

        Raises:
            RuntimeError: an attribute, a container or an object is written into.
        """
        profile, numpy_state, collects = sys.getprofile(), _numpy_state(), gc.isenabled()
        gc.disable()  # callbacks of the garbage collector are not the network's code
        try:
            yield
        finally:
            sys.setprofile(None)
            if collects:
                gc.enable()
            for module in self.replica.modules():
                object.__setattr__(module, "__class__", getattr(type(module), "rblock_watched", type(module)))
            if callable(profile):
                sys.setprofile(profile)
            elif profile is not None:  # cProfile's
                profile.enable()
        names = {name for code in self._codes for name in code.co_names}
        # Another thread may draw as well, so the state alone proves nothing.
        self.draws |= numpy_state != _numpy_state() and "random" in names
        for (path, name), (value, before) in self._of_classes.items():
            self._variables[f"class of {path}", name] = value, before
            if name in names and not isinstance(value, _DESCRIPTORS):
                self.settings.setdefault((path, name), Setting(path, name, snapshot(value)))
        for setting in self.settings.values():
            if setting.read(self.replica) != setting.expected:
                raise RuntimeError(f"it writes into {setting.label!r}, which the generated forward would not do")
        for (_, name), (value, before) in self._variables.items():
            if snapshot(value, exact=True) != before:
                raise RuntimeError(f"it writes into {name!r}, which the generated forward would not do")

    def start(self) -> None:
        """Start when the forward is about to run; fx reads all modules before."""
        classes: dict[Any, Any] = {}
        for module in list(self.replica.modules()):
            kind: Any = type(module)
            if kind not in classes:
                classes[kind] = kind if issubclass(kind, fx.GraphModule) else self._watched_class(kind)
            object.__setattr__(module, "__class__", classes[kind])
        sys.setprofile(self._see)

    def _watched_class(self, original: Any) -> Any:
        watch = self

        def getattribute(self: nn.Module, name: str) -> Any:
            value = original.__getattribute__(self, name)
            return watch._note(self, name, value, sys._getframe(1)) if name not in _SKIPPED else value

        def getattr_(self: nn.Module, name: str) -> Any:
            try:
                value = original.__getattr__(self, name)
            except AttributeError:
                watch._note(self, name, Missing.ATTRIBUTE, sys._getframe(1))
                raise
            return value if value is not None else watch._note(self, name, None, sys._getframe(1))

        def setattribute(self: nn.Module, name: str, value: Any) -> None:
            path = watch._paths.get(id(self))
            if path is not None and not name.startswith("_tensor_constant"):  # fx keeps those there
                where = f"{path}.{name}" if path else name
                raise RuntimeError(f"it assigns {where!r}, which the generated forward would not do")
            original.__setattr__(self, name, value)

        members = {"__getattribute__": getattribute, "__getattr__": getattr_, "__setattr__": setattribute}
        try:
            return type(original.__name__, (original,), members | {"rblock_watched": original})
        except TypeError:  # a class that refuses subclasses is not watched
            return original

    def _note(self, module: nn.Module, name: str, value: Any, reader: types.FrameType) -> Any:
        path = self._paths.get(id(module))
        if path is None:
            return value
        if name == CHILDREN:
            # Loops over containers and named_children; not named_modules, which fx calls itself.
            loops = reader.f_globals.get("__name__") == "torch.nn.modules.container" and not _is_fx(reader)
            if loops or reader.f_code.co_name == "named_children" or not _is_library_code(reader):
                self.settings.setdefault((path, name), Setting(path, name, tuple(value)))
            return value
        if isinstance(value, Tensor | nn.Module | fx.Proxy) or _is_library_code(reader):
            return value
        self.settings.setdefault((path, name), Setting(path, name, snapshot(value)))
        if isinstance(value, types.MethodType) and value.__self__ is self.replica:
            return self.on_method(value)
        return value

    def _see(self, frame: types.FrameType, event: str, argument: Any) -> None:
        """Profile function: note global names when Python code starts, and switches of torch when it asks for them."""
        if event == "c_call":
            owner = argument.__self__ if type(argument) is types.BuiltinFunctionType else None
            if isinstance(owner, random.Random):
                self.draws |= not argument.__name__.startswith(("get", "set"))
            elif type(owner) is types.ModuleType and argument in MODES and not _is_library_code(frame):
                self.modes.setdefault(argument.__name__, MODES[argument]())
        elif event == "call" and frame.f_code not in self._codes:
            self._codes.add(frame.f_code)
            if not _is_library_code(frame):
                self._note_variables(frame)

    def _note_variables(self, frame: types.FrameType) -> None:
        """Note the global names of code, the attributes that it may read of classes and modules, and free variables."""
        owner, code = frame.f_globals.get("__name__", ""), frame.f_code
        is_known = getattr(sys.modules.get(owner), "__dict__", None) is frame.f_globals
        for name in _global_names(code):
            value = frame.f_globals.get(name, Missing.ATTRIBUTE)
            self._note_variable(owner, name, value, is_known)
            if isinstance(value, types.ModuleType) and not _is_library(value.__name__):
                for attribute in vars(value).keys() & {*code.co_names}:
                    self._note_variable(value.__name__, attribute, vars(value)[attribute], True)
            elif isinstance(value, type) and not _is_library(value.__module__):
                for attribute in {name for kind in value.__mro__ for name in vars(kind)} & {*code.co_names}:
                    self._note_variable(owner, f"{name}.{attribute}", getattr(value, attribute), is_known)
        for name in code.co_freevars:
            self._note_variable(str(id(code)), name, frame.f_locals.get(name), False)

    def _note_variable(self, owner: str, name: str, value: Any, is_known: bool) -> None:
        is_function = isinstance(value, types.FunctionType)
        if is_function and (_is_library(value.__module__) or "<" in value.__qualname__):
            return
        if not is_function and isinstance(value, _NOT_VARIABLES + _DESCRIPTORS):
            return
        self._variables[owner, name] = value, snapshot(value, exact=True)
        if is_known and not isinstance(value, Tensor):
            self.settings[f"global {owner}", name] = Setting(owner, name, snapshot(value), is_global=True)


class GuardedProxy(fx.Proxy):
    """A proxy that refuses to be asked for gradients: comparisons with `is` would take it for another value."""

    def __getattr__(self, k: str) -> Any:
        if k in ("requires_grad", "grad_fn", "grad", "is_leaf"):
            raise RuntimeError(f"it reads {k!r} of a value")
        return super().__getattr__(k)


class Draws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notices random operations of its thread on tensors with data."""

    seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded in func.tags and not (isinstance(result, Tensor) and result.is_meta):
            self.seen = True
        return result


@functools.lru_cache(maxsize=4096)
def _global_names(code: types.CodeType) -> tuple[str, ...]:
    return tuple({entry.argval: None for entry in dis.get_instructions(code) if entry.opname == "LOAD_GLOBAL"})


def _numpy_state() -> str:
    numpy = sys.modules.get("numpy")
    return "" if numpy is None else repr(numpy.random.get_state()[1:3])


def _is_library(module: object) -> bool:
    """Whether a module belongs to Python, torch or this package, whose reads are not the network's."""
    return str(module).split(".")[0] in _LIBRARIES


def _is_library_code(frame: types.FrameType) -> bool:
    return _is_library(frame.f_globals.get("__name__", ""))


def _is_fx(frame: types.FrameType) -> bool:
    caller = frame.f_back
    return caller is not None and str(caller.f_globals.get("__name__", "")).startswith("torch.fx")
