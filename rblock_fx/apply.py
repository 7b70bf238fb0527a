"""apply_rblock and remove_rblock: the order of the steps."""

import dataclasses
import math
from collections.abc import Sequence
from typing import TypeVar

from torch import nn

from rblock_fx.batch_norm import PerSubmodelBatchNorm
from rblock_fx.check import Trial, try_out
from rblock_fx.conversion import Conversion, RBlock, RBlockModel, TrainingForward, device_of
from rblock_fx.errors import SiteError
from rblock_fx.fork import Fork, MaskedNode, fork_batch, insert_masks, probe_growth
from rblock_fx.refusals import refuse_hooks_on_inlined, refuse_prepared, refuse_unconvertible
from rblock_fx.replica import weightless_copy
from rblock_fx.settings import Settings, check_settings, one_per_site
from rblock_fx.sites import HEAD, Site, Sites, resolve_input_size, resolve_sites
from rblock_fx.survey import Shape, survey_forward
from rblock_fx.swap import unswap
from rblock_fx.trace import trace_ancestors

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
    size = resolve_input_size(model, input_size)

    # Everything up to `_install` is done on a copy without weights.
    replica = weightless_copy(model)
    survey = survey_forward(replica, size)
    asked = resolve_sites(model, survey, HEAD if sites is None and not settings.mask_class.needs_map else sites)
    _refuse_unsuitable(asked, settings)
    refuse_hooks_on_inlined(model, asked)

    in_forward_order = sorted(asked, key=lambda site: survey.position(site.path))
    rblock = _build(replica, in_forward_order, asked, settings, size)
    trial = try_out(replica, rblock, size, settings.mask_class.parts)
    _install(model, rblock, trial)
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


def _build(
    replica: nn.Module, sites: Sequence[Site], asked: Sequence[Site], settings: Settings, input_size: Shape
) -> RBlock:
    """Trace, insert the masks, fork, and make the mask modules; `sites` are in forward order, `asked` in the user's."""
    drop_probs = dict(zip(asked, one_per_site("drop_prob", settings.drop_prob, len(asked)), strict=True))
    block_sizes = dict(zip(asked, one_per_site("block_size", settings.block_size, len(asked)), strict=True))

    trace = trace_ancestors(replica, sites)
    graph = trace.graph
    growth = probe_growth(graph, replica, input_size)
    names = _mask_names({site: len(calls) for site, calls in trace.nodes.items()})
    calls = insert_masks(
        graph,
        [
            MaskedNode(node, consumer, f"rblock.{name}")
            for site in sites
            for (node, consumer), name in zip(trace.nodes[site], names[site], strict=True)
        ],
    )
    fork = fork_batch(graph, calls, growth) if settings.mask_class.parts == 2 else Fork(frozenset(), None)
    graph.lint()
    rblock = RBlock()
    for site in sites:
        for name in names[site]:
            rblock.add_module(
                name,
                settings.mask_class(
                    drop_prob=float(drop_probs[site]),
                    block_size=block_sizes[site],
                    calibration=settings.calibration,
                    shape=site.shape,
                    channel_axis=site.channel_axis,
                    forks=f"rblock.{name}" in fork.forking,
                ),
            )
    code = graph.python_code("self")
    rblock.conversion = Conversion(
        method=settings.method,
        calibration=settings.calibration,
        batch_norm=settings.batch_norm,
        input_size=input_size,
        masks=tuple((site, names[site]) for site in sites),
        order=tuple(asked.index(site) for site in sites),
        forward=TrainingForward(code.src, code.globals, trace.specialised),
        early_fork_reason=fork.reason,
        cost=math.nan,
    )
    return rblock


def _mask_names(calls: dict[Site, int]) -> dict[Site, tuple[str, ...]]:
    """Name the masks of each site, one per call of its module, after its path."""
    taken: set[str] = set()

    def free(name: str) -> str:
        while name in taken or hasattr(RBlock, name):
            name += "_"
        taken.add(name)
        return name

    return {
        site: tuple(free(site.path.replace(".", "_") + (f"_call{call}" if call else "")) for call in range(count))
        for site, count in calls.items()
    }


def _install(model: nn.Module, rblock: RBlock, trial: Trial) -> None:
    """Change the model: the only step that does, and none of it can fail."""
    rblock.conversion = dataclasses.replace(rblock.conversion, cost=trial.cost)
    vars(model).pop("forward", None)  # at most the class's own, left there by Accelerate's unwrap_model
    model.add_module("rblock", rblock.to(device_of(model)).train(model.training))
    RBlockModel.swap(model)
    if rblock.conversion.batch_norm == "per_submodel":
        for path in trial.paired_batch_norms:
            PerSubmodelBatchNorm.swap(model.get_submodule(path))
