"""Augmentation that depends on (seed, epoch, index of the image) alone.

Not on torch's global generator, the order of the images, the number of processes or of loader workers: a run that is
resumed in the middle of an epoch, or repeated on more processes, sees the very same images.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def seed_of(*numbers: int) -> int:
    """A 32-bit seed mixed from numbers >= 0; unlike a sum, (seed 0, epoch 1) and (seed 1, epoch 0) do not meet."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def draw_shifts(count: int, pad: int, flip: bool, seed: int, epoch: int) -> Tensor:
    """One epoch's draws for all images: (count, 3) of top and left, each from 0 to 2 * pad, and mirrored, 0 or 1."""
    generator = torch.Generator().manual_seed(seed_of(seed, epoch))
    corners = torch.randint(2 * pad + 1, (count, 2), generator=generator)
    mirrored = torch.randint(2, (count, 1), generator=generator) if flip else torch.zeros(count, 1, dtype=torch.long)
    return torch.cat((corners, mirrored), dim=1)


def shift_and_flip(images: Tensor, shifts: Tensor, pad: int) -> Tensor:
    """Pad (N, C, H, W) with black, crop each image at its own (top, left), then mirror it if its third number is 1."""
    count, _, height, width = images.shape
    top, left, mirrored = shifts.unbind(1)
    # a view of every crop there is, (N, C, 2 * pad + 1, 2 * pad + 1, H, W), of which each image takes one
    crops = F.pad(images, [pad] * 4).unfold(2, height, 1).unfold(3, width, 1)
    taken = crops[torch.arange(count), :, top, left]
    return torch.where(mirrored.bool()[:, None, None, None], taken.flip(3), taken)


@contextmanager
def private_random(seed: int) -> Iterator[None]:
    """Seed Python's, NumPy's and torch's CPU generator, all of which transforms draw from, and put them back after."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
