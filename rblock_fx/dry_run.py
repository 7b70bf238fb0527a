"""Running a weightless copy: on the meta device, without a trace left behind, and cheaply."""

import contextlib
import functools
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

META = torch.device("meta")


def meta_batch(replica: nn.Module, rows: int, input_size: tuple[int, ...]) -> Tensor:
    """A batch of `rows` samples without data, in the precision of the model."""
    dtype = next((p.dtype for p in replica.parameters() if p.is_floating_point()), torch.float32)
    return torch.empty((rows, *input_size), dtype=dtype, device=META)


class _NoBatchStatistics(TorchFunctionMode):
    """Skips batch norms: in train mode they change buffers, and the shape is that of the input."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.batch_norm:
            with torch._C.DisableTorchFunction():
                return torch.empty_like(args[0])
        return func(*args, **(kwargs or {}))


class _KnownShapes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Remembers what an operation gives for arguments of certain shapes, since a network repeats its blocks.

    On the meta device many operations are decomposed in Python, which makes a forward dearer there than on a CPU. Only
    what operations without aliases and side effects make of meta tensors is remembered.
    """

    limit = 20_000  # results, of some hundred bytes each
    results: ClassVar[dict[Any, Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _is_inplace(func) and all(value.is_meta for value in args if isinstance(value, Tensor)):
            key = _key_of_call(func, args, kwargs)
            if key is None or key not in self.results:
                func(*args, **kwargs)
                self._remember(key, ())
            return args[0]
        key = _key_of_call(func, args, kwargs) if _is_functional(func) else None
        known = None if key is None else self.results.get(key)
        if known is not None:
            return _without_values(known)
        result = func(*args, **kwargs)
        layout = None if key is None else _layout(result)
        if layout is not None:
            self._remember(key, layout)
        return result

    def _remember(self, key: Any, layout: Any) -> None:
        if len(self.results) >= self.limit:
            self.results.clear()
        if key is not None:
            self.results[key] = layout


@functools.cache
def _is_functional(func: Any) -> bool:
    schema = func._schema
    return not schema.is_mutable and not any(value.alias_info for value in (*schema.arguments, *schema.returns))


@functools.cache
def _is_inplace(func: Any) -> bool:
    """Whether an operation changes the values of its first argument, not its shape, and gives that."""
    written = [value for value in func._schema.arguments if value.alias_info is not None]
    return (
        func.overloadpacket.__name__.endswith("_")
        and func.overloadpacket.__name__ not in ("resize_", "resize_as_", "set_")
        and torch.Tag.inplace_view not in func.tags
        and written == func._schema.arguments[:1]
        and len(func._schema.returns) == 1
    )


def _key_of_call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Everything that the result's layout depends on; None where that cannot be told."""
    key = (func, torch.get_default_dtype(), _key(args), tuple(kwargs), _key(tuple(kwargs.values())))
    try:
        hash(key)
    except TypeError:
        return None
    return key


def _key(value: Any) -> Any:
    if isinstance(value, Tensor):
        return (value.shape, value.stride(), value.dtype, value.device.type)
    if isinstance(value, tuple | list):
        return tuple(map(_key, value))
    return (type(value), value)  # 1, 1.0 and True are equal


def _layout(value: Any) -> Any:
    """Shape, stride and dtype of a meta tensor or of each of a tuple or list; None for anything else."""
    if isinstance(value, Tensor):
        return (value.shape, value.stride(), value.dtype) if value.device == META else None
    if isinstance(value, tuple | list):
        layouts = [_layout(item) for item in value]
        return None if None in layouts else (type(value), layouts)
    return None


def _without_values(layout: Any) -> Any:
    if len(layout) == 2:
        kind, layouts = layout
        return kind(map(_without_values, layouts))
    shape, stride, dtype = layout
    with torch._C.DisableTorchFunction():
        return torch.empty_strided(shape, stride, dtype=dtype, device=META)


@contextlib.contextmanager
def dry_run() -> Iterator[None]:
    """Run code on the meta device, outside of autograd and autocast, and leave the random generators as they were."""
    quiet = torch.no_grad(), torch.autocast("cpu", enabled=False)
    cheap = _NoBatchStatistics(), _KnownShapes()  # type: ignore[no-untyped-call]
    with random_state_kept(), quiet[0], quiet[1], META, cheap[0], cheap[1]:
        yield


@contextlib.contextmanager
def eval_mode(replica: nn.Module) -> Iterator[None]:
    """Put every module of the copy in eval mode, and each back in its own in the end."""
    modes = {module: module.training for module in replica.modules()}
    replica.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextlib.contextmanager
def random_state_kept() -> Iterator[Callable[[], bool]]:
    """Put the random generators back in the end; the function that it gives tells whether they have been drawn from."""
    numpy = sys.modules.get("numpy")
    python_state = random.getstate()
    torch_state = torch.get_rng_state()
    numpy_state = numpy.random.get_state() if numpy else ()

    def drawn() -> bool:
        numpy_drawn = numpy is not None and repr(numpy.random.get_state()) != repr(numpy_state)
        torch_drawn = not torch.equal(torch.get_rng_state(), torch_state)
        return numpy_drawn or torch_drawn or random.getstate() != python_state

    try:
        yield drawn
    finally:
        random.setstate(python_state)
        torch.set_rng_state(torch_state)
        if numpy is not None:
            numpy.random.set_state(numpy_state)
