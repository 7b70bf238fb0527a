"""The report's tables, in Markdown; every number comes from the runs, and where there is none stands a dash."""

import math
from collections import Counter
from collections.abc import Sequence

from sweeping.grid import Row

from reporting.collect import Runs, completing
from reporting.methods import DASH, methods_part, table
from reporting.seed_stats import best_until, compare, holm, summarise

BEST, LAST = ("top1_best", "best epoch"), ("top1_last", "last epoch")


def report_text(runs: Runs, figures: dict[str, list[tuple[str, str]]]) -> str:
    """The whole report.

    Args:
        runs: the grid and what is there of it.
        figures: column -> (file name, what it shows), as draw_figures gives them.
    """
    parts = [f"# {runs.grid.title}", *summary_part(runs), *missing_part(runs), "## At a glance", *glance_part(runs)]
    for column in runs.grid.columns:
        name = column.name
        parts += [f"## {name}", "### Top-1", *top1_part(runs, name)]
        if runs.grid.stages:
            parts += ["### Best until each stage", *stages_part(runs, name)]
        parts += ["### Tests, seed by seed", *tests_part(runs, name)]
        parts += ["### Cost and gap", *cost_part(runs, name)]
        if name in figures:
            parts.append("### Pictures")
            for file, text in figures[name]:
                parts += [f"![{text}]({file})", text]
    parts += ["## How this was made", *methods_part(runs)]
    return "\n\n".join(parts) + "\n"


def seeds_text(runs: Runs, column: str, row: str) -> str:
    """How many of the asked runs are there: 3 of 5."""
    group = runs.trials.get((column, row), [])
    return f"{len(runs.done(column, row))} of {len(group)}"


def spread(values: Sequence[float], digits: int = 2) -> str | None:
    """Mean and sample standard deviation; None without values."""
    found = summarise(values)
    if found is None:
        return None
    return f"{found.mean:.{digits}f}" + (f" ± {found.deviation:.{digits}f}" if found.deviation is not None else "")


def interval_text(interval: tuple[float, float] | None, sign: str = "") -> str | None:
    """An interval as low … high; None if there is none."""
    return f"{interval[0]:{sign}.2f} … {interval[1]:{sign}.2f}" if interval else None


def summary_part(runs: Runs) -> list[str]:
    """How much of the grid is there."""
    trials = [trial for group in runs.trials.values() for trial in group]
    done = sum(trial.result is not None for trial in trials)
    cells, columns = len(runs.cells), len(runs.grid.columns)
    return [
        f"**{done} of {len(trials)} runs** are finished: {cells} cells (rows on {columns} "
        f"column{'s' * (columns != 1)}), seeds {', '.join(map(str, runs.grid.seeds))}."
    ]


def missing_part(runs: Runs) -> list[str]:
    """The runs that are not finished, and the command that completes them."""
    missing = [
        (column, row, trial) for (column, row), group in runs.trials.items() for trial in group if trial.result is None
    ]
    if not missing:
        return []
    counts = Counter(trial.state for *_, trial in missing)
    parts = ["## Missing runs", ", ".join(f"{count} {state}" for state, count in counts.items()) + ":"]
    alike: dict[tuple[str, str, str, int, str], list[int]] = {}
    for column, row, trial in missing:
        alike.setdefault((column, row, trial.state, len(trial.rows), trial.why), []).append(trial.seed)
    lines = [
        (column, row, ", ".join(map(str, seeds)), state, epochs or None, why or None)
        for (column, row, state, epochs, why), seeds in alike.items()
    ]
    parts.append(table(("column", "row", "seeds", "state", "epochs so far", "why"), lines))
    command = completing(runs)
    if command:
        parts.append(f"To complete:\n\n```\n{command}\n```")
    return parts


def paper_columns(runs: Runs) -> list[str]:
    """Columns of the paper that the grid has not: other data, shown beside ours."""
    names = {column.name for column in runs.grid.columns}
    return list(dict.fromkeys(name for row in runs.grid.rows for name in row.paper if name not in names))


def paper_value(row: Row, column: str) -> str | None:
    """The paper's top-1 at the best epoch of the whole run."""
    value = row.paper.get(column)
    return None if value is None else f"{value[-1] if isinstance(value, list) else value:.2f}"


def glance_part(runs: Runs) -> list[str]:
    """The paper's table with ours beside each of its columns."""
    others = paper_columns(runs)
    header = ["method"]
    given = [c.name for c in runs.grid.columns if any(c.name in row.paper for row in runs.grid.rows)]
    for column in runs.grid.columns:
        header += [f"paper, {column.name}"] * (column.name in given) + [f"ours, {column.name}"]
    header += [f"paper, {name} (other data)" for name in others]
    means = {
        column.name: {
            row.name: math.fsum(found) / len(found)
            for row in runs.grid.rows
            if (found := list(runs.figures(column.name, row.name, BEST[0]).values()))
        }
        for column in runs.grid.columns
    }
    lines = []
    for row in runs.grid.rows:
        line: list[str | None] = [row.name]
        for column in runs.grid.columns:
            line += [paper_value(row, column.name)] * (column.name in given)
            mean = means[column.name].get(row.name)
            best = mean is not None and mean == max(means[column.name].values())
            count = seeds_text(runs, column.name, row.name)
            text = None if mean is None else f"**{mean:.2f}**" if best else f"{mean:.2f}"
            full = count.split(" of ")[0] == count.split(" of ")[1]
            line.append(text if full else f"{text or DASH} ({count})")
        lines.append([*line, *(paper_value(row, name) for name in others)])
    note = "Top-1 in percent at the best epoch, mean over seeds; ours is bold where it is the highest of its column."
    return [table(header, lines), note]


def top1_part(runs: Runs, column: str) -> list[str]:
    """Mean, standard deviation, interval and number of seeds, at the best and at the last epoch."""
    given = any(column in row.paper for row in runs.grid.rows)  # other data of the paper's stands at a glance
    header = ["method", *["paper"] * given]
    for _, name in (BEST, LAST):
        header += [f"{name}, mean ± sd", "95 % interval"]
    lines = []
    for row in runs.rows_of(column):
        line: list[str | None] = [row.name, *[paper_value(row, column)] * given]
        for key, _ in (BEST, LAST):
            values = list(runs.figures(column, row.name, key).values())
            found = summarise(values)
            line += [spread(values), interval_text(found.interval) if found else None]
        lines.append([*line, seeds_text(runs, column, row.name)])
    return [
        table([*header, "seeds"], lines),
        "The best epoch is the paper's figure; it is chosen on the test images themselves. The last epoch is fairer.",
    ]


def stages_part(runs: Runs, column: str) -> list[str]:
    """Table 3: the best test top-1 within the first shares of the epochs, the paper's beside ours."""
    stages = runs.grid.stages
    others = [column] if any(column in row.paper for row in runs.grid.rows) else paper_columns(runs)
    header = ["method", "whose", *(f"{100 * stage:g} %" for stage in stages)]
    lines: list[list[str | None]] = []
    for row in runs.rows_of(column):
        for name in others:
            value = row.paper.get(name)
            if isinstance(value, list):
                whose = "paper" if name == column else f"paper, {name}"
                lines.append([row.name, whose, *(f"{stage:.2f}" for stage in value)])
        found = [
            best_until([epoch["test_top1"] for epoch in trial.rows], stages, trial.result["epochs"])
            for trial in runs.done(column, row.name)
            if trial.result is not None
        ]
        per_stage = [[run[i] for run in found] for i in range(len(stages))]
        cells = [spread([value for value in values if value is not None]) for values in per_stage]
        lines.append([row.name, f"ours ({seeds_text(runs, column, row.name)})", *cells])
    return [table(header, lines), "The highest test top-1 within the first part of the epochs, mean ± sd over seeds."]


def tests_part(runs: Runs, column: str) -> list[str]:
    """Paired comparisons with plain training and with DropBlock; one family per epoch, over all the columns."""
    against = [row for role in ("baseline", "compare") for row in runs.grid.rows if getattr(row, role)]
    if not against:
        return ["No row of this grid is marked as the one to compare with (baseline, compare)."]
    parts = []
    for key, name in (BEST, LAST):
        family = [
            (place.name, row.name, other.name)
            for place in runs.grid.columns
            for other in against
            for row in runs.rows_of(place.name)
            if row.name != other.name and not row.baseline
        ]
        found = [compare(runs.figures(c, row, key), runs.figures(c, other, key)) for c, row, other in family]
        adjusted = holm([one.p if one else None for one in found])
        lines = []
        for (place, row, other), one, corrected in zip(family, found, adjusted, strict=True):
            if place != column:
                continue
            cells = (
                (None,) * 4
                if one is None
                else (f"{one.difference:+.2f}", interval_text(one.interval, "+"), p_text(one.p), p_text(corrected))
            )
            lines.append((row, other, *cells, one.seeds if one else 0))
        header = ("method", "against", "difference", "95 % interval", "p", "p, Holm", "common seeds")
        tests = sum(one is not None and one.p is not None for one in found)
        family_text = f"a family of {tests} tests" if tests else "no tests: they need two common seeds that differ"
        parts += [f"At the {name} ({family_text}):", table(header, lines)]
    return parts


def p_text(p: float | None) -> str | None:
    """A p-value with two figures, or as a bound where it is tiny."""
    return None if p is None else "< 0.0001" if p < 1e-4 else f"{p:.2g}" if p < 0.1 else f"{p:.2f}"


def cost_part(runs: Runs, column: str) -> list[str]:
    """Wall time, also relative to plain training seed by seed, and the gap and drop rate at the last epoch."""
    plain = next((row.name for row in runs.grid.rows if row.baseline), None)
    base = runs.figures(column, plain, "wall_time_seconds") if plain else {}
    header = ["method", "epochs", "wall time, s", f"relative to {plain}" if plain else "relative", "images/s"]
    header += ["gap, KL in nats", "gap, agreement %", "drop rate"]
    lines = []
    for row in runs.rows_of(column):
        times = runs.figures(column, row.name, "wall_time_seconds")
        ratios = [times[seed] / base[seed] for seed in sorted(times.keys() & base.keys()) if base[seed] > 0]
        epochs = sorted({int(value) for value in runs.figures(column, row.name, "epochs").values()})
        ends = {
            key: list(runs.last(column, row.name, key).values())
            for key in ("images_per_second", "gap_kl", "gap_agreement", "drop_rate")
        }
        lines.append(
            (
                row.name, ", ".join(map(str, epochs)) or None, spread(list(times.values()), 1), spread(ratios),
                spread(ends["images_per_second"], 0), spread(ends["gap_kl"], 4), spread(ends["gap_agreement"]),
                spread(ends["drop_rate"], 4),
            )
        )  # fmt: skip
    devices = Counter(
        str((t.result or {}).get("device")) for row in runs.rows_of(column) for t in runs.done(column, row.name)
    )
    where = (
        f" Devices: {', '.join(f'{device} ({count} runs)' for device, count in devices.items())}." if devices else ""
    )
    return [
        table(header, lines),
        "Mean ± sd over seeds; wall time with evaluation, but without measuring the gap, divided by plain training's "
        "of the same seed. Runs that shared a machine (--jobs) slowed each other, so compare times only of runs made "
        f"alike.{where}",
    ]
