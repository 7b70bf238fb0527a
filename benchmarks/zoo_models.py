"""Every architecture of timm and torchvision by name: timm/resnet50, torchvision/fcos_resnet50_fpn.backbone."""

import inspect
from typing import Any

import timm
import torch
from timm.models import _registry
from torch import nn
from torchvision.models import get_model_builder, list_models

# Parts of models that are refused whole, and the sides of the images that they take.
PARTS = {
    "fasterrcnn_resnet50_fpn.backbone": 224,
    "fasterrcnn_mobilenet_v3_large_fpn.backbone": 224,
    "fcos_resnet50_fpn.backbone": 224,
    "maskrcnn_resnet50_fpn_v2.backbone": 224,
    "retinanet_resnet50_fpn_v2.backbone": 224,
    "ssd300_vgg16.backbone": 300,
    "ssdlite320_mobilenet_v3_large.backbone": 320,
    "raft_large.feature_encoder": 128,
}


def all_names() -> list[str]:
    """Every architecture of timm and torchvision, and the parts of those that are refused whole."""
    return [
        *(f"timm/{name}" for name in timm.list_models()),
        *(f"torchvision/{name}" for name in list_models()),
        *(f"torchvision/{name} quantize=True" for name in list_models() if name.startswith("quantized_")),
        *(f"torchvision/{name}" for name in PARTS),
    ]


def family_of(name: str) -> str:
    """Name the module of timm or torchvision that defines an architecture."""
    source, model = name.split("/")
    if source == "timm":
        return f"timm {_registry._model_to_module[model]}"
    builder = get_model_builder(model.split(".")[0].split(" ")[0])
    kind = " ".join(builder.__module__.split(".")[2:])
    return f"torchvision {kind}" + (", part" if "." in model else ", integer" if " " in model else "")


def build(name: str) -> nn.Module:
    """Make a model with random weights; with its auxiliary heads, where it may have some."""
    source, model = name.split("/")
    if source == "timm":
        return timm.create_model(model)
    model, _, option = model.partition(" ")
    base, _, part = model.partition(".")
    wanted = {"weights_backbone": None, "quantize": bool(option), "aux_loss": True}
    known = inspect.signature(get_model_builder(base)).parameters
    kwargs: dict[str, Any] = {key: value for key, value in wanted.items() if key in known}
    if base in ("googlenet", "inception_v3"):
        kwargs |= {"aux_logits": True, "init_weights": False}
    if base.startswith("lraspp"):
        kwargs.pop("aux_loss", None)
    whole: nn.Module = get_model_builder(base)(weights=None, **kwargs)
    return whole.get_submodule(part) if part else whole


def build_without_weights(name: str) -> nn.Module:
    """The same on the meta device, where the constructor allows it."""
    try:
        with torch.device("meta"):
            return build(name)
    except Exception:
        return build(name)


def runs(weightless: nn.Module, shape: tuple[int, ...]) -> bool:
    """Whether a model on the meta device takes images of this shape."""
    try:
        with torch.no_grad(), torch.device("meta"):
            weightless(torch.empty(shape))
    except Exception:
        return False
    return True
