"""The training recipe as its user meets it: launched, used afterwards, given wrong settings."""

import json
import re
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import get_args

import evaluate
import models
import numpy as np
import predict
import pytest
import timm
import torch
import train
from data import load_data
from filelock import FileLock
from PIL import Image
from safetensors.torch import load_file, save_file

from tests import recipe_files as files
from tests.recipe_tools import (
    CONFIG,
    ONE_PROCESS,
    SCRIPT,
    TINY,
    assert_equal_runs,
    fails,
    launch,
    result_of,
    rows_of,
    snapshot,
)

# --- the default run -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def default_run(tmp_path_factory) -> tuple[Path, str]:
    """The command of the README with three epochs, and what it printed."""
    folder = tmp_path_factory.mktemp("default") / "run"
    return folder, launch([*ONE_PROCESS, *SCRIPT, "--epochs", "3", "--output_dir", str(folder)]).stdout


def test_default_run_learns_and_leaves_its_files(default_run):
    folder, printed = default_run
    result, rows = result_of(folder), rows_of(folder)
    config = train.parse_settings(["--config", str(folder / "config.yaml")])
    assert config == train.parse_settings(["--config", CONFIG, "--epochs", "3", "--output_dir", str(folder)])
    assert result["config"] == asdict(config)
    assert (result["method"], result["num_processes"], result["epochs"], result["seed"]) == ("bdropdml", 1, 3, 0)
    assert {"python", "torch", "timm", "accelerate", "rblock_fx"} <= result["versions"].keys()
    assert [int(row["epoch"]) for row in rows] == [1, 2, 3]
    assert 80 < result["top1_last"] <= result["top1_best"] <= 100
    assert float(rows[-1]["test_top1"]) == result["top1_last"]
    assert (float(rows[-1]["test_ece"]), float(rows[-1]["test_ce"])) == (result["ece_last"], result["nll_last"])
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"]) / 2
    lines = printed.splitlines()
    assert lines[:3] == [
        "digits: 10 classes (0, 1, 2, 3, 4, 5, 6, 7, 8, 9)",
        "training images: 1257",
        "evaluated images: 540 (the test images of the data set)",
    ]
    assert sum(line.startswith("epoch ") for line in lines) == 3
    assert "\x1b" not in printed


def test_weights_are_those_of_the_plain_timm_model(default_run):
    folder, _ = default_run
    result = result_of(folder)
    config = result["config"]
    plain = timm.create_model(
        config["model"], num_classes=result["num_classes"], in_chans=result["in_chans"], **config["model_kwargs"]
    )
    plain.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    data = load_data(train.Config(**config))
    with torch.no_grad():
        logits = plain.eval()(data.sample(540))
    right = (logits.argmax(1) == torch.tensor(data.test.labels)).sum().item()
    assert 100 * right / 540 == pytest.approx(result["top1_last"], abs=0.2)  # one image: other batch sizes
    about = models.read_header(folder / "model.safetensors")
    assert about["classes"] == result["classes"] == list("0123456789")
    assert (about["mean"], about["epoch"], about["model"]) == (result["mean"], 3, "test_resnet")


PAIRS = {"bdropdml", "sdropdml", "c-dropblock", "r-drop", "c-drop", "r-spatialdropout", "r-dropblock"}


@pytest.mark.parametrize("method", get_args(train.Method))
def test_every_method_trains(method, in_process, tmp_path):
    one_step = ["--epochs", "1", "--batch_size", "1200", "--image_size", "8", "--combine", "sum"]
    in_process("--method", method, *one_step, "--output_dir", str(tmp_path / "run"))
    (row,) = rows_of(tmp_path / "run")
    loss_per_cross_entropy = float(row["train_loss"]) / float(row["train_ce"])  # one step: the loss of fresh weights
    if method in PAIRS:  # 0.9 of two cross-entropies, and the divergence
        assert 1.8 < loss_per_cross_entropy < 2.2
    else:
        assert loss_per_cross_entropy == pytest.approx(1, abs=1e-5)
    empty = {name for name, value in row.items() if value == "" and not name.startswith("ema_")}
    pairs = {"train_kl", "train_top1_1", "train_top1_2", "train_agreement"}
    masked = {"drop_prob", "gap_kl", "gap_agreement", "drop_rate"}
    assert empty == (set() if method in PAIRS else pairs | masked if method == "none" else pairs)


# --- a finished run is of use ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Three classes that are told apart by their colour."""
    root = tmp_path_factory.mktemp("pictures")
    for label, name in enumerate(("2", "10", "30")):  # as timm sorts them
        for split, count in (("train", 12), ("val", 4)):
            for index in range(count):
                noise = files.noise((24, 24, 3), 100 * label + index) // 4
                noise[..., label] += 150
                files.write_image(root / split / name / f"{index}.png", noise)
    return root


@pytest.fixture(scope="module")
def trained(pictures, recipe_server, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    recipe_server.run(
        1, "--dataset", "image_folder", "--data_dir", str(pictures), "--image_size", "32", "--batch_size", "12",
        "--epochs", "8", "--lr", "0.03", "--output_dir", str(folder),
    )  # fmt: skip
    return folder


def run_script(script, monkeypatch, capsys, *arguments: object) -> str:
    monkeypatch.setattr(sys, "argv", ["script.py", *map(str, arguments)])
    capsys.readouterr()
    script.main()
    return capsys.readouterr().out


def test_predict_names_images_with_probabilities(trained, pictures, monkeypatch, capsys):
    paths = [pictures / "val" / name / "0.png" for name in ("2", "10", "30")]
    lines = run_script(predict, monkeypatch, capsys, "--weights", trained, *paths, "--top", 2).splitlines()
    for path, name, line in zip(paths, ("2", "10", "30"), lines, strict=True):
        assert re.fullmatch(rf"{path}: {name} [\d.]+%, \w+ [\d.]+%", line)
    below = run_script(predict, monkeypatch, capsys, "--weights", trained / "best.safetensors", pictures / "val")
    assert len(below.splitlines()) == 12


def test_evaluate_reports_what_the_run_reported(trained, pictures, tmp_path, monkeypatch, capsys):
    file = tmp_path / "figures.json"
    printed = run_script(
        evaluate, monkeypatch, capsys, "--weights", trained, "--data_dir", pictures / "val", "--output", file
    )
    figures, result = json.loads(file.read_text()), result_of(trained)
    assert figures["top1"] == result["top1_last"]
    assert figures["nll"] == pytest.approx(result["nll_last"], rel=1e-4)
    assert figures["ece"] == pytest.approx(result["ece_last"], abs=0.01)
    assert np.sum(figures["confusion"]) == figures["images"] == 12
    assert [sum(row) for row in figures["confusion"]] == [4, 4, 4]
    assert list(figures["per_class"]) == ["2", "10", "30"]
    assert "10: " in printed


def test_evaluate_takes_weights_that_no_run_wrote(trained, pictures, tmp_path, monkeypatch, capsys):
    file = tmp_path / "plain.safetensors"
    save_file(load_file(trained / "model.safetensors"), file)
    line = fails(capsys, monkeypatch, "--weights", str(file), "x.png", main=predict.main)
    assert "does not say which model" in line
    arguments = ("--weights", file, "--model", "test_resnet", pictures / "val" / "2" / "0.png")
    with pytest.raises(models.RecipeError):  # 3 numbers for names, and the folder has 2, 10, 30
        evaluate.measure_folder(*models.load_trained(file, "test_resnet"), pictures / "val")
    assert re.search(r"0.png: \d [\d.]+%", run_script(predict, monkeypatch, capsys, *arguments))


def test_export_writes_the_evaluated_network(trained, monkeypatch, capsys):
    onnxruntime = pytest.importorskip("onnxruntime")
    run_script(evaluate, monkeypatch, capsys, "--weights", trained, "--export", "onnx")
    network, about = models.load_trained(trained)
    images = torch.randn(3, about["in_chans"], about["image_size"], about["image_size"])
    session = onnxruntime.InferenceSession(str(trained / "model.onnx"))
    (found,) = session.run(None, {"images": images.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(found, network(images), atol=1e-4)


def test_weights_start_another_run_with_their_normalisation(trained, pictures, in_process, tmp_path, capsys):
    shutil.copytree(pictures, tmp_path / "data")
    for split in ("train", "val"):
        shutil.copytree(pictures / split / "2", tmp_path / "data" / split / "ant")
    arguments = ["--dataset", "image_folder", "--data_dir", str(tmp_path / "data"), "--batch_size", "12"]
    arguments += ["--image_size", "32", "--weights", str(trained / "model.safetensors"), "--epochs", "1"]
    in_process(*arguments, "--lr", "1e-9", "--output_dir", str(tmp_path / "run"))
    assert f"of {trained / 'model.safetensors'}" in capsys.readouterr().out
    assert result_of(tmp_path / "run")["mean"] == result_of(trained)["mean"]
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "run", trained))
    assert torch.allclose(ours["layer2.0.conv1.weight"], theirs["layer2.0.conv1.weight"], atol=1e-5)
    assert ours["fc.weight"].shape[0] == 4  # a classifier of other classes is left out


# --- wrong settings --------------------------------------------------------------------------------------------------

WRONG = [
    (["--weight_decai", "1"], "unrecognized arguments: --weight_decai 1; did you mean weight_decay"),
    (["--epoch", "3"], "unrecognized arguments: --epoch 3; did you mean epochs"),
    (["--epochs", "many"], '"epochs": Not of type PositiveInt'),
    (["--epochs", "0"], '"epochs": .*restriction v>0'),
    (["--lr", "inf"], '"lr": '),
    (["--drop_prob", "1.5"], '"drop_prob": .*v<1'),
    (["--ema_decay", "1"], '"ema_decay": '),
    (["--method", "bdrop"], '"method": .*bdropdml.*Got value: bdrop'),
    (["--output_dir", ""], "output_dir is empty"),
    (["--milestones", "[3]"], "milestones is .3., but lr_schedule is cosine; set both"),
    (["--lr_schedule", "multistep", "--milestones", "[5,40]"], "rising epochs below epochs=12, got .5, 40."),
    (["--mixed_precision", "fp16"], "mixed_precision fp16 needs a GPU"),
    (["--train_images", "50", "--train_images_per_class", "5"], "two ways to say one thing"),
    (["--unlabelled_images", "50", "--method", "none"], "needs a method with two sub-models"),
    (["--unlabelled_images", "50"], "unlabelled_images is 50; 0 training images are left"),
    (["--model", "test_resnets"], "unknown model 'test_resnets'; did you mean test_resnet"),
    (["--model_kwargs.depth", "3"], "model test_resnet with model_kwargs .*depth"),
    (["--model", "test_maxvit", "--model_kwargs", "{}"], r"does not take images of \(1, 16, 16\): "),
    (["--weights", "nowhere.safetensors"], "weights: there is no file nowhere.safetensors"),
    (["--dataset", "digit"], "unknown dataset 'digit'; did you mean digits"),
    (["--num_classes", "7"], "num_classes is 7, but digits has 10 classes"),
    (["--batch_size", "4000"], "batch_size is 4000; expected .* 1257 training images"),
    (["--mixup", "1", "--batch_size", "33"], "an even number of them for mixup and cutmix"),
    (["--sites", "[layer9]"], "layer9"),
    (["--block_size", "2"], "block_size"),
    (["--opt", "madam"], "opt: .*madam"),
    (["--trackers", "[tensorbord]"], "'tensorbord' is unknown to Accelerate, or not"),
    (["--trackers", "[aim]"], "'aim' is unknown to Accelerate, or not installed; pip install aim"),
    (["--resume", "nowhere"], "resume: nowhere is not a complete checkpoint"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=[" ".join(arguments) for arguments, _ in WRONG])
@pytest.mark.usefixtures("in_process")
def test_a_wrong_setting_is_one_line_and_writes_nothing(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = fails(capsys, monkeypatch, "--config", CONFIG, *TINY, "--output_dir", "out", *arguments)
    assert re.search(message, line), line
    assert snapshot(tmp_path) == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("learning_rate: 0.1", "'learning_rate' is not accepted"),
        ("epochs: [1", "Problems parsing config"),
        ("epochs: 3", "required: output_dir, dataset, image_size, model"),
        (None, "File does not exist"),
    ],
)
def test_a_wrong_config_file_is_one_line(content, message, tmp_path, capsys, monkeypatch):
    file = tmp_path / "wrong.yaml"
    if content is not None:
        file.write_text(content)
    assert message in fails(capsys, monkeypatch, "--config", str(file))


@pytest.mark.parametrize("held", ["config.yaml", "result.json", "metrics.csv", "model.safetensors", "checkpoint"])
@pytest.mark.usefixtures("in_process")
def test_another_run_is_never_overwritten(held, tmp_path, capsys, monkeypatch):
    (tmp_path / held).write_text("precious")
    before = snapshot(tmp_path)
    line = fails(capsys, monkeypatch, *SCRIPT[1:], *TINY, "--output_dir", str(tmp_path))
    assert f"already holds a run ({held})" in line
    assert "--resume auto" in line
    assert snapshot(tmp_path) == before


@pytest.mark.usefixtures("in_process")
def test_an_unusable_output_dir_is_one_line(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("mine")
    for name, message in (("file", "is a file; name a folder"), ("file/run", "cannot write to output_dir")):
        assert message in fails(capsys, monkeypatch, *SCRIPT[1:], *TINY, "--output_dir", str(tmp_path / name))
    (tmp_path / "run").mkdir()
    with FileLock(tmp_path / "run" / ".lock"):
        line = fails(capsys, monkeypatch, *SCRIPT[1:], *TINY, "--output_dir", str(tmp_path / "run"))
    assert "another process works in output_dir" in line
    assert sorted(snapshot(tmp_path)) == ["file", "run", "run/.lock"]


@pytest.mark.usefixtures("in_process")
def test_a_diverged_loss_stops_before_it_is_saved(tmp_path, capsys, monkeypatch):
    line = fails(capsys, monkeypatch, *SCRIPT[1:], *TINY, "--lr", "1e30", "--output_dir", str(tmp_path / "run"))
    assert re.search(r"not finite at step \d \(epoch 1\); no checkpoint was written before it; start again", line)
    assert sorted(snapshot(tmp_path / "run")) == [".lock", "config.yaml"]


@pytest.mark.usefixtures("in_process")
def test_outputs_that_are_not_finite_name_the_image(tmp_path, capsys, monkeypatch):
    root = files.write_folders(tmp_path / "data")
    Image.fromarray(np.full((40, 40), np.nan, np.float32)).save(root / "val" / "bee" / "holes.tif")
    arguments = ["--dataset", "image_folder", "--data_dir", str(root), "--batch_size", "6", "--image_size", "32"]
    line = fails(capsys, monkeypatch, *SCRIPT[1:], *arguments, "--output_dir", str(tmp_path / "run"))
    assert "bee/holes.tif: it has values from nan" in line
    weights = timm.create_model("test_resnet", num_classes=10, in_chans=1, output_stride=8).state_dict()
    weights["bn1.running_mean"][3] = float("nan")
    save_file(weights, tmp_path / "weights.safetensors")
    arguments = ["--weights", str(tmp_path / "weights.safetensors"), "--output_dir", str(tmp_path / "other")]
    line = fails(capsys, monkeypatch, *SCRIPT[1:], *TINY, "--epochs", "1", "--method", "none", *arguments)
    assert "outputs are not finite for 540 of 540 evaluated images, first for" in line


def test_two_processes_report_a_mistake_once(recipe_server, tmp_path):
    printed = recipe_server.run(2, "--model", "test_resnets", "--output_dir", str(tmp_path / "run"), code=2)
    mains = [line for line in printed.splitlines() if line.startswith("error: ") and "(process" not in line]
    assert len(mains) == 1
    assert snapshot(tmp_path) == {}


def test_the_same_seed_gives_the_same_run(in_process, tmp_path):
    for name, seed in (("one", "3"), ("two", "3"), ("other", "4")):
        in_process(
            "--epochs",
            "1",
            "--train_images",
            "512",
            "--ema_decay",
            "0.9",
            "--seed",
            seed,
            "--output_dir",
            str(tmp_path / name),
        )
    assert_equal_runs(tmp_path / "one", tmp_path / "two")
    assert rows_of(tmp_path / "one")[0]["train_loss"] != rows_of(tmp_path / "other")[0]["train_loss"]
