"""Time of a training step: R-Block, plain training, and the alternatives.

    python benchmarks/bench_step.py                  # four networks, eager and compiled; 40 minutes on two cores
    python benchmarks/bench_step.py --quick          # a tiny network, eager; some seconds
    python benchmarks/bench_step.py --models resnet50 --modes compiled --keep        # add to what the file has
    python benchmarks/bench_step.py --show benchmarks/results/step-cpu.json

A step is forward, loss, backward and SGD with momentum. Compared: the plain network; timm's DropBlock2d after the last
two stages; the batch doubled at the input; two forwards with one joint loss (as R-Drop does it); R-Block (BDropDML) at
the last two stages and at all, and at the classifier's input (R-Drop's masks). All methods of a network are alive in
one process and take their steps in turns. Ratios are taken within each round; median and quartiles are reported.

`FLOPs` is the count of torch.utils.flop_counter in forward and backward, over the plain network's: a lower bound on the
cost where arithmetic dominates. `over bound` is the time over plain divided by it. `compiled` is torch.compile of the
network (fullgraph) for every method; the loss and the optimizer stay eager.
"""

import argparse
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from benchmarks import harness
from benchmarks.models import COLOURS, METHODS, MODELS, STUDIED, build_competitor, images_and_labels

MODES = ("eager", "compiled")
QUICK_MODELS = ("test_resnet",)


def main(arguments: list[str] | None = None) -> None:
    """Run from the command line."""
    parser = harness.command_line("step", __doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=None, help=f"default {' '.join(STUDIED)}")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=None, help="default both; with --quick eager")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=None, help="compared with plain (default all)")
    parser.add_argument(
        "--batch", type=harness.positive, default=None, help="images in a batch (default: each network's own)"
    )
    parser.add_argument("--channels_last", action="store_true", help="channels-last memory format, for all")
    parser.add_argument("--autocast", choices=["bfloat16"], default=None, help="autocast to it, for all")
    harness.run(
        "step", parser, measure, table, draw, arguments, key=("model", "mode", "method", "batch", "layout", "dtype")
    )


def measure(options: argparse.Namespace) -> list[harness.Row]:
    """One row per network, mode and method."""
    names = options.models or (QUICK_MODELS if options.quick else STUDIED)
    wanted = options.methods or (("two forwards", "R-Block, last two") if options.quick else METHODS)
    methods = list(dict.fromkeys(["plain", *wanted]))
    modes = options.modes or (MODES[:1] if options.quick else MODES)
    rounds = options.rounds or (2 if options.quick else 11)
    rows = []
    for name in names:
        settings = MODELS[name]
        batch = options.batch or settings.batch
        for mode in modes:
            steps = {method: Step(name, method, batch, options) for method in methods}
            flops = {method: step.flops() for method, step in steps.items()}
            if mode == "compiled":
                torch._dynamo.reset()
                for step in steps.values():
                    step.compile()
            seconds = harness.time_in_turns(steps, rounds, options.device)
            for method in methods:
                over_plain = harness.ratio(seconds[method], seconds["plain"])
                bound = flops[method] / flops["plain"]
                rows.append(
                    {
                        "model": name,
                        "mode": mode,
                        "method": method,
                        "batch": batch,
                        "input_size": list(settings.input_size),
                        "layout": "channels_last" if options.channels_last else "contiguous",
                        "dtype": f"autocast {options.autocast}" if options.autocast else "float32",
                        "seconds": harness.spread(seconds[method]),
                        "over_plain": over_plain,
                        "flops": flops[method],
                        "flops_over_plain": bound,
                        "over_bound": over_plain["median"] / bound,
                    }
                )
            print(table(rows[-len(methods) :]), file=sys.stderr)
    return rows


class Step:
    """A training step of a network by one of METHODS; calling it trains once."""

    def __init__(self, name: str, method: str, batch: int, options: argparse.Namespace) -> None:
        torch.manual_seed(options.seed)
        self.device = options.device
        self.autocast = torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=bool(options.autocast))
        model, self.loss = build_competitor(name, method, options.device)
        self.images, self.labels = images_and_labels(name, batch, options.device)
        if options.channels_last:
            model.to(memory_format=torch.channels_last)
            self.images = self.images.to(memory_format=torch.channels_last)
        self.model: Callable[[Tensor], Tensor] = model
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)

    def compile(self) -> None:
        """Compile the network, not the loss."""
        self.model = torch.compile(self.model, fullgraph=True, dynamic=False)

    def forward(self) -> Tensor:
        """The loss of the batch."""
        with self.autocast:
            return self.loss(self.model, self.images, self.labels)

    def flops(self) -> int:
        """FLOPs of the matrix products and convolutions in forward and backward."""
        backward = {torch.ops.aten.convolution_backward: _convolution_backward_flops}
        with FlopCounterMode(display=False, custom_mapping=backward) as counter:
            self.forward().backward()  # type: ignore[no-untyped-call]
        self.optimizer.zero_grad()
        return int(counter.get_total_flops())

    def __call__(self) -> None:
        """Train once."""
        self.forward().backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad()


def _convolution_backward_flops(gradient: Any, images: Any, weight: Any, *settings: Any, **_: Any) -> int:
    """As many for each requested gradient as the forward has.

    The formula of torch 2.14 counts the weights' gradient of a grouped convolution `groups` times
    (https://github.com/pytorch/pytorch/pull/183405), so that depthwise layers would seem the most costly of a network.
    """
    _bias, _stride, _padding, _dilation, transposed, _output_padding, _groups, output_mask = settings
    return int(conv_flop_count(images, weight, gradient, transposed=transposed) * sum(output_mask[:2]))


def table(rows: list[harness.Row]) -> str:
    """One line per network, mode and method."""
    header = ["model", "mode", "method", "batch", "seconds", "/ plain", "quartiles", "FLOPs", "over bound"]
    lines = []
    for row in rows:
        over = row["over_plain"]
        line = [row["model"], row["mode"], row["method"], row["batch"], f"{row['seconds']['median']:.3f}"]
        line += [f"{over['median']:.3f}", "{:.3f}-{:.3f}".format(*over["quartiles"])]
        line += [f"{row['flops_over_plain']:.3f}", f"{row['over_bound']:.3f}"]
        lines.append(line)
    return harness.format_table(header, lines)


def markdown(rows: list[harness.Row]) -> str:
    """The table of the READMEs: time of a step over the plain network's, and in brackets over the FLOP bound."""
    methods = list(dict.fromkeys(row["method"] for row in rows if row["method"] != "plain"))
    cells = {
        (row["model"], row["mode"], row["method"]): f"{row['over_plain']['median']:.2f} ({row['over_bound']:.2f})"
        for row in rows
    }
    lines = [
        [f"{model}, {mode}", *(cells.get((model, mode, method), "not run") for method in methods)]
        for model, mode in dict.fromkeys((row["model"], row["mode"]) for row in rows)
    ]
    return harness.format_markdown(["step / plain's (/ FLOP bound)", *methods], lines)


def draw(rows: list[harness.Row], path: pathlib.Path) -> None:
    """Bars of the step over that of the plain network, the FLOP bound as a line across each, a panel per mode."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    width = 0.85 / len(methods)
    with harness.figure(path, rows=len(modes), size=(2.4 + 2.1 * len(models), 1.2 + 3.4 * len(modes))) as axes:
        for axis, mode in zip(axes[:, 0], modes, strict=True):
            for row in (row for row in rows if row["mode"] == mode):
                x = models.index(row["model"]) + (methods.index(row["method"]) - (len(methods) - 1) / 2) * width
                middle, (low, high) = row["over_plain"]["median"], row["over_plain"]["quartiles"]
                axis.bar(x, middle, 0.92 * width, color=COLOURS[row["method"]], label=row["method"])
                axis.plot([x, x], [low, high], color="black", linewidth=1)
                bound = row["flops_over_plain"]
                axis.plot([x - width / 2, x + width / 2], [bound, bound], color="#c51b7d", linewidth=2, label="FLOPs")
                top = max(high, bound) + 0.05
                axis.text(x, top, f"{middle:.2f}", ha="center", va="bottom", fontsize=7, rotation=90)
            axis.set_xticks(range(len(models)), models)
            axis.set_ylim(0, 1.2 * max(row["over_plain"]["quartiles"][1] for row in rows))
            axis.set_ylabel(f"{mode} step / plain's")
        harness.add_legend(axes[0, 0])


if __name__ == "__main__":
    main()
