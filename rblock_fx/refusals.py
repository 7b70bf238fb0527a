"""Models that cannot be converted as they stand, told apart before anything is done, each with its remedy."""

import torch
from torch import nn

from rblock_fx.conversion import RBlockModel, find_converted
from rblock_fx.errors import ConversionError


def refuse_unconvertible(model: nn.Module) -> None:
    """Refuse what is no model, converted already, or wrapped by a tool that must come after apply_rblock.

    Raises:
        ConversionError: with the call that would work.
    """
    name = type(model).__name__
    if not isinstance(model, nn.Module):
        raise ConversionError(
            f"apply_rblock: expected a torch.nn.Module, got {name}: apply_rblock(timm.create_model('resnet50'))"
        )
    if torch.is_inference_mode_enabled():
        raise ConversionError("apply_rblock: a model cannot be converted for training inside torch.inference_mode()")
    for path, module in model.named_modules():
        if isinstance(module, RBlockModel):
            where = f"{path!r} of {name}" if path else name
            raise ConversionError(
                f"{where} is converted already; to convert it anew: apply_rblock(remove_rblock(model), ...). "
                "To change the drop rate alone: set_drop_prob(model, 0.1)"
            )
    wrapper = _wrapper_of(model)
    if wrapper is not None:
        reason, remedy = wrapper
        raise ConversionError(f"apply_rblock: {name} is {reason}; convert the model first: {remedy}")
    if "rblock" in model._modules or hasattr(model, "rblock"):
        raise ConversionError(f"{name} has an attribute 'rblock', where the masks would go; rename it first")


def _wrapper_of(model: nn.Module) -> tuple[str, str] | None:
    """What wraps a model, and the order of calls that works."""
    kind = type(model)
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return f"wrapped in {kind.__name__}", f"{kind.__name__}(apply_rblock(model))"
    if is_sharded(model):
        return "sharded by FSDP", "fully_shard(apply_rblock(model))"
    if "_orig_mod" in model._modules or model._compiled_call_impl is not None:
        return "compiled", "torch.compile(apply_rblock(model))"
    if isinstance(model, torch.jit.ScriptModule):
        return "scripted", "apply_rblock takes the Python model; a script cannot be traced"
    instance = vars(model)
    if "_original_forward" in instance or "_hf_hook" in instance or instance.get("_is_accelerate_prepared"):
        return "prepared by Accelerate", "accelerator.prepare(apply_rblock(model))"
    if has_pinned_forward(model):
        return "patched with a forward of its own instance", "apply_rblock(model), then patch it"
    return None


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP (of either kind) has a hand in the model or in a module of it."""
    kinds = {base for module in model.modules() for base in type(module).__mro__}
    return any("fsdp" in f"{base.__module__}.{base.__name__}".lower() for base in kinds)


def has_pinned_forward(model: nn.Module) -> bool:
    """Whether a tool has put a forward of its own on the instance, past which a change of class would have no effect.

    Accelerate's unwrap_model leaves the class's forward there, which pins nothing.
    """
    forward = vars(model).get("forward")
    return forward is not None and getattr(forward, "__func__", None) is not type(model).forward


def refuse_prepared(model: nn.Module) -> None:
    """Refuse to un-convert what is not converted, wrapped, or has its forward pinned to the instance by a tool.

    Raises:
        ConversionError: with the call that would work.
    """
    inner: object = find_converted(model, "remove_rblock")[0]
    if inner is not model:
        raise ConversionError(
            f"remove_rblock: {type(model).__name__} wraps the converted model; pass that: remove_rblock(model.module)"
        )
    if is_sharded(model):
        raise ConversionError(
            f"remove_rblock: {type(model).__name__} is sharded by FSDP, which has its own class on top; load the "
            "gathered state_dict into the plain model: timm.create_model('resnet50').load_state_dict(state)"
        )
    if has_pinned_forward(model):
        raise ConversionError(
            f"remove_rblock: {type(model).__name__} is prepared by Accelerate, which holds on to its forward; pass the "
            "bare model: remove_rblock(accelerator.unwrap_model(model, keep_fp32_wrapper=False))"
        )
