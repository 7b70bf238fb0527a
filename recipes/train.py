"""Train an image classifier plainly or as an R-Block model, on one process or many.

    accelerate launch recipes/train.py --config recipes/configs/digits.yaml
    accelerate launch recipes/train.py --config recipes/configs/digits.yaml --method none --output_dir runs/plain
    torchrun --nproc_per_node 2 recipes/train.py --config recipes/configs/digits.yaml --output_dir runs/two

The second trains the same network without R-Block; the third uses two processes, with a CPU too. Every setting stands
explained in recipes/configs/digits.yaml. In output_dir: config.yaml, metrics.csv, checkpoint/ and best.safetensors, and
at the end model.safetensors, the last epoch's weights under the plain model's names, curves.png and result.json.
SIGINT and SIGTERM let the step finish and save; --resume auto goes on from there, or from any kill, bit for bit.
"""

import shutil
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast, broadcast_object_list, set_seed
from image_data import load_data
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from training.epoch import train_epoch
from training.loaders import held_out, make_loaders
from training.measure import Row, evaluate, train_inference_gap, training_row
from training.models import build_model
from training.optimise import learning_rate
from training.results import best_top1, line_of, start_folder, write_results, write_weights
from training.run import Run, make_accelerator, prepare_run
from training.run_folder import (
    State,
    claim,
    load_checkpoint,
    open_run,
    save_checkpoint,
    write_atomically,
    write_metrics,
    writing,
)
from training.settings import Config, RecipeError, exit_with, read_config
from training.stopping import listening

from rblock_fx import RBlockError, describe


def main() -> None:
    """Read the settings and train; a mistake in them is one line and exit code 2."""
    try:
        with listening() as signal_received:
            train(read_config(), signal_received)
    except (RecipeError, RBlockError) as error:
        exit_with(error)
    except KeyboardInterrupt:  # a second one: the first lets the step finish
        print("interrupted before the run could save; --resume auto goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)


def train(config: Config, signal_received: Callable[[], str | None] = lambda: None) -> None:
    """The whole run, top to bottom; it ends after the step in which signal_received gives a name."""
    accelerator = make_accelerator(config)
    console = Console(quiet=not accelerator.is_main_process, soft_wrap=True, highlight=False, markup=False)
    # Each process draws its own masks. The initial weights are the main process's: DDP broadcasts them.
    set_seed(config.seed, device_specific=True)
    data = load_data(config)
    network = build_model(config, data.num_classes, data.channels)
    train_loader, test_loader, steps_per_epoch = make_loaders(config, data, accelerator)
    checkpoint, state = open_run(config, accelerator.num_processes)
    if config.method != "none":
        console.print(describe(network))

    run = prepare_run(config, data, network, accelerator, steps_per_epoch)
    if checkpoint is not None:
        check_position(run, state, checkpoint)
        load_checkpoint(accelerator, checkpoint)
        console.print(f"continuing {checkpoint} after epoch {len(state.rows)}, step {run.step(state)}")
    if run.drop_schedule is not None:  # its position is a function of the step
        run.drop_schedule.load_state_dict(run.drop_schedule.state_dict() | {"steps_done": run.step(state)})
    accelerator.wait_for_everyone()  # all have looked at output_dir; now the main process may write there
    folder = Path(config.output_dir)
    with claim(folder) if accelerator.is_main_process else nullcontext():
        if accelerator.is_main_process:
            start_folder(config)
        if checkpoint is not None and checkpoint.resolve().parent != folder.resolve():
            adopt(accelerator, config, state, checkpoint.parent)
        if config.trackers:
            accelerator.init_trackers("rblock-fx")
        rows = train_epochs(run, train_loader, test_loader, state, console, signal_received)
        if rows:
            weights = accelerator.get_state_dict(run.model)  # all processes call it
            if accelerator.is_main_process:
                planned = config.epochs * steps_per_epoch
                write_results(config, data, rows, weights, run.ema, accelerator, rows[-1]["step"], planned)
    if rows:
        console.print(f"top-1 {rows[-1]['test_top1']:.2f} % (best {best_top1(rows):.2f} %), written to {folder}")
    accelerator.end_training()


def train_epochs(
    run: Run, train_loader: Any, test_loader: Any, state: State, console: Console,
    signal_received: Callable[[], str | None],
) -> list[Row]:  # fmt: skip
    """Train from a state to the end and save on the way; the rows of metrics.csv, none if a signal ended it before."""
    accelerator, config = run.accelerator, run.config
    with progress_bar(console) as progress:
        while run.step(state) < run.total_steps:
            if train_epoch(run, train_loader, state, signal_received, progress):
                save_checkpoint(accelerator, config, state)
                console.print(f"stopped at step {run.step(state)} and saved; --resume auto goes on from there")
                return []
            if state.epoch_steps < run.steps_per_epoch:
                break
            state = State([*state.rows, finish_epoch(run, test_loader, state, console)])
            save_checkpoint(accelerator, config, state)
            if accelerator.is_main_process:
                with writing(Path(config.output_dir)):
                    write_metrics(state.rows, Path(config.output_dir) / "metrics.csv")
    if not state.epoch_steps:
        return state.rows
    save_checkpoint(accelerator, config, state)  # max_steps ended it within an epoch, which a later run may finish
    return [*state.rows, finish_epoch(run, test_loader, state, console)]


def finish_epoch(run: Run, test_loader: Any, state: State, console: Console) -> Row:
    """Evaluate what the epoch has made, in one row of metrics.csv; keep the weights where they are the best so far."""
    accelerator, config, started = run.accelerator, run.config, time.perf_counter()
    images = state.epoch_steps * config.batch_size
    before = state.rows[-1] if state.rows else {"images_seen": 0, "wall_seconds": 0.0}
    row: Row = {
        "epoch": len(state.rows) + 1,
        "step": run.step(state),
        "images_seen": before["images_seen"] + images,
        "lr": learning_rate(config, len(state.rows) * run.steps_per_epoch, run.steps_per_epoch),  # of its first step
        "drop_prob": None if config.method == "none" else config.drop_prob,
    }
    if run.drop_schedule is not None:
        row["drop_prob"] = run.drop_schedule.drop_prob
    row |= training_row([sum(column) for column in zip(*state.sums, strict=True)])
    run.model.eval()
    row["test_ce"], row["test_top1"] = evaluate(run.model, test_loader, run.images, accelerator)
    row["ema_ce"], row["ema_top1"] = evaluate_ema(run, test_loader)
    # what the method costs: measuring the gap, which plain training does without, is not part of it
    seconds = state.train_seconds + time.perf_counter() - started
    row |= measure_gap(run)
    row["images_per_second"] = round(images / state.train_seconds, 1)
    row["train_seconds"], row["seconds"] = round(state.train_seconds, 3), round(seconds, 3)
    row["wall_seconds"] = round(before["wall_seconds"] + seconds, 3)
    row = broadcast_object_list([row])[0]  # seconds differ between processes, and the gap is the main one's
    console.print(line_of(row, config.epochs))
    weights = accelerator.get_state_dict(run.model)
    best = row["test_top1"] > max((r["test_top1"] for r in state.rows), default=-1.0)
    # part of an epoch, of which a later run may make a whole one, does not take the place of a whole one
    if accelerator.is_main_process and best and (state.epoch_steps == run.steps_per_epoch or not state.rows):
        with writing(Path(config.output_dir)):
            write_weights(weights, Path(config.output_dir) / "best.safetensors", row)
    accelerator.log({name: value for name, value in row.items() if value is not None}, step=row["step"])
    return row


def check_position(run: Run, state: State, checkpoint: Path) -> None:
    """Refuse a checkpoint that this run cannot have come to.

    Raises:
        RecipeError: it is beyond max_steps, or beyond the steps of an epoch.
    """
    if state.epoch_steps > run.steps_per_epoch:
        raise RecipeError(
            f"resume: {checkpoint} is at step {state.epoch_steps} of an epoch of {run.steps_per_epoch}; it was written "
            "with other data, or is damaged"
        )
    if run.step(state) > run.total_steps:
        raise RecipeError(
            f"resume: {checkpoint} is at step {run.step(state)}; expected --max_steps {run.step(state)} or more"
        )


def adopt(accelerator: Accelerator, config: Config, state: State, source: Path) -> None:
    """Make another folder's run this folder's: its checkpoint, and its best weights where it still has them."""
    save_checkpoint(accelerator, config, state)
    best = source / "best.safetensors"
    if accelerator.is_main_process and best.exists():
        with writing(Path(config.output_dir)):
            write_atomically(Path(config.output_dir) / best.name, lambda file: shutil.copyfile(best, file))


def evaluate_ema(run: Run, loader: Any) -> list[float | None]:
    """Cross-entropy and top-1 of the moving average; None where there is none."""
    if run.ema is None:
        return [None, None]
    for buffer in run.ema.module.buffers():  # batch statistics, which each process has of its own images
        broadcast(buffer)
    return [*evaluate(run.ema.module, loader, run.images, run.accelerator)]


def measure_gap(run: Run) -> Row:
    """The train/inference gap, by the main process; empty where nothing is masked or no image is asked for."""
    gap: Row = dict.fromkeys(("gap_kl", "gap_agreement", "drop_rate"))
    if run.accelerator.is_main_process and run.config.method != "none" and run.config.gap_images:
        batches = held_out(run.data.test, run.config)
        gap |= train_inference_gap(run.network, batches, run.images, run.config.seed)
    return gap


def progress_bar(console: Console) -> Progress:
    """Steps of the epoch, images per second, and the time of training that is left, on a terminal alone."""
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[told]}")]
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


if __name__ == "__main__":
    main()
