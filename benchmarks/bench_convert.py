"""How long does apply_rblock take, and how does that grow with the model?

    python benchmarks/bench_convert.py --threads 1     # minutes: benchmarks/results/convert-cpu.json and its picture
    python benchmarks/bench_convert.py --quick --output /tmp/convert.json
    python benchmarks/bench_convert.py --show benchmarks/results/convert-cpu.json

Each conversion has a model of its own, made anew with weights, and default sites. Beside it, in the same rounds: making
the model, one forward of one image in eval mode, and torch.fx.symbolic_trace where it succeeds.

Rows "model" are architectures of timm and torchvision. Rows "growth" are one network twice, four times ... as deep at
one width, and as wide at one depth. Rows "cold" are first conversions, each in a process of its own, with the next one
beside it. Rows "meta" are conversions of models without weights, beside those with. --device has no meaning here:
conversions happen on the CPU.
"""

import argparse
import concurrent.futures
import gc
import multiprocessing
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import harness
import timm
import torch
import torchvision
from convert_report import draw, table
from harness import Row
from torch import fx, nn

from rblock_fx import apply_rblock, describe, remove_rblock

ResultT = TypeVar("ResultT")

NAMES = """
    timm/test_resnet timm/resnet18 timm/resnet50 timm/resnet152 timm/resnetv2_50 timm/seresnet50 timm/lcnet_050
    timm/mobilenetv3_small_050 timm/mobilenetv3_large_100 timm/ghostnetv3_130 timm/mobilenetv4_conv_medium
    timm/efficientnet_b0 timm/efficientnet_b7 timm/fbnetv3_g timm/mnasnet_100 timm/tinynet_e timm/repvgg_b0
    timm/fastvit_sa12 timm/convnext_atto timm/convnext_base timm/convnext_xlarge timm/edgenext_small
    timm/densenet121 timm/dla34 timm/dpn92 timm/hrnet_w18_small timm/hrnet_w32 timm/inception_v4
    timm/nasnetalarge timm/pnasnet5large timm/xception41 timm/nfnet_f0 timm/vovnet39a timm/regnety_002
    timm/regnety_160 timm/swin_tiny_patch4_window7_224 timm/pvt_v2_b0 timm/pvt_v2_b5 timm/maxvit_tiny_rw_224
    timm/efficientvit_b3 timm/mambaout_tiny torchvision/vgg16_bn torchvision/resnet50 torchvision/googlenet
    torchvision/inception_v3 torchvision/densenet201 torchvision/wide_resnet101_2 torchvision/deeplabv3_resnet50
    torchvision/r3d_18 torchvision/squeezenet1_0 torchvision/shufflenet_v2_x1_0
    """
MODELS = tuple(NAMES.split())
QUICK_MODELS = ("timm/test_resnet", "timm/resnet18", "timm/mobilenetv3_small_050", "torchvision/googlenet")
COLD = ("timm/resnet50", "timm/hrnet_w32", "torchvision/googlenet")
META = ("timm/resnet50", "timm/convnext_base", "timm/pvt_v2_b5", "timm/nasnetalarge")
MULTIPLES = (1, 2, 4, 8, 16)

# Networks whose depth and width are arguments, as functions of the multiples of the smallest.
GROWING: dict[str, Callable[[int, int], dict[str, Any]]] = {
    "convnext_atto": lambda depth, width: {
        "depths": (depth,) * 4,
        "dims": tuple(16 * width * 2**stage for stage in range(4)),
    },
    "resnet50": lambda depth, width: {"layers": (depth,) * 4, "base_width": 16 * width},
}
IMAGES = {"r3d_18": (3, 16, 112, 112), "inception_v3": (3, 299, 299)}


def build(name: str, **arguments: Any) -> nn.Module:
    """Make a model of timm or torchvision with random weights, and its auxiliary heads where it has some."""
    source, architecture = name.split("/")
    if source == "timm":
        model: nn.Module = timm.create_model(architecture, **arguments)
        return model
    if architecture in ("googlenet", "inception_v3"):
        arguments |= {"init_weights": False, "aux_logits": True}  # their initialisation draws by SciPy, for a minute
    if architecture.startswith("deeplabv3"):
        arguments |= {"weights_backbone": None, "aux_loss": True}
    created: nn.Module = torchvision.models.get_model(architecture, weights=None, **arguments)
    return created


def image_size(name: str, model: nn.Module) -> tuple[int, ...]:
    """The shape of one image that a model takes."""
    config = getattr(model, "pretrained_cfg", None) or {}
    return tuple(config.get("input_size") or IMAGES.get(name.split("/")[1], (3, 224, 224)))


def timed(call: Callable[..., ResultT], *args: Any, **kwargs: Any) -> tuple[float, ResultT]:
    """Wall time of one call, with the garbage of earlier ones collected before, and what it gave."""
    gc.collect()
    start = time.perf_counter()
    result = call(*args, **kwargs)
    return time.perf_counter() - start, result


def measure_model(kind: str, name: str, rounds: int, **arguments: Any) -> Row:
    """One row: a fresh model in every round, converted, run and traced."""
    seconds: dict[str, list[float]] = {"convert": [], "build": [], "forward": []}
    traced: list[float] = []
    for turn in range(rounds):
        seconds_building, model = timed(build, name, **arguments)
        size = image_size(name, model)
        seconds_converting, _ = timed(apply_rblock, model, input_size=size)
        made = describe(model)
        remove_rblock(model).eval()
        with torch.inference_mode():
            seconds_forward, _ = timed(model, torch.randn(1, *size))
        seconds["build"].append(seconds_building)
        seconds["convert"].append(seconds_converting)
        seconds["forward"].append(seconds_forward)
        if len(traced) == turn:  # no second try where the first failed
            traced += trace_seconds(model)
    row = {
        "kind": kind,
        "name": name,
        **arguments,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "modules": sum(1 for _ in model.modules()),
        "image": size,
        "sites": [site.path for site in made.sites],
        "cost": made.cost,
        **{f"{what}_seconds": harness.spread(values) for what, values in seconds.items()},
        "fx_trace_seconds": harness.spread(traced) if traced else None,
        "first_seconds": seconds["convert"][0],
        "convert_over_build": harness.ratio(seconds["convert"], seconds["build"]),
        "convert_over_forward": harness.ratio(seconds["convert"], seconds["forward"]),
    }
    print(f"{name} {arguments or ''}: {row['convert_seconds']['median']:.2f} s", file=sys.stderr)
    return row


def trace_seconds(model: nn.Module) -> list[float]:
    """The time of torch.fx.symbolic_trace; none where the model cannot be traced whole."""
    try:
        return [timed(fx.symbolic_trace, model)[0]]
    except Exception:
        return []


def measure_growth(network: str, axis: str, multiples: tuple[int, ...], rounds: int) -> list[Row]:
    """One network at several depths or widths."""
    rows = []
    for multiple in multiples:
        depth, width = (multiple, 2) if axis == "depth" else (2, multiple)
        arguments = GROWING[network](depth, width)
        row = measure_model("growth", f"timm/{network}", rounds, **arguments)
        rows.append(row | {"axis": axis, "multiple": multiple})
    return rows


def measure_cold(name: str) -> Row:
    """The first conversion of a process, and the second, of a fresh model each."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, context) as process:
        first, second = process.submit(convert_twice, name, torch.get_num_threads()).result()
    return {"kind": "cold", "name": name, "cold_seconds": first, "warm_seconds": second}


def convert_twice(name: str, threads: int) -> tuple[float, float]:
    """Seconds of two conversions, in a process that has converted nothing."""
    torch.set_num_threads(threads)
    first, second = (timed(apply_rblock, build(name))[0] for _ in range(2))
    return first, second


def measure_meta(name: str, rounds: int) -> Row:
    """Conversions of a model with weights and of one on the meta device, in turns."""

    def build_without_weights() -> nn.Module:
        with torch.device("meta"):
            return build(name)

    seconds: dict[str, list[float]] = {"weights": [], "meta": []}
    for _ in range(rounds):
        seconds["weights"].append(timed(apply_rblock, build(name))[0])
        seconds["meta"].append(timed(apply_rblock, build_without_weights())[0])
    return {
        "kind": "meta",
        "name": name,
        **{f"{what}_seconds": harness.spread(values) for what, values in seconds.items()},
        "meta_over_weights": harness.ratio(seconds["meta"], seconds["weights"]),
    }


def measure(options: argparse.Namespace) -> list[Row]:
    """All kinds of rows."""
    warnings.simplefilter("ignore")
    quick = options.quick
    rounds = options.rounds or (1 if quick else 3)
    names = options.models or (QUICK_MODELS if quick else MODELS)
    # Cold first: those processes import what this one has imported, while nothing else runs.
    rows = [measure_cold(name) for name in (("timm/resnet18",) if quick else COLD)]
    apply_rblock(build("timm/resnet18"))  # what is cold about this process
    rows += [measure_model("model", name, rounds) for name in names]
    multiples = (1, 4) if quick else MULTIPLES
    for network in list(GROWING)[: 1 if quick else None]:
        for axis in ("depth", "width"):
            rows += measure_growth(network, axis, multiples, rounds)
    rows += [measure_meta(name, rounds) for name in (("timm/resnet18",) if quick else META)]
    return rows


def main() -> None:
    """Parse the command line and run."""
    parser = harness.command_line("convert", __doc__)
    parser.add_argument("--models", nargs="+", default=None, help="names such as timm/resnet50 in place of the list")
    harness.run("convert", parser, measure, table, draw)


if __name__ == "__main__":
    main()
