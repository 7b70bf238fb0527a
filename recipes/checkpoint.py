"""The folder of a run: whole files, one process at a time, and checkpoints that continue bit for bit."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import load
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from settings import RecipeError
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor

if TYPE_CHECKING:
    from train import Config

FORMAT = 2  # of checkpoints; 1 had no checksums, other data orders and no version
STATE_FILE, SUMS_FILE, EMA_FILE = "state.json", "checksums.json", "ema.safetensors"
RESULTS = ("metrics.csv", "result.json", "model.safetensors", "best.safetensors", EMA_FILE)
CHECKPOINTS = ("checkpoint", "checkpoint.previous")
# settings that a resumed run may change: none of them changes what a step computes
FREE_ON_RESUME = {
    "output_dir", "max_steps", "resume", "checkpoint_steps", "trackers", "data_dir", "download", "num_workers",
}  # fmt: skip


@dataclass
class State:
    """How far a run has come, apart from weights and random states."""

    rows: list[dict[str, Any]] = field(default_factory=list)  # of metrics.csv, one per finished epoch
    step: int = 0  # optimizer steps in all
    epoch_steps: int = 0  # of the unfinished epoch
    sums: list[list[float]] = field(default_factory=list)  # results.SUMS of the unfinished epoch, per process
    train_seconds: float = 0.0  # of the unfinished epoch

    def advance(self) -> None:
        """Count one optimizer step."""
        self.step += 1
        self.epoch_steps += 1


class DamagedError(RecipeError):
    """A file of a checkpoint is not as it was written."""


# --- writing ---------------------------------------------------------------------------------------------------------


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Report a full disk or a folder that cannot be written in one line.

    Raises:
        RecipeError: a write inside failed.
    """
    try:
        yield
    except RecipeError:
        raise
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save and safetensors have errors of their own
        existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.is_dir())
        free = shutil.disk_usage(existing).free / 2**20
        complete = [name for name in CHECKPOINTS if (folder / name / STATE_FILE).exists()]
        kept = f"; {folder / complete[0]} is complete: continue with --resume auto" if complete else ""
        raise RecipeError(
            f"cannot write to output_dir {folder}: {error} ({free:.1f} MiB free there); make room, or name another "
            f"folder with --output_dir{kept}"
        ) from error


def lock_folder(folder: Path | str) -> FileLock:
    """Create a folder and hold it for this process until it ends, however it ends.

    Raises:
        RecipeError: another process works there, or the folder cannot be written.
    """
    folder = Path(folder)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock")
        try:
            lock.acquire(blocking=False)
        except Timeout as error:
            raise RecipeError(
                f"another process works in output_dir {folder}; wait for it, or name another folder with --output_dir"
            ) from error
    return lock


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file, then rename it: a killed run leaves the old file or the new one."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        write(temporary)
        allow_reading(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def allow_reading(path: Path) -> None:
    """Give a file the permissions that the user's umask asks for; safetensors writes files that only they can read."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)


def save_tensors(tensors: Mapping[str, Tensor], path: Path, about: dict[str, Any] | None = None) -> None:
    """Write weights as safetensors under the plain model's names, with one JSON entry in the header."""
    # cloned: safetensors refuses tensors that share memory, as tied weights do
    plain = {name.removeprefix("_orig_mod."): t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    # one entry: safetensors writes several in any order, and equal runs should leave equal files
    header = None if about is None else {"about": json.dumps(about)}
    write_atomically(path, lambda file: save_file(plain, file, metadata=header))


# --- checkpoints -----------------------------------------------------------------------------------------------------


def save_checkpoint(accelerator: Accelerator, config: "Config", state: State, ema: ModelEmaV3 | None) -> None:
    """Save the present state as output_dir/checkpoint and keep the one before; every process calls it.

    Accelerate saves weights, optimizer, scaler and every process's random state. A run killed at any moment leaves a
    complete `checkpoint` or a complete `checkpoint.previous`.

    Raises:
        RecipeError: the disk is full or cannot be written; the checkpoint before stays.
    """
    current, previous = (Path(config.output_dir) / name for name in CHECKPOINTS)
    temporary = current.with_name("checkpoint.tmp")
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)  # left by a killed run
        if current.exists():
            shutil.rmtree(previous, ignore_errors=True)  # so that the disk holds two of them, not three
    accelerator.wait_for_everyone()
    try:
        with writing(current.parent):
            accelerator.save_state(str(temporary))
        accelerator.wait_for_everyone()  # the other processes' random states are there now
        if accelerator.is_main_process:
            with writing(current.parent):
                if ema is not None:
                    save_tensors(ema.module.state_dict(), temporary / EMA_FILE)
                saved = {"format": FORMAT, "num_processes": accelerator.num_processes}
                saved |= {"state": asdict(state), "config": asdict(config)}
                (temporary / STATE_FILE).write_text(json.dumps(saved, indent=1, allow_nan=False))
                (temporary / SUMS_FILE).write_text(json.dumps(compute_checksums(temporary), indent=1))
                for path in temporary.rglob("*"):
                    if path.is_file():
                        allow_reading(path)
                        with path.open("rb") as file:
                            os.fsync(file.fileno())  # a rename can outlive a power cut that the files do not
                if current.exists():
                    current.rename(previous)
                temporary.rename(current)
    except RecipeError:
        shutil.rmtree(temporary, ignore_errors=True)  # so that the next attempt has the room
        raise
    accelerator.wait_for_everyone()


def compute_checksums(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file in a checkpoint but the list itself."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SUMS_FILE)
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def open_run(config: "Config", num_processes: int, steps_per_epoch: int) -> tuple[Path | None, State]:
    """Return (checkpoint folder, how far it had come), or (None, State()) for a fresh run. Writes nothing.

    Raises:
        RecipeError: output_dir holds another run, or the checkpoint is missing, damaged, or of other settings.
    """
    output_dir = Path(config.output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise RecipeError(f"output_dir {output_dir} is a file; name a folder, e.g. --output_dir runs/digits")
    held = [name for name in ("config.yaml", *RESULTS, *CHECKPOINTS) if (output_dir / name).exists()]
    folders = [output_dir / name for name in CHECKPOINTS if name in held]
    if config.resume is None and held:
        raise RecipeError(
            f"output_dir {output_dir} already holds a run ({', '.join(held)}); continue it with --resume auto, "
            "or name another folder with --output_dir"
        )
    if config.resume not in (None, "auto"):
        folders = [Path(str(config.resume))]
        if held and folders[0].resolve().parent != output_dir.resolve():
            raise RecipeError(
                f"output_dir {output_dir} already holds another run ({', '.join(held)}) than the checkpoint "
                f"{folders[0]}; name another folder with --output_dir"
            )
    elif not folders and set(held) & set(RESULTS):
        raise RecipeError(
            f"output_dir {output_dir} holds results ({', '.join(held)}) and no checkpoint to continue from; "
            "name another folder with --output_dir"
        )
    for folder in folders:
        try:
            return folder, read_state(folder, config, num_processes, steps_per_epoch)
        except DamagedError as error:
            if folder == folders[-1]:
                raise
            print(f"{error}; using {folders[-1]}", flush=True)
    return None, State()


def read_state(folder: Path, config: "Config", num_processes: int, steps_per_epoch: int) -> State:
    """Return how far a checkpoint's run had come, once it is sure that this run continues it.

    Raises:
        RecipeError: the checkpoint is damaged, or was written with other settings, processes or data.
    """
    saved = read_checked(folder)
    state = State(**saved["state"])
    # through JSON, as the saved one went; a setting that the run did not know had today's default
    now = json.loads(json.dumps(asdict(config)))
    before = {item.name: item.default for item in fields(config)} | saved["config"]
    changed = {key for key in before if before[key] != now.get(key)} - FREE_ON_RESUME
    if config.lr_schedule != "cosine" and config.drop_schedule == "constant" and config.warmup_epochs == 0:
        changed.discard("epochs")  # no schedule ends with the run
    if changed:
        listed = ", ".join(f"{key} (there {before[key]!r}, now {now.get(key)!r})" for key in sorted(changed))
        why = "; other epochs change the course of the learning rate or the drop rate" if "epochs" in changed else ""
        raise RecipeError(f"resume: {folder} was written with other settings: {listed}{why}")
    if saved["num_processes"] != num_processes:
        raise RecipeError(
            f"resume: {folder} was written by {saved['num_processes']} processes and this run has {num_processes}, "
            f"which would draw other masks; launch {saved['num_processes']}"
        )
    if len(state.rows) > config.epochs:
        raise RecipeError(f"resume: {folder} has {len(state.rows)} epochs; raise --epochs to at least that")
    if state.step > (config.max_steps or state.step):
        raise RecipeError(f"resume: {folder} is at step {state.step}; raise --max_steps to at least that")
    if state.step != len(state.rows) * steps_per_epoch + state.epoch_steps:
        raise RecipeError(f"resume: {folder} was written with other data: an epoch has {steps_per_epoch} steps here")
    return state


def read_checked(folder: Path) -> dict[str, Any]:
    """Return the content of state.json after comparing every file with its checksum.

    Raises:
        RecipeError: there is no checkpoint, or one of another format.
        DamagedError: a file is missing, or differs from what was written; names it.
    """
    lacking = [name for name in (STATE_FILE, SUMS_FILE) if not (folder / name).is_file()]
    if lacking == [SUMS_FILE] and '"format"' not in (folder / STATE_FILE).read_text(errors="replace"):
        raise RecipeError(f"resume: {folder} has format 1, without checksums; this version reads format {FORMAT}")
    if lacking:
        raise DamagedError(
            f"resume: {folder} is not a complete checkpoint (no {lacking[0]}); use --resume auto, or a folder that a "
            "run wrote, e.g. --resume runs/digits/checkpoint"
        )
    try:
        expected = dict(json.loads((folder / SUMS_FILE).read_text()))
    except (ValueError, TypeError) as error:
        raise DamagedError(f"resume: {folder / SUMS_FILE} is damaged: {error}") from error
    found = compute_checksums(folder)
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            fault = "is missing" if name not in found else f"does not match its checksum in {SUMS_FILE}"
            raise DamagedError(f"resume: {folder / name} {fault}: it was damaged or edited")
    saved: dict[str, Any] = json.loads((folder / STATE_FILE).read_text())
    if saved["format"] != FORMAT:
        raise RecipeError(f"resume: {folder} has format {saved['format']}; this version reads format {FORMAT}")
    return saved


def load_checkpoint(accelerator: Accelerator, folder: Path, ema: ModelEmaV3 | None) -> None:
    """Restore the state that save_checkpoint saved, random states included.

    Raises:
        RecipeError: the random states cannot be restored on this machine.
    """
    if ema is not None:
        ema.module.load_state_dict(load_file(folder / EMA_FILE))
    accelerator.load_state(str(folder))
    # Accelerate only logs, at INFO, when it could not restore these; the run would continue with other masks
    saved = load(folder / f"random_states_{accelerator.process_index}.pkl")  # weights_only
    now, before = [torch.get_rng_state()], [saved["torch_manual_seed"]]
    if torch.cuda.is_available():
        now += torch.cuda.get_rng_state_all()
        before += saved.get("torch_cuda_manual_seed", [])
    if len(now) > len(before) or not all(map(torch.equal, now, before)):
        raise RecipeError(f"resume: the random states in {folder} cannot be restored on this machine")


def adopt_run(accelerator: Accelerator, config: "Config", state: State, source: Path, ema: ModelEmaV3 | None) -> None:
    """Make another folder's run this folder's: its checkpoint, and its best weights where it still has them."""
    save_checkpoint(accelerator, config, state, ema)
    best = source / "best.safetensors"
    if accelerator.is_main_process and best.exists():
        with writing(Path(config.output_dir)):
            write_atomically(Path(config.output_dir) / best.name, lambda file: shutil.copyfile(best, file))
