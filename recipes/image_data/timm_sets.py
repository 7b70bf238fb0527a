"""timm's data sets: Hugging Face's, torchvision's, and streams of tar shards, TFDS or a hub."""

import importlib.util
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.dataset import ImageDataset
from timm.data.dataset_factory import create_dataset
from timm.data.readers.reader_wds import ReaderWds
from torch.utils.data import IterableDataset, get_worker_info
from training.settings import Config, RecipeError

from image_data.augment import private_random, seed_of
from image_data.folders import Transform, decoding, from_readers, imagenet_transforms
from image_data.splits import ImageData, Sample, check_classes, chosen, normaliser

PACKAGES = {  # prefix: (module, package that has it)
    "hfds": ("datasets", "datasets"),
    "hfids": ("datasets", "datasets"),
    "wds": ("webdataset", "webdataset"),
    "tfds": ("tensorflow_datasets", "tensorflow-datasets"),
    "torch": ("torchvision", "torchvision"),
}
STREAMED = ("hfids", "wds", "tfds")


def timm_data(config: Config) -> ImageData:
    """The data set that timm.data.create_dataset makes of the name, as colour images; e.g. hfds/..., wds/....

    train_split and test_split are in that library's notation; hfids and tfds also take `split|number of images`.

    Raises:
        RecipeError: a package is missing, the set cannot be opened, or its classes are not known.
    """
    prefix = config.dataset.partition("/")[0].lower()
    module, package = PACKAGES[prefix]
    if importlib.util.find_spec(module) is None:
        raise RecipeError(f"dataset {config.dataset} needs the package {package}; pip install {package}")
    return streams(config, prefix) if prefix in STREAMED else map_style(config)


def open_split(config: Config, split: str, **options: Any) -> Any:
    """One split as timm opens it.

    Raises:
        RecipeError: whatever timm or the library below it raises.
    """
    root = config.data_dir or ("data" if config.dataset.lower().startswith("torch/") else None)
    try:
        return create_dataset(config.dataset, root=root, split=split, **options)
    except Exception as error:  # a hub's, a file system's, an assertion of timm's
        raise RecipeError(
            f"timm cannot open split {split!r} of {config.dataset} (data_dir {root}): "
            f"{str(error) or type(error).__name__}; see --dataset, --data_dir, --train_split and --test_split"
        ) from error


# --- sets with random access -----------------------------------------------------------------------------------------


def map_style(config: Config) -> ImageData:
    """A set whose images can be asked for by index."""
    options = {"download": config.download} if config.dataset.lower().startswith("torch/") else {}
    train, test = (open_split(config, split, **options) for split in (config.train_split, config.test_split))
    names = [class_names(split) for split in (train, test)]
    labels = None
    if config.train_images is not None or not (names[0] or config.num_classes):
        labels = class_indices(train)
    num_classes = len(names[0]) or config.num_classes or 1 + max(labels or [0])
    if all(names):
        check_classes(config.dataset, *names)
    return from_readers(
        config, partial(read_timm, config.dataset, num_classes, train), chosen(labels, len(train), config),
        partial(read_timm, config.dataset, num_classes, test), range(len(test)), num_classes,
        *imagenet_transforms(config),
    )  # fmt: skip


def class_names(split: Any) -> list[str]:
    """The names of the classes in the order of their indices; empty if the set does not tell."""
    indices: dict[str, int] = getattr(getattr(split, "reader", split), "class_to_idx", None) or {}
    return sorted(indices, key=indices.__getitem__)


def class_indices(split: Any) -> list[int]:
    """The classes of all images, without decoding them where the set allows that."""
    if isinstance(split, ImageDataset):
        return [int(label) for label in split.reader.iter_targets()]
    if hasattr(split, "targets"):
        return [int(label) for label in split.targets]
    return [int(label) for _, label in split]


def read_timm(name: str, num_classes: int, split: Any, index: int) -> tuple[Image.Image, int]:
    """The image of that index as RGB, and its class. timm itself would put the next image in place of a broken one.

    Raises:
        RecipeError: it cannot be decoded, or its class is none of num_classes.
    """
    with decoding(f"{index} of {name}"):
        if isinstance(split, ImageDataset):
            file, label = split.reader[index]
            with file:
                image = Image.open(file).convert("RGB")
        else:
            image, label = split[index]
            image = image.convert("RGB")
    return image, checked(label, num_classes, f"image {index} of {name}")


def checked(label: Any, num_classes: int, what: str) -> int:
    """The class index, in range.

    Raises:
        RecipeError: it is none, or beyond num_classes.
    """
    if not isinstance(label, int) or not 0 <= label < num_classes:
        raise RecipeError(f"{what} has class {label!r}; expected an index below num_classes, {num_classes}")
    return label


# --- streams ---------------------------------------------------------------------------------------------------------


class StreamedImages(IterableDataset[Sample]):
    """A stream of timm's, its images decoded and transformed; uint8.

    The order and the transforms' draws are a function of (seed, epoch, process, loader worker, place in the stream).
    """

    def __init__(self, source: Any, transform: Transform, num_classes: int, config: Config, training: bool) -> None:
        self.source, self.transform, self.num_classes = source, transform, num_classes
        self.name, self.seed, self.training = config.dataset, config.seed, training
        source.set_loader_cfg(num_workers=config.num_workers)
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Take the order and the draws of that epoch from now on."""
        self.epoch = epoch
        self.source.set_epoch(epoch)

    def __len__(self) -> int:
        """Images that this process yields in an epoch."""
        return len(self.source) if self.training else int(self.source.reader.num_samples)

    def __iter__(self) -> Iterator[Sample]:
        reader: Any = self.source.reader
        worker = get_worker_info()
        share = (self.seed, self.epoch, reader.dist_rank, worker.id if worker else 0)
        if isinstance(reader, ReaderWds):
            # It would keep its shuffle buffer's generator over epochs, or seed it from torch's global one; then a
            # resumed run would see another order than one that was never interrupted.
            reader.ds = None
            reader.worker_info = worker  # type: ignore[assignment]  # timm's starts as None
            reader.worker_id, reader.num_workers = (worker.id, worker.num_workers) if worker else (0, 1)
            reader.global_num_workers = reader.dist_num_replicas * reader.num_workers
            reader.global_worker_id = reader.dist_rank * reader.num_workers + reader.worker_id
            reader.worker_seed = seed_of(*share)
        position = -1
        try:
            for position, (image, label) in enumerate(reader):
                index = checked(label, self.num_classes, f"image {position} of the stream {self.name}")
                with private_random(seed_of(*share, position)):
                    sample = self.transform(image)
                yield sample, torch.tensor(index)
        except RecipeError:
            raise
        except Exception as error:  # a network's, a tar file's, a decoder's
            raise RecipeError(f"the stream {self.name} broke off after {position + 1} images: {error}") from error
        if not self.training and isinstance(reader, ReaderWds):
            check_all_came(self.name, reader, position + 1)


def check_all_came(name: str, reader: ReaderWds, count: int) -> None:
    """Refuse test figures of part of the images: timm passes over what it cannot read with a warning.

    Raises:
        RecipeError: the shards of this loader worker hold more images than came out of them.
    """
    mine = slice(reader.worker_id, None, reader.num_workers)
    lengths = reader.split_info.shard_lengths[mine] or ([reader.num_samples] if reader.num_workers == 1 else [count])
    if sum(lengths) != count:
        raise RecipeError(
            f"{count} of {sum(lengths)} test images came out of {', '.join(reader.split_info.filenames[mine])} of "
            f"{name}: a shard is damaged, or _info.json tells another number"
        )


def streams(config: Config, prefix: str) -> ImageData:
    """Both splits as streams, training shared among the processes and their loader workers by timm's reader.

    Raises:
        RecipeError: train_images is set, the number of classes or images is not known, or there are too few shards.
    """
    if config.train_images is not None:
        raise RecipeError(f"train_images is {config.train_images}, but {config.dataset} is a stream; leave it out")
    if prefix == "wds" and config.data_dir is None:
        raise RecipeError(f"{config.dataset} needs the folder or URL of its shards and _info.json; give --data_dir")
    processes = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    train = open_stream(config, prefix, config.train_split, batch_size=max(1, config.batch_size // processes))
    test = open_stream(config, prefix, config.test_split)
    # each process reads the whole test split: shared out, timm's readers repeat some images and leave others out
    test.reader.dist_rank, test.reader.dist_num_replicas = 0, 1
    if prefix == "wds":
        check_shards(config, train.reader, processes * max(1, config.num_workers))
        check_shards(config, test.reader, 1)
    num_classes = config.num_classes or len(class_names(train))
    if not num_classes:
        raise RecipeError(f"{config.dataset} is a stream and does not tell its classes; give their --num_classes")
    augmented, plain = imagenet_transforms(config)
    return ImageData(
        train=StreamedImages(train, augmented, num_classes, config, training=True),
        test=StreamedImages(test, plain, num_classes, config, training=False),
        num_classes=num_classes,
        channels=3,
        normalise=normaliser(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
        streamed=True,
    )


def open_stream(config: Config, prefix: str, split: str, batch_size: int | None = None) -> Any:
    """One split as a stream; for training where a process's batch size is given.

    Raises:
        RecipeError: it cannot be opened, or the number of its images is not known.
    """
    name, count = split, None
    if prefix != "wds":  # whose own notation is `shards.tar|number`
        name, _, number = split.partition("|")
        count = int(number) if number.isdigit() else None
    training = batch_size is not None
    options = {"download": config.download} if prefix == "tfds" else {}  # hfids: to stream is not to download it all
    stream = open_split(
        config, name, is_training=training, batch_size=batch_size or 1, seed=config.seed, num_samples=count, **options
    )
    if not stream.reader.num_samples:
        raise RecipeError(
            f"the number of images in split {split!r} of {config.dataset} is not known; give it, e.g. '{split}|50000'"
        )
    return stream


def check_shards(config: Config, reader: ReaderWds, readers: int) -> None:
    """Refuse missing shards, which timm would pass over, and fewer shards than there are to read them.

    Raises:
        RecipeError: either is so.
    """
    shards = reader.split_info.filenames
    paths = [Path(reader.root) / shard for shard in shards if "://" not in reader.root and ":" not in shard]
    lost = [str(path) for path in paths if not path.is_file()]
    if lost:
        raise RecipeError(f"{config.dataset} has no {lost[0]} ({len(lost)} of {len(shards)} shards are missing)")
    if len(shards) < readers:
        raise RecipeError(
            f"{config.dataset} has {len(shards)} training shards for {readers} processes x loader workers; expected a "
            f"shard or more for each, e.g. --num_workers 0"
        )
