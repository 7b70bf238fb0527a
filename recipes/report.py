"""Report on a sweep: what each comparison says, the paper's numbers beside ours, costs and pictures, in one HTML page.

    python recipes/report.py runs/table3_smoke
    python recipes/report.py runs --output /tmp/report

RUNS is a sweep's output_dir, or any folder of runs, which are then grouped by their settings. RUNS/report gets
report.html, which needs no other file, and the numbers as runs.csv and comparisons.csv. Missing runs are listed.
"""

import base64
import io
import json
import math
import sys
from argparse import ArgumentError
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import pandas as pd
from findings import Study, best_until, collect_study, compare_primary, lower_is_better, t_interval
from jsonargparse import ArgumentParser
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from settings import RecipeError, exit_with

LABELS = {
    "top1_last": "top-1, last epoch (%)", "top1_best": "top-1, best epoch (%)", "test_top1": "test top-1 (%)",
    "test_ce": "negative log-likelihood", "test_ece": "calibration error (%)", "gap_kl": "gap, KL in nats",
    "gap_agreement": "gap, same class (%)", "drop_rate": "measured drop rate", "wall_time_seconds": "wall time (s)",
    "images_per_second": "images/s", "wall_seconds": "wall time (s)",
}  # fmt: skip
COSTS = ("wall_time_seconds", "images_per_second", "gap_kl", "gap_agreement", "drop_rate")
# Okabe and Ito's colours, which any colour vision tells apart; after the last one the line style changes
COLORS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#0072B2", "#CC79A7", "#8C6D31", "#7F7F7F")


def main() -> None:
    """Write the report of the command line; exit status 2 for a mistake."""
    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False, description=__doc__.partition("\n\n")[0])
    parser.add_argument("runs", type=str, help="a sweep's output_dir, or any folder of runs")
    parser.add_argument("--output", type=str | None, help="folder of the report; default: RUNS/report")
    try:
        options = parser.parse_args(sys.argv[1:])
        print(write_report(Path(options.runs), Path(options.output or Path(options.runs, "report"))))
    except (RecipeError, ArgumentError) as error:
        exit_with(error)


def write_report(folder: Path, output: Path) -> Path:
    """Write the page and the CSV files and return the page's path; raises RecipeError if it cannot."""
    study = collect_study(folder)
    comparisons = compare_primary(study)
    template = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    source = Path(__file__).resolve().with_name("report.html.jinja2").read_text()
    done = study.runs["state"] == "done"
    shared, own = shared_settings(study)
    page = template.from_string(source).render(
        title=study.table.title, columns=[c.name for c in study.table.columns], count=len(done),
        done=int(done.sum()), seeds=study.table.seeds, sentences=list(sentences(study, comparisons)),
        missing=missing_table(study), command=study.command, glance=glance_table(study),
        parts={column.name: column_part(study, comparisons, column.name) for column in study.table.columns},
        pictures={column.name: list(draw_pictures(study, column.name)) for column in study.table.columns},
        shared=shared, own=own, versions=versions(study),
    )  # fmt: skip
    try:
        output.mkdir(parents=True, exist_ok=True)
        study.runs.drop(columns=["config", "versions"], errors="ignore").to_csv(output / "runs.csv", index=False)
        comparisons.to_csv(output / "comparisons.csv", index=False)
        (output / "report.html.tmp").write_text(page, encoding="utf-8")
        (output / "report.html.tmp").replace(output / "report.html")
    except OSError as error:
        raise RecipeError(f"cannot write the report to {output}: {error.strerror}") from error
    return output / "report.html"


def label(measure: str) -> str:
    """Return the words for a measure; its name if it has none."""
    return LABELS.get(measure, measure)


def digits(measure: str) -> int:
    """Return the decimals that a measure is shown with: two of a percentage, one of a time, four of a loss."""
    return 2 if any(word in measure for word in ("top1", "agreement", "ece")) else 1 if "second" in measure else 4


def number(value: float, places: int, sign: str = "") -> str | None:
    """Write a number; None if there is none."""
    return None if math.isnan(value) else f"{value:{sign}.{places}f}"


def spread(values: "pd.Series[float]", places: int) -> str | None:
    """Write mean and sample standard deviation; None without values."""
    return " ± ".join(filter(None, (number(values.mean(), places), number(values.std(), places)))) or None


def interval(low: float, high: float, places: int, sign: str = "") -> str | None:
    """Write an interval; None if there is none."""
    return " to ".join(filter(None, (number(low, places, sign), number(high, places, sign)))) or None


def p_text(p: float) -> str | None:
    """Write p with two figures, or as a bound where it is tiny."""
    return None if math.isnan(p) else "< 0.0001" if p < 1e-4 else f"{p:.2g}"


def sentences(study: Study, comparisons: pd.DataFrame) -> Iterator[tuple[str, str]]:
    """Say what each primary comparison shows: (verdict, sentence)."""
    for one in comparisons[comparisons["measure"] == study.table.measures[0]].itertuples():
        where = f" on {one.column}" if len(study.table.columns) > 1 else ""
        pair, places = f"{one.row}{where}", digits(one.measure)
        if math.isnan(one.holm):
            why = f"{one.seeds} common seeds without spread"
            if one.seeds < 2:
                why = f"one common seed, difference {one.difference:+.{places}f}" if one.seeds else "no common seed"
            yield "untested", f"{pair} cannot be tested against {one.against}: {why}."
            continue
        gain = -one.difference if lower_is_better(one.measure) else one.difference
        verdict = "not distinguishable from" if one.holm >= 0.05 else "better than" if gain > 0 else "worse than"
        visible = f"The study could have seen a difference of {one.smallest:.{places}f}"
        if "top1" in one.measure and one.smallest > 100:
            visible = "With so few seeds the study could not have seen any difference"
        cost = "" if math.isnan(one.time) else f", at {one.time:.2f} times its training time"
        text = (
            f"{pair} is {verdict} {one.against}: {label(one.measure)} {one.difference:+.{places}f} (95 % interval "
            f"{interval(one.low, one.high, places, '+')}, p = {p_text(one.holm)} after Holm, {one.seeds} seeds){cost}. "
        )
        yield verdict.split()[0], f"{text}{visible}."


def missing_table(study: Study) -> pd.DataFrame:
    """List the runs that are not finished, seeds of one cell and state together."""
    missing = study.runs[study.runs["state"] != "done"]
    seeds = missing.groupby(["column", "row", "state", "why"], sort=False)["seed"]
    return seeds.agg(lambda seeds: ", ".join(map(str, seeds))).rename("seeds").reset_index()


def glance_table(study: Study) -> pd.DataFrame | None:
    """Put the paper's top-1 beside ours at the best epoch; None if the table has no numbers of the paper."""
    if not any(row.paper for row in study.table.rows):
        return None
    ours = {column.name: "" for column in study.table.columns}
    theirs = {name: " (other data)" for row in study.table.rows for name in row.paper} | ours
    lines = []
    for row in study.table.rows:
        line: dict[str, Any] = {"method": row.name}
        for name, note in theirs.items():
            value = row.paper.get(name, math.nan)
            line[f"paper, {name}{note}"] = number(value[-1] if isinstance(value, list) else value, 2)
        line |= {f"ours, {name}": spread(study.values(name, row.name, "top1_best"), 2) for name in ours}
        lines.append(line)
    return pd.DataFrame(lines).dropna(axis="columns", how="all")


def column_part(study: Study, comparisons: pd.DataFrame, column: str) -> dict[str, Any]:
    """Return the tables and pictures of one data set and model."""
    rows = [row for row in study.table.rows if (column, row.name) in study.cells]
    first, lines, costs = rows[0].name, [], []
    for row in rows:
        asked = study.runs[(study.runs["column"] == column) & (study.runs["row"] == row.name)]
        line: dict[str, Any] = {"method": row.name, "seeds": f"{(asked['state'] == 'done').sum()} of {len(asked)}"}
        for measure in [name for name in study.table.measures if name in study.runs]:
            values, places = study.values(column, row.name, measure), digits(measure)
            line |= {label(measure): spread(values, places)}
            line |= {f"95 % interval of {label(measure)}": interval(*t_interval(values), places)}
        lines.append(line)
        seconds, base = (study.values(column, name, "wall_time_seconds") for name in (row.name, first))
        epochs = sorted({int(value) for value in study.values(column, row.name, "epochs")})
        cost = {"method": row.name, "epochs": ", ".join(map(str, epochs)) or None,
                f"time relative to {first}": spread((seconds / base).dropna(), 2)}  # fmt: skip
        costs.append(cost | {label(name): spread(study.values(column, row.name, name), digits(name)) for name in COSTS})
    return {
        "measures": pd.DataFrame(lines), "costs": pd.DataFrame(costs), "stages": stages_table(study, column),
        "tests": tests_table(comparisons[comparisons["column"] == column]),
    }  # fmt: skip


def tests_table(comparisons: pd.DataFrame) -> pd.DataFrame | None:
    """List the primary comparisons of a column; None if its rows name none."""
    lines = [
        {
            "method": one.row, "against": one.against, "measure": label(one.measure),
            "difference": number(one.difference, digits(one.measure), "+"),
            "95 % interval": interval(one.low, one.high, digits(one.measure), "+"),
            "p": p_text(one.p), "p, Holm": p_text(one.holm),
            "smallest visible": number(one.smallest, digits(one.measure)), "seeds": one.seeds,
        }
        for one in comparisons.itertuples()
    ]  # fmt: skip
    return pd.DataFrame(lines) if lines else None


def stages_table(study: Study, column: str) -> pd.DataFrame | None:
    """Put the best test top-1 within the first shares of the epochs beside the paper's; None without stages."""
    if not study.table.stages:
        return None
    header = ["method", "whose", *(f"{100 * stage:g} %" for stage in study.table.stages)]
    lines: list[list[str | None]] = []
    for row in study.table.rows:
        for name, value in row.paper.items():
            whose = "paper" if name == column else f"paper, {name}"
            lines.append([row.name, whose, *(f"{stage:.2f}" for stage in value)])  # type: ignore[union-attr]
        epochs = study.epochs[(study.epochs["column"] == column) & (study.epochs["row"] == row.name)]
        best = [best_until(run["test_top1"], study.table.stages, len(run)) for _, run in epochs.groupby("seed")]
        ours = pd.DataFrame(best, columns=header[2:])
        lines.append([row.name, "ours", *(spread(ours[stage], 2) for stage in header[2:])])
    return pd.DataFrame(lines, columns=header)


def shared_settings(study: Study) -> tuple[str, pd.DataFrame | None]:
    """Return the settings that all cells share, as lines, and a table of those in which they differ."""
    settings = pd.DataFrame([{k: json.dumps(v) for k, v in cell.items()} for cell in study.cells.values()])
    settings = settings.drop(columns=["output_dir", "seed", "resume"], errors="ignore")
    same = [key for key in settings if settings[key].nunique(dropna=False) == 1]
    own = settings.drop(columns=same)
    own.insert(0, "run", [f"{column}, {row}" for column, row in study.cells])
    return "\n".join(f"{key}: {settings[key].iloc[0]}" for key in same), own if own.shape[1] > 1 else None


def versions(study: Study) -> str:
    """Return each version and device that the runs were made with, and by how many."""
    done = study.runs[study.runs["state"] == "done"].to_dict("records")
    named = [f"{k} {v}" for run in done for k, v in (run["versions"] | {"device": run.get("device")}).items()]
    return ", ".join(f"{text} ({n} runs)" for text, n in Counter(named).items()) or "No run is finished."


def draw_pictures(study: Study, column: str) -> Iterator[tuple[str, str]]:
    """Draw every picture of a column for which there are numbers: (data URI of an SVG, what it shows)."""
    name = label(study.table.measures[0])
    drawn = draw_means(study, column)
    if drawn:
        yield drawn, f"By method, {name}: dots are seeds, bars their mean, lines its 95 % t interval."
    for x, y, best, text in (
        ("epoch", "test_top1", False, "Test top-1 over the epochs"),
        ("wall_seconds", "test_top1", True, "Best test top-1 so far against wall time: compare methods at one cost"),
        ("epoch", "gap_kl", False, "Gap between training and inference, KL(full network || sub-model) on test images"),
    ):
        drawn = draw_lines(study, column, x, y, best)
        if drawn:
            yield drawn, f"{text}. Mean over seeds, the band from the lowest to the highest seed."


def draw_means(study: Study, column: str) -> str | None:
    """Draw the first measure of every row: its seeds, their mean and its interval; None without values."""
    measure = study.table.measures[0]
    rows = {row.name: study.values(column, row.name, measure) for row in study.table.rows}
    rows = {name: values for name, values in rows.items() if len(values)}
    if not rows:
        return None
    figure = Figure(figsize=(5.2, 1.1 + 0.3 * len(rows)), layout="constrained")
    axes: Axes = figure.subplots()
    for place, values in enumerate(rows.values()):
        color = COLORS[place % len(COLORS)]
        axes.plot(values, [place] * len(values), "o", color=color, alpha=0.35, markersize=4)
        axes.plot(t_interval(values), [place, place], "-", color=color, linewidth=2)
        axes.plot(values.mean(), place, "|", color=color, markersize=14, markeredgewidth=2.5)
        axes.annotate(
            f"{values.mean():.2f}", (1.01, place), xycoords=("axes fraction", "data"), va="center", fontsize=8
        )
    seen = pd.concat(rows.values())  # an interval of two seeds can be far wider than all dots: keep the dots apart
    margin = max(0.1, seen.max() - seen.min())
    axes.set(xlabel=label(measure), xlim=(seen.min() - margin, seen.max() + margin), ylim=(len(rows) - 0.5, -0.5))
    axes.set_yticks(range(len(rows)), list(rows), fontsize=8)
    axes.grid(alpha=0.3, axis="x")
    return to_data_uri(figure)


def draw_lines(study: Study, column: str, x: str, y: str, best_so_far: bool) -> str | None:
    """Draw mean and range over seeds by epoch for every row; None if no run has the two columns."""
    if not {x, y} <= set(study.epochs.columns):
        return None
    epochs = study.epochs[study.epochs["column"] == column].dropna(subset=[x, y])
    if epochs.empty:
        return None
    if best_so_far:
        epochs = epochs.assign(**{y: epochs.groupby(["row", "seed"])[y].cummax()})
    figure = Figure(figsize=(5.2, 4.6), layout="constrained")
    axes: Axes = figure.subplots()
    for index, row in enumerate(study.table.rows):
        runs = epochs[epochs["row"] == row.name].groupby("epoch")
        if len(runs):
            color, style = COLORS[index % len(COLORS)], ("-", "--", ":")[index // len(COLORS) % 3]
            place, height = runs[x].mean(), runs[y]
            text = f"{row.name}  {height.mean().iloc[-1]:.{digits(y)}f}"
            axes.plot(place, height.mean(), style, color=color, label=text, linewidth=1.5, marker=".")
            axes.fill_between(place, height.min(), height.max(), color=color, alpha=0.1, linewidth=0)
    axes.set(xlabel=label(x), ylabel=label(y))
    if y == "test_top1":  # before a third of the epochs, all curves climb from chance
        late = epochs[epochs["epoch"] > epochs["epoch"].max() / 3][y]
        axes.set_ylim(late.min() - 1, min(100.5, late.max() + 1))
    else:
        axes.set_yscale("log")
    if x == "epoch":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3, which="both")
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, title="at the end", title_fontsize=8)
    return to_data_uri(figure)


def to_data_uri(figure: Figure) -> str:
    """Return a figure as an SVG inside a URI; equal figures give equal bytes."""
    file = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "rblock"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"


if __name__ == "__main__":
    main()
