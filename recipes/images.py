"""Images: which files are read, how they are decoded, and how training images vary.

Augmentation is a function of (seed, epoch, image) and of nothing else: not of torch's global generator, the order of
the images, the number of processes or of loader workers. A run that is resumed in the middle of an epoch, or repeated
on more processes, sees the same images.
"""

import io
import math
import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from settings import RecipeError
from timm.utils import natural_key
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as tv

Sample = tuple[Tensor, int]  # image (C, H, W), uint8 or float in [0, 1]; class index, -100 without a label

# --- files -----------------------------------------------------------------------------------------------------------


def find_images(folder: Path, left_out: Counter[str], max_megapixels: float | None = None) -> dict[str, list[Path]]:
    """Return the files below folder/<class>/ that Pillow opens, classes in timm's order; count what is left out.

    Raises:
        RecipeError: there are no class folders, or one has no images.
    """
    if not folder.is_dir():
        raise RecipeError(f"there is no folder {folder}; see --data_dir")
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir(), key=lambda path: natural_key(path.name)):  # 2, 10, 30
        if path.name.startswith("."):
            left_out["hidden"] += 1
        elif path.is_dir():
            found[path.name] = walk_images(path, left_out, max_megapixels)
            if not found[path.name]:
                raise RecipeError(f"{path} has no images; remove the folder, or put images of its class there")
        else:
            left_out["not in the folder of a class"] += 1
    if not found:
        raise RecipeError(f"{folder} has no folders of classes; expected {folder}/<class>/ with images in each")
    return found


def walk_images(folder: Path, left_out: Counter[str], max_megapixels: float | None = None) -> list[Path]:
    """Return the image files below a folder in a fixed order, each once however links lead there."""
    Image.init()
    endings = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    found, seen, waiting = [], set(), [folder]
    while waiting:
        here = waiting.pop()
        real = here.resolve()
        if real in seen or (here != folder and folder.resolve().is_relative_to(real)):
            left_out["a link to a folder that is read already"] += 1
            continue
        seen.add(real)
        for path in sorted(here.iterdir(), key=lambda path: natural_key(path.name)):
            if path.name.startswith("."):
                left_out["hidden"] += 1
            elif path.is_dir():
                waiting.append(path)
            elif path.suffix.lower() not in endings:
                left_out[f"{path.suffix or 'no ending'}, which Pillow does not open"] += 1
            elif not path.exists():
                left_out["a broken link"] += 1
            elif max_megapixels is not None and count_megapixels(path) > max_megapixels:
                left_out[f"above {max_megapixels:g} megapixels"] += 1
            else:
                found.append(path)
    return sorted(found, key=lambda path: natural_key(str(path)))


def count_megapixels(path: Path) -> float:
    """Return the size of an image without decoding it; infinity beyond Pillow's limit."""
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path) as image:
            return image.width * image.height / 1e6
    except Image.DecompressionBombError:
        return math.inf
    except (OSError, SyntaxError, ValueError) as error:
        raise RecipeError(f"cannot decode the image {path}: {error}; replace or remove it") from error


def read_image(source: Path | bytes | Image.Image, name: str) -> Image.Image:
    """Return an image as a viewer shows it: turned by EXIF, on white where it is transparent, RGB of 8 bits.

    Raises:
        RecipeError: it cannot be decoded, is beyond Pillow's limit, or its values have no known scale; names it.
    """
    try:
        if not isinstance(source, Image.Image):
            source = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
        with source:
            image = ImageOps.exif_transpose(source)
            if image.mode.startswith("I") or image.mode == "F":
                image = Image.fromarray(scale_to_bytes(np.asarray(image), image.mode))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise RecipeError(f"cannot decode the image {name}: {error}; replace or remove it") from error


def scale_to_bytes(pixels: Any, mode: str) -> Any:
    """Scale grey values of 16 bits, of 32-bit integers from 0 to 65535, or floats from 0 to 1 to 8 bits.

    Raises:
        ValueError: the values are on another scale, or not finite.
    """
    low, high = float(pixels.min()), float(pixels.max())
    known = {"F": 0 <= low <= high <= 1, "I": low >= 0 and (high == 0 or 255 < high <= 65535)}  # False for nan
    if not known.get(mode, True):
        scale = "finite floats from 0 to 1" if mode == "F" else "32-bit integers on a scale to 65535"
        raise ValueError(f"it has values from {low:g} to {high:g} (mode {mode}); expected {scale}")
    return np.rint(pixels.astype(np.float64) * (255 if mode == "F" else 1 / 257)).astype(np.uint8)


# --- pools -----------------------------------------------------------------------------------------------------------


def mix_seeds(*numbers: int) -> np.random.SeedSequence:
    """Mix numbers >= 0 into one seed; unlike a sum, (seed 0, epoch 1) differs from (seed 1, epoch 0)."""
    return np.random.SeedSequence(numbers)


@dataclass
class ImageTensors(Dataset[Sample]):
    """Images in memory, (N, C, H, W); for training, each is padded, cropped and mirrored."""

    images: Tensor
    labels: list[int]
    names: list[str] = field(default_factory=list)  # numbers, unless others are passed
    pad: int = 0
    flip: bool = False
    seed: int | None = None  # None: the images do not vary

    def __post_init__(self) -> None:
        self.names = self.names or [str(number) for number in range(len(self.labels))]

    def select(self, indices: Sequence[int], **changes: Any) -> "ImageTensors":
        """Return the images of these indices."""
        chosen: dict[str, Any] = {"images": self.images[list(indices)]}
        chosen |= {key: [getattr(self, key)[index] for index in indices] for key in ("labels", "names")}
        return replace(self, **chosen | changes)

    def set_epoch(self, epoch: int) -> None:
        """Draw the shifts of an epoch for all images: top and left from 0 to 2 * pad, and mirrored, 0 or 1."""
        generator = torch.Generator().manual_seed(int(mix_seeds(self.seed or 0, epoch).generate_state(1)[0]))
        corners = torch.randint(2 * self.pad + 1, (len(self), 2), generator=generator)
        mirrored = torch.randint(1 + self.flip, (len(self), 1), generator=generator)
        self.shifts = torch.cat((corners, mirrored), dim=1)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> list[Sample]:
        """Return a batch, as torch's loader asks for it: one gather instead of one per image."""
        images = self.images[indices]
        if self.seed is not None:
            images = shift_and_flip(images, self.shifts[indices], self.pad)
        return list(zip(images, [self.labels[index] for index in indices], strict=True))


def shift_and_flip(images: Tensor, shifts: Tensor, pad: int) -> Tensor:
    """Pad (N, C, H, W) with black, crop each image at its own (top, left), then mirror it if its third number is 1."""
    count, _, height, width = images.shape
    top, left, mirrored = shifts.unbind(1)
    # a view of all crops, (N, C, 2 * pad + 1, 2 * pad + 1, H, W), of which each image takes one
    crops = F.pad(images, [pad] * 4).unfold(2, height, 1).unfold(3, width, 1)
    taken = crops[torch.arange(count), :, top, left]
    return torch.where(mirrored.bool()[:, None, None, None], taken.flip(3), taken)


@dataclass
class ImageFiles(Dataset[Sample]):
    """Images that are decoded when they are asked for; for training, the transform draws from seeded generators."""

    sources: Sequence[Any]  # paths, or whatever `load` takes
    labels: list[int]
    names: list[str] = field(default_factory=list)  # the paths, unless others are passed
    transform: Callable[[Any], Tensor] | None = None  # PIL image -> uint8 (3, H, W)
    load: Callable[[Any], Path | bytes | Image.Image] = lambda source: source
    seed: int | None = None  # None: the images do not vary

    def __post_init__(self) -> None:
        self.names = self.names or [str(source) for source in self.sources]

    def select(self, indices: Sequence[int], **changes: Any) -> "ImageFiles":
        """Return the images of these indices."""
        chosen = {key: [getattr(self, key)[index] for index in indices] for key in ("sources", "labels", "names")}
        return replace(self, **chosen | changes)

    def set_epoch(self, epoch: int) -> None:
        """Draw the seed of each image for an epoch."""
        self.seeds: list[int] = mix_seeds(self.seed or 0, epoch).generate_state(len(self)).tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> list[Sample]:
        """Return a batch; the generators are saved once for all of it, which per image takes longer than decoding."""
        if self.seed is None:
            return [self.read(index) for index in indices]
        with private_generators() as reseed:
            return [self.read(index, reseed) for index in indices]

    def read(self, index: int, reseed: Callable[[int], None] | None = None) -> Sample:
        """Return one image and its label."""
        assert self.transform is not None
        image = read_image(self.load(self.sources[index]), self.names[index])
        if reseed is not None:
            reseed(self.seeds[index])
        return self.transform(image), self.labels[index]


@contextmanager
def private_generators() -> Iterator[Callable[[int], None]]:
    """Yield a function that seeds Python's, NumPy's and torch's CPU generator; restore their states at the end."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()

    def reseed(seed: int) -> None:
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)

    try:
        yield reseed
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)


# --- corruption ------------------------------------------------------------------------------------------------------


@dataclass
class CorruptedImages(Dataset[Sample]):
    """The images of a split, each corrupted as (seed, index) say."""

    split: Any
    kind: str
    seed: int

    def __post_init__(self) -> None:
        self.names, self.labels = self.split.names, self.split.labels

    def __len__(self) -> int:
        return len(self.split)

    def __getitems__(self, indices: list[int]) -> list[Sample]:
        """Return a batch of corrupted images."""
        samples = self.split.__getitems__(indices)
        return [
            (corrupt(image, self.kind, np.random.default_rng(mix_seeds(self.seed, index))), label)
            for index, (image, label) in zip(indices, samples, strict=True)
        ]


def corrupt(image: Tensor, kind: str, draws: np.random.Generator) -> Tensor:
    """Return (C, H, W) behind a grey square of half its side, with noise, blurred, or with little contrast."""
    values = tv.to_dtype(image, torch.float32, scale=True)
    side = image.shape[-1]
    if kind == "occlusion":
        top, left = draws.integers(0, side - side // 2 + 1, 2)
        values = values.clone()
        values[:, top : top + side // 2, left : left + side // 2] = 0.5
    elif kind == "noise":
        values = values + torch.from_numpy(draws.normal(0, 0.2, values.shape).astype(np.float32))
    elif kind == "blur":
        sigma = side / 16 * draws.uniform(0.5, 1)
        values = tv.gaussian_blur(values, [2 * round(2 * sigma) + 1] * 2, [sigma] * 2)
    else:
        mean = values.mean((1, 2), keepdim=True)
        values = mean + draws.uniform(0.2, 0.4) * (values - mean)
    corrupted: Tensor = tv.to_dtype(values.clamp(0, 1), image.dtype, scale=True)
    return corrupted
