"""The data sets that a recipe can name, as they are on the disk: one function for each, and whole downloads."""

import gzip
import importlib.util
import os
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from filelock import FileLock
from images import ImageFiles, ImageTensors, find_images, walk_images
from models import Preprocessing
from settings import RecipeError
from timm.data import create_dataset
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100, DatasetFolder, FashionMNIST
from torchvision.datasets.mnist import read_image_file, read_label_file
from torchvision.datasets.utils import check_integrity, download_url, extract_archive
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

if TYPE_CHECKING:
    from train import Config

TINY_IMAGENET_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
TINY_IMAGENET_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # of the package dataset-fashion-mnist
Pool = ImageTensors | ImageFiles


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
    pool = in_memory(images, raw.target.tolist(), pad=max(1, config.image_size // 8))
    return Source([str(digit) for digit in range(10)], pool.select(train), pool.select(test))


def cifar(config: "Config", kind: type[CIFAR10]) -> Source:
    """Either CIFAR set (Krizhevsky 2009): 50,000 + 10,000 images of 32x32, padded by 4 and mirrored as is usual."""
    folder = fetch_folder(config, kind.base_folder, kind.url, kind.tgz_md5)
    for name, md5 in (*kind.train_list, *kind.test_list, (kind.meta["filename"], kind.meta["md5"])):
        if not check_integrity(folder / name, md5):
            fault = "is damaged: its MD5 is not " + md5 if (folder / name).exists() else "is missing"
            raise RecipeError(f"{folder / name} {fault}; delete {folder} and fetch it again from {kind.url}")
    sets = [kind(folder.parent, train=train) for train in (True, False)]
    pools = [in_memory(torch.from_numpy(s.data).permute(0, 3, 1, 2).contiguous(), s.targets, 4, True) for s in sets]
    return Source(list(sets[0].classes), pools[0], pools[1])


def fashion_mnist(config: "Config") -> Source:
    """Fashion-MNIST (Xiao et al. 2017): 60,000 + 10,000 grey images of 28x28, varied like CIFAR."""
    folder = fashion_folder(config)
    pools = []
    for split in ("train", "t10k"):
        images = read_idx(folder, f"{split}-images-idx3-ubyte", read_image_file)
        labels = read_idx(folder, f"{split}-labels-idx1-ubyte", read_label_file)
        if len(images) != len(labels) or labels.max() >= len(FashionMNIST.classes):
            raise RecipeError(
                f"the idx files of fashion_mnist in {folder} do not belong together: {len(images)} images, "
                f"{len(labels)} labels up to {labels.max()}; expected as many labels as images, from 0 to 9"
            )
        pools.append(in_memory(images.unsqueeze(1), labels.tolist(), pad=4, flip=True))
    return Source(list(FashionMNIST.classes), pools[0], pools[1])


def fashion_folder(config: "Config") -> Path:
    """Return the folder with the four idx files, each gzipped or not: data_dir, torchvision's in it, or Debian's."""
    root = folder_of(config)
    places = [root / "FashionMNIST" / "raw", root] + ([DEBIAN] if config.data_dir is None else [])
    names = [Path(name).stem for name, _ in FashionMNIST.resources]
    for place in places:
        lacking = [name for name in names if not any((place / (name + end)).is_file() for end in ("", ".gz"))]
        if not lacking:
            return place
        if len(lacking) < len(names):
            raise RecipeError(f"{place} has only some files of fashion_mnist; missing: {', '.join(lacking)} (or .gz)")
    build = lambda temporary: FashionMNIST(temporary, download=True)  # noqa: E731
    return fetch(config, "FashionMNIST", FashionMNIST.mirrors[0], build) / "raw"


def read_idx(folder: Path, name: str, read: Callable[[str], Tensor]) -> Tensor:
    """Return the tensor in an idx file, gzipped or not."""
    path = folder / name if (folder / name).is_file() else folder / f"{name}.gz"
    try:
        with TemporaryDirectory() as temporary:
            whole = Path(temporary, name)
            whole.write_bytes(gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes())
            return read(str(whole))
    except Exception as error:  # gzip's, zlib's, torchvision's asserts
        fault = str(error) or type(error).__name__
        raise RecipeError(f"{path} is not a whole idx file: {fault}; fetch it again") from error


def in_memory(images: Tensor, labels: list[int], pad: int = 0, flip: bool = False) -> ImageTensors:
    """Return images (N, C, H, W) as a pool; they have numbers for names."""
    return ImageTensors(images, labels, [str(number) for number in range(len(labels))], pad, flip)


def resized(pool: ImageTensors, size: int) -> ImageTensors:
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
        counts = torch.stack([channel.flatten().bincount(minlength=256) for channel in images.unbind(1)]).double()
        share = counts / counts.sum(1, keepdim=True)
        mean = share @ values
        std = (share * (values - mean[:, None]) ** 2).sum(1).sqrt()
    else:
        mean, std = images.double().mean((0, 2, 3)), images.double().std((0, 2, 3), correction=0)
    # a channel that is the same everywhere has no spread to divide by; one grey level replaces it
    std = std.clamp_min(1 / 255)
    return Preprocessing(tuple(mean.tolist()), tuple(std.tolist()), "bilinear", 1.0, "the training images' own")


# --- sets of files ---------------------------------------------------------------------------------------------------


def image_folder(config: "Config") -> Source:
    """Your own images: data_dir/train/<class>/ with val/ (or validation/) and test/ beside it, or data_dir/<class>/."""
    root, left_out = folder_of(config), Counter[str]()
    train = root / "train" if (root / "train").is_dir() else root
    found = find_images(train, left_out, config.max_megapixels)
    classes, pools = list(found), {"train": as_pool(found, list(found), train)}
    for split, names in (("validation", ("val", "validation")), ("test", ("test",))):
        there = [root / name for name in names if train != root and (root / name).is_dir()]
        if there:
            pools[split] = as_pool(find_images(there[0], left_out, config.max_megapixels), classes, there[0])
    test_name = "test/" if "test" in pools else "val/"
    test = pools.get("test", pools.get("validation"))
    return Source(classes, pools["train"], test, test_name, pools.get("validation"), left_out)


def as_pool(images: dict[str, list[Path]], classes: list[str], folder: Path) -> ImageFiles:
    """Return image files by class as a pool.

    Raises:
        RecipeError: there is a class that has no training images.
    """
    unknown = [name for name in images if name not in classes]
    if unknown:
        raise RecipeError(f"{folder} has images of {', '.join(unknown[:5])}, which has no training images")
    pairs = [(path, classes.index(name)) for name, paths in images.items() for path in paths]
    return ImageFiles([path for path, _ in pairs], [label for _, label in pairs], [str(path) for path, _ in pairs])


def tiny_imagenet(config: "Config") -> Source:
    """Tiny ImageNet: 100,000 training and 10,000 validation images of 64x64 in 200 classes; the latter are the test.

    (The 10,000 images of its own test folder have no published labels.)
    """
    folder, left_out = folder_of(config), Counter[str]()
    if not (folder / "wnids.txt").is_file():  # else data_dir is the extracted folder itself
        folder = fetch_folder(config, "tiny-imagenet-200", TINY_IMAGENET_URL, TINY_IMAGENET_MD5)
    train, val = find_images(folder / "train", left_out), folder / "val"
    classes = list(train)
    if (val / "val_annotations.txt").is_file():
        test = annotated_images(val, classes)
    elif (val / "images").is_dir():
        raise RecipeError(f"{val} has images/ but no val_annotations.txt, which has their classes; extract it again")
    else:  # one folder for each class, as many scripts rearrange it
        test = as_pool(find_images(val, left_out), classes, val)
    size = config.image_size
    whole = [v2.PILToTensor()] if size == 64 else [v2.Resize((size, size)), v2.PILToTensor()]
    # The paper names no augmentation for it. CIFAR's 4 pixels are kept, not doubled with the side: these photographs
    # fill their frame, and each pixel of shift puts black in place of picture.
    drawn = [v2.RandomCrop(size, padding=round(4 * size / 64)), v2.RandomHorizontalFlip()]
    transforms = v2.Compose([*whole, *drawn]), v2.Compose(whole)
    return Source(classes, as_pool(train, classes, folder), test, "val/", left_out=left_out, transforms=transforms)


def annotated_images(val: Path, classes: list[str]) -> ImageFiles:
    """Return Tiny ImageNet's validation images as the archive has them: all in one folder, classes in a text file."""
    annotations, images = val / "val_annotations.txt", val / "images"
    present = {path.name: path for path in walk_images(images, Counter())} if images.is_dir() else {}
    paths, labels = [], []
    for number, line in enumerate(annotations.read_text(errors="replace").splitlines(), start=1):
        name, wnid, *_ = [*line.split("\t"), ""]
        if wnid not in classes:
            raise RecipeError(
                f"{annotations}, line {number}: {name!r} is of class {wnid!r}, which has no folder in "
                f"{val.parent / 'train'}; expected <file><tab><class>"
            )
        if name not in present:
            raise RecipeError(f"{annotations}, line {number}: {images / name} is missing; extract the archive again")
        paths.append(present[name])
        labels.append(classes.index(wnid))
    if not paths:
        raise RecipeError(f"{annotations} is empty; extract the archive again")
    return ImageFiles(paths, labels, [str(path) for path in paths])


# --- sets of libraries -----------------------------------------------------------------------------------------------


def hugging_face(config: "Config", name: str) -> Source:
    """A set of Hugging Face's hub, or a folder of its files, with an image column and a column of classes."""
    if importlib.util.find_spec("datasets") is None:
        raise RecipeError(f"dataset {config.dataset} needs the package datasets; pip install datasets")
    import datasets

    def open_split(split: str) -> tuple[ImageFiles, list[str]]:
        with opening(config, split):
            rows = datasets.load_dataset(name, split=split, cache_dir=config.data_dir)
        images = [key for key, kind in rows.features.items() if isinstance(kind, datasets.Image)]
        named = [key for key, kind in rows.features.items() if isinstance(kind, datasets.ClassLabel)]
        classes = rows.features[named[0]].names if named else []
        label = (named or [key for key in rows.features if key == "label"] or [""])[0]
        if not images or not label:
            raise RecipeError(f"{config.dataset} has columns {', '.join(rows.features)}; expected an image and a label")
        rows = rows.cast_column(images[0], datasets.Image(decode=False))
        names = [f"{index} of {config.dataset}, {split}" for index in range(len(rows))]
        read = partial(read_row, rows, images[0])
        return ImageFiles(range(len(rows)), [int(value) for value in rows[label]], names, load=read), list(classes)

    return library_source(config, open_split)


def read_row(rows: Any, column: str, index: int) -> bytes | Path:
    """Return the encoded image of a row."""
    image = rows[index][column]
    return Path(image["path"]) if image["bytes"] is None else bytes(image["bytes"])


def torchvision_set(config: "Config", name: str) -> Source:
    """A set of torchvision by timm's name, e.g. torch/cifar10 or torch/image_folder."""

    def open_split(split: str) -> tuple[ImageFiles, list[str]]:
        with opening(config, split):
            found = create_dataset(
                f"torch/{name}", root=config.data_dir or "data", split=split, download=config.download
            )
        classes = list(getattr(found, "classes", []))
        if isinstance(found, DatasetFolder):
            paths = [Path(path) for path, _ in found.samples]
            return ImageFiles(paths, list(found.targets), [str(path) for path in paths]), classes
        labels = found.targets if hasattr(found, "targets") else [label for _, label in found]
        names = [f"{index} of {config.dataset}, {split}" for index in range(len(found))]
        read = partial(read_item, found)
        return ImageFiles(range(len(found)), [int(label) for label in labels], names, load=read), classes

    return library_source(config, open_split)


def read_item(found: Any, index: int) -> Any:
    """Return the image of an item."""
    return found[index][0]


def library_source(config: "Config", open_split: Callable[[str], tuple[ImageFiles, list[str]]]) -> Source:
    """Return the two splits of a library's set, whose classes must be the same."""
    (train, classes), (test, others) = open_split(config.train_split), open_split(config.test_split)
    if classes != others:
        raise RecipeError(
            f"the classes of {config.dataset} differ between {config.train_split} and {config.test_split}"
        )
    classes = classes or [str(label) for label in range(config.num_classes or 1 + max(train.labels))]
    for pool in (train, test):
        for label, name in zip(pool.labels, pool.names, strict=True):
            if not 0 <= label < len(classes):
                raise RecipeError(f"image {name} has class {label}; expected one below num_classes, {len(classes)}")
    return Source(classes, train, test, config.test_split)


@contextmanager
def opening(config: "Config", split: str) -> Iterator[None]:
    """Report in one line what a library raises."""
    try:
        yield
    except Exception as error:  # a hub's, a file system's, an assertion of timm's
        raise RecipeError(
            f"cannot open split {split!r} of {config.dataset} (data_dir {config.data_dir}): "
            f"{str(error) or type(error).__name__}; see --dataset, --data_dir, --train_split and --test_split"
        ) from error


# --- downloads -------------------------------------------------------------------------------------------------------


def folder_of(config: "Config") -> Path:
    """Return where the files of a data set are."""
    return Path(config.data_dir or "data").expanduser()


def fetch(config: "Config", member: str, url: str, build: Callable[[Path], object]) -> Path:
    """Return data_dir/member; if it is missing, build it in a temporary folder and move it there when it is whole.

    One process builds at a time; the others wait.

    Raises:
        RecipeError: download is off, the download fails, an archive is damaged, or the folder cannot be written.
    """
    folder = folder_of(config)
    target = folder / member
    if target.is_dir():
        return target
    if not config.download and not (folder / url.rpartition("/")[2]).is_file():
        raise RecipeError(
            f"{config.dataset} is not in {folder}: expected {member}/ or {url.rpartition('/')[2] or 'its files'} there "
            f"(from {url}); give its folder with --data_dir, or download it with --download true"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"), TemporaryDirectory(prefix=".staging-", dir=folder) as temporary:
            if not target.is_dir():  # else another process was quicker
                build(Path(temporary))
                if not Path(temporary, member).is_dir():
                    raise RecipeError(f"{url.rpartition('/')[2] or url} holds no {member}/; fetch it again from {url}")
                os.replace(Path(temporary, member), target)
    except RecipeError:
        raise
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise RecipeError(
            f"cannot fetch {config.dataset} from {url} into {folder}: {reason}; try again, put the file there "
            "yourself, or give another folder with --data_dir"
        ) from error
    return target


def fetch_folder(config: "Config", member: str, url: str, md5: str) -> Path:
    """Return data_dir/member, extracted from the archive in data_dir, which is downloaded first if it is missing."""
    archive = folder_of(config) / url.rpartition("/")[2]

    def build(temporary: Path) -> None:
        if not archive.is_file():
            download_url(url, temporary, archive.name, md5)
            os.replace(temporary / archive.name, archive)
        if not check_integrity(archive, md5):
            raise RecipeError(f"{archive} is damaged: its MD5 is not {md5}; delete it and fetch it again from {url}")
        extract_archive(archive, temporary)

    return fetch(config, member, url, build)


DATASETS: dict[str, Callable[["Config"], Source]] = {
    "digits": digits,
    "cifar10": partial(cifar, kind=CIFAR10),
    "cifar100": partial(cifar, kind=CIFAR100),
    "fashion_mnist": fashion_mnist,
    "tiny_imagenet": tiny_imagenet,
    "image_folder": image_folder,
}
LIBRARIES: dict[str, Callable[["Config", str], Source]] = {"hfds": hugging_face, "torch": torchvision_set}
