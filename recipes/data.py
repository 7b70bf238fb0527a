"""The data sets a recipe can name: what each gives, and how its training images are augmented."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from settings import RecipeError, near
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

Split = Dataset[tuple[Tensor, ...]]


@dataclass(frozen=True)
class ImageData:
    """Two splits of (image, class index) and what the model and the training loop need to know of them."""

    train: Split
    test: Split
    num_classes: int
    channels: int
    augment: Callable[[Tensor], Tensor]  # (N, C, H, W) -> (N, C, H, W), on the batch's device


def load_data(name: str, image_size: int) -> ImageData:
    """The data set of that name, with square images of image_size.

    Raises:
        RecipeError: no data set has that name.
    """
    if name not in DATASETS:
        raise RecipeError(f"unknown dataset {name!r}; {near(name, DATASETS)} Known: {', '.join(DATASETS)}")
    return DATASETS[name](image_size)


def digits(image_size: int) -> ImageData:
    """scikit-learn's 1,797 real 8x8 images of handwritten digits; it comes inside the package.

    The 30 % test split (540 images) is stratified and always the same: the seed of a run must not choose its test set.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    raw = load_digits()
    train, test = train_test_split(range(len(raw.target)), test_size=0.3, stratify=raw.target, random_state=0)
    labels = torch.from_numpy(raw.target).long()
    images = torch.from_numpy(raw.images).float().unsqueeze(1) / 16
    # once, up front: a small CNN halves 8x8 maps to nothing, and a region of a 1x1 map is no region
    images = F.interpolate(images, size=(image_size, image_size), mode="bilinear", antialias=True)
    mean, std = images[train].mean(), images[train].std()
    images = (images - mean) / std
    background, pixel = float(-mean / std), max(1, image_size // 8)
    return ImageData(
        train=TensorDataset(images[train], labels[train]),
        test=TensorDataset(images[test], labels[test]),
        num_classes=10,
        channels=1,
        augment=lambda batch: random_shift(batch, pixel, background),  # by at most one pixel of the original
    )


def random_shift(images: Tensor, limit: int, fill: float = 0.0) -> Tensor:
    """Shift each image of (N, C, H, W) by up to limit pixels each way: pad with fill, then crop at random.

    The draws come from torch's default generator of the images' device, so seeding torch reproduces them.
    """
    count, _, height, width = images.shape
    device = images.device
    top, left = torch.randint(2 * limit + 1, (2, count, 1), device=device)
    rows = (top + torch.arange(height, device=device))[:, None, :, None]
    columns = (left + torch.arange(width, device=device))[:, None, None, :]
    sample = torch.arange(count, device=device)[:, None, None, None]
    channel = torch.arange(images.shape[1], device=device)[None, :, None, None]
    return F.pad(images, [limit] * 4, value=fill)[sample, channel, rows, columns]


DATASETS: dict[str, Callable[[int], ImageData]] = {"digits": digits}
