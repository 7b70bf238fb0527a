"""Time of apply_rblock, compared with building the network and running it once.

    python benchmarks/bench_convert.py --threads 1     # minutes: benchmarks/results/convert-cpu.json and its figure
    python benchmarks/bench_convert.py --quick --output /tmp/convert.json
    python benchmarks/bench_convert.py --show benchmarks/results/convert-cpu.json

Each conversion gets a new model with weights, and uses the default sites. In the same rounds are timed: building the
model, and one forward of one image in eval mode. A conversion runs on the CPU whatever --device is.
"""

import argparse
import gc
import pathlib
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from benchmarks import harness
from benchmarks.harness import Row
from benchmarks.zoo_models import all_names, build
from rblock_fx import apply_rblock, describe, remove_rblock

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
IMAGES = {"torchvision/r3d_18": (3, 16, 112, 112), "torchvision/inception_v3": (3, 299, 299)}


def main(arguments: list[str] | None = None) -> None:
    """Run from the command line."""
    parser = harness.command_line("convert", __doc__)
    parser.add_argument(
        "--models", nargs="+", type=_model, default=None, help="names such as timm/resnet50 (default 51)"
    )
    harness.run("convert", parser, measure, table, draw, arguments, key=("name",))


def _model(text: str) -> str:
    if text not in all_names():
        raise argparse.ArgumentTypeError(f"expected timm/NAME or torchvision/NAME, got {text!r}")
    return text


def measure(options: argparse.Namespace) -> list[Row]:
    """One row per model."""
    warnings.simplefilter("ignore")
    names = options.models or (QUICK_MODELS if options.quick else MODELS)
    apply_rblock(build("timm/resnet18"))  # the first conversion of a process imports and initialises
    return [measure_model(name, options.rounds or (1 if options.quick else 3)) for name in names]


def measure_model(name: str, rounds: int) -> Row:
    """One row: in every round a new model, converted and run."""
    seconds: dict[str, list[float]] = {"convert": [], "build": [], "forward": []}
    for _ in range(rounds):
        building, model = timed(lambda: build(name))
        config = getattr(model, "pretrained_cfg", None) or {}
        size = tuple(config.get("input_size") or IMAGES.get(name, (3, 224, 224)))
        converting, _ = timed(lambda model=model, size=size: apply_rblock(model, input_size=size))
        made = describe(model)
        remove_rblock(model).eval()
        image = torch.randn(1, *size)
        with torch.inference_mode():
            forward, _ = timed(lambda model=model, image=image: model(image))
        for kind, value in (("build", building), ("convert", converting), ("forward", forward)):
            seconds[kind].append(value)
    row = {
        "name": name,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "modules": sum(1 for _ in model.modules()),
        "image": size,
        "sites": [site.path for site in made.sites],
        "cost": made.cost,
        **{f"{kind}_seconds": harness.spread(values) for kind, values in seconds.items()},
        "convert_over_build": harness.ratio(seconds["convert"], seconds["build"]),
        "convert_over_forward": harness.ratio(seconds["convert"], seconds["forward"]),
    }
    print(f"{name}: {row['convert_seconds']['median']:.2f} s", file=sys.stderr)
    return row


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Wall time and result of one call, after collecting the garbage of earlier ones."""
    gc.collect()
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def _chosen(rows: list[Row]) -> dict[str, Row]:
    ordered = sorted(rows, key=lambda row: float(row["convert_seconds"]["median"]))
    return {"fastest": ordered[0], "median": ordered[len(rows) // 2], "slowest": ordered[-1]}


def table(rows: list[Row]) -> str:
    """One line per model, the slowest first."""
    lines = []
    for row in sorted(rows, key=lambda row: -float(row["convert_seconds"]["median"])):
        convert = row["convert_seconds"]
        line = [row["name"], f"{row['parameters'] / 1e6:.2f}", row["modules"], len(row["sites"])]
        line += [f"{convert['median']:.3f}", "{:.3f}-{:.3f}".format(*convert["quartiles"])]
        line += [f"{1000 * convert['median'] / row['modules']:.2f}"]
        line += [f"{row[kind]['median']:.3f}" for kind in ("build_seconds", "forward_seconds")]
        line += [f"{row[ratio]['median']:.2f}" for ratio in ("convert_over_build", "convert_over_forward")]
        lines.append(line)
    header = ["model", "M parameters", "modules", "sites", "convert s", "quartiles", "ms/module", "build s"]
    return harness.format_table([*header, "forward s", "convert/build", "convert/forward"], lines)


def markdown(rows: list[Row]) -> str:
    """The table of the READMEs: the fastest, the median and the slowest conversion."""
    lines = [
        [
            f"{which} of {len(rows)}: {row['name']}",
            f"{row['parameters'] / 1e6:.1f}",
            row["modules"],
            *(
                f"{row[kind]['median']:.2f}"
                for kind in ("convert_seconds", "convert_over_build", "convert_over_forward")
            ),
        ]
        for which, row in _chosen(rows).items()
    ]
    header = ["conversion", "M parameters", "modules", "seconds", "/ building it", "/ one forward"]
    return harness.format_markdown(header, lines)


def draw(rows: list[Row], path: pathlib.Path) -> None:
    """Seconds of a conversion against the number of modules, with building and one forward."""
    kinds = {"convert": "#2166ac", "build": "#999999", "forward": "#e08214"}
    with harness.figure(path, size=(9, 6)) as axes:
        axis = axes[0, 0]
        for kind, colour in kinds.items():
            seconds = [row[f"{kind}_seconds"]["median"] for row in rows]
            axis.scatter([row["modules"] for row in rows], seconds, 24, color=colour, label=kind)
        for row in _chosen(rows).values():
            point = row["modules"], row["convert_seconds"]["median"]
            axis.annotate(row["name"], point, (0, 6), textcoords="offset points", ha="center", fontsize=8)
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xlabel("modules")
        axis.set_ylabel("seconds (median)")
        axis.set_title(f"apply_rblock on {len(rows)} models")
        axis.grid(alpha=0.3)
        axis.legend()


if __name__ == "__main__":
    main()
