"""From the drop rate to the probability of a block centre (paper, section 3.3, Eq. 6-8).

Everything here is for one map of `shape` (*spatial), of any number of axes, and an odd `block_size` b = 2k + 1.
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

_NEWTON_STEPS = 8


def coverage(gamma: float, shape: Sequence[int], block_size: int) -> float:
    """Expected share of a map covered by blocks: Eq. 8, exact also for maps smaller than 2k and for 1-D and 3-D.

    A position is covered unless none of the centres that reach it is drawn: 1 - (1 - gamma)^v, where v is the number
    of positions in its window after clipping at the borders. Eq. 8 is the mean of this over a map with m, n >= 2k.

    Args:
        gamma: probability of a block centre at each position, in [0, 1].
        shape: the spatial shape of the map.
        block_size: side of a block, odd.
    """
    if gamma >= 1:
        return 1.0
    log_empty = math.log1p(-gamma)
    windows = _window_volumes(tuple(shape), block_size)
    return sum(count * -math.expm1(volume * log_empty) for volume, count in windows) / math.prod(shape)


@functools.lru_cache(maxsize=4096)
def block_centre_probability(
    drop_prob: float, shape: tuple[int, ...], block_size: int, calibration: str = "exact"
) -> float:
    """gamma, the probability of a block centre, for which a share `drop_prob` of the map is dropped.

    Args:
        drop_prob: share of the map to cover, in [0, 1).
        shape: the spatial shape of the map.
        block_size: side of a block, odd.
        calibration: "exact" inverts `coverage` (Eq. 8); "eq6" is p / b^d; "eq7" is DropBlock's p / b^d, corrected for
            the centres that keep a block inside the map.

    Raises:
        SettingError: "eq7" on a map smaller than a block, where Eq. 7 has no value.
    """
    if calibration == "exact":
        return _invert_coverage(drop_prob, shape, block_size)
    return _papers_gamma(drop_prob, shape, block_size, calibration)


def _invert_coverage(drop_prob: float, shape: tuple[int, ...], block_size: int) -> float:
    """Bisect: coverage rises with gamma, from 0 at 0 to 1 at 1; gamma <= drop_prob, since a block covers its centre."""
    low, high = 0.0, drop_prob
    while True:
        middle = (low + high) / 2
        if middle in (low, high):
            return high
        if coverage(middle, shape, block_size) < drop_prob:
            low = middle
        else:
            high = middle


def compiled_block_centre_probability(
    drop_prob: Tensor, shape: tuple[int, ...], block_size: int, calibration: str
) -> Tensor:
    """Gamma as a function of a 0-dim tensor, for maps whose size torch.compile meets, or leaves open, as it traces.

    With u = ln(1 - gamma), the uncovered share mean(e^(v u)) is convex and rises with u, so Newton's steps from the
    right of the root approach it without overshooting; eight of them reach float32's precision at every drop_prob < 1.
    """
    if calibration != "exact":
        return _papers_gamma(drop_prob, shape, block_size, calibration)
    volumes = _window_volume_map(shape, block_size, drop_prob.device)
    kept = 1 - drop_prob
    u = kept.log() / volumes.max()
    for _ in range(_NEWTON_STEPS):
        empty = (volumes * u).exp()
        u = u - (empty.mean() - kept) / (volumes * empty).mean()
    return -torch.expm1(u)


def _papers_gamma(drop_prob: RateT, shape: tuple[int, ...], block_size: int, calibration: str) -> RateT:
    """Eq. 6 and Eq. 7, with b^d and the sizes of d axes for the paper's b^2 and mn."""
    per_block = drop_prob / float(block_size) ** len(shape)
    if calibration == "eq6":
        return per_block
    if min(shape) < block_size:
        raise SettingError(
            f"calibration='eq7' has no value for block_size={block_size} on a map of {'x'.join(map(str, shape))}: "
            "Eq. 7 needs every side >= block_size. Use calibration='exact', which holds for every map."
        )
    return per_block * math.prod(shape) / math.prod(length - block_size + 1 for length in shape)


def _window_volume_map(shape: tuple[int, ...], block_size: int, device: torch.device) -> Tensor:
    """The volume of the clipped window at every position of a map."""
    k = block_size // 2
    volumes = torch.ones((), device=device)
    for length in shape:
        i = torch.arange(length, device=device)
        volumes = volumes.unsqueeze(-1) * ((i + k).clamp(max=length - 1) - (i - k).clamp(min=0) + 1)
    return volumes


@functools.lru_cache(maxsize=256)
def _window_volumes(shape: tuple[int, ...], block_size: int) -> tuple[tuple[int, int], ...]:
    """How many positions of the map have a clipped window of which volume: ((volume, positions), ...)."""
    k = block_size // 2
    spans = [Counter(min(i + k, length - 1) - max(i - k, 0) + 1 for i in range(length)) for length in shape]
    volumes: Counter[int] = Counter()
    for combination in itertools.product(*(span.items() for span in spans)):
        volumes[math.prod(side for side, _ in combination)] += math.prod(count for _, count in combination)
    return tuple(sorted(volumes.items()))
