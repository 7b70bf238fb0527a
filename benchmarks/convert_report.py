"""What bench_convert.py found, as tables and as a picture; from the rows of its result file alone."""

import itertools
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import harness
from harness import Row

from rblock_fx.tables import format_table

SHADES = ("#c6dbef", "#6baed6", "#2171b5", "#08306b")  # light to dark: small to large
BUDGET = 1.0  # seconds that a conversion should stay under


def of_kind(rows: list[Row], kind: str) -> list[Row]:
    """The rows of one kind."""
    return [row for row in rows if row["kind"] == kind]


def median(row: Row, what: str) -> float:
    """The median of what was timed."""
    value: float = row[f"{what}_seconds"]["median"]
    return value


def power_law(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Fit y = factor * x^exponent by least squares of the logarithms: (factor, exponent)."""
    u, v = [math.log(value) for value in x], [math.log(value) for value in y]
    u_mean, v_mean = sum(u) / len(u), sum(v) / len(v)
    spread = sum((value - u_mean) ** 2 for value in u)
    covariance = sum((a - u_mean) * (b - v_mean) for a, b in zip(u, v, strict=True))
    exponent = covariance / spread if spread else 0.0
    return math.exp(v_mean - exponent * u_mean), exponent


def fit(rows: list[Row], size: str) -> tuple[float, float]:
    """Fit the seconds of a conversion against `size`, "modules" or "parameters"."""
    return power_law([row[size] for row in rows], [median(row, "convert") for row in rows])


def table(rows: list[Row]) -> str:
    """All tables, the slowest model first."""
    return "\n\n".join([model_table(rows), growth_table(rows), cold_table(rows), meta_table(rows), summary(rows)])


def with_quartiles(spread: Row) -> str:
    """Median [quartiles] of some seconds."""
    low, high = spread["quartiles"]
    return f"{spread['median']:.3f} [{low:.3f}, {high:.3f}]"


def columns_of(row: Row) -> list[object]:
    """What is said of every conversion, whatever its kind."""
    trace = row["fx_trace_seconds"]
    return [
        f"{row['parameters'] / 1e6:.2f}",
        row["modules"],
        len(row["sites"]),
        with_quartiles(row["convert_seconds"]),
        f"{1000 * median(row, 'convert') / row['modules']:.2f}",
        f"{median(row, 'build'):.3f}",
        f"{median(row, 'forward'):.3f}",
        None if trace is None else f"{trace['median']:.3f}",
        f"{row['convert_over_build']['median']:.2f}",
        f"{row['convert_over_forward']['median']:.2f}",
    ]


HEADER = ["M parameters", "modules", "sites", "convert s [quartiles]", "ms/module", "build s", "forward s"]
HEADER += ["fx trace s", "convert/build", "convert/forward"]


def model_table(rows: list[Row]) -> str:
    """One line per architecture."""
    models = sorted(of_kind(rows, "model"), key=lambda row: -median(row, "convert"))
    title = "Conversion of fresh models with weights; - where torch.fx.symbolic_trace fails.\n\n"
    return title + format_table(["model", *HEADER], [[row["name"], *columns_of(row)] for row in models])


def growth_table(rows: list[Row]) -> str:
    """One line per size of the growing networks."""
    lines = [[row["name"], row["axis"], f"x{row['multiple']}", *columns_of(row)] for row in of_kind(rows, "growth")]
    return "One network, deeper and wider.\n\n" + format_table(["network", "axis", "size", *HEADER], lines)


def cold_table(rows: list[Row]) -> str:
    """One line per process of its own."""
    lines = [
        [row["name"], f"{cold:.3f}", f"{warm:.3f}", f"{cold / warm:.2f}"]
        for row in of_kind(rows, "cold")
        for cold, warm in [(row["cold_seconds"], row["warm_seconds"])]
    ]
    return "In a new process.\n\n" + format_table(["model", "first s", "second s", "first/second"], lines)


def meta_table(rows: list[Row]) -> str:
    """One line per model that was converted with and without weights."""
    lines = [
        [row["name"], *(with_quartiles(row[what]) for what in ("weights_seconds", "meta_seconds", "meta_over_weights"))]
        for row in of_kind(rows, "meta")
    ]
    header = ["model", "with weights s [quartiles]", "meta device s [quartiles]", "meta/weights [quartiles]"]
    return "With weights and without.\n\n" + format_table(header, lines)


def growth_lines(rows: list[Row]) -> dict[tuple[str, str], list[Row]]:
    """The growth rows by network and axis."""
    lines: dict[tuple[str, str], list[Row]] = {}
    for row in of_kind(rows, "growth"):
        lines.setdefault((row["name"].split("/")[1], row["axis"]), []).append(row)
    return lines


def summary(rows: list[Row]) -> str:
    """The exponents, and how many conversions stay within the budget."""
    models = of_kind(rows, "model")
    slow = [row["name"] for row in models if median(row, "convert") > BUDGET]
    lines = [
        f"{len(models)} models: {len(models) - len(slow)} convert in {BUDGET:g} s, slower: {', '.join(slow) or 'none'}",
        *(f"over models, seconds ~ {size}^{fit(models, size)[1]:.2f}" for size in ("modules", "parameters")),
    ]
    for (network, axis), grown in growth_lines(rows).items():
        size = "modules" if axis == "depth" else "parameters"
        lines.append(f"{network}, {axis} alone: seconds ~ {size}^{fit(grown, size)[1]:.2f}")
    return "\n".join(lines)


def draw(rows: list[Row], path: pathlib.Path) -> None:
    """Seconds against modules and against parameters, over models and for the growing networks."""
    models = of_kind(rows, "model")
    lines = growth_lines(rows)
    with harness.figure(path, rows=2, columns=2, size=(15, 11)) as axes:
        scatter(axes[0, 0], models, "modules", "parameters", [0, 1e6, 1e7, 1e8, math.inf])
        scatter(axes[0, 1], models, "parameters", "modules", [0, 200, 500, 1000, math.inf])
        for axis, grows, size in ((axes[1, 0], "depth", "modules"), (axes[1, 1], "width", "parameters")):
            grown = {network: lines[network, along] for network, along in lines if along == grows}
            for colour, network in enumerate(grown):
                grow(axis, grown[network], size, network, f"C{colour}")
            axis.set_title(f"one network, {grows} alone doubled again and again")
            finish(axis, size)
        axes[0, 0].figure.suptitle("Time of apply_rblock", fontsize=15)


def scatter(axis: Any, models: list[Row], size: str, colour: str, bounds: Sequence[float]) -> None:
    """Every model, the fastest and the slowest with their names, and the fitted power law."""
    for place, (low, high) in enumerate(itertools.pairwise(bounds)):
        group = [row for row in models if low <= row[colour] < high]
        label = f"{colour} < {high:,.0f}" if high < math.inf else f"{colour} >= {low:,.0f}"
        shade = SHADES[place]
        axis.scatter([row[size] for row in group], [median(row, "convert") for row in group], 30, shade, label=label)
    x = [row[size] for row in models]
    factor, exponent = fit(models, size)
    ends = [min(x), max(x)]
    fitted = f"seconds ~ {size}^{exponent:.2f}"
    axis.plot(ends, [factor * end**exponent for end in ends], "--", color="crimson", label=fitted)
    axis.axhline(BUDGET, color="grey", linewidth=0.8, linestyle=":", label=f"{BUDGET:g} s")
    by_time = sorted(models, key=lambda row: median(row, "convert"))
    named = {id(row): row for row in [*by_time[:1], *by_time[-6:]]}.values()
    for number, row in enumerate(sorted(named, key=lambda row: float(row[size]))):
        above = number % 2 == 0  # so that neighbours do not write over each other
        point, offset = (row[size], median(row, "convert")), (0, 5 if above else -5)
        side = "bottom" if above else "top"
        name = row["name"].split("/")[1]
        axis.annotate(name, point, offset, textcoords="offset points", ha="center", va=side, fontsize=8)
    axis.set_title(f"{len(models)} models against their {size}")
    finish(axis, size)


def grow(axis: Any, grown: list[Row], size: str, network: str, colour: str) -> None:
    """The line of one growing network, with its baselines thin."""
    x = [row[size] for row in grown]
    label = f"{network}: seconds ~ {size}^{fit(grown, size)[1]:.2f}"
    axis.plot(x, [median(row, "convert") for row in grown], "o-", color=colour, label=label)
    for what, style in (("forward", ":"), ("build", "-.")):
        baseline = [median(row, what) for row in grown]
        axis.plot(x, baseline, style, color=colour, linewidth=1, label=f"{network}: {what}")


def finish(axis: Any, size: str) -> None:
    """Logarithmic axes, named, with plain numbers."""
    from matplotlib import ticker

    axis.set_xscale("log")
    axis.set_yscale("log")
    for scale in (axis.xaxis, axis.yaxis):
        scale.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        scale.set_major_formatter(
            ticker.EngFormatter(sep="") if scale is axis.xaxis else ticker.StrMethodFormatter("{x:g}")
        )
        scale.set_minor_formatter(ticker.NullFormatter())
    axis.set_xlabel(size)
    axis.set_ylabel("seconds (median)")
    axis.grid(which="major", alpha=0.3)
    axis.legend(fontsize=8.5)
