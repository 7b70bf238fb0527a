"""apply_rblock and remove_rblock: the order of the steps."""

from collections.abc import Sequence
from typing import TypeVar

from torch import nn

from rblock_fx.batch_norm import PerSubmodelBatchNorm
from rblock_fx.build import build
from rblock_fx.conversion import RBlock, RBlockModel, device_of
from rblock_fx.errors import ConversionError, SiteError
from rblock_fx.guards import refuse_hooks
from rblock_fx.refusals import refuse_prepared, refuse_unconvertible
from rblock_fx.replica import weightless_copy
from rblock_fx.settings import Settings, check_settings
from rblock_fx.sites import HEAD, Sites, resolve_sites
from rblock_fx.stages import Site, containers_of, survey_model
from rblock_fx.swap import unswap

ModelT = TypeVar("ModelT", bound=nn.Module)


def apply_rblock(
    model: ModelT,
    sites: Sites = None,
    *,
    method: str = "bdropdml",
    drop_prob: float | Sequence[float] = 0.2,
    block_size: int | Sequence[int] = 3,
    calibration: str = "exact",
    batch_norm: str = "joint",
    input_size: Sequence[int] | None = None,
) -> ModelT:
    """Turn a CNN into an R-Block model, in place: in train mode two sub-models with complementary masks.

    In train mode a batch of (N, C, *S) gives outputs of 2N rows, sub-model 1 in the first half and sub-model 2 in the
    second; in eval mode the model is exactly the network that it was. Parameters, their order, the state_dict and every
    attribute stay. With a single-model method the batch is not doubled.

    Args:
        model: a CNN, before it is wrapped (DistributedDataParallel), compiled or prepared (Accelerate).
        sites: where to mask: None for the last two stages (for dropout, r-drop and c-drop: the head), "all", stage
            numbers, module paths, globs ("layer[34]", "stages.*"), "head" for the classifier's input, or a list of
            them.
        method: "bdropdml", "sdropdml", "c-dropblock", "r-drop", "c-drop", "r-spatialdropout", "r-dropblock" (pairs);
            "dropout", "spatialdropout", "dropblock" (single models).
        drop_prob: probability that an activation is dropped, in [0, 1); one value, or one per site. For the
            complementary methods the two sub-models share it: each drops drop_prob / 2.
        block_size: side of a block, odd; one value, or one per site.
        calibration: how the probability of a block centre follows from drop_prob: "exact" (Eq. 8), "eq6" or "eq7".
        batch_norm: "joint" statistics over the 2N rows behind the fork, or "per_submodel", as two forwards would have.
        input_size: shape of one sample, (channels, *spatial); default the model's pretrained_cfg, else (3, 224, 224).
            Only for the shapes of the maps: images of other sizes train as well.

    Returns:
        The same model.

    Raises:
        SettingError: a setting outside its range.
        SiteError: a site that is unknown, never runs, or is no feature map.
        ConversionError: a model that cannot be converted. After any error the model is as it was.
    """
    settings = check_settings(method, drop_prob, block_size, calibration, batch_norm)
    refuse_unconvertible(model)

    # Everything up to `_install` is done on a copy without weights.
    replica = weightless_copy(model)
    survey = survey_model(model, replica, input_size)
    asked = resolve_sites(model, survey, HEAD if sites is None and not settings.mask_class.needs_map else sites)
    _refuse_unsuitable(asked, settings)

    in_forward_order = sorted(asked, key=lambda site: survey.position(site.path))
    refuse_hooks(model, containers_of(asked))
    rblock = build(replica, in_forward_order, asked, settings, survey)
    _install(model, rblock)
    return model


def remove_rblock(model: ModelT) -> ModelT:
    """Undo apply_rblock, in place: the model has its own class again, and its present weights.

    Args:
        model: a converted model, not wrapped.

    Returns:
        The same model.

    Raises:
        ConversionError: the model is not converted, or still prepared by Accelerate or wrapped.
    """
    refuse_prepared(model)
    vars(model).pop("forward", None)
    del model._modules["rblock"]
    for module in model.modules():
        unswap(module)
    return model


def _refuse_unsuitable(sites: Sequence[Site], settings: Settings) -> None:
    """Refuse the classifier's input for methods whose masks have blocks or whole channels."""
    for site in sites:
        if site.is_head and settings.mask_class.needs_map:
            raise SiteError(
                f"sites='head': the input of {site.path!r} is no feature map for method={settings.method!r}; use a "
                "method for single activations, e.g. method='r-drop', or a stage: list_sites(model)."
            )


def _install(model: nn.Module, rblock: RBlock) -> None:
    """Change the model: the only step that does."""
    rblock = rblock.to(device_of(model)).train(model.training)
    model.add_module("rblock", rblock)
    try:
        RBlockModel.swap(model)
    except Exception as error:
        del model._modules["rblock"]
        raise ConversionError(
            f"{type(model).__name__} cannot be subclassed, as a conversion does ({type(error).__name__}: {error}); "
            "wrap it in a module whose forward calls it."
        ) from error
    vars(model).pop("forward", None)  # at most the class's own, left there by Accelerate's unwrap_model
    if rblock.conversion.batch_norm == "per_submodel":
        for path in rblock.conversion.paired_batch_norms:
            PerSubmodelBatchNorm.swap(model.get_submodule(path))
