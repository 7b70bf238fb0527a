"""Does every CNN of timm and torchvision convert, and stay what it was? One JSON line per architecture.

    python benchmarks/zoo.py run --workers 2      # resumable: what has its line is skipped
    python benchmarks/zoo.py run --only 'timm/resnet*'
    python benchmarks/zoo.py report               # results/zoo.json and the table of the README, from the lines

For each architecture: the conversion with default sites, without weights (seconds, sites, shapes, cost). For those of
up to 30 M parameters also with weights, at the smallest image that the network takes: evaluation bit-equal to the plain
model, names and order of the state_dict, 2N rows, gradients on just the parameters that had one, halves that differ,
and halves that equal the plain training output when nothing is dropped.

Torchvision's detection, optical flow and quantized models are tried as they are, and their backbones alone. Whether an
architecture of timm has maps at all is found without rblock_fx: from the outputs of the modules that its feature_info
names.
"""

import argparse
import collections
import copy
import fnmatch
import functools
import inspect
import json
import multiprocessing
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time
import warnings
from typing import Any

import timm
import torch
import torchvision
from timm.models import _registry
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torchvision.models import get_model_builder, list_models

from rblock_fx import RBlockError, apply_rblock, describe, list_sites, set_drop_prob, split_pair
from rblock_fx.dry_run import dry_run

ROOT = pathlib.Path(__file__).parent.parent
LINES = ROOT / "benchmarks" / "results" / "zoo.jsonl"
SUMMARY = ROOT / "benchmarks" / "results" / "zoo.json"
README = ROOT / "README.md"
MARKS = ("<!-- zoo: begin -->\n", "<!-- zoo: end -->")

# Parts of models that are refused whole, and the images that they take.
PARTS: dict[str, tuple[int, ...]] = {
    "fasterrcnn_resnet50_fpn.backbone": (3, 224, 224),
    "fasterrcnn_mobilenet_v3_large_fpn.backbone": (3, 224, 224),
    "fcos_resnet50_fpn.backbone": (3, 224, 224),
    "maskrcnn_resnet50_fpn_v2.backbone": (3, 224, 224),
    "retinanet_resnet50_fpn_v2.backbone": (3, 224, 224),
    "ssd300_vgg16.backbone": (3, 300, 300),
    "ssdlite320_mobilenet_v3_large.backbone": (3, 320, 320),
    "raft_large.feature_encoder": (3, 128, 128),
}
# Image sides tried in this order for the real numbers; the last resort is the side that the model was made for.
SIDES = (64, 96, 128, 160, 192, 224, 256, 288, 320)
DRAWS = 20  # a mask on a map of few positions may drop nothing


def all_names() -> list[str]:
    """Every architecture of timm and torchvision, and the parts of those that are refused whole."""
    return [
        *(f"timm/{name}" for name in timm.list_models()),
        *(f"torchvision/{name}" for name in list_models()),
        *(f"torchvision/{name} quantize=True" for name in list_models() if name.startswith("quantized_")),
        *(f"torchvision/{name}" for name in PARTS),
    ]


def family_of(name: str) -> str:
    """Name the module of timm or torchvision that defines an architecture."""
    source, model = name.split("/")
    if source == "timm":
        return f"timm {_registry._model_to_module[model]}"
    builder = get_model_builder(model.split(".")[0].split(" ")[0])
    kind = " ".join(builder.__module__.split(".")[2:])
    return f"torchvision {kind}" + (", part" if "." in model else ", integer" if " " in model else "")


def build(name: str) -> nn.Module:
    """Make a model with random weights; with its auxiliary heads, where it may have some."""
    source, model = name.split("/")
    if source == "timm":
        created: nn.Module = timm.create_model(model)
        return created
    model, _, option = model.partition(" ")
    base, _, part = model.partition(".")
    wanted = {"weights_backbone": None, "quantize": bool(option), "aux_loss": True}
    known = inspect.signature(get_model_builder(base)).parameters
    kwargs: dict[str, Any] = {key: value for key, value in wanted.items() if key in known}
    if base in ("googlenet", "inception_v3"):
        kwargs |= {"aux_logits": True, "init_weights": False}
    if base.startswith("lraspp"):
        kwargs.pop("aux_loss", None)
    whole: nn.Module = get_model_builder(base)(weights=None, **kwargs)
    return whole.get_submodule(part) if part else whole


def build_without_weights(name: str) -> nn.Module:
    """The same on the meta device, where the constructor allows it."""
    try:
        with torch.device("meta"):
            return build(name)
    except Exception:
        return build(name)


def examine(name: str, largest: float) -> dict[str, Any]:
    """Everything about one architecture; never raises."""
    line: dict[str, Any] = {"name": name, "family": family_of(name), "commit": _commit()}
    try:
        model = build_without_weights(name)
        line["parameters"] = sum(p.numel() for p in model.parameters())
        line["maps"] = _has_maps(model) if name.startswith("timm/") else None
        size = PARTS.get(name.removeprefix("torchvision/")) or (3, 299, 299) * ("inception_v3" in name) or None
        line |= _structure(model, size)
        if line["status"] == "converted" and line["parameters"] <= largest:
            line["numbers"] = _numbers(name, line)
    except Exception as error:
        line |= {"status": "failed", "error": f"{type(error).__name__}: {error}"[:1000]}
    return line


@functools.cache
def _commit() -> str:
    """The commit that is measured, with a mark where files have been changed since."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=10"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return described.stdout.strip() or "unknown"


def _has_maps(model: nn.Module) -> bool | None:
    """Whether a module that timm's feature_info names gives a 4-D tensor, or a list with one."""
    described = getattr(model, "feature_info", None) or []
    entries = getattr(described, "info", described)
    modules = dict(model.named_modules())
    found: list[bool] = []

    def record(_module: nn.Module, _inputs: Any, output: Any) -> None:
        items = output if isinstance(output, list | tuple) else [output]
        found.append(any(isinstance(item, Tensor) and item.dim() == 4 for item in items))

    model = copy.deepcopy(model).to("meta").eval()
    modules = dict(model.named_modules())
    for entry in entries:
        if isinstance(entry, dict) and entry.get("module") in modules:
            modules[entry["module"]].register_forward_hook(record)
    try:
        with dry_run():
            model(torch.empty(2, *model.pretrained_cfg["input_size"]))
    except Exception:
        return None
    return any(found)


def _structure(model: nn.Module, size: tuple[int, ...] | None) -> dict[str, Any]:
    keys = [*model.state_dict()]
    try:
        start = time.process_time()
        sites = list_sites(model, input_size=size)
        listing = time.process_time() - start
        start = time.process_time()
        apply_rblock(model, input_size=size)
    except RBlockError as error:
        return {"status": "refused", "error": f"{type(error).__name__}: {error}"[:160]}
    seconds = time.process_time() - start
    made = describe(model)
    return {
        "status": "converted",
        "seconds": round(seconds, 3),
        "seconds_listing": round(listing, 3),
        "stages": [site.path for site in sites],
        "sites": [[site.path, list(site.shape), site.channel_axis] for site in made.sites],
        "cost": round(made.cost, 4),
        "cost_before": round(min(site.cost_before for site in made.sites), 4),
        "early_fork_reason": made.early_fork_reason,
        "keys_equal": [*model.state_dict()] == keys,
        "input_size": list(made.input_size),
    }


def _numbers(name: str, line: dict[str, Any]) -> dict[str, Any]:
    """The same architecture with weights and images."""
    torch.manual_seed(0)
    model = build(name)
    size = _smallest_size(model, tuple(line["input_size"]))
    _without_chance(model)
    _without_zeros(model)
    x = torch.randn(2, *size)
    state = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        evaluated = _leaves(model.eval()(x))
    plain = _leaves(model.train()(x))
    with_gradient = _backward(model, plain)
    model.load_state_dict(state)

    # The sites of the full size: on a small image the last map may be too small to be a stage.
    sites = list(dict.fromkeys(path.split("[")[0] for path, _, _ in line["sites"]))
    apply_rblock(model, sites, input_size=size, drop_prob=0.2)
    with torch.no_grad():
        again = _leaves(model.eval()(x))
    model.train()

    set_drop_prob(model, 0.0)
    error = _largest_error(model(x), plain)
    model.load_state_dict(state)

    set_drop_prob(model, 0.2)
    for seed in range(DRAWS):
        torch.manual_seed(seed)
        output = model(x)
        first, second = map(_leaves, split_pair(output))
        differ = not all(map(torch.equal, first, second))
        if differ:
            break
    trained = _backward(model, _leaves(output))
    return {
        "input_size": list(size),
        "eval_equal": len(again) == len(evaluated) and all(map(torch.equal, again, evaluated)),
        "keys_equal": [*model.state_dict()] == [*state],
        "rows_doubled": [leaf.shape[0] for leaf in _leaves(output)] == [2 * leaf.shape[0] for leaf in plain],
        "halves_differ": differ,
        "undropped_error": error,
        # Rounding: batch norm over a batch of two on maps of one position blows it up.
        **({"undropped_error_float64": _error_in_double(name, sites, size)} if error > 1e-4 else {}),
        "gradients_equal": trained == with_gradient,
        "gradients_finite": all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None),
        "plain_finite": all(bool(leaf.isfinite().all()) for leaf in plain),
    }


def _error_in_double(name: str, sites: list[str], size: tuple[int, ...]) -> float:
    torch.manual_seed(0)
    model = build(name).double()
    _without_chance(model)
    _without_zeros(model)
    x = torch.randn(2, *size, dtype=torch.float64)
    state = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        plain = _leaves(model.train()(x))
        model.load_state_dict(state)
        return _largest_error(apply_rblock(model, sites, input_size=size, drop_prob=0.0)(x), plain)


def _largest_error(pair: Any, plain: list[Tensor]) -> float:
    """Of both halves, as a share of the largest plain value."""
    return max(
        float((a - b).abs().max() / b.abs().max().clamp(min=1e-12))
        for half in split_pair(pair)
        for a, b in zip(_leaves(half), plain, strict=True)
    )


def _smallest_size(model: nn.Module, native: tuple[int, ...]) -> tuple[int, ...]:
    """The smallest image on which the plain model runs in both modes, found without weights."""
    weightless = copy.deepcopy(model).to("meta")
    for side in (*(side for side in SIDES if side < native[-1]), None):
        size = native if side is None else (*native[:-2], side, side)
        try:
            with dry_run():
                for training in (False, True):
                    weightless.train(training)(torch.empty(2, *size))
            return size
        except Exception:
            continue
    return native


def _without_chance(model: nn.Module) -> None:
    """Switch off the network's own dropout and stochastic depth, so that its outputs can be compared."""
    for module in model.modules():
        for attribute in ("p", "drop_prob", "drop_rate", "attn_drop_rate"):
            if isinstance(getattr(module, attribute, None), float):
                setattr(module, attribute, 0.0)


def _without_zeros(model: nn.Module) -> None:
    """Fill parameters that start at zero: a zero head or residual branch would hide what is done before it."""
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(0.0, 0.1)


def _leaves(output: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def _backward(model: nn.Module, leaves: list[Tensor]) -> set[str]:
    """The names of the parameters that get a gradient."""
    model.zero_grad(set_to_none=True)
    torch.autograd.backward(sum(leaf.float().square().mean() for leaf in leaves if leaf.requires_grad))
    return {name for name, parameter in model.named_parameters() if parameter.grad is not None}


def run(only: str, workers: int, largest: float) -> None:
    """Examine what has no line yet."""
    LINES.parent.mkdir(exist_ok=True)
    done = {line["name"] for line in _read_lines()}
    missing = [name for name in all_names() if fnmatch.fnmatch(name, only) and name not in done]
    print(f"{len(done)} done, {len(missing)} to do")
    context = multiprocessing.get_context("spawn")
    # A fresh process now and then, since some models leave caches behind.
    with LINES.open("a") as file, context.Pool(workers, _quiet, maxtasksperchild=40) as pool:
        for count, line in enumerate(pool.imap_unordered(functools.partial(examine, largest=largest), missing), 1):
            file.write(json.dumps(line) + "\n")
            file.flush()
            if count % 25 == 0 or line["status"] == "failed":
                print(
                    f"{count}/{len(missing)} {line['name']}: {line['status']} {line.get('error', '')[:150]}", flush=True
                )


def _quiet() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)


def _read_lines() -> list[dict[str, Any]]:
    if not LINES.exists():
        return []
    return [json.loads(text) for text in LINES.read_text().splitlines() if text.strip()]


def report(write_readme: bool) -> None:
    """Write the summary from the lines, and the table from the summary."""
    known = {line["name"]: line for line in _read_lines()}
    missing = [name for name in all_names() if name not in known]
    if missing:
        sys.exit(f"{len(missing)} architectures have no line yet, e.g. {missing[:3]}: python benchmarks/zoo.py run")
    summary = summarise([known[name] for name in all_names()])
    lines = ",\n".join(json.dumps(line) for line in summary["architectures"])
    text = json.dumps({**summary, "architectures": []}, indent=1)
    SUMMARY.write_text(text.replace('"architectures": []', f'"architectures": [\n{lines}\n]') + "\n")
    print(json.dumps({key: value for key, value in summary.items() if key != "architectures"}, indent=1))
    table = markdown_table(summary["architectures"])
    print(table)
    if write_readme:
        before, _, rest = README.read_text().partition(MARKS[0])
        _, _, after = rest.partition(MARKS[1])
        README.write_text(before + MARKS[0] + table + MARKS[1] + after)


def summarise(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts over all architectures, versions and machine, and the lines themselves."""
    converted = [line for line in lines if line["status"] == "converted"]
    numbers = [line["numbers"] for line in converted if "numbers" in line]
    small = sorted(line["seconds"] for line in converted if line["parameters"] <= 100e6)
    checks = ("eval_equal", "keys_equal", "rows_doubled", "halves_differ", "gradients_equal", "gradients_finite")
    return {
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "timm": timm.__version__,
        },
        "commits": dict(collections.Counter(line["commit"] for line in lines)),
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "architectures_tried": len(lines),
        "timm": len([line for line in lines if line["name"].startswith("timm/")]),
        "timm_with_maps": len([line for line in lines if line["maps"]]),
        "timm_with_maps_converted": len([line for line in converted if line["maps"]]),
        "status": dict(collections.Counter(line["status"] for line in lines)),
        "refusals": _refusals(lines),
        "early_forks": {line["name"]: line["early_fork_reason"] for line in converted if line["early_fork_reason"]},
        "keys_equal": sum(line["keys_equal"] for line in converted),
        "conversion_seconds_up_to_100M_parameters": {
            "architectures": len(small),
            "median": statistics.median(small),
            "95th_percentile": small[int(0.95 * len(small))],
            "largest": small[-1],
            "above_one_second": [
                f"{line['name']}: {line['seconds']}"
                for line in converted
                if line["seconds"] > 1 and line["parameters"] <= 100e6
            ],
        },
        "listing_seconds_largest": max(line["seconds_listing"] for line in converted),
        "with_weights": {
            "architectures": len(numbers),
            **{check: sum(number[check] for number in numbers) for check in checks},
            "undropped_error_up_to_1e-4": sum(_undropped(number) <= 1e-4 for number in numbers),
            "exceptions": {
                line["name"]: line["numbers"]
                for line in converted
                if "numbers" in line
                and not (all(line["numbers"][check] for check in checks) and _undropped(line["numbers"]) <= 1e-4)
            },
        },
        "architectures": lines,
    }


def _undropped(number: dict[str, Any]) -> float:
    """The error, in double precision where single is not enough."""
    return number.get("undropped_error_float64", number["undropped_error"])


def _refusals(lines: list[dict[str, Any]]) -> dict[str, list[str]]:
    """The names of what is refused, by the reason without names and numbers of the model."""
    reasons: dict[str, list[str]] = collections.defaultdict(list)
    for line in lines:
        if line["status"] == "refused":
            text = line["error"]
            reason = "no stage with a feature map" if "has no stage" in text else " ".join(text.split(" ")[2:14])
            reasons[reason].append(line["name"])
    return dict(reasons)


def markdown_table(lines: list[dict[str, Any]]) -> str:
    """One row per family."""
    families: dict[str, list[dict[str, Any]]] = collections.defaultdict(list)
    for line in lines:
        families[line["family"]].append(line)
    rows = ["| family | tried | converted | with weights | cost | seconds |", "|---|---|---|---|---|---|"]
    for family in sorted(families):
        members = families[family]
        converted = [line for line in members if line["status"] == "converted"]
        costs = [line["cost"] for line in converted]
        seconds = [line["seconds"] for line in converted]
        rows.append(
            f"| {family} | {len(members)} | {len(converted)} | {sum('numbers' in line for line in converted)} | "
            + (f"{min(costs):.2f}-{max(costs):.2f} | {statistics.median(seconds):.2f} |" if converted else "- | - |")
        )
    return "\n".join(rows) + "\n"


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run", help="examine what has no line yet")
    runs.add_argument("--only", default="*", help="a glob over names such as timm/resnet50")
    runs.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes of one thread each")
    runs.add_argument("--largest", type=float, default=30e6, help="parameters up to which weights are made")
    reports = commands.add_parser("report", help="write results/zoo.json")
    reports.add_argument("--readme", action="store_true", help="write the table of the README too")
    options = parser.parse_args()
    if options.command == "run":
        run(options.only, options.workers, options.largest)
    else:
        report(options.readme)


if __name__ == "__main__":
    main()
