"""What a run leaves behind for people to read: lines, weights, curves and result.json."""

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from image_data import ImageData
from safetensors.torch import save_file
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor

from training.curves import draw_curves
from training.measure import Row
from training.run_folder import write_atomically, write_metrics, writing
from training.settings import Config, to_yaml


def line_of(row: Row, epochs: int) -> str:
    """One row of metrics as a line to read."""
    ema = "" if row["ema_top1"] is None else f" ({row['ema_top1']:.2f} % averaged)"
    of = "" if row["train_kl"] is None else " of both sub-models"
    gap = "" if row["gap_kl"] is None else f"  gap {row['gap_kl']:.4f}"
    return (
        f"epoch {row['epoch']:>{len(str(epochs))}}/{epochs}  lr {row['lr']:.4f}  "
        f"train loss {row['train_loss']:.4f}{of}  "
        f"cross-entropy {row['train_ce']:.4f} train, {row['test_ce']:.4f} test  "
        f"top-1 {row['train_top1']:.2f} % train, {row['test_top1']:.2f} % test{ema}{gap}  "
        f"{row['images_per_second']:,.0f} images/s  {row['seconds']:.1f} s"
    )


def best_top1(rows: list[Row]) -> float:
    """The best epoch's top-1 in percent; chosen by looking at the test images, so top1_last is the fairer figure."""
    return max(float(row["test_top1"]) for row in rows)


def start_folder(config: Config) -> None:
    """Write config.yaml to output_dir, from which the run can be repeated."""
    folder = Path(config.output_dir)
    with writing(folder):
        # --resume belongs to one launch, not to the experiment
        write_atomically(folder / "config.yaml", lambda file: file.write_text(to_yaml(replace(config, resume=None))))


def write_weights(weights: Mapping[str, Tensor], path: Path, row: Row | None = None) -> None:
    """Weights as safetensors under the plain model's names, with the epoch and top-1 of a row in the file's header."""
    # cloned: safetensors refuses tensors that share memory, as tied weights do
    tensors = {
        name.removeprefix("_orig_mod."): tensor.detach().cpu().contiguous().clone() for name, tensor in weights.items()
    }
    about = None if row is None else json.dumps({"epoch": row["epoch"], "test_top1": row["test_top1"]})
    # one entry: safetensors writes several in any order, and equal runs should leave equal files
    write_atomically(path, lambda file: save_file(tensors, file, metadata=None if about is None else {"row": about}))


def write_results(
    config: Config,
    data: ImageData,
    rows: list[Row],
    weights: Mapping[str, Tensor],
    ema: ModelEmaV3 | None,
    accelerator: Accelerator,
    steps: int,
    planned_steps: int,
) -> None:
    """model.safetensors, curves.png and, last of all, result.json: where it exists, the run is complete."""
    folder, last = Path(config.output_dir), rows[-1]
    result: dict[str, Any] = {
        "top1_best": best_top1(rows),
        "top1_last": last["test_top1"],
        "top1_ema_last": last["ema_top1"],
        "gap_kl_last": last["gap_kl"],
        "epochs": len(rows),
        "steps": steps,
        "images_seen": last["images_seen"],
        "stopped_early": steps < planned_steps,  # by max_steps
        "seed": config.seed,
        "method": config.method,
        "num_processes": accelerator.num_processes,
        "wall_time_seconds": round(sum(row["seconds"] for row in rows), 3),  # of the epochs, evaluation included
        "num_classes": data.num_classes,
        "in_chans": data.channels,
        "device": str(accelerator.device),
        "num_threads": torch.get_num_threads(),
        "config": asdict(replace(config, resume=None)),
        "versions": versions(),
    }
    title = f"{config.method}: {config.model} on {config.dataset}, top-1 {result['top1_last']:.2f} % at the last epoch"
    with writing(folder):
        write_metrics(rows, folder / "metrics.csv")  # a run killed right after a checkpoint lacks the last row
        write_weights(weights, folder / "model.safetensors", last)
        if ema is not None:
            write_weights(ema.module.state_dict(), folder / "ema.safetensors", last)
        write_atomically(folder / "curves.png", lambda file: draw_curves(rows, title, file))
        write_atomically(folder / "result.json", lambda file: file.write_text(json.dumps(result, indent=2) + "\n"))


def versions() -> dict[str, str]:
    """What the figures were made with."""
    found = {"python": platform.python_version()}
    for name in ("torch", "torchvision", "timm", "accelerate", "rblock-fx", "scikit-learn", "safetensors"):
        try:
            found[name.replace("-", "_")] = version(name)
        except PackageNotFoundError:
            found[name.replace("-", "_")] = "not installed"  # run from a source tree on PYTHONPATH
    return found
