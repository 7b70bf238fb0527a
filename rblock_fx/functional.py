"""Fork and mask as one operation, and the drawing of blocks: pure functions on tensors.

A pair of masks over a map x of (N, C, *S) is held in factors that broadcast, K = 2 of them (K = 1 for single-model
methods, or where both sub-models share a factor):

    channel  (K, N, C, 1...)  bool, the channels in which a sub-model drops
    spatial  (K, N, 1, *S)    bool, the positions at which it drops
    scale    (K, N, 1, 1...)  float32, what the kept activations are multiplied by

so that mask_i = (1 - channel_i * spatial_i) * scale_i. For channels-last maps the two axes change places. No tensor of
(N, C, *S) is ever saved for backward.
"""

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Operation = Literal["fork", "keep", "join"]

# Elements of a mask that are built at once on a CPU: 64 Ki float32 stay in a core's cache, so that the mask costs
# no pass over memory.
_CPU_CHUNK = 1 << 16


def draw_blocks(gamma: Tensor | float, rows: int, spatial: tuple[int, ...], block_size: int, device: Any) -> Tensor:
    """Draw block centres r ~ Bernoulli(gamma) and dilate them to blocks: M of (rows, 1, *spatial), bool."""
    return dilate(torch.rand((rows, 1, *spatial), device=device) < gamma, block_size)


def dilate(centres: Tensor, block_size: int) -> Tensor:
    """Grow every True of (N, 1, *spatial) to a cube of side `block_size` (odd), clipped at the borders."""
    if block_size == 1:
        return centres
    pool = {3: F.max_pool1d, 4: F.max_pool2d, 5: F.max_pool3d}[centres.dim()]
    return pool(centres.to(torch.float32), block_size, stride=1, padding=block_size // 2) > 0


def kept_scale(channel: Tensor, spatial: Tensor) -> Tensor:
    """1 / s, s the kept proportion of each sample over all its axes (Alg. 1 step 6, Alg. 2 step 6), of (K, N, 1, 1...).

    Where a sample keeps nothing the scale is 0, so that it stays finite in every dtype. The factors of a mask vary over
    different axes, so the dropped share is the product of theirs; it is counted in integers, for which 1 - s is exact.
    """
    axes = tuple(range(2, channel.dim()))
    channel_total, spatial_total = (_positions(factor, axes) for factor in (channel, spatial))
    dropped = channel.sum(axes, keepdim=True) * spatial.sum(axes, keepdim=True)
    total = channel_total * spatial_total
    kept = total - dropped
    return torch.where(kept > 0, total / kept.to(torch.float32), 0.0)


def _positions(factor: Tensor, axes: tuple[int, ...]) -> int:
    total = 1
    for axis in axes:
        total *= factor.shape[axis]
    return total


def fork_and_mask(x: Tensor, channel: Tensor, spatial: Tensor, scale: Tensor) -> Tensor:
    """Both masked copies of x from one read of it: (N, C, *S) -> (K * N, C, *S), sub-model 1 in the first half."""
    return _Mask.apply(x, channel, spatial, scale, "fork")  # type: ignore[no-any-return]


def mask_parts(x: Tensor, channel: Tensor, spatial: Tensor, scale: Tensor) -> Tensor:
    """Mask each of the K parts of a batch that has forked already: (K * N, C, *S) -> the same shape."""
    return _Mask.apply(x, channel, spatial, scale, "keep")  # type: ignore[no-any-return]


class _Mask(torch.autograd.Function):
    """The three linear maps that masks define; "fork" and "join" are each other's adjoint, "keep" is its own.

    fork: out[k, n] = x[n] * mask[k, n]
    keep: out[k, n] = x[k, n] * mask[k, n]
    join: out[n] = sum over k of x[k, n] * mask[k, n]
    """

    @staticmethod
    def forward(x: Tensor, channel: Tensor, spatial: Tensor, scale: Tensor, operation: Operation) -> Tensor:
        return _apply_masks(x, channel, spatial, scale, operation)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        *factors, operation = inputs[1:]
        ctx.save_for_backward(*factors)
        ctx.adjoint = {"fork": "join", "join": "fork", "keep": "keep"}[operation]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return _Mask.apply(gradient, *ctx.saved_tensors, ctx.adjoint), None, None, None, None


def _apply_masks(x: Tensor, channel: Tensor, spatial: Tensor, scale: Tensor, operation: Operation) -> Tensor:
    """Evaluate one of the three maps, in float32 inside and rounded once to the dtype of x."""
    parts = scale.shape[0]
    rows = scale.shape[1]
    source = x.unsqueeze(0) if operation == "fork" else x.view(parts, rows, *x.shape[1:])
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        products = source * _masks(channel, spatial, scale)
        return (products.sum(0) if operation == "join" else products.flatten(0, 1)).to(x.dtype)

    out_rows = rows if operation == "join" else parts * rows
    result = torch.empty((out_rows, *x.shape[1:]), dtype=x.dtype, device=x.device).to(memory_format=_memory_format(x))
    target = result.unsqueeze(0) if operation == "join" else result.view(parts, rows, *x.shape[1:])
    step = max(_CPU_CHUNK // max(math.prod(x.shape[1:]), 1), 1)
    for start in range(0, rows, step):
        here = slice(start, start + step)
        masks = [
            _masks(*(factor[min(part, len(factor) - 1), here] for factor in (channel, spatial, scale)))
            for part in range(parts)
        ]
        if operation == "join":
            target[0, here] = sum(source[part, here] * mask for part, mask in enumerate(masks))
        else:
            for part, mask in enumerate(masks):
                torch.mul(source[min(part, len(source) - 1), here], mask, out=target[part, here])
    return result


def _masks(channel: Tensor, spatial: Tensor, scale: Tensor) -> Tensor:
    return torch.where(channel & spatial, 0.0, scale)


def _memory_format(x: Tensor) -> torch.memory_format:
    """Channels-last where x is laid out so, for the convolutions that follow."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    wanted = formats.get(x.dim())
    if wanted is not None and x.is_contiguous(memory_format=wanted) and not x.is_contiguous():
        return wanted
    return torch.contiguous_format
