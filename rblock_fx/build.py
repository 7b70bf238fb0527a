"""Building, on a weightless copy, what a model is given: its masks and its training forward."""

import copy
import itertools
from collections.abc import Collection, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from rblock_fx.checkpointing import keep_checkpointing
from rblock_fx.conversion import Conversion, RBlock, TrainingForward
from rblock_fx.dry_run import META
from rblock_fx.errors import ConversionError, first_line
from rblock_fx.fork import Fork, fork_batch, insert_masks
from rblock_fx.probe import Growths, Probe, operations_of, run_graph
from rblock_fx.settings import Settings, one_per_site
from rblock_fx.sharing import share_saved_maps
from rblock_fx.stages import Site, containers_of
from rblock_fx.survey import Shape, Survey
from rblock_fx.trace import Record, Trace, trace_ancestors


def build(
    replica: nn.Module, sites: Sequence[Site], asked: Sequence[Site], settings: Settings, survey: Survey
) -> RBlock:
    """Trace, insert the masks, fork, make the mask modules, and try the result out.

    Args:
        replica: the copy; its constants and masks are put under `rblock`, nothing else changes.
        sites: the sites in forward order.
        asked: the same in the order in which the user named them, which is that of their drop rates and block sizes.
        settings: the checked settings.
        survey: the recorded forward of the copy.

    Raises:
        ConversionError: the forward cannot be traced, or does not give the rows of both sub-models in every output.
    """
    drop_probs = one_per_site("drop_prob", settings.drop_prob, len(asked))
    block_sizes = one_per_site("block_size", settings.block_size, len(asked))
    values = dict(zip(asked, zip(drop_probs, block_sizes, strict=True), strict=True))

    input_size = survey.input_size
    trace = trace_ancestors(replica, sites, survey)
    rblock = RBlock()
    for name, constant in trace.constants.items():
        rblock.register_buffer(name, constant, persistent=False)

    plain = _run_plain(trace, replica, rblock, input_size)
    masked = _named(trace, taken={*dir(rblock), "conversion"})
    calls = insert_masks(trace.graph, {f"rblock.{name}": record for name, (_, record) in masked.items()})
    masked = {name: masked[name] for name in masked if f"rblock.{name}" in calls.values()}
    growths = Growths(trace.graph, replica, input_size, plain)
    pairs = settings.mask_class.parts == 2
    fork = fork_batch(trace.graph, calls, growths) if pairs else Fork(frozenset(), None)
    trace.graph.lint()

    _add_masks(rblock, masked, values, settings, fork.forking)
    _give(replica, rblock)

    converted = _try_out(trace, replica, input_size, plain, parts=settings.mask_class.parts)
    cost = _flops(trace, converted, plain) / (sum(plain.flops.values()) or 1)
    keep_checkpointing(trace, replica)
    behind_fork = [call for call, path in calls.items() if path not in fork.forking]
    share_saved_maps(trace.graph, behind_fork, plain, converted, replica)
    rblock.conversion = Conversion(
        method=settings.method,
        calibration=settings.calibration,
        batch_norm=settings.batch_norm,
        input_size=input_size,
        masks=tuple(
            (site, {name: record.item for name, (at, record) in masked.items() if at == site}) for site in sites
        ),
        order=tuple(map(asked.index, sites)),
        forward=_training_forward(trace, type(replica).__name__),
        settings=trace.settings,
        inlined=containers_of(sites),
        paired_batch_norms=_paired_batch_norms(trace, plain, converted, settings),
        early_fork_reason=fork.reason,
        cost=cost,
    )
    return rblock


def _add_masks(
    rblock: RBlock,
    masked: Mapping[str, tuple[Site, Record]],
    values: Mapping[Site, tuple[float, int]],
    settings: Settings,
    forking: Collection[str],
) -> None:
    """Make the mask modules, each with its site's drop rate and block size."""
    for name, (site, record) in masked.items():
        drop_prob, block_size = values[site]
        mask = settings.mask_class(
            drop_prob=float(drop_prob),
            block_size=int(block_size),
            calibration=settings.calibration,
            shape=record.shape,
            channel_axis=site.channel_axis,
            forks=f"rblock.{name}" in forking,
        )
        rblock.add_module(name, mask)


def _training_forward(trace: Trace, name: str) -> TrainingForward:
    """The graph as Python that runs.

    Raises:
        ConversionError: the names of the model's modules make no Python.
    """
    code = trace.graph.python_code("self")
    forward = TrainingForward(code.src, code.globals, trace.specialised)
    try:
        forward.compile(name)
    except SyntaxError as error:
        raise ConversionError(
            f"the names of the modules of {name} make no Python ({first_line(error)}: "
            f"{(error.text or '').strip()}); rename them, e.g. ModuleDict({{'inner': ...}}) rather than 'in'."
        ) from error
    return forward


def _give(replica: nn.Module, rblock: RBlock) -> None:
    """Put a copy of the masks and constants on the replica, without data as everything there."""
    replica.add_module("rblock", copy.deepcopy(rblock).to(META))


def _run_plain(trace: Trace, replica: nn.Module, rblock: RBlock, input_size: Shape) -> Probe:
    """Run the model itself and the graph as it was traced, and compare what they compute.

    Raises:
        ConversionError: it runs in eval mode only, on samples of this size, or does not compute what the model does.
    """
    try:
        operations = operations_of(replica, input_size)
        _give(replica, rblock)
        plain = run_graph(trace.graph, replica, input_size)
    except Exception as error:
        raise ConversionError(
            f"{type(replica).__name__} does not run in train mode on a batch of {('N', *input_size)}: "
            f"{type(error).__name__}: {first_line(error)}\nPass the shape of one sample "
            "that it trains on, e.g. input_size=(3, 299, 299) for Inception v3, whose auxiliary head needs that much."
        ) from error
    for traced, own in itertools.zip_longest(plain.operations, operations):
        if traced != own:
            raise ConversionError(
                f"the traced forward of {type(replica).__name__} is not its own: it computes {traced or 'no more'} "
                f"where that computes {own or 'no more'}. What asks for the type of its input (isinstance(x, Tensor)), "
                "or writes into lists or dictionaries that it is given, cannot be traced; choose sites that lie less "
                "deep: list_sites(model)."
            )
    return plain


def _try_out(trace: Trace, replica: nn.Module, input_size: Shape, plain: Probe, parts: int) -> Probe:
    """Run the graph with its masks and compare with the plain one.

    Raises:
        ConversionError: it fails, or does not give `parts` times the rows in every output.
    """
    name = type(replica).__name__
    try:
        converted = run_graph(trace.graph, replica, input_size, known=plain)
    except Exception as error:
        raise ConversionError(
            f"the training forward generated for {name} does not run ({type(error).__name__}: {first_line(error)}); "
            "choose other sites: list_sites(model)."
        ) from error
    if () in _shapes(plain.output):
        raise ConversionError(
            f"{name} gives a number (a tensor without axes) in train mode, of which there are no rows to double; "
            "compute it outside of the model, from split_pair(output)."
        )
    expected = [(parts * shape[0], *shape[1:]) for shape in _shapes(plain.output)]
    if _shapes(converted.output) != expected:
        raise ConversionError(
            f"the training forward generated for {name} gives {_shapes(converted.output)}, expected {expected}: the "
            "network mixes the samples of a batch, or its sites do not reach the output; choose other sites: "
            "list_sites(model)."
        )
    return converted


def _paired_batch_norms(trace: Trace, plain: Probe, converted: Probe, settings: Settings) -> tuple[str, ...]:
    """The batch norms behind the fork; of those inside one another (timm's SplitBatchNorm2d) the outer one.

    Raises:
        ConversionError: statistics of each sub-model are asked for, of a layer that also runs before the fork, or of
            batch norm that is no layer.
    """
    functional = any(node.target in (F.batch_norm, torch.batch_norm) for node in trace.graph.nodes)
    if settings.batch_norm == "per_submodel" and functional:
        raise ConversionError(
            "the forward around the sites calls F.batch_norm, which has no statistics of each sub-model; use "
            "batch_norm='joint', or an nn.BatchNorm2d in its place."
        )
    paired: list[str] = []
    for path, rows in converted.batch_norm_rows.items():
        before = plain.batch_norm_rows[path]
        doubled = [2 * count for count in before]
        if rows == doubled:
            paired.append(path)
        elif settings.batch_norm == "per_submodel" and any(count in doubled for count in rows):
            raise ConversionError(
                f"the batch norm {path!r} runs before the fork and behind it, so it has no statistics of each "
                "sub-model alone; use batch_norm='joint', or sites that lie before all of its calls: list_sites(model)."
            )
    inside = {path for path in paired for other in paired if path.startswith(other + ".")}
    return tuple(path for path in paired if path not in inside)


def _shapes(output: object) -> list[Shape]:
    return [tuple(leaf.shape) for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def _flops(trace: Trace, converted: Probe, plain: Probe) -> int:
    """FLOPs of the converted forward, of which the part before the fork was run once."""
    return sum(converted.flops.get(node, plain.flops.get(node, 0)) for node in trace.graph.nodes)


def _named(trace: Trace, taken: set[str]) -> dict[str, tuple[Site, Record]]:
    """Name the masks after the paths of their sites, one for each map of each call of the module."""
    named: dict[str, tuple[Site, Record]] = {}
    for site, records in trace.records.items():
        for index, record in enumerate(records):
            call = index // len(site.shapes)
            item = "" if record.item is None else f"_map{record.item}"
            name = site.path.replace(".", "_") + item + (f"_call{call}" if call else "")
            while name in taken or name in named:
                name += "_"
            named[name] = (site, record)
    return named
