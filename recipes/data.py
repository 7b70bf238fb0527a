"""The splits of a data set, and the batches of a run.

Splits never change with the seed: an image is held out where the hash of its class and name is below the fraction.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator
from images import CorruptedImages, ImageFiles, mix_seeds
from models import Preprocessing, resolve_preprocessing
from settings import RecipeError, suggest
from sources import DATASETS, LIBRARIES, Source, measure_moments, resized
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import functional as tv

if TYPE_CHECKING:
    from train import Config

DEFAULT_FRACTION = 0.1  # of a split that a data set does not have
Pool = Any  # ImageTensors or ImageFiles


@dataclass
class ImageData:
    """The splits of a run, and what the model and the training loop need to know about them."""

    name: str
    classes: list[str]
    train: Pool  # labelled images first, then those whose label is -100
    labelled: int
    test: Any  # the split that is evaluated
    shape: tuple[int, int, int]
    preprocessing: Preprocessing
    lines: list[str]

    def __str__(self) -> str:
        return "\n".join(self.lines)

    def normalise(self, images: Tensor) -> Tensor:
        """Return uint8 images, or floats in [0, 1], as the network takes them."""
        scaled = tv.to_dtype(images, torch.float32, scale=True)
        ready: Tensor = tv.normalize(scaled, list(self.preprocessing.mean), list(self.preprocessing.std))
        return ready

    def sample(self, count: int) -> Tensor:
        """Return the first evaluated images."""
        images = [image for image, _ in self.test.__getitems__(list(range(min(count, len(self.test)))))]
        return self.normalise(torch.stack(images))

    def about(self) -> dict[str, Any]:
        """Return what the header of the weights and result.json say about the images."""
        used = self.preprocessing
        return {
            "classes": self.classes, "in_chans": self.shape[0], "image_size": self.shape[1], "mean": list(used.mean),
            "std": list(used.std), "interpolation": used.interpolation, "crop_pct": used.crop_pct,
        }  # fmt: skip


def load_data(config: "Config") -> ImageData:
    """Return the splits of config.dataset.

    Raises:
        RecipeError: the data set is unknown, its files are missing or damaged, or the settings do not fit it.
    """
    name = config.dataset
    prefix, _, rest = name.partition("/")
    if rest and prefix.lower() in LIBRARIES:
        source = LIBRARIES[prefix.lower()](config, rest)
    elif name in DATASETS:
        source = DATASETS[name](config)
    else:
        known = [*DATASETS, "hfds/NAME", "torch/NAME"]
        raise RecipeError(f"unknown dataset {name!r}; {suggest(name, known)} Known: {', '.join(known)}")
    if config.num_classes not in (None, len(source.classes)):
        raise RecipeError(f"num_classes is {config.num_classes}, but {name} has {len(source.classes)} classes")
    if len(source.classes) < 2:
        raise RecipeError(f"{name} has one class ({', '.join(source.classes)}); expected two or more")
    train, test, test_name = split_source(config, source)
    labelled, unlabelled = choose_images(config, train)
    labels = add_noise(config, [train.labels[index] for index in labelled], len(source.classes))
    labels += [-100] * len(unlabelled)
    resolved = resolve_preprocessing(config)
    files = isinstance(train, ImageFiles)
    chosen = train.select([*labelled, *unlabelled], labels=labels, seed=config.seed if config.augment else None)
    if files:
        training, evaluation = source.transforms or timm_transforms(config, resolved or Preprocessing())
        chosen = replace(chosen, transform=training if config.augment else evaluation)
        test = replace(test, transform=evaluation)
    else:
        chosen, test = (resized(pool, config.image_size) for pool in (chosen, test))
    channels = 3 if files else chosen.images.shape[1]
    used = resolved or (Preprocessing() if files else measure_moments(chosen.images))
    if len(used.mean) != channels:  # grey images for weights that saw colours
        mean, std = (sum(values) / len(values) for values in (used.mean, used.std))
        used = replace(used, mean=(mean,) * channels, std=(std,) * channels)
    if config.test_corruption is not None:
        test = CorruptedImages(test, config.test_corruption, config.seed)
    lines = describe_data(config, source, train, chosen, len(labelled), test, test_name, used)
    shape = (channels, config.image_size, config.image_size)
    return ImageData(name, source.classes, chosen, len(labelled), test, shape, used, lines)


# --- splits ----------------------------------------------------------------------------------------------------------


def split_source(config: "Config", source: Source) -> tuple[Pool, Pool, str]:
    """Return (training images, evaluated images, where these are from)."""
    fraction = DEFAULT_FRACTION if config.val_fraction is None else config.val_fraction
    train, test, test_name = source.train, source.test, source.test_name
    percent = f"{fraction:.0%} of the training images, by hash"
    if test is None:
        train, test = hold_out(train, source.classes, fraction, "test")
        test_name = f"{percent}, as test"
    if config.evaluate_on == "validation" and source.validation is not None and config.val_fraction is None:
        return train, source.validation, "its own validation images"
    if config.evaluate_on == "validation" or (config.val_fraction and source.test is not None):
        train, validation = hold_out(train, source.classes, fraction, "validation")
        if config.evaluate_on == "validation":
            return train, validation, f"{percent}, as validation"
    return train, test, test_name


def hold_out(pool: Pool, classes: Sequence[str], fraction: float, salt: str) -> tuple[Pool, Pool]:
    """Split off, per class, the images whose hash is below the fraction: at least one, and not the last one."""
    held: list[int] = []
    for label, name in enumerate(classes):
        shares = {
            index: hash_share(salt, name, Path(pool.names[index]).name) for index in indices_of(pool.labels, label)
        }
        order = sorted(shares, key=shares.__getitem__)
        count = sum(share < fraction for share in shares.values())
        held += order[: min(max(count, 1), len(order) - 1)]
    if not held:
        raise RecipeError("no image can be held out: every class has one image; give test images of their own")
    taken = set(held)
    return pool.select([index for index in range(len(pool)) if index not in taken]), pool.select(sorted(held))


def hash_share(*words: str) -> float:
    """Return a number in [0, 1) that depends on these words alone."""
    return int.from_bytes(hashlib.sha256("/".join(words).encode()).digest()[:7], "big") / 2**56


def indices_of(labels: Sequence[int], label: int) -> list[int]:
    """Return where a label is."""
    return [index for index, other in enumerate(labels) if other == label]


def choose_images(config: "Config", pool: Pool) -> tuple[list[int], list[int]]:
    """Return (labelled, unlabelled) training images; the choice is the same for every seed.

    Raises:
        RecipeError: there are not that many.
    """
    from sklearn.model_selection import train_test_split

    total, present = len(pool), sorted(set(pool.labels))
    kept = list(range(total))
    if config.train_images_per_class is not None:
        by_hash = {i: hash_share("choice", Path(pool.names[i]).name) for i in kept}
        groups = [sorted(indices_of(pool.labels, label), key=by_hash.__getitem__) for label in present]
        fewest = min(map(len, groups))
        if fewest < config.train_images_per_class:
            raise RecipeError(
                f"train_images_per_class is {config.train_images_per_class}; one class has {fewest} images"
            )
        kept = sorted(index for group in groups for index in group[: config.train_images_per_class])
    elif config.train_images not in (None, total):
        asked = config.train_images or 0
        if not len(present) <= asked <= total - len(present):
            raise RecipeError(
                f"train_images is {asked}; {config.dataset} has {total} training images of {len(present)} classes: "
                f"expected from {len(present)} to {total - len(present)}, or {total} for all"
            )
        try:
            kept = sorted(train_test_split(kept, train_size=asked, stratify=pool.labels, random_state=0)[0])
        except ValueError as error:  # a class of one image cannot be split
            raise RecipeError(f"train_images: {config.dataset} has no stratified subset: {error}") from error
    rest = sorted(
        set(range(total)) - set(kept), key=lambda index: hash_share("unlabelled", Path(pool.names[index]).name)
    )
    if len(rest) < config.unlabelled_images:
        raise RecipeError(f"unlabelled_images is {config.unlabelled_images}; {len(rest)} training images are left")
    return kept, sorted(rest[: config.unlabelled_images])


def add_noise(config: "Config", labels: list[int], classes: int) -> list[int]:
    """Let a share of the labels become a class drawn uniformly from the others, as the seed says."""
    draws = np.random.default_rng(mix_seeds(config.seed, 1))
    wrong = draws.choice(len(labels), round(config.label_noise * len(labels)), replace=False)
    noisy = np.asarray(labels)
    noisy[wrong] = (noisy[wrong] + draws.integers(1, classes, len(wrong))) % classes
    return [int(label) for label in noisy]


def describe_data(
    config: "Config", source: Source, train: Pool, chosen: Pool, labelled: int, test: Any, test_name: str,
    used: Preprocessing,
) -> list[str]:  # fmt: skip
    """Return the first lines of a run: classes, images per split, what was left out and why, normalisation."""
    shown = ", ".join(source.classes[:10]) + (", ..." if len(source.classes) > 10 else "")
    unlabelled = f" and {len(chosen) - labelled} without labels" if len(chosen) > labelled else ""
    of = f" of {len(train)}" if labelled < len(train) else ""
    noise = f", {config.label_noise:.0%} of the labels wrong" if config.label_noise else ""
    corrupted = f", with {config.test_corruption}" if config.test_corruption else ""
    lines = [
        f"{config.dataset}: {len(source.classes)} classes ({shown})",
        f"training images: {labelled}{of}{unlabelled}{noise}",
        f"evaluated images: {len(test)} ({test_name}){corrupted}",
    ]
    lacking = [name for label, name in enumerate(source.classes) if label not in set(test.labels)]
    if lacking:
        lines.append(f"no evaluated images of {len(lacking)} classes: {', '.join(lacking[:5])}")
    lines += [f"left out: {count} ({why})" for why, count in sorted(source.left_out.items())]
    mean, std = ([round(value, 4) for value in values] for values in (used.mean, used.std))
    return [*lines, f"normalised by mean {mean} and deviation {std}, {used.source}"]


def timm_transforms(config: "Config", used: Preprocessing) -> tuple[Any, Any]:
    """Return timm's transforms for training and evaluation, of PIL images to uint8 (3, image_size, image_size).

    Training: a random part of 8 to 100 % of the area, scaled, and mirrored by half, without colour jitter: the usual
    recipe of a ResNet-50 on ImageNet.
    """
    size = (3, config.image_size, config.image_size)
    options: dict[str, Any] = {"interpolation": used.interpolation, "normalize": False}  # normalised on the device
    evaluation = create_transform(size, is_training=False, crop_pct=used.crop_pct, **options)
    return create_transform(size, is_training=True, color_jitter=0.0, **options), evaluation


# --- batches ---------------------------------------------------------------------------------------------------------


def count_steps(config: "Config", data: ImageData, processes: int) -> int:
    """Return the optimizer steps of an epoch; a ragged last batch is left out.

    Raises:
        RecipeError: batch_size cannot be shared among the processes, or there are fewer images.
    """
    parts = processes * config.accumulate_steps
    each, mixed = config.batch_size // parts, bool(config.mixup or config.cutmix)
    if config.batch_size % parts or each < 2 or config.batch_size > data.labelled or (mixed and each % 2):
        even = ", an even number of them for mixup and cutmix," if mixed else ""
        raise RecipeError(
            f"batch_size is {config.batch_size}; expected a multiple of {processes} processes times "
            f"{config.accumulate_steps} accumulate_steps, with two images or more for each{even} and at most the "
            f"{data.labelled} training images in all"
        )
    return data.labelled // config.batch_size


def train_batches(
    config: "Config", data: ImageData, epoch: int, done: int, last: int, accelerator: Accelerator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Return this process's batches of an epoch from step `done` to `last`; all is a function of (seed, epoch)."""
    data.train.set_epoch(epoch)
    parts = (last * config.accumulate_steps, accelerator.num_processes, -1)
    draws = np.random.default_rng(mix_seeds(config.seed, epoch, 2))
    taken = last * config.batch_size
    order = draws.permutation(data.labelled)[:taken].reshape(parts)
    extra = len(data.train) - data.labelled
    if extra:  # as many unlabelled images in each batch, over and over
        again = np.concatenate([draws.permutation(extra) for _ in range(-(-taken // extra))])[:taken]
        order = np.concatenate((order, data.labelled + again.reshape(parts)), axis=2)
    mine = order[done * config.accumulate_steps :, accelerator.process_index]
    return load_batches(config, data, data.train, mine.tolist(), accelerator.device)


def image_batches(
    config: "Config", data: ImageData, split: Any, indices: list[int], device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Return the images of these indices in order."""
    size = max(2, config.batch_size // config.accumulate_steps)
    return load_batches(config, data, split, [indices[i : i + size] for i in range(0, len(indices), size)], device)


def load_batches(
    config: "Config", data: ImageData, split: Any, batches: list[list[int]], device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield these batches, normalised, on the device; the loader draws from a generator of its own."""
    loader: Any = DataLoader(
        split, batch_sampler=batches, num_workers=config.num_workers, generator=torch.Generator(),
        pin_memory=device.type == "cuda",
    )  # fmt: skip
    for images, labels in loader:
        ready = data.normalise(images.to(device, non_blocking=True))
        layout = torch.channels_last if config.channels_last else torch.contiguous_format
        yield ready.contiguous(memory_format=layout), labels.to(device, non_blocking=True)
