"""What a run measures, and the files that report it: metrics.csv, weights with a header, result.json."""

import csv
import io
import json
import math
import platform
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from importlib.metadata import distributions
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import broadcast, broadcast_object_list
from checkpoint import State, save_tensors, write_atomically, writing
from data import ImageData, evaluation_batches
from jsonargparse import Namespace
from settings import RecipeError, make_parser
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_calibration_error

from rblock_fx import RBlockError, describe, split_pair

if TYPE_CHECKING:
    from train import Config

Row = dict[str, Any]  # one row of metrics.csv
# summed over the images of an epoch; rows and what follows only for pairs, where rows counts unlabelled images too
SUMS = ("images", "loss", "cross_entropy", "hits", "rows", "divergence", "hits_1", "hits_2", "agreeing")
DEVICE_STEPS = 20  # steps between two looks at the losses on a GPU, each of which waits for it


class Meter:
    """The sums of an epoch, which a checkpoint carries from one launch to the next."""

    def __init__(self, config: "Config", accelerator: Accelerator, criterion: Any, state: State) -> None:
        self.config, self.accelerator, self.criterion, self.state = config, accelerator, criterion, state
        mine = state.sums[accelerator.process_index] if state.sums else [0.0] * len(SUMS)
        self.sums = torch.tensor(mine, device=accelerator.device)
        self.bad_step = torch.tensor(math.inf, device=accelerator.device)  # the first step whose loss is not finite
        self.started = time.perf_counter() - state.train_seconds

    @torch.no_grad()
    def add(self, loss: Tensor, output: Tensor, targets: Tensor) -> None:
        """Count one batch: output (2N, K) or (N, K); targets (N,), -100 where unlabelled, or (N, K) of mixed images."""
        self.bad_step = torch.where(torch.isfinite(loss), self.bad_step, self.bad_step.clamp(max=self.state.step + 1))
        labels = targets if targets.dim() == 1 else targets.argmax(1)
        count = (labels >= 0).sum()
        parts = split_pair(output.float()) if len(output) == 2 * len(labels) else (output.float(),)
        hits = [(part.argmax(1) == labels).sum() for part in parts]
        entropies = [F.cross_entropy(part, targets, reduction="sum") for part in parts]
        sums = [count, loss * count, sum(entropies) / len(parts), sum(hits) / len(parts)]
        if len(parts) == 2:
            rows = len(labels)
            divergence = self.criterion.terms(output, targets)[1] * rows
            sums += [rows, divergence, *hits, (parts[0].argmax(1) == parts[1].argmax(1)).sum()]
        sums += [0.0] * (len(SUMS) - len(sums))
        self.sums += torch.stack([torch.as_tensor(value, device=loss.device).float() for value in sums])

    def agree(self, stop: bool, at_once: bool) -> bool:
        """Return whether any process wants to stop; the same answer on all of them.

        Raises:
            RecipeError: a loss of any process was not finite.
        """
        if not (at_once or self.accelerator.device.type == "cpu" or self.state.epoch_steps % DEVICE_STEPS == 0):
            return False
        mine = torch.stack((self.bad_step.new_tensor(-float(stop)), self.bad_step))
        wish, step = self.accelerator.gather(mine[None]).amin(0).tolist()
        if step < math.inf:
            good = Path(self.config.output_dir) / "checkpoint"
            kept = f"the last good checkpoint is {good}" if good.exists() else "no checkpoint was written before it"
            raise RecipeError(
                f"the loss is not finite at step {int(step)} (epoch {len(self.state.rows) + 1}); {kept}; start again "
                f"with a lower --lr than {self.config.lr} and another --output_dir"
            )
        return bool(wish < 0)

    def store(self) -> None:
        """Write sums and time into the state; every process calls it."""
        self.state.sums = self.accelerator.gather(self.sums[None]).tolist()
        self.state.train_seconds = time.perf_counter() - self.started

    def row(self) -> Row:
        """Return the training columns of metrics.csv; those of pairs are empty for other methods."""
        total = dict(zip(SUMS, (sum(column) for column in zip(*self.state.sums, strict=True)), strict=True))
        count, rows = total["images"], total["rows"]
        return {
            "train_loss": total["loss"] / count,
            "train_ce": total["cross_entropy"] / count,
            "train_kl": total["divergence"] / rows if rows else None,
            "train_top1": 100 * total["hits"] / count,
            "train_top1_1": 100 * total["hits_1"] / count if rows else None,
            "train_top1_2": 100 * total["hits_2"] / count if rows else None,
            "train_agreement": 100 * total["agreeing"] / rows if rows else None,
        }


# --- the evaluated network -------------------------------------------------------------------------------------------


@torch.no_grad()
def collect_logits(
    model: nn.Module, data: ImageData, config: "Config", accelerator: Accelerator
) -> tuple[Tensor, Tensor]:
    """Return the logits (N, K) and labels (N,) of the evaluated split, in its order, on every process.

    Raises:
        RecipeError: a logit is not finite; names the image.
    """
    model.eval()
    for buffer in model.buffers():  # statistics of batch norm, which each process has of its own images
        broadcast(buffer)
    count, processes = len(data.test), accelerator.num_processes
    share = -(-count // processes)  # each process takes as many; the last repeats the last image, which is cut again
    first = accelerator.process_index * share
    indices = [min(index, count - 1) for index in range(first, first + share)]
    logits, labels = [], []
    for images, targets in evaluation_batches(config, data, indices, accelerator.device):
        with accelerator.autocast():
            logits.append(model(images).float())
        labels.append(targets)
    found = accelerator.gather(torch.cat(logits))[:count].cpu(), accelerator.gather(torch.cat(labels))[:count].cpu()
    bad = (~torch.isfinite(found[0])).any(1).nonzero().flatten().tolist()
    if bad:
        raise RecipeError(
            f"the network's outputs are not finite for {len(bad)} of {count} evaluated images, first for "
            f"{data.test.names[bad[0]]}: the weights, the statistics of batch norm, or that image are not finite"
        )
    return found


def score_logits(logits: Tensor, labels: Tensor, prefix: str) -> Row:
    """Return the mean negative log-likelihood (nats), top-1 and expected calibration error of 15 bins (both %)."""
    classes = logits.shape[1]
    calibration = multiclass_calibration_error(logits.softmax(1), labels, classes, n_bins=15)
    return {
        f"{prefix}_ce": F.cross_entropy(logits, labels).item(),
        f"{prefix}_top1": 100 * (logits.argmax(1) == labels).double().mean().item(),
        f"{prefix}_ece": 100 * calibration.item(),
    }


def measure_gap(network: nn.Module, data: ImageData, config: "Config", accelerator: Accelerator) -> Row:
    """Return the train/inference gap, measured by the main process; empty where nothing is masked."""
    gap: Row = dict.fromkeys(("gap_kl", "gap_agreement", "drop_rate"))
    if accelerator.is_main_process and config.method != "none" and config.gap_images:
        count = min(config.gap_images, len(data.test))
        indices = [position * len(data.test) // count for position in range(count)]  # evenly spaced over the split
        batches = evaluation_batches(config, data, indices, accelerator.device)
        try:
            gap |= train_inference_gap(network, (images for images, _ in batches), config.seed)
        except RBlockError as error:
            accelerator.print(f"the train/inference gap is not measured: {error}")
    found: Row = broadcast_object_list([gap])[0]
    return found


@torch.no_grad()
def train_inference_gap(network: nn.Module, batches: Iterator[Tensor], seed: int) -> Row:
    """Compare a sub-model with the full network on held-out images.

    gap_kl is KL(full network || sub-model) in nats, gap_agreement the share of images (%) for which both name the same
    class, each a mean over images and sub-models; drop_rate is the share of non-zero activations at the sites that a
    sub-model loses. Batch norm uses its running statistics in both, so only the masks differ; they are drawn from a
    generator of their own, and training continues as if nothing had been measured.
    """
    divergence, agreeing, count = 0.0, 0, 0
    device = next(network.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []), counting_drops(network) as dropped:
        torch.manual_seed(seed)
        for images in batches:
            network.eval()
            full = network(images).float().log_softmax(1)
            for site in describe(network).sites:  # the traced modules train; all inside of them stays in evaluation
                for depth in range(site.path.count(".") + 1):
                    network.get_submodule(".".join(site.path.split(".")[:depth])).training = True
            masked = network(images).float().log_softmax(1)
            full = full.repeat(len(masked) // len(full), 1)
            divergence += F.kl_div(masked, full, reduction="sum", log_target=True).item()
            agreeing += int((masked.argmax(1) == full.argmax(1)).sum())
            count += len(masked)
    network.eval()
    lost, active = dropped
    gap = {"gap_kl": divergence / count, "gap_agreement": 100 * agreeing / count, "drop_rate": lost / max(active, 1)}
    return {name: value if math.isfinite(value) else None for name, value in gap.items()}


@contextmanager
def counting_drops(network: nn.Module) -> Iterator[list[int]]:
    """Yield [activations that masks set to zero, activations that were not zero before], over all calls inside."""
    counts = [0, 0]

    def count(_mask: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        active = inputs[0] != 0
        active = active.repeat(len(output) // len(active), *(1 for _ in active.shape[1:]))
        counts[0] += int((active & (output == 0)).sum())
        counts[1] += int(active.sum())

    with ExitStack() as hooks:
        for site in describe(network).sites:
            for mask in site.masks:
                hooks.enter_context(mask.register_forward_hook(count))
        yield counts


# --- files -----------------------------------------------------------------------------------------------------------


def format_row(row: Row, epochs: int) -> str:
    """Return one row of metrics as a line to read."""
    ema = "" if row["ema_top1"] is None else f" ({row['ema_top1']:.2f} % averaged)"
    of = "" if row["train_kl"] is None else " of both sub-models"
    gap = "" if row["gap_kl"] is None else f"  gap {row['gap_kl']:.4f}"
    return (
        f"epoch {row['epoch']:>{len(str(epochs))}}/{epochs}  lr {row['lr']:.4f}  train loss {row['train_loss']:.4f}{of}"
        f"  cross-entropy {row['train_ce']:.4f} train, {row['test_ce']:.4f} test"
        f"  top-1 {row['train_top1']:.2f} % train, {row['test_top1']:.2f} % test{ema}"
        f"  calibration error {row['test_ece']:.2f} %{gap}  {row['images_per_second']:,.0f} images/s"
        f"  {row['seconds']:.1f} s"
    )


def find_best_top1(rows: list[Row]) -> float:
    """Return the best epoch's top-1 in percent; it was chosen by looking, so the last epoch's is the fairer figure."""
    return max(float(row["test_top1"]) for row in rows)


def write_config(config: "Config") -> None:
    """Write the settings as a YAML file that --config reads back; --resume belongs to one launch."""
    values = Namespace(asdict(replace(config, resume=None)))  # type: ignore[no-untyped-call]
    write_text(config, "config.yaml", str(make_parser(type(config)).dump(values, skip_unset=False)))


def write_text(config: "Config", name: str, text: str) -> None:
    """Write a text file into output_dir."""
    folder = Path(config.output_dir)
    with writing(folder):
        write_atomically(folder / name, lambda file: file.write_text(text))


def write_metrics(config: "Config", rows: list[Row]) -> None:
    """Write one CSV row per epoch: the whole file, so that a resumed run cannot repeat a row."""
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    write_text(config, "metrics.csv", table.getvalue())


def write_weights(config: "Config", data: ImageData, weights: dict[str, Tensor], name: str, row: Row) -> None:
    """Write weights with all that predict.py needs in the header: model, classes, normalisation, and the epoch."""
    about = {"epoch": row["epoch"], "test_top1": row["test_top1"], "model": config.model}
    about |= {"model_kwargs": config.model_kwargs, **data.about()}
    folder = Path(config.output_dir)
    with writing(folder):
        save_tensors(weights, folder / name, about)


def write_results(config: "Config", data: ImageData, rows: list[Row], planned: int, accelerator: Accelerator) -> None:
    """Write metrics.csv and, last of all, result.json: where it exists, the run is complete."""
    last = rows[-1]
    result = {
        "top1_best": find_best_top1(rows),
        "top1_last": last["test_top1"],
        "nll_last": last["test_ce"],
        "ece_last": last["test_ece"],
        "top1_ema_last": last["ema_top1"],
        "gap_kl_last": last["gap_kl"],
        "epochs": len(rows),
        "steps": last["step"],
        "images_seen": last["images_seen"],
        "stopped_early": last["step"] < planned,  # by max_steps
        "seed": config.seed,
        "method": config.method,
        "evaluated_on": config.evaluate_on,
        "num_processes": accelerator.num_processes,
        "wall_time_seconds": round(sum(row["seconds"] for row in rows), 3),  # of the epochs, evaluation included
        "num_classes": len(data.classes),
        "model": config.model,
        **data.about(),
        "device": str(accelerator.device),
        "num_threads": torch.get_num_threads(),
        "config": asdict(replace(config, resume=None)),
        "versions": read_versions(),
    }
    write_metrics(config, rows)  # a run killed right after a checkpoint lacks the last row
    write_text(config, "result.json", json.dumps(result, indent=2, allow_nan=False) + "\n")


def read_versions() -> dict[str, str]:
    """Return the versions that the figures were made with; rblock_fx has none when it runs from its source tree."""
    installed = {each.name.lower(): each.version for each in distributions()}
    names = ("torch", "torchvision", "timm", "accelerate", "rblock-fx", "scikit-learn", "safetensors")
    found = {name.replace("-", "_"): installed.get(name, "not installed") for name in names}
    return {"python": platform.python_version(), **found}
