"""Fork and mask as one operation, and the drawing of blocks: pure functions on tensors.

A pair of masks over a map x of (N, C, *S) is held in factors that broadcast, K = 2 of them (K = 1 for single-model
methods, or where both sub-models share a factor):

    channel  (K, N, C, 1...)  bool, the channels in which a sub-model drops
    spatial  (K, N, 1, *S)    float32, 1 at the positions at which it drops and 0 elsewhere
    scale    (K, N, 1, 1...)  float32, what the kept activations are multiplied by

so that mask_i = (1 - channel_i * spatial_i) * scale_i. Where activations are dropped one by one (Dropout), `channel` is
(K, N, C, *S) and `spatial` is 1; else no tensor of (N, C, *S) is ever saved for backward.
"""

import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Operation = Literal["fork", "keep", "join"]

# Elements of a mask that are built at once. On a CPU 256 Ki float32 stay in a core's cache, so that the mask costs no
# pass over memory; elsewhere the bound keeps the buffer small.
_CPU_CHUNK = 1 << 18
_CHUNK = 1 << 24


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
    total = math.prod(channel.shape[2:]) * math.prod(spatial.shape[2:])
    dropped = channel.sum(axes, keepdim=True) * spatial.sum(axes, keepdim=True, dtype=torch.int64)
    kept = total - dropped
    return torch.where(kept > 0, total / kept.to(torch.float32), 0.0)


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
        if torch.compiler.is_compiling() or x.is_meta:
            return _in_one_expression(x, channel, spatial, scale, operation)
        return _chunk_by_chunk(x, channel, spatial, scale, operation)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        *factors, operation = inputs[1:]
        ctx.save_for_backward(*factors)
        ctx.adjoint = {"fork": "join", "join": "fork", "keep": "keep"}[operation]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return _Mask.apply(gradient, *ctx.saved_tensors, ctx.adjoint), None, None, None, None


def _in_one_expression(x: Tensor, channel: Tensor, spatial: Tensor, scale: Tensor, operation: Operation) -> Tensor:
    """What a compiler fuses to one loop over x, which reads it once; in float32, rounded once to the dtype of x.

    Where parts share x, or a sum of them is wanted, there is one expression for each, since a broadcast over parts is a
    loop over parts outside, which reads anew what they share.
    """
    parts, rows = scale.shape[:2]
    if operation == "keep":
        masks = torch.where(channel, 1 - spatial, 1.0) * scale
        return (x.reshape(parts, rows, *x.shape[1:]) * masks).flatten(0, 1).to(x.dtype)
    sources = (x,) * parts if operation == "fork" else x.split(rows)  # type: ignore[no-untyped-call]
    products = [
        source * (torch.where(_part(channel, part), 1 - _part(spatial, part), 1.0) * scale[part])
        for part, source in enumerate(sources)
    ]
    if operation == "join":
        total: Tensor = sum(products[1:], start=products[0])
        return total.to(x.dtype)
    return torch.cat([product.to(x.dtype) for product in products])


def _chunk_by_chunk(x: Tensor, channel: Tensor, spatial: Tensor, scale: Tensor, operation: Operation) -> Tensor:
    """Without a compiler: a few samples at a time, so that their masks stay in the cache."""
    channels_inside = not x.is_contiguous() and x.movedim(1, -1).is_contiguous()
    order = (0, *range(2, x.dim()), 1) if channels_inside else tuple(range(x.dim()))
    parts, rows = scale.shape[:2]
    # Not a view, which autograd would not let be changed in place.
    result = torch.empty_permuted(
        (rows if operation == "join" else parts * rows, *x.shape[1:]), order, dtype=x.dtype, device=x.device
    )
    x = x.permute(order).contiguous()
    elements = math.prod(x.shape[1:])
    source = x.view(1 if operation == "fork" else parts, rows, elements)
    target = result.permute(order).view(1 if operation == "join" else parts, rows, elements)
    scale = scale.flatten(2).to(torch.promote_types(x.dtype, torch.float32))
    step = max((_CPU_CHUNK if x.device.type == "cpu" else _CHUNK) // max(elements, 1), 1)
    if channel.dim() == 3 or math.prod(channel.shape[3:]) > 1:
        masks = _masks_of_activations(channel.movedim(2, -1) if channels_inside else channel, scale, step)
    else:
        inner, outer = (channel, spatial) if channels_inside else (spatial, channel)
        masks = _masks_of_rows(inner, outer, scale, tuple(x.shape[1:]), channels_inside, step)
    sources, targets = _pieces(source, step, parts), _pieces(target, step, parts)
    total = scale  # of a sum over parts, where it is rounded to another dtype in the end
    # Each line here is run once per part and chunk, beside which the work of a chunk is not much: few operations.
    for chunk, part, mask in masks:
        piece, out = sources[part][chunk], targets[part][chunk]
        adds = operation == "join" and part > 0
        if out.dtype == mask.dtype:
            out.addcmul_(piece, mask) if adds else torch.mul(piece, mask, out=out)
            continue
        if operation != "fork" or part == 0:
            wide = piece.to(mask.dtype)
        if operation != "join":
            out.copy_(mask.mul_(wide))  # the mask is not needed after this
        else:
            total = total.addcmul_(wide, mask) if adds else wide.mul_(mask)
            if part == parts - 1:
                out.copy_(total)
    return result


def _masks_of_rows(
    inner: Tensor, outer: Tensor, scale: Tensor, shape: tuple[int, ...], channels_inside: bool, step: int
) -> Iterator[tuple[int, int, Tensor]]:
    """Give, for every chunk of `step` samples and every part, its mask of (step, C * S) in the order of the memory.

    A row of a mask, along the inner axes of the memory, is one of two: the scale throughout, or the scale with holes.
    Both are made once for each sample, and the factor of the outer axes says which one a row is: copying whole rows is
    faster than computing a mask element by element. A mask lives until the next is made.
    """
    outer_size = math.prod(shape[:-1]) if channels_inside else shape[0]
    inner_size = shape[-1] if channels_inside else math.prod(shape[1:])
    parts, rows = scale.shape[:2]
    holes = (scale * (1 - inner.flatten(2).to(scale.dtype))).expand(parts, rows, inner_size)
    either = torch.stack((scale.expand_as(holes), holes), 2).view(parts, 2 * rows, inner_size).unbind(0)
    first_row = torch.arange(0, 2 * rows, 2, dtype=torch.int32, device=scale.device).view(1, rows, 1)
    which = (outer.flatten(2).to(torch.int32) + first_row).expand(parts, rows, outer_size).flatten(1)
    buffer = scale.new_empty((min(step, rows) * outer_size, inner_size))
    masks = buffer.view(-1, outer_size * inner_size)
    for chunk, chosen in enumerate(zip(*_pieces(which, step * outer_size, parts), strict=True)):
        if len(chosen[0]) < len(buffer):  # the last one
            buffer, masks = buffer[: len(chosen[0])], masks[: len(chosen[0]) // outer_size]
        for part in range(parts):
            torch.index_select(either[part], 0, chosen[part], out=buffer)
            yield chunk, part, masks


def _masks_of_activations(dropped: Tensor, scale: Tensor, step: int) -> Iterator[tuple[int, int, Tensor]]:
    """Give the same where single activations are dropped, (K, N, C, *S)."""
    parts = scale.shape[0]
    factors = zip(*_pieces(dropped.flatten(2), step, parts), *_pieces(scale, step, parts), strict=True)
    for chunk, pieces in enumerate(factors):
        for part in range(parts):
            yield chunk, part, torch.where(pieces[part], 0.0, pieces[parts + part])


def _pieces(factor: Tensor, size: int, parts: int) -> list[tuple[Tensor, ...]]:
    """Cut (K, N, ...) into pieces of (size, ...) for each part, where all parts may share one."""
    pieces = [part.split(size) for part in factor.unbind(0)]  # type: ignore[no-untyped-call]
    return pieces * parts if len(pieces) == 1 else pieces


def _part(factor: Tensor, part: int) -> Tensor:
    """Give the factor of a sub-model, where both may share one."""
    return factor[min(part, len(factor) - 1)]
