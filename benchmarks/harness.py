"""The parts that all benchmarks share: command line, environment, timing in turns, result file, table, figure.

Seconds on a shared machine are noise; a ratio of two things timed in turns within one run is not. So every figure is a
median over rounds, each round runs every competitor once, and the quartiles over rounds are recorded too.
"""

import argparse
import contextlib
import json
import pathlib
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import torch

from benchmarks.environment import ROOT, describe_environment, device_name

RESULTS = ROOT / "benchmarks" / "results"

Row = dict[str, Any]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def command_line(script: str, description: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark has; a script adds its own.

    Args:
        script: name of the script without "bench_": results go to benchmarks/results/<script>-<device>.json and .png.
        description: docstring of the script.
    """
    parser = _Parser(
        prog=f"python benchmarks/bench_{script}.py",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="a small part in under a minute, to see that it works")
    parser.add_argument("--rounds", type=positive, default=None, help="number of rounds in a median")
    parser.add_argument("--threads", type=positive, default=2, help="torch's threads on a CPU (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, images and masks (default 0)")
    available = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=_device, default=available, help="cpu or cuda (default %(default)s)")
    parser.add_argument(
        "--output",
        type=_json_path,
        default=None,
        help=f"the JSON file to write, with a PNG next to it (default benchmarks/results/{script}-<device>.json; "
        "with --quick nothing is written unless this is set)",
    )
    parser.add_argument("--show", type=pathlib.Path, default=None, help="print and draw an existing JSON file, no runs")
    return parser


def run(
    script: str,
    parser: argparse.ArgumentParser,
    measure: Callable[[argparse.Namespace], list[Row]],
    table: Callable[[list[Row]], str],
    draw: Callable[[list[Row], pathlib.Path], None],
    arguments: Sequence[str] | None = None,
    key: Sequence[str] = (),
) -> None:
    """Measure (or read a result file), write the JSON, and make the table and the figure from it.

    With `key`, the columns that identify a row, --keep adds to the rows that the file already has.
    """
    if key:
        parser.add_argument("--keep", action="store_true", help="keep the file's rows that this run does not replace")
    options = parser.parse_args(arguments)
    path = options.show or options.output
    if options.show is not None:
        result = _read(parser, options.show, script)
    else:
        if path is None and not options.quick:
            path = RESULTS / f"{script}-{device_name(options.device)}.json"
        earlier = _read(parser, path, script) if key and options.keep and path and path.exists() else None
        torch.set_num_threads(options.threads)
        torch.manual_seed(options.seed)
        started = time.time()
        rows = measure(options)
        typed = sys.argv[1:] if arguments is None else arguments
        result = {
            "benchmark": script,
            "command": shlex.join(["python", f"benchmarks/bench_{script}.py", *typed]),
            "environment": describe_environment(options),
            "seconds": round(time.time() - started, 1),
            "rows": rows,
        }
        if earlier is not None:
            result = _with_rows_of(earlier, result, key)
        result = json.loads(write(path, result) if path else json.dumps(result))
    print(table(result["rows"]))
    if path is not None:
        draw(result["rows"], path.with_suffix(".png"))
        print(f"\n{path}\n{path.with_suffix('.png')}")


def _read(parser: argparse.ArgumentParser, path: pathlib.Path, script: str) -> Row:
    """A result file of this script; exit with one line if it is not."""
    try:
        result = json.loads(path.read_text())
    except OSError as error:
        parser.error(f"{path}: {error.strerror}")
    except ValueError:
        parser.error(f"{path} is not a JSON file")
    if not isinstance(result, dict) or result.get("benchmark") != script or not result.get("rows"):
        parser.error(f"{path} is not a result of bench_{script}.py")
    return result


def _with_rows_of(earlier: Row, result: Row, key: Sequence[str]) -> Row:
    """Add the rows of an earlier run, and record how and where that one was made."""
    new = [[row[name] for name in key] for row in result["rows"]]
    kept = [row for row in earlier["rows"] if [row[name] for name in key] not in new]
    run = {name: earlier[name] for name in ("command", "environment", "seconds")}
    return result | {"earlier_runs": [*earlier.get("earlier_runs", []), run], "rows": kept + result["rows"]}


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    with contextlib.suppress(ValueError):
        if int(text) >= 1:
            return int(text)
    raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")


def _device(text: str) -> str:
    kind, _, index = text.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()):
        raise argparse.ArgumentTypeError(f"expected cpu or cuda, got {text!r}")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"{text}: this machine has {torch.cuda.device_count()} CUDA devices")
    return text


def _json_path(text: str) -> pathlib.Path:
    if not text.endswith(".json"):
        raise argparse.ArgumentTypeError(f"expected a name that ends in .json, got {text!r}")
    return pathlib.Path(text)


def time_in_turns(
    competitors: Mapping[str, Callable[[], object]], rounds: int, device: str = "cpu", warm_up: int = 2
) -> dict[str, list[float]]:
    """Seconds of each call, (rounds,) per competitor: each round runs each once, in rotated order."""
    synchronize = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    for call in competitors.values():
        for _ in range(warm_up):
            call()
    names = list(competitors)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for position in range(len(names)):
            name = names[(position + turn) % len(names)]
            synchronize()
            start = time.perf_counter()
            competitors[name]()
            synchronize()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def spread(values: Sequence[float]) -> Row:
    """Median and quartiles of a sample, and its size."""
    quartiles = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"median": quartiles[1], "quartiles": [quartiles[0], quartiles[2]], "rounds": len(values)}


def ratio(of: Sequence[float], to: Sequence[float]) -> Row:
    """Spread of the ratio of two competitors, taken round by round, so that a slow minute hits both."""
    return spread([numerator / denominator for numerator, denominator in zip(of, to, strict=True)])


def write(path: pathlib.Path, result: Mapping[str, Any]) -> str:
    """Write JSON so that a reader finds the old file or the new one, never half of it; return its text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=1, allow_nan=False) + "\n"
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(path)
    return text


def format_shape(shape: Sequence[int]) -> str:
    """Write a shape as 7x12."""
    return "x".join(map(str, shape))


def format_table(header: Sequence[str], lines: Sequence[Sequence[object]]) -> str:
    """Columns of text aligned left, of numbers aligned right, None as a dash."""
    cells = [list(header), *([("-" if cell is None else str(cell)) for cell in line] for line in lines)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    numeric = [all(row[column][:1] in "-0123456789" for row in cells[1:]) for column in range(len(header))]
    text = [
        "  ".join(
            cell.rjust(width) if number else cell.ljust(width)
            for cell, width, number in zip(row, widths, numeric, strict=True)
        ).rstrip()
        for row in cells
    ]
    return "\n".join([text[0], "-" * len(text[0]), *text[1:]])


def format_markdown(header: Sequence[str], lines: Sequence[Sequence[object]]) -> str:
    """A table in Markdown, the first column of text and the others of numbers."""
    rule = ["---", *("---:" for _ in header[1:])]
    return "".join(f"| {' | '.join(map(str, cells))} |\n" for cells in (header, rule, *lines))


@contextlib.contextmanager
def figure(path: pathlib.Path, *, rows: int = 1, columns: int = 1, size: tuple[float, float] = (8, 5)) -> Iterator[Any]:
    """Axes to draw on, as an array of (rows, columns); saved as a PNG on leaving."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawing, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    yield axes
    drawing.savefig(path, dpi=120)
    pyplot.close(drawing)


def add_legend(axis: Any) -> None:
    """A legend above the figure, from the labels of one of its axes, each once."""
    handles, labels = axis.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    axis.figure.legend([*unique.values()], [*unique], loc="outside upper center", ncols=4, fontsize=8, frameon=False)
