"""Time of a pair of masks, forward and backward: R-Block, its floor, and the alternatives, over maps and channels.

    python benchmarks/bench_masks.py                 # 22 maps in float32 and bfloat16; ten minutes on two cores
    python benchmarks/bench_masks.py --quick         # two small maps; under a minute
    python benchmarks/bench_masks.py --show benchmarks/results/masks-cpu.json

The floor is `torch.cat([x, x])`: any way to run two sub-models in one batch writes x twice and adds two gradients. All
others draw their masks within the timed step, as training does. `R-Block` is BDropDML at the first site, eager and
compiled. `plain ops` writes the same method down in PyTorch: pooled block centres, two dense masks, each normalised to
mean 1, torch.cat([x * mask_1, x * mask_2]). `timm` and `torchvision` are their DropBlock2d on torch.cat([x, x]). All
have drop_prob 0.2 and block_size 3.

All competitors of one map take turns; a ratio is taken within each round and its median is shown. `pays after` is the
number of steps after which the time spent on compiling is saved.
"""

import argparse
import math
import pathlib
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
import torchvision.ops
from timm.layers.drop import DropBlock2d
from torch import Tensor

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from benchmarks import harness
from benchmarks.models import build_mask
from rblock_fx import describe

DROP_PROB, BLOCK_SIZE = 0.2, 3
DTYPES = ("float32", "bfloat16", "float16")
MAPS, CHANNELS = (7, 14, 28, 56, 112), (16, 64, 256, 1024, 2048)
ELEMENTS = 1 << 22  # of x, as in a training step
# Maps of CIFAR networks and of resnet50.
NAMED = ((128, 64, 32, 32), (128, 256, 8, 8), (32, 1024, 14, 14))
COMPETITORS = {
    "R-Block": "#2166ac",
    "R-Block, compiled": "#053061",
    "plain ops": "#e08214",
    "timm": "#999999",
    "torchvision": "#4d4d4d",
}

Shape = tuple[int, ...]


def main(arguments: list[str] | None = None) -> None:
    """Run from the command line."""
    parser = harness.command_line("masks", __doc__)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES[:2], help="of x (default the first two)")
    harness.run("masks", parser, measure, table, draw, arguments, key=("dtype", "shape"))


def shapes(quick: bool) -> list[Shape]:
    """Shapes (N, C, H, W): the N that comes closest to ELEMENTS from below, at most 256."""
    if quick:
        return [(4, 64, 14, 14), (2, 256, 7, 7)]
    grid = [
        (min(ELEMENTS // (channels * side * side), 256), channels, side, side)
        for side in MAPS
        for channels in CHANNELS
        if channels * side * side <= ELEMENTS
    ]
    return [*NAMED, *(shape for shape in grid if math.prod(shape) >= ELEMENTS // 4)]


def measure(options: argparse.Namespace) -> list[harness.Row]:
    """One row per shape and dtype."""
    rows = []
    for dtype in options.dtypes:
        for shape in shapes(options.quick):
            rows.append(measure_shape(shape, dtype, options))
            print(table(rows[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
    return rows


def measure_shape(shape: Shape, dtype: str, options: argparse.Namespace) -> harness.Row:
    """Seconds of every competitor on one map."""
    torch.manual_seed(options.seed)
    torch._dynamo.reset()
    x = torch.randn(shape, device=options.device).to(getattr(torch, dtype))
    gradient = torch.randn_like(torch.cat([x, x]))
    steps = {
        name: _forward_and_backward(operation, x, gradient) for name, operation in competitors(shape, x.device).items()
    }

    started = time.perf_counter()
    steps["R-Block, compiled"]()
    compile_seconds = time.perf_counter() - started
    seconds = harness.time_in_turns(steps, options.rounds or (5 if options.quick else 11), options.device)
    spreads = {name: harness.spread(values) for name, values in seconds.items()}
    saved = spreads["R-Block"]["median"] - spreads["R-Block, compiled"]["median"]
    return {
        "shape": list(shape),
        "elements": math.prod(shape),
        "dtype": dtype,
        "seconds": spreads,
        "over_cat": {name: harness.ratio(seconds[name], seconds["cat"]) for name in COMPETITORS},
        "over_eager": {name: harness.ratio(seconds[name], seconds["R-Block"]) for name in COMPETITORS},
        "over_compiled": {name: harness.ratio(seconds[name], seconds["R-Block, compiled"]) for name in COMPETITORS},
        "compile_seconds": compile_seconds,
        "compile_pays_after_steps": math.ceil(compile_seconds / saved) if saved > 0 else None,
    }


def competitors(shape: Shape, device: torch.device) -> dict[str, Callable[[Tensor], Tensor]]:
    """Name -> function from (N, C, H, W) to (2N, C, H, W)."""
    ours = build_mask("bdropdml", shape[1:], drop_prob=DROP_PROB, block_size=BLOCK_SIZE).to(device)
    gamma = describe(ours).sites[0].gamma
    timm_block = DropBlock2d(DROP_PROB, BLOCK_SIZE)
    torchvision_block = torchvision.ops.DropBlock2d(DROP_PROB, BLOCK_SIZE)
    return {
        "cat": lambda x: torch.cat([x, x]),
        "R-Block": ours,
        "R-Block, compiled": torch.compile(ours, fullgraph=True, dynamic=False),
        "plain ops": lambda x: fork_in_plain_operations(x, gamma),
        "timm": lambda x: timm_block(torch.cat([x, x])),
        "torchvision": lambda x: torchvision_block(torch.cat([x, x])),
    }


def fork_in_plain_operations(x: Tensor, gamma: float | None) -> Tensor:
    """BDropDML as Algorithm 1 reads: draws in float32, everything dense in the dtype of x."""
    rows, channels, height, width = x.shape
    centres = (torch.rand(rows, 1, height, width, device=x.device) < gamma).to(x.dtype)
    blocks = F.max_pool2d(centres, BLOCK_SIZE, stride=1, padding=BLOCK_SIZE // 2)
    first = (torch.rand(rows, channels, 1, 1, device=x.device) < 0.5).to(x.dtype)
    keep_1, keep_2 = 1 - blocks * first, 1 - blocks * (1 - first)
    mask_1 = keep_1 / keep_1.mean((1, 2, 3), keepdim=True)
    mask_2 = keep_2 / keep_2.mean((1, 2, 3), keepdim=True)
    return torch.cat([x * mask_1, x * mask_2])


def _forward_and_backward(operation: Callable[[Tensor], Tensor], x: Tensor, gradient: Tensor) -> Callable[[], object]:
    def step() -> None:
        inner = x.detach().requires_grad_()
        torch.autograd.grad(operation(inner), inner, gradient)

    return step


def table(rows: list[harness.Row]) -> str:
    """One line per shape and dtype: ratios to torch.cat."""
    header = ["N, C, H, W", "dtype", "M elements", "cat ms", *(f"{name} / cat" for name in COMPETITORS), "pays after"]
    lines = [
        [
            ", ".join(map(str, row["shape"])),
            row["dtype"],
            f"{row['elements'] / 1e6:.1f}",
            f"{1e3 * row['seconds']['cat']['median']:.2f}",
            *(f"{row['over_cat'][name]['median']:.2f}" for name in COMPETITORS),
            row["compile_pays_after_steps"],
        ]
        for row in rows
    ]
    return harness.format_table(header, lines)


def markdown(rows: list[harness.Row]) -> str:
    """The table of the READMEs: lowest, median and highest ratio over the maps, a column per dtype."""
    ratios = {
        "R-Block / torch.cat": ("over_cat", "R-Block"),
        "R-Block, compiled / torch.cat": ("over_cat", "R-Block, compiled"),
        "dense masks in plain operations / R-Block": ("over_eager", "plain ops"),
        "timm's DropBlock2d on the doubled batch / R-Block": ("over_eager", "timm"),
        "torchvision's DropBlock2d on the doubled batch / R-Block": ("over_eager", "torchvision"),
        "dense masks in plain operations / R-Block, compiled": ("over_compiled", "plain ops"),
        "timm's DropBlock2d on the doubled batch / R-Block, compiled": ("over_compiled", "timm"),
    }
    by_dtype = {
        dtype: [row for row in rows if row["dtype"] == dtype] for dtype in dict.fromkeys(r["dtype"] for r in rows)
    }
    lines = []
    for label, (ratio, name) in ratios.items():
        medians = [[row[ratio][name]["median"] for row in chosen] for chosen in by_dtype.values()]
        lines.append([label, *(f"{min(m):.2f}, {statistics.median(m):.2f}, {max(m):.2f}" for m in medians)])
    heads = [f"{dtype}, {len(chosen)} maps" for dtype, chosen in by_dtype.items()]
    return harness.format_markdown(["forward + backward: lowest, median, highest", *heads], lines)


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
        axes[-1, 0].set_xlabel("N x C x HxW, by number of elements")
        harness.add_legend(axes[0, 0])


if __name__ == "__main__":
    main()
