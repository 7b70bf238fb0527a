"""A copy of a model without its weights, and the context in which it runs on the meta device without side effects."""

import contextlib
import copy
import itertools
import random
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

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
    """Copy a model with every tensor on the meta device: same code and shapes, no memory.

    Modules are copied here, not by their own `__deepcopy__`, which may return the module itself. The copy has no hooks
    of the user: they would see shapes of batches that nobody trained on. Activation checkpointing is off in the copy,
    because timm's models then call blocks without their stages.

    Raises:
        ConversionError: the model cannot be copied.
    """
    if not isinstance(model, nn.Module):
        raise ConversionError(f"expected a torch.nn.Module, got {type(model).__name__}: timm.create_model('resnet50')")
    if any(is_lazy(tensor) for tensor in itertools.chain(model.parameters(), model.buffers())):
        raise ConversionError(
            f"{type(model).__name__} has lazy layers that no batch has initialised yet; run one first: model(images)"
        )
    modules = list(model.modules())
    memo: dict[int, Any] = {}
    for module in modules:
        if not isinstance(module, torch.jit.ScriptModule):
            memo[id(module)] = object.__new__(type(module))
        for tensor in _tensors_of(module):
            memo.setdefault(id(tensor), _without_data(tensor))
    try:
        for module in modules:
            if id(module) in memo:
                _copy_attributes(module, memo)
        replica: nn.Module = copy.deepcopy(model, memo)
    except Exception as error:
        raise ConversionError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}); expected a model that "
            "copy.deepcopy accepts, as weight averaging (EMA) needs too"
        ) from error
    for module in replica.modules():
        _remove_side_effects(module)
    return replica


def _copy_attributes(module: nn.Module, memo: dict[int, Any]) -> None:
    copied = memo[id(module)].__dict__
    for name, value in vars(module).items():
        # Every module has ten empty dictionaries of hooks, and deepcopy would spend most of its time on them.
        empty = type(value) in (dict, OrderedDict) and not value
        copied[name] = type(value)() if empty else copy.deepcopy(value, memo)


def _remove_side_effects(module: nn.Module) -> None:
    """Remove from a module of the copy everything that reaches outside, or reads a value of a tensor."""
    if isinstance(module, torch.jit.ScriptModule):  # copied in C++, with its data
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            setattr(module, name, _without_data(tensor))
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        for key in [key for key, hook in hooks.items() if not is_torch_hook(hook)]:
            del hooks[key]
    if CHECKPOINTING in vars(module):
        setattr(module, CHECKPOINTING, False)
    if isinstance(module, nn.SyncBatchNorm):
        vars(module)["forward"] = torch.empty_like  # its own communicates with the other processes
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.momentum is None:
        module.momentum = 0.1  # otherwise its forward reads the counter of batches


def is_torch_hook(hook: object) -> bool:
    """Whether a forward hook is part of the network (spectral norm, weight norm, pruning) rather than the user's."""
    return type(hook).__module__.startswith("torch.nn.utils")


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


class _WithoutBatchStatistics(TorchFunctionMode):
    """Skip batch norms: they write into buffers in train mode, and their decomposition takes most of a dry run."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.batch_norm:
            with torch._C.DisableTorchFunction():
                return torch.empty_like(args[0])
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def dry_run() -> Iterator[None]:
    """Run code on the meta device, outside autograd and autocast, and restore the random generators."""
    quiet = torch.no_grad(), torch.autocast("cpu", enabled=False)
    with random_state_kept(), quiet[0], quiet[1], META, _WithoutBatchStatistics():
        yield


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put every module in eval mode, and restore each module's own mode at the end."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextlib.contextmanager
def random_state_kept() -> Iterator[Callable[[], bool]]:
    """Restore the CPU's random generators at the end; the yielded function reports whether this thread drew from one.

    Draws of Python and NumPy cannot be told from those of other threads, and count only if there are none.
    """
    numpy = sys.modules.get("numpy")
    python_state = random.getstate()
    torch_state = torch.get_rng_state()
    numpy_state = numpy.random.get_state() if numpy else ()
    draws = _Draws()  # type: ignore[no-untyped-call]

    def is_drawn() -> bool:
        numpy_drawn = numpy is not None and repr(numpy.random.get_state()) != repr(numpy_state)
        return draws.seen or (threading.active_count() == 1 and (numpy_drawn or random.getstate() != python_state))

    try:
        with draws:
            yield is_drawn
    finally:
        random.setstate(python_state)
        torch.set_rng_state(torch_state)
        if numpy is not None:
            numpy.random.set_state(numpy_state)


class _Draws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notices random operations of its thread on tensors with data."""

    seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded in func.tags and not (isinstance(result, Tensor) and result.is_meta):
            self.seen = True
        return result
