"""From the drop rate to the probability of a block centre (paper, section 3.3, Eq. 6-8).

Everything here is for one map of `shape` (*spatial), with any number of axes, and an odd `block_size` b = 2k + 1.
"""

import functools
import itertools
import math
from collections import Counter
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from rblock_fx.errors import SettingError

CALIBRATIONS = ("exact", "eq6", "eq7")

RateT = TypeVar("RateT", float, Tensor)

# The coverage is right to 3.3e-16 up to drop_prob = 1 - 1e-6 (eight steps: 3.5e-7), and to 7.7e-10 at 1 - 1e-9.
_NEWTON_STEPS = 12


def coverage(gamma: float, shape: Sequence[int], block_size: int) -> float:
    """Compute the expected share of a map that blocks cover, in [0, 1]: Eq. 8, exact on every map.

    A position is covered unless none of the centres that reach it is drawn: 1 - (1 - gamma)^v, where v is the number
    of positions in its window after clipping at the borders. Eq. 8 is the mean of this over a map with m, n >= 2k.

    Args:
        gamma: probability of a block centre at each position, in [0, 1].
        shape: the spatial shape of the map.
        block_size: side of a block, odd.
    """
    if gamma >= 1:
        return 1.0
    return 1 - _uncovered_share(math.log1p(-gamma), _count_windows(tuple(shape), block_size))[0]


def block_centre_probability(
    drop_prob: RateT, shape: tuple[int, ...], block_size: int, calibration: str = "exact"
) -> RateT:
    """Compute gamma, the probability of a block centre, for which blocks cover a share `drop_prob` of the map.

    On a float this runs on the host in float64. On a 0-dim tensor it runs on the tensor's device, in float64 where the
    device has it, and follows the tensor's value under torch.compile without another graph.

    Args:
        drop_prob: share of the map to cover, in [0, 1).
        shape: the spatial shape of the map.
        block_size: side of a block, odd.
        calibration: "exact" inverts `coverage` (Eq. 8); "eq6" is p / b^d; "eq7" is DropBlock's p / b^d, corrected for
            the centres that keep a block inside the map. d is the number of axes.

    Raises:
        SettingError: calibration is "eq7" and a side of the map is smaller than block_size.
    """
    if calibration == "exact":
        return _invert_coverage(drop_prob, shape, block_size)
    gamma = drop_prob / float(block_size) ** len(shape)
    if calibration == "eq6":
        return gamma
    if min(shape) < block_size:
        raise SettingError(
            f"calibration='eq7' needs every side of the map >= block_size, got block_size={block_size} on a map of "
            f"{'x'.join(map(str, shape))}. Use calibration='exact'."
        )
    return gamma * math.prod(shape) / math.prod(length - block_size + 1 for length in shape)


def _invert_coverage(drop_prob: RateT, shape: tuple[int, ...], block_size: int) -> RateT:
    """Solve coverage(gamma) = drop_prob by Newton's method in u = ln(1 - gamma).

    The uncovered share, mean(e^(v u)), is convex and rises with u, so steps from the right of the root approach it
    without overshooting. ln(1 - drop_prob) / max(v) is at its right.
    """
    if isinstance(drop_prob, float | int):
        windows = _count_windows(shape, block_size)
        u = math.log1p(-drop_prob) / windows[-1][0]
        for _ in range(_NEWTON_STEPS):
            share, slope = _uncovered_share(u, windows)
            u -= (share - (1.0 - drop_prob)) / slope
        return 0.0 - math.expm1(u)
    wide = drop_prob.to(torch.float32 if drop_prob.device.type == "mps" else torch.float64)
    volumes = _map_windows(shape, block_size, wide)
    root = torch.log1p(-wide) / volumes.max()
    for _ in range(_NEWTON_STEPS):
        empty = (volumes * root).exp()
        root = root - (empty.mean() - (1 - wide)) / (volumes * empty).mean()
    return -torch.expm1(root).to(drop_prob.dtype)


def _uncovered_share(u: float, windows: tuple[tuple[int, int], ...]) -> tuple[float, float]:
    """Compute the share of a map without blocks, mean(e^(v u)), and its derivative in u."""
    terms = [(volume, count * math.exp(volume * u)) for volume, count in windows]
    total = sum(count for _, count in windows)
    return math.fsum(term for _, term in terms) / total, math.fsum(volume * term for volume, term in terms) / total


@functools.lru_cache(maxsize=256)
def _count_windows(shape: tuple[int, ...], block_size: int) -> tuple[tuple[int, int], ...]:
    """Count positions by the volume of their clipped window: ((volume, positions), ...), volumes ascending."""
    k = block_size // 2
    spans = [Counter(min(i + k, length - 1) - max(i - k, 0) + 1 for i in range(length)) for length in shape]
    volumes: Counter[int] = Counter()
    for combination in itertools.product(*(span.items() for span in spans)):
        volumes[math.prod(side for side, _ in combination)] += math.prod(count for _, count in combination)
    return tuple(sorted(volumes.items()))


def _map_windows(shape: tuple[int, ...], block_size: int, like: Tensor) -> Tensor:
    """Compute the volume of the clipped window at every position: (*spatial), for sizes that a compiler leaves open."""
    k = block_size // 2
    volumes = torch.ones((), device=like.device, dtype=like.dtype)
    for length in shape:
        i = torch.arange(length, device=like.device)
        volumes = volumes.unsqueeze(-1) * ((i + k).clamp(max=length - 1) - (i - k).clamp(min=0) + 1)
    return volumes
