"""What a data set is to the training loop: two splits of (image, class index), and how they are normalised."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as tv
from training.settings import Config, RecipeError

from image_data.augment import draw_shifts, private_random, seed_of, shift_and_flip

Sample = tuple[Tensor, Tensor]  # image (C, H, W), class index as an int64 scalar
Read = Callable[[int], tuple[Image.Image, int]]  # the image and the class of an index


@dataclass(frozen=True)
class ImageData:
    """Two splits of (image, class index) and what the model and the training loop need to know of them.

    Images are uint8, or floats from 0 to 1; `normalise` takes a batch of either, on any device, and belongs to both
    splits. `train.set_epoch(epoch)` must be called before the epoch's iterator is made: it draws the augmentation.

    Where `streamed`, the splits are IterableDatasets that have already been shared out and must not go through
    Accelerator.prepare: `train` yields this process's own part, len(train) images in a fresh order each epoch, and
    `test` the whole test split in every process, so that every process arrives at the same figures without gathering.
    """

    train: Any  # ImageTensors, ImageFiles or StreamedImages, with set_epoch
    test: Any
    num_classes: int
    channels: int
    normalise: Callable[[Tensor], Tensor]  # (N, C, H, W) -> float (N, C, H, W)
    streamed: bool = False


def normaliser(mean: Sequence[float], std: Sequence[float]) -> Callable[[Tensor], Tensor]:
    """Scale uint8 to [0, 1], leave floats as they are, then subtract mean and divide by std, channel by channel."""

    def normalise(images: Tensor) -> Tensor:
        scaled: Tensor = tv.normalize(tv.to_dtype(images, torch.float32, scale=True), list(mean), list(std))
        return scaled

    return normalise


class ImageTensors(Dataset[Sample]):
    """Images held in memory, (N, C, H, W), each shifted and mirrored as (seed, epoch, index) say."""

    def __init__(self, images: Tensor, labels: Tensor, *, pad: int = 0, flip: bool = False, seed: int = 0) -> None:
        self.images, self.labels = images, labels
        self.pad, self.flip, self.seed = pad, flip, seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draw the shifts of an epoch, for all images at once."""
        self.shifts = draw_shifts(len(self.labels), self.pad, self.flip, self.seed, epoch)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Sample:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[Sample]:
        """A batch at a time, as torch's loader asks for it: one gather instead of one per image."""
        images = self.images[indices]
        if self.pad or self.flip:
            images = shift_and_flip(images, self.shifts[indices], self.pad)
        return list(zip(images, self.labels[indices], strict=True))


class ImageFiles(Dataset[Sample]):
    """Images read when asked for; with a seed, the transform draws as (seed, epoch, index) say."""

    def __init__(
        self, read: Read, indices: Sequence[int], transform: Callable[[Any], Tensor], *, seed: int | None = None
    ) -> None:
        self.read, self.indices, self.transform, self.seed = read, indices, transform, seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Take the draws of that epoch from now on."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Sample:
        image, label = self.read(self.indices[index])
        if self.seed is None:
            return self.transform(image), torch.tensor(label)
        with private_random(seed_of(self.seed, self.epoch, index)):
            return self.transform(image), torch.tensor(label)


def chosen(labels: Sequence[int] | None, count: int, config: Config) -> Sequence[int]:
    """The training images in use, as rising indices: all of count, or train_images of them, stratified by labels.

    The choice is the same for every seed, so that runs which differ in their seed train on the same images.

    Raises:
        RecipeError: there are not so many images, or not enough for one of each class.
    """
    from sklearn.model_selection import train_test_split

    if config.train_images is None or config.train_images == count:
        return range(count)
    assert labels is not None  # whoever passes none has refused train_images
    classes = len(set(labels))
    if not classes <= config.train_images <= count - classes:
        raise RecipeError(
            f"train_images is {config.train_images}; {config.dataset} has {count} training images of {classes} "
            f"classes: expected from {classes} to {count - classes}, or {count} for all, e.g. --train_images {classes}"
        )
    try:
        kept, _ = train_test_split(range(count), train_size=config.train_images, stratify=labels, random_state=0)
    except ValueError as error:  # a class of one image cannot be split
        raise RecipeError(
            f"train_images is {config.train_images}; {config.dataset} has no stratified subset: {error}"
        ) from error
    return sorted(kept)


def check_classes(dataset: str, train: Sequence[str], test: Sequence[str]) -> None:
    """Refuse fewer than two classes, and splits whose classes differ: equal indices would mean different things.

    Raises:
        RecipeError: either is so; the classes that only one split has are named.
    """
    if len(train) < 2:
        raise RecipeError(f"{dataset} has {len(train)} class ({', '.join(train)}); expected two or more to tell apart")
    if list(train) != list(test):
        only = [f"only in {split}: {', '.join(sorted(names)[:5])}{' ...' if len(names) > 5 else ''}"
                for split, names in (("train", set(train) - set(test)), ("test", set(test) - set(train)))
                if names]  # fmt: skip
        raise RecipeError(
            f"the training and test classes of {dataset} differ ({'; '.join(only) or 'in their order'}); expected the "
            f"same {len(train)} classes in both splits"
        )
