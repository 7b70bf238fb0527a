"""What a training step of a model costs, counted: FLOPs by torch's counter, and bytes saved for backward."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count


def training_flops(model: nn.Module, images: Tensor) -> int:
    """FLOPs of one forward and backward, loss not counted."""
    flops = count_flops(lambda: model(images).sum().backward())
    model.zero_grad()
    return flops


def count_flops(call: Callable[[], object]) -> int:
    """FLOPs of what is called, of matrix products and convolutions, as torch counts them."""
    counter = FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten.convolution_backward: _convolution_backward_flops}
    )
    with counter:
        call()
    return int(counter.get_total_flops())


def saved_bytes(model: nn.Module, images: Tensor) -> int:
    """Bytes of the tensors that a training forward keeps for backward, each storage once, without the model's own."""
    known = {tensor.untyped_storage().data_ptr() for tensor in [images, *model.parameters(), *model.buffers()]}
    storages: dict[int, int] = {}
    alive = []  # else an address could be given out twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            alive.append(storage)
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(images)
    return sum(storages.values())


def _convolution_backward_flops(gradient: Any, images: Any, weight: Any, *settings: Any, **_: Any) -> int:
    """As many for each gradient that is asked for as the forward has.

    torch 2.14's own formula counts the weights' gradient of a grouped convolution `groups` times
    (https://github.com/pytorch/pytorch/pull/183405), which would make depthwise layers the most costly of a network.
    """
    _bias, _stride, _padding, _dilation, transposed, _output_padding, _groups, output_mask = settings
    return int(conv_flop_count(images, weight, gradient, transposed=transposed) * sum(output_mask[:2]))
