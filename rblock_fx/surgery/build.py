"""Build, on a weightless copy, the masks and the training forwards that a model gets."""

import copy
import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rblock_fx.errors import ConversionError, first_line
from rblock_fx.masks.mask import Mask
from rblock_fx.masks.methods import METHODS
from rblock_fx.network.record import ROWS, record_forward
from rblock_fx.network.replica import META, Shape, tensors_in
from rblock_fx.network.stages import Site
from rblock_fx.network.survey import Survey
from rblock_fx.surgery.code import checkpoint_modules, generate
from rblock_fx.surgery.conversion import Conversion, Generated, RBlock
from rblock_fx.surgery.fork import Fork, Probe, fork_batch, truncated
from rblock_fx.surgery.trace import MASKS, MaskCall, Trace, trace_forward


@dataclasses.dataclass(frozen=True)
class Request:
    """The checked arguments of apply_rblock: the sites in the user's order, with a drop rate and a block size each."""

    method: str
    calibration: str
    batch_norm: str
    sites: Sequence[Site]
    drop_probs: Sequence[float]
    block_sizes: Sequence[int]


def build(replica: nn.Module, request: Request, survey: Survey) -> RBlock:
    """Trace with masks, compare with the model, fork, make the masks, and try the result out.

    Args:
        replica: the copy; it gets a copy of the masks, nothing else changes.
        request: the checked settings and sites.
        survey: the recorded forward of the copy.

    Raises:
        ConversionError: the forward cannot be traced, or does not return the rows of both sub-models in every output.
    """
    sites = sorted(request.sites, key=lambda site: survey.position(site.path))
    parts = METHODS[request.method].parts
    trace = trace_forward(replica, sites, survey)
    rblock = RBlock()
    for name, constant in trace.constants.items():
        rblock.register_buffer(name, constant, persistent=False)
    _lend(replica, rblock)
    plain = _probe_plain(trace, replica, survey.input_size)
    fork = fork_batch(trace.graph, set(trace.masks), plain) if parts == 2 else Fork()
    trace.graph.lint()
    for node, call in trace.masks.items():
        rblock.add_module(call.name, _make_mask(call, request, forks=node in fork.masks))
    _lend(replica, rblock)
    converted = _probe_converted(trace, fork, replica, plain, survey.input_size, parts)
    forwards, maskless = _generate(trace, fork, replica)
    rblock.conversion = Conversion(
        method=request.method,
        calibration=request.calibration,
        batch_norm=request.batch_norm,
        input_size=survey.input_size,
        masks=tuple((site, tuple(call.name for call in trace.masks.values() if call.site == site)) for site in sites),
        order=tuple(map(request.sites.index, sites)),
        forwards=forwards,
        maskless=maskless,
        specialised=trace.specialised,
        guards=trace.guards,
        halved=_halved(trace, replica, plain, converted, request.batch_norm),
        early_fork_reason=fork.reason,
        cost=converted.flops / (plain.flops or 1),
    )
    return rblock


def _make_mask(call: MaskCall, request: Request, *, forks: bool) -> Mask:
    position = request.sites.index(call.site)
    return METHODS[request.method](
        drop_prob=float(request.drop_probs[position]),
        block_size=int(request.block_sizes[position]),
        calibration=request.calibration,
        shape=call.shape,
        channel_axis=call.site.channel_axis,
        forks=forks,
        place=call.place,
    )


def _lend(replica: nn.Module, rblock: RBlock) -> None:
    """Put a copy of the masks and constants on the replica, without data."""
    vars(replica)[MASKS] = copy.deepcopy(rblock).to(META)


def _probe_plain(trace: Trace, replica: nn.Module, input_size: Shape) -> Probe:
    """Run the model itself and the graph without its masks, and compare them.

    Raises:
        ConversionError: it runs in eval mode only, or the graph is not the model's forward.
    """
    name = type(replica).__name__
    try:
        own, output = record_forward(replica, input_size)
        plain = Probe(trace.graph, replica, input_size, dict.fromkeys(trace.masks, 0))
    except Exception as error:
        raise ConversionError(
            f"{name} does not run in train mode on a batch of {('N', *input_size)}: "
            f"{type(error).__name__}: {first_line(error)}\nPass the shape of one sample that it trains on, e.g. "
            "input_size=(3, 299, 299) for Inception v3, whose auxiliary head needs that much"
        ) from error
    for traced, expected in itertools.zip_longest(plain.recorder.operations, own.operations):
        if traced != expected:
            raise ConversionError(
                f"the traced forward of {name} differs from its own: it computes {traced or 'nothing'} where the model "
                f"computes {expected or 'nothing'}. Code that asks for the type or an attribute of its input, catches "
                "errors or counts its calls cannot be traced; choose sites that lie less deep: list_sites(model)"
            )
    if _kinds(plain.result) != _kinds(output):
        raise ConversionError(
            f"{name} returns {type(output).__name__}, which its traced forward cannot build; return tensors in a "
            "dict, list, tuple, named tuple or dataclass"
        )
    return plain


def _probe_converted(
    trace: Trace, fork: Fork, replica: nn.Module, plain: Probe, input_size: Shape, parts: int
) -> Probe:
    """Run the graph with its masks.

    Raises:
        ConversionError: it fails, or does not return `parts` times the rows in every output.
    """
    name = type(replica).__name__
    try:
        doubling = [*trace.masks, *fork.copies]
        converted = Probe(trace.graph, replica, input_size, dict.fromkeys(doubling, parts * ROWS), known=plain)
    except Exception as error:
        raise ConversionError(
            f"the training forward generated for {name} does not run ({type(error).__name__}: {first_line(error)}); "
            "choose other sites: list_sites(model)"
        ) from error
    outputs = tensors_in(converted.result)
    if any(tensor.dim() == 0 for tensor in outputs):
        raise ConversionError(
            f"{name} returns a 0-dim tensor in train mode, which has no batch dimension to double; compute it outside "
            "the model, from split_pair(output)"
        )
    expected = [(parts * tensor.shape[0], *tensor.shape[1:]) for tensor in tensors_in(plain.result)]
    rows = [converted.recorder.layouts.get(id(tensor)) for tensor in outputs]
    if [tuple(tensor.shape) for tensor in outputs] != expected or not all(row and row.is_rows for row in rows):
        raise ConversionError(
            f"the training forward generated for {name} returns {_rows_in_words(outputs)}, expected "
            f"{_rows_in_words([torch.empty(shape, device=META) for shape in expected])} with the batch as the first "
            "axis: the network mixes the samples of a batch, or its sites do not reach the output; choose other "
            "sites: list_sites(model)"
        )
    return converted


def _rows_in_words(tensors: Sequence[Tensor]) -> str:
    lengths = [[f"{size // ROWS}N" if size % ROWS == 0 else str(size) for size in tensor.shape] for tensor in tensors]
    shapes = map(", ".join, lengths)
    return " and ".join(f"({shape})" for shape in shapes)


def _halved(trace: Trace, replica: nn.Module, plain: Probe, converted: Probe, batch_norm: str) -> tuple[str, ...]:
    """The modules that must run on each half of the batch; of those inside one another the outer one.

    Raises:
        ConversionError: traced code relates the samples of a batch, or such a module also runs before the fork.
    """
    for mixing in converted.recorder.mixings:
        if mixing.path is None:
            raise ConversionError(
                f"{mixing.node!r} in the forward of {type(replica).__name__} relates the samples of a batch to one "
                f"another ({mixing.operation} over the batch axis), so the sub-models would see each other; compute it "
                "in a module of its own, which then runs on each half"
            )
    paths = {mixing.path for mixing in converted.recorder.mixings if mixing.path is not None}
    if batch_norm == "per_submodel":
        if any(node.target in (F.batch_norm, torch.batch_norm) for node in trace.graph.nodes):
            raise ConversionError(
                "the forward around the sites calls F.batch_norm, which has no statistics of each sub-model; use "
                "batch_norm='joint', or an nn.BatchNorm2d in its place"
            )
        for run in converted.recorder.runs:
            is_paired = run.input_layout is not None and run.input_layout.batch > ROWS
            if is_paired and isinstance(replica.get_submodule(run.path), _BatchNorm):
                paths.add(run.path)
    paths = {path for path in paths if not any(path.startswith(other + ".") for other in paths)}
    for path in paths:
        layouts = [run.input_layout for run in converted.recorder.runs if run.path == path]
        paired = [layout for layout in layouts if layout and layout.batch > ROWS and layout.is_rows]
        if not len(paired) == len(layouts) == sum(run.path == path for run in plain.recorder.runs):
            raise ConversionError(
                f"{path!r} must run on each sub-model alone, but it also runs before the fork or on rows in another "
                "order than the batch's; use batch_norm='joint', or sites that lie elsewhere: list_sites(model)"
            )
    return tuple(dict.fromkeys(run.path for run in converted.recorder.runs if run.path in paths))


def _generate(trace: Trace, fork: Fork, replica: nn.Module) -> tuple[dict[str, Generated], tuple[str, ...]]:
    """The training forwards of the model and of its methods; and the methods that lack a mask."""
    first = next((node for node in trace.graph.nodes if node in fork.masks | fork.copies), None)
    comments = {} if first is None else {first.name: "the batch doubles here"}
    ends = {"forward": None} | {name: ends for name, ends in trace.methods.items() if name != "forward"}
    forwards: dict[str, Generated] = {}
    maskless: list[str] = []
    for name, end in ends.items():
        graph = trace.graph
        if end is not None:
            graph, nodes = truncated(trace.graph, *end)
            if not all(mask in nodes for mask in trace.masks):
                maskless.append(name)
                continue
        clean = generate(graph, comments)
        with_checkpoints = None
        if trace.checkpointed:
            copied = fx.Graph()
            copied.output(copied.graph_copy(graph, {}))
            checkpoint_modules(copied, trace.checkpointed, replica)
            with_checkpoints = generate(copied, comments)
        switches = {switch for switch in trace.checkpointed.values() if switch is not None}
        always = None in trace.checkpointed.values()
        forwards[name] = Generated(clean, with_checkpoints, () if always else tuple(sorted(switches)))
    return forwards, tuple(maskless)


def _kinds(value: Any) -> Any:
    """The types of a nesting of tensors."""
    if isinstance(value, Tensor):
        return Tensor
    if isinstance(value, dict):
        is_graphs = isinstance(value, fx.immutable_collections.immutable_dict)
        return dict if is_graphs else type(value), {key: _kinds(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        is_graphs = isinstance(value, fx.immutable_collections.immutable_list)
        return list if is_graphs else type(value), [_kinds(item) for item in value]
    if dataclasses.is_dataclass(value):
        return type(value), {key: _kinds(item) for key, item in vars(value).items()}
    return type(value)
