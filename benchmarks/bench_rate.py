"""Is the drop rate that was asked for the drop rate that happens? Monte Carlo on each library's own code.

    python benchmarks/bench_rate.py --threads 1        # minutes: benchmarks/results/rate-cpu.json and its picture
    python benchmarks/bench_rate.py --quick --output /tmp/rate.json
    python benchmarks/bench_rate.py --show benchmarks/results/rate-cpu.json

Timm's DropBlock2d, torchvision's DropBlock2d and DropBlock of rblock_fx, calibrated by Eq. 6, by Eq. 7 and exactly, are
given maps of ones and the zeros are counted. One row of the result per map, block size and rate; then one per method of
rblock_fx, with the rate of each sub-model, of their union and of their overlap; then one per library in float16.

Drops of one map depend on each other, so the standard error is taken over maps, which are independent, and maps are
drawn until it is small enough. "expected" is the rate of ours by Eq. 8, without chance. "whole" is the share of maps
that are dropped whole. What a library refuses is recorded with its message. --rounds has no meaning here.
"""

import argparse
import dataclasses
import itertools
import math
import sys
from collections.abc import Callable

import harness
import torch
import torchvision.ops
from harness import Row
from rate_report import EXACT, PRECISIONS, Shape, by, draw, table
from timm.layers import drop as timm_drop
from torch import Tensor, nn

from rblock_fx.coverage import coverage
from rblock_fx.masks import METHODS, Mask

OURS = {calibration: f"rblock_fx {calibration}" for calibration in ("eq6", "eq7", "exact")}
LIBRARIES = ("timm", "torchvision", *OURS.values())

MAPS: tuple[Shape, ...] = ((4, 4), (7, 7), (8, 8), (7, 12), (14, 14), (28, 28), (32, 32), (56, 56))
BLOCK_SIZES = (1, 3, 5, 7)
DROP_PROBS = (0.05, 0.1, 0.2, 0.3, 0.5)
QUICK_MAPS: tuple[Shape, ...] = ((4, 4), (7, 7), (7, 12), (14, 14))

CHANNELS = 8  # of the second table
BATCH = 1 << 18  # activations drawn at once
FEWEST_MAPS = 4096  # before a spread is trusted
MOST_ACTIVATIONS = 1 << 28  # of one cell
UNIFORM_STEPS = 1 << 24  # values of torch.rand in float32


@dataclasses.dataclass
class Rates:
    """Running mean and standard error of rates that are measured map by map: (batch, quantities) at a time."""

    count: int = 0
    total: Tensor | float = 0.0
    squares: Tensor | float = 0.0
    whole: int = 0

    def add(self, rates: Tensor) -> None:
        """Take one batch; what is dropped whole is counted for the first quantity."""
        self.count += len(rates)
        self.total = self.total + rates.sum(0, dtype=torch.float64)
        self.squares = self.squares + rates.double().square().sum(0)
        self.whole += int((rates[:, 0] == 1).sum())

    @property
    def means(self) -> list[float]:
        """The mean of each quantity."""
        means: list[float] = (torch.as_tensor(self.total) / self.count).tolist()
        return means

    @property
    def standard_errors(self) -> list[float]:
        """The standard error of each mean, over independent maps."""
        mean = torch.as_tensor(self.total) / self.count
        variance = (torch.as_tensor(self.squares) / self.count - mean.square()).clamp(min=0)
        errors: list[float] = (variance / (self.count - 1)).sqrt().tolist()
        return errors


def draw_until(draw: Callable[[], Tensor], activations: int, target: float) -> Rates:
    """Draw batches of rates until every standard error is at most `target`, or the cell has had its share of work."""
    rates = Rates()
    drawn = 0
    while rates.count < FEWEST_MAPS or (max(rates.standard_errors) > target and drawn < MOST_ACTIVATIONS):
        rates.add(draw())
        drawn += activations
    return rates


def drop_block(library: str, drop_prob: float, block_size: int, shape: Shape) -> nn.Module:
    """Make each library's own DropBlock, for maps of one channel."""
    module: nn.Module
    if library == "timm":
        module = timm_drop.DropBlock2d(drop_prob=drop_prob, block_size=block_size)
    elif library == "torchvision":
        module = torchvision.ops.drop_block.DropBlock2d(p=drop_prob, block_size=block_size)
    else:
        calibration = next(name for name, label in OURS.items() if label == library)
        module = METHODS["dropblock"](drop_prob, block_size, calibration, (1, *shape), channel_axis=1, forks=False)
    return module


def measure_cell(library: str, shape: Shape, block_size: int, drop_prob: float, target: float, device: str) -> Row:
    """One row of the first table: the rate that one library reaches on one map."""
    row: Row = {"table": "rate", "library": library, "map": shape, "block_size": block_size, "asked": drop_prob}
    row |= dict.fromkeys(("reached", "standard_error", "samples", "whole", "expected", "expected_float32", "raises"))
    x = torch.ones(max(BATCH // math.prod(shape), 1), 1, *shape, device=device)

    def one_batch() -> Tensor:
        zeros: Tensor = module(x) == 0
        return zeros.flatten(1).float().mean(1, keepdim=True)

    try:
        module = drop_block(library, drop_prob, block_size, shape).to(device).train()
        rates = draw_until(one_batch, x.numel(), target)
    except ValueError as error:
        return row | {"raises": f"{type(error).__name__}: {error}"}
    row |= {"reached": rates.means[0], "standard_error": rates.standard_errors[0], "samples": rates.count}
    row["whole"] = rates.whole / rates.count
    if isinstance(module, Mask):
        gamma = module.block_centre_probability(shape)
        # What is compared with gamma is a multiple of 2^-24, so that the probability is gamma rounded up to one.
        drawn = math.ceil(float(module.gamma) * UNIFORM_STEPS) / UNIFORM_STEPS
        row["expected"] = coverage(gamma, shape, block_size)
        row["expected_float32"] = coverage(drawn, shape, block_size)
    return row


def measure_method(method: str, shape: Shape, block_size: int, drop_prob: float, target: float, device: str) -> Row:
    """One row of the second table: the rates of one method's sub-models."""
    kind = METHODS[method]
    mask = kind(drop_prob, block_size, "exact", (CHANNELS, *shape), channel_axis=1, forks=True).to(device)
    x = torch.ones(max(BATCH // (CHANNELS * math.prod(shape)), 1), CHANNELS, *shape, device=device)

    def one_batch() -> Tensor:
        first, *others = (mask(x) == 0).flatten(1).chunk(kind.parts)
        second = others[0] if others else first
        return torch.stack([part.float().mean(1) for part in (first, second, first | second, first & second)], dim=1)

    rates = draw_until(one_batch, kind.parts * x.numel(), target)
    names = ("sub_model_1", "sub_model_2", "union", "overlap")
    each, union = expected_rates(method, drop_prob)
    return {
        "table": "method",
        "method": method,
        "map": shape,
        "block_size": block_size if kind.has_blocks else None,
        "asked": drop_prob,
        "parts": kind.parts,
        "expected_each": each,
        "expected_union": union,
        **dict(zip(names, rates.means, strict=True)),
        **{f"{name}_error": error for name, error in zip(names, rates.standard_errors, strict=True)},
        "samples": rates.count,
    }


def expected_rates(method: str, p: float) -> tuple[float, float | None]:
    """What each sub-model and their union are to drop.

    R-DropBlock has no simple union: its positions differ in their rate, being less at the borders.
    """
    if method in ("bdropdml", "sdropdml", "c-dropblock"):
        return p / 2, p
    if method == "c-drop":
        return p, 2 * p
    if method in ("r-drop", "r-spatialdropout"):
        return p, 1 - (1 - p) ** 2
    return p, None if method == "r-dropblock" else p


def measure_half_precision(library: str, shape: Shape, device: str) -> Row:
    """One row of the third table: a batch of 512 maps in float16, at rate 0.1 with blocks of 7."""
    torch.manual_seed(0)
    row: Row = {"table": "float16", "library": library, "map": shape, "block_size": 7, "asked": 0.1}
    module = drop_block(library, 0.1, 7, shape).to(device).train()
    x = torch.ones(512, 1, *shape, device=device)
    try:
        zeros = {name: float((module(x.to(getattr(torch, name))) == 0).float().mean()) for name in PRECISIONS}
    except (ValueError, RuntimeError) as error:
        return row | dict.fromkeys(PRECISIONS) | {"raises": f"{type(error).__name__}: {error}"}
    return row | zeros | {"raises": None}


def measure(options: argparse.Namespace) -> list[Row]:
    """All three tables."""
    quick = options.quick
    ours, others = options.standard_error or ((0.003, 0.003) if quick else (0.0005, 0.001))
    maps, blocks, probs = (QUICK_MAPS, (3, 7), (0.1, 0.5)) if quick else (MAPS, BLOCK_SIZES, DROP_PROBS)
    rows = []
    for shape, block_size in itertools.product(maps, blocks):
        print(f"{by(shape)}, block {block_size}", file=sys.stderr)
        for drop_prob, library in itertools.product(probs, LIBRARIES):
            target = ours if library == EXACT else others
            rows.append(measure_cell(library, shape, block_size, drop_prob, target, options.device))
    cells = [((7, 7), 3, 0.2)] if quick else [((7, 7), 3, 0.2), ((14, 14), 5, 0.1), ((14, 14), 7, 0.3)]
    for cell, method in itertools.product(cells, METHODS):
        rows.append(measure_method(method, *cell, ours, options.device))
    halves = [measure_half_precision(library, (56, 56), options.device) for library in ("timm", "torchvision", EXACT)]
    return rows + halves


def main() -> None:
    """Parse the command line and run."""
    parser = harness.command_line("rate", __doc__)
    parser.add_argument(
        "--standard-error",
        type=float,
        nargs=2,
        metavar=("EXACT", "OTHERS"),
        default=None,
        help="of each rate, at most, for rblock_fx exact and for the others "
        "(default 0.0005 0.001; with --quick 0.003 0.003)",
    )
    harness.run("rate", parser, measure, table, draw)


if __name__ == "__main__":
    main()
