"""Train an image classifier plainly or as an R-Block model, on one process or many.

    accelerate launch recipes/train.py --config recipes/configs/digits.yaml
    accelerate launch recipes/train.py --config recipes/configs/digits.yaml --method none --output_dir runs/plain
    torchrun --nproc_per_node 2 recipes/train.py --config recipes/configs/digits.yaml --output_dir runs/two

The second trains the same network without R-Block; the third uses two processes, with a CPU too. Every setting stands
explained in the YAML. In output_dir: config.yaml, metrics.csv, checkpoint/, and at the end result.json, curves.png and
model.safetensors, the last epoch's weights under the plain timm model's names.
"""

import json
import math
import os
import platform
import time
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from curves import draw_curves
from data import ImageData, load_data
from rich.console import Console
from rich.progress import Progress
from run_folder import load_checkpoint, open_run, save_checkpoint, write_atomically, write_metrics
from safetensors.torch import save_file
from settings import Config, RecipeError, exit_with, near, read_config, to_yaml
from torch import Tensor, nn
from torch.utils.data import DataLoader

from rblock_fx import RBlockError, RBlockLoss, apply_rblock, describe

Row = dict[str, Any]  # one row of metrics.csv


def main() -> None:
    """Read the settings and train; a mistake in them is one line and exit code 2."""
    try:
        train(read_config())
    except (RecipeError, RBlockError) as error:
        exit_with(error)


def train(config: Config) -> None:
    """The whole run, top to bottom."""
    accelerator = make_accelerator(config)
    console = Console(quiet=not accelerator.is_main_process, soft_wrap=True, highlight=False, markup=False)
    # Each process draws its own masks and shifts. The initial weights are the main process's: DDP broadcasts them.
    set_seed(config.seed, device_specific=True)
    data = load_data(config.dataset, config.image_size)
    model = build_model(config, data)
    criterion = RBlockLoss(
        nn.CrossEntropyLoss(label_smoothing=config.label_smoothing), alpha=config.alpha, temperature=config.temperature
    )  # of N logits, which plain training and the single-model methods give, it is the plain cross-entropy
    train_loader, test_loader = make_loaders(config, data, accelerator)
    checkpoint, rows = open_run(config, accelerator.num_processes)

    optimizer = torch.optim.SGD(
        model.parameters(), config.lr, momentum=config.momentum, weight_decay=config.weight_decay
    )
    scheduler = make_scheduler(config, optimizer, steps_per_epoch=len(train_loader))
    if config.method != "none":
        console.print(describe(model))
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    if checkpoint is not None:
        load_checkpoint(accelerator, checkpoint)
        console.print(f"continuing {checkpoint} after epoch {len(rows)}")
    accelerator.wait_for_everyone()  # all have looked at output_dir; now the main process may write there
    if accelerator.is_main_process:
        start_folder(config)

    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("")
        for epoch in range(len(rows), config.epochs):
            started = time.perf_counter()
            train_loader.set_epoch(epoch)  # the order of the images is a function of (seed, epoch)
            row: Row = {"epoch": epoch + 1, "lr": scheduler.get_last_lr()[0]}
            progress.reset(bar, total=len(train_loader), description=f"epoch {epoch + 1}/{config.epochs}")
            batches = progress.track(train_loader, len(train_loader), task_id=bar)
            row |= train_one_epoch(model, batches, criterion, optimizer, scheduler, data, config, accelerator)
            row |= evaluate(model, test_loader, accelerator)
            row["seconds"] = round(time.perf_counter() - started, 3)
            if not math.isfinite(row["train_loss"]):
                raise RecipeError(f"the loss is {row['train_loss']} in epoch {epoch + 1}; lower --lr ({config.lr})")
            rows.append(row)
            save_checkpoint(accelerator, config, rows)
            if accelerator.is_main_process:
                write_metrics(rows, Path(config.output_dir) / "metrics.csv")
            console.print(line_of(row, config.epochs))
    weights = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        write_results(config, data, rows, weights, accelerator)
    console.print(f"top-1 {rows[-1]['test_top1']:.2f} % (best {best_top1(rows):.2f} %), written to {config.output_dir}")
    accelerator.end_training()


def make_accelerator(config: Config) -> Accelerator:
    """Accelerate, with the same images in every step however many processes share them."""
    loaders = DataLoaderConfiguration(
        split_batches=True,  # batch_size is what one step sees in all, so two processes take the steps of one
        use_seedable_sampler=True,
        data_seed=config.seed,  # else the shuffle starts from torch's seed, which differs between the processes
    )
    try:
        accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),  # else Accelerate leaves torchrun's CPU processes each alone
            mixed_precision=config.mixed_precision,
            dataloader_config=loaders,
        )
    except ValueError as error:
        raise RecipeError(f"mixed_precision {config.mixed_precision}: {error}") from error
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != launched:  # else each would train on its own and write over the others' files
        raise RecipeError(
            f"{launched} processes were launched and Accelerate joined {accelerator.num_processes} of them"
        )
    return accelerator


def build_model(config: Config, data: ImageData) -> nn.Module:
    """The timm model of that name, turned into an R-Block model unless the method is none."""
    if not timm.is_model(config.model):
        raise RecipeError(f"unknown model {config.model!r}; {near(config.model, timm.list_models())}")
    shape = (data.channels, config.image_size, config.image_size)
    try:
        model: nn.Module = timm.create_model(
            config.model, num_classes=data.num_classes, in_chans=data.channels, **config.model_kwargs
        )
        with torch.no_grad():  # a model that cannot take these images is better refused before anything is written
            model.eval()(torch.zeros(1, *shape))
    except Exception as error:  # whatever a constructor, or the hub that pretrained weights come from, makes of them
        raise RecipeError(
            f"model {config.model} with model_kwargs {config.model_kwargs} cannot be built or takes no images of "
            f"{shape}: {error}"
        ) from error
    model.train()
    if config.method != "none":
        apply_rblock(  # in place
            model,
            sites=config.sites,
            method=config.method,
            drop_prob=config.drop_prob,
            block_size=config.block_size,
            calibration=config.calibration,
            batch_norm=config.batch_norm,
            input_size=shape,
        )
    return model


def make_loaders(config: Config, data: ImageData, accelerator: Accelerator) -> tuple[Any, Any]:
    """Loaders over both splits, shared among the processes; training leaves a last ragged batch out."""
    size, processes = config.batch_size, accelerator.num_processes
    images = len(data.train)  # type: ignore[arg-type]  # torch's Dataset declares no length
    if size % processes or size // processes < 2 or size > images:
        raise RecipeError(
            f"batch_size is {size}; expected a multiple of the {processes} processes, with two images or more for each "
            f"and at most the {images} training images in all, e.g. --batch_size {max(2, 32 // processes) * processes}"
        )
    train = DataLoader(data.train, size, shuffle=True, drop_last=True, num_workers=config.num_workers)
    test = DataLoader(data.test, size, num_workers=config.num_workers)
    return accelerator.prepare(train), accelerator.prepare(test)


def make_scheduler(
    config: Config, optimizer: torch.optim.Optimizer, steps_per_epoch: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Learning rate by the step: a linear rise over warmup_epochs, then half a cosine down to zero."""
    total = config.epochs * steps_per_epoch
    warmup = min(config.warmup_epochs * steps_per_epoch, total // 2)  # a short run must come down from the top, too

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def train_one_epoch(
    model: nn.Module,
    batches: Any,
    criterion: RBlockLoss,
    optimizer: Any,
    scheduler: Any,
    data: ImageData,
    config: Config,
    accelerator: Accelerator,
) -> Row:
    """One pass over the training images: the loss that is optimised, and cross-entropy and top-1 with masks on."""
    model.train()
    sums = torch.zeros(4, device=accelerator.device)  # loss, cross-entropy, hits, and logits that they were summed over
    for images, targets in batches:
        logits = model(data.augment(images) if config.augment else images)
        loss = criterion(logits, targets)
        accelerator.backward(loss)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        with torch.no_grad():
            labels = targets.repeat(len(logits) // len(targets))  # a pair gives 2N logits for N targets
            sums += torch.stack((loss.detach() * len(labels), *errors_and_hits(logits, labels)))
    loss_sum, cross_entropy, hits, count = accelerator.reduce(sums).tolist()
    return {"train_loss": loss_sum / count, "train_ce": cross_entropy / count, "train_top1": 100 * hits / count}


@torch.no_grad()
def evaluate(model: nn.Module, loader: Any, accelerator: Accelerator) -> Row:
    """Cross-entropy and top-1 of the full network, masks off, over the whole test split."""
    model.eval()
    sums = torch.zeros(3, device=accelerator.device)
    for images, targets in loader:
        logits, labels = accelerator.gather_for_metrics((model(images), targets))  # drops the padding of the last batch
        sums += torch.stack(errors_and_hits(logits, labels))
    cross_entropy, hits, count = sums.tolist()
    return {"test_ce": cross_entropy / count, "test_top1": 100 * hits / count}


def errors_and_hits(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(summed cross-entropy, number of right answers, number of answers), as floats on the device."""
    cross_entropy = F.cross_entropy(logits, labels, reduction="sum")
    return cross_entropy, (logits.argmax(1) == labels).sum().float(), logits.new_tensor(len(labels))


def line_of(row: Row, epochs: int) -> str:
    """One row of metrics as a line to read."""
    return (
        f"epoch {row['epoch']:>{len(str(epochs))}}/{epochs}  lr {row['lr']:.4f}  train loss {row['train_loss']:.4f}  "
        f"cross-entropy {row['train_ce']:.4f} train, {row['test_ce']:.4f} test  "
        f"top-1 {row['train_top1']:.2f} % train, {row['test_top1']:.2f} % test  {row['seconds']:.1f} s"
    )


def best_top1(rows: list[Row]) -> float:
    """The best epoch's top-1 in percent; chosen by looking at the test images, so top1_last is the fairer figure."""
    return max(float(row["test_top1"]) for row in rows)


def start_folder(config: Config) -> None:
    """Create output_dir and write config.yaml there, from which the run can be repeated."""
    folder = Path(config.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # --resume belongs to one launch, not to the experiment
        write_atomically(folder / "config.yaml", lambda file: file.write_text(to_yaml(replace(config, resume=None))))
    except OSError as error:
        raise RecipeError(f"cannot write to output_dir {folder}: {error.strerror}") from error


def write_results(
    config: Config, data: ImageData, rows: list[Row], weights: dict[str, Tensor], accelerator: Accelerator
) -> None:
    """model.safetensors, curves.png and, last of all, result.json: where it exists, the run is complete."""
    folder = Path(config.output_dir)
    result = {
        "top1_best": best_top1(rows),
        "top1_last": rows[-1]["test_top1"],
        "epochs": len(rows),
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
    # cloned: safetensors refuses tensors that share memory, as tied weights do
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in weights.items()}
    title = f"{config.method}: {config.model} on {config.dataset}, top-1 {result['top1_last']:.2f} % at the last epoch"
    write_metrics(rows, folder / "metrics.csv")  # a run killed right after a checkpoint lacks the last row
    write_atomically(folder / "model.safetensors", lambda file: save_file(tensors, file))
    write_atomically(folder / "curves.png", lambda file: draw_curves(rows, title, file))
    write_atomically(folder / "result.json", lambda file: file.write_text(json.dumps(result, indent=2) + "\n"))


def versions() -> dict[str, str]:
    """What the figures were made with."""
    found = {"python": platform.python_version()}
    for name in ("torch", "timm", "accelerate", "rblock-fx", "scikit-learn", "safetensors"):
        try:
            found[name.replace("-", "_")] = version(name)
        except PackageNotFoundError:
            found[name.replace("-", "_")] = "not installed"  # run from a source tree on PYTHONPATH
    return found


if __name__ == "__main__":
    main()
