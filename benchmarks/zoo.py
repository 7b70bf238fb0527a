"""Does every CNN of timm and torchvision convert, and keep its behaviour? One JSON line per architecture.

    python benchmarks/zoo.py run --workers 2      # resumable: architectures that have a line are skipped
    python benchmarks/zoo.py report               # results/zoo.json from the lines; then python benchmarks/readme.py

For each architecture: the conversion with default sites, without weights (seconds, sites, shapes, cost). Up to 30 M
parameters also the outputs, with weights, at the smallest image that the network accepts: evaluation bit-equal to the
plain model, names and order of the state_dict, 2N rows, gradients for the same parameters, halves that differ, and
halves that equal the plain training output at drop_prob 0.

Torchvision's detection, optical flow and quantized models are tried whole, and their backbones alone. Whether an
architecture of timm has maps at all is found without rblock_fx: from the outputs of the modules in its feature_info.
"""

import argparse
import copy
import fnmatch
import json
import multiprocessing
import os
import pathlib
import sys
import time
import warnings
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from benchmarks.environment import commit
from benchmarks.harness import positive
from benchmarks.zoo_models import PARTS, all_names, build_without_weights, family_of, runs
from benchmarks.zoo_outputs import compare_outputs
from benchmarks.zoo_report import LINES, read_lines, report
from rblock_fx import RBlockError, apply_rblock, describe, list_sites

LARGEST = 30e6  # parameters up to which weights are made

Line = dict[str, Any]


def examine(name: str) -> Line:
    """Everything about one architecture; never raises."""
    line: Line = {"name": name, "family": family_of(name), "commit": commit() or "unknown"}
    try:
        line |= examine_structure(name)
        line["maps"] = _has_maps(build_without_weights(name)) if name.startswith("timm/") else None
        if line["status"] == "converted" and line["parameters"] <= LARGEST:
            line["numbers"] = compare_outputs(line)
    except Exception as error:
        line |= {"status": "failed", "error": f"{type(error).__name__}: {error}"[:1000]}
    return line


def examine_structure(name: str) -> Line:
    """The conversion without weights."""
    model = build_without_weights(name)
    keys = [*model.state_dict()]
    side = PARTS.get(name.removeprefix("torchvision/")) or (299 if "inception_v3" in name else None)
    size = side and (3, side, side)
    line: Line = {"parameters": sum(parameter.numel() for parameter in model.parameters())}
    try:
        start = time.process_time()
        sites = list_sites(model, input_size=size)
        listed = time.process_time()
        apply_rblock(model, input_size=size)
    except RBlockError as error:
        return line | {"status": "refused", "error": f"{type(error).__name__}: {error}"[:160]}
    converted = time.process_time()
    made = describe(model)
    return line | {
        "status": "converted",
        "seconds": round(converted - listed, 3),
        "seconds_listing": round(listed - start, 3),
        "stages": [site.path for site in sites],
        "sites": [
            [site.path if mask.place is None else f"{site.path}[{mask.place}]", list(mask.shape), site.channel_axis]
            for site in made.sites
            for mask in site.masks
        ],
        "cost": round(made.cost, 4),
        "cost_before": round(min(site.cost_before for site in made.sites), 4),
        "early_fork_reason": made.early_fork_reason,
        "keys_equal": [*model.state_dict()] == keys,
        "input_size": list(made.input_size),
    }


def _has_maps(model: nn.Module) -> bool | None:
    """Whether a module in timm's feature_info returns a 4-D tensor, or a list with one; None if it does not run."""
    described = getattr(model, "feature_info", None) or []
    entries = getattr(described, "info", described)
    named = {entry["module"] for entry in entries if isinstance(entry, dict) and "module" in entry}
    found: list[bool] = []

    def record(_module: nn.Module, _inputs: Any, output: Any) -> None:
        items = output if isinstance(output, list | tuple) else [output]
        found.append(any(isinstance(item, Tensor) and item.dim() == 4 for item in items))

    weightless = copy.deepcopy(model).to("meta").eval()
    for path, module in weightless.named_modules():
        if path in named:
            module.register_forward_hook(record)
    size = model.pretrained_cfg["input_size"]  # type: ignore[index]
    return any(found) if runs(weightless, (2, *size)) else None


def run(only: str, workers: int) -> None:
    """Examine the architectures that have no line yet."""
    LINES.parent.mkdir(exist_ok=True)
    done = {line["name"] for line in read_lines()}
    missing = [name for name in all_names() if fnmatch.fnmatch(name, only) and name not in done]
    print(f"{len(done)} done, {len(missing)} to do")
    context = multiprocessing.get_context("spawn")
    # New processes now and then, since some models leave caches behind.
    with LINES.open("a") as file, context.Pool(workers, _quiet, maxtasksperchild=40) as pool:
        for count, line in enumerate(pool.imap_unordered(examine, missing), 1):
            file.write(json.dumps(line) + "\n")
            file.flush()
            if count % 25 == 0 or line["status"] == "failed":
                print(
                    f"{count}/{len(missing)} {line['name']}: {line['status']} {line.get('error', '')}"[:200], flush=True
                )


def _quiet() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)


def main(arguments: list[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run_parser = commands.add_parser("run", help="examine the architectures that have no line yet")
    run_parser.add_argument("--only", default="*", help="a glob over names such as timm/resnet50")
    run_parser.add_argument(
        "--workers", type=positive, default=os.cpu_count() or 1, help="processes of one thread each"
    )
    commands.add_parser("report", help="write results/zoo.json")
    options = parser.parse_args(arguments)
    if options.command == "run":
        run(options.only, options.workers)
    else:
        report(all_names())


if __name__ == "__main__":
    main()
