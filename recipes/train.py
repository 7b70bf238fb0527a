"""Train an image classifier plainly or as an R-Block model, on one process or many.

    accelerate launch recipes/train.py --config recipes/configs/digits.yaml
    accelerate launch recipes/train.py --config recipes/configs/digits.yaml --method none --output_dir runs/plain
    torchrun --nproc_per_node 2 recipes/train.py --config recipes/configs/digits.yaml --output_dir runs/two

Settings first, then `train`, the whole run from top to bottom. A run writes to output_dir: config.yaml, metrics.csv,
checkpoint/, best.safetensors and, at the end, model.safetensors (the last epoch's weights under the plain model's
names) and result.json. SIGINT and SIGTERM let the step finish and save; --resume auto continues from there, or after
any kill, bit for bit on a CPU.
"""

import bisect
import math
import os
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import results
import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration, set_seed
from checkpoint import State, adopt_run, load_checkpoint, lock_folder, open_run, save_checkpoint
from data import count_steps, load_data, train_batches
from models import build_model
from results import Meter, Row
from settings import (
    ClosedUnitInterval,
    Count,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    RecipeError,
    Share,
    exit_with,
    listen_for_signals,
    parse,
    setting,
    suggest,
)
from timm.data.mixup import Mixup
from timm.optim import create_optimizer_v2, list_optimizers
from timm.utils.model_ema import ModelEmaV3
from torch import nn
from tqdm import tqdm

from rblock_fx import DropSchedule, RBlockError, RBlockLoss, apply_rblock, describe, verify

Method = Literal[
    "bdropdml", "sdropdml", "c-dropblock", "r-drop", "c-drop", "r-spatialdropout", "r-dropblock",  # pairs of sub-models
    "dropout", "spatialdropout", "dropblock",  # one model
    "none",  # plain training: the model is not touched
]  # fmt: skip


@dataclass(kw_only=True)
class Config:
    """Every setting of a run, with the text that --help prints."""

    # --- the run
    output_dir: str = setting(help="folder of the run; must not hold another one")
    epochs: PositiveInt = setting(help="passes over the training images")
    seed: NonNegativeInt = setting(0, "of weights, masks, augmentation, order and label noise; not of the splits")
    resume: str | None = setting(None, "auto: continue output_dir's checkpoint if there is one; or a checkpoint folder")
    max_steps: PositiveInt | None = setting(None, "end after this many optimizer steps, whatever epochs says")
    checkpoint_steps: PositiveInt | None = setting(None, "optimizer steps between checkpoints within an epoch")
    trackers: list[str] = setting([], "Accelerate's trackers by name, e.g. [tensorboard] (in output_dir/logs)")
    # --- data
    dataset: str = setting(help="digits, cifar10, cifar100, fashion_mnist, tiny_imagenet, image_folder, hfds/, torch/")
    data_dir: str | None = setting(None, "folder of the data set's files")
    download: bool = setting(True, "download what is missing there")
    image_size: PositiveInt = setting(help="pixels of a side")
    train_split: str = setting("train", "the training split of hfds/ and torch/ sets")
    test_split: str = setting("validation", "the test split of hfds/ and torch/ sets")
    num_classes: Count | None = setting(None, "of sets that do not name their classes")
    evaluate_on: Literal["test", "validation"] = setting("test", "the split that is measured after each epoch")
    val_fraction: Share | None = setting(None, "share of the training images held out; 0.1 where a set needs it")
    max_megapixels: PositiveFloat | None = setting(None, "leave out larger images of an image_folder")
    train_images: Count | None = setting(None, "train on a fixed stratified subset of this many images in all")
    train_images_per_class: PositiveInt | None = setting(None, "train on a fixed subset of this many images per class")
    label_noise: ClosedUnitInterval = setting(0.0, "share of the training labels that become another class")
    unlabelled_images: NonNegativeInt = setting(0, "further training images without labels, a batch in each step")
    test_corruption: Literal["occlusion", "noise", "blur", "contrast"] | None = setting(
        None, "of the evaluated images, fixed by seed"
    )
    augment: bool = setting(True, "vary the training images")
    num_workers: NonNegativeInt = setting(0, "loader processes for each training process")
    # --- model
    model: str = setting(help="any of timm, or cifar_resnet18, cifar_resnet34, cifar_vgg16, cifar_vgg16_bn")
    model_kwargs: dict[str, Any] = setting({}, "arguments of timm.create_model, e.g. {pretrained: true}")
    weights: str | None = setting(None, "weights on disk to start from; another classifier is left out")
    # --- R-Block
    method: Method = setting("bdropdml", "how two sub-models, or one, are masked; none: plain training")
    drop_prob: Share = setting(0.2, "share of the activations that the method drops")
    drop_schedule: Literal["constant", "linear"] = setting("constant", "linear: from 0 up to drop_prob over the run")
    block_size: PositiveInt = setting(3, "side of a block in positions of the map; odd")
    sites: list[int | str] | int | str | None = setting(None, "stages to mask, e.g. [layer3, layer4]; null: last two")
    calibration: Literal["exact", "eq6", "eq7"] = setting("exact", "block density from drop_prob")
    batch_norm: Literal["joint", "per_submodel"] = setting("joint", "batch statistics over both sub-models' rows")
    alpha: ClosedUnitInterval = setting(0.1, "weight of the KL term between the sub-models")
    temperature: PositiveFloat = setting(3.0, "of the softmax inside the KL term")
    divergence: Literal["softmax", "bernoulli", "mse"] | None = setting(None, "between sub-models; null: softmax")
    combine: Literal["mean", "sum"] = setting("mean", "of the sub-models' losses; the paper sums")
    gap_images: NonNegativeInt = setting(1000, "evaluated images on which the train/inference gap is measured")
    # --- optimisation
    batch_size: Count = setting(64, "images in one optimizer step, all processes together")
    accumulate_steps: PositiveInt = setting(1, "forwards and backwards that share an optimizer step's images")
    opt: str = setting("momentum", "timm's optimizer: momentum (SGD), sgd (Nesterov), adamw, lamb, ...")
    lr: PositiveFloat = setting(0.1, "learning rate at its highest")
    lr_schedule: Literal["cosine", "multistep", "constant"] = setting("cosine", "the learning rate after warm-up")
    milestones: list[PositiveInt] = setting([], "epochs after which multistep lowers the learning rate")
    lr_gamma: ClosedUnitInterval = setting(0.1, "factor of multistep at each milestone")
    warmup_epochs: NonNegativeInt = setting(0, "epochs over which the learning rate rises; at most half of the run")
    momentum: Share = setting(0.9, "of SGD")
    weight_decay: NonNegativeFloat = setting(5e-4, "of the weights")
    filter_bias_and_bn: bool = setting(True, "no weight decay on biases and norms; the paper decays all")
    layer_decay: PositiveFloat | None = setting(None, "factor of the learning rate from each layer to the one below")
    label_smoothing: Share = setting(0.0, "share of a target that is spread over all classes")
    mixup: NonNegativeFloat = setting(0.0, "alpha of mixup; 0 is off")
    cutmix: NonNegativeFloat = setting(0.0, "alpha of CutMix; 0 is off")
    clip_grad_norm: PositiveFloat | None = setting(None, "largest norm of the gradient")
    ema_decay: Share | None = setting(None, "of a moving average of the weights, e.g. 0.999, in ema.safetensors")
    mixed_precision: Literal["no", "bf16", "fp16"] = setting("no", "fp16 needs a GPU")
    channels_last: bool = setting(False, "memory format that tensor cores prefer")
    compile: bool = setting(False, "torch.compile")

    def __post_init__(self) -> None:
        """Refuse settings that do not go together."""
        if not self.output_dir:
            raise RecipeError("output_dir is empty; name a folder, e.g. --output_dir runs/digits")
        self.output_dir = str(Path(self.output_dir).expanduser())
        if bool(self.milestones) != (self.lr_schedule == "multistep"):
            raise RecipeError(f"milestones is {self.milestones}, but lr_schedule is {self.lr_schedule}; set both")
        rising = sorted(set(self.milestones)) == self.milestones
        if not rising or any(epoch >= self.epochs for epoch in self.milestones):
            raise RecipeError(f"milestones must be rising epochs below epochs={self.epochs}, got {self.milestones}")
        if self.opt not in list_optimizers():
            raise RecipeError(f"opt: unknown optimizer {self.opt!r}; {suggest(self.opt, map(str, list_optimizers()))}")
        if self.train_images and self.train_images_per_class:
            raise RecipeError("train_images and train_images_per_class are two ways to say one thing; set one")
        pair = self.method not in ("none", "dropout", "spatialdropout", "dropblock")
        if self.unlabelled_images and (not pair or self.mixup or self.cutmix):
            raise RecipeError("unlabelled_images needs a method with two sub-models, without mixup and cutmix")


def parse_settings(arguments: list[str] | None = None) -> Config:
    """Return the settings of a command line; RecipeError if there is a mistake in them."""
    return parse(Config, arguments, "Train an image classifier plainly or as an R-Block model.")  # type: ignore[no-any-return]


def train(config: Config, stop_requested: Callable[[], bool] = lambda: False) -> None:
    """Train, evaluate and save; ends early after the step in which stop_requested returns True."""
    accelerator = start_accelerator(config)
    set_seed(config.seed, device_specific=True)  # each process draws its own masks; DDP shares the main one's weights
    data = load_data(config)
    steps_per_epoch = count_steps(config, data, accelerator.num_processes)
    network = build_model(config, data)
    criterion: nn.Module = nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)
    if config.method != "none":
        apply_rblock(  # in place: in evaluation it is still the plain network
            network, config.sites, method=config.method, drop_prob=config.drop_prob, block_size=config.block_size,
            calibration=config.calibration, batch_norm=config.batch_norm, input_size=data.shape,
        )  # fmt: skip
        criterion = RBlockLoss(
            criterion, alpha=config.alpha, temperature=config.temperature, divergence=config.divergence,
            combine=config.combine, model=network,
        )  # fmt: skip
        data.lines.append(str(describe(network)))
    checkpoint, state = open_run(config, accelerator.num_processes, steps_per_epoch)
    accelerator.print(data)

    network.to(accelerator.device)
    if config.channels_last:
        network.to(memory_format=torch.channels_last)
    if config.method != "none":
        verify(network, data.sample(2).to(accelerator.device))
    optimizer = create_optimizer_v2(
        network, config.opt, config.lr, config.weight_decay, config.momentum,
        filter_bias_and_bn=config.filter_bias_and_bn, layer_decay=config.layer_decay,
    )  # fmt: skip
    ema = None if config.ema_decay is None else ModelEmaV3(network, config.ema_decay, use_warmup=True)
    drop_schedule = None
    if config.drop_schedule == "linear" and config.method != "none":
        drop_schedule = DropSchedule(network, 0.0, config.drop_prob, config.epochs * steps_per_epoch)
    mix = None
    if config.mixup or config.cutmix:  # the criterion smooths the labels
        mix = Mixup(config.mixup, config.cutmix, label_smoothing=0.0, num_classes=len(data.classes))
    model, optimizer = accelerator.prepare(network, optimizer)

    accelerator.wait_for_everyone()  # all have looked at output_dir; now the main process may write there
    with lock_folder(config.output_dir) if accelerator.is_main_process else nullcontext():
        if checkpoint is not None:
            load_checkpoint(accelerator, checkpoint, ema)
            accelerator.print(f"continuing {checkpoint} after epoch {len(state.rows)}, step {state.step}")
            if drop_schedule is not None:  # its position is a function of the step
                drop_schedule.load_state_dict(drop_schedule.state_dict() | {"steps_done": state.step})
            if checkpoint.resolve().parent != Path(config.output_dir).resolve():
                adopt_run(accelerator, config, state, checkpoint.parent, ema)
        if accelerator.is_main_process:
            results.write_config(config)
        if config.trackers:
            accelerator.init_trackers("rblock-fx")

        total_steps, rows = min(config.epochs * steps_per_epoch, config.max_steps or sys.maxsize), list(state.rows)
        while state.step < total_steps:
            epoch, last = len(rows), min(steps_per_epoch, total_steps - len(rows) * steps_per_epoch)
            meter = Meter(config, accelerator, criterion, state)
            model.train()
            batches = train_batches(config, data, epoch, state.epoch_steps, last, accelerator)
            for images, labels in tqdm(batches, f"epoch {epoch + 1}", leave=False, disable=not sys.stderr.isatty()):
                set_learning_rate(optimizer, learning_rate(config, state.step, steps_per_epoch))
                inputs, targets = (images, labels) if mix is None else mix(images, labels)
                with accelerator.accumulate(model):
                    output = model(inputs)  # N images, 2N rows of a pair: sub-model 1, then sub-model 2
                    loss = criterion(output, targets)  # N labels
                    accelerator.backward(loss)
                    if accelerator.sync_gradients and config.clip_grad_norm is not None:
                        accelerator.clip_grad_norm_(model.parameters(), config.clip_grad_norm)
                    optimizer.step()
                    optimizer.zero_grad()
                meter.add(loss.detach(), output.detach(), targets)
                if not accelerator.sync_gradients:
                    continue
                state.advance()
                if drop_schedule is not None:
                    drop_schedule.step()
                if ema is not None:
                    ema.update(network, state.step)
                due = config.checkpoint_steps is not None and state.step % config.checkpoint_steps == 0
                stop = meter.agree(stop_requested(), at_once=due or state.epoch_steps == last)
                if stop or (due and state.epoch_steps < last):
                    meter.store()
                    save_checkpoint(accelerator, config, state, ema)
                if stop:
                    accelerator.print(f"stopped at step {state.step} and saved; --resume auto continues from there")
                    accelerator.end_training()
                    return

            meter.store()
            started = time.perf_counter()
            row: Row = {
                "epoch": epoch + 1,
                "step": state.step,
                "images_seen": state.step * config.batch_size,
                "lr": learning_rate(config, epoch * steps_per_epoch, steps_per_epoch),  # of the epoch's first step
                "drop_prob": drop_schedule.drop_prob if drop_schedule is not None else config.drop_prob,
            }
            row |= meter.row() | ({"drop_prob": None} if config.method == "none" else {})
            row |= results.score_logits(*results.collect_logits(model, data, config, accelerator), "test")
            row |= dict.fromkeys(("ema_ce", "ema_top1", "ema_ece"))
            if ema is not None:
                row |= results.score_logits(*results.collect_logits(ema.module, data, config, accelerator), "ema")
            # the cost of the method; plain training measures no gap, so its time is left out
            seconds = state.train_seconds + time.perf_counter() - started
            row |= results.measure_gap(network, data, config, accelerator)
            row["images_per_second"] = round(state.epoch_steps * config.batch_size / state.train_seconds, 1)
            row["train_seconds"], row["seconds"] = round(state.train_seconds, 3), round(seconds, 3)
            row["wall_seconds"] = round(sum(before["seconds"] for before in rows) + row["seconds"], 3)
            accelerator.print(results.format_row(row, config.epochs))
            accelerator.log({name: value for name, value in row.items() if value is not None}, step=state.step)

            is_whole = state.epoch_steps == steps_per_epoch  # else max_steps ended the run within the epoch
            is_best = row["test_top1"] > max((before["test_top1"] for before in rows), default=-1.0)
            weights = accelerator.get_state_dict(model)  # every process calls it
            if accelerator.is_main_process and is_best and (is_whole or not rows):
                results.write_weights(config, data, weights, "best.safetensors", row)
            rows.append(row)
            state = State(list(rows), state.step) if is_whole else state
            save_checkpoint(accelerator, config, state, ema)
            if accelerator.is_main_process and is_whole:
                results.write_metrics(config, rows)

        weights = accelerator.get_state_dict(model)
        if accelerator.is_main_process:
            results.write_weights(config, data, weights, "model.safetensors", rows[-1])
            if ema is not None:
                results.write_weights(config, data, ema.module.state_dict(), "ema.safetensors", rows[-1])
            results.write_results(config, data, rows, config.epochs * steps_per_epoch, accelerator)
    best = results.find_best_top1(rows)
    accelerator.print(f"top-1 {rows[-1]['test_top1']:.2f} % (best {best:.2f} %), written to {config.output_dir}")
    accelerator.end_training()


def start_accelerator(config: Config) -> Accelerator:
    """Return Accelerate, once it is sure that it joined all processes and has what the settings ask for."""
    for name in set(config.trackers) - {str(tracker) for tracker in get_available_trackers()}:
        raise RecipeError(f"trackers: {name!r} is unknown to Accelerate, or not installed; pip install {name}")
    if config.mixed_precision == "fp16" and not torch.accelerator.is_available():  # Accelerate trains in float32 then
        raise RecipeError("mixed_precision fp16 needs a GPU, and there is none; use --mixed_precision bf16 or no")
    try:
        accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),  # else Accelerate leaves torchrun's CPU processes each alone
            mixed_precision=config.mixed_precision,
            gradient_accumulation_plugin=GradientAccumulationPlugin(
                config.accumulate_steps, sync_with_dataloader=False
            ),
            dynamo_backend="inductor" if config.compile else "no",
            log_with=config.trackers or None,
            project_config=ProjectConfiguration(config.output_dir, logging_dir=f"{config.output_dir}/logs"),
        )
    except ValueError as error:
        raise RecipeError(f"mixed_precision {config.mixed_precision}: {error}") from error
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != launched:  # else each would train alone and overwrite the others' files
        raise RecipeError(f"{launched} processes were launched, and Accelerate joined {accelerator.num_processes}")
    return accelerator


def learning_rate(config: Config, step: int, steps_per_epoch: int) -> float:
    """Return the learning rate of an optimizer step, counted from 0: a resumed run has nothing to restore.

    (timm's multistep falls one update early, and torch's schedulers ignore layer decay.)
    """
    total = config.epochs * steps_per_epoch
    warmup = min(config.warmup_epochs * steps_per_epoch, total // 2)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.lr_schedule == "multistep":
        return config.lr * float(config.lr_gamma ** bisect.bisect_right(config.milestones, step // steps_per_epoch))
    if config.lr_schedule == "constant":
        return config.lr
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def set_learning_rate(optimizer: Any, rate: float) -> None:
    """Set the learning rate of every parameter group; lr_scale is timm's layer decay."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)


def main() -> None:
    """Read the settings and train; a mistake in them is one line and exit status 2."""
    try:
        with listen_for_signals() as stop_requested:
            train(parse_settings(), stop_requested)
    except (RecipeError, RBlockError) as error:
        exit_with(error)
    except KeyboardInterrupt:  # a second one: the first lets the step finish
        print("interrupted before the run could save; --resume auto continues the last checkpoint", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
