"""The data sets a recipe can name: one function for each, which says what it gives and what it needs.

memory.py has the small ones, folders.py those that lie as image files, timm_sets.py timm's; splits.py says what all of
them give, augment.py how training images vary, fetch.py how files come to lie in their folder.
"""

from collections.abc import Callable

from training.settings import Config, RecipeError, near

from image_data.folders import image_folder, tiny_imagenet
from image_data.memory import cifar10, cifar100, digits, fashion_mnist
from image_data.splits import ImageData
from image_data.timm_sets import PACKAGES, timm_data

__all__ = ["DATASETS", "ImageData", "load_data"]

DATASETS: dict[str, Callable[[Config], ImageData]] = {
    "digits": digits,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "fashion_mnist": fashion_mnist,
    "tiny_imagenet": tiny_imagenet,
    "image_folder": image_folder,
}


def load_data(config: Config) -> ImageData:
    """The data set that config.dataset names, with square images of config.image_size.

    In a distributed run, call it after the process group is up: streams are shared out by it.

    Raises:
        RecipeError: no data set has that name, its files are not there or not as they should be, or the settings do
            not go with it.
    """
    name = config.dataset
    if "/" in name and name.partition("/")[0].lower() in PACKAGES:
        data = timm_data(config)
    elif name in DATASETS:
        data = DATASETS[name](config)
    else:
        raise RecipeError(
            f"unknown dataset {name!r}; {near(name, DATASETS)} Known: {', '.join(DATASETS)}, and timm's: "
            f"{', '.join(f'{prefix}/...' for prefix in PACKAGES)}"
        )
    if config.num_classes not in (None, data.num_classes):
        raise RecipeError(
            f"num_classes is {config.num_classes}, but {name} has {data.num_classes} classes; leave --num_classes out"
        )
    return data
