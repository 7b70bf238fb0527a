"""How does R-Block scale from one process to several under Accelerate, beside plain training, and as predicted?

    python benchmarks/bench_scaling.py            # one and two CPU processes: results/scaling-cpu.json and .png
    python benchmarks/bench_scaling.py --quick    # a tiny model, to see that it works
    python benchmarks/bench_scaling.py --show benchmarks/results/scaling-cpu.json

Weak scaling: every process trains on its own batch, with --threads threads. Both methods live in the same processes and
take their steps in turns (scaling_worker.py), so the ratio of their steps is paired round by round, within one process
count. The efficiency of a method is its step on one process over its step on N; R-Block's over plain's is the ratio of
the two step ratios, so it does not suffer from the time that lies between the launches, which alternate besides.

The cost model (cost_model.py is its text and its formulas) predicts the step ratio: on one process from `list_sites`
alone, on N with one measured number of plain training, communication over compute. Beside its FLOPs and activation
bytes stand those that were counted. The last table is a prediction for GPUs from --flops and --bandwidth, which are
assumptions: no GPU was measured for it.
"""

import argparse
import statistics

import cost_model
import counters
import harness
import scaling_worker
import timm
import torch
from harness import Row
from scaling_draw import draw, table
from scaling_launch import launch

from rblock_fx import apply_rblock, list_sites

# Batch per process and image size: a step of a fraction of a second on one core.
CASES: dict[str, Row] = {
    "cifar_resnet18": {"image": 32, "batch": 8},
    "vgg11_bn": {"image": 32, "batch": 16},  # the most parameters for its compute
    "efficientnet_b0": {"image": 64, "batch": 8},
}
QUICK_CASES: dict[str, Row] = {"test_resnet": {"image": 64, "batch": 8}}
PREDICTED_MODELS = ("resnet50", "vgg16_bn", "efficientnet_b0")
PREDICTED_DEVICES = (1, 2, 8, 64)

STEP, UPDATE = 0, 1  # what a worker gives of every step

Found = dict[int, list[Row]]  # the results of the launches by the number of processes


def main() -> None:
    """Read the options, measure or show."""
    parser = harness.command_line("scaling", __doc__)
    devices = torch.cuda.device_count()
    parser.set_defaults(threads=1, device="cuda" if devices > 1 else "cpu")
    parser.add_argument("--processes", type=int, default=2, help="compared with one (default 2)")
    parser.add_argument("--launches", type=int, default=2, help="of either process count, in turns (default 2)")
    parser.add_argument("--models", nargs="+", choices=[*CASES, *QUICK_CASES], help="default the first three")
    parser.add_argument("--timeout", type=float, default=600, help="seconds that a launch may take (default 600)")
    parser.add_argument(
        "--flops", type=float, default=40e12, help="predictions: FLOP/s that a GPU achieves, assumed (default 40e12)"
    )
    parser.add_argument(
        "--bandwidth", type=float, default=25e9, help="predictions: bytes/s that a GPU sends, assumed (default 25e9)"
    )
    parser.add_argument("--gpu_batch", type=int, default=64, help="predictions: images per GPU (default 64)")
    harness.run("scaling", parser, measure, table, draw)


def measure(options: argparse.Namespace) -> list[Row]:
    """Launch all processes, then compare what they found with the model."""
    if options.processes < 2:
        raise SystemExit(f"--processes {options.processes} is compared with one process; expected 2 or more")
    launches = 1 if options.quick else options.launches
    rounds = options.rounds or (3 if options.quick else 4 * launches)
    names = options.models or (QUICK_CASES if options.quick else CASES)
    cases = [describe_case(name, **(CASES | QUICK_CASES)[name]) for name in names]
    found: Found = {1: [], options.processes: []}
    for turn in range(launches):
        for processes, results in found.items():
            results.append(launch(job(cases, options, processes, -(-rounds // launches), turn), options.timeout))
    rows = [compare(case, selection, found, options.processes) for case in cases for selection in case["selections"]]
    models = PREDICTED_MODELS[:1] if options.quick else PREDICTED_MODELS
    return rows + [row for name in models for row in predict(name, options)]


def describe_case(name: str, image: int, batch: int) -> Row:
    """A model, its sites, and what the cost model and the counters say about it."""
    size = (3, image, image)
    stages = list_sites(scaling_worker.build_model(name), size)
    model = scaling_worker.build_model(name)
    images = torch.randn(2, *size)
    plain = {"flops": counters.training_flops(model, images), "bytes": counters.saved_bytes(model, images)}
    chosen = {"last two": stages[-2:], "all": stages[:]}
    selections = {key: [site.path for site in sites] for key, sites in chosen.items()}
    costs = {}
    for key, sites in chosen.items():
        converted = apply_rblock(scaling_worker.build_model(name), selections[key], input_size=size)
        low, high = cost_model.flop_ratio_bounds(sites, stages)
        costs[key] = {
            "share_before_fork": cost_model.share_before_fork(sites),
            "flop_ratio": {
                "predicted": cost_model.flop_ratio(sites),
                "bounds": [low, high],
                "counted": counters.training_flops(converted, images) / plain["flops"],
            },
            "activation_ratio": {
                "predicted": cost_model.activation_ratio(cost_model.activation_share_before(sites, stages)),
                "counted": counters.saved_bytes(converted, images) / plain["bytes"],
            },
        }
    return {
        "model": name,
        "image": image,
        "batch": batch,
        "gradient_bytes": 4 * sum(parameter.numel() for parameter in model.parameters()),
        "training_flops": plain["flops"] / len(images),
        "selections": selections,
        "costs": costs,
    }


def job(cases: list[Row], options: argparse.Namespace, processes: int, rounds: int, turn: int) -> Row:
    """What one launch does."""
    return {
        "processes": processes,
        "threads": options.threads,
        "device": options.device,
        "seed": options.seed + turn,
        "rounds": rounds,
        "cases": [{key: case[key] for key in ("model", "image", "batch", "selections")} for case in cases],
    }


def compare(case: Row, selection: str, found: Found, many: int) -> Row:
    """Step ratios and efficiencies as measured, and the model's predictions of them."""
    model = case["model"]
    plain, rblock = ({n: seconds(found[n], model, name) for n in found} for name in ("plain", selection))
    alone = seconds(found[many], model, "plain, alone")
    ratios = {n: [of / to for of, to in zip(rblock[n], plain[n], strict=True)] for n in found}
    shares = plain_shares(plain[many], alone, seconds(found[many], model, "plain, alone", UPDATE))
    efficiency = {
        "plain": harness.spread(quotients(plain[1], plain[many])),
        "rblock": harness.spread(quotients(rblock[1], rblock[many])),
        "ratio": harness.spread(quotients(ratios[1], ratios[many])),
    }
    row = {
        "kind": "measured",
        **{key: case[key] for key in ("model", "image", "batch", "gradient_bytes", "training_flops")},
        "selection": selection,
        "sites": case["selections"][selection],
        **case["costs"][selection],
        "processes": many,
        "world_sizes": sorted({result["world_size"] for results in found.values() for result in results}),
        "threads": found[many][0]["threads"],
        "seconds": {
            method: {str(n): harness.spread(times[n]) for n in found}
            for method, times in {"plain": plain, "rblock": rblock}.items()
        },
        "contention": harness.spread(quotients(alone, plain[1]))["median"],
        "shares": shares,
        "step_ratio": {str(n): harness.spread(ratios[n]) for n in found},
        "step_ratio_alone": harness.ratio(seconds(found[many], model, f"{selection}, alone"), alone),
        "efficiency": efficiency,
    }
    return row | {"predictions": check(row, compute_ratio(found[1], model, selection))}


def check(row: Row, compute_ratio: float) -> Row:
    """The model's predictions beside what was measured; the third is for telling its two halves' errors apart."""
    many, shares, ratio = row["processes"], row["shares"], row["flop_ratio"]["predicted"]
    one, all_of_them = row["step_ratio"]["1"], row["step_ratio"][str(many)]
    return {
        "one process, list_sites alone": judged(cost_model.step_ratio(ratio), one),
        "one process, by activations": judged(row["activation_ratio"]["predicted"], one),
        f"{many} processes, list_sites, k and u": judged(cost_model.step_ratio(ratio, **shares), all_of_them),
        f"{many} processes, measured compute, k and u": judged(
            cost_model.step_ratio(compute_ratio, **shares), all_of_them
        ),
        "efficiency ratio, list_sites, k and u": judged(
            cost_model.efficiency_ratio(ratio, **shares), row["efficiency"]["ratio"]
        ),
    }


def seconds(results: list[Row], model: str, name: str, part: int = STEP) -> list[float]:
    """Of all rounds of all launches, the whole step or the update."""
    return [turn[part] for result in results for turn in result["cases"][model][name]]


def plain_shares(together: list[float], alone: list[float], update: list[float]) -> dict[str, float]:
    """Communication and update of a plain step over its compute: what sharing gradients adds, and what SGD takes."""
    compute = statistics.median(step - part for step, part in zip(alone, update, strict=True))
    communication = statistics.median(shared - step for shared, step in zip(together, alone, strict=True))
    return {"communication": max(communication, 0.0) / compute, "update": statistics.median(update) / compute}


def compute_ratio(results: list[Row], model: str, selection: str) -> float:
    """Forward and backward of R-Block over those of plain training."""
    of, to = (
        [
            step - update
            for step, update in zip(*(seconds(results, model, name, p) for p in (STEP, UPDATE)), strict=True)
        ]
        for name in (selection, "plain")
    )
    return float(harness.ratio(of, to)["median"])


def quotients(of: list[float], to: list[float]) -> list[float]:
    """Every value over every other: rounds of different launches are no pairs."""
    return [numerator / denominator for numerator in of for denominator in to]


def judged(predicted: float, measured: Row) -> Row:
    """A prediction beside the median that was measured, and its relative error."""
    return {
        "predicted": predicted,
        "measured": measured["median"],
        "quartiles": measured["quartiles"],
        "error": predicted / measured["median"] - 1,
    }


def predict(name: str, options: argparse.Namespace) -> list[Row]:
    """What the model says of N GPUs under the assumed speeds; nothing runs but a count on a model without weights."""
    size = (3, 224, 224)
    with torch.device("meta"):
        model = timm.create_model(name)
        flops = counters.training_flops(model, torch.empty(2, *size)) / 2
    stages = list_sites(model, size)
    gradient_bytes = 4 * sum(parameter.numel() for parameter in model.parameters())
    rows = []
    for selection, sites in {"last two": stages[-2:], "all": stages[:]}.items():
        ratio = cost_model.flop_ratio(sites)
        by_devices = []
        for devices in PREDICTED_DEVICES:
            share = cost_model.communication_share(
                gradient_bytes,
                devices,
                batch=options.gpu_batch,
                training_flops=flops,
                flop_rate=options.flops,
                bandwidth=options.bandwidth,
            )
            bounds = [cost_model.step_ratio(ratio, share, overlap=overlap) for overlap in (False, True)]
            by_devices.append({"devices": devices, "communication": share, "step_ratio": bounds})
        rows.append(
            {
                "kind": "predicted, not measured",
                "model": name,
                "selection": selection,
                "flop_ratio": ratio,
                "activation_ratio": cost_model.activation_ratio(cost_model.activation_share_before(sites, stages)),
                "gradient_bytes": gradient_bytes,
                "training_flops": flops,
                "assumed": {
                    "flop_rate": options.flops,
                    "bandwidth": options.bandwidth,
                    "batch": options.gpu_batch,
                    "image": size[1],
                },
                "predictions": by_devices,
            }
        )
    return rows


if __name__ == "__main__":
    main()
