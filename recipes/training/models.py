"""The networks that a recipe can name: any of timm's, and the forms of the paper's for small images."""

from collections.abc import Callable
from typing import Any

import timm
import torch
from timm.layers.classifier import ClassifierHead
from timm.models.vgg import ConvMlp
from torch import Tensor, nn

from rblock_fx import apply_rblock
from training.settings import Config, RecipeError, near


def with_small_stem(model: Any) -> nn.Module:
    """A timm ResNet for 32x32 images (section 4.1): a 3x3 first convolution of stride 1, and no max-pooling behind it.

    The paper names the convolution alone; pooling right behind it would undo what the stride of 1 is for, and the
    CIFAR ResNets that it follows do without.
    """
    stem = model.conv1
    model.conv1 = nn.Conv2d(stem.in_channels, stem.out_channels, 3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    return model  # type: ignore[no-any-return]


def with_small_head(model: Any) -> nn.Module:
    """A timm VGG whose last maps are 1x1 or 2x2 (images of 32 or 64): one hidden layer of 512 in place of 4096-4096.

    The two large layers are for the 7x7 maps of 224x224 images.
    """
    model.pre_logits = ConvMlp(512, 512, kernel_size=1)
    model.head = ClassifierHead(512, model.num_classes, pool_type="avg")
    model.num_features = model.head_hidden_size = 512
    return model  # type: ignore[no-any-return]


# name here: (timm's name, what is changed for small images)
SMALL: dict[str, tuple[str, Callable[[Any], nn.Module]]] = {
    "cifar_resnet18": ("resnet18", with_small_stem),
    "cifar_resnet34": ("resnet34", with_small_stem),
    "cifar_vgg16": ("vgg16", with_small_head),
    "cifar_vgg16_bn": ("vgg16_bn", with_small_head),
}


def create_model(name: str, **settings: Any) -> nn.Module:
    """The timm model of that name, or one of SMALL; settings are those of timm.create_model.

    Raises:
        RecipeError: no model has that name.
    """
    known, change = SMALL.get(name, (name, None))
    if not timm.is_model(known):
        raise RecipeError(f"unknown model {name!r}; {near(name, [*timm.list_models(), *SMALL])}")
    model: nn.Module = timm.create_model(known, **settings)
    return model if change is None else change(model)


def build_model(config: Config, num_classes: int, channels: int) -> nn.Module:
    """The model of the settings, turned into an R-Block model unless the method is none.

    Raises:
        RecipeError: the model is unknown, cannot be built, or does not take the data set's images.
    """
    shape = (channels, config.image_size, config.image_size)
    try:
        model = create_model(config.model, num_classes=num_classes, in_chans=channels, **config.model_kwargs)
        with torch.no_grad():  # a model that cannot take these images is better refused before anything is written
            output = model.eval()(torch.zeros(1, *shape))
        if not isinstance(output, Tensor) or output.shape != (1, num_classes):
            raise ValueError(f"it gives {_shape_of(output)} where (1, {num_classes}) logits are expected")
    except RecipeError:
        raise
    except Exception as error:  # whatever a constructor, or the hub that pretrained weights come from, makes of them
        raise RecipeError(
            f"model {config.model} with model_kwargs {config.model_kwargs} cannot be built or takes no images of "
            f"{shape}: {error}"
        ) from error
    model.train()
    if config.method != "none":
        apply_rblock(  # in place
            model,
            sites=config.sites,
            method=config.method,
            drop_prob=config.drop_prob,
            block_size=config.block_size,
            calibration=config.calibration,
            batch_norm=config.batch_norm,
            input_size=shape,
        )
    return model


def _shape_of(output: Any) -> str:
    return str(tuple(output.shape)) if isinstance(output, Tensor) else type(output).__name__
