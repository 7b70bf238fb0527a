"""The sets that fit into memory: digits, CIFAR-10, CIFAR-100 and Fashion-MNIST."""

import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100, FashionMNIST
from torchvision.datasets.mnist import read_image_file, read_label_file
from torchvision.datasets.utils import check_integrity, extract_archive
from torchvision.transforms.v2 import functional as tv
from training.settings import Config, RecipeError

from image_data.fetch import BROKEN, downloading, fetch_folder, folder_of, missing, staging
from image_data.splits import ImageData, ImageTensors, chosen, normaliser

Pair = tuple[Tensor, Tensor]  # images (N, C, H, W) and labels (N,)
DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # of the package dataset-fashion-mnist


def digits(config: Config) -> ImageData:
    """scikit-learn's 1,797 real 8x8 images of handwritten digits; it comes inside the package.

    The 30 % test split (540 images) is stratified and always the same: the seed of a run must not choose its test set.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    raw = load_digits()
    train, test = train_test_split(range(len(raw.target)), test_size=0.3, stratify=raw.target, random_state=0)
    labels = torch.from_numpy(raw.target).long()
    images = torch.from_numpy(raw.images).float().unsqueeze(1) / 16  # floats: enlarged, 17 grey levels become many
    # once, up front: a small CNN halves 8x8 maps to nothing, and a region of a 1x1 map is no region
    images = F.interpolate(images, size=(config.image_size, config.image_size), mode="bilinear", antialias=True)
    # shifts by up to one pixel of the original; not mirrored, for a mirrored digit is another sign
    pad = max(1, config.image_size // 8)
    return in_memory(config, (images[train], labels[train]), (images[test], labels[test]), 10, pad, flip=False)


def cifar10(config: Config) -> ImageData:
    """CIFAR-10: 50,000 + 10,000 colour images of 32x32 in 10 classes (Krizhevsky 2009)."""
    return cifar(config, CIFAR10)


def cifar100(config: Config) -> ImageData:
    """CIFAR-100: 50,000 + 10,000 colour images of 32x32 in 100 classes (Krizhevsky 2009)."""
    return cifar(config, CIFAR100)


def cifar(config: Config, kind: type[CIFAR10]) -> ImageData:
    """Either CIFAR set in its Python version, every file checked by its MD5, padded by 4 and mirrored as is usual.

    Raises:
        RecipeError: it is not there and cannot be had, or one of its files is missing or damaged.
    """
    folder = fetch_folder(config, kind.base_folder, kind.url, kind.tgz_md5)
    for name, md5 in (*kind.train_list, *kind.test_list, (kind.meta["filename"], kind.meta["md5"])):
        if not check_integrity(folder / name, md5):
            fault = "is damaged: its MD5 is not " + md5 if (folder / name).exists() else "is missing"
            raise RecipeError(f"{folder / name} {fault}; delete {folder} and fetch it again from {kind.url}")
    splits = [kind(folder.parent, train=train) for train in (True, False)]
    train, test = (
        (torch.from_numpy(split.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(split.targets)) for split in splits
    )
    return in_memory(config, train, test, len(splits[0].classes), pad=4, flip=True)


def fashion_mnist(config: Config) -> ImageData:
    """Fashion-MNIST: 60,000 + 10,000 grey images of 28x28 in 10 classes (Xiao et al. 2017).

    Padded by 4 and mirrored like CIFAR, as random erasing (Zhong et al. 2020) trains it: a mirrored shoe is a shoe.

    Raises:
        RecipeError: it is not there and cannot be had, or one of its files is damaged.
    """
    folder = fashion_folder(config)
    train, test = (
        (read_idx(folder, f"{split}-images-idx3-ubyte", read_image_file).unsqueeze(1),
         read_idx(folder, f"{split}-labels-idx1-ubyte", read_label_file))
        for split in ("train", "t10k")
    )  # fmt: skip
    for images, labels in (train, test):
        if len(images) != len(labels) or labels.max() >= len(FashionMNIST.classes):
            raise RecipeError(
                f"the idx files of fashion_mnist in {folder} do not belong together: {len(images)} images, "
                f"{len(labels)} labels up to {labels.max()}; expected as many labels as images, from 0 to 9"
            )
    return in_memory(config, train, test, len(FashionMNIST.classes), pad=4, flip=True)


def fashion_folder(config: Config) -> Path:
    """The folder with the four idx files, each gzipped or not: data_dir, torchvision's subfolder of it, or Debian's.

    Raises:
        RecipeError: they are nowhere and may not, or cannot, be downloaded; or some of the four are missing.
    """
    root = folder_of(config)
    places = [root / "FashionMNIST" / "raw", root] + ([DEBIAN] if config.data_dir is None else [])
    names = [Path(name).stem for name, _ in FashionMNIST.resources]
    for place in places:
        lacking = [name for name in names if not any((place / (name + end)).is_file() for end in ("", ".gz"))]
        if not lacking:
            return place
        if len(lacking) < len(names):
            raise RecipeError(f"{place} has only some files of fashion_mnist; missing: {', '.join(lacking)} (or .gz)")
    source = FashionMNIST.mirrors[0]
    if not config.download:
        raise missing(config, f"{', '.join(names)}, each as it is or as .gz,", source)
    with staging(root) as temporary:
        if not places[0].is_dir():  # else another process was quicker
            with downloading(source, config):
                FashionMNIST(temporary, download=True)
            os.replace(temporary / "FashionMNIST", root / "FashionMNIST")
    return places[0]


def read_idx(folder: Path, name: str, read: Callable[[str], Tensor]) -> Tensor:
    """The tensor in an idx file, gzipped or not.

    Raises:
        RecipeError: the file is truncated or no idx file.
    """
    path = folder / name if (folder / name).is_file() else folder / f"{name}.gz"
    try:
        if path.suffix != ".gz":
            return read(str(path))
        with TemporaryDirectory() as temporary:
            extract_archive(path, Path(temporary))
            return read(str(Path(temporary) / name))
    except (*BROKEN, ValueError, TypeError, AssertionError, RuntimeError, KeyError) as error:
        raise RecipeError(
            f"{path} is no whole idx file: {str(error) or type(error).__name__}; fetch it again"
        ) from error


def in_memory(config: Config, train: Pair, test: Pair, num_classes: int, pad: int, flip: bool) -> ImageData:
    """Both splits at image_size, with the mean and standard deviation of the training images in use."""
    kept = torch.as_tensor(list(chosen(train[1].tolist(), len(train[1]), config)))
    native, size = train[0].shape[-1], config.image_size
    images, labels = resized(train[0][kept], size), train[1][kept]
    mean, std = moments(images)
    pad = round(pad * size / native) if config.augment else 0
    return ImageData(
        train=ImageTensors(images, labels, pad=pad, flip=flip and config.augment, seed=config.seed),
        test=ImageTensors(resized(test[0], size), test[1]),
        num_classes=num_classes,
        channels=images.shape[1],
        normalise=normaliser(mean, std),
    )


def resized(images: Tensor, size: int) -> Tensor:
    """(N, C, H, W) as (N, C, size, size), antialiased; in slices, for on the way they may be floats."""
    if images.shape[-2:] == (size, size):
        return images
    return torch.cat([tv.resize(part, [size, size], antialias=True) for part in torch.split(images, 1000)])


def moments(images: Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel of (N, C, H, W), on the scale from 0 to 1.

    Of uint8 images they are taken from 256 counts: exact, and without a float copy of the set.
    """
    if images.dtype == torch.uint8:
        values = torch.arange(256, dtype=torch.float64) / 255
        counts = torch.stack([channel.flatten().bincount(minlength=256) for channel in images.unbind(1)]).double()
        share = counts / counts.sum(1, keepdim=True)
        mean = share @ values
        std = (share * (values - mean[:, None]) ** 2).sum(1).sqrt()
    else:
        mean, std = images.double().mean((0, 2, 3)), images.double().std((0, 2, 3), correction=0)
    # a channel that is the same everywhere has no spread to divide by; one grey level stands in
    return mean.tolist(), std.clamp_min(1 / 255).tolist()
