"""What an epoch of training sums up, step by step, without waiting for the device; and what all processes agree on."""

import time

import torch
from accelerate import Accelerator
from torch import Tensor

from rblock_fx import RBlockLoss
from training.measure import SUMS, training_sums
from training.run_folder import State

NEVER = float("inf")  # the step of the first loss that is no number, where there was none


class Meter:
    """The sums of an epoch, which a checkpoint carries from one launch to the next.

    Args:
        state: where a launch before this one left the epoch.
        accelerator: whose processes add up.
        criterion: the loss, for its terms.
    """

    def __init__(self, state: State, accelerator: Accelerator, criterion: RBlockLoss) -> None:
        self.accelerator, self.criterion = accelerator, criterion
        mine = state.sums[accelerator.process_index] if state.sums else [0.0] * len(SUMS)
        self.sums = torch.tensor(mine, device=accelerator.device)
        self.bad_step = torch.tensor(NEVER, device=accelerator.device)
        self.started = time.perf_counter() - state.train_seconds

    @property
    def seconds(self) -> float:
        """What the epoch has taken so far, launches before this one included."""
        return time.perf_counter() - self.started

    def add(self, loss: Tensor, logits: Tensor, targets: Tensor, step: int) -> None:
        """Count one batch, and remember the step of the first loss that is not finite."""
        self.sums += training_sums(loss, logits, targets, self.criterion)
        self.bad_step = torch.where(torch.isfinite(loss), self.bad_step, self.bad_step.clamp(max=step))

    def agree(self, stop: bool) -> tuple[bool, int | None]:
        """Whether any process wishes to stop, and the first bad step of any: the same answer on all of them."""
        mine = torch.stack((self.bad_step.new_tensor(-float(stop)), self.bad_step))
        wish, step = self.accelerator.gather(mine[None]).amin(0).tolist()
        return wish < 0, None if step == NEVER else int(step)

    def store(self, state: State) -> None:
        """Write sums and time to the state; all processes call it."""
        state.sums = self.accelerator.gather(self.sums[None]).tolist()
        state.train_seconds = self.seconds
