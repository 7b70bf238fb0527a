"""The learning rate as a function of the optimizer step."""

import bisect
import math

import torch

from training.settings import Config


def learning_rate(config: Config, step: int, steps_per_epoch: int) -> float:
    """A linear rise over warmup_epochs, then half a cosine down to zero, or a fall by lr_gamma at each milestone.

    Args:
        config: the settings.
        step: optimizer steps done, from 0.
        steps_per_epoch: of them in an epoch.
    """
    total = config.epochs * steps_per_epoch
    warmup = min(config.warmup_epochs * steps_per_epoch, total // 2)  # a short run must come down from the top, too
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.lr_schedule == "multistep":
        return config.lr * float(config.lr_gamma ** bisect.bisect_right(config.milestones, step // steps_per_epoch))
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def make_scheduler(
    config: Config, optimizer: torch.optim.Optimizer, steps_per_epoch: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """The learning rate of each step as PyTorch's scheduler, which a checkpoint saves."""
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate(config, step, steps_per_epoch) / config.lr
    )
