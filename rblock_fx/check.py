"""Trying a conversion out on the weightless copy, before the model is touched."""

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from rblock_fx.conversion import RBlock
from rblock_fx.errors import ConversionError
from rblock_fx.fork import PROBE_ROWS
from rblock_fx.replica import META, dry_run, meta_batch
from rblock_fx.survey import FlopCounter, Shape


@dataclasses.dataclass(frozen=True)
class Trial:
    """What the trial showed.

    Attributes:
        cost: FLOPs of the converted training forward over those of the plain one.
        paired_batch_norms: paths of the batch norms that see twice the rows.
    """

    cost: float
    paired_batch_norms: tuple[str, ...]


def try_out(replica: nn.Module, rblock: RBlock, input_size: Shape, parts: int) -> Trial:
    """Run the training forward of a weightless copy plain and converted, and compare.

    Raises:
        ConversionError: the converted forward fails, or does not give `parts` times the rows in every output.
    """
    name = type(replica).__name__
    replica.train()
    x = meta_batch(replica, PROBE_ROWS[0], input_size)
    plain = _run(replica, replica, x)
    replica.add_module("rblock", copy.deepcopy(rblock).to(META))
    training_forward = rblock.conversion.forward.compile(name)
    try:
        paired = _run(replica, lambda x: training_forward(replica, x), x)
    except Exception as error:
        raise ConversionError(
            f"the training forward generated for {name} does not run ({type(error).__name__}: {error}); choose other "
            "sites: list_sites(model)."
        ) from error
    expected = [(parts * shape[0], *shape[1:]) for shape in plain.shapes]
    if paired.shapes != expected:
        raise ConversionError(
            f"the training forward generated for {name} gives {paired.shapes}, expected {expected}: the network mixes "
            "the samples of a batch, or its sites do not reach the output; choose other sites: list_sites(model)."
        )
    norms = tuple(path for path, rows in paired.norm_rows.items() if rows == 2 * plain.norm_rows.get(path, 0))
    return Trial(paired.flops / plain.flops if plain.flops else 1.0, norms)


@dataclasses.dataclass(frozen=True)
class _Run:
    shapes: list[Shape]
    flops: int
    norm_rows: dict[str, int]


def _run(replica: nn.Module, forward: Callable[[Tensor], Any], x: Tensor) -> _Run:
    counter = FlopCounter()
    with dry_run(), _batch_norm_rows(replica) as norm_rows, counter:
        output = forward(x)
    shapes = [tuple(leaf.shape) for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
    return _Run(shapes, counter.flops, norm_rows)


@contextlib.contextmanager
def _batch_norm_rows(replica: nn.Module) -> Iterator[dict[str, int]]:
    """Record how many rows each batch norm sees."""
    rows: dict[str, int] = {}
    handles = []
    for path, module in replica.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):

            def record(_module: nn.Module, inputs: tuple[Tensor, ...], path: str = path) -> None:
                rows[path] = len(inputs[0])

            handles.append(module.register_forward_pre_hook(record))
    try:
        yield rows
    finally:
        for handle in handles:
            handle.remove()
