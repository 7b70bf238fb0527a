"""The data sets that a recipe can name, as they are on the disk: one function for each, and whole downloads."""

import gzip
import os
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from filelock import FileLock
from images import ImageFiles, ImageTensors, find_images
from models import Preprocessing
from settings import RecipeError
from timm.data import create_dataset
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100, DatasetFolder, FashionMNIST
from torchvision.datasets.mnist import read_image_file, read_label_file
from torchvision.datasets.utils import check_integrity, download_and_extract_archive
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

if TYPE_CHECKING:
    from train import Config

TINY_IMAGENET = "http://cs231n.stanford.edu/tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de"  # its MD5
DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # of the package dataset-fashion-mnist


@dataclass
class Source:
    """A data set before it is split."""

    classes: list[str]
    train: Any
    test: Any = None
    test_name: str = "the test images of the data set"
    validation: Any = None
    left_out: Counter[str] = field(default_factory=Counter)
    transforms: Any = None  # (training, evaluation) of image files; None: timm's


# --- sets in memory --------------------------------------------------------------------------------------------------


def digits(config: "Config") -> Source:
    """scikit-learn's 1,797 images of handwritten digits; a stratified 30 % (540 images) is always the test split."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    raw = load_digits()
    train, test = train_test_split(range(len(raw.target)), test_size=0.3, stratify=raw.target, random_state=0)
    images = torch.from_numpy(raw.images).float().unsqueeze(1) / 16
    # enlarged once: a small CNN halves 8x8 maps to nothing. As floats: 17 grey levels become many
    size = (config.image_size, config.image_size)
    images = F.interpolate(images, size=size, mode="bilinear", antialias=True)
    # shifted by one original pixel, not mirrored: a mirrored digit is another sign
    pool = ImageTensors(images, raw.target.tolist(), pad=max(1, config.image_size // 8))
    return Source([str(digit) for digit in range(10)], pool.select(train), pool.select(test))


def cifar(config: "Config", kind: type[CIFAR10]) -> Source:
    """Either CIFAR set (Krizhevsky 2009): 50,000 + 10,000 images of 32x32, padded by 4 and mirrored as is usual."""
    folder = fetch(config, kind.base_folder, kind.url, kind.tgz_md5)
    try:
        sets = [kind(folder.parent, train=train) for train in (True, False)]  # checks the MD5 of each file
    except RuntimeError as error:
        raise RecipeError(f"{folder} is damaged: {error}; delete it and try again") from error
    pools = [
        ImageTensors(torch.from_numpy(s.data).permute(0, 3, 1, 2).contiguous(), s.targets, pad=4, flip=True)
        for s in sets
    ]
    return Source(list(sets[0].classes), pools[0], pools[1])


def fashion_mnist(config: "Config") -> Source:
    """Fashion-MNIST (Xiao et al. 2017): 60,000 + 10,000 grey images of 28x28, varied like CIFAR.

    The four idx files, gzipped or not, are in data_dir, where torchvision puts them below it, or where Debian does.
    """
    root, first = locate_files(config), Path(FashionMNIST.resources[0][0]).stem
    places = [root / "FashionMNIST" / "raw", root] + ([DEBIAN] if config.data_dir is None else [])
    found = [place for place in places if (place / first).is_file() or (place / f"{first}.gz").is_file()]
    folder = found[0] if found else fetch(config, "FashionMNIST", FashionMNIST.mirrors[0]) / "raw"
    pools = []
    for split in ("train", "t10k"):
        images = read_idx(folder / f"{split}-images-idx3-ubyte", read_image_file)
        labels = read_idx(folder / f"{split}-labels-idx1-ubyte", read_label_file)
        if len(images) != len(labels) or labels.max() >= len(FashionMNIST.classes):
            raise RecipeError(f"{folder}: the {split} images and labels do not belong together; fetch them again")
        pools.append(ImageTensors(images.unsqueeze(1), labels.tolist(), pad=4, flip=True))
    return Source(list(FashionMNIST.classes), pools[0], pools[1])


def read_idx(path: Path, read: Callable[[str], Tensor]) -> Tensor:
    """Return the tensor in an idx file, gzipped or not."""
    try:
        if path.is_file():
            return read(str(path))
        with TemporaryDirectory() as temporary:
            whole = Path(temporary, path.name)
            whole.write_bytes(gzip.decompress(path.with_name(f"{path.name}.gz").read_bytes()))
            return read(str(whole))
    except Exception as error:  # gzip's, zlib's, torchvision's asserts
        fault = str(error) or type(error).__name__
        raise RecipeError(f"{path} is missing or is not a whole idx file: {fault}; fetch it again") from error


def resize_images(pool: ImageTensors, size: int) -> ImageTensors:
    """Return the images at this size, antialiased, their padding in proportion; in slices, which may become floats."""
    native = pool.images.shape[-1]
    if native == size:
        return pool
    parts = [tv.resize(part, [size, size], antialias=True) for part in torch.split(pool.images, 1000)]
    return replace(pool, images=torch.cat(parts), pad=round(pool.pad * size / native))


def measure_moments(images: Tensor) -> Preprocessing:
    """Return mean and deviation of each channel of (N, C, H, W), on the scale from 0 to 1."""
    if images.dtype == torch.uint8:  # from 256 counts: exact, and without a float copy of the set
        values = torch.arange(256, dtype=torch.float64) / 255
        share = torch.stack([channel.flatten().bincount(minlength=256) for channel in images.unbind(1)]).double()
        share /= share.sum(1, keepdim=True)
        mean = share @ values
        std = (share * (values - mean[:, None]) ** 2).sum(1).sqrt()
    else:
        mean, std = images.double().mean((0, 2, 3)), images.double().std((0, 2, 3), correction=0)
    std = std.clamp_min(1 / 255)  # a channel of one value has no spread to divide by
    return Preprocessing(tuple(mean.tolist()), tuple(std.tolist()), "bilinear", 1.0, "the training images' own")


# --- sets of files ---------------------------------------------------------------------------------------------------


def image_folder(config: "Config") -> Source:
    """Your own images: data_dir/train/<class>/ with val/ (or validation/) and test/ beside it, or data_dir/<class>/."""
    root, left_out = locate_files(config), Counter[str]()
    train = root / "train" if (root / "train").is_dir() else root
    images = find_images(train, left_out, config.max_megapixels)
    classes, held = list(images), {}
    for name in ("val", "validation", "test"):
        if train != root and (root / name).is_dir():
            held[name] = join_classes(find_images(root / name, left_out, config.max_megapixels), classes, root / name)
    validation = held.get("val", held.get("validation"))
    test, test_name = held.get("test", validation), "test/" if "test" in held else "val/"
    return Source(classes, join_classes(images, classes, train), test, test_name, validation, left_out)


def join_classes(images: dict[str, list[Path]], classes: list[str], folder: Path) -> ImageFiles:
    """Return images by class as a pool.

    Raises:
        RecipeError: there are none, or a class has no training images.
    """
    unknown = [name for name in images if name not in classes]
    if unknown or not images:
        fault = f"images of {', '.join(unknown[:5])}, which has no training images" if unknown else "no images"
        raise RecipeError(f"{folder} has {fault}")
    pairs = [(path, classes.index(name)) for name, paths in images.items() for path in paths]
    return ImageFiles([path for path, _ in pairs], [label for _, label in pairs])


def tiny_imagenet(config: "Config") -> Source:
    """Tiny ImageNet: 100,000 training and 10,000 validation images of 64x64 in 200 classes; the latter are the test.

    (The 10,000 images of its own test folder have no published labels.)
    """
    folder, left_out = locate_files(config), Counter[str]()
    if not (folder / "wnids.txt").is_file():  # else data_dir is the extracted folder itself
        folder = fetch(config, "tiny-imagenet-200", *TINY_IMAGENET)
    train, val = find_images(folder / "train", left_out), folder / "val"
    # many scripts rearrange val/ into one folder for each class
    annotated = (val / "val_annotations.txt").is_file()
    held = read_annotations(val) if annotated else find_images(val, left_out)
    size = config.image_size
    whole = [v2.PILToTensor()] if size == 64 else [v2.Resize((size, size)), v2.PILToTensor()]
    # The paper names no augmentation for it. CIFAR's 4 pixels are kept, not doubled with the side: these photographs
    # fill their frame, and each pixel of shift puts black in place of picture.
    drawn = [v2.RandomCrop(size, padding=round(4 * size / 64)), v2.RandomHorizontalFlip()]
    transforms, classes = (v2.Compose([*whole, *drawn]), v2.Compose(whole)), list(train)
    pools = join_classes(train, classes, folder / "train"), join_classes(held, classes, val)
    return Source(classes, *pools, "val/", left_out=left_out, transforms=transforms)


def read_annotations(val: Path) -> dict[str, list[Path]]:
    """Return Tiny ImageNet's validation images by class: all in one folder, their classes in a text file."""
    found: dict[str, list[Path]] = {}
    for number, line in enumerate((val / "val_annotations.txt").read_text(errors="replace").splitlines(), start=1):
        name, wnid, *_ = [*line.split("\t"), ""]
        path = val / "images" / name
        if not path.is_file():
            raise RecipeError(f"{val}/val_annotations.txt, line {number}: {path} is missing; extract the archive again")
        found.setdefault(wnid, []).append(path)
    return found


# --- sets of libraries -----------------------------------------------------------------------------------------------


def hugging_face(config: "Config", name: str, split: str) -> tuple[ImageFiles, list[str]]:
    """Return a split of a set of Hugging Face's hub, or of a folder of its files, and its classes."""
    import datasets

    rows = datasets.load_dataset(name, split=split, cache_dir=config.data_dir)
    images = [key for key, kind in rows.features.items() if isinstance(kind, datasets.Image)]
    named = [key for key, kind in rows.features.items() if isinstance(kind, datasets.ClassLabel)]
    labels = named or [key for key in rows.features if key == "label"]
    if not images or not labels:
        raise RecipeError(f"{config.dataset} has columns {', '.join(rows.features)}; expected an image and a label")
    rows = rows.cast_column(images[0], datasets.Image(decode=False))
    names = [f"{index} of {config.dataset}, {split}" for index in range(len(rows))]
    found = ImageFiles(range(len(rows)), list(rows[labels[0]]), names, load=partial(read_row, rows, images[0]))
    return found, list(rows.features[named[0]].names) if named else []


def read_row(rows: Any, column: str, index: int) -> bytes | Path:
    """Return the encoded image of a row."""
    image = rows[index][column]
    return Path(image["path"]) if image["bytes"] is None else bytes(image["bytes"])


def torchvision_set(config: "Config", name: str, split: str) -> tuple[ImageFiles, list[str]]:
    """Return a split of torchvision by timm's name, e.g. torch/cifar10 or torch/image_folder, and its classes."""
    found = create_dataset(f"torch/{name}", root=config.data_dir or "data", split=split, download=config.download)
    classes = list(getattr(found, "classes", []))
    if isinstance(found, DatasetFolder):
        return ImageFiles([Path(path) for path, _ in found.samples], list(found.targets)), classes
    labels = found.targets if hasattr(found, "targets") else [label for _, label in found]
    names = [f"{index} of {config.dataset}, {split}" for index in range(len(found))]
    return ImageFiles(
        range(len(found)), [int(label) for label in labels], names, load=partial(read_item, found)
    ), classes


def read_item(found: Any, index: int) -> Any:
    """Return the image of an item."""
    return found[index][0]


def library_set(config: "Config", prefix: str, name: str) -> Source:
    """Return the two splits of a library's set.

    Raises:
        RecipeError: the library cannot open a split, or the classes differ.
    """
    opened = []
    for split in (config.train_split, config.test_split):
        try:
            opened.append(LIBRARIES[prefix](config, name, split))
        except RecipeError:
            raise
        except Exception as error:  # a missing package, a hub's, a file system's, an assertion of timm's
            raise RecipeError(
                f"cannot open split {split!r} of {config.dataset} (data_dir {config.data_dir}): "
                f"{str(error) or type(error).__name__}; see --dataset, --data_dir, --train_split and --test_split"
            ) from error
    (train, classes), (test, others) = opened
    if classes != others:
        raise RecipeError(f"{config.dataset} has other classes in {config.train_split} than in {config.test_split}")
    classes = classes or [str(label) for label in range(config.num_classes or 1 + max(train.labels))]
    for pool in (train, test):
        for label, image in zip(pool.labels, pool.names, strict=True):
            if not 0 <= label < len(classes):
                raise RecipeError(f"image {image} has class {label}; expected one below num_classes, {len(classes)}")
    return Source(classes, train, test, config.test_split)


# --- downloads -------------------------------------------------------------------------------------------------------


def locate_files(config: "Config") -> Path:
    """Return where the files of a data set are."""
    return Path(config.data_dir or "data").expanduser()


def fetch(config: "Config", member: str, url: str, md5: str | None = None) -> Path:
    """Return data_dir/member, extracted from the archive in data_dir, which is downloaded first if it is missing.

    It is extracted in a temporary folder and moved when it is whole; one process does so, the others wait. Without an
    MD5, torchvision's FashionMNIST downloads its four archives.

    Raises:
        RecipeError: download is off, the download fails, an archive is damaged, or the folder cannot be written.
    """
    root = locate_files(config)
    target, archive = root / member, root / Path(url).name
    if target.is_dir():
        return target
    if not config.download and not (md5 and check_integrity(archive, md5)):
        raise RecipeError(
            f"{config.dataset} is not in {root}: expected {member}/ or a whole {archive.name} there (from {url}); give "
            "its folder with --data_dir, or download it with --download true"
        )
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / ".lock"), TemporaryDirectory(prefix=".staging-", dir=root) as staging:
            if not target.is_dir():  # else another process was quicker
                if md5 is None:
                    FashionMNIST(staging, download=True)
                else:
                    download_and_extract_archive(url, root, staging, md5=md5)
                os.replace(Path(staging, member), target)
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError) as error:
        raise RecipeError(
            f"cannot fetch {config.dataset} from {url} into {root}: {' '.join(str(error).split())}; try again, put the "
            "file there yourself, or give another folder with --data_dir"
        ) from error
    return target


DATASETS: dict[str, Callable[["Config"], Source]] = {
    "digits": digits,
    "cifar10": partial(cifar, kind=CIFAR10),
    "cifar100": partial(cifar, kind=CIFAR100),
    "fashion_mnist": fashion_mnist,
    "tiny_imagenet": tiny_imagenet,
    "image_folder": image_folder,
}
LIBRARIES: dict[str, Callable[["Config", str, str], tuple[ImageFiles, list[str]]]] = {
    "hfds": hugging_face,
    "torch": torchvision_set,
}
