"""The sets that lie as image files in folders: Tiny ImageNet and one's own."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import default_loader
from torchvision.transforms import v2
from training.settings import Config, RecipeError

from image_data.fetch import fetch_folder, folder_of
from image_data.splits import ImageData, ImageFiles, Read, check_classes, chosen, normaliser

Files = Sequence[tuple[str, int]]  # path and class index
Transform = Callable[[Any], Tensor]  # PIL image -> uint8 (3, H, W)

TINY_IMAGENET = "tiny-imagenet-200"
TINY_IMAGENET_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
TINY_IMAGENET_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"


def tiny_imagenet(config: Config) -> ImageData:
    """Tiny ImageNet: 100,000 training and 10,000 validation images of 64x64 in 200 classes; the latter are the test.

    (The 10,000 images of its own test folder have no published labels.) Images are decoded when asked for.

    Raises:
        RecipeError: it is not there and cannot be had, or its folders are not laid out as in the archive.
    """
    folder = folder_of(config)
    if not (folder / "wnids.txt").is_file():  # else data_dir names the extracted folder itself
        folder = fetch_folder(config, TINY_IMAGENET, TINY_IMAGENET_URL, TINY_IMAGENET_MD5)
    train = class_folders(config, folder / "train")
    val = folder / "val"
    if (val / "val_annotations.txt").is_file():
        classes, files = train.classes, annotated_files(val, train.class_to_idx)
    elif (val / "images").is_dir():
        raise RecipeError(f"{val} has images/ but no val_annotations.txt, which gives their classes; extract it again")
    else:  # one folder for each class, as many scripts rearrange it
        test = class_folders(config, val)
        classes, files = test.classes, test.samples
    check_classes(config.dataset, train.classes, classes)

    size = config.image_size
    whole: list[Any] = [v2.PILToTensor()] if size == 64 else [v2.Resize((size, size)), v2.PILToTensor()]
    # The paper names no augmentation for it. CIFAR's 4 pixels are kept, not doubled with the side: these photographs
    # fill their frame, and each pixel of shift puts black in place of picture.
    drawn = [v2.RandomCrop(size, padding=round(4 * size / 64)), v2.RandomHorizontalFlip()]
    augmented = v2.Compose([*whole, *drawn])
    return from_files(config, train.samples, files, len(train.classes), augmented, v2.Compose(whole))


def image_folder(config: Config) -> ImageData:
    """One's own images: data_dir/train/<class>/... and data_dir/val/<class>/..., or validation or test for val.

    Raises:
        RecipeError: the folders are not laid out so.
    """
    folder = folder_of(config)
    tests = [folder / name for name in ("val", "validation", "test") if (folder / name).is_dir()]
    if not (folder / "train").is_dir() or not tests:
        there = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) if folder.is_dir() else "no such folder"
        raise RecipeError(
            f"image_folder needs train/<class>/ and val/<class>/ (or validation/ or test/) in data_dir {folder}; "
            f"found: {there or 'nothing'}"
        )
    train, test = class_folders(config, folder / "train"), class_folders(config, tests[0])
    check_classes(config.dataset, train.classes, test.classes)
    return from_files(config, train.samples, test.samples, len(train.classes), *imagenet_transforms(config))


def class_folders(config: Config, folder: Path) -> ImageFolder:
    """The images below folder/<class>/, classes in alphabetical order.

    Raises:
        RecipeError: there is no such folder, none in it, or one without images.
    """
    try:
        return ImageFolder(folder)
    except OSError as error:
        raise RecipeError(
            f"{config.dataset} expects {folder}/<class>/ with images in each: {error}; see --data_dir"
        ) from error


def annotated_files(val: Path, class_to_idx: dict[str, int]) -> Files:
    """Tiny ImageNet's validation images as the archive has them: all in val/images, classes in val_annotations.txt.

    Raises:
        RecipeError: a line names a class that train/ has not, or an image that is not there, or is no such line.
    """
    files = []
    annotations, images = val / "val_annotations.txt", val / "images"
    present = {path.name for path in images.iterdir()} if images.is_dir() else set()
    for number, line in enumerate(annotations.read_text(errors="replace").splitlines(), start=1):
        name, wnid, *_ = [*line.split("\t"), ""]
        if wnid not in class_to_idx:
            raise RecipeError(
                f"{annotations}, line {number}: {name!r} is of class {wnid!r}, which has no folder in "
                f"{val.parent / 'train'}; expected <file><tab><class>"
            )
        if name not in present:
            raise RecipeError(f"{annotations}, line {number}: {images / name} is missing; extract the archive again")
        files.append((str(images / name), class_to_idx[wnid]))
    if not files:
        raise RecipeError(f"{annotations} is empty; extract the archive again")
    return files


def imagenet_transforms(config: Config) -> tuple[Transform, Transform]:
    """Timm's transforms for training and testing, of PIL images to uint8 (3, image_size, image_size).

    Training: a random part of 8 to 100 % of the area, scaled, and mirrored by half: the usual recipe of a ResNet-50 on
    ImageNet. timm's colour jitter is left out, which that recipe has not.
    """
    size = (3, config.image_size, config.image_size)
    test = create_transform(size, is_training=False, normalize=False)  # as uint8: it is normalised on the device
    if not config.augment:
        return test, test
    return create_transform(size, is_training=True, color_jitter=0.0, normalize=False), test


def from_files(
    config: Config, train: Files, test: Files, num_classes: int, augmented: Transform, plain: Transform
) -> ImageData:
    """Both splits from their files, normalised by ImageNet's published figures: these need no pass over the images."""
    kept = chosen([label for _, label in train], len(train), config)
    return from_readers(
        config, partial(read_file, train), kept, partial(read_file, test), range(len(test)), num_classes,
        augmented, plain,
    )  # fmt: skip


def from_readers(
    config: Config, train: Read, kept: Sequence[int], test: Read, test_kept: Sequence[int], num_classes: int,
    augmented: Transform, plain: Transform,
) -> ImageData:  # fmt: skip
    """Both splits from what reads an image and its class by index."""
    return ImageData(
        train=ImageFiles(train, kept, augmented, seed=config.seed)
        if config.augment
        else ImageFiles(train, kept, plain),
        test=ImageFiles(test, test_kept, plain),
        num_classes=num_classes,
        channels=3,
        normalise=normaliser(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    )


def read_file(files: Files, index: int) -> tuple[Image.Image, int]:
    """The image of that index as RGB, whatever it was stored as, and its class.

    Raises:
        RecipeError: it cannot be decoded.
    """
    path, label = files[index]
    with decoding(path):
        return default_loader(path), label


@contextmanager
def decoding(what: str) -> Iterator[None]:
    """Name the image that cannot be decoded.

    Raises:
        RecipeError: what Pillow makes of a missing, truncated or foreign file.
    """
    try:
        yield
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise RecipeError(f"cannot decode the image {what}: {error}; replace or remove it") from error
