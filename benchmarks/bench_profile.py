"""Where the time of an eager mask goes: what each of PyTorch's operations takes of fork-and-mask, beside torch.cat.

    python benchmarks/bench_profile.py               # the three maps of design.md, float32 and bfloat16; half a minute
    python benchmarks/bench_profile.py --quick       # one small map; some seconds
    python benchmarks/bench_profile.py --show benchmarks/results/profile-cpu.json

Forward and backward of fork_and_mask with masks that are drawn already (`op` of bench_masks.py), under torch.profiler.
Time is each operation's own, what it calls left out, over that of torch.cat([x, x]), forward and backward, in the same
profile: the floor is 1. `multiply` is x times a mask and, behind it, the sum of two gradients; `gather` copies rows of
masks; `convert` changes dtypes, which bfloat16 needs twice since a mask is applied in float32; the rest is set-up.
"""

import argparse
import pathlib
import sys
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from benchmarks import harness
from benchmarks.bench_masks import NAMED, competitors

KINDS = {
    "multiply": ("aten::mul", "aten::addcmul_", "aten::addcmul"),
    "gather": ("aten::index_select",),
    "convert": ("aten::copy_", "aten::_to_copy", "aten::to"),
}
COLOURS = {"multiply": "#2166ac", "gather": "#92c5de", "convert": "#e08214", "rest": "#999999"}


def main(arguments: list[str] | None = None) -> None:
    """Run from the command line."""
    parser = harness.command_line("profile", __doc__)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], help="of x (default both)")
    harness.run("profile", parser, measure, table, draw, arguments)


def measure(options: argparse.Namespace) -> list[harness.Row]:
    """One row per map and dtype."""
    shapes = [(4, 64, 14, 14)] if options.quick else NAMED
    repeats = options.rounds or (3 if options.quick else 20)
    return [measure_shape(shape, dtype, repeats, options) for dtype in options.dtypes for shape in shapes]


def measure_shape(shape: tuple[int, ...], dtype: str, repeats: int, options: argparse.Namespace) -> harness.Row:
    """Own seconds of every operation of fork_and_mask, and of torch.cat in all."""
    torch.manual_seed(options.seed)
    x = torch.randn(shape, device=options.device).to(getattr(torch, dtype))
    gradient = torch.cat([x, x])
    operations = competitors(shape, x)

    def step(name: str) -> Callable[[], object]:
        def once() -> None:
            inner = x.detach().requires_grad_()
            torch.autograd.grad(operations[name](inner), inner, gradient)

        return once

    cat, ours = own_times(step("cat"), repeats, options.device), own_times(step("op"), repeats, options.device)
    floor = sum(cat.values())
    kinds = dict.fromkeys(COLOURS, 0.0)
    for name, seconds in ours.items():
        kind = next((kind for kind, names in KINDS.items() if name in names), "rest")
        kinds[kind] += seconds / floor
    return {
        "shape": list(shape),
        "dtype": dtype,
        "repeats": repeats,
        "cat_seconds": floor / repeats,
        "over_cat": sum(kinds.values()),
        "kinds_over_cat": kinds,
        "operations_over_cat": {
            name: seconds / floor for name, seconds in sorted(ours.items(), key=lambda item: -item[1])
        },
    }


def own_times(step: Callable[[], object], repeats: int, device: str) -> dict[str, float]:
    """Seconds that each operation took itself, over all repeats."""
    for _ in range(3):
        step()
    on_gpu = torch.device(device).type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as recorded:
        for _ in range(repeats):
            step()
    events = recorded.key_averages()
    times = {
        event.key: (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6 for event in events
    }
    return {name: seconds for name, seconds in times.items() if seconds > 0}


def table(rows: list[harness.Row]) -> str:
    """One line per map and dtype."""
    header = ["N, C, H, W", "dtype", "cat ms", "op / cat", *(f"{kind} / cat" for kind in COLOURS)]
    return harness.format_table(
        header,
        [
            [
                ", ".join(map(str, row["shape"])), row["dtype"], f"{1e3 * row['cat_seconds']:.2f}",
                f"{row['over_cat']:.2f}", *(f"{row['kinds_over_cat'][kind]:.2f}" for kind in COLOURS),
            ]
            for row in rows
        ],
    )  # fmt: skip


def draw(rows: list[harness.Row], path: pathlib.Path) -> None:
    """Stacked bars of the kinds of operations, torch.cat as a line."""
    with harness.figure(path, size=(3 + 1.1 * len(rows), 4.5)) as axes:
        axis = axes[0, 0]
        bottom = [0.0] * len(rows)
        for kind, colour in COLOURS.items():
            heights = [row["kinds_over_cat"][kind] for row in rows]
            axis.bar(range(len(rows)), heights, 0.7, bottom=bottom, color=colour, label=kind)
            bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
        axis.axhline(1, color="#c51b7d", linewidth=1, label="torch.cat, the floor")
        labels = ["{} x {} x {}x{}\n".format(*row["shape"]) + row["dtype"] for row in rows]
        axis.set_xticks(range(len(rows)), labels, fontsize=8)
        axis.set_ylabel("own time / torch.cat's")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8)


if __name__ == "__main__":
    main()
