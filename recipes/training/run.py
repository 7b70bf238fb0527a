"""What a step of training needs: Accelerate, the model as it wraps it, loss, optimizer, schedules."""

import os
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DataLoaderConfiguration, GradientAccumulationPlugin, LoggerType, ProjectConfiguration
from image_data import ImageData
from timm.data.mixup import Mixup
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn

from rblock_fx import DropSchedule, RBlockLoss
from training.optimise import make_scheduler
from training.run_folder import State
from training.settings import Config, RecipeError, near


def make_accelerator(config: Config) -> Accelerator:
    """Accelerate, with the same images in every step however many processes share them."""
    check_trackers(config.trackers)
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
            # an epoch ends with a whole optimizer step: what is left over of its images is left out
            gradient_accumulation_plugin=GradientAccumulationPlugin(
                config.accumulate_steps, sync_with_dataloader=False
            ),
            dynamo_backend="inductor" if config.compile else "no",
            log_with=config.trackers or None,
            project_config=ProjectConfiguration(config.output_dir, logging_dir=f"{config.output_dir}/logs"),
        )
    except ValueError as error:
        raise RecipeError(f"mixed_precision {config.mixed_precision}: {error}") from error
    if config.mixed_precision == "fp16" and accelerator.device.type == "cpu":  # Accelerate trains in float32 then
        raise RecipeError("mixed_precision fp16 needs a GPU, and there is none; expected --mixed_precision bf16 or no")
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != launched:  # else each would train on its own and write over the others' files
        raise RecipeError(
            f"{launched} processes were launched and Accelerate joined {accelerator.num_processes} of them"
        )
    return accelerator


def check_trackers(names: list[str]) -> None:
    """Refuse a tracker that Accelerate does not know, or whose package is missing, which it would leave out.

    Raises:
        RecipeError: so it is.
    """
    known = [name for name in LoggerType.list() if name != "all"]
    for name in names:
        if name not in known:
            raise RecipeError(f"trackers: unknown tracker {name!r}; {near(name, known)} Known: {', '.join(known)}")
        if name not in [str(tracker) for tracker in get_available_trackers()]:
            raise RecipeError(f"trackers: {name} is not installed; pip install {name}")


@dataclass(frozen=True)
class Run:
    """What a step of training needs; made once by `prepare_run`."""

    config: Config
    accelerator: Accelerator
    data: ImageData
    network: nn.Module  # bare
    model: Any  # the same as Accelerate wraps it
    criterion: RBlockLoss
    optimizer: Any
    scheduler: Any
    drop_schedule: DropSchedule | None
    ema: ModelEmaV3 | None
    mix: Mixup | None
    steps_per_epoch: int

    def step(self, state: State) -> int:
        """Optimizer steps so far."""
        return len(state.rows) * self.steps_per_epoch + state.epoch_steps

    @property
    def total_steps(self) -> int:
        """Optimizer steps in all."""
        planned = self.config.epochs * self.steps_per_epoch
        return min(planned, self.config.max_steps or planned)

    def images(self, images: Tensor) -> Tensor:
        """Images as the loader gives them -> as the network takes them."""
        prepared = self.data.normalise(images)
        return prepared.contiguous(memory_format=torch.channels_last) if self.config.channels_last else prepared


def prepare_run(
    config: Config, data: ImageData, network: nn.Module, accelerator: Accelerator, steps_per_epoch: int
) -> Run:
    """Model, optimizer and learning rate as Accelerate wraps them, loss, drop schedule, moving average and mixing."""
    network.to(accelerator.device)
    if config.channels_last:
        network.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        network.parameters(), config.lr, momentum=config.momentum, weight_decay=config.weight_decay
    )
    scheduler = make_scheduler(config, optimizer, steps_per_epoch)
    ema = None
    if config.ema_decay is not None:
        ema = ModelEmaV3(network, config.ema_decay, use_warmup=True)  # of the bare network: before it is wrapped
        accelerator.register_for_checkpointing(ema)
    linear = config.drop_schedule == "linear" and config.method != "none"
    total = config.epochs * steps_per_epoch
    mix = None
    if config.mixup > 0 or config.cutmix > 0:  # the criterion smooths, not this
        mix = Mixup(config.mixup, config.cutmix, label_smoothing=0.0, num_classes=data.num_classes)  # type: ignore[no-untyped-call]
    # Of N logits, which plain training and the single-model methods give, it is the plain cross-entropy.
    cross_entropy = nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)
    model, optimizer, scheduler = accelerator.prepare(network, optimizer, scheduler)
    return Run(
        config=config,
        accelerator=accelerator,
        data=data,
        network=network,
        model=model,
        criterion=RBlockLoss(cross_entropy, alpha=config.alpha, temperature=config.temperature),
        optimizer=optimizer,
        scheduler=scheduler,
        drop_schedule=DropSchedule(network, 0.0, config.drop_prob, total) if linear else None,
        ema=ema,
        mix=mix,
        steps_per_epoch=steps_per_epoch,
    )
