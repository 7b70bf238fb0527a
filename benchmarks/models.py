"""The networks that are trained, timm's at a low resolution; the ways to train them; and a network that is one mask."""

import dataclasses
from collections.abc import Callable
from typing import Any

import timm
import timm.layers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rblock_fx import RBlockLoss, apply_rblock

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Benchmarked:
    """A network with random weights, and its training data."""

    create: Callable[[], nn.Module]
    input_size: tuple[int, int, int]
    classes: int
    batch: int  # images in a step on a CPU
    last_two: tuple[str, str]  # stages


def _timm(name: str, side: int, batch: int, *last_two: str) -> Benchmarked:
    return Benchmarked(lambda: timm.create_model(name), (3, side, side), 1000, batch, last_two)


MODELS = {
    "resnet18": _timm("resnet18", 128, 32, "layer3", "layer4"),
    "resnet50": _timm("resnet50", 128, 16, "layer3", "layer4"),
    "efficientnet_b0": _timm("efficientnet_b0", 128, 16, "blocks.4", "blocks.6"),
    "convnext_atto": _timm("convnext_atto", 128, 16, "stages.2", "stages.3"),
    "test_resnet": _timm("test_resnet", 64, 8, "layer3", "layer4"),  # timm's smallest, for --quick
}
STUDIED = tuple(name for name in MODELS if name != "test_resnet")

SITES = {"R-Block, last two": "last two", "R-Block, all": "all", "R-Block, head": "head"}
METHODS = ("plain", "DropBlock", "doubled input", "two forwards", *SITES)
COLOURS = dict(zip(METHODS, ["#4d4d4d", "#999999", "#e08214", "#b35806", "#2166ac", "#4393c3", "#92c5de"], strict=True))


def images_and_labels(name: str, batch: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Random images (batch, *input_size) and class indices (batch,)."""
    settings = MODELS[name]
    images = torch.randn(batch, *settings.input_size, device=device)
    return images, torch.randint(settings.classes, (batch,), device=device)


def build_competitor(name: str, method: str, device: str) -> tuple[nn.Module, Loss]:
    """The network of a method in train mode, and its loss of (network, images, labels).

    R-Block is BDropDML at drop_prob 0.2 and block_size 3; at the classifier's input it is R-Drop. DropBlock is timm's,
    at the same rate after the last two stages.
    """
    settings = MODELS[name]
    model: Any = settings.create().train().to(device)
    criterion = RBlockLoss(alpha=0.1, temperature=3.0)
    if method in SITES:
        sites = {"last two": list(settings.last_two)}.get(SITES[method], SITES[method])
        kind = "r-drop" if sites == "head" else "bdropdml"
        apply_rblock(model, sites, method=kind, drop_prob=0.2, block_size=3, input_size=settings.input_size)
        return model, lambda model, images, labels: criterion(model(images), labels)
    if method == "doubled input":
        return model, lambda model, images, labels: criterion(model(torch.cat((images, images))), labels)
    if method == "two forwards":
        return model, lambda model, images, labels: criterion(torch.cat((model(images), model(images))), labels)
    if method == "DropBlock":
        for path in settings.last_two:
            drop_block = timm.layers.DropBlock2d(0.2, block_size=3)
            model.get_submodule(path).register_forward_hook(lambda _m, _a, output, drop=drop_block: drop(output))
    return model, lambda model, images, labels: F.cross_entropy(model(images), labels)


class _Identity(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.site = nn.Identity()

    def forward(self, x: Tensor) -> Any:
        return self.site(x)


def build_mask(method: str, shape: tuple[int, ...], **settings: Any) -> nn.Module:
    """A network that is one mask for maps (N, *shape): its training forward draws the mask and applies it."""
    return apply_rblock(_Identity(), "site", method=method, input_size=shape, **settings).train()
