"""A copy of a model without its weights, and the context in which it runs on the meta device without side effects."""

import contextlib
import copy
import dataclasses
import functools
import itertools
import random
import sys
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from rblock_fx.errors import ConversionError

Shape = tuple[int, ...]
Structure = tuple[type, "list[Structure]"] | None

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
    memo: dict[int, Any] = {}
    for module in model.modules():
        for tensor in _tensors_of(module):
            memo.setdefault(id(tensor), _without_data(tensor))
    replica = copy_model(model, memo)
    for module in replica.modules():
        _remove_side_effects(module)
    return replica


def copy_model(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """Copy a model without its hooks, module by module: a module's own __deepcopy__ may return the module itself.

    Args:
        model: the model.
        memo: copies that exist, by the id of the original, as copy.deepcopy takes them.

    Raises:
        ConversionError: the model cannot be copied.
    """
    memo = {} if memo is None else memo
    modules = [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule | fx.GraphModule)]
    memo |= {id(module): object.__new__(type(module)) for module in modules}
    try:
        for module in reversed(modules):  # children first: a GraphModule reads them when it is copied
            _copy_attributes(module, memo)
        copied: nn.Module = copy.deepcopy(model, memo)
    except Exception as error:
        raise ConversionError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}); expected a model that "
            "copy.deepcopy accepts, as weight averaging (EMA) needs too"
        ) from error
    for module in copied.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if not is_torch_hook(hook)]:
                del hooks[key]
    return copied


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
    if CHECKPOINTING in vars(module):
        setattr(module, CHECKPOINTING, False)
    if isinstance(module, nn.RNNBase):  # the meta device runs it step by step in Python
        vars(module)["forward"] = functools.partial(_run_short_sequence, module, type(module).forward)
    if isinstance(module, nn.SyncBatchNorm):
        vars(module)["forward"] = torch.empty_like  # its own communicates with the other processes
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.momentum is None:
        module.momentum = 0.1  # otherwise its forward reads the counter of batches


def _run_short_sequence(layer: nn.RNNBase, forward: Any, x: Tensor, *args: Any) -> Any:
    steps = x.shape[1 if layer.batch_first and x.dim() == 3 else 0]
    if steps > 4096:
        raise RuntimeError(f"a recurrent layer runs over {steps} steps, probably the batch: set batch_first=True")
    return forward(layer, x, *args)


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
                return args[0].clone()  # fifty times as fast on the meta device as empty_like
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
def random_state_kept() -> Iterator[None]:
    """Restore the random generators of Python, NumPy and torch at the end."""
    numpy = sys.modules.get("numpy")
    python_state, torch_state = random.getstate(), torch.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    numpy_state = numpy.random.get_state() if numpy else ()
    try:
        yield
    finally:
        random.setstate(python_state)
        torch.set_rng_state(torch_state)
        if cuda_states:
            torch.cuda.set_rng_state_all(cuda_states)
        if numpy is not None:
            numpy.random.set_state(numpy_state)


class WithoutRandomness(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Replace random draws by constants at which dropout, stochastic depth and the like keep everything."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        name = str(func.overloadpacket.__name__)
        if name == "native_dropout":
            return args[0].clone(), torch.ones_like(args[0], dtype=torch.bool)
        names = [argument.name for argument in func._schema.arguments]
        if "dropout_p" in names:
            position = names.index("dropout_p")
            args = (*args[:position], 0.0, *args[position + 1 :]) if position < len(args) else args
            return func(*args, **{key: value for key, value in kwargs.items() if key != "dropout_p"})
        result = func(*args, **kwargs)
        constant = 1.0 if name.startswith("bernoulli") else 0.5 if result.is_floating_point() else 0
        return result.fill_(constant)


def first_shape(output: Shape | list[Shape | None] | None) -> Shape | None:
    """The shape of a single tensor, or of the first in a list."""
    if isinstance(output, list):
        return next((shape for shape in output if shape is not None), None)
    return output


def structure_of(value: Any) -> Structure:
    """The type of a list or tuple and the structures of its items; None for anything else."""
    named = isinstance(value, tuple) and hasattr(value, "_fields")
    if type(value) in (list, tuple) or named:
        return type(value), [structure_of(item) for item in value]
    return None


def tensors_in(nested: Any) -> list[Tensor]:
    """Every tensor of any nesting, in order; also inside dataclasses."""
    if isinstance(nested, Tensor):
        return [nested]
    if isinstance(nested, tuple | list):  # pytree is ten times slower, and this runs at every operation
        return [tensor for item in nested for tensor in tensors_in(item)]
    if isinstance(nested, dict):
        return [tensor for item in nested.values() for tensor in tensors_in(item)]
    if dataclasses.is_dataclass(nested) and not isinstance(nested, type):
        return [tensor for item in vars(nested).values() for tensor in tensors_in(item)]
    if nested is None or isinstance(nested, int | float | str):
        return []
    return [leaf for leaf in pytree.tree_leaves(nested) if isinstance(leaf, Tensor)]


def shape_of(value: Any) -> Shape | list[Shape | None] | None:
    """The shape of a tensor without the batch axis, or the shapes of a list's items; None for anything else."""
    if isinstance(value, Tensor):
        return tuple(value.shape[1:]) if value.dim() > 0 else None
    if isinstance(value, list | tuple):
        shapes = [shape_of(item) for item in value]
        return None if any(isinstance(shape, list) for shape in shapes) else shapes  # type: ignore[return-value]
    return None
