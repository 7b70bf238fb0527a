"""One epoch of training: from where a launch before left it to its end, to a checkpoint, or to a wish to stop."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.progress import Progress
from torch import Tensor

from training.meter import Meter
from training.run import Run
from training.run_folder import State, save_checkpoint
from training.settings import Config, RecipeError

DEVICE_STEPS = 20  # steps between two looks at the losses on a GPU, each of which waits for it


def train_epoch(
    run: Run, loader: Any, state: State, signal_received: Callable[[], str | None], progress: Progress
) -> bool:
    """Train to the end of the epoch or of max_steps, or until a process is asked to stop, which gives True."""
    accelerator, config, epoch = run.accelerator, run.config, len(state.rows)
    last = min(run.steps_per_epoch, run.total_steps - epoch * run.steps_per_epoch)
    if state.epoch_steps == last:  # stopped between the last step and the evaluation
        return False
    bar = progress.add_task(f"epoch {epoch + 1}/{config.epochs}", total=last, completed=state.epoch_steps, told="")
    meter = Meter(state, accelerator, run.criterion)
    run.model.train()
    for images, targets in epoch_batches(run, loader, state):
        meter.add(*train_on(run, images, targets), run.step(state) + 1)
        if not accelerator.sync_gradients:
            continue
        state.epoch_steps += 1
        after_step(run, run.step(state))
        rate = state.epoch_steps * config.batch_size / meter.seconds
        left = timedelta(seconds=round((run.total_steps - run.step(state)) * config.batch_size / rate))
        progress.update(bar, completed=state.epoch_steps, told=f"{rate:,.0f} images/s, {left} left in all")
        at_end = state.epoch_steps == last
        due = config.checkpoint_steps is not None and run.step(state) % config.checkpoint_steps == 0
        if not (at_end or due or accelerator.device.type == "cpu" or state.epoch_steps % DEVICE_STEPS == 0):
            continue
        stop, bad_step = meter.agree(signal_received() is not None)
        if bad_step is not None:
            raise not_finite(config, bad_step, epoch)
        if at_end or due or stop:
            meter.store(state)
        if due and not stop and not at_end:
            save_checkpoint(accelerator, config, state)
        if at_end or stop:
            progress.remove_task(bar)
            return stop
    raise RecipeError(
        f"dataset {config.dataset} ended after {state.epoch_steps} steps of epoch {epoch + 1}; {last} were expected of "
        "it: some of its files are missing or hold fewer images than they say"
    )


def epoch_batches(run: Run, loader: Any, state: State) -> Any:
    """The batches of the present epoch that are not done yet; what they hold is a function of (seed, epoch)."""
    epoch = len(state.rows)
    if hasattr(run.data.train, "set_epoch"):
        run.data.train.set_epoch(epoch)
    if hasattr(loader, "set_epoch"):
        loader.set_epoch(epoch)
    done = state.epoch_steps * run.config.accumulate_steps
    return run.accelerator.skip_first_batches(loader, done) if done else loader


def train_on(run: Run, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Forward, backward and, where gradients are complete, the optimizer; (loss, logits, targets, mixed if so set)."""
    images, targets = run.images(images.to(run.accelerator.device)), targets.to(run.accelerator.device)
    if run.mix is not None:
        images, targets = run.mix(images, targets)
    with run.accelerator.accumulate(run.model):
        logits = run.model(images)
        loss = run.criterion(logits, targets)
        run.accelerator.backward(loss)
        if run.accelerator.sync_gradients and run.config.clip_grad_norm is not None:
            run.accelerator.clip_grad_norm_(run.model.parameters(), run.config.clip_grad_norm)
        run.optimizer.step()
        run.scheduler.step()
        run.optimizer.zero_grad()
    return loss.detach(), logits.detach(), targets


def after_step(run: Run, step: int) -> None:
    """What follows an optimizer step."""
    if run.drop_schedule is not None:
        run.drop_schedule.step()
    if run.ema is not None:
        run.ema.update(run.network, step)


def not_finite(config: Config, step: int, epoch: int) -> RecipeError:
    """The error of a loss that is no number; nothing has been saved since."""
    good = Path(config.output_dir) / "checkpoint"
    kept = f"the last good checkpoint is {good}" if good.exists() else "no checkpoint was written before it"
    return RecipeError(
        f"the loss is not finite at step {step} (epoch {epoch + 1}); {kept}; start anew with a lower --lr than "
        f"{config.lr} and another --output_dir"
    )
