"""What every benchmark shares: the command line, where it ran, timing in turns, the result file, the table.

Seconds on a shared machine are noise; a ratio of two things timed in turns within one run is not. So every figure is a
median over rounds, each round runs every competitor once, and the spread over rounds stands beside it.
"""

import argparse
import contextlib
import json
import os
import pathlib
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

import rblock_fx

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"

Row = dict[str, Any]


def command_line(script: str, description: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark has; a script adds its own.

    Args:
        script: the script's name without "bench_": results go to benchmarks/results/<script>-<device>.json and .png.
        description: the script's docstring.
    """
    parser = argparse.ArgumentParser(
        prog=f"python benchmarks/bench_{script}.py",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="a small part in under a minute, to see that it works")
    parser.add_argument("--rounds", type=_positive, default=None, help="rounds that a median is taken over")
    parser.add_argument("--threads", type=_positive, default=2, help="torch's threads on a CPU (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, images and masks (default 0)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument(
        "--output",
        type=pathlib.Path,
        default=None,
        help=f"the JSON file to write, with its picture beside it (default benchmarks/results/{script}-<device>.json; "
        "with --quick nothing is written unless this is given)",
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
    """Measure (or read what was measured), write the JSON, and make the table and the picture from it.

    Where `key` names what tells rows apart, --keep adds to the rows that the file has already.
    """
    if key:
        parser.add_argument("--keep", action="store_true", help="keep the file's rows that this run does not replace")
    options = parser.parse_args(arguments)
    if options.show is not None:
        result = json.loads(options.show.read_text())
        path = options.show
    else:
        torch.set_num_threads(options.threads)
        torch.manual_seed(options.seed)
        started = time.time()
        rows = measure(options)
        result = {
            "benchmark": script,
            "command": shlex.join(["python", f"benchmarks/bench_{script}.py", *(arguments or sys.argv[1:])]),
            "environment": environment(options),
            "seconds": round(time.time() - started, 1),
            "rows": rows,
        }
        path = options.output
        if path is None and not options.quick:
            path = RESULTS / f"{script}-{device_name(options.device)}.json"
        if key and options.keep and path is not None and path.exists():
            result = _with_rows_of(json.loads(path.read_text()), result, key)
        if path is not None:
            write(path, result)
            result = json.loads(path.read_text())
    print(table(result["rows"]))
    if path is not None:
        draw(result["rows"], path.with_suffix(".png"))
        print(f"\n{path}\n{path.with_suffix('.png')}")


def _with_rows_of(earlier: Row, result: Row, key: Sequence[str]) -> Row:
    """Add the rows of an earlier run, and say how and where that one was made."""
    new = [[row[name] for name in key] for row in result["rows"]]
    kept = [row for row in earlier["rows"] if [row[name] for name in key] not in new]
    run = {name: earlier[name] for name in ("command", "environment", "seconds")}
    return result | {"earlier_runs": [*earlier.get("earlier_runs", []), run], "rows": kept + result["rows"]}


def _positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is below 1")
    return number


def environment(options: argparse.Namespace) -> Row:
    """Versions, machine, threads and every option: what one needs to repeat the run."""
    return {
        "versions": versions(),
        "commit": commit(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device_name(options.device),
        "platform": platform.platform(),
        "options": {
            name: str(value) if isinstance(value, pathlib.Path) else value for name, value in vars(options).items()
        },
    }


def versions() -> Row:
    """Of Python and of all that the figures depend on."""
    import timm
    import torchvision

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
        "rblock_fx": rblock_fx.__version__,
    }


def device_name(device: str) -> str:
    """`cpu`, or the GPU's name as it stands in a file's name."""
    if torch.device(device).type != "cuda":
        return torch.device(device).type
    return torch.cuda.get_device_name(device).lower().replace(" ", "-")


def cpu_model() -> str:
    """The processor, as Linux names it."""
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def commit() -> str | None:
    """The commit that was measured, with "+" where files differ from it."""
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--", "rblock_fx", "benchmarks/*.py"],
            cwd=ROOT, capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip()[:10] + ("+" if changed.stdout.strip() else "")


def time_in_turns(
    competitors: Mapping[str, Callable[[], object]], rounds: int, device: str = "cpu", warm_up: int = 2
) -> dict[str, list[float]]:
    """Seconds of each call, (rounds,) per competitor: each round runs each once, in rotated order."""
    for call in competitors.values():
        for _ in range(warm_up):
            call()
    names = list(competitors)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for position in range(len(names)):
            name = names[(position + turn) % len(names)]
            _synchronize(device)
            start = time.perf_counter()
            competitors[name]()
            _synchronize(device)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def _synchronize(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def spread(values: Sequence[float]) -> Row:
    """Median and quartiles of a sample, and its size."""
    if len(values) < 2:
        return {"median": values[0], "quartiles": [values[0], values[0]], "rounds": len(values)}
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "quartiles": [low, high], "rounds": len(values)}


def ratio(of: Sequence[float], to: Sequence[float]) -> Row:
    """Spread of the ratio of two competitors, taken round by round, so that a slow minute hits both."""
    return spread([numerator / denominator for numerator, denominator in zip(of, to, strict=True)])


def write(path: pathlib.Path, result: Mapping[str, Any]) -> None:
    """Write JSON so that a reader finds the old file or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    partial.replace(path)


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


@contextlib.contextmanager
def figure(path: pathlib.Path, *, rows: int = 1, columns: int = 1, size: tuple[float, float] = (8, 5)) -> Iterator[Any]:
    """Axes to draw on, as an array of (rows, columns); saved as a PNG on leaving."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawing, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    yield axes
    drawing.savefig(path, dpi=120)
    pyplot.close(drawing)
