"""Build, on a weightless copy, the masks and the training forwards that a model gets."""

import copy
import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rblock_fx.errors import ConversionError, first_line
from rblock_fx.masks.methods import METHODS, Mask
from rblock_fx.network.record import Shape, tensors_in
from rblock_fx.network.replica import META
from rblock_fx.network.stages import Site
from rblock_fx.network.survey import Survey
from rblock_fx.surgery.checkpointing import checkpoint_modules
from rblock_fx.surgery.code import TrainingForward, generate, truncated
from rblock_fx.surgery.fork import Fork, fork_batch
from rblock_fx.surgery.guards import Guards
from rblock_fx.surgery.probe import ROWS, Probe, probe_graph, probe_model
from rblock_fx.surgery.trace import MASKS, MaskCall, Trace, trace_forward


@dataclasses.dataclass(frozen=True)
class Generated:
    """The training forwards of one method of a model.

    Attributes:
        clean: without activation checkpointing.
        checkpointing: with it; None where the model has none.
        switches: the attributes of the model that switch it; empty where it is always on.
    """

    clean: TrainingForward
    checkpointing: TrainingForward | None
    switches: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What apply_rblock was asked for and did.

    Attributes:
        method: name of the method.
        calibration: how gamma follows from the drop probability.
        batch_norm: "joint" or "per_submodel".
        input_size: shape of one sample.
        masks: each site, in forward order, with the names of its masks under `model.rblock`.
        order: for each of them, its place in the order in which the user named the sites.
        forwards: the generated training forwards by the name of the method: "forward", often "forward_features".
        maskless: the methods that the forward calls before its last mask, which have no training forward.
        specialised: the optional arguments of the forward, with the defaults that the graph takes for granted.
        guards: everything else that it takes for granted.
        halved: the modules that run on each half of the batch: batch norms with "per_submodel", and layers other than
            batch norm that relate the samples of a batch.
        early_fork_reason: why the batch doubles at the input; None where it doubles at the first mask.
        cost: FLOPs of the training forward over those of the plain one.
    """

    method: str
    calibration: str
    batch_norm: str
    input_size: Shape
    masks: tuple[tuple[Site, tuple[str, ...]], ...]
    order: tuple[int, ...]
    forwards: Mapping[str, Generated]
    maskless: tuple[str, ...]
    specialised: Mapping[str, Any]
    guards: Guards
    halved: tuple[str, ...]
    early_fork_reason: str | None
    cost: float


class RBlock(nn.Module):
    """The masks of a converted model: no parameters, no persistent buffers."""

    conversion: Conversion

    def masks_of(self, position: int) -> list[Mask]:
        """The masks of one site, numbered in forward order, in the order of their calls."""
        names = self.conversion.masks[position][1]
        return [mask for name in names if isinstance(mask := self.get_submodule(name), Mask)]

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the masks alone, with the arguments of torch.compile; the network around them stays eager.

        Masks of one shape share a graph, and a change of drop_prob keeps it. A compiled mask reads its map once.
        """
        for mask in self.children():
            mask.compile(*args, **kwargs)

    def extra_repr(self) -> str:
        """The settings that all masks share."""
        return f"method={self.conversion.method!r}, batch_norm={self.conversion.batch_norm!r}"


@dataclasses.dataclass(frozen=True)
class Request:
    """The checked request of the user.

    Attributes:
        method: name of the method.
        calibration: "exact", "eq6" or "eq7".
        batch_norm: "joint" or "per_submodel".
        sites: the sites in the user's order.
        drop_probs: one for each of them, in [0, 1).
        block_sizes: one for each of them, odd.
    """

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
        order=tuple(map(list(request.sites).index, sites)),
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
    position = list(request.sites).index(call.site)
    return METHODS[request.method](
        drop_prob=float(request.drop_probs[position]),
        block_size=int(request.block_sizes[position]),
        calibration=request.calibration,
        shape=call.shape,
        channel_axis=call.site.channel_axis,
        forks=forks,
        
    )


def _lend(replica: nn.Module, rblock: RBlock) -> None:
    """Put a copy of the masks and constants on the replica, without data."""
    vars(replica)[MASKS] = copy.deepcopy(rblock).to(META)


def _probe_plain(trace: Trace, replica: nn.Module, input_size: Shape) -> Probe:
    """Run the model itself and the graph without its masks, and compare them.

    Raises:
        ConversionError: it runs in eval mode only, on samples of this size, or the graph is not the model's forward.
    """
    name = type(replica).__name__
    try:
        own = probe_model(replica, input_size)
        plain = probe_graph(trace.graph, replica, input_size, dict.fromkeys(trace.masks, 0))
    except Exception as error:
        raise ConversionError(
            f"{name} does not run in train mode on a batch of {('N', *input_size)}: "
            f"{type(error).__name__}: {first_line(error)}\nPass the shape of one sample that it trains on, e.g. "
            "input_size=(3, 299, 299) for Inception v3, whose auxiliary head needs that much"
        ) from error
    for traced, expected in itertools.zip_longest(plain.operations, own.operations):
        if traced != expected:
            raise ConversionError(
                f"the traced forward of {name} differs from its own: it computes {traced or 'nothing'} where the model "
                f"computes {expected or 'nothing'}. Code that asks for the type or an attribute of its input, catches "
                "errors or counts its calls cannot be traced; choose sites that lie less deep: list_sites(model)"
            )
    if _kinds(plain.output) != _kinds(own.output):
        raise ConversionError(
            f"{name} returns {type(own.output).__name__}, which its traced forward cannot build; return tensors in a "
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
        converted = probe_graph(trace.graph, replica, input_size, dict.fromkeys(doubling, parts * ROWS), known=plain)
    except Exception as error:
        raise ConversionError(
            f"the training forward generated for {name} does not run ({type(error).__name__}: {first_line(error)}); "
            "choose other sites: list_sites(model)"
        ) from error
    outputs = tensors_in(converted.output)
    if any(tensor.dim() == 0 for tensor in outputs):
        raise ConversionError(
            f"{name} returns a 0-dim tensor in train mode, which has no batch dimension to double; compute it outside "
            "the model, from split_pair(output)"
        )
    expected = [(parts * tensor.shape[0], *tensor.shape[1:]) for tensor in tensors_in(plain.output)]
    rows = [converted.layouts.get(id(tensor)) for tensor in outputs]
    if [tuple(tensor.shape) for tensor in outputs] != expected or not all(row and row.is_rows for row in rows):
        raise ConversionError(
            f"the training forward generated for {name} returns {_rows_in_words(outputs)}, expected "
            f"{_rows_in_words([torch.empty(shape, device=META) for shape in expected])} with the batch as the first "
            "axis: the network mixes the samples of a batch, or its sites do not reach the output; choose other "
            "sites: list_sites(model)"
        )
    return converted


def _rows_in_words(tensors: Sequence[Tensor]) -> str:
    shapes = [
        ", ".join(f"{length // ROWS}N" if length % ROWS == 0 else str(length) for length in tensor.shape)
        for tensor in tensors
    ]
    return " and ".join(f"({shape})" for shape in shapes)


def _halved(
    trace: Trace, replica: nn.Module, plain: Probe, converted: Probe, batch_norm: str
) -> tuple[str, ...]:
    """The modules that must run on each half of the batch; of those inside one another the outer one.

    Raises:
        ConversionError: traced code relates the samples of a batch, or such a module also runs before the fork.
    """
    for mixing in converted.mixings:
        if mixing.path is None:
            raise ConversionError(
                f"{mixing.node!r} in the forward of {type(replica).__name__} relates the samples of a batch to one "
                f"another ({mixing.operation} over the batch axis), so the sub-models would see each other; compute it "
                "in a module of its own, which then runs on each half"
            )
    paths = {mixing.path for mixing in converted.mixings if mixing.path is not None}
    if batch_norm == "per_submodel":
        if any(node.target in (F.batch_norm, torch.batch_norm) for node in trace.graph.nodes):
            raise ConversionError(
                "the forward around the sites calls F.batch_norm, which has no statistics of each sub-model; use "
                "batch_norm='joint', or an nn.BatchNorm2d in its place"
            )
        for path, calls in converted.calls.items():
            module = replica.get_submodule(path)
            if isinstance(module, _BatchNorm) and any(call and call.batch > ROWS for call in calls):
                paths.add(path)
    paths = {path for path in paths if not any(path.startswith(other + ".") for other in paths)}
    for path in paths:
        calls = converted.calls[path]
        paired = [call for call in calls if call and call.batch > ROWS and call.is_rows]
        if not len(paired) == len(calls) == len(plain.calls[path]):
            raise ConversionError(
                f"{path!r} must run on each sub-model alone, but it also runs before the fork or on rows in another "
                "order than the batch's; use batch_norm='joint', or sites that lie elsewhere: list_sites(model)"
            )
    return tuple(path for path in converted.calls if path in paths)


def _generate(trace: Trace, fork: Fork, replica: nn.Module) -> tuple[dict[str, Generated], tuple[str, ...]]:
    """The training forwards of the model and of its methods; and the methods that lack a mask."""
    forking = [*fork.masks, *fork.copies]
    first = next((node for node in trace.graph.nodes if node in forking), None)
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
        kind = dict if isinstance(value, fx.immutable_collections.immutable_dict) else type(value)
        return kind, {key: _kinds(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        kind = list if isinstance(value, fx.immutable_collections.immutable_list) else type(value)
        return kind, [_kinds(item) for item in value]
    if dataclasses.is_dataclass(value):
        return type(value), {key: _kinds(item) for key, item in vars(value).items()}
    return type(value)
