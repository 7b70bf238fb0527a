"""Requested and realised drop rate, by Monte Carlo on each library's own code.

    python benchmarks/bench_rate.py --threads 1        # 18 minutes: benchmarks/results/rate-cpu.json and its figure
    python benchmarks/bench_rate.py --quick --output /tmp/rate.json
    python benchmarks/bench_rate.py --show benchmarks/results/rate-cpu.json

The zeros are counted that the DropBlock of timm, of torchvision and of rblock_fx (calibrated by Eq. 6, by Eq. 7 and
exactly) makes of maps of ones: one row per library, map, block size and rate.

Drops within a map depend on each other, so the standard error is taken over maps, which are independent, and maps are
drawn until it is small enough. `expected` is Eq. 8 at the gamma that rblock_fx chose. An error that a library raises is
recorded with its message. --rounds has no effect.
"""

import argparse
import itertools
import math
import pathlib
import statistics
import sys
from collections.abc import Callable

import torch
import torchvision.ops
from timm.layers import drop as timm_drop
from torch import Tensor, nn

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from benchmarks import harness
from benchmarks.harness import Row, format_shape
from benchmarks.models import build_mask
from rblock_fx import describe

OURS = {f"rblock_fx {calibration}": calibration for calibration in ("eq6", "eq7", "exact")}
EXACT = "rblock_fx exact"
LIBRARIES = ("timm", "torchvision", *OURS)

Shape = tuple[int, ...]
MAPS: tuple[Shape, ...] = ((4, 4), (7, 7), (8, 8), (7, 12), (14, 14), (28, 28), (32, 32), (56, 56))
QUICK_MAPS: tuple[Shape, ...] = ((4, 4), (7, 7), (7, 12), (14, 14))

TOLERANCE = 0.002  # of |reached - asked|
SUMMARY = ("drop rate", "within 0.002", "median error", "largest error", "raises")
BATCH = 1 << 18  # activations drawn at once
FEWEST_MAPS = 4096  # before a spread is trusted
MOST_ACTIVATIONS = 1 << 28  # of one cell


def main(arguments: list[str] | None = None) -> None:
    """Run from the command line."""
    parser = harness.command_line("rate", __doc__)
    harness.run("rate", parser, measure, table, draw, arguments)


def measure(options: argparse.Namespace) -> list[Row]:
    """One row per map, block size, rate and library."""
    quick = options.quick
    ours, others = (0.003, 0.003) if quick else (0.0005, 0.001)
    maps, blocks, probs = (
        (QUICK_MAPS, (3, 7), (0.1, 0.5)) if quick else (MAPS, (1, 3, 5, 7), (0.05, 0.1, 0.2, 0.3, 0.5))
    )
    rows = []
    for shape, block_size in itertools.product(maps, blocks):
        print(f"{format_shape(shape)}, block {block_size}", file=sys.stderr)
        for drop_prob, library in itertools.product(probs, LIBRARIES):
            target = ours if library == EXACT else others
            rows.append(measure_cell(library, shape, block_size, drop_prob, target, options.device))
    return rows


def measure_cell(library: str, shape: Shape, block_size: int, drop_prob: float, target: float, device: str) -> Row:
    """One row: the rate that one library reaches on one map."""
    row: Row = {"library": library, "map": shape, "block_size": block_size, "asked": drop_prob}
    row |= dict.fromkeys(("reached", "standard_error", "samples", "expected", "raises"))
    x = torch.ones(max(BATCH // math.prod(shape), 1), 1, *shape, device=device)
    try:
        module = build_drop_block(library, drop_prob, block_size, shape).to(device).train()
        mean, error, maps = draw_until(lambda: (module(x) == 0).flatten(1).float().mean(1), x.numel(), target)
    except ValueError as refusal:
        return row | {"raises": f"{type(refusal).__name__}: {refusal}"}
    if library in OURS:
        row["expected"] = coverage(describe(module).sites[0].gamma or 0.0, shape, block_size)
    return row | {"reached": mean, "standard_error": error, "samples": maps}


def build_drop_block(library: str, drop_prob: float, block_size: int, shape: Shape) -> nn.Module:
    """Each library's own DropBlock, for maps of one channel."""
    if library in OURS:
        settings = {"drop_prob": drop_prob, "block_size": block_size, "calibration": OURS[library]}
        return build_mask("dropblock", (1, *shape), **settings)
    return (timm_drop.DropBlock2d if library == "timm" else torchvision.ops.DropBlock2d)(drop_prob, block_size)


def coverage(gamma: float, shape: Shape, block_size: int) -> float:
    """Eq. 8, position by position: a position is kept if none of the centres in its clipped window is drawn."""
    k = block_size // 2
    spans = [[min(i + k, side - 1) - max(i - k, 0) + 1 for i in range(side)] for side in shape]
    kept = [(1 - gamma) ** math.prod(window) for window in itertools.product(*spans)]
    return 1 - math.fsum(kept) / len(kept)


def draw_until(draw_batch: Callable[[], Tensor], activations: int, target: float) -> tuple[float, float, int]:
    """Draw batches of rates, (maps,), until their standard error is at most `target` or MOST_ACTIVATIONS are drawn.

    Returns:
        Mean, standard error over maps, and number of maps.
    """
    means, variances, maps = [], [], 0
    while True:
        rates = draw_batch().double()
        means.append(float(rates.mean()))
        variances.append(float(rates.var()))
        maps += len(rates)
        error = math.sqrt(statistics.fmean(variances) / maps)
        if maps >= FEWEST_MAPS and (error <= target or len(means) * activations >= MOST_ACTIVATIONS):
            return statistics.fmean(means), error, maps


def cells_of(rows: list[Row]) -> dict[tuple[Shape, int, float], dict[str, Row]]:
    """(map, block size, rate) -> library -> row."""
    cells: dict[tuple[Shape, int, float], dict[str, Row]] = {}
    for row in rows:
        cells.setdefault((tuple(row["map"]), row["block_size"], row["asked"]), {})[row["library"]] = row
    return cells


def table(rows: list[Row]) -> str:
    """Every cell, the summary per library, and the errors that were raised."""
    lines: list[list[object]] = []
    for (shape, block_size, asked), found in cells_of(rows).items():
        reached = ["raises" if row["reached"] is None else f"{row['reached']:.4f}" for row in found.values()]
        exact = found[EXACT]
        ours = [f"{exact['standard_error']:.4f}", f"{exact['expected']:.6f}"]
        lines.append([format_shape(shape), block_size, asked, *reached, *ours])
    cells = harness.format_table(["map", "block", "asked", *LIBRARIES, "+- exact", "expected"], lines)
    summary = harness.format_table(SUMMARY, summarise(rows))
    raised = sorted({f"{row['library']}: {row['raises']}" for row in rows if row["raises"]})
    return "\n\n".join([cells, summary, "\n".join(["Raised:", *raised])])


def summarise(rows: list[Row]) -> list[list[object]]:
    """Per library: the distance between reached and asked rate over all cells."""
    lines: list[list[object]] = []
    for library in LIBRARIES:
        cells = [row for row in rows if row["library"] == library]
        errors = [abs(row["reached"] - row["asked"]) for row in cells if row["reached"] is not None]
        near = f"{sum(error <= TOLERANCE for error in errors)} of {len(cells)}"
        middle, largest = f"{statistics.median(errors):.4f}", f"{max(errors):.4f}"
        lines.append([library, near, middle, largest, len(cells) - len(errors)])
    return lines


def markdown(rows: list[Row]) -> str:
    """The table of the READMEs: the summary."""
    return harness.format_markdown(SUMMARY, summarise(rows))


def draw(rows: list[Row], path: pathlib.Path) -> None:
    """Error at rate 0.1 by map and block size, a panel per library; colours saturate at 0.2."""
    found = cells_of(rows)
    shapes = sorted({shape for shape, _, _ in found}, key=math.prod)
    blocks = sorted({block for _, block, _ in found})
    with harness.figure(path, columns=len(LIBRARIES), size=(16, 4.5)) as axes:
        for axis, library in zip(axes[0], LIBRARIES, strict=True):
            reached = [[found[shape, block, 0.1][library]["reached"] for block in blocks] for shape in shapes]
            errors = [[math.nan if rate is None else rate - 0.1 for rate in line] for line in reached]
            axis.imshow(errors, cmap="RdBu_r", vmin=-0.2, vmax=0.2, aspect="auto")
            for y, x in itertools.product(range(len(shapes)), range(len(blocks))):
                error = errors[y][x]
                text = "x" if math.isnan(error) else "0" if abs(error) < TOLERANCE / 2 else f"{error:+.3f}"
                axis.text(x, y, text, ha="center", va="center", color="white" if abs(error) > 0.13 else "black")
            axis.set_xticks(range(len(blocks)), blocks)
            axis.set_yticks(range(len(shapes)), [format_shape(shape) for shape in shapes])
            axis.set_xlabel("block size")
            axis.set_title(library)
        axes[0, 0].set_ylabel("map")
        axes[0, 0].figure.suptitle(
            "Drop rate reached minus 0.1, the rate asked for (0: below 0.001; x: the library raises)"
        )


if __name__ == "__main__":
    main()
