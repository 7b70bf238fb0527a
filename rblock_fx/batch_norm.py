"""Batch statistics per sub-model: each half of a paired batch is normalised alone, as two forwards would do it."""

import functools
from typing import Any

import torch
from torch import Tensor, nn

from rblock_fx.swap import SwappedClass


class PerSubmodelBatchNorm(SwappedClass):
    """Mixin of a batch norm behind the fork; in eval mode, and frozen by .eval(), it is the layer that it was.

    Running statistics are updated by sub-model 1, then by sub-model 2. Parameters, buffers and state_dict keys are
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
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        if not self.training:
            return original.forward(self, x)  # type: ignore[no-any-return]
        return torch.cat([original.forward(self, half) for half in x.chunk(2)])

    members = {"forward": forward, "original_class": original, "__module__": original.__module__}
    return type(f"PerSubmodel{original.__name__}", (PerSubmodelBatchNorm, original), members)
