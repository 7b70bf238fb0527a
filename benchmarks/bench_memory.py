"""Peak memory of a training step, by model and method, beside the least that two sub-models behind a fork can need.

    python benchmarks/bench_memory.py                    # five networks, three to six minutes on one core
    python benchmarks/bench_memory.py --quick            # two of them on small batches, about 20 s, writes nothing
    python benchmarks/bench_memory.py --models resnet50 --batch 32 --device cuda
    python benchmarks/bench_memory.py --show benchmarks/results/memory-cpu.json

A step is forward, loss, backward and SGD with momentum, whose buffers exist before it. Compared: the plain network;
timm's DropBlock2d behind the last two stages; the batch doubled at the input, torch.cat([x, x]); two forwards with one
joint loss (R-Drop's way); R-Block (BDropDML) at the last two stages and at all, and at the classifier's input (R-Drop's
masks).

Columns, in MB (1e6 bytes): `peak`, the most bytes of tensors that live at once; `allocator`, the same with what kernels
allocate within themselves (on a CPU torch's profiler, on CUDA torch.cuda.max_memory_allocated); `activations`, what
lives between forward and backward but did not before the step, which is what autograd has saved. For R-Block two ideals
stand beside them, both of the plain network's own step, in which everything made behind the first site, in forward,
loss and backward, is counted twice, and all else (parameters, their gradients, momentum, images, the part before the
site) once: `ideal peak`, and `ideal act.`, which is the activations of the part before the site and twice those of the
part behind it. The map at the site counts once if the part before saves it, and twice more if the part behind does.
`peak / ideal` has fixed memory on both sides, `act. / ideal` has none.
"""

import argparse
import functools
import gc
import os
import pathlib
import sys
from typing import Any, cast

import torch
from torch import Tensor, nn

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from benchmarks import harness
from benchmarks.live_bytes import Life, LiveBytes, SavingParts, allocator_peak
from benchmarks.methods import COLOURS, METHODS, SITES, competitor
from benchmarks.models import MODELS, STUDIED, images_and_labels

QUICK_MODELS = ("resnet18", "convnext_atto")
QUICK_BATCH = 2


def main() -> None:
    """Run from the command line."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # the profiler's notices of starting and stopping
    parser = harness.command_line("memory", __doc__)
    known = f"networks (default {' '.join(STUDIED)})"
    parser.add_argument("--models", nargs="+", choices=MODELS, default=None, help=known)
    parser.add_argument("--batch", type=int, default=None, help="images in a batch (default: each network's own)")
    parser.set_defaults(threads=1)
    harness.run("memory", parser, measure, table, draw)


def measure(options: argparse.Namespace) -> list[harness.Row]:
    """One row per network and method. Bytes are exact, so rounds would repeat them."""
    names = options.models or (QUICK_MODELS if options.quick else STUDIED)
    rows = []
    for name in names:
        settings = MODELS[name]
        batch = options.batch or (QUICK_BATCH if options.quick else settings.batch)
        ideals: dict[str, harness.Row] = {}
        for method in METHODS:
            torch.manual_seed(options.seed)
            step = Step(name, method, batch, options.device)
            row: harness.Row = {"model": name, "method": method, "batch": batch}
            row |= {"input_size": list(settings.input_size), **step.measure()}
            if method in SITES:
                site, is_head = step.first_site()
                if site not in ideals:
                    torch.manual_seed(options.seed)
                    ideals[site] = Step(name, "plain", batch, options.device).ideal(site, is_head)
                row |= {"first_site": site, **ideals[site]}
            rows.append(row)
            print(f"{name}, {method}: {row['peak'] / 1e6:.1f} MB", file=sys.stderr, flush=True)
    return rows


class Step:
    """A training step of a network by one of METHODS."""

    def __init__(self, name: str, method: str, batch: int, device: str) -> None:
        self.device = device
        self.model, self.loss = competitor(name, method, device)
        self.images, self.labels = images_and_labels(name, batch, device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9)
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def fixed(self) -> list[Tensor]:
        """What lives before the step and after it."""
        momentum = [state["momentum_buffer"] for state in self.optimizer.state.values()]
        return [*self.model.parameters(), *self.model.buffers(), *momentum, self.images, self.labels]

    def __call__(self, live: LiveBytes | None = None) -> None:
        """Train once, telling the recorder which part of the step runs."""
        loss = self.loss(self.model, self.images, self.labels)
        if live is not None:
            live.forward_events = len(live.events)
        loss.backward()  # type: ignore[no-untyped-call]
        if live is not None:
            gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
            for life in map(live.life_of, gradients):
                if life is not None:
                    life.part = "gradients"
            live.part = "optimizer"
        self.optimizer.step()
        self.optimizer.zero_grad()

    def record(self, live: LiveBytes) -> None:
        """Train once under the recorder."""
        gc.collect()
        live.add(self.fixed(), "fixed")
        live.part = "prefix"
        with live:
            self(live)

    def measure(self) -> harness.Row:
        """Bytes at the peak, before the step, and kept between forward and backward."""
        live = LiveBytes()
        beyond = allocator_peak(lambda: self.record(live), self.device)
        rest = sum(life.size for life in live.lives if life.operation == "fixed")
        kept = sum(life.size for life in live.alive_after(live.forward_events)) - rest
        return {"peak": live.peak(), "allocator": rest + beyond, "rest": rest, "activations": kept}

    def first_site(self) -> tuple[str, bool]:
        """Path of the first module whose output is masked, or, for a head, whose input is."""
        site, _ = cast(Any, self.model).rblock.conversion.masks[0]
        return site.path, site.is_head

    def ideal(self, site: str, is_head: bool) -> harness.Row:
        """Peak and activations of a plain step in which everything behind the site were there twice."""
        saving = SavingParts()
        maps: list[Tensor] = []
        hooks = torch.autograd.graph.saved_tensors_hooks(saving, lambda tensor: tensor)
        with hooks, _split(self.model, site, is_head, saving, maps):
            self.loss(self.model, self.images, self.labels)
        weight_of_map = sum({"prefix": 1, "suffix": 2}[part] for part in saving.saving(maps[0]))
        maps.clear()
        del saving

        parameters = {tuple(parameter.shape) for parameter in self.model.parameters()}
        live = LiveBytes()
        with _split(self.model, site, is_head, live, None):
            self.record(live)

        def weight(life: Life) -> int:
            if life.part == "map":
                return weight_of_map
            # Batch norm's statistics and the terms of a weight's gradient have no batch axis to be there twice.
            return 2 if life.part == "suffix" and life.shape not in parameters else 1

        kept = sum(
            weight(life) * life.size for life in live.alive_after(live.forward_events) if life.operation != "fixed"
        )
        return {"ideal_peak": live.peak(weight), "ideal_activations": kept}


def _split(
    model: nn.Module, site: str, is_head: bool, recorder: LiveBytes | SavingParts, maps: list[Tensor] | None
) -> "_Hook":
    """Tell the recorder where the network passes the site, forward and backward; keep the map where a list is given."""

    def passed(site_map: Tensor) -> None:
        if maps is not None:
            maps.append(site_map.detach())
        if isinstance(recorder, LiveBytes):
            life = recorder.life_of(site_map)
            if life is not None:
                life.part = "map"
        recorder.part = "suffix"
        site_map.register_hook(functools.partial(_back_in_prefix, recorder))  # type: ignore[no-untyped-call]

    module = model.get_submodule(site)
    if is_head:
        return _Hook(module.register_forward_pre_hook(lambda _module, args: passed(args[0])))
    return _Hook(module.register_forward_hook(lambda _module, _args, output: passed(output)))


def _back_in_prefix(recorder: LiveBytes | SavingParts, _gradient: Tensor) -> None:
    recorder.part = "prefix"


class _Hook:
    """A hook that is there in a with-block."""

    def __init__(self, handle: torch.utils.hooks.RemovableHandle) -> None:
        self.handle = handle

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_error: object) -> None:
        self.handle.remove()


def table(rows: list[harness.Row]) -> str:
    """One line per network and method, in MB and ratios."""
    header = ["model", "batch", "method", "peak", "allocator", "activations", "/ plain", "/ two forwards"]
    header += ["ideal peak", "ideal act.", "peak / ideal", "act. / ideal"]
    lines = []
    for row in rows:
        others = {other["method"]: other for other in rows if other["model"] == row["model"]}
        line = [row["model"], row["batch"], row["method"]]
        line += [f"{row[key] / 1e6:.1f}" for key in ("peak", "allocator", "activations")]
        line += [f"{row['peak'] / others[other]['peak']:.3f}" for other in ("plain", "two forwards")]
        if "ideal_peak" in row:
            line += [f"{row[key] / 1e6:.1f}" for key in ("ideal_peak", "ideal_activations")]
            line += [f"{row['peak'] / row['ideal_peak']:.4f}", f"{row['activations'] / row['ideal_activations']:.4f}"]
        lines.append(line + [None] * (len(header) - len(line)))
    return harness.format_table(header, lines)


def draw(rows: list[harness.Row], path: pathlib.Path) -> None:
    """Grouped bars of the peak over that of the plain network, and for R-Block the ideal as a line across the bar."""
    models = list(dict.fromkeys(row["model"] for row in rows))

    width = 0.85 / len(METHODS)
    with harness.figure(path, size=(2.4 + 2.1 * len(models), 5)) as axes:
        (axis,) = axes[0]
        labelled = False
        for row in rows:
            plain = next(other for other in rows if other["model"] == row["model"] and other["method"] == "plain")
            place = METHODS.index(row["method"])
            x = models.index(row["model"]) + (place - (len(METHODS) - 1) / 2) * width
            first = row["model"] == models[0]
            height = row["peak"] / plain["peak"]
            axis.bar(x, height, 0.92 * width, color=COLOURS[row["method"]], label=row["method"] if first else None)
            top = max(row["peak"], row.get("ideal_peak", 0)) / plain["peak"]
            axis.text(x, top + 0.03, f"{height:.2f}", ha="center", va="bottom", fontsize=7, rotation=90)
            if "ideal_peak" in row:
                ideal = row["ideal_peak"] / plain["peak"]
                label = None if labelled else "ideal: behind the first site twice, all else once"
                axis.plot([x - width / 2, x + width / 2], [ideal, ideal], color="#c51b7d", linewidth=2, label=label)
                labelled = True
        axis.axhline(1, color="#4d4d4d", linewidth=0.6, zorder=0)
        names = [
            f"{model}\n{row['batch']} x {'x'.join(map(str, row['input_size']))}\nplain: {row['peak'] / 1e6:.0f} MB"
            for model in models
            for row in rows
            if row["model"] == model and row["method"] == "plain"
        ]
        axis.set_xticks(range(len(models)), names)
        axis.set_ylim(0, 1.18 * max(row["peak"] / _plain_peak(rows, row["model"]) for row in rows))
        axis.set_ylabel("peak of a training step / plain network's")
        axis.spines[["top", "right"]].set_visible(False)
        axis.figure.legend(loc="outside upper center", ncols=4, fontsize=8, frameon=False)


def _plain_peak(rows: list[harness.Row], model: str) -> int:
    peak: int = next(row["peak"] for row in rows if row["model"] == model and row["method"] == "plain")
    return peak


if __name__ == "__main__":
    main()
