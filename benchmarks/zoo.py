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
import copy
import fnmatch
import functools
import inspect
import json
import multiprocessing
import os
import pathlib
import sys
import time
import warnings
from typing import Any

import timm
import torch
from timm.models import _registry
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torchvision.models import get_model_builder, list_models

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from benchmarks.environment import commit
from benchmarks.zoo_report import LINES, read_lines, report
from rblock_fx import RBlockError, apply_rblock, describe, list_sites, set_drop_prob, split_pair

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
    line: dict[str, Any] = {"name": name, "family": family_of(name), "commit": commit() or "unknown"}
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
        with torch.no_grad(), torch.device("meta"):
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
            with torch.no_grad(), torch.device("meta"):
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
    done = {line["name"] for line in read_lines()}
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
        report(all_names(), options.readme)


if __name__ == "__main__":
    main()
