"""Models: any of timm's, the paper's forms for small images, and the preprocessing that weights were trained with."""

import json
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
import torch
from safetensors import safe_open
from settings import RecipeError, suggest
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, ImageNetInfo, resolve_data_config
from timm.layers.classifier import ClassifierHead
from timm.models import load_checkpoint, load_state_dict
from torch import Tensor, nn

if TYPE_CHECKING:
    from data import ImageData
    from train import Config

SMALL = {f"cifar_{name}": name for name in ("resnet18", "resnet34", "vgg16", "vgg16_bn")}  # to timm's name


def create_model(name: str, **settings: Any) -> nn.Module:
    """Return a timm model, or one of SMALL; settings are those of timm.create_model.

    A cifar_resnet has a 3x3 first convolution of stride 1 (section 4.1) and, unless max_pool is true, no max-pooling.
    A cifar_vgg has one hidden layer of 512 without dropout in place of two of 4096, which are for 7x7 maps.

    Raises:
        RecipeError: no model has that name.
    """
    known = SMALL.get(name, name)
    if not timm.is_model(known.partition(".")[0]):
        raise RecipeError(f"unknown model {name!r}; {suggest(name, [*timm.list_models(), *SMALL])}")
    keep_pool = settings.pop("max_pool", False) if name in SMALL else False
    model: Any = timm.create_model(known, **settings)
    if name.startswith("cifar_resnet"):
        stem = model.conv1
        model.conv1 = nn.Conv2d(stem.in_channels, stem.out_channels, 3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        model.maxpool = model.maxpool if keep_pool else nn.Identity()
    elif name in SMALL:
        model.pre_logits = nn.Sequential(OrderedDict(fc1=nn.Conv2d(512, 512, 1), act1=nn.ReLU()))
        model.head = ClassifierHead(512, model.num_classes, pool_type="avg")
        model.num_features = model.head_hidden_size = 512
    return model  # type: ignore[no-any-return]


def build_model(config: "Config", data: "ImageData") -> nn.Module:
    """Return the plain model of the settings, in train mode, with the weights that they name.

    Raises:
        RecipeError: the model is unknown, cannot be built, or does not take the data set's images.
    """
    classes = len(data.classes)
    try:
        model = create_model(config.model, num_classes=classes, in_chans=data.shape[0], **config.model_kwargs)
        if config.weights is not None:
            load_weights(model, Path(config.weights))
        with torch.no_grad():  # a model that cannot take these images is refused before anything is written
            output = model.eval()(torch.zeros(1, *data.shape))
        if not isinstance(output, Tensor) or output.shape != (1, classes):
            shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(f"it returns {shape}; expected logits (1, {classes})")
    except RecipeError:
        raise
    except Exception as error:  # whatever a constructor, a file, or the hub of pretrained weights raises
        raise RecipeError(
            f"model {config.model} with model_kwargs {config.model_kwargs} cannot be built or does not take images of "
            f"{data.shape}: {error}"
        ) from error
    return model.train()


def load_weights(model: nn.Module, path: Path) -> None:
    """Load weights on disk; a classifier of another number of classes keeps its fresh weights.

    Raises:
        RecipeError: the file is missing, or its names are not the model's.
    """
    if not path.is_file():
        raise RecipeError(f"weights: there is no file {path}")
    weights = load_state_dict(str(path), device="cpu", weights_only=True)
    own = model.state_dict()
    classifier = {name for name, tensor in weights.items() if name in own and tensor.shape != own[name].shape}
    found = model.load_state_dict({name: t for name, t in weights.items() if name not in classifier}, strict=False)
    lacking = set(found.missing_keys) - classifier
    last = {name.rpartition(".")[0] for name in classifier}
    if lacking or found.unexpected_keys or len(last) > 1:
        names = sorted(lacking or set(found.unexpected_keys) or classifier)
        raise RecipeError(f"weights: {path} is not of this model: {', '.join(names[:3])} differ or are missing")


# --- preprocessing ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Preprocessing:
    """How images become a model's input, and where these figures are from."""

    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD
    interpolation: str = "bilinear"
    crop_pct: float = 0.875
    source: str = "ImageNet's"


def read_header(path: Path) -> dict[str, Any]:
    """Return what a run wrote into the header of its weights; empty for other files."""
    if path.suffix != ".safetensors" or not path.is_file():
        return {}
    with safe_open(path, "pt") as file:
        about: dict[str, Any] = json.loads((file.metadata() or {}).get("about", "{}"))
    return about


def resolve_preprocessing(config: "Config") -> Preprocessing | None:
    """Return the preprocessing of the weights that training starts from; None where it starts from scratch."""
    kwargs = config.model_kwargs
    if not (config.weights or kwargs.get("pretrained") or kwargs.get("checkpoint_path")):
        return None
    about = read_header(Path(config.weights)) if config.weights else {}
    name = SMALL.get(config.model, config.model)
    cfg = timm.models.get_pretrained_cfg(name) if timm.is_model(name.partition(".")[0]) else None
    known = (cfg.to_dict() if cfg is not None else {}) | dict(kwargs.get("pretrained_cfg_overlay") or {}) | about
    found = resolve_data_config(pretrained_cfg=known)
    source = f"of {config.weights}" if about else f"timm's for the weights of {config.model}"
    return Preprocessing(tuple(found["mean"]), tuple(found["std"]), found["interpolation"], found["crop_pct"], source)


def load_trained(path: Path, name: str | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """Return (network in evaluation mode, its header) of a run's folder, its weights, or any weights of a timm model.

    Args:
        path: a run's folder (model.safetensors is taken) or a file of weights.
        name: timm's name of the model, for weights that no run wrote.

    Raises:
        RecipeError: there are no weights, or their model is not known.
    """
    file = path / "model.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise RecipeError(f"{file} does not exist; give the folder of a finished run, or a file of weights")
    about = read_header(file) or describe_weights(file, name)
    left_out = ("pretrained", "checkpoint_path", "pretrained_cfg_overlay")
    kwargs = {key: value for key, value in about.get("model_kwargs", {}).items() if key not in left_out}
    model = create_model(about["model"], num_classes=len(about["classes"]), in_chans=about["in_chans"], **kwargs)
    load_checkpoint(model, str(file), weights_only=True)
    return model.eval(), about


def describe_weights(file: Path, name: str | None) -> dict[str, Any]:
    """Return the header that a run would have written for weights of a timm model."""
    if name is None:
        raise RecipeError(f"{file} does not say which model it is of; give timm's name, e.g. --model resnet50")
    model = create_model(name)
    found, classifier = resolve_data_config(model=model), f"{model.pretrained_cfg['classifier']}.weight"  # type: ignore[index]
    weights = load_state_dict(str(file), device="cpu", weights_only=True)
    if classifier not in weights:
        raise RecipeError(f"{file} has no classifier {classifier} of {name}")
    classes = len(weights[classifier])
    labels = ImageNetInfo().label_descriptions() if classes == 1000 else [str(index) for index in range(classes)]
    about = {"model": name, "classes": list(labels), "image_size": found["input_size"][-1], "in_chans": 3}
    return about | {key: found[key] for key in ("mean", "std", "interpolation", "crop_pct")}
