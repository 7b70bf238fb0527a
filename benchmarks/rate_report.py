"""What bench_rate.py found, as tables and as a picture; from the rows of its result file alone."""

import itertools
import math
import pathlib
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import harness
from harness import Row

from rblock_fx.tables import format_table

Shape = tuple[int, ...]
Cell = tuple[Shape, int, float]  # map, block size, rate asked

EXACT = "rblock_fx exact"
PRECISIONS = ("float32", "float16")
BAR = 0.002  # of |reached - asked|, for ours with calibration="exact"


def by(shape: Sequence[int]) -> str:
    """Write a shape as 7x12."""
    return "x".join(map(str, shape))


def cells_of(rows: list[Row]) -> Iterator[tuple[Cell, dict[str, Row]]]:
    """The first table by its cells: (map, block, rate) and one row per library."""
    rates = [row for row in rows if row["table"] == "rate"]
    for key, group in itertools.groupby(rates, key=lambda row: (tuple(row["map"]), row["block_size"], row["asked"])):
        yield key, {row["library"]: row for row in group}


def libraries_of(rows: list[Row]) -> list[str]:
    """The libraries of the first table, in its order."""
    return list(dict.fromkeys(row["library"] for row in rows if row["table"] == "rate"))


def table(rows: list[Row]) -> str:
    """Every cell, then what sums it up."""
    parts = [rate_table(rows), method_table(rows), half_precision_table(rows), summary(rows)]
    return "\n\n".join(parts)


def rate_table(rows: list[Row]) -> str:
    """One line per map, block size and rate."""
    lines = []
    for (shape, block_size, asked), found in cells_of(rows):
        exact = found[EXACT]
        reached = ["raises" if row["reached"] is None else f"{row['reached']:.4f}" for row in found.values()]
        ours = [f"{exact['standard_error']:.4f}", f"{exact['expected']:.6f}", f"{exact['whole']:.3f}"]
        lines.append([by(shape), block_size, asked, *reached, *ours, remark(shape, block_size, asked)])
    title = "Drop rate reached, by Monte Carlo; the last columns are of rblock_fx exact.\n\n"
    header = ["map", "block", "asked", *libraries_of(rows), "+-", "expected", "whole", "remark"]
    return title + format_table(header, lines)


def remark(shape: Shape, block_size: int, asked: float) -> str:
    """What no calibration can change: the shares of a single map that blocks can cover."""
    smallest = math.prod(min(block_size // 2 + 1, side) for side in shape) / math.prod(shape)
    if smallest == 1:
        return "all or nothing: any block covers the map, so no single map reaches the rate, only many on average"
    return f"a single map loses nothing or at least {smallest:.2f}" if smallest > asked else ""


def method_table(rows: list[Row]) -> str:
    """One line per method of rblock_fx."""
    lines = []
    for row in rows:
        if row["table"] != "method":
            continue
        single = row["parts"] == 1
        numbers = [row[name] for name in ("expected_each", "sub_model_1", "sub_model_2", "expected_union", "union")]
        if single:
            numbers[2:] = [None] * 3
        reached = [None if number is None else f"{number:.4f}" for number in numbers]
        overlap = None if single else f"{row['overlap']:.4f}"
        error = f"{max(value for name, value in row.items() if name.endswith('_error')):.4f}"
        lines.append([row["method"], by(row["map"]), row["block_size"], row["asked"], *reached, overlap, error])
    header = ["method", "map", "block", "asked", "expected each", "sub-model 1", "sub-model 2"]
    return "Methods of rblock_fx, exact.\n\n" + format_table(
        [*header, "expected union", "union", "overlap", "+- at most"], lines
    )


def half_precision_table(rows: list[Row]) -> str:
    """One line per library in float16."""
    lines = [
        [row["library"], by(row["map"]), row["block_size"], row["asked"]]
        + [row["raises"] or f"{row[name]:.4f}" for name in PRECISIONS]
        for row in rows
        if row["table"] == "float16"
    ]
    header = ["library", "map", "block", "asked", "zeros in float32", "zeros in float16"]
    return "A batch of 512 maps in half precision.\n\n" + format_table(header, lines)


def summary(rows: list[Row]) -> str:
    """Per library: how far off it is, and how often it raises."""
    lines = []
    for library in libraries_of(rows):
        cells = [row for row in rows if row["table"] == "rate" and row["library"] == library]
        off = [(abs(row["reached"] - row["asked"]), row) for row in cells if row["reached"] is not None]
        worst, where = max(off, key=lambda pair: pair[0])
        analytic = [abs(row["expected"] - row["asked"]) for row in cells if row["expected"] is not None]
        cell = [
            library,
            f"{sum(error <= BAR for error, _ in off)} of {len(cells)}",
            len(cells) - len(off),
            f"{statistics.median(error for error, _ in off):.4f}",
            f"{worst:.4f}",
            f"{by(where['map'])}, block {where['block_size']}, {where['asked']}: {where['reached']:.4f}",
            f"{max(row['standard_error'] for _, row in off):.4f}",
            f"{max(analytic):.1e}" if analytic else None,
        ]
        lines.append(cell)
    header = ["library", f"within {BAR}", "raises", "median off", "most off", "where", "+- at most", "expected off"]
    messages = sorted({f"{row['library']}: {row['raises']}" for row in rows if row.get("raises")})
    drawn = max(abs(found[EXACT]["expected_float32"] - asked) for (_, _, asked), found in cells_of(rows))
    note = f"As drawn, from 24 bits, the expected rate of rblock_fx exact is off by at most {drawn:.1e}."
    return "\n".join(["Reached against asked.\n", format_table(header, lines), "", note, "", "Raised:", *messages])


def draw(rows: list[Row], path: pathlib.Path) -> None:
    """Heat maps of reached - asked: map x block above, map x rate below, a column per library."""
    found = dict(cells_of(rows))
    libraries = libraries_of(rows)
    shapes = sorted({shape for shape, _, _ in found}, key=math.prod)
    blocks, probs = sorted({block for _, block, _ in found}), sorted({asked for _, _, asked in found})
    block, rate = 7, 0.1
    views: list[tuple[str, list[Any], Callable[[Shape, Any], Cell]]] = [
        (f"block size (asked: {rate})", blocks, lambda shape, column: (shape, column, rate)),
        (f"rate asked (block size {block})", probs, lambda shape, column: (shape, block, column)),
    ]
    with harness.figure(path, rows=2, columns=len(libraries), size=(16, 10)) as axes:
        for line, (label, columns, key) in enumerate(views):
            for axis, library in zip(axes[line], libraries, strict=True):
                image = heat_map(axis, [[found[key(shape, column)][library] for column in columns] for shape in shapes])
                axis.set_xticks(range(len(columns)), columns)
                axis.set_xlabel(label)
                axis.set_yticks([])
                axis.set_title(library, fontweight="bold")
            axes[line, 0].set_yticks(range(len(shapes)), [by(shape) for shape in shapes])
            axes[line, 0].set_ylabel("map")
        whole = axes[0, 0].figure
        whole.suptitle(
            "Drop rate reached minus drop rate asked (0: less than 0.001 off; hatched: the library raises)", fontsize=15
        )
        whole.colorbar(image, ax=axes, extend="both", shrink=0.6, pad=0.01, label="reached - asked")


def heat_map(axis: Any, cells: list[list[Row]]) -> Any:
    """One panel: colours end at 0.2 off, the numbers do not."""
    off = [[math.nan if row["reached"] is None else row["reached"] - row["asked"] for row in line] for line in cells]
    axis.set_facecolor("white")
    image = axis.imshow(off, cmap="RdBu_r", vmin=-0.2, vmax=0.2, aspect="auto")
    for y, x in itertools.product(range(len(cells)), range(len(cells[0]))):
        value = off[y][x]
        if math.isnan(value):
            axis.fill_between([x - 0.5, x + 0.5], y - 0.5, y + 0.5, facecolor="white", edgecolor="grey", hatch="////")
            continue
        text = "0" if abs(value) < BAR / 2 else f"{value:+.3f}" if abs(value) < 0.0995 else f"{value:+.2f}"
        colour = "white" if abs(value) > 0.13 else "black"
        axis.text(x, y, text, ha="center", va="center", fontsize=8.5, color=colour)
    return image
