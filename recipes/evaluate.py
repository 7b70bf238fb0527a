"""Measure a finished run, or any weights of a timm model, on a folder of images by class; export the network.

    python recipes/evaluate.py --weights runs/mine --data_dir photos/val
    python recipes/evaluate.py --weights runs/mine --export onnx

Prints top-1, negative log-likelihood, calibration error, accuracy per class and the confusion matrix; --output FILE
writes them as JSON. --export writes model.onnx beside the weights.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from images import find_images
from jsonargparse import ArgumentParser
from models import load_trained
from predict import predict_batches
from results import score_logits
from settings import RecipeError, exit_with
from sources import join_classes
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_confusion_matrix


def measure_folder(network: nn.Module, about: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the figures on folder/<class>/; the classes are found by name."""
    classes = list(about["classes"])
    found = find_images(folder, Counter())
    images = join_classes(found, classes, folder)
    logits = torch.cat([part for _, part in predict_batches(network, about, images.sources)])
    labels = torch.tensor(images.labels)
    confusion: Tensor = multiclass_confusion_matrix(logits, labels, len(classes))
    per_class = (100 * confusion.diag() / confusion.sum(1).clamp_min(1)).tolist()
    scores = score_logits(logits, labels, "test")
    return {
        "images": len(labels),
        "top1": scores["test_top1"],
        "nll": scores["test_ce"],
        "ece": scores["test_ece"],
        "per_class": {name: value for name, value in zip(classes, per_class, strict=True) if name in found},
        "confusion": confusion.tolist(),
    }


def format_report(figures: dict[str, Any], classes: list[str]) -> str:
    """Return the figures as text: the confusion matrix has a row per true class, with what it was taken for."""
    lines = [
        f"{figures['images']} images: top-1 {figures['top1']:.2f} %, negative log-likelihood {figures['nll']:.4f}, "
        f"calibration error {figures['ece']:.2f} %"
    ]
    for name, counts in zip(classes, figures["confusion"], strict=True):
        if name in figures["per_class"]:
            order = sorted(range(len(counts)), key=lambda index: -counts[index])
            taken = ", ".join(f"{classes[index]} {counts[index]}" for index in order if counts[index])
            lines.append(f"{name}: {figures['per_class'][name]:.1f} %, taken for {taken}")
    return "\n".join(lines)


def export_onnx(network: nn.Module, about: dict[str, Any], path: Path) -> None:
    """Write the evaluated network as ONNX: images (N, C, H, W), normalised as the header says, to logits (N, K)."""
    image = torch.zeros(2, about["in_chans"], about["image_size"], about["image_size"])
    torch.onnx.export(
        network, (image,), str(path), input_names=["images"], output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},), dynamo=True, external_data=False, verbose=False,
    )  # fmt: skip
    print(f"wrote {path}")


def main() -> None:
    """Read the command line and measure."""
    parser = ArgumentParser(description="Measure a network on a folder of images, or export it.")
    parser.add_argument("--weights", type=str, required=True, help="a run's folder, or a file of weights")
    parser.add_argument("--data_dir", type=str | None, default=None, help="folder with a folder of images per class")
    parser.add_argument("--model", type=str | None, default=None, help="timm's name, for weights that no run wrote")
    parser.add_argument("--output", type=str | None, default=None, help="JSON file for the figures")
    parser.add_argument("--export", type=str | None, default=None, help="onnx: write model.onnx beside the weights")
    options = parser.parse_args()
    try:
        if options.data_dir is None and options.export != "onnx":
            raise RecipeError("give a folder of images with --data_dir, or --export onnx")
        network, about = load_trained(Path(options.weights), options.model)
        if options.data_dir is not None:
            figures = measure_folder(network, about, Path(options.data_dir))
            print(format_report(figures, about["classes"]))
            if options.output is not None:
                Path(options.output).write_text(json.dumps(figures, indent=2) + "\n")
        if options.export == "onnx":
            weights = Path(options.weights)
            export_onnx(network, about, (weights if weights.is_dir() else weights.parent) / "model.onnx")
    except RecipeError as error:
        exit_with(error)


if __name__ == "__main__":
    main()
