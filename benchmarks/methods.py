"""The ways to train that are compared, and the loss of each: plain, timm's DropBlock, R-Drop's ways, R-Block."""

from collections.abc import Callable

import timm.layers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.models import MODELS, build
from rblock_fx import RBlockLoss, apply_rblock

Loss = Callable[[Callable[[Tensor], Tensor], Tensor, Tensor], Tensor]

SITES = {"R-Block, last two": "last two", "R-Block, all": "all", "R-Block, head": "head"}
METHODS = ("plain", "DropBlock", "doubled input", "two forwards", *SITES)
COLOURS = dict(zip(METHODS, ["#4d4d4d", "#999999", "#e08214", "#b35806", "#2166ac", "#4393c3", "#92c5de"], strict=True))


def competitor(name: str, method: str, device: str) -> tuple[nn.Module, Loss]:
    """The network of a method, and its loss of (network, images, labels).

    R-Block is BDropDML at drop_prob 0.2 and block_size 3; at the classifier's input R-Drop's masks. DropBlock is
    timm's, at the same rate behind the last two stages.
    """
    settings = MODELS[name]
    model = build(name).to(device)
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
