"""The report's pictures: curves with bands, accuracy with intervals, accuracy against cost, and the gap over time."""

import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FormatStrFormatter, LogLocator, MaxNLocator, NullFormatter
from training.run_folder import write_atomically

from reporting.collect import Runs
from reporting.seed_stats import summarise

# Okabe and Ito's colours, told apart with any colour vision; beyond them the line style changes, too
COLORS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#0072B2", "#CC79A7", "#8C6D31", "#7F7F7F")
STYLES = ("-", "--", ":")
MARKERS = "osD^vPX*p"


def style_of(index: int) -> dict[str, Any]:
    """Colour, line style and marker of a grid's row: the same in every picture."""
    return {
        "color": COLORS[index % len(COLORS)],
        "linestyle": STYLES[index // len(COLORS) % len(STYLES)],
        "marker": MARKERS[index % len(MARKERS)],
    }


def draw_figures(runs: Runs, folder: Path) -> dict[str, list[tuple[str, str]]]:
    """Write every picture for which there are numbers.

    Args:
        runs: what is there.
        folder: where the PNGs go.

    Returns:
        column -> (file name, what it shows) of each picture written.
    """
    drawn: dict[str, list[tuple[str, str]]] = {}
    for column in runs.grid.columns:
        for kind, draw in FIGURES.items():
            made = draw(runs, column.name)
            if made is not None:
                figure, text = made
                path = folder / f"{kind}-{column.name}.png"
                write_atomically(path, partial(figure.savefig, dpi=140, format="png"))
                drawn.setdefault(column.name, []).append((path.name, text))
    return drawn


def series(runs: Runs, column: str, row: str, key: str) -> np.ndarray[Any, Any] | None:
    """(seeds, epochs) of a column of metrics.csv, over the finished runs that have it; None if none has."""
    lists = [[epoch[key] for epoch in trial.rows if key in epoch] for trial in runs.done(column, row)]
    lists = [values for values in lists if values]
    epochs = min(map(len, lists), default=0)
    return np.array([values[:epochs] for values in lists]) if epochs else None


def lines(runs: Runs, column: str, axes: Axes, y: str, x: str, best_so_far: bool = False) -> dict[str, float]:
    """Mean over seeds with a band from the lowest to the highest seed; returns the last mean by row."""
    ends = {}
    for index, row in enumerate(runs.grid.rows):
        heights, places = series(runs, column, row.name, y), series(runs, column, row.name, x)
        if heights is None or places is None or heights.shape != places.shape:
            continue
        heights, style = (np.maximum.accumulate(heights, axis=1) if best_so_far else heights), style_of(index)
        place, mean = places.mean(0), heights.mean(0)
        few = len(place) <= 15  # a marker on each epoch of a short run, on the last of a long one
        marks = slice(None) if few else [len(place) - 1]
        axes.plot(place, mean, label=row.name, markersize=4, markevery=marks, linewidth=1.6, **style)
        if len(heights) > 1:
            axes.fill_between(place, heights.min(0), heights.max(0), color=style["color"], alpha=0.12, linewidth=0)
        ends[row.name] = float(mean[-1])
    axes.grid(alpha=0.3)
    return ends


def zoom(axes: Axes, runs: Runs, column: str, key: str) -> None:
    """Let the axis of percent begin where a third of the epochs is over: before, all curves climb from chance."""
    late = [series(runs, column, row.name, key) for row in runs.grid.rows]
    values = [found[:, found.shape[1] // 3 :] for found in late if found is not None]
    low, high = min(v.mean(0).min() for v in values), max(v.max() for v in values)
    margin = max(1.0, 0.05 * (high - low))
    axes.set_ylim(low - margin, min(100.5, high + margin))


def whole_epochs(axes: Axes) -> None:
    """Ticks at whole epochs, with half an epoch of room at either end, so that one epoch is a picture, too."""
    low, high = axes.dataLim.intervalx
    axes.set_xlim(low - 0.5, high + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def legend(figure: Figure, axes: Axes, ends: dict[str, float], digits: int = 2) -> None:
    """Outside, in the order in which the curves end, highest first, with the value there."""
    handles, labels = axes.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda i: -ends[labels[i]])
    texts = [f"{labels[i]}  {ends[labels[i]]:.{digits}f}" for i in order]
    figure.legend(
        [handles[i] for i in order], texts, loc="outside right center", fontsize=8, title="at the end", title_fontsize=8
    )


def canvas(column: str, title: str, panels: int = 1) -> tuple[Figure, Sequence[Axes]]:
    """An empty figure with its title: a Figure without pyplot needs no display and no backend."""
    figure = Figure(figsize=(8 if panels == 1 else 11, 4.2), layout="constrained")
    figure.suptitle(textwrap.shorten(f"{title}: {column}", 100), fontsize=11)
    return figure, np.atleast_1d(figure.subplots(1, panels)).tolist()


def draw_curves(runs: Runs, column: str) -> tuple[Figure, str] | None:
    """Test top-1 over the epochs."""
    if not any(series(runs, column, row.name, "test_top1") is not None for row in runs.grid.rows):
        return None
    figure, (axes,) = canvas(column, "Test top-1")
    ends = lines(runs, column, axes, "test_top1", "epoch")
    zoom(axes, runs, column, "test_top1")
    axes.set(xlabel="epoch", ylabel="test top-1 (%)")
    whole_epochs(axes)
    legend(figure, axes, ends)
    return figure, "Test top-1 over the epochs: mean over seeds, the band from the lowest to the highest seed."


def draw_accuracy(runs: Runs, column: str) -> tuple[Figure, str] | None:
    """Each method's seeds, their mean and its interval, at the best and at the last epoch, beside the paper's value."""
    rows = runs.rows_of(column)
    if not any(runs.done(column, row.name) for row in rows):
        return None
    figure, panels = canvas(column, "Test top-1 by method", 2)
    figure.set_size_inches(11, 1.4 + 0.42 * len(rows))
    papers = [row.paper.get(column) for row in rows]
    for axes, key, name in zip(panels, ("top1_best", "top1_last"), ("best epoch", "last epoch"), strict=True):
        for place, row in enumerate(rows):
            values = list(runs.figures(column, row.name, key).values())
            summary, color = summarise(values), style_of(runs.grid.rows.index(row))["color"]
            if summary is None:
                continue
            axes.plot(values, [place] * len(values), "o", color=color, alpha=0.35, markersize=5)
            if summary.interval:
                axes.plot(summary.interval, [place, place], "-", color=color, linewidth=2)
            axes.plot(summary.mean, place, "|", color=color, markersize=16, markeredgewidth=2.5)
            axes.annotate(
                f"{summary.mean:.2f}", (1.01, place), xycoords=("axes fraction", "data"), va="center", fontsize=8
            )
        if key == "top1_best":
            known = [
                (paper[-1] if isinstance(paper, list) else paper, place) for place, paper in enumerate(papers) if paper
            ]
            if known:
                axes.plot(*zip(*known, strict=True), "D", color="0.35", fillstyle="none", label="the paper")
                axes.legend(loc="best", fontsize=8)
        axes.set(xlabel=f"test top-1 (%), {name}", ylim=(len(rows) - 0.5, -0.5))
        axes.set_yticks(range(len(rows)), [row.name for row in rows] if axes is panels[0] else [""] * len(rows))
        axes.grid(alpha=0.3, axis="x")
    text = (
        "Test top-1 at the best epoch (the paper's figure, chosen on the test images) and at the last (fairer): "
        "a dot for each seed, a bar for their mean, a line for the 95 % bootstrap interval of the mean where there are "
        "three seeds."
    )
    return figure, text


def draw_cost(runs: Runs, column: str) -> tuple[Figure, str] | None:
    """The best test top-1 so far against what it has cost: wall time, and images seen."""
    costs = [("wall_seconds", "wall time (seconds)"), ("images_seen", "training images seen")]
    there = [
        cost for cost in costs if any(series(runs, column, row.name, cost[0]) is not None for row in runs.grid.rows)
    ]
    if not there:
        return None
    figure, panels = canvas(column, "Best test top-1 so far against cost", len(there))
    ends: dict[str, float] = {}
    for axes, (key, name) in zip(panels, there, strict=True):
        ends = lines(runs, column, axes, "test_top1", key, best_so_far=True)
        zoom(axes, runs, column, "test_top1")
        axes.set(xlabel=name, ylabel="best test top-1 so far (%)")
        axes.set_xlim(left=0)
        if key == "images_seen":
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    legend(figure, panels[0], ends)
    text = (
        "Equal cost: the best test top-1 so far against "
        + " and ".join(name for _, name in there)
        + ", mean over seeds of both, the band from the lowest to the highest seed. Read it upwards at one place: what "
        "has each method reached for the same cost? An image counts once, however many sub-models see it."
    )
    return figure, text


def draw_gap(runs: Runs, column: str) -> tuple[Figure, str] | None:
    """How far the sub-models are from the full network, over the epochs."""
    gaps = [("gap_kl", "KL(full network || sub-model), nats"), ("gap_agreement", "same class as the full network (%)")]
    there = [gap for gap in gaps if any(series(runs, column, row.name, gap[0]) is not None for row in runs.grid.rows)]
    if not there:
        return None
    figure, panels = canvas(column, "Gap between training and inference", len(there))
    ends: dict[str, float] = {}
    for axes, (key, name) in reversed(list(zip(panels, there, strict=True))):  # the legend shows the first panel's ends
        ends = lines(runs, column, axes, key, "epoch")
        axes.set(xlabel="epoch", ylabel=name)
        whole_epochs(axes)
        if key == "gap_kl":
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
            axes.yaxis.set_minor_formatter(NullFormatter())
    legend(figure, panels[0], ends, digits=4 if there[0][0] == "gap_kl" else 2)
    text = (
        "The train/inference gap on held-out images: how far a sub-model, masks on, is from the full network, masks "
        "off; mean over seeds, the band from the lowest to the highest seed. Plain training has no masks and no gap."
    )
    return figure, text


FIGURES: dict[str, Callable[[Runs, str], tuple[Figure, str] | None]] = {
    "accuracy": draw_accuracy, "curves": draw_curves, "cost": draw_cost, "gap": draw_gap,
}  # fmt: skip
