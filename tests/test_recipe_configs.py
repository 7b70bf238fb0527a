"""Every settings file of the recipes, none left out, on files in its data set's format."""

from pathlib import Path

import pytest
import torch
from models import create_model
from safetensors.torch import load_file
from settings import make_parser
from torchvision.datasets import CIFAR10, CIFAR100
from train import Config, parse_settings

from tests import recipe_files as files
from tests.recipe_tools import RECIPES, ROOT, result_of, rows_of

CONFIGS = sorted((RECIPES / "configs").rglob("*.yaml"))
SMALL = ["--batch_size", "8", "--num_workers", "1"]
SMALLER = {  # what a step of each needs here that it does not on the machine that it is for
    "cifar10_resnet18": SMALL,
    "cifar10_vgg16": SMALL,
    "cifar100_resnet18": SMALL,
    "cifar100_vgg16": SMALL,
    "digits": [],
    "fashion_mnist": [],
    "tinyimagenet_resnet34": SMALL,
    # no hub gives weights here
    "imagefolder_resnet50": [*SMALL, "--model_kwargs.pretrained", "false", "--image_size", "64"],
}

PATCH = """
from torchvision.datasets import CIFAR10, CIFAR100
CIFAR10.train_list, CIFAR10.test_list, CIFAR10.meta = {}, {}, {}
CIFAR100.train_list, CIFAR100.test_list, CIFAR100.meta = {}, {}, {}
"""


@pytest.fixture(scope="module")
def data_dirs(tmp_path_factory) -> dict[str, str]:
    """A folder for each data set, and the lines that tell torchvision the checksums of the CIFAR files."""
    root = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        files.write_cifar(root / "cifar", CIFAR10, patch, count=10)
        files.write_cifar(root / "cifar", CIFAR100, patch, count=40)
        sums = [repr(value) for kind in (CIFAR10, CIFAR100) for value in (kind.train_list, kind.test_list, kind.meta)]
    files.write_fashion(root / "fashion", train=300, test=40)
    files.write_tiny_imagenet(root / "tiny", per_class=10)
    files.write_folders(root / "folders", per_class=8)
    folders = {
        "cifar10": "cifar", "cifar100": "cifar", "fashion_mnist": "fashion", "tiny_imagenet": "tiny",
        "image_folder": "folders", "digits": "none",
    }  # fmt: skip
    return {name: str(root / folder) for name, folder in folders.items()} | {"patch": PATCH.format(*sums)}


def test_every_file_is_counted_and_opens_with_its_command():
    assert [path.stem for path in CONFIGS] == sorted(SMALLER)
    for path in CONFIGS:
        lines = path.read_text().splitlines()
        comment = lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
        command = next(line for line in comment if "accelerate launch" in line)
        assert f"--config {path.relative_to(ROOT)}" in command


def test_help_and_the_first_file_have_every_setting():
    text = (RECIPES / "configs" / "digits.yaml").read_text()
    keys = {line.partition(":")[0] for line in text.splitlines() if line and line[0].isalpha()}
    assert keys == set(Config.__dataclass_fields__)
    shown = make_parser(Config).format_help()
    assert all(f"--{name}" in shown for name in keys)
    assert "weight of the KL term between the sub-models" in shown


# CIFAR-100's files differ from CIFAR-10's in the data set alone
EACH = [
    pytest.param(path, id=path.stem, marks=pytest.mark.nightly if path.stem.startswith("cifar100") else ())
    for path in CONFIGS
]


@pytest.mark.parametrize("path", EACH)
def test_every_settings_file_trains_two_steps(path, data_dirs, recipe_server, tmp_path):
    config = parse_settings(["--config", str(path)])
    folder: Path = tmp_path / "run"
    recipe_server.run(
        1, "--config", str(path), "--output_dir", str(folder), "--max_steps", "2", "--gap_images", "8",
        "--data_dir", data_dirs[config.dataset], "--download", "false", *SMALLER[path.stem], before=data_dirs["patch"],
    )  # fmt: skip
    result = result_of(folder)
    assert (result["steps"], result["stopped_early"], result["method"]) == (2, True, config.method)
    assert result["config"]["output_dir"] == str(folder)
    (row,) = rows_of(folder)
    assert 0 < float(row["train_loss"]) < 50
    assert float(row["gap_kl"]) >= 0
    plain = create_model(
        config.model, num_classes=result["num_classes"], in_chans=result["in_chans"],
        **result["config"]["model_kwargs"],
    )  # fmt: skip
    for name in ("model", "best"):
        weights = load_file(folder / f"{name}.safetensors")
        plain.load_state_dict(weights, strict=True)
        assert all(torch.isfinite(tensor).all() for tensor in weights.values() if tensor.is_floating_point())


def test_the_settings_of_the_paper():
    """Section 4.1, and the linear scheme of Table 2."""
    for name in ("cifar10_resnet18", "cifar100_resnet18", "cifar10_vgg16", "cifar100_vgg16", "tinyimagenet_resnet34"):
        config = parse_settings(["--config", str(RECIPES / "configs" / f"{name}.yaml")])
        assert (config.opt, config.lr, config.momentum, config.weight_decay) == ("momentum", 0.1, 0.9, 5e-4)
        assert (config.combine, config.filter_bias_and_bn, config.batch_size) == ("sum", False, 128)
        assert (config.lr_schedule, config.milestones, config.lr_gamma) == ("multistep", [75, 130, 180], 0.1)
        assert (config.epochs, config.warmup_epochs, config.label_smoothing) == (200, 0, 0)
        assert (config.drop_prob, config.block_size, config.alpha, config.temperature) == (0.2, 3, 0.1, 3)
        assert config.drop_schedule == ("linear" if "tiny" in name else "constant")
        assert config.augment
