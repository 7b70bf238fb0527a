"""Name what is in images, with a finished run or any weights of a timm model.

    python recipes/predict.py --weights runs/mine photo.jpg holiday/
    python recipes/predict.py --weights resnet50.safetensors --model resnet50 photo.jpg --top 3

Prints a line for each image: its path, then the likeliest classes and their probabilities.
"""

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from images import read_image, walk_images
from jsonargparse import ArgumentParser
from models import load_trained
from settings import RecipeError, exit_with
from timm.data import create_transform
from torch import Tensor, nn


@torch.no_grad()
def predict_batches(
    network: nn.Module, about: dict[str, Any], paths: Sequence[Path], size: int = 32
) -> Iterator[tuple[Sequence[Path], Tensor]]:
    """Yield (paths, logits (N, K)) batch by batch, preprocessed as the header of the weights describes."""
    channels, side = about["in_chans"], about["image_size"]
    options = {key: about[key] for key in ("interpolation", "crop_pct", "mean", "std")}
    transform: Any = create_transform((channels, side, side), **options)
    for start in range(0, len(paths), size):
        part = paths[start : start + size]
        images = [read_image(path, str(path)).convert("L" if channels == 1 else "RGB") for path in part]
        yield part, network(torch.stack([transform(image) for image in images]))


def find_paths(given: Sequence[str]) -> list[Path]:
    """Return the images among files and below folders."""
    left_out: Counter[str] = Counter()
    found = []
    for path in map(Path, given):
        if not path.exists():
            raise RecipeError(f"there is no image or folder {path}")
        found += walk_images(path, left_out) if path.is_dir() else [path]
    for why, count in sorted(left_out.items()):
        print(f"left out: {count} ({why})", file=sys.stderr)
    if not found:
        raise RecipeError(f"no images in {', '.join(given)}")
    return found


def main() -> None:
    """Read the command line and predict."""
    parser = ArgumentParser(description="Name what is in images.")
    parser.add_argument("images", nargs="+", help="image files, or folders of them")
    parser.add_argument("--weights", type=str, required=True, help="a run's folder, or a file of weights")
    parser.add_argument("--model", type=str | None, default=None, help="timm's name, for weights that no run wrote")
    parser.add_argument("--top", type=int, default=3, help="classes to name for each image")
    options = parser.parse_args()
    try:
        network, about = load_trained(Path(options.weights), options.model)
        for paths, logits in predict_batches(network, about, find_paths(options.images)):
            best = logits.softmax(1).topk(min(options.top, logits.shape[1]))
            for path, shares, labels in zip(paths, best.values.tolist(), best.indices.tolist(), strict=True):
                named = (f"{about['classes'][label]} {share:.1%}" for share, label in zip(shares, labels, strict=True))
                print(f"{path}: {', '.join(named)}")
    except RecipeError as error:
        exit_with(error)


if __name__ == "__main__":
    main()
