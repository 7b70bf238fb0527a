"""Batch statistics per sub-model: each half of a paired batch is normalised alone, as two forwards would do it."""

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from rblock_fx.swap import SwappedClass


class PerSubmodelBatchNorm(SwappedClass):
    """Mixin of a batch norm behind the fork; in eval mode, and frozen by .eval(), it is the layer that it was.

    Running statistics are updated by sub-model 1, then by sub-model 2 (so of a layer that is called several times in a
    forward, in another order than two forwards would). Parameters, buffers and state_dict keys are
    those of the layer.
    """

    @classmethod
    def swapped_class(cls, module: nn.Module) -> type[nn.Module]:
        """A subclass of the layer's own class; layers of one class share it."""
        original: Any = type(module)  # Any, since nn.Module's stubs hide that classes are hashable
        subclass: type[nn.Module] = _subclass(original)
        return subclass


@functools.cache
def _subclass(original: Any) -> type[nn.Module]:
    # What it takes is left to the layer: torch calls its map `input`, timm `x`, and users may add conditions to it.
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        if not self.training:
            return original.forward(self, *args, **kwargs)  # type: ignore[no-any-return]
        halves = (_half((args, kwargs), submodel) for submodel in (0, 1))
        return torch.cat([original.forward(self, *half_args, **half_kwargs) for half_args, half_kwargs in halves])

    members = {"forward": forward, "original_class": original, "__module__": original.__module__}
    return type(f"PerSubmodel{original.__name__}", (PerSubmodelBatchNorm, original), members)


def _half(arguments: Any, submodel: int) -> Any:
    """The rows of one sub-model, 0 or 1, of every tensor among a layer's arguments."""
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.chunk(2)[submodel], arguments)
