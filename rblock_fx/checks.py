"""Preconditions: the settings, the model, the order of calls; each refusal with its remedy."""

import difflib
import inspect
import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from rblock_fx.converted import RBlockModel, find_converted
from rblock_fx.errors import ConversionError, SettingError
from rblock_fx.masks.coverage import CALIBRATIONS
from rblock_fx.masks.methods import METHODS
from rblock_fx.surgery.conversion import refuse_hooks
from rblock_fx.surgery.trace import MASKS

BATCH_NORMS = ("joint", "per_submodel")


def check_settings(
    method: str, drop_prob: float | Sequence[float], block_size: int | Sequence[int], calibration: str, batch_norm: str
) -> None:
    """Check all settings that do not depend on the model.

    Raises:
        SettingError: a name is unknown or a value is outside its range.
    """
    _check_choice("method", method, tuple(METHODS))
    _check_choice("calibration", calibration, CALIBRATIONS)
    _check_choice("batch_norm", batch_norm, BATCH_NORMS)
    for value in _as_values(drop_prob):
        check_drop_prob(value, method)
    for size in _as_values(block_size):
        if not is_integer(size) or size < 1 or size % 2 == 0:
            raise SettingError(f"apply_rblock: block_size must be an odd positive integer, got {show(size)}")


def check_drop_prob(value: Any, method: str, call: str = "apply_rblock") -> None:
    """Check one drop probability; `call` starts the message.

    Raises:
        SettingError: value is not a number in [0, 1), or exceeds the method's largest drop probability.
    """
    if not is_real(value) or not 0 <= value < 1:
        hint = f" (did you mean {float(value) / 100:g}?)" if is_real(value) and 1 < value < 100 else ""
        raise SettingError(f"{call}: drop_prob must be in [0, 1), got {show(value)}{hint}")
    largest = METHODS[method].largest_drop_prob
    if value > largest:
        raise SettingError(
            f"{call}: drop_prob must be at most {largest} for method={method!r}, whose sub-models drop disjoint sets "
            f"of that size, got {show(value)}"
        )


def is_real(value: Any) -> bool:
    """Whether value is a real number, NumPy's included, and not a bool."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def is_integer(value: Any) -> bool:
    """Whether value is an integer, NumPy's included, and not a bool."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def show(value: Any) -> str:
    """Format a number as its value, without NumPy's type, and anything else as its repr."""
    return f"{value}" if isinstance(value, numbers.Real) else repr(value)


def one_per_site(name: str, value: Any, sites: int, call: str = "apply_rblock") -> list[Any]:
    """Repeat one value for all sites, or check that there is one value per site.

    Raises:
        SettingError: the number of values differs from the number of sites.
    """
    values = _as_values(value)
    if len(values) == 1 and values[0] is value:
        return values * sites
    if len(values) != sites:
        shown = ", ".join(map(show, values))
        raise SettingError(f"{call}: {name} must be one value or one per site ({sites}), got {len(values)}: [{shown}]")
    return values


def _as_values(value: Any) -> list[Any]:
    """The values of a list or tuple; any other object is one value."""
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise SettingError(f"apply_rblock: {name} must be one of {', '.join(choices)}, got {value!r}{hint}")


def check_convertible(model: nn.Module, method: str) -> None:
    """Refuse a model that is converted already, or wrapped by a tool that must come after apply_rblock.

    Raises:
        ConversionError: with the call that would work.
    """
    name = type(model).__name__
    if not isinstance(model, nn.Module):
        raise ConversionError(
            f"apply_rblock: expected a torch.nn.Module, got {name}: apply_rblock(timm.create_model('resnet50'))"
        )
    if torch.is_inference_mode_enabled():
        raise ConversionError("apply_rblock: call it outside torch.inference_mode(), where nothing can be trained")
    for path, module in model.named_modules():
        if isinstance(module, RBlockModel):
            where = f"{path!r} of {name}" if path else name
            raise ConversionError(
                f"{where} is converted already; to convert it again: apply_rblock(remove_rblock(model), ...). "
                "To change the drop rate alone: set_drop_prob(model, 0.1)"
            )
    wrapper = _wrapper_of(model)
    if wrapper is not None:
        reason, remedy = wrapper
        raise ConversionError(f"apply_rblock: {name} is {reason}; convert the model first: {remedy}")
    if hasattr(model, MASKS):
        raise ConversionError(f"{name} has an attribute {MASKS!r}, where the masks would go; rename it first")
    check_suitable(model, method)


def check_suitable(model: nn.Module, method: str = "dropblock") -> None:
    """Refuse networks that no choice of sites can convert with this method.

    Raises:
        ConversionError: with the call that would work.
    """
    name = type(model).__name__
    source = type(model).__module__
    values = getattr(model, "return_layers", {}).values() if name == "IntermediateLayerGetter" else ()
    is_backbone = values and all(str(value).isdigit() for value in values)
    is_detector = source.startswith("torchvision.models.detection")
    if (hasattr(model, "transform") and is_detector) or (METHODS[method].parts == 2 and (is_detector or is_backbone)):
        raise ConversionError(
            f"{name} is a torchvision detector or the backbone of one: a detector has N targets for the 2N rows of two "
            "sub-models; convert its backbone with a method that does not double the batch: method='dropblock'"
        )
    if source.startswith("torchvision.models.optical_flow") and hasattr(model, "feature_encoder"):
        raise ConversionError(
            f"{name} is an optical flow model, which takes two batches of images and refines flows in a loop, where "
            "each step would draw another mask; convert its encoder: apply_rblock(model.feature_encoder)"
        )
    if name == "FeatureHookNet":
        raise ConversionError(
            f"timm's {name} collects its maps with forward hooks, which a traced forward does not run; use the getter: "
            "timm.create_model('nasnetalarge', features_only=True, feature_cls='getter')"
        )
    kinds = {base.__name__ for module in model.modules() for base in type(module).__mro__}
    if "WeightedQuantizedModule" in kinds:  # of torch.ao, or wherever it moves to
        raise ConversionError(
            f"{name} is quantized: its integer layers cannot be trained; convert the model before quantizing it: "
            "apply_rblock(torchvision.models.quantization.resnet18(quantize=False))"
        )
    parameters = list(inspect.signature(type(model).forward).parameters.values())[2:]
    named = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    required = [p.name for p in parameters if p.default is p.empty and p.kind in named]
    if required:
        raise ConversionError(
            f"the forward of {name} takes {required[0]!r} beside the images, whose rows would have to be doubled; "
            f"convert the part that takes the images alone, and double {required[0]} for the rest: "
            f"apply_rblock(model.backbone), torch.cat([{required[0]}, {required[0]}])"
        )


def check_container(module: nn.Module, path: str) -> None:
    """Refuse a module around a site whose code the training forward cannot contain.

    Raises:
        ConversionError: it has hooks, or is a torch.fx GraphModule.
    """
    refuse_hooks(module, path)
    if isinstance(module, fx.GraphModule):
        raise ConversionError(
            f"{path!r} is a torch.fx GraphModule, which was traced before; convert the network before it is traced: "
            "apply_rblock(timm.create_model('resnet18', features_only=True))"
        )


def _wrapper_of(model: nn.Module) -> tuple[str, str] | None:
    """The tool that wraps a model, and the order of calls that works."""
    kind = type(model)
    if isinstance(model, nn.DataParallel):
        return "wrapped in DataParallel, which mixes the rows of the sub-models", (
            "DistributedDataParallel(apply_rblock(model)), with one process per GPU"
        )
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return f"wrapped in {kind.__name__}", f"{kind.__name__}(apply_rblock(model))"
    if is_sharded(model):
        return "sharded by FSDP", "fully_shard(apply_rblock(model))"
    if "_orig_mod" in model._modules or model._compiled_call_impl is not None:
        return "compiled", "torch.compile(apply_rblock(model))"
    if isinstance(model, torch.jit.ScriptModule):
        return "scripted, and a script cannot be traced", "apply_rblock of the Python model"
    instance = vars(model)
    if "_original_forward" in instance or "_hf_hook" in instance or instance.get("_is_accelerate_prepared"):
        return "prepared by Accelerate", "accelerator.prepare(apply_rblock(model))"
    if has_pinned_forward(model):
        return "patched with a forward of its own instance", "apply_rblock(model), then patch it"
    return None


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP (of either kind) wraps the model or a module of it."""
    kinds = {base for module in model.modules() for base in type(module).__mro__}
    return any("fsdp" in f"{base.__module__}.{base.__name__}".lower() for base in kinds)


def has_pinned_forward(model: nn.Module) -> bool:
    """Whether a tool has put a forward of its own on the instance, so that a change of class would have no effect.

    Accelerate's unwrap_model leaves the class's forward there, which is harmless.
    """
    forward = vars(model).get("forward")
    return forward is not None and getattr(forward, "__func__", None) is not type(model).forward


def check_removable(model: nn.Module) -> None:
    """Refuse to remove a conversion from a model that is not converted, wrapped, or prepared by a tool.

    Raises:
        ConversionError: with the call that would work.
    """
    inner: object = find_converted(model, "remove_rblock")[0]
    name = type(model).__name__
    if inner is not model:
        raise ConversionError(
            f"remove_rblock: {name} wraps the converted model; pass that: remove_rblock(model.module)"
        )
    if is_sharded(model):
        raise ConversionError(
            f"remove_rblock: {name} is sharded by FSDP, which has its own class on top; load the gathered state_dict "
            "into the plain model: timm.create_model('resnet50').load_state_dict(state)"
        )
    if has_pinned_forward(model):
        raise ConversionError(
            f"remove_rblock: {name} is prepared by Accelerate, which keeps its forward; pass the bare model: "
            "remove_rblock(accelerator.unwrap_model(model, keep_fp32_wrapper=False))"
        )
