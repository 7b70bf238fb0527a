"""A copy of a model without its weights, on which everything is tried before the model itself is touched."""

import copy
import functools
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from rblock_fx.dry_run import META
from rblock_fx.errors import ConversionError

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
