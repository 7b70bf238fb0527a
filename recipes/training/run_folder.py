"""The folder of a run: what may be written where, atomic files, and checkpoints that continue bit for bit."""

import csv
import errno
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import load
from filelock import FileLock, Timeout
from safetensors import SafetensorError

from training.settings import Config, RecipeError

STATE_FILE = "state.json"
RESULTS = ("metrics.csv", "result.json", "model.safetensors", "best.safetensors", "ema.safetensors", "curves.png")
CHECKPOINTS = ("checkpoint", "checkpoint.previous")
# settings that a resumed run may change: none of them changes what a step computes
FREE_ON_RESUME = {
    "output_dir", "max_steps", "resume", "checkpoint_steps", "trackers",
    "data_dir", "download", "num_workers",
}  # fmt: skip


@dataclass
class State:
    """How far a run has come, beside what Accelerate saves.

    Attributes:
        rows: the rows of metrics.csv, one per finished epoch.
        epoch_steps: optimizer steps done in the epoch that is not finished.
        sums: what has been summed up in it, per process (measure.SUMS).
        train_seconds: the time it has taken so far.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    epoch_steps: int = 0
    sums: list[list[float]] = field(default_factory=list)
    train_seconds: float = 0.0


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Tell a full disk, or a folder that cannot be written, in one line.

    Raises:
        RecipeError: a write inside failed.
    """
    try:
        yield
    except RecipeError:
        raise
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save and safetensors have errors of their own
        existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
        free = shutil.disk_usage(existing).free / 2**20
        complete = [name for name in CHECKPOINTS if (folder / name / STATE_FILE).exists()]
        kept = f"; {folder / complete[0]} is complete: continue with --resume auto" if complete else ""
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        # torch's and safetensors' own errors do not tell whether the disk is full
        may_be_full = not isinstance(error, OSError) or error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        remedy = f" ({free:.1f} MiB free there); make room, or" if may_be_full else ";"
        raise RecipeError(
            f"cannot write to output_dir {folder}: {reason}{remedy} name another folder with --output_dir{kept}"
        ) from error


def claim(folder: Path) -> FileLock:
    """Create the folder and hold it for this process, until it releases the lock or ends, however it ends.

    Raises:
        RecipeError: another process works there, or the folder cannot be written.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock")
        try:
            lock.acquire(blocking=False)
        except Timeout as error:
            raise RecipeError(
                f"another process works in output_dir {folder} at this moment; wait for it, or name another folder "
                "with --output_dir"
            ) from error
    return lock


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file, then rename it: a killed run leaves the old file or the new, never half."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)  # half a file on a full disk helps no one
        raise


def write_metrics(rows: list[dict[str, Any]], path: Path) -> None:
    """One CSV row per epoch; the whole file anew, so that a resumed run cannot leave a row twice."""
    table = io.StringIO()
    writer = csv.DictWriter(table, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, lambda file: file.write_text(table.getvalue()))


def open_run(config: Config, num_processes: int) -> tuple[Path | None, State]:
    """Where to continue, as (checkpoint folder, how far it had come); (None, State()) for a fresh run. Writes nothing.

    Raises:
        RecipeError: output_dir holds another run, or the checkpoint is missing, unreadable, or of other settings.
    """
    output_dir = Path(config.output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise RecipeError(f"output_dir {output_dir} is a file; name a folder, e.g. --output_dir runs/digits")
    held = [name for name in ("config.yaml", *RESULTS, *CHECKPOINTS) if (output_dir / name).exists()]
    if config.resume is None:
        if held:
            raise RecipeError(
                f"output_dir {output_dir} already holds a run ({', '.join(held)}); continue it with --resume auto, "
                "or name another folder with --output_dir"
            )
        return None, State()
    if config.resume == "auto":
        # checkpoint.previous alone: the run was killed between the two renames of save_checkpoint
        folder = next((output_dir / name for name in CHECKPOINTS if name in held), None)
        if folder is None:
            if set(held) & set(RESULTS):
                raise RecipeError(
                    f"output_dir {output_dir} holds results ({', '.join(held)}) and no checkpoint to continue from; "
                    "name another folder with --output_dir"
                )
            return None, State()
    else:
        folder = Path(config.resume)
        if held and folder.resolve().parent != output_dir.resolve():
            raise RecipeError(
                f"output_dir {output_dir} already holds another run ({', '.join(held)}) than the checkpoint {folder}; "
                "name another folder with --output_dir"
            )
    return folder, read_state(folder, config, num_processes)


def read_state(folder: Path, config: Config, num_processes: int) -> State:
    """How far a checkpoint's run had come, once it is sure that this run continues it."""
    try:
        saved = json.loads((folder / STATE_FILE).read_text())
        state, before, processes = State(**saved["state"]), dict(saved["config"]), int(saved["num_processes"])
        check_state(state, processes)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecipeError(
            f"resume: {folder} is no complete checkpoint ({STATE_FILE}: {type(error).__name__}); expected "
            "--resume auto or a folder that a run wrote, e.g. --resume runs/digits/checkpoint"
        ) from error
    now = json.loads(json.dumps(asdict(config)))  # through JSON, as the saved one went
    free = FREE_ON_RESUME | ({"epochs"} if epochs_change_nothing(config) else set())
    changed = [
        f"{key} (there {before.get(key)!r}, now {now.get(key)!r})"
        for key in sorted((before.keys() | now.keys()) - free)
        if before.get(key) != now.get(key)
    ]
    if changed:
        why = ""
        if "epochs" in now and before.get("epochs") != config.epochs and "epochs" not in free:
            why = "; other epochs would be another course of the learning rate or the drop rate, not more of this one"
        raise RecipeError(f"resume: {folder} was written with other settings: {', '.join(changed)}{why}")
    if processes != num_processes:
        raise RecipeError(
            f"resume: {folder} was written by {processes} processes and this run has {num_processes}, so that it "
            f"would not draw the same masks; launch {processes}"
        )
    if len(state.rows) > config.epochs:
        done = len(state.rows)
        raise RecipeError(f"resume: {folder} has {done} epochs already; expected --epochs {done} or more")
    return state


def check_state(state: State, processes: int) -> None:
    """Refuse a state that no run has written.

    Raises:
        ValueError: a value has the wrong type or length.
    """
    right = isinstance(state.rows, list) and all(isinstance(row, dict) and "test_top1" in row for row in state.rows)
    right = right and isinstance(state.epoch_steps, int) and state.epoch_steps >= 0
    right = right and isinstance(state.train_seconds, int | float)
    right = right and len(state.sums) == (processes if state.epoch_steps else 0)
    if not right:
        raise ValueError(f"{STATE_FILE} is not what a run writes")


def epochs_change_nothing(config: Config) -> bool:
    """Whether more epochs are more of the same: no schedule that ends with the run."""
    return config.lr_schedule != "cosine" and config.drop_schedule == "constant" and config.warmup_epochs == 0


def save_checkpoint(accelerator: Accelerator, config: Config, state: State) -> None:
    """Replace output_dir/checkpoint by the present state; all processes call it, between two optimizer steps.

    Accelerate saves weights, optimizer, scheduler, scaler, the moving average and every process's random state; the
    order of the images is a function of (seed, epoch). A run killed at any moment leaves a complete `checkpoint`, or a
    complete `checkpoint.previous`.

    Raises:
        RecipeError: the disk is full or cannot be written; the checkpoint before stays.
    """
    current = Path(config.output_dir) / CHECKPOINTS[0]
    temporary = current.with_name("checkpoint.tmp")
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)  # what a killed run left
    accelerator.wait_for_everyone()
    try:
        with writing(current.parent):
            accelerator.save_state(str(temporary))
        accelerator.wait_for_everyone()  # the other processes' random states lie there now
        if accelerator.is_main_process:
            with writing(current.parent):
                _finish_checkpoint(temporary, config, state, accelerator.num_processes)
    except RecipeError:
        shutil.rmtree(temporary, ignore_errors=True)  # so that the next attempt has the room
        raise
    accelerator.wait_for_everyone()


def _finish_checkpoint(temporary: Path, config: Config, state: State, num_processes: int) -> None:
    """Say how far the run had come, and put the checkpoint in the place of the one before."""
    current, previous = (Path(config.output_dir) / name for name in CHECKPOINTS)
    saved = {"state": asdict(state), "config": asdict(config), "num_processes": num_processes}
    (temporary / STATE_FILE).write_text(json.dumps(saved, indent=1))
    _sync(temporary)
    if current.exists():
        shutil.rmtree(previous, ignore_errors=True)
        current.rename(previous)
    temporary.rename(current)
    shutil.rmtree(previous, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Let the files reach the disk before a rename says that they are there: a rename can outlive a power cut alone."""
    for path in folder.iterdir():
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def load_checkpoint(accelerator: Accelerator, folder: Path) -> None:
    """Put back what save_checkpoint saved, random states included.

    Raises:
        RecipeError: a file is missing or damaged.
    """
    try:
        random_file = folder / f"random_states_{accelerator.process_index}.pkl"
        saved = load(random_file)
        accelerator.load_state(str(folder))
    except Exception as error:  # whatever safetensors, pickle or the file system make of a damaged file
        raise RecipeError(f"resume: {folder} cannot be read: {type(error).__name__}: {error}") from error
    # Accelerate only logs, at INFO, when it could not restore these; the run would go on with other masks.
    restored = torch.equal(torch.get_rng_state(), saved["torch_manual_seed"])
    if restored and torch.cuda.is_available():
        states = zip(torch.cuda.get_rng_state_all(), saved.get("torch_cuda_manual_seed", ()), strict=False)
        restored = "torch_cuda_manual_seed" in saved and all(torch.equal(now, then) for now, then in states)
    if not restored:
        raise RecipeError(f"resume: the random state in {random_file} could not be restored on this machine")
