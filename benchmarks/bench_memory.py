"""Peak memory of a training step, by model and method, and its lower bound for two sub-models after a fork.

    python benchmarks/bench_memory.py                    # four networks, three to six minutes on one core
    python benchmarks/bench_memory.py --quick            # the smallest, on a small batch; writes nothing
    python benchmarks/bench_memory.py --models resnet50 --batch 32 --device cuda
    python benchmarks/bench_memory.py --show benchmarks/results/memory-cpu.json

A step is forward, loss, backward and SGD with momentum, whose buffers exist before it. Compared: the plain network;
timm's DropBlock2d after the last two stages; the batch doubled at the input; two forwards with one joint loss (as
R-Drop does it); R-Block (BDropDML) at the last two stages and at all, and at the classifier's input (R-Drop's masks).

Columns, in MB (1e6 bytes): `peak`, the most bytes of tensors that live at once; `allocator`, the same with buffers that
kernels allocate internally (on a CPU torch's profiler, on CUDA torch.cuda.max_memory_allocated); `activations`, the
tensors that autograd keeps between forward and backward. R-Block has two ideals, computed from a plain step whose
tensors made after the first site, in forward, loss and backward, count twice and all others (parameters, their
gradients, momentum, images, the part before the site) once: `ideal peak` and `ideal act.`. The map at the site counts
once if the part before it saves it, and twice more if the part after it does. `peak / ideal` includes fixed memory on
both sides, `act. / ideal` does not.
"""

import argparse
import contextlib
import gc
import pathlib
import sys
from collections.abc import Iterator

import torch
from torch import Tensor, nn

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from benchmarks import harness
from benchmarks.live_bytes import Life, LiveBytes, SavingParts, allocator_peak
from benchmarks.models import COLOURS, METHODS, MODELS, SITES, STUDIED, build_competitor, images_and_labels
from rblock_fx import describe

QUICK_MODELS, QUICK_BATCH = ("test_resnet",), 2


def main(arguments: list[str] | None = None) -> None:
    """Run from the command line."""
    parser = harness.command_line("memory", __doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=None, help=f"default {' '.join(STUDIED)}")
    parser.add_argument(
        "--batch", type=harness.positive, default=None, help="images in a batch (default: each network's own)"
    )
    parser.set_defaults(threads=1)
    harness.run("memory", parser, measure, table, draw, arguments, key=("model", "method", "batch"))


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
                first = describe(step.model).sites[0]
                site, is_head = first.path, first.is_head
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
        self.model, self.loss = build_competitor(name, method, device)
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

    def record(self, live: LiveBytes) -> None:
        """Train once under the recorder, and set the part of the step that runs."""
        gc.collect()
        live.add(self.fixed(), "fixed")
        live.part = "prefix"
        with live:
            loss = self.loss(self.model, self.images, self.labels)
            live.forward_events = len(live.events)
            loss.backward()  # type: ignore[no-untyped-call]
            gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
            for life in map(live.life_of, gradients):
                if life is not None:
                    life.part = "gradients"
            live.part = "optimizer"
            self.optimizer.step()
            self.optimizer.zero_grad()

    def measure(self) -> harness.Row:
        """Bytes at the peak, before the step, and kept between forward and backward."""
        live = LiveBytes()
        beyond = allocator_peak(lambda: self.record(live), self.device)
        rest = sum(life.size for life in live.lives if life.operation == "fixed")
        kept = sum(life.size for life in live.alive_after(live.forward_events)) - rest
        return {"peak": live.peak(), "allocator": rest + beyond, "rest": rest, "activations": kept}

    def ideal(self, site: str, is_head: bool) -> harness.Row:
        """Peak and activations of a plain step if all tensors made after the site existed twice."""
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


@contextlib.contextmanager
def _split(
    model: nn.Module, site: str, is_head: bool, recorder: LiveBytes | SavingParts, maps: list[Tensor] | None
) -> Iterator[None]:
    """Set the recorder's part where forward and backward pass the site; keep the map where a list is passed."""

    def set_prefix(_gradient: Tensor) -> None:
        recorder.part = "prefix"

    def pass_site(site_map: Tensor) -> None:
        if maps is not None:
            maps.append(site_map.detach())
        if isinstance(recorder, LiveBytes):
            life = recorder.life_of(site_map)
            if life is not None:
                life.part = "map"
        recorder.part = "suffix"
        site_map.register_hook(set_prefix)  # type: ignore[no-untyped-call]

    module = model.get_submodule(site)
    if is_head:
        handle = module.register_forward_pre_hook(lambda _module, args: pass_site(args[0]))
    else:
        handle = module.register_forward_hook(lambda _module, _args, output: pass_site(output))
    try:
        yield
    finally:
        handle.remove()


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


def markdown(rows: list[harness.Row]) -> str:
    """The table of the READMEs: peak of a step over the plain network's, and in brackets over the ideal."""
    methods = list(dict.fromkeys(row["method"] for row in rows if row["method"] != "plain"))
    plain = {row["model"]: row["peak"] for row in rows if row["method"] == "plain"}
    cells = {}
    for row in rows:
        ideal = f" ({row['peak'] / row['ideal_peak']:.3f})" if "ideal_peak" in row else ""
        cells[row["model"], row["method"]] = f"{row['peak'] / plain[row['model']]:.2f}{ideal}"
    lines = [[model, *(cells[model, method] for method in methods)] for model in plain]
    return harness.format_markdown(["peak / plain's (/ ideal)", *methods], lines)


def draw(rows: list[harness.Row], path: pathlib.Path) -> None:
    """Grouped bars of the peak over the plain network's, and for R-Block the ideal as a line across the bar."""
    plain = {row["model"]: row for row in rows if row["method"] == "plain"}
    models = list(plain)
    width = 0.85 / len(METHODS)
    with harness.figure(path, size=(2.4 + 2.1 * max(len(models), 2), 5)) as axes:
        axis = axes[0, 0]
        for row in rows:
            x = models.index(row["model"]) + (METHODS.index(row["method"]) - (len(METHODS) - 1) / 2) * width
            of_plain = plain[row["model"]]["peak"]
            height, ideal = row["peak"] / of_plain, row.get("ideal_peak", 0) / of_plain
            axis.bar(x, height, 0.92 * width, color=COLOURS[row["method"]], label=row["method"])
            text_at = max(height, ideal) + 0.03
            axis.text(x, text_at, f"{height:.2f}", ha="center", va="bottom", fontsize=7, rotation=90)
            if ideal:
                label = "ideal: twice after the first site, once before"
                axis.plot([x - width / 2, x + width / 2], [ideal, ideal], color="#c51b7d", linewidth=2, label=label)
        axis.axhline(1, color="#4d4d4d", linewidth=0.6, zorder=0)
        names = [
            f"{model}\n{row['batch']} x {harness.format_shape(row['input_size'])}\nplain: {row['peak'] / 1e6:.0f} MB"
            for model, row in plain.items()
        ]
        axis.set_xticks(range(len(models)), names)
        axis.set_ylim(0, 1.18 * max(row["peak"] / plain[row["model"]]["peak"] for row in rows))
        axis.set_ylabel("peak of a training step / plain network's")
        harness.add_legend(axis)


if __name__ == "__main__":
    main()
