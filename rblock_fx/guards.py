"""What was done to a model, before or after its conversion, that its training forward would pass over in silence."""

from collections.abc import Sequence

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from rblock_fx.batch_norm import PerSubmodelBatchNorm
from rblock_fx.errors import ConversionError
from rblock_fx.watch import Setting


def refuse_hooks(model: nn.Module, inlined: Sequence[str]) -> None:
    """Refuse hooks on a module around a site: the training forward runs through it without calling it.

    Raises:
        ConversionError: naming the module.
    """
    for path in inlined:
        module = model.get_submodule(path)
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            raise ConversionError(
                f"{path!r} has hooks, which would not run in train mode: a site lies inside it, so it is part of the "
                "training forward and not called. Remove them, or hook (for FSDP2: shard) the modules inside it, or "
                f"the whole model, or choose {path!r} itself as the site: apply_rblock(model, sites=[{path!r}])"
            )


def refuse_changed_settings(model: nn.Module, settings: Sequence[Setting]) -> None:
    """Refuse to train on with a setting that was another when the forward was traced.

    Raises:
        ConversionError: naming the first attribute that has changed.
    """
    for setting in settings:
        if not setting.holds(model):
            raise ConversionError(
                f"{setting.label} was {setting.value!r} when the training forward was traced and has changed since; "
                "set it back, or convert anew: apply_rblock(remove_rblock(model), ...)"
            )


def refuse_replaced_batch_norms(model: nn.Module, paths: Sequence[str]) -> None:
    """Refuse to train on with joint statistics where those of each sub-model were asked for.

    Raises:
        ConversionError: naming the first layer that is another now, as a conversion to SyncBatchNorm makes it.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    for path in paths:
        layer = modules.get(path)
        # A frozen layer, of another class, has no statistics to lose.
        if layer is None or (isinstance(layer, _BatchNorm) and not isinstance(layer, PerSubmodelBatchNorm)):
            kind = "missing" if layer is None else type(layer).__name__
            raise ConversionError(
                f"the batch norm {path!r} was converted with batch_norm='per_submodel' and is {kind} now; change the "
                "layers first: apply_rblock(convert_sync_batchnorm(model), batch_norm='per_submodel')"
            )
