"""The recipes' data sets, read from files in their true formats, and how their training images vary."""

import functools
import gzip
import http.server
import importlib.util
import itertools
import multiprocessing
import random
import shutil
import socket
import threading
from pathlib import Path

import image_data as recipe_data
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from image_data import augment
from image_data import folders as data_folders
from image_data import memory as data_memory
from image_data import splits as data_splits
from PIL import Image
from scipy.stats import chisquare
from torch.utils.data import DataLoader
from torchvision.datasets import CIFAR10, CIFAR100, FashionMNIST
from training.settings import Config, RecipeError

from tests import recipe_files as files


def config(dataset: str, data_dir: Path | None = None, size: int = 32, **values) -> Config:
    values = {"download": False} | values
    data_dir = None if data_dir is None else str(data_dir)
    return Config(
        output_dir="runs/x", epochs=1, model="m", image_size=size, dataset=dataset, data_dir=data_dir, **values
    )


def load(*arguments, **values) -> data_splits.ImageData:
    return recipe_data.load_data(config(*arguments, **values))


def all_of(split, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """Every image and label of a split, in order, through torch's loader."""
    images, labels = zip(*DataLoader(split, **{"batch_size": 64, **options}), strict=True)
    return torch.cat(images), torch.cat(labels)


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


@pytest.fixture
def server(tmp_path):
    """A folder, and the address under which its files are served."""
    folder = tmp_path / "served"
    folder.mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{running.server_port}/"
        running.shutdown()


@pytest.fixture
def nowhere() -> str:
    """The address of a server that does not answer."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}/"


# --- augmentation ----------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_shift_and_flip_pads_slices_and_mirrors(data):
    count, channels, height, width = (data.draw(st.integers(1, limit)) for limit in (5, 3, 9, 9))
    pad = data.draw(st.integers(0, 5))
    dtype = data.draw(st.sampled_from([np.uint8, np.float32]))
    images = files.noise((count, channels, height, width), data.draw(st.integers(0, 99))).astype(dtype)
    corner = st.integers(0, 2 * pad)
    shifts = data.draw(st.lists(st.tuples(corner, corner, st.booleans()), min_size=count, max_size=count))
    found = augment.shift_and_flip(torch.from_numpy(images), torch.tensor(shifts).long(), pad)
    assert found.dtype == torch.from_numpy(images).dtype
    for image, (top, left, mirrored), crop in zip(images, shifts, found.numpy(), strict=True):
        padded = np.pad(image, ((0, 0), (pad, pad), (pad, pad)))
        expected = padded[:, top : top + height, left : left + width]
        np.testing.assert_array_equal(crop, expected[:, :, ::-1] if mirrored else expected)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    epoch=st.integers(0, 400),
    order=st.permutations(range(24)),
    cuts=st.sets(st.integers(1, 23)),
)
def test_images_do_not_depend_on_order_or_batches(seed, epoch, order, cuts):
    images, labels = torch.from_numpy(files.noise((24, 3, 8, 8), 0)), torch.arange(24)
    split = data_splits.ImageTensors(images, labels, pad=2, flip=True, seed=seed)
    split.set_epoch(epoch)
    alone = [split[index] for index in range(24)]
    again = data_splits.ImageTensors(images, labels, pad=2, flip=True, seed=seed)
    again.set_epoch(epoch + 1)  # whatever was drawn before
    again.set_epoch(epoch)
    edges = [0, *sorted(cuts), 24]
    for start, end in itertools.pairwise(edges):
        for index, (image, label) in zip(order[start:end], again.__getitems__(order[start:end]), strict=True):
            assert torch.equal(image, alone[index][0])
            assert label == index
            assert label.dtype == torch.int64


def test_every_shift_and_mirroring_is_equally_likely():
    draws = augment.draw_shifts(40_000, 2, True, seed=3, epoch=5)
    cells, counts = torch.unique(draws, dim=0, return_counts=True)
    assert cells.tolist() == [[top, left, flip] for top in range(5) for left in range(5) for flip in range(2)]
    assert chisquare(counts.numpy()).pvalue > 1e-3
    assert augment.draw_shifts(1000, 2, False, seed=3, epoch=5)[:, 2].sum() == 0


def test_epochs_and_seeds_give_other_draws():
    pairs = [(seed, epoch) for seed in range(6) for epoch in range(6)]
    draws = {(seed, epoch): augment.draw_shifts(50, 4, True, seed, epoch) for seed, epoch in pairs}
    assert len({tuple(draw.flatten().tolist()) for draw in draws.values()}) == len(pairs)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    return files.write_folders(tmp_path_factory.mktemp("folders"))


@pytest.fixture(scope="module")
def fashion(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fashion")
    files.write_fashion(folder, 40, 20)
    return folder


@pytest.fixture(params=["fashion_mnist", "image_folder", "digits"])
def any_set(request, folders, fashion):
    """A set in memory, a set of files, and the floats, each as a function of further settings."""
    place = {"fashion_mnist": fashion, "image_folder": folders, "digits": None}[request.param]
    return functools.partial(load, request.param, place)


def test_training_images_are_a_function_of_seed_epoch_and_index(any_set):
    split = any_set(seed=4).train
    split.set_epoch(3)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    images, labels = all_of(split)
    random.seed(2), np.random.seed(2), torch.manual_seed(2)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    for again in (split, any_set(seed=4).train):
        again.set_epoch(3)
        parts = [again[index] for index in range(len(again))]
        assert torch.equal(torch.stack([image for image, _ in parts]), images)
        assert torch.equal(torch.stack([label for _, label in parts]), labels)
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])
    for workers in (1, 2):
        found = all_of(split, num_workers=workers)
        assert torch.equal(found[0], images)
        assert torch.equal(found[1], labels)

    split.set_epoch(4)
    assert not torch.equal(all_of(split)[0], images)
    assert torch.equal(all_of(split, num_workers=2)[0], all_of(split)[0])  # the workers learn of the new epoch
    other = any_set(seed=5).train
    other.set_epoch(3)
    assert not torch.equal(all_of(other)[0], images)


def test_test_images_never_vary_and_nothing_does_with_augment_off(any_set):
    data, plain = any_set(), any_set(augment=False)
    test, train = all_of(data.test)[0], all_of(plain.train)[0]
    for epoch in (1, 2):
        data.test.set_epoch(epoch)
        plain.train.set_epoch(epoch)
        assert torch.equal(all_of(data.test)[0], test)
        assert torch.equal(all_of(plain.train)[0], train)
    assert torch.equal(all_of(plain.test)[0], test)
    assert not torch.equal(all_of(data.train)[0], train)


def test_digits_shift_by_an_original_pixel_and_are_never_mirrored():
    data = load("digits", size=16, seed=1)
    plain = load("digits", size=16, augment=False)
    images, originals = all_of(data.train)[0], all_of(plain.train)[0]
    assert (len(data.train), len(data.test), data.num_classes, data.channels) == (1257, 540, 10, 1)
    padded = torch.nn.functional.pad(originals, [2] * 4)
    crops = [padded[:, :, top : top + 16, left : left + 16] for top in range(5) for left in range(5)]
    same = torch.stack([(images == crop).flatten(1).all(1) for crop in crops])
    assert same.any(0).all()
    assert same.any(1).all()
    assert torch.equal(load("digits", size=16, seed=9).test.images, data.test.images)
    assert sorted(torch.bincount(data.test.labels).tolist()) == sorted(
        np.bincount(data.test.labels.numpy()).tolist()
    )  # stratified: every class in its share
    assert torch.bincount(data.test.labels).min() >= 52


def test_normalise_gives_training_images_mean_0_and_deviation_1(any_set):
    data = any_set(augment=False)
    images = all_of(data.train)[0]
    found = data.normalise(images)
    assert found.dtype == torch.float32
    floats = images.double() / 255 if images.dtype == torch.uint8 else images.double()
    assert torch.allclose(data.normalise(floats.float()), found, atol=1e-5)
    if isinstance(data.train, data_splits.ImageTensors):
        assert found.mean().abs() < 1e-4
        assert abs(found.std(correction=0) - 1) < 1e-4
    else:  # ImageNet's published figures
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        expected = (floats - mean[:, None, None]) / std[:, None, None]
        assert torch.allclose(found.double(), expected, atol=1e-5)


def test_moments_of_a_channel_without_spread_can_be_divided_by():
    mean, std = data_memory.moments(torch.full((4, 1, 5, 5), 51, dtype=torch.uint8))
    assert mean == pytest.approx([0.2])
    assert std == pytest.approx([1 / 255])


# --- the subset ------------------------------------------------------------------------------------------------------


def test_train_images_is_a_fixed_stratified_subset(fashion):
    whole = load("fashion_mnist", fashion, 28, augment=False).train
    part = [load("fashion_mnist", fashion, 28, augment=False, seed=seed, train_images=20).train for seed in (0, 1)]
    assert torch.equal(part[0].images, part[1].images)
    assert torch.bincount(part[0].labels).tolist() == [2] * 10
    pairs = {(image.numpy().tobytes(), int(label)) for image, label in zip(whole.images, whole.labels, strict=True)}
    chosen = {
        (image.numpy().tobytes(), int(label)) for image, label in zip(part[0].images, part[0].labels, strict=True)
    }
    assert len(chosen) == 20
    assert chosen < pairs
    assert len(load("fashion_mnist", fashion, 28, train_images=40).train) == 40


def test_train_images_of_files_takes_the_same_share_of_each_class(folders):
    data = load("image_folder", folders, train_images=6)
    assert torch.bincount(all_of(data.train)[1]).tolist() == [2, 2, 2]
    assert len(data.test) == 12


@pytest.mark.parametrize("count", [9, 41, 31])
def test_train_images_out_of_range_is_refused(fashion, count):
    with pytest.raises(RecipeError, match=rf"train_images is {count}; .* has 40 .* expected from 10 to 30, or 40"):
        load("fashion_mnist", fashion, train_images=count)


def test_train_images_of_a_class_with_one_image_is_refused(tmp_path):
    root = files.write_folders(tmp_path)
    for index in range(1, 4):
        next((root / "train" / "ant").glob(f"{index}.*")).unlink()
    with pytest.raises(
        RecipeError, match=r"train_images is 4; image_folder has no stratified subset: .*least populated"
    ):
        load("image_folder", root, train_images=4)


# --- names -----------------------------------------------------------------------------------------------------------


def test_unknown_data_set_names_its_neighbours():
    with pytest.raises(RecipeError, match=r"unknown dataset 'cifra10'; did you mean cifar10 .*Known: digits, .*wds/"):
        load("cifra10")


def test_wrong_num_classes_is_refused():
    with pytest.raises(RecipeError, match=r"num_classes is 7, but digits has 10 classes; leave --num_classes out"):
        load("digits", num_classes=7)
    assert load("digits", num_classes=10).num_classes == 10


# --- CIFAR -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind"), [("cifar10", CIFAR10), ("cifar100", CIFAR100)])
def test_cifar_from_its_folder(tmp_path, monkeypatch, name, kind):
    contents = files.write_cifar(tmp_path, kind, monkeypatch, count=100)
    data = load(name, tmp_path, augment=False)
    batches = [contents[batch] for batch, _ in kind.train_list]
    assert np.array_equal(data.train.images, np.concatenate([images for images, _ in batches]))
    assert data.train.labels.tolist() == [label for _, labels in batches for label in labels]
    assert np.array_equal(data.test.images, contents[kind.test_list[0][0]][0])
    assert (data.num_classes, data.channels, data.streamed) == (int(name[5:]), 3, False)
    pixels = data.train.images.numpy() / 255
    expected = (pixels[:5] - pixels.mean((0, 2, 3), keepdims=True)) / pixels.std((0, 2, 3), keepdims=True)
    np.testing.assert_allclose(data.normalise(data.train.images[:5]), expected, atol=1e-5)
    large = load(name, tmp_path, size=48)
    assert large.train.images.shape == (len(data.train), 3, 48, 48)
    assert (large.train.images.dtype, large.train.pad, large.train.flip) == (torch.uint8, 6, True)
    assert large.test[0][0].shape == (3, 48, 48)


def test_cifar_from_the_archive_in_data_dir(tmp_path, monkeypatch):
    contents = files.write_cifar(tmp_path, CIFAR10, monkeypatch)
    archive = files.write_cifar_archive(tmp_path, CIFAR10, monkeypatch)
    assert np.array_equal(load("cifar10", tmp_path).test.images, contents["test_batch"][0])
    assert left_in(tmp_path) == ["cifar-10-batches-py", archive.name]


def test_cifar_is_downloaded(tmp_path, monkeypatch, server):
    served, address = server
    contents = files.write_cifar(served, CIFAR10, monkeypatch)
    archive = files.write_cifar_archive(served, CIFAR10, monkeypatch)
    monkeypatch.setattr(CIFAR10, "url", address + archive.name)
    data = load("cifar10", tmp_path / "new", download=True)
    assert np.array_equal(data.test.images, contents["test_batch"][0])
    assert left_in(tmp_path / "new") == ["cifar-10-batches-py", archive.name]


def test_cifar_that_is_not_there_says_what_is_expected(tmp_path, monkeypatch, nowhere):
    expected = (
        r"cifar10 is not in .*: expected cifar-10-batches-py/ or cifar-10-python.tar.gz there \(from https://www.cs"
    )
    with pytest.raises(RecipeError, match=expected):
        load("cifar10", tmp_path)
    monkeypatch.setattr(CIFAR10, "url", nowhere + CIFAR10.filename)
    with pytest.raises(RecipeError, match=r"cannot download cifar10 from http://.*refused.*; try again, or put"):
        load("cifar10", tmp_path, download=True)
    assert left_in(tmp_path) == []


def test_cifar_download_that_breaks_off_leaves_nothing(tmp_path, monkeypatch, server):
    served, address = server
    files.write_cifar(served, CIFAR10, monkeypatch)
    archive = files.write_cifar_archive(served, CIFAR10, monkeypatch)
    archive.write_bytes(archive.read_bytes()[:-1000])
    monkeypatch.setattr(CIFAR10, "url", address + archive.name)
    with pytest.raises(RecipeError, match=r"cannot download cifar10 from .*File not found or corrupted"):
        load("cifar10", tmp_path / "new", download=True)
    assert left_in(tmp_path / "new") == []


def test_damaged_cifar_files_are_named(tmp_path, monkeypatch):
    files.write_cifar(tmp_path, CIFAR10, monkeypatch)
    batch = tmp_path / CIFAR10.base_folder / "data_batch_3"
    whole = batch.read_bytes()
    batch.write_bytes(whole[:-100])
    with pytest.raises(RecipeError, match=r"data_batch_3 is damaged: its MD5 is not \w{32}; delete .* fetch it again"):
        load("cifar10", tmp_path)
    batch.unlink()
    with pytest.raises(RecipeError, match=r"data_batch_3 is missing; delete"):
        load("cifar10", tmp_path)
    batch.write_bytes(whole)
    archive = files.write_cifar_archive(tmp_path, CIFAR10, monkeypatch)
    archive.write_bytes(archive.read_bytes()[:-1000])
    with pytest.raises(RecipeError, match=r"cifar-10-python.tar.gz is damaged: its MD5 is not \w{32}"):
        load("cifar10", tmp_path)
    monkeypatch.setattr(CIFAR10, "tgz_md5", files.md5_of(archive))
    with pytest.raises(RecipeError, match=r"cannot extract .*cifar-10-python.tar.gz: "):
        load("cifar10", tmp_path)
    assert left_in(tmp_path) == [archive.name]


def test_archive_of_something_else_is_refused(tmp_path, monkeypatch):
    files.write_cifar(tmp_path, CIFAR100, monkeypatch)
    archive = files.write_cifar_archive(tmp_path, CIFAR100, monkeypatch)
    archive.rename(tmp_path / CIFAR10.filename)
    monkeypatch.setattr(CIFAR10, "tgz_md5", CIFAR100.tgz_md5)
    with pytest.raises(RecipeError, match=r"cifar-10-python.tar.gz holds no cifar-10-batches-py/"):
        load("cifar10", tmp_path)
    assert left_in(tmp_path) == [CIFAR10.filename]


def test_data_dir_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match=r"cannot write to data_dir .*file/data: .*; name another with --data_dir"):
        load("cifar10", tmp_path / "file" / "data", download=True)


def fetch_in_process(data_dir: Path, queue) -> None:
    queue.put(len(load("cifar10", data_dir).train))


def test_processes_that_need_the_same_archive_extract_it_once(tmp_path, monkeypatch):
    files.write_cifar(tmp_path, CIFAR10, monkeypatch)
    files.write_cifar_archive(tmp_path, CIFAR10, monkeypatch)
    context = multiprocessing.get_context("fork")  # the patched MD5s go with it
    queue = context.Queue()
    processes = [context.Process(target=fetch_in_process, args=(tmp_path, queue)) for _ in range(3)]
    for process in processes:
        process.start()
    assert [queue.get(timeout=60) for _ in processes] == [100] * 3
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert left_in(tmp_path) == [CIFAR10.base_folder, CIFAR10.filename]


# --- Fashion-MNIST ---------------------------------------------------------------------------------------------------


def test_fashion_mnist_without_data_dir_is_the_systems(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # no data/ here
    if not data_memory.DEBIAN.is_dir():  # files of the same size, then, through the same code
        files.write_fashion(tmp_path / "system", 60_000, 10_000)
        monkeypatch.setattr(data_memory, "DEBIAN", tmp_path / "system")
    data = load("fashion_mnist", None, 28)
    assert data.train.images.shape == (60_000, 1, 28, 28)
    assert data.test.images.shape == (10_000, 1, 28, 28)
    assert data.train.images.dtype == torch.uint8
    assert torch.bincount(data.train.labels).tolist() == [6000] * 10
    assert torch.bincount(data.test.labels).tolist() == [1000] * 10
    assert (data.num_classes, data.channels, data.train.pad, data.train.flip) == (10, 1, 4, True)


@pytest.mark.parametrize("layout", ["gz", "plain", "torchvision"])
def test_fashion_mnist_in_each_layout(tmp_path, layout):
    place = tmp_path / "FashionMNIST" / "raw" if layout == "torchvision" else tmp_path
    contents = files.write_fashion(place, 30, 20, zipped=layout == "gz")
    data = load("fashion_mnist", tmp_path, 28, augment=False)
    for split, name in ((data.train, "train"), (data.test, "t10k")):
        assert np.array_equal(split.images.squeeze(1), contents[name][0])
        assert np.array_equal(split.labels, contents[name][1])


def test_fashion_mnist_is_downloaded(tmp_path, monkeypatch, server, nowhere):
    served, address = server
    contents = files.write_fashion(served, 30, 20)
    checks = [(name, files.md5_of(served / name)) for name, _ in FashionMNIST.resources]
    monkeypatch.setattr(FashionMNIST, "resources", checks)
    monkeypatch.setattr(FashionMNIST, "mirrors", [nowhere])
    with pytest.raises(RecipeError, match=r"cannot download fashion_mnist from .*train-images.*refused"):
        load("fashion_mnist", tmp_path / "new", 28, download=True)
    assert left_in(tmp_path / "new") == []
    monkeypatch.setattr(FashionMNIST, "mirrors", [address])
    for _ in range(2):  # the second time from the disk
        data = load("fashion_mnist", tmp_path / "new", 28, download=True)
        assert np.array_equal(data.test.images.squeeze(1), contents["t10k"][0])
        (served / checks[0][0]).unlink(missing_ok=True)
    assert left_in(tmp_path / "new") == ["FashionMNIST"]


def test_fashion_mnist_that_is_not_there_or_in_part(tmp_path):
    with pytest.raises(
        RecipeError, match=r"fashion_mnist is not in .*: expected train-images-idx3-ubyte, .*--download"
    ):
        load("fashion_mnist", tmp_path)
    files.write_fashion(tmp_path, 30, 20)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(RecipeError, match=r"has only some files of fashion_mnist; missing: t10k-labels-idx1-ubyte"):
        load("fashion_mnist", tmp_path)


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
def test_damaged_fashion_mnist_files_are_named(tmp_path, name):
    files.write_fashion(tmp_path, 30, 20)
    path = tmp_path / f"{name}.gz"
    whole = path.read_bytes()
    raw = gzip.decompress(whole)
    for damaged in (whole[:-20], b"no gzip file", gzip.compress(raw[:-5]), gzip.compress(raw[:3]), gzip.compress(b"")):
        path.write_bytes(damaged)
        with pytest.raises(RecipeError, match=rf"{name}.gz is no whole idx file: .+; fetch it again"):
            load("fashion_mnist", tmp_path)
    path.unlink()
    (tmp_path / name).write_bytes(raw[:-5])
    with pytest.raises(RecipeError, match=rf"{name} is no whole idx file: .+; fetch it again"):
        load("fashion_mnist", tmp_path)


@pytest.mark.parametrize("labels", [np.zeros(29, np.uint8), np.full(30, 10, np.uint8)])
def test_fashion_mnist_files_that_do_not_belong_together(tmp_path, labels):
    files.write_fashion(tmp_path, 30, 20)
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(files.idx_bytes(labels)))
    with pytest.raises(RecipeError, match=rf"do not belong together: 30 images, {len(labels)} labels up to"):
        load("fashion_mnist", tmp_path)


# --- Tiny ImageNet ---------------------------------------------------------------------------------------------------


def decoded(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).transpose(2, 0, 1)


def test_tiny_imagenet_as_the_archive_has_it(tmp_path):
    folder = files.write_tiny_imagenet(tmp_path)
    data = load("tiny_imagenet", tmp_path, 64, augment=False)
    assert (len(data.train), len(data.test), data.num_classes, data.channels) == (12, 5, 3, 3)
    images, labels = all_of(data.train, num_workers=2)
    assert images.dtype == torch.uint8
    for index, (wnid, number) in enumerate((wnid, number) for wnid in files.WNIDS for number in range(4)):
        path = folder / "train" / wnid / "images" / f"{wnid}_{number}.JPEG"
        assert np.array_equal(images[index], decoded(path))
        assert labels[index] == files.WNIDS.index(wnid)
    images, labels = all_of(data.test)
    assert labels.tolist() == [0, 2, 1, 0, 2]
    assert np.array_equal(images[3], decoded(folder / "val" / "images" / "val_3.JPEG"))
    assert all_of(load("tiny_imagenet", folder, 32).train)[0].shape == (12, 3, 32, 32)  # the folder itself, smaller


def test_tiny_imagenet_crops_within_four_pixels_and_mirrors(tmp_path):
    files.write_tiny_imagenet(tmp_path)
    split, plain = (load("tiny_imagenet", tmp_path, 64, augment=on).train for on in (True, False))
    seen = set()
    for epoch in range(4):
        split.set_epoch(epoch)
        for image, original in zip(all_of(split)[0].numpy(), all_of(plain)[0].numpy(), strict=True):
            padded = np.pad(original, ((0, 0), (4, 4), (4, 4)))
            match = [
                (top, left, mirrored)
                for top in range(9)
                for left in range(9)
                for mirrored in (False, True)
                if np.array_equal(image[:, :, ::-1] if mirrored else image, padded[:, top : top + 64, left : left + 64])
            ]
            assert len(match) == 1
            seen |= set(match)
    assert len(seen) > 30
    assert {mirrored for *_, mirrored in seen} == {False, True}


def test_tiny_imagenet_with_a_rearranged_validation_folder(tmp_path):
    folder = files.write_tiny_imagenet(tmp_path)
    expected = {int(image.sum()): int(label) for image, label in load("tiny_imagenet", tmp_path, 64).test}
    for line in (folder / "val" / "val_annotations.txt").read_text().splitlines():
        name, wnid, *_ = line.split("\t")
        (folder / "val" / wnid).mkdir(exist_ok=True)
        (folder / "val" / "images" / name).rename(folder / "val" / wnid / name)
    (folder / "val" / "images").rmdir()
    (folder / "val" / "val_annotations.txt").unlink()
    assert {int(image.sum()): int(label) for image, label in load("tiny_imagenet", tmp_path, 64).test} == expected
    shutil.rmtree(folder / "val" / files.WNIDS[2])
    with pytest.raises(RecipeError, match=r"classes of tiny_imagenet differ \(only in train: n01641577\)"):
        load("tiny_imagenet", tmp_path, 64)


def test_tiny_imagenet_is_downloaded_and_extracted(tmp_path, monkeypatch, server):
    served, address = server
    archive = files.write_zip(files.write_tiny_imagenet(served))
    monkeypatch.setattr(data_folders, "TINY_IMAGENET_URL", address + archive.name)
    with pytest.raises(RecipeError, match=r"cannot download tiny_imagenet .*corrupted"):  # its MD5 is not the real one
        load("tiny_imagenet", tmp_path / "new", 64, download=True)
    assert left_in(tmp_path / "new") == []
    monkeypatch.setattr(data_folders, "TINY_IMAGENET_MD5", files.md5_of(archive))
    assert len(load("tiny_imagenet", tmp_path / "new", 64, download=True).train) == 12
    assert left_in(tmp_path / "new") == ["tiny-imagenet-200", "tiny-imagenet-200.zip"]


def test_damaged_tiny_imagenet_archive(tmp_path, monkeypatch):
    with pytest.raises(RecipeError, match=r"tiny_imagenet is not in .*tiny-imagenet-200/ or tiny-imagenet-200.zip"):
        load("tiny_imagenet", tmp_path, 64)
    archive = files.write_zip(files.write_tiny_imagenet(tmp_path))
    with pytest.raises(
        RecipeError, match=r"tiny-imagenet-200.zip is damaged: its MD5 is not 90528d7ca1a48142e341f4ef8d"
    ):
        load("tiny_imagenet", tmp_path, 64)
    archive.write_bytes(archive.read_bytes()[:-200])
    monkeypatch.setattr(data_folders, "TINY_IMAGENET_MD5", files.md5_of(archive))
    with pytest.raises(RecipeError, match=r"cannot extract .*tiny-imagenet-200.zip: "):
        load("tiny_imagenet", tmp_path, 64)
    assert left_in(tmp_path) == [archive.name]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("val_0.JPEG\tn99999999\t0\t0\t1\t1\n", r"line 1: 'val_0.JPEG' is of class 'n99999999', which has no folder"),
        ("val_0.JPEG\tn01443537\nval_9.JPEG\tn01443537\n", r"line 2: .*val_9.JPEG is missing; extract"),
        ("val_0.JPEG\n", r"line 1: 'val_0.JPEG' is of class '', .*expected <file><tab><class>"),
        ("", r"val_annotations.txt is empty"),
        (None, r"has images/ but no val_annotations.txt"),
    ],
)
def test_wrong_annotations_are_named(tmp_path, lines, message):
    annotations = files.write_tiny_imagenet(tmp_path) / "val" / "val_annotations.txt"
    annotations.unlink()
    if lines is not None:
        annotations.write_text(lines)
    with pytest.raises(RecipeError, match=message):
        load("tiny_imagenet", tmp_path, 64)


def test_tiny_imagenet_without_training_folders(tmp_path):
    shutil.rmtree(files.write_tiny_imagenet(tmp_path) / "train")
    with pytest.raises(
        RecipeError, match=r"tiny_imagenet expects .*train/<class>/ with images in each: .*see --data_dir"
    ):
        load("tiny_imagenet", tmp_path, 64)


# --- one's own folders -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("test", ["val", "validation", "test"])
def test_image_folder(tmp_path, test):
    data = load("image_folder", files.write_folders(tmp_path, test=test))
    assert (data.num_classes, data.channels, data.streamed) == (3, 3, False)
    for split in (data.train, data.test):
        images, labels = all_of(split)
        assert images.shape == (12, 3, 32, 32)
        assert images.dtype == torch.uint8
        assert labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_image_folder_in_another_layout(tmp_path):
    with pytest.raises(RecipeError, match=r"image_folder needs train/<class>/ .*missing; found: no such folder"):
        load("image_folder", tmp_path / "missing")
    with pytest.raises(RecipeError, match=r"found: nothing"):
        load("image_folder", tmp_path)
    shutil.rmtree(files.write_folders(tmp_path) / "val")
    with pytest.raises(RecipeError, match=r"needs train/<class>/ and val/<class>/ .*; found: train"):
        load("image_folder", tmp_path)


def test_image_folder_with_an_empty_class_is_named(tmp_path):
    (files.write_folders(tmp_path) / "train" / "dog").mkdir()
    with pytest.raises(RecipeError, match=r"Found no valid file for the classes dog"):
        load("image_folder", tmp_path)


def test_image_folder_with_too_few_or_differing_classes(tmp_path):
    root = files.write_folders(tmp_path)
    (root / "val" / "cow").rename(root / "val" / "dog")
    with pytest.raises(RecipeError, match=r"differ \(only in train: cow; only in test: dog\); expected the same 3"):
        load("image_folder", root)
    for path in (root / "train" / "ant", root / "train" / "bee"):
        shutil.rmtree(path)
    with pytest.raises(RecipeError, match=r"image_folder has 1 class \(cow\); expected two or more"):
        load("image_folder", root)


def test_classes_in_another_order_are_refused():
    with pytest.raises(RecipeError, match=r"differ \(in their order\); expected the same 2 classes"):
        data_splits.check_classes("x", ["a", "b"], ["b", "a"])


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_cannot_be_decoded_is_named(tmp_path, workers):
    root = files.write_folders(tmp_path)
    for name, content in (("0.jpg", (root / "train" / "bee" / "0.jpg").read_bytes()[:300]), ("1.png", b"no image")):
        broken = root / "train" / "bee" / name
        whole = broken.read_bytes()
        broken.write_bytes(content)
        with pytest.raises(RecipeError, match=rf"cannot decode the image .*train/bee/{name}: .*; replace or remove it"):
            all_of(load("image_folder", root).train, num_workers=workers)
        broken.write_bytes(whole)


# --- timm's sets with random access ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parquet(tmp_path_factory) -> Path:
    return files.write_parquet(tmp_path_factory.mktemp("hub") / "animals")


def levels_of(split, **options) -> tuple[list[int], list[int]]:
    """The grey level of each image, which is its number in its file, and the labels."""
    images, labels = all_of(split, **options)
    assert images.dtype == torch.uint8
    assert labels.dtype == torch.int64
    assert torch.equal(images.amax((1, 2, 3)), images.amin((1, 2, 3)))
    return images[:, 0, 0, 0].tolist(), labels.tolist()


def test_hugging_face_set_from_local_files(tmp_path, parquet):
    name = f"hfds/{parquet}"
    data = load(name, tmp_path)
    assert (data.num_classes, data.channels, data.streamed) == (3, 3, False)
    for split in (data.train, data.test):
        for workers in (0, 2):
            assert levels_of(split, num_workers=workers) == (list(range(12)), [0, 1, 2] * 4)
    assert len(load(f"HFDS/{parquet}", tmp_path, train_split="train[:50%]").train) == 6
    levels, labels = levels_of(load(name, tmp_path, train_images=6).train)
    assert sorted(labels) == [0, 0, 1, 1, 2, 2]
    assert len(set(levels)) == 6
    with pytest.raises(RecipeError, match=r"num_classes is 5, but hfds/.* has 3 classes"):
        load(name, tmp_path, num_classes=5)


def write_rows(root: Path, rows: list[dict]) -> str:
    """A Hugging Face set without a card and without names of classes."""
    import datasets

    features = datasets.Features(image=datasets.Image(), label=datasets.Value("int64"))
    root.mkdir()
    for split in ("train", "validation"):
        datasets.Dataset.from_list(rows, features=features).to_parquet(root / f"{split}.parquet")
    return f"hfds/{root}"


def test_hugging_face_set_that_does_not_name_its_classes(tmp_path):
    rows = [{"image": {"bytes": files.flat_png(index), "path": None}, "label": index % 4} for index in range(8)]
    name = write_rows(tmp_path / "set", rows)
    assert load(name, tmp_path / "cache").num_classes == 4
    assert load(name, tmp_path / "cache", num_classes=6).num_classes == 6
    data = load(name, tmp_path / "cache", num_classes=3)
    with pytest.raises(RecipeError, match=r"image 3 of hfds/.* has class 3; expected an index below num_classes, 3"):
        all_of(data.train)


def test_broken_image_of_a_hugging_face_set_is_not_passed_over(tmp_path):
    rows = [{"image": {"bytes": files.flat_png(index), "path": None}, "label": index % 2} for index in range(4)]
    rows[2]["image"]["bytes"] = rows[2]["image"]["bytes"][:60]
    data = load(write_rows(tmp_path / "set", rows), tmp_path / "cache")
    with pytest.raises(RecipeError, match=r"cannot decode the image 2 of hfds/.*: .*; replace or remove it"):
        all_of(data.test)


def test_torchvision_set_by_timms_name(tmp_path, monkeypatch):
    contents = files.write_cifar(tmp_path, CIFAR10, monkeypatch)
    data = load("torch/cifar10", tmp_path, augment=False, size=28, train_images=30)
    assert (data.num_classes, data.channels, len(data.train), len(data.test)) == (10, 3, 30, 20)
    assert torch.bincount(all_of(data.train)[1]).tolist() == [3] * 10
    image, label = data.test[4]
    centre = contents["test_batch"][0][4][:, 2:30, 2:30]  # timm scales 32 to 32 and takes the middle
    assert np.array_equal(image, centre)
    assert label == 4


def test_torchvision_set_without_a_list_of_labels(monkeypatch, tmp_path):
    pairs = [(Image.new("L", (8, 8), index), index % 3) for index in range(9)]
    from image_data import timm_sets as data_timm

    monkeypatch.setattr(data_timm, "create_dataset", lambda *_, **__: pairs)
    data = load("torch/thing", tmp_path)
    assert (data.num_classes, len(data.train), data.train[4][1]) == (3, 9, 1)


def test_set_that_timm_cannot_open(tmp_path):
    with pytest.raises(RecipeError, match=r"timm cannot open split 'train' of hfds//nowhere/x .*see --dataset"):
        load("hfds//nowhere/x", tmp_path)
    with pytest.raises(RecipeError, match=r"timm cannot open split 'train' of torch/cifar10 .*not found or corrupted"):
        load("torch/cifar10", tmp_path)


@pytest.mark.parametrize(
    ("name", "package"),
    [("hfds/x", "datasets"), ("hfids/x", "datasets"), ("wds/x", "webdataset"), ("tfds/x", "tensorflow-datasets")],
)
def test_missing_package_is_named(tmp_path, monkeypatch, name, package):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(RecipeError, match=rf"dataset {name} needs the package {package}; pip install {package}$"):
        load(name, tmp_path)


# --- streams ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return files.write_shards(tmp_path_factory.mktemp("shards"))


def stream(shards: Path, **values) -> data_splits.ImageData:
    return load("wds/animals", shards, **{"num_classes": 3, "batch_size": 6} | values)


@pytest.mark.parametrize("workers", [0, 2])
def test_stream_of_shards(shards, workers):
    data = stream(shards, num_workers=workers)
    assert (data.num_classes, data.channels, data.streamed) == (3, 3, True)
    assert (len(data.train), len(data.test)) == (24, 12)
    test = levels_of(data.test, batch_size=6, num_workers=workers)
    assert sorted(test[0]) == list(range(12))  # every image once
    orders = []
    for epoch in (0, 1):
        data.train.set_epoch(epoch)
        loader = DataLoader(data.train, 6, drop_last=True, num_workers=workers)
        assert len(loader) == 4
        levels, labels = levels_of(data.train, batch_size=6, drop_last=True, num_workers=workers)
        assert sorted(levels) == list(range(24))
        assert labels == [level % 3 for level in levels]
        orders.append(levels)
    assert orders[0] != orders[1]
    assert levels_of(data.test, batch_size=6, num_workers=workers) == test
    torch.manual_seed(99)
    resumed = stream(shards, num_workers=workers)  # another process would start so, in the second epoch
    resumed.train.set_epoch(1)
    assert levels_of(resumed.train, batch_size=6, num_workers=workers)[0] == orders[1]
    other = stream(shards, num_workers=workers, seed=1)
    other.train.set_epoch(1)
    assert levels_of(other.train, batch_size=6, num_workers=workers)[0] != orders[1]


def bytes_of(images: torch.Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in images}


def test_augmentation_of_a_stream_is_a_function_of_seed_and_epoch(tmp_path):
    root = files.write_shards(tmp_path, png=files.noisy_png)

    def images(seed: int, epoch: int, workers: int = 0, augment: bool = True) -> torch.Tensor:
        torch.seed()  # whatever else was drawn
        data = stream(root, seed=seed, num_workers=workers, augment=augment)
        data.train.set_epoch(epoch)
        return all_of(data.train, batch_size=6, num_workers=workers)[0]

    found = {(seed, epoch): images(seed, epoch) for seed in (0, 1) for epoch in (0, 1)}
    for (seed, epoch), first in found.items():
        assert torch.equal(images(seed, epoch), first)
        assert len(bytes_of(first)) == 24
    for one, two in itertools.combinations(found.values(), 2):
        assert not bytes_of(one) & bytes_of(two)  # not only in another order
    assert torch.equal(images(0, 1, workers=2), images(0, 1, workers=2))
    assert bytes_of(images(0, 0, augment=False)) == bytes_of(images(1, 1, augment=False))


def test_processes_share_the_training_stream_and_each_see_the_whole_test(shards, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    seen = []
    for rank in (0, 1):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        data = stream(shards, num_workers=2, batch_size=6)
        assert len(data.train) == 12
        seen.append(levels_of(data.train, batch_size=3, num_workers=2, drop_last=True)[0])
        assert sorted(levels_of(data.test, num_workers=2)[0]) == list(range(12))
    assert [len(levels) for levels in seen] == [12, 12]
    assert sorted(seen[0] + seen[1]) == list(range(24))
    with pytest.raises(RecipeError, match=r"wds/animals has 4 training shards for 6 processes x loader workers"):
        stream(shards, num_workers=3)


def test_stream_of_hugging_face(tmp_path, parquet):
    data = load(f"hfids/{parquet}", tmp_path, batch_size=4)
    assert (data.num_classes, data.streamed, len(data.train), len(data.test)) == (3, True, 12, 12)
    assert levels_of(data.test) == (list(range(12)), [0, 1, 2] * 4)
    orders = []
    for epoch in (0, 1):
        data.train.set_epoch(epoch)
        orders.append(levels_of(data.train, batch_size=4)[0])
        assert sorted(orders[epoch]) == list(range(12))
    assert orders[0] != orders[1]
    resumed = load(f"hfids/{parquet}", tmp_path, batch_size=4, train_split="train|12")
    resumed.train.set_epoch(1)
    assert levels_of(resumed.train, batch_size=4)[0] == orders[1]
    with pytest.raises(RecipeError, match=r"the stream hfids/.* broke off after 0 images: .*Reduce the number"):
        all_of(load(f"hfids/{parquet}", tmp_path, batch_size=4, num_workers=2).train)


def test_stream_whose_length_is_not_known(shards, parquet, tmp_path):
    with pytest.raises(RecipeError, match=r"split 'validation-{0000..0001}.tar' .*is not known; give"):
        stream(shards, test_split="validation-{0000..0001}.tar")
    data = stream(shards, test_split="validation-{0000..0001}.tar|12")
    assert sorted(levels_of(data.test)[0]) == list(range(12))
    shutil.copytree(parquet, tmp_path / "bare")
    (tmp_path / "bare" / "README.md").unlink()
    with pytest.raises(RecipeError, match=r"timm cannot open split 'train' of hfids/.*num_samples"):
        load(f"hfids/{tmp_path / 'bare'}", tmp_path / "cache")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_classes": None}, r"wds/animals is a stream and does not tell its classes; give their --num_classes"),
        ({"train_images": 6}, r"train_images is 6, but wds/animals is a stream; leave it out"),
        ({"data_dir": None}, r"wds/animals needs the folder or URL of its shards and _info.json; give --data_dir"),
        ({"test_split": "val"}, r"timm cannot open split 'val' of wds/animals .*not found in info.*--test_split"),
        ({"num_workers": 5}, r"has 4 training shards for 5 processes x loader workers; expected .* --num_workers 0"),
    ],
)
def test_settings_that_do_not_go_with_a_stream(shards, values, message):
    values = {"data_dir": str(shards), "num_classes": 3} | values
    with pytest.raises(RecipeError, match=message):
        recipe_data.load_data(
            Config(output_dir="x", epochs=1, model="m", image_size=32, dataset="wds/animals", **values)
        )


def test_stream_with_an_unknown_class_is_refused(shards):
    with pytest.raises(RecipeError, match=r"stream wds/animals has class 2; expected an index below num_classes, 2"):
        all_of(stream(shards, num_classes=2).train, batch_size=6)


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_stream_is_refused(tmp_path, workers):
    root = files.write_shards(tmp_path)
    shard = root / "validation-0001.tar"
    shard.write_bytes(shard.read_bytes()[:5000])
    with pytest.raises(RecipeError, match=r"test images came out of .*validation-0001.tar of .*: a shard is damaged"):
        all_of(stream(root, num_workers=workers).test, num_workers=workers)
    shard.unlink()
    with pytest.raises(RecipeError, match=r"wds/animals has no .*validation-0001.tar \(1 of 2 shards are missing\)"):
        stream(root)


def test_info_that_tells_another_number_is_refused(tmp_path):
    root = files.write_shards(tmp_path)
    with pytest.raises(RecipeError, match=r"12 of 13 test images came out of .*_info.json tells another number"):
        all_of(stream(root, test_split="validation-{0000..0001}.tar|13").test)
