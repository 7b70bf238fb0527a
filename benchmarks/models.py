"""The networks that the benchmarks of whole training steps share: how each is built, its images, its batch.

Two are the CIFAR forms of their networks: ResNet-18 with a 3x3 stem of stride 1 and no max-pooling, VGG-16 with the
512-512-10 classifier in place of the one for 7x7 maps. The rest are timm's own, at less than their usual resolution so
that a step takes seconds on one core.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import timm
import torch
from timm.layers.classifier import ClassifierHead
from timm.models.vgg import ConvMlp
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class Benchmarked:
    """A network and what it is trained on.

    Attributes:
        create: makes it, with random weights.
        input_size: shape of one image.
        classes: number of classes.
        batch: images in a step on a CPU.
        last_two: its last two stages that are maps of more than one position.
    """

    create: Callable[[], nn.Module]
    input_size: tuple[int, int, int]
    classes: int
    batch: int
    last_two: tuple[str, str]


def cifar_resnet18() -> nn.Module:
    """ResNet-18 for 32x32 images (He et al. 2016, as CIFAR implementations widen it): 11.2 M parameters."""
    model: Any = timm.create_model("resnet18", num_classes=10)
    model.conv1 = nn.Conv2d(3, 64, 3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    return model  # type: ignore[no-any-return]


def cifar_vgg16_bn() -> nn.Module:
    """VGG-16 with batch norm for 32x32 images, whose last map is 1x1: 15.2 M parameters."""
    model: Any = timm.create_model("vgg16_bn", num_classes=10)
    model.pre_logits = ConvMlp(512, 512, kernel_size=1)
    model.head = ClassifierHead(512, 10, pool_type="avg")
    model.num_features = model.head_hidden_size = 512
    return model  # type: ignore[no-any-return]


def _timm(name: str) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name)


MODELS = {
    "resnet18": Benchmarked(cifar_resnet18, (3, 32, 32), 10, 64, ("layer3", "layer4")),
    "resnet50": Benchmarked(_timm("resnet50"), (3, 128, 128), 1000, 16, ("layer3", "layer4")),
    "efficientnet_b0": Benchmarked(_timm("efficientnet_b0"), (3, 128, 128), 1000, 16, ("blocks.4", "blocks.6")),
    "convnext_atto": Benchmarked(_timm("convnext_atto"), (3, 128, 128), 1000, 16, ("stages.2", "stages.3")),
    "vgg16_bn": Benchmarked(cifar_vgg16_bn, (3, 32, 32), 10, 64, ("features.32", "features.42")),
    # timm's smallest, with which --quick shows that a benchmark works
    "test_resnet": Benchmarked(_timm("test_resnet"), (3, 64, 64), 1000, 8, ("layer3", "layer4")),
}
STUDIED = tuple(name for name in MODELS if name != "test_resnet")


def build(name: str) -> nn.Module:
    """Make a network of MODELS, in train mode."""
    return MODELS[name].create().train()


def images_and_labels(name: str, batch: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Random images (batch, *input_size) and class indices (batch,)."""
    settings = MODELS[name]
    images = torch.randn(batch, *settings.input_size, device=device)
    return images, torch.randint(settings.classes, (batch,), device=device)
