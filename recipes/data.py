"""The splits of a data set, and the batches of a run.

Splits never change with the seed: an image is held out where the hash of its class and name is below the fraction.
"""

import hashlib
from collections import defaultdict
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
from sources import DATASETS, LIBRARIES, Source, library_set, measure_moments, resize_images
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
        """Return the entries about images in the header of the weights and in result.json."""
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
    source = open_source(config)
    train, test, test_name = split_source(config, source)
    labelled, unlabelled = choose_images(config, train, source.classes)
    labels = add_noise(config, [train.labels[index] for index in labelled], len(source.classes))
    labels += [-100] * len(unlabelled)
    chosen = train.select([*labelled, *unlabelled], labels=labels, seed=config.seed if config.augment else None)
    used = resolve_preprocessing(config)
    if isinstance(train, ImageFiles):
        used, channels = used or Preprocessing(), 3
        training, evaluation = source.transforms or timm_transforms(config, used)
        chosen = replace(chosen, transform=training if config.augment else evaluation)
        test = replace(test, transform=evaluation)
    else:
        chosen, test = (resize_images(pool, config.image_size) for pool in (chosen, test))
        used, channels = used or measure_moments(chosen.images), chosen.images.shape[1]
    if len(used.mean) != channels:  # grey images for weights that saw colours
        mean, std = (sum(values) / len(values) for values in (used.mean, used.std))
        used = replace(used, mean=(mean,) * channels, std=(std,) * channels)
    if config.test_corruption is not None:
        test = CorruptedImages(test, config.test_corruption, config.seed)
    lines = describe_data(config, source, train, chosen, len(labelled), test, test_name, used)
    shape = (channels, config.image_size, config.image_size)
    return ImageData(source.classes, chosen, len(labelled), test, shape, used, lines)


def open_source(config: "Config") -> Source:
    """Return the data set that the settings name."""
    name = config.dataset
    prefix, _, rest = name.partition("/")
    if rest and prefix in LIBRARIES:
        source = library_set(config, prefix, rest)
    elif name in DATASETS:
        source = DATASETS[name](config)
    else:
        known = [*DATASETS, "hfds/NAME", "torch/NAME"]
        raise RecipeError(f"unknown dataset {name!r}; {suggest(name, known)} Known: {', '.join(known)}")
    if config.num_classes not in (None, len(source.classes)):
        raise RecipeError(f"num_classes is {config.num_classes}, but {name} has {len(source.classes)} classes")
    if len(source.classes) < 2:
        raise RecipeError(f"{name} has one class ({', '.join(source.classes)}); expected two or more")
    return source


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


def rank_by_hash(pool: Pool, classes: Sequence[str], salt: str) -> dict[int, list[tuple[float, int]]]:
    """Return (hash in [0, 1), index) of each image, lowest first, by class; salt, class and file name make the hash."""
    ranked = defaultdict(list)
    for index, (label, name) in enumerate(zip(pool.labels, pool.names, strict=True)):
        digest = hashlib.sha256(f"{salt}/{classes[label]}/{Path(name).name}".encode()).digest()
        ranked[label].append((int.from_bytes(digest[:7], "big") / 2**56, index))
    return {label: sorted(images) for label, images in sorted(ranked.items())}


def hold_out(pool: Pool, classes: Sequence[str], fraction: float, salt: str) -> tuple[Pool, Pool]:
    """Split off, per class, the images whose hash is below the fraction: at least one, and not the last one."""
    held: set[int] = set()
    for images in rank_by_hash(pool, classes, salt).values():
        count = sum(share < fraction for share, _ in images)
        held |= {index for _, index in images[: min(max(count, 1), len(images) - 1)]}
    if not held:
        raise RecipeError("no image can be held out: every class has one image; add test images")
    return pool.select([index for index in range(len(pool)) if index not in held]), pool.select(sorted(held))


def choose_images(config: "Config", pool: Pool, classes: Sequence[str]) -> tuple[list[int], list[int]]:
    """Return (labelled, unlabelled) training images; the choice is the same for every seed.

    Raises:
        RecipeError: there are not that many.
    """
    from sklearn.model_selection import train_test_split

    ranked, each, total = rank_by_hash(pool, classes, "choice"), config.train_images_per_class, config.train_images
    kept = list(range(len(pool)))
    if each is not None:
        fewest = min(map(len, ranked.values()))
        if fewest < each:
            raise RecipeError(f"train_images_per_class is {each}; one class has {fewest} images")
        kept = sorted(index for images in ranked.values() for _, index in images[:each])
    elif total not in (None, len(pool)):
        try:
            kept = sorted(train_test_split(kept, train_size=total, stratify=pool.labels, random_state=0)[0])
        except ValueError as error:  # fewer than one image per class is taken or left, or a class has one image
            raise RecipeError(f"train_images is {total}; {config.dataset} has {len(pool)}: {error}") from error
    taken = set(kept)
    rest = sorted(image for images in ranked.values() for image in images if image[1] not in taken)
    if len(rest) < config.unlabelled_images:
        raise RecipeError(f"unlabelled_images is {config.unlabelled_images}; {len(rest)} training images are left")
    return kept, sorted(index for _, index in rest[: config.unlabelled_images])


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


def evaluation_batches(
    config: "Config", data: ImageData, indices: list[int], device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Return the evaluated images of these indices in order."""
    size = max(2, config.batch_size // config.accumulate_steps)
    batches = [indices[start : start + size] for start in range(0, len(indices), size)]
    return load_batches(config, data, data.test, batches, device)


def load_batches(
    config: "Config", data: ImageData, split: Any, batches: list[list[int]], device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield these batches, normalised, on the device; the loader draws from a generator of its own."""
    loader: Any = DataLoader(
        split, batch_sampler=batches, num_workers=config.num_workers, generator=torch.Generator(),
        pin_memory=device.type == "cuda",
    )  # fmt: skip
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    for images, labels in loader:
        ready = data.normalise(images.to(device, non_blocking=True))
        yield ready.contiguous(memory_format=layout), labels.to(device, non_blocking=True)
