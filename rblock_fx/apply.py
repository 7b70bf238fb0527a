"""apply_rblock, remove_rblock, list_sites: the order of the steps."""

import itertools
import math
import threading
import warnings
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import nn

from rblock_fx.checks import (
    check_container,
    check_convertible,
    check_removable,
    check_settings,
    check_suitable,
    one_per_site,
)
from rblock_fx.converted import RBlockModel
from rblock_fx.errors import RBlockWarning, SiteError
from rblock_fx.masks.mask import Mask
from rblock_fx.masks.methods import METHODS
from rblock_fx.network.replica import weightless_copy
from rblock_fx.network.sites import HEAD, Sites, resolve_sites
from rblock_fx.network.stages import Site, SiteList, containers_of, find_stages
from rblock_fx.network.survey import survey_model
from rblock_fx.surgery.build import Request, build
from rblock_fx.surgery.conversion import RBlock
from rblock_fx.surgery.trace import MASKS
from rblock_fx.swap import OWNER, Halved, Inlined, Swapped, restore_class, swap_classes

ModelT = TypeVar("ModelT", bound=nn.Module)

_CONVERTING = threading.RLock()  # torch.fx patches nn.Module while it traces


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

    In train mode a batch of (N, C, *S) returns outputs of 2N rows, sub-model 1 in the first half and sub-model 2 in the
    second; in eval mode the model is exactly the network that it was. Parameters, their order, the state_dict and every
    attribute stay. With a single-model method the batch does not double.

    Args:
        model: a CNN, before it is wrapped (DistributedDataParallel), compiled or prepared (Accelerate).
        sites: where to mask: None for the last two stages of the encoder (for dropout, r-drop and c-drop: the head),
            "all", stage numbers, module paths, globs ("layer[34]", "stages.*"), "head" for the classifier's input, or a
            list of them.
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
        SettingError: a setting is outside its range.
        SiteError: a site is unknown, never runs, or does not return a feature map.
        ConversionError: the model cannot be converted. After any error the model is as it was.
    """
    check_settings(method, drop_prob, block_size, calibration, batch_norm)
    check_convertible(model, method)
    with _CONVERTING, torch.device("cpu"):
        # Nothing before `_install` touches the model: everything is tried on a copy without weights.
        replica = weightless_copy(model)
        survey = survey_model(model, replica, input_size)
        chosen = resolve_sites(model, survey, HEAD if sites is None and not METHODS[method].needs_map else sites)
        _check_sites(chosen, method)
        for path in containers_of(chosen):
            check_container(model.get_submodule(path), path)
        drop_probs = one_per_site("drop_prob", drop_prob, len(chosen))
        block_sizes = one_per_site("block_size", block_size, len(chosen))
        rblock = build(replica, Request(method, calibration, batch_norm, chosen, drop_probs, block_sizes), survey)
        _install(model, rblock)
    _warn_of_misfits(rblock)
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
    check_removable(model)
    vars(model).pop("forward", None)
    del vars(model)[MASKS]
    for module in model.modules():
        restore_class(module)
    return model


def list_sites(model: nn.Module, input_size: Sequence[int] | None = None) -> SiteList:
    """List the stages of a model that can carry masks, in forward order; the model is left as it is.

    Stages are timm's `feature_info` where the model has it, numbered like timm's `out_indices`. For other models they
    are the last map of each resolution that every path from the input to the end of the encoder passes through.

    Args:
        model: any CNN.
        input_size: shape of one sample, (channels, *spatial); default the model's pretrained_cfg, else (3, 224, 224)
            or, for networks of 3-D convolutions, (3, 16, 112, 112) or (3, 16, 224, 224).

    Raises:
        ConversionError: the model does not run on a batch of this size.
    """
    replica = weightless_copy(model)
    check_suitable(model)
    with _CONVERTING:
        return find_stages(model, survey_model(model, replica, input_size))


def _check_sites(sites: Sequence[Site], method: str) -> None:
    """Refuse the classifier's input for methods whose masks have blocks or whole channels."""
    if METHODS[method].needs_map and any(site.is_head for site in sites):
        raise SiteError(
            f"sites='head': the classifier's input is not a feature map, which method={method!r} needs; use "
            "method='r-drop', or a stage: list_sites(model)"
        )


def _install(model: nn.Module, rblock: RBlock) -> None:
    """Change the model: the only step that does."""
    first = next(itertools.chain(model.parameters(), model.buffers()), torch.empty(0))
    conversion = rblock.conversion
    swaps: list[tuple[nn.Module, type[Swapped], str]] = [(model, RBlockModel, "")]
    swaps += [(model.get_submodule(path), Inlined, path) for path in conversion.guards.inlined if path]
    swaps += [(model.get_submodule(path), Halved, path) for path in conversion.halved]
    vars(model)[MASKS] = rblock.to(first.device)
    try:
        swap_classes(swaps)
    except Exception:
        del vars(model)[MASKS]
        raise
    vars(model).pop("forward", None)  # at most the class's own, left there by Accelerate's unwrap_model
    for path in filter(None, conversion.guards.inlined):
        vars(model.get_submodule(path))[OWNER] = model


def _warn_of_misfits(rblock: RBlock) -> None:
    """Warn of masks whose blocks do not fit their maps."""
    for name, mask in rblock.named_children():
        if not isinstance(mask, Mask) or not mask.has_blocks:
            continue
        needed = math.prod(-(-side // mask.block_size) for side in mask.map_size)
        expected = math.prod(mask.map_size) * mask.compute_gamma(mask.map_size, mask.drop_prob)
        if needed > 4 + 2 * expected:  # fewer blocks than that cannot cover the map, and more are too rare
            continue
        nothing, everything = mask.fit_shares()
        if everything > 0.01 or mask.covers_map:
            size = "x".join(map(str, mask.map_size))
            warnings.warn(
                f"apply_rblock: blocks of side {mask.block_size} do not fit the {size} map of {name!r}: {nothing:.0%} "
                f"of samples lose nothing and {everything:.0%} lose everything; use a smaller block_size or drop_prob, "
                "or another site",
                RBlockWarning,
                stacklevel=3,
            )
