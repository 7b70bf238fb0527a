"""Data sets in their true file formats, a few images each, for test_recipe_data.py."""

import gzip
import hashlib
import io
import pickle
import shutil
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

WNIDS = ("n01443537", "n01629819", "n01641577")


def md5_of(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def noise(shape, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_cifar(root: Path, kind, patch, count: int = 20) -> dict[str, tuple[np.ndarray, list[int]]]:
    """The folder of a CIFAR set's Python version below root, its MD5s patched into torchvision's class; the contents.

    Rows are 3072 bytes: 1024 of red, then green, then blue, each row by row, as the set's page has it.
    """
    fine = kind.base_folder == "cifar-100-python"
    names = [name for name, _ in (*kind.train_list, *kind.test_list)]
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    contents = {}
    for number, name in enumerate(names):
        rows = noise((count, 3072), number)
        labels = [index % (100 if fine else 10) for index in range(count)]
        keys = {"fine_labels": labels, "coarse_labels": [0] * count} if fine else {"labels": labels}
        (folder / name).write_bytes(pickle.dumps({"data": rows, **keys, "filenames": ["x.png"] * count}))
        contents[name] = rows.reshape(count, 3, 32, 32), labels
    classes = [f"class {index}" for index in range(100 if fine else 10)]
    (folder / kind.meta["filename"]).write_bytes(pickle.dumps({kind.meta["key"]: classes}))
    patch.setattr(kind, "train_list", [[name, md5_of(folder / name)] for name, _ in kind.train_list])
    patch.setattr(kind, "test_list", [[name, md5_of(folder / name)] for name, _ in kind.test_list])
    patch.setattr(kind, "meta", kind.meta | {"md5": md5_of(folder / kind.meta["filename"])})
    return contents


def write_cifar_archive(root: Path, kind, patch) -> Path:
    """The tar.gz of a CIFAR folder, which is removed."""
    archive = root / kind.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(root / kind.base_folder, kind.base_folder)
    shutil.rmtree(root / kind.base_folder)
    patch.setattr(kind, "tgz_md5", md5_of(archive))
    return archive


def idx_bytes(array: np.ndarray) -> bytes:
    """The idx format: two zero bytes, 8 for uint8, the number of dimensions, each big-endian, the data."""
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_fashion(folder: Path, train: int, test: int, zipped: bool = True) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Fashion-MNIST's four files, with classes in equal shares."""
    folder.mkdir(parents=True, exist_ok=True)
    contents = {}
    for split, count in (("train", train), ("t10k", test)):
        images, labels = noise((count, 28, 28), count), np.arange(count, dtype=np.uint8) % 10
        contents[split] = images, labels
        for name, array in ((f"{split}-images-idx3-ubyte", images), (f"{split}-labels-idx1-ubyte", labels)):
            raw = idx_bytes(array)
            path = folder / (name + ".gz" if zipped else name)
            path.write_bytes(gzip.compress(raw, 1) if zipped else raw)
    return contents


def write_image(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def write_tiny_imagenet(root: Path, per_class: int = 4) -> Path:
    """Tiny ImageNet's folder as its archive has it; the second image of each class is grey, as some of the set are."""
    folder = root / "tiny-imagenet-200"
    lines = []
    for number, wnid in enumerate(WNIDS):
        for index in range(per_class):
            shape = (64, 64) if index == 1 else (64, 64, 3)
            write_image(folder / "train" / wnid / "images" / f"{wnid}_{index}.JPEG", noise(shape, 10 * number + index))
        (folder / "train" / wnid / f"{wnid}_boxes.txt").write_text(f"{wnid}_0.JPEG\t0\t0\t63\t63\n")
    for index in range(5):
        wnid = WNIDS[(index * 2) % 3]
        write_image(folder / "val" / "images" / f"val_{index}.JPEG", noise((64, 64, 3), 100 + index))
        lines.append(f"val_{index}.JPEG\t{wnid}\t0\t32\t44\t62\n")
    (folder / "val" / "val_annotations.txt").write_text("".join(lines))
    (folder / "wnids.txt").write_text("\n".join(WNIDS))
    return folder


def write_zip(folder: Path) -> Path:
    """The folder as a zip beside it; the folder is removed."""
    archive = folder.with_suffix(".zip")
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(folder.rglob("*")):
            file.write(path, path.relative_to(folder.parent))
    shutil.rmtree(folder)
    return archive


def write_folders(root: Path, classes=("ant", "bee", "cow"), per_class: int = 4, test: str = "val") -> Path:
    """Images in train/<class>/ and val/<class>/, in the formats and modes that people have."""
    for split in ("train", test):
        for number, name in enumerate(classes):
            for index in range(per_class):
                shape = (50, 40) if index == 1 else (40, 50, 4) if index == 2 else (48, 44, 3)
                ending = "jpg" if len(shape) == 3 and shape[2] == 3 else "png"
                write_image(root / split / name / f"{index}.{ending}", noise(shape, 100 * number + index))
    return root


def flat_png(value: int) -> bytes:
    """An image of one grey level, which no crop, scaling or mirroring changes: its level is its name."""
    file = io.BytesIO()
    Image.new("RGB", (40, 40), (value, value, value)).save(file, "PNG")
    return file.getvalue()


def write_parquet(root: Path, count: int = 12) -> Path:
    """A data set as the Hugging Face hub stores it: parquet files and a card that tells the splits."""
    import datasets

    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["ant", "bee", "cow"]))
    root.mkdir(parents=True)
    for split in ("train", "validation"):
        rows = [{"image": {"bytes": flat_png(index), "path": None}, "label": index % 3} for index in range(count)]
        datasets.Dataset.from_list(rows, features=features).to_parquet(root / f"{split}-00000-of-00001.parquet")
    return root
