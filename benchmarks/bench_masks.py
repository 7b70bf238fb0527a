"""Fork-and-mask, forward and backward, beside its floor and beside what people use, over maps and channels.

    python benchmarks/bench_masks.py                 # the grid in float32 and bfloat16; about ten minutes on two cores
    python benchmarks/bench_masks.py --quick         # two small maps; under a minute
    python benchmarks/bench_masks.py --show benchmarks/results/masks-cpu.json

The floor is `torch.cat([x, x])`: any way to run two sub-models in one batch writes x twice and adds two gradients.
`op` is fork_and_mask with masks that are drawn already, as it comes and compiled; `plain ops` is the same product
written with the masks as tensors, torch.cat([x * mask_1, x * mask_2]). The others draw their masks too: `R-Block` is
the mask module of BDropDML, `timm` and `torchvision` are their DropBlock2d on torch.cat([x, x]), all at drop_prob 0.2
and block_size 3.

All competitors of one map take turns; a ratio to the floor is taken within each round and its median shown. `pays
after` is the number of steps after which the time that compiling took is saved.
"""

import argparse
import math
import pathlib
import sys
import time
from collections.abc import Callable

import torch
import torchvision.ops
from timm.layers.drop import DropBlock2d
from torch import Tensor

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from benchmarks import harness
from rblock_fx.functional import fork_and_mask
from rblock_fx.masks import METHODS

DROP_PROB, BLOCK_SIZE = 0.2, 3
MAPS, CHANNELS = (7, 14, 28, 56, 112), (16, 64, 256, 1024, 2048)
# Elements of x: as a step of a real network has them, and (in float32, with some numbers of channels) as a cache holds.
LARGE, SMALL, SMALL_CHANNELS = 1 << 22, 1 << 18, (16, 256, 2048)
# The three maps of design.md, of CIFAR networks and of resnet50.
NAMED = ((128, 64, 32, 32), (128, 256, 8, 8), (32, 1024, 14, 14))
COMPETITORS = {
    "op": "#2166ac",
    "op, compiled": "#053061",
    "plain ops": "#e08214",
    "R-Block": "#92c5de",
    "timm": "#999999",
    "torchvision": "#4d4d4d",
}

Shape = tuple[int, ...]


def main(arguments: list[str] | None = None) -> None:
    """Run from the command line."""
    parser = harness.command_line("masks", __doc__)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], help="of x (default both)")
    parser.add_argument("--channels_last", action="store_true", help="x in channels-last memory format")
    harness.run("masks", parser, measure, table, draw, arguments, key=("dtype", "shape", "layout"))


def shapes(quick: bool, dtype: str) -> list[Shape]:
    """Shapes (N, C, H, W): as many samples as come nearest to the wanted number of elements, at most 256."""
    if quick:
        return [(4, 64, 14, 14), (2, 256, 7, 7)]
    sizes = [(LARGE, CHANNELS), *([(SMALL, SMALL_CHANNELS)] if dtype == "float32" else [])]
    grid = [
        (min(elements // (channels * side * side), 256), channels, side, side)
        for elements, all_channels in sizes
        for side in MAPS
        for channels in all_channels
        if channels * side * side <= elements
    ]
    return [*NAMED, *dict.fromkeys(grid)]


def measure(options: argparse.Namespace) -> list[harness.Row]:
    """One row per shape and dtype."""
    rows = []
    for dtype in options.dtypes:
        for shape in shapes(options.quick, dtype):
            rows.append(measure_shape(shape, dtype, options))
            print(table(rows[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
    return rows


def measure_shape(shape: Shape, dtype: str, options: argparse.Namespace) -> harness.Row:
    """Seconds of every competitor on one map."""
    torch.manual_seed(options.seed)
    torch._dynamo.reset()
    layout = torch.channels_last if options.channels_last else torch.contiguous_format
    x = torch.randn(shape, device=options.device).to(getattr(torch, dtype), memory_format=layout)
    gradient = torch.randn_like(torch.cat([x, x]))
    operations = competitors(shape, x)
    calls = {name: _forward_and_backward(operation, x, gradient) for name, operation in operations.items()}

    started = time.perf_counter()
    calls["op, compiled"]()
    compile_seconds = time.perf_counter() - started
    rounds = options.rounds or (5 if options.quick else 11)
    seconds = harness.time_in_turns(calls, rounds, options.device)
    middle = {name: harness.spread(values)["median"] for name, values in seconds.items()}
    saved = middle["op"] - middle["op, compiled"]
    return {
        "shape": list(shape),
        "elements": math.prod(shape),
        "dtype": dtype,
        "layout": "channels_last" if options.channels_last else "contiguous",
        "seconds": {name: harness.spread(values) for name, values in seconds.items()},
        "over_cat": {name: harness.ratio(seconds[name], seconds["cat"]) for name in COMPETITORS},
        "timm_over_ours": harness.ratio(seconds["timm"], seconds["R-Block"]),
        "torchvision_over_ours": harness.ratio(seconds["torchvision"], seconds["R-Block"]),
        "compile_seconds": compile_seconds,
        "compile_pays_after_steps": math.ceil(compile_seconds / saved) if saved > 0 else None,
    }


def competitors(shape: Shape, x: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """Name -> what gives (2N, C, H, W) of (N, C, H, W)."""
    rows, channels, *size = shape
    mask = METHODS["bdropdml"](DROP_PROB, BLOCK_SIZE, "exact", (channels, *size), 1, forks=True).to(x.device)
    channel, spatial = mask.draw(rows, channels, tuple(size), x.device)
    scale = mask.scale(channel, spatial).expand(2, rows, 1, 1, 1)
    spatial = spatial.to(torch.float32)
    dense = ((1 - channel.float() * spatial) * scale).to(x.dtype)
    compiled = torch.compile(fork_and_mask, fullgraph=True, dynamic=False)
    timm_block = DropBlock2d(DROP_PROB, BLOCK_SIZE)
    torchvision_block = torchvision.ops.DropBlock2d(DROP_PROB, BLOCK_SIZE)
    return {
        "cat": lambda x: torch.cat([x, x]),
        "op": lambda x: fork_and_mask(x, channel, spatial, scale),
        "op, compiled": lambda x: compiled(x, channel, spatial, scale),
        "plain ops": lambda x: torch.cat([x * dense[0], x * dense[1]]),
        "R-Block": mask,
        "timm": lambda x: timm_block(torch.cat([x, x])),
        "torchvision": lambda x: torchvision_block(torch.cat([x, x])),
    }


def _forward_and_backward(operation: Callable[[Tensor], Tensor], x: Tensor, gradient: Tensor) -> Callable[[], object]:
    def step() -> None:
        inner = x.detach().requires_grad_()
        torch.autograd.grad(operation(inner), inner, gradient)

    return step


def table(rows: list[harness.Row]) -> str:
    """One line per shape and dtype; ratios to torch.cat, then to ours."""
    header = ["N, C, H, W", "dtype", "M elements", "cat ms", *COMPETITORS, "timm / R-Block", "torchvision / R-Block"]
    lines = [
        [
            ", ".join(map(str, row["shape"])),
            row["dtype"],
            f"{row['elements'] / 1e6:.1f}",
            f"{1e3 * row['seconds']['cat']['median']:.2f}",
            *(f"{row['over_cat'][name]['median']:.2f}" for name in COMPETITORS),
            f"{row['timm_over_ours']['median']:.2f}",
            f"{row['torchvision_over_ours']['median']:.1f}",
            row["compile_pays_after_steps"],
        ]
        for row in rows
    ]
    return harness.format_table([*header, "pays after"], lines)


def draw(rows: list[harness.Row], path: pathlib.Path) -> None:
    """Each competitor over the floor, maps in rising order of size, a panel per dtype."""
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    longest = max(sum(row["dtype"] == dtype for row in rows) for dtype in dtypes)
    with harness.figure(path, rows=len(dtypes), size=(3 + 0.26 * max(longest, 12), 4.6 * len(dtypes))) as axes:
        for axis, dtype in zip(axes[:, 0], dtypes, strict=True):
            chosen = [row for row in rows if row["dtype"] == dtype]
            chosen.sort(key=lambda row: (row["elements"], row["shape"]))
            for name, colour in COMPETITORS.items():
                over = [row["over_cat"][name]["median"] for row in chosen]
                axis.plot(over, "o-", color=colour, markersize=4, linewidth=1, label=name)
            axis.axhline(1, color="#c51b7d", linewidth=1, label="torch.cat, the floor")
            axis.set_yscale("log")
            axis.set_yticks([0.5, 1, 2, 5, 10, 20, 50], ["0.5", "1", "2", "5", "10", "20", "50"])
            labels = ["{} x {} x {}x{}".format(*row["shape"]) for row in chosen]
            axis.set_xticks(range(len(chosen)), labels, rotation=90, fontsize=7)
            axis.set_ylabel(f"{dtype}: forward + backward / torch.cat's")
            axis.spines[["top", "right"]].set_visible(False)
        axes[-1, 0].set_xlabel("N x C x HxW, by number of elements")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        axes[0, 0].figure.legend(handles, labels, loc="outside upper center", ncols=4, fontsize=8, frameon=False)


if __name__ == "__main__":
    main()
