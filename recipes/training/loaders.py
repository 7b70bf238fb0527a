"""Batches of a data set, shared among the processes."""

from collections.abc import Iterable
from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator
from image_data import ImageData
from torch.utils.data import DataLoader, Subset

from training.settings import Config, RecipeError


def make_loaders(config: Config, data: ImageData, accelerator: Accelerator) -> tuple[Any, Any, int]:
    """Loaders over both splits, and the optimizer steps of an epoch; training leaves a last ragged step out.

    A loader gives each process its share of a batch: batch_size / accumulate_steps / processes images.

    Raises:
        RecipeError: batch_size cannot be shared so, or there are fewer images than it.
    """
    images = check_batch_size(config, data, accelerator.num_processes)
    shares = config.accumulate_steps * (accelerator.num_processes if data.streamed else 1)
    size = config.batch_size // shares
    workers = config.num_workers
    # Loaders draw from generators of their own, so that a run that resumes within an epoch finds the masks' generator
    # as it left it.
    if data.streamed:  # their readers share them out among processes already
        train = DataLoader(data.train, size, drop_last=True, num_workers=workers, generator=torch.Generator())
    else:
        train = accelerator.prepare(
            DataLoader(data.train, size, shuffle=True, drop_last=True, num_workers=workers, generator=torch.Generator())
        )
    test = DataLoader(data.test, size, num_workers=workers, generator=torch.Generator())
    return train, test if data.streamed else accelerator.prepare(test), images // config.batch_size


def check_batch_size(config: Config, data: ImageData, processes: int) -> int:
    """The number of training images, once it is sure that batch_size can be shared."""
    size, images = config.batch_size, len(data.train)
    if data.streamed:  # which has this process's part alone
        images *= processes
    parts = processes * config.accumulate_steps
    mixed = config.mixup > 0 or config.cutmix > 0
    each = size // parts
    if size % parts or each < 2 or size > images or (mixed and each % 2):
        accumulated = f" and {config.accumulate_steps} accumulate_steps" if config.accumulate_steps > 1 else ""
        even = ", an even number of them for mixup and cutmix," if mixed else ""
        share = max(2, min(32, images) // parts)
        share -= share % 2 if mixed else 0
        raise RecipeError(
            f"batch_size is {size}; expected a multiple of {processes} process{'es' * (processes > 1)}{accumulated}, "
            f"with two images or more for each{even} and at most the {images} training images in all, e.g. "
            f"--batch_size {share * parts}"
        )
    return images


def held_out(split: Any, config: Config) -> Iterable[Any]:
    """Batches of gap_images test images: evenly spaced over the split, or the first of a stream."""
    size = max(2, config.batch_size // config.accumulate_steps)
    if isinstance(split, torch.utils.data.IterableDataset):
        return islice(DataLoader(split, size), -(-config.gap_images // size))
    count = min(config.gap_images, len(split))
    indices = [position * len(split) // count for position in range(count)]
    return DataLoader(Subset(split, indices), size, generator=torch.Generator())
