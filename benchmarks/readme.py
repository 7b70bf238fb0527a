"""The figures of the README, from the result files: `python benchmarks/readme.py` writes them between its marks."""

import json
import pathlib
import statistics
import sys
from collections.abc import Callable
from typing import Any

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
LARGE = 1_000_000  # elements of a map from which the cost of a mask is judged

Row = dict[str, Any]


def rows_of(script: str) -> list[Row]:
    """What was measured on a CPU."""
    rows: list[Row] = json.loads((RESULTS / f"{script}-cpu.json").read_text())["rows"]
    return rows


def markdown(header: list[str], lines: list[list[str]]) -> str:
    """A table in Markdown, the first column of text and the others of numbers."""
    rule = ["---", *("---:" for _ in header[1:])]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (header, rule, *lines))


def steps() -> str:
    """Step time over that of the plain network, and in brackets over the FLOP bound."""
    rows = rows_of("step")
    methods = list(dict.fromkeys(row["method"] for row in rows if row["method"] != "plain"))
    cells = {(row["model"], row["mode"], row["method"]): row for row in rows}
    lines = [
        [f"{model}, {mode}", *(_step(cells.get((model, mode, method))) for method in methods)]
        for model, mode in dict.fromkeys((row["model"], row["mode"]) for row in rows)
    ]
    return markdown(["step / plain's (/ FLOP bound)", *methods], lines)


def _step(row: Row | None) -> str:
    if row is None:
        return "not run"
    return f"{row['over_plain']['median']:.2f} ({row['over_bound']:.2f})"


def masks() -> str:
    """The range over large maps of every ratio, lowest, median and highest."""
    chosen = [row for row in rows_of("masks") if row["elements"] >= LARGE]
    dtypes = list(dict.fromkeys(row["dtype"] for row in chosen))
    ratios: dict[str, Callable[[Row], float]] = {
        "fork-and-mask / torch.cat": lambda row: row["over_cat"]["op"]["median"],
        "compiled fork-and-mask / torch.cat": lambda row: row["over_cat"]["op, compiled"]["median"],
        "dense masks in plain operations / torch.cat": lambda row: row["over_cat"]["plain ops"]["median"],
        "timm's DropBlock2d on the doubled batch / ours": lambda row: row["timm_over_ours"]["median"],
        "torchvision's DropBlock2d on the doubled batch / ours": lambda row: row["torchvision_over_ours"]["median"],
    }
    lines = [
        [name, *(_range([ratio(row) for row in chosen if row["dtype"] == dtype]) for dtype in dtypes)]
        for name, ratio in ratios.items()
    ]
    counts = [sum(row["dtype"] == dtype for row in chosen) for dtype in dtypes]
    heads = [f"{dtype}, {count} maps" for dtype, count in zip(dtypes, counts, strict=True)]
    return markdown(["forward + backward: lowest, median, highest", *heads], lines)


def _range(values: list[float]) -> str:
    return f"{min(values):.2f}, {statistics.median(values):.2f}, {max(values):.2f}"


def memory() -> str:
    """Peak of a step over that of the plain network, and in brackets over the ideal."""
    rows = rows_of("memory")
    methods = list(dict.fromkeys(row["method"] for row in rows if row["method"] != "plain"))
    cells = {(row["model"], row["method"]): row for row in rows}
    lines = []
    for model in dict.fromkeys(row["model"] for row in rows):
        plain = cells[model, "plain"]["peak"]
        line = [model]
        for method in methods:
            row = cells[model, method]
            ideal = f" ({row['peak'] / row['ideal_peak']:.3f})" if "ideal_peak" in row else ""
            line.append(f"{row['peak'] / plain:.2f}{ideal}")
        lines.append(line)
    return markdown(["peak / plain's (/ ideal)", *methods], lines)


def rates() -> str:
    """How often the drop rate that is asked for is the one that happens."""
    rows = [row for row in rows_of("rate") if row["table"] == "rate"]
    lines = []
    for library in dict.fromkeys(row["library"] for row in rows):
        cells = [row for row in rows if row["library"] == library]
        errors = [abs(row["reached"] - row["asked"]) for row in cells if row["raises"] is None]
        near = sum(error <= 0.002 for error in errors)
        raising = len(cells) - len(errors)
        middle, largest = statistics.median(errors), max(errors)
        lines.append([library, f"{near} of {len(cells)}", f"{middle:.4f}", f"{largest:.4f}", str(raising)])
    return markdown(["drop rate", "within 0.002", "median error", "largest error", "raises"], lines)


def conversion() -> str:
    """Seconds of a conversion beside building the network and running it once."""
    rows = sorted(
        (row for row in rows_of("convert") if row["kind"] == "model"), key=lambda row: row["convert_seconds"]["median"]
    )
    chosen = [rows[0], rows[len(rows) // 2], rows[-1]]
    lines = [
        [
            f"{which} of {len(rows)}: {row['name']}",
            f"{row['parameters'] / 1e6:.1f}",
            str(row["modules"]),
            f"{row['convert_seconds']['median']:.2f}",
            f"{row['convert_over_build']['median']:.2f}",
            f"{row['convert_over_forward']['median']:.2f}",
        ]
        for which, row in zip(("fastest", "median", "slowest"), chosen, strict=True)
    ]
    return markdown(["conversion", "M parameters", "modules", "seconds", "/ building it", "/ one forward"], lines)


def scaling() -> str:
    """Step ratios on one and two processes, predicted and measured, and the ratio of the efficiencies."""
    lines = []
    for row in rows_of("scaling"):
        if row["kind"] != "measured":
            continue
        one, two, efficiency = (
            next(check for name, check in row["predictions"].items() if name.startswith(start) and "list_sites" in name)
            for start in ("one process", f"{row['processes']} processes", "efficiency")
        )
        pairs = [f"{check['measured']:.2f} ({check['predicted']:.2f})" for check in (one, two, efficiency)]
        lines.append([f"{row['model']}, {row['selection']}", *pairs])
    header = ["measured (predicted)", "step / plain's, one process", "on two", "scaling efficiency / plain's"]
    return markdown(header, lines)


TABLES = {"step": steps, "masks": masks, "memory": memory, "rate": rates, "convert": conversion, "scaling": scaling}


def marks(name: str) -> tuple[str, str]:
    """What stands before and behind a table in the README."""
    return f"<!-- bench_{name}: begin -->\n", f"<!-- bench_{name}: end -->"


def fill(text: str, names: list[str]) -> str:
    """Put each table between its marks."""
    for name in names:
        begin, end = marks(name)
        before, rest = text.split(begin)
        _, after = rest.split(end)
        text = before + begin + TABLES[name]() + end + after
    return text


if __name__ == "__main__":
    README.write_text(fill(README.read_text(), sys.argv[1:] or list(TABLES)))
