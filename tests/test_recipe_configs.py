"""Every settings file of the recipes, none left out, through the real launcher on files in its data set's format."""

import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torchvision.datasets import CIFAR10, CIFAR100
from training.models import create_model
from training.settings import Config, make_parser, read_config

from tests import recipe_files as files
from tests.recipe_tools import ENVIRONMENT, ONE_PROCESS, RECIPES, ROOT, result_of, rows_of

CONFIGS = sorted((RECIPES / "configs").rglob("*.yaml"))

# What a step of each needs here that it does not on the machine that it is for.
SMALLER = {
    "cifar10_resnet18": ["--batch_size", "8", "--num_workers", "1"],
    "cifar10_vgg16": ["--batch_size", "8", "--num_workers", "1"],
    "cifar100_resnet18": ["--batch_size", "8", "--num_workers", "1"],
    "cifar100_vgg16": ["--batch_size", "8", "--num_workers", "1"],
    "digits": [],
    "fashion_mnist": [],
    "tinyimagenet_resnet34": ["--batch_size", "8", "--num_workers", "1"],
    # weights that no hub gives here, and fewer of its large images
    "imagefolder_resnet50": [
        "--model_kwargs.pretrained", "false", "--batch_size", "8", "--image_size", "64", "--num_workers", "1",
    ],
    "stream_resnet50": ["--batch_size", "8", "--num_workers", "2", "--num_classes", "3", "--image_size", "64"],
}  # fmt: skip

PATCH = """
from torchvision.datasets import CIFAR10, CIFAR100
CIFAR10.train_list, CIFAR10.test_list, CIFAR10.meta = {}, {}, {}
CIFAR100.train_list, CIFAR100.test_list, CIFAR100.meta = {}, {}, {}
"""


@pytest.fixture(scope="module")
def data_dirs(tmp_path_factory) -> dict[str, Path]:
    """A folder for each data set, and one whose sitecustomize tells torchvision the checksums of the CIFAR files."""
    root = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        files.write_cifar(root / "cifar", CIFAR10, patch, count=10)
        files.write_cifar(root / "cifar", CIFAR100, patch, count=40)
        sums = [repr(value) for kind in (CIFAR10, CIFAR100) for value in (kind.train_list, kind.test_list, kind.meta)]
    (root / "site").mkdir()
    (root / "site" / "sitecustomize.py").write_text(PATCH.format(*sums))
    files.write_fashion(root / "fashion", train=300, test=40)
    files.write_tiny_imagenet(root / "tiny", per_class=10)
    files.write_folders(root / "folders", per_class=8)
    files.write_shards(root / "shards", png=files.noisy_png)
    return {
        "cifar10": root / "cifar", "cifar100": root / "cifar", "fashion_mnist": root / "fashion",
        "tiny_imagenet": root / "tiny", "image_folder": root / "folders", "wds/images": root / "shards",
        "digits": root / "none", "site": root / "site",
    }  # fmt: skip


def test_every_file_is_counted():
    assert [path.stem for path in CONFIGS] == sorted(SMALLER)
    assert len(CONFIGS) == 9


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_settings_file_opens_with_its_purpose_and_its_command(path):
    lines = path.read_text().splitlines()
    comment = list(lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))])
    assert len(comment) >= 4
    command = next(line for line in comment if "accelerate launch" in line)
    assert f"--config {path.relative_to(ROOT)}" in command


def test_the_first_file_has_every_key():
    text = (RECIPES / "configs" / "digits.yaml").read_text()
    keys = {line.partition(":")[0] for line in text.splitlines() if line and line[0].isalpha()}
    assert keys == set(Config.__dataclass_fields__)


def test_help_explains_every_setting():
    told = {action.dest: action.help for action in make_parser()._actions}
    assert [name for name in Config.__dataclass_fields__ if len(told[name]) < 6] == []
    assert told["alpha"] == "weight of the KL term between the sub-models, 0 to 1"
    assert told["method"].startswith("bdropdml, sdropdml")
    assert told["method"].endswith("none: plain training")
    assert "output_stride" not in told["model_kwargs"]
    assert "--alpha ALPHA" in make_parser().format_help()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_settings_file_trains_two_steps(path, data_dirs, tmp_path):
    config = read_config(["--config", str(path)])
    folder = tmp_path / "run"
    command = [
        *ONE_PROCESS, str(RECIPES / "train.py"), "--config", str(path), "--output_dir", str(folder), "--max_steps", "2",
        "--data_dir", str(data_dirs[config.dataset]), "--download", "false", *SMALLER[path.stem],
    ]  # fmt: skip
    # torch.compile takes minutes over ResNet-50: test_recipe_training.py has it on a small network
    environment = ENVIRONMENT | {"PYTHONPATH": str(data_dirs["site"]), "TORCH_COMPILE_DISABLE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = result_of(folder)
    assert (result["steps"], result["stopped_early"], result["method"]) == (2, True, "bdropdml")
    (row,) = rows_of(folder)
    assert 0 < float(row["train_loss"]) < 50
    assert float(row["gap_kl"]) >= 0
    used = result["config"]
    plain = create_model(
        used["model"], num_classes=result["num_classes"], in_chans=result["in_chans"], **used["model_kwargs"]
    )
    for name in ("model", "best", *(["ema"] if config.ema_decay else [])):
        weights = load_file(folder / f"{name}.safetensors")
        plain.load_state_dict(weights, strict=True)
        assert all(torch.isfinite(tensor).all() for tensor in weights.values() if tensor.is_floating_point())


def test_the_settings_of_the_paper():
    """Section 4.1, and the linear scheme of Table 2."""
    for name in ("cifar10_resnet18", "cifar100_resnet18", "cifar10_vgg16", "cifar100_vgg16", "tinyimagenet_resnet34"):
        config = read_config(["--config", str(RECIPES / "configs" / f"{name}.yaml")])
        assert (config.lr, config.momentum, config.weight_decay, config.batch_size) == (0.1, 0.9, 5e-4, 128)
        assert (config.lr_schedule, config.milestones, config.lr_gamma) == ("multistep", [75, 130, 180], 0.1)
        assert (config.epochs, config.warmup_epochs, config.label_smoothing) == (200, 0, 0)
        assert (config.drop_prob, config.block_size, config.alpha, config.temperature) == (0.2, 3, 0.1, 3)
        assert config.drop_schedule == ("linear" if "tiny" in name else "constant")
        assert config.augment


@pytest.mark.parametrize(("name", "size"), [("cifar_resnet18", 32), ("cifar_resnet34", 32), ("cifar_vgg16_bn", 32),
                                            ("cifar_vgg16_bn", 64), ("cifar_vgg16", 32)])  # fmt: skip
def test_models_for_small_images(name, size):
    model = create_model(name, num_classes=7).eval()
    maps = []
    last = model.layer4 if "resnet" in name else model.features
    last.register_forward_hook(lambda _module, _inputs, output: maps.append(output.shape[-2:]))
    with torch.no_grad():
        assert model(torch.zeros(2, 3, size, size)).shape == (2, 7)
    assert maps == [(size // 8, size // 8) if "resnet" in name else (size // 32, size // 32)]
    if "resnet" in name:
        assert model.conv1.weight.shape == (64, 3, 3, 3)
        assert (model.conv1.stride, model.conv1.padding) == ((1, 1), (1, 1))
