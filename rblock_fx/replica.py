"""A copy of a model without its weights, on which everything is tried before the model itself is touched."""

import contextlib
import copy
import functools
import itertools
import random
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from rblock_fx.errors import ConversionError

META = torch.device("meta")

# The attribute by which timm's models switch activation checkpointing, read by the module that calls the others.
CHECKPOINTING = "grad_checkpointing"


def weightless_copy(model: nn.Module) -> nn.Module:
    """Copy a model with every tensor on the meta device: same code and shapes, no memory, no side effects.

    The user's hooks are left behind, since a copied hook would report shapes of batches that were never trained on.
    Activation checkpointing is off in the copy: where it is on, timm's models call blocks without their stages.

    Raises:
        ConversionError: the model cannot be copied.
    """
    if not isinstance(model, nn.Module):
        raise ConversionError(f"expected a torch.nn.Module, got {type(model).__name__}: timm.create_model('resnet50')")
    tensors = itertools.chain(model.parameters(), model.buffers())
    if any(is_lazy(tensor) for tensor in tensors):
        raise ConversionError(
            f"{type(model).__name__} has lazy layers that no batch has initialised yet; run it on one batch first: "
            "model(images)"
        )
    memo: dict[int, Any] = {}
    for module in model.modules():
        for tensor in _tensors_of(module):
            memo.setdefault(id(tensor), _without_data(tensor))
        for value in vars(module).values():
            # Every module has ten empty dictionaries of hooks, on which deepcopy spends most of its time.
            if type(value) in (dict, OrderedDict) and not value:
                memo.setdefault(id(value), type(value)())
    try:
        replica = copy.deepcopy(model, memo)
    except Exception as error:
        raise ConversionError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}); expected a model that "
            "copy.deepcopy accepts, as averaging weights (EMA) needs too."
        ) from error
    for module in replica.modules():
        if isinstance(module, torch.jit.ScriptModule):  # copied in C++, with its data
            for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                setattr(module, name, _without_data(tensor))
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if not type(hook).__module__.startswith("torch.nn.utils")]:
                del hooks[key]
        if CHECKPOINTING in vars(module):
            setattr(module, CHECKPOINTING, False)
        _tame(module)
    return replica


def _tame(module: nn.Module) -> None:
    """Give a layer of the copy a forward without side effects, and one that takes no longer than it must."""
    if isinstance(module, nn.SyncBatchNorm):
        vars(module)["forward"] = torch.empty_like  # else it would speak to the other processes
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.momentum is None:
        module.momentum = 0.1  # else it would read its counter of batches
    if isinstance(module, nn.RNNBase):
        # Step by step in Python on the meta device: sequencer2d_l took 26 s to convert.
        vars(module)["forward"] = functools.partial(_recurrent_shapes, module, type(module).forward)


def _recurrent_shapes(layer: nn.RNNBase, original: Callable[..., Any], x: Any, state: Any = None) -> Any:
    """The output of a recurrent layer for a sequence of any length, by the matrix products that it takes, in one go."""
    if not isinstance(x, Tensor) or x.dim() != 3 or layer.proj_size:
        return original(layer, x, state)
    rows = x.shape[0] if layer.batch_first else x.shape[1]
    for weights in zip(*[iter(layer.all_weights)] * (2 if layer.bidirectional else 1), strict=True):
        outputs = []
        for of_input, of_state, *_ in weights:
            gates = x @ of_input.t() + x.new_empty(*x.shape[:2], layer.hidden_size) @ of_state.t()
            outputs.append(gates[..., : layer.hidden_size])
        x = torch.cat(outputs, -1)
    last = x.new_empty(layer.num_layers * (2 if layer.bidirectional else 1), rows, layer.hidden_size)
    return x, (last, last.clone()) if isinstance(layer, nn.LSTM) else last


def _tensors_of(module: nn.Module) -> Iterator[Tensor]:
    for values in (module._parameters.values(), module._buffers.values(), vars(module).values()):
        yield from (value for value in values if isinstance(value, Tensor))


def _without_data(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device=META)
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


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
        key = _key_of_call(func, args, kwargs) if _is_functional(func) else None
        known = None if key is None else self.results.get(key)
        if known is not None:
            return _without_values(known)
        result = func(*args, **kwargs)
        layout = None if key is None else _layout(result)
        if layout is not None:
            if len(self.results) >= self.limit:
                self.results.clear()
            self.results[key] = layout
        return result


@functools.cache
def _is_functional(func: Any) -> bool:
    schema = func._schema
    return not schema.is_mutable and not any(value.alias_info for value in (*schema.arguments, *schema.returns))


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
    python_state = random.getstate()
    torch_state = torch.get_rng_state()
    try:
        yield lambda: random.getstate() != python_state or not torch.equal(torch.get_rng_state(), torch_state)
    finally:
        random.setstate(python_state)
        torch.set_rng_state(torch_state)
