"""Fork and mask as one operation, and the pieces of a mask: pure functions on tensors.

The K masks over a map x of (N, C, *S), one for each sub-model, are held in factors that broadcast. K is 1 where all
sub-models share a factor.

    channel  (K, N, C, 1...)  bool, the channels in which a sub-model drops
    spatial  (K, N, 1, *S)    bool, the positions at which it drops
    scale    (K, N, 1, 1...)  float32, multiplies the kept activations

An activation is dropped where channel and spatial are both True: mask = ~(channel & spatial) * scale. A mask is a
factor, so a dropped inf or nan becomes nan. A factor that is True everywhere may have size 1 on any axis behind N.
Where activations are dropped one by one (Dropout), `channel` is (K, N, C, *S); otherwise no tensor of the size of x is
saved for backward.
"""

from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Operation = Literal["fork", "keep", "join"]

# Elements of x masked at once in eager mode. On a CPU they, their mask and their product stay in a core's cache (half
# or twice as many take 2 to 15 % longer); elsewhere the bound limits memory.
_CPU_CHUNK = 1 << 17
_CHUNK = 1 << 23


def dilate(centres: Tensor, block_size: int) -> Tensor:
    """Grow every True of (N, 1, *S) to a cube of side `block_size` (odd), clipped at the borders."""
    if block_size == 1:
        return centres
    pool = {3: F.max_pool1d, 4: F.max_pool2d, 5: F.max_pool3d}[centres.dim()]
    return pool(centres.to(torch.float32), block_size, stride=1, padding=block_size // 2) > 0


def count_dropped(channel: Tensor, spatial: Tensor) -> tuple[Tensor, int]:
    """Count the activations that each sample loses, (K, N, 1, 1...) in float32, of how many.

    The factors vary over different axes, so the count is the product of theirs.
    """
    axes = tuple(range(2, channel.dim()))
    channels, positions = (f.sum(axes, keepdim=True, dtype=torch.float32) for f in (channel, spatial))
    return channels * positions, channel.shape[2:].numel() * spatial.shape[2:].numel()


def kept_scale(channel: Tensor, spatial: Tensor) -> Tensor:
    """Compute 1 / s of (K, N, 1, 1...), s the kept share of each sample (Alg. 1 step 6, Alg. 2 step 6).

    A sample that keeps nothing has a finite scale, so that it becomes zeros.
    """
    dropped, total = count_dropped(channel, spatial)
    return total / (total - dropped).clamp(min=1)


def fork_and_mask(x: Tensor, channel: Tensor, spatial: Tensor, scale: Tensor) -> Tensor:
    """Return the K masked copies of x from one read of it: (N, C, *S) -> (K * N, C, *S), sub-model 1 first."""
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
        one_by_one = channel.shape[2:].numel() > channel.shape[2]
        if torch.compiler.is_compiling() or x.is_meta or one_by_one:
            return _mask_in_one_expression(x, channel, spatial, scale, operation)
        return _mask_in_chunks(x, channel, spatial, scale, operation)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        *factors, operation = inputs[1:]
        ctx.save_for_backward(*factors)
        ctx.adjoint = {"fork": "join", "join": "fork", "keep": "keep"}[operation]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return _Mask.apply(gradient, *ctx.saved_tensors, ctx.adjoint), None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
        def select(index: int) -> list[Any]:
            return [x if axis is None else x.select(axis, index) for x, axis in zip(inputs, in_dims, strict=True)]

        return torch.stack([_Mask.apply(*select(index)) for index in range(info.batch_size)]), 0


def _mask_in_one_expression(x: Tensor, channel: Tensor, spatial: Tensor, scale: Tensor, operation: Operation) -> Tensor:
    """Mask with a compiler, which fuses this to one loop over x; computed in float32, rounded once to x's dtype.

    One expression per part: broadcasting over parts compiles to an outer loop that reads x again.
    """
    parts, rows = scale.shape[:2]
    sources = (x,) * parts if operation == "fork" else x.split(rows)  # type: ignore[no-untyped-call]
    products = [
        source * torch.where(channel[min(k, len(channel) - 1)] & spatial[min(k, len(spatial) - 1)], 0.0, scale[k])
        for k, source in enumerate(sources)
    ]
    if operation == "join":
        total: Tensor = sum(products[1:], start=products[0])
        return total.to(x.dtype)
    return torch.cat([product.to(x.dtype) for product in products])


def _mask_in_chunks(x: Tensor, channel: Tensor, spatial: Tensor, scale: Tensor, operation: Operation) -> Tensor:
    """Mask without a compiler: some rows at a time, so that intermediate results stay in the cache.

    In memory x consists of rows along its inner axes. A row of a mask is one of two, the scale throughout or the scale
    with holes, and the factor over the outer axes selects which. Copying rows takes 0.13 to 0.19 ns per activation;
    torch.where takes 0.7 to 0.9.
    """
    parts, samples = scale.shape[:2]
    wide = torch.promote_types(x.dtype, torch.float32)
    channels_last = not x.is_contiguous() and x.movedim(1, -1).is_contiguous()
    order = (0, *range(2, x.dim()), 1) if channels_last else tuple(range(x.dim()))
    outer, inner = (spatial, channel) if channels_last else (channel, spatial)
    size = x.shape[1] if channels_last else x.shape[2:].numel()
    rows = x.shape[1:].numel() // max(size, 1)  # of a sample
    # Not a view, which autograd would not let the user change in place.
    result = torch.empty_permuted(
        (samples if operation == "join" else parts * samples, *x.shape[1:]), order, dtype=x.dtype, device=x.device
    )
    source = x.permute(order).contiguous().view(1 if operation == "fork" else parts, samples * rows, size)
    target = result.permute(order).view(1 if operation == "join" else parts, samples * rows, size)

    plain = scale.to(wide).view(parts, samples, 1).expand(parts, samples, size)
    table = torch.stack((plain, plain * ~inner.flatten(2)), 2).view(2 * parts * samples, size)
    first = torch.arange(0, len(table), 2, dtype=torch.int32, device=x.device).view(parts, samples, 1)
    choice = (first + outer.flatten(2)).expand(parts, samples, rows).reshape(parts, samples * rows)
    step = max((_CPU_CHUNK if x.device.type == "cpu" else _CHUNK) // max(size, 1), 1)
    # Buffers for all chunks: memory allocated for one chunk would be mapped and cleared for each.
    buffers = table.new_empty((3, min(step, samples * rows), size))
    chunks = (_cut(whole, parts, step) for whole in (source, target, choice))
    for pieces, outs, chosen in zip(*chunks, strict=True):
        mask, value, total = buffers[:, : len(chosen[0])]
        product = total if operation == "join" else mask
        for part in range(parts):
            torch.index_select(table, 0, chosen[part], out=mask)
            if x.dtype == wide:
                value, product = pieces[part], outs[part]
            elif part == 0 or operation != "fork":
                value.copy_(pieces[part])
            if operation == "join" and part > 0:
                product.addcmul_(value, mask)
            else:
                torch.mul(value, mask, out=product)
            if x.dtype != wide and (operation != "join" or part == parts - 1):
                outs[part].copy_(product)
    return result


def _cut(whole: Tensor, parts: int, size: int) -> Iterator[tuple[Tensor, ...]]:
    """Cut (K, rows, ...) or (1, rows, ...) into chunks of `size` rows, each as K tensors."""
    shared = whole.expand(parts, *whole.shape[1:])
    return zip(*(part.split(size) for part in shared.unbind()), strict=True)  # type: ignore[no-untyped-call]
