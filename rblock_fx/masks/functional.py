"""Fork and mask as one operation, and the pieces of a mask: pure functions on tensors.

The K masks over a map x of (N, C, *S), one for each sub-model, are held in factors that broadcast. K is 1 where all
sub-models share a factor.

    channel  (K, N, C, 1...)  bool, the channels in which a sub-model drops
    spatial  (K, N, 1, *S)    bool, the positions at which it drops
    scale    (K, N, 1, 1...)  float32, multiplies the kept activations

An activation is dropped where channel and spatial are both True: mask = ~(channel & spatial) * scale. A factor that is
True everywhere may have size 1 on any axis behind N. Where activations are dropped one by one (Dropout), `channel` is
(K, N, C, *S); otherwise no tensor of the size of x is saved for backward.
"""

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Operation = Literal["fork", "keep", "join"]

# Elements of x masked at once in eager mode. On a CPU they, their masks and their products stay in a core's cache;
# elsewhere the bound limits memory.
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

    # Without setup_context, which costs 100 us a call: torch binds the arguments to forward's signature.
    @staticmethod
    def forward(ctx: Any, x: Tensor, channel: Tensor, spatial: Tensor, scale: Tensor, operation: Operation) -> Tensor:
        ctx.save_for_backward(channel, spatial, scale)
        ctx.adjoint = {"fork": "join", "join": "fork", "keep": "keep"}[operation]
        if torch.compiler.is_compiling() or x.is_meta:
            return _mask_in_one_expression(x, channel, spatial, scale, operation)
        return _mask_in_chunks(x, channel, spatial, scale, operation)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return _Mask.apply(gradient, *ctx.saved_tensors, ctx.adjoint), None, None, None, None


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
    """Mask without a compiler: a few samples at a time, so that intermediate results stay in the cache.

    In memory a sample is `outer` rows of `inner` activations. A row of its mask is one of two, the scale throughout or
    the scale with holes, and the factor over the outer axes selects which.
    """
    parts, rows = scale.shape[:2]
    wide = torch.promote_types(x.dtype, torch.float32)
    channels_last = not x.is_contiguous() and x.movedim(1, -1).is_contiguous()
    order = (0, *range(2, x.dim()), 1) if channels_last else tuple(range(x.dim()))
    # Not a view, which autograd would not let the user change in place.
    result = torch.empty_permuted(
        (rows if operation == "join" else parts * rows, *x.shape[1:]), order, dtype=x.dtype, device=x.device
    )
    if channel.shape[2:].numel() > channel.shape[2]:  # activations dropped one by one
        outer, inner = channel.permute(0, *(axis + 1 for axis in order)), spatial
        size = 1
    elif channels_last:
        outer, inner, size = spatial, channel, x.shape[1]
    else:
        outer, inner, size = channel, spatial, x.shape[2:].numel()
    scale = scale.to(wide).view(parts, rows, 1, 1)
    length = x.shape[1:].numel() // max(size, 1)
    chunk = _CPU_CHUNK if x.device.type == "cpu" else _CHUNK
    # A large sample is cut into groups of its rows.
    groups = math.gcd(length, 1 << (length * size // chunk).bit_length())
    units, length = rows * groups, length // groups
    step = max(min(chunk // max(length * size, 1), units), 1)
    source = x.permute(order).contiguous().view(1 if operation == "fork" else parts, units, length, size)
    target = result.permute(order).view(1 if operation == "join" else parts, units, length, size)
    choice = outer.flatten(2).expand(parts, rows, length * groups).reshape(parts, units, length, 1)
    plain = scale.repeat_interleave(groups, 1).expand(parts, units, 1, size).contiguous()
    holes = inner.flatten(2).unsqueeze(2).logical_not().repeat_interleave(groups, 1) * plain
    # Buffers for all chunks: memory allocated for one chunk would be mapped and cleared for each.
    buffer = scale.new_empty((parts, step, length, size))
    converted = scale.new_empty((len(source), step, length, size)) if x.dtype != wide else None
    factors = (source, target, plain, holes, choice)
    pieces = zip(*(factor.split(step, 1) for factor in factors), strict=True)  # type: ignore[no-untyped-call]
    for piece, out, start, end, weight in pieces:
        count = piece.shape[1]
        masks = torch.lerp(start, end, weight.to(wide), out=buffer[:, :count])
        products = out
        if converted is not None:
            piece, products = converted[:, :count].copy_(piece), masks
        if operation == "join":
            torch.mul(piece[0], masks[0], out=products[0])
            for part in range(1, parts):
                products[0].addcmul_(piece[part], masks[part])
        else:
            torch.mul(piece, masks, out=products)
        if converted is not None:
            out.copy_(products[: len(out)])
    return result
