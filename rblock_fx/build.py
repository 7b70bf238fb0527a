"""Building, on a weightless copy, what a model is given: its masks and its training forward."""

import copy
import math
from collections.abc import Sequence

from torch import nn

from rblock_fx.conversion import Conversion, RBlock, TrainingForward
from rblock_fx.fork import Fork, MaskedNode, fork_batch, insert_masks, probe_growth
from rblock_fx.masks import Mask
from rblock_fx.replica import META
from rblock_fx.settings import Settings, one_per_site
from rblock_fx.stages import Site
from rblock_fx.survey import Shape
from rblock_fx.trace import trace_ancestors


def build(
    replica: nn.Module, sites: Sequence[Site], asked: Sequence[Site], settings: Settings, input_size: Shape
) -> RBlock:
    """Trace, insert the masks, fork, and make the mask modules.

    Args:
        replica: the copy; its constants are put under `rblock`, nothing else changes.
        sites: the sites in forward order.
        asked: the same in the order in which the user named them, which is that of their drop rates and block sizes.
        settings: the checked settings.
        input_size: shape of one sample.
    """
    drop_probs = one_per_site("drop_prob", settings.drop_prob, len(asked))
    block_sizes = one_per_site("block_size", settings.block_size, len(asked))
    order = tuple(asked.index(site) for site in sites)

    trace = trace_ancestors(replica, sites)
    rblock = RBlock()
    for name, constant in trace.constants.items():
        rblock.register_buffer(name, constant, persistent=False)
    if trace.constants:
        replica.add_module("rblock", copy.deepcopy(rblock).to(META))

    growth = probe_growth(trace.graph, replica, input_size)
    names = _mask_names({site: len(calls) for site, calls in trace.nodes.items()}, taken={*dir(rblock), "conversion"})
    masked = [
        MaskedNode(node, consumer, f"rblock.{name}")
        for site in sites
        for (node, consumer), name in zip(trace.nodes[site], names[site], strict=True)
    ]
    calls = insert_masks(trace.graph, masked)
    pairs = settings.mask_class.parts == 2
    fork = fork_batch(trace.graph, calls, growth) if pairs else Fork(frozenset(), None)
    trace.graph.lint()

    for site, place in zip(sites, order, strict=True):
        for name in names[site]:
            forks = f"rblock.{name}" in fork.forking
            rblock.add_module(name, _make_mask(site, settings, drop_probs[place], int(block_sizes[place]), forks))
    code = trace.graph.python_code("self")
    rblock.conversion = Conversion(
        method=settings.method,
        calibration=settings.calibration,
        batch_norm=settings.batch_norm,
        input_size=input_size,
        masks=tuple((site, names[site]) for site in sites),
        order=order,
        forward=TrainingForward(code.src, code.globals, trace.specialised),
        early_fork_reason=fork.reason,
        cost=math.nan,  # known after the trial
    )
    return rblock


def _make_mask(site: Site, settings: Settings, drop_prob: float, block_size: int, forks: bool) -> Mask:
    return settings.mask_class(
        drop_prob=float(drop_prob),
        block_size=block_size,
        calibration=settings.calibration,
        shape=site.shape,
        channel_axis=site.channel_axis,
        forks=forks,
    )


def _mask_names(calls: dict[Site, int], taken: set[str]) -> dict[Site, tuple[str, ...]]:
    """Name the masks of each site, one per call of its module, after its path."""

    def free(name: str) -> str:
        while name in taken:
            name += "_"
        taken.add(name)
        return name

    return {
        site: tuple(free(site.path.replace(".", "_") + (f"_call{call}" if call else "")) for call in range(count))
        for site, count in calls.items()
    }
