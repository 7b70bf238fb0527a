"""How a run goes: kills, signals, damage, schedules, averages, what it measures."""

import copy
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections import OrderedDict
from pathlib import Path

import checkpoint
import models
import psutil
import pytest
import results
import torch
import train
from data import train_batches
from safetensors import safe_open
from safetensors.torch import load_file
from settings import RecipeError
from torch import nn

from rblock_fx import apply_rblock
from tests import recipe_files as files
from tests.recipe_tools import (
    CONFIG,
    ENVIRONMENT,
    ROOT,
    SCRIPT,
    STEPS,
    TINY,
    TWO_PROCESSES,
    assert_equal_runs,
    fails,
    recipe_in_process,
    result_of,
    rows_of,
    snapshot,
    step_of,
    timeless,
)

EVERYTHING = [  # whatever carries state from step to step
    *TINY, "--epochs", "4", "--train_images", "768", "--gap_images", "50", "--ema_decay", "0.9", "--mixup", "0.2",
    "--accumulate_steps", "2", "--opt", "adamw", "--lr", "0.003", "--drop_schedule", "linear", "--clip_grad_norm", "1",
    "--warmup_epochs", "1",
]  # fmt: skip


def wait_for_step(folder: Path, step: int, pid: int) -> None:
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        if step_of(folder) >= step:
            return
        time.sleep(0.005)
    raise AssertionError("the run ended early")


# --- kills and signals -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[pytest.param(1, marks=pytest.mark.nightly), 2])
def uninterrupted(request, recipe_server, tmp_path_factory) -> tuple[int, Path]:
    """A number of processes, and the run that they make when nothing comes between."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    recipe_server.run(request.param, *EVERYTHING, "--output_dir", str(folder))
    assert result_of(folder)["num_processes"] == request.param
    return request.param, folder


def kill_and_resume(times: int, uninterrupted: tuple[int, Path], server, run: Path) -> None:
    processes, whole = uninterrupted
    arguments = [*EVERYTHING, "--checkpoint_steps", "1", "--resume", "auto", "--output_dir", str(run)]
    moments = random.Random(0)
    for _ in range(times):
        pids = server.start(processes, *arguments)
        try:
            wait_for_step(run, step_of(run) + 1, pids[0])
            time.sleep(moments.uniform(0, 0.9 / times))  # into a step, an evaluation, or the writing of a checkpoint
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
            codes = server.wait()
        assert codes == [-signal.SIGKILL] * processes
    assert not (run / "result.json").exists()
    server.run(processes, *arguments)
    assert_equal_runs(run, whole)


def test_three_kills_leave_the_very_same_weights(uninterrupted, recipe_server, tmp_path):
    kill_and_resume(3, uninterrupted, recipe_server, tmp_path / "run")


@pytest.mark.nightly
def test_ten_kills_leave_the_very_same_weights(uninterrupted, recipe_server, tmp_path):
    kill_and_resume(10, uninterrupted, recipe_server, tmp_path / "run")


def test_torchrun_passes_a_signal_on_and_the_run_resumes(uninterrupted, recipe_server, tmp_path):
    processes, whole = uninterrupted
    run = tmp_path / "run"
    arguments = [*EVERYTHING, "--output_dir", str(run)]
    if processes == 1:
        (pid,) = recipe_server.start(1, *arguments, "--checkpoint_steps", "8")
        wait_for_step(run, 8, pid)
        os.kill(pid, signal.SIGINT)
        assert recipe_server.wait() == [0]
        printed = recipe_server.log.read_text()
    else:
        command = [*TWO_PROCESSES, *SCRIPT, *arguments, "--checkpoint_steps", "2"]
        process = subprocess.Popen(
            command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        wait_for_step(run, 2, process.pid)
        process.send_signal(signal.SIGTERM)
        printed, _ = process.communicate(timeout=120)
    stopped = re.search(r"stopped at step (\d+) and saved; --resume auto continues from there", printed)
    assert stopped, printed
    assert step_of(run) == int(stopped[1])
    assert not (run / "result.json").exists()
    recipe_server.run(processes, *arguments, "--resume", "auto")
    assert_equal_runs(run, whole)


def test_each_process_draws_its_own_masks(uninterrupted):
    processes, whole = uninterrupted
    states = [torch.load(file, weights_only=False)["torch_manual_seed"]
              for file in sorted((whole / "checkpoint").glob("random_states_*.pkl"))]  # fmt: skip
    assert len(states) == processes
    assert processes == 1 or not torch.equal(*states)


# one step an epoch, so that metrics.csv has the loss of every step; LayerNorm looks at one sample alone
TRAJECTORY = [
    *TINY, "--model", "test_convnext", "--model_kwargs", "{}", "--image_size", "32", "--train_images", "600",
    "--batch_size", "600", "--epochs", "3", "--gap_images", "0", "--drop_prob", "0", "--warmup_epochs", "0",
    "--lr", "0.02",
]  # fmt: skip


def test_shared_steps_are_those_of_the_whole_batch(recipe_server, tmp_path):
    recipe_server.run(1, *TRAJECTORY, "--output_dir", str(tmp_path / "whole"))
    whole = rows_of(tmp_path / "whole")
    for processes, accumulate in ((2, "1"), (1, "3")):
        folder = tmp_path / accumulate
        recipe_server.run(processes, *TRAJECTORY, "--accumulate_steps", accumulate, "--output_dir", str(folder))
        for name in ("train_loss", "train_ce", "test_ce"):
            expected = pytest.approx([float(row[name]) for row in whole], abs=1e-5)
            assert [float(row[name]) for row in rows_of(folder)] == expected
    assert float(whole[-1]["train_loss"]) < float(whole[0]["train_loss"]) - 0.02  # it does train


class Process:
    """As much of Accelerate as the order of the images needs."""

    device = torch.device("cpu")

    def __init__(self, index: int, processes: int) -> None:
        self.process_index, self.num_processes = index, processes


def test_processes_and_resumed_epochs_share_one_order():
    config = train.parse_settings(["--config", CONFIG, *TINY, "--augment", "false", "--unlabelled_images", "100",
                                   "--train_images", "1000"])  # fmt: skip
    data = train.load_data(config)
    steps = train.count_steps(config, data, 1)

    def batches(index: int, processes: int, done: int = 0, epoch: int = 3) -> list[torch.Tensor]:
        return [images for images, _ in train_batches(config, data, epoch, done, steps, Process(index, processes))]

    alone = batches(0, 1)
    assert len(alone) == steps == 7
    assert {len(images) for images in alone} == {2 * 128}  # as many without labels
    for whole, *parts in zip(alone, batches(0, 2), batches(1, 2), strict=True):
        rows = torch.cat(parts).flatten(1)
        assert torch.equal(rows.sort(0).values, whole.flatten(1).sort(0).values)
    assert all(torch.equal(one, two) for one, two in zip(alone[5:], batches(0, 1, done=5), strict=True))
    assert not torch.equal(alone[0], batches(0, 1, epoch=4)[0])


def test_max_steps_ends_a_run_that_can_continue(in_process, tmp_path):
    steps = 4 + 2
    arguments = ["--epochs", "2", "--train_images", "512", "--output_dir", str(tmp_path / "run")]
    in_process(*arguments, "--max_steps", str(steps))
    result = result_of(tmp_path / "run")
    assert (result["steps"], result["stopped_early"], result["images_seen"]) == (steps, True, steps * 128)
    assert [int(row["step"]) for row in rows_of(tmp_path / "run")] == [4, steps]
    in_process(*arguments, "--resume", "auto")
    in_process("--epochs", "2", "--train_images", "512", "--output_dir", str(tmp_path / "whole"))
    assert_equal_runs(tmp_path / "run", tmp_path / "whole")
    assert result_of(tmp_path / "run")["stopped_early"] is False


def test_images_from_disk_resume_within_an_epoch(in_process, tmp_path):
    data = files.write_folders(tmp_path / "data", per_class=8)
    arguments = ["--dataset", "image_folder", "--data_dir", str(data), "--batch_size", "4", "--image_size", "32"]
    arguments += ["--epochs", "2"]
    in_process(*arguments, "--num_workers", "2", "--output_dir", str(tmp_path / "whole"))
    for steps in ("4", "8", "12"):  # of six in an epoch
        in_process(*arguments, "--max_steps", steps, "--resume", "auto", "--output_dir", str(tmp_path / "run"))
    assert_equal_runs(tmp_path / "run", tmp_path / "whole")


def test_a_bad_loss_ends_the_run_at_its_step(in_process, tmp_path, monkeypatch):
    add, seen = results.Meter.add, []

    def poisoned(meter, loss, *arguments):
        seen.append(loss)
        add(meter, loss * float("nan") if len(seen) == 12 else loss, *arguments)

    monkeypatch.setattr(results.Meter, "add", poisoned)
    folder = tmp_path / "run"
    with pytest.raises(RecipeError, match=rf"step 12 \(epoch 2\); the last good checkpoint is {folder}/check"):
        in_process("--epochs", "3", "--output_dir", str(folder))
    assert (step_of(folder), len(seen)) == (STEPS, 12)


# --- resuming: damage, and what may change ---------------------------------------------------------------------------

OPEN_ENDED = ["--lr_schedule", "constant", "--warmup_epochs", "0"]  # more epochs are more of the same


@pytest.fixture(scope="module")
def two_epochs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two") / "run"
    with recipe_in_process() as run:
        run("--epochs", "2", *OPEN_ENDED, "--ema_decay", "0.9", "--output_dir", str(folder))
    return folder


@pytest.fixture
def run(two_epochs, tmp_path) -> Path:
    """A finished run of two epochs, to spoil."""
    return Path(shutil.copytree(two_epochs, tmp_path / "run"))


def again(run: Path, *arguments: str) -> list[str]:
    fixed = ["--epochs", "2", *OPEN_ENDED, "--ema_decay", "0.9", "--output_dir", str(run), "--resume", "auto"]
    return [*fixed, *arguments]


CHECKPOINT_FILES = (
    "state.json", "checksums.json", "model.safetensors", "optimizer.bin", "random_states_0.pkl", "ema.safetensors"
)  # fmt: skip


@pytest.mark.parametrize("name", CHECKPOINT_FILES)
@pytest.mark.usefixtures("in_process")
def test_a_flipped_bit_is_named(name, run, capsys, monkeypatch):
    file = run / "checkpoint" / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1 << 6
    file.write_bytes(content)
    shutil.rmtree(run / "checkpoint.previous")
    before = snapshot(run)
    line = fails(capsys, monkeypatch, *SCRIPT[1:], *TINY, *again(run))
    assert "checksums.json" in line
    assert name in line or name == "checksums.json"
    assert snapshot(run) == before


def test_a_damaged_checkpoint_falls_back_to_the_one_before(run, two_epochs, in_process, capsys):
    (run / "checkpoint" / "model.safetensors").write_bytes(b"half")
    in_process(*again(run))
    printed = capsys.readouterr().out
    assert f"{run}/checkpoint/model.safetensors does not match its checksum in checksums.json" in printed
    assert f"continuing {run}/checkpoint.previous after epoch 1" in printed
    assert_equal_runs(run, two_epochs)


def edit_state(run: Path, **changes: object) -> None:
    """Write another state.json as if the run had written it."""
    for folder in (run / "checkpoint", run / "checkpoint.previous"):
        saved = json.loads((folder / "state.json").read_text())
        (folder / "state.json").write_text(json.dumps(saved | changes))
        (folder / "checksums.json").write_text(json.dumps(checkpoint.compute_checksums(folder)))


SPOILED = [
    # Path.exists spoils nothing: there the arguments are what is wrong
    (Path.exists, ["--lr", "0.2"], r"other settings: lr \(there 0.1, now 0.2\)"),
    (Path.exists, ["--method", "none", "--seed", "5"], "method .*, seed "),
    (Path.exists, ["--epochs", "3", "--lr_schedule", "cosine"], "epochs .there 2, now 3.*change the course of"),
    (Path.exists, ["--epochs", "1"], "has 2 epochs; raise --epochs"),
    (Path.exists, ["--max_steps", "2"], "is at step 18; raise --max_steps"),
    (lambda run: edit_state(run, num_processes=2), [], "written by 2 processes and this run has 1"),
    (lambda run: edit_state(run, format=3), [], "has format 3; this version reads format 2"),
    (lambda run: [(run / name / "checksums.json").unlink() or edit_format(run / name) for name in
                  ("checkpoint", "checkpoint.previous")], [], "has format 1, without checksums"),
    (lambda run: [shutil.rmtree(path) for path in run.glob("checkpoint*")], [], "holds results .* and no checkpoint"),
    (lambda run: run.rename(run.with_name("moved")), ["--resume", "moved"], "moved is not a complete checkpoint"),
]  # fmt: skip


def edit_format(folder: Path) -> None:
    saved = json.loads((folder / "state.json").read_text())
    del saved["format"]
    (folder / "state.json").write_text(json.dumps(saved))


@pytest.mark.parametrize(("spoil", "arguments", "message"), SPOILED, ids=[message for *_, message in SPOILED])
@pytest.mark.usefixtures("in_process")
def test_a_resume_that_would_not_continue_is_refused(spoil, arguments, message, run, capsys, monkeypatch):
    spoil(run)
    before = snapshot(run.parent)
    monkeypatch.chdir(run.parent)
    line = fails(capsys, monkeypatch, *SCRIPT[1:], *TINY, *again(run, *arguments))
    assert re.search(message, line), line
    assert snapshot(run.parent) == before


def test_a_setting_that_the_run_did_not_know_has_its_default(run, in_process, capsys, monkeypatch):
    saved = json.loads((run / "checkpoint" / "state.json").read_text())["config"]
    del saved["cutmix"]
    edit_state(run, config=saved)
    line = fails(capsys, monkeypatch, *SCRIPT[1:], *TINY, *again(run, "--cutmix", "0.5"))
    assert "cutmix (there 0.0, now 0.5)" in line
    in_process(*again(run))


def test_a_finished_run_resumes_to_itself_and_on(run, in_process, tmp_path):
    before = result_of(run)
    weights = (run / "model.safetensors").read_bytes()
    in_process(*again(run))
    assert result_of(run) == before | {"config": before["config"] | {"output_dir": str(run)}}  # it was copied
    assert (run / "model.safetensors").read_bytes() == weights
    old = snapshot(run)
    in_process(*again(tmp_path / "new"), "--epochs", "3", "--resume", str(run / "checkpoint"))
    assert snapshot(run) == old
    in_process(*again(run), "--epochs", "3")
    assert_equal_runs(run, tmp_path / "new")
    assert train.parse_settings(["--config", str(run / "config.yaml")]).epochs == len(rows_of(run)) == 3


@pytest.mark.usefixtures("in_process")
def test_a_checkpoint_does_not_continue_over_another_run(run, tmp_path, capsys, monkeypatch):
    (tmp_path / "third").mkdir()
    (tmp_path / "third" / "result.json").write_text("precious")
    arguments = again(tmp_path / "third", "--resume", str(run / "checkpoint"))
    assert "holds another run" in fails(capsys, monkeypatch, *SCRIPT[1:], *TINY, *arguments)
    assert (tmp_path / "third" / "result.json").read_text() == "precious"


def test_a_run_killed_between_two_renames_resumes(run, two_epochs, in_process, capsys):
    shutil.rmtree(run / "checkpoint.previous")
    (run / "checkpoint").rename(run / "checkpoint.previous")
    (run / "checkpoint.tmp").mkdir()
    in_process(*again(run))
    assert "checkpoint.previous after epoch 2" in capsys.readouterr().out
    assert_equal_runs(run, two_epochs)


def test_a_process_left_alone_is_an_error(in_process, monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")  # as a launcher would say that Accelerate does not understand
    monkeypatch.setattr(train, "Accelerator", lambda **_: type("One", (), {"num_processes": 1}))
    with pytest.raises(RecipeError, match="2 processes were launched, and Accelerate joined 1"):
        in_process("--output_dir", str(tmp_path / "run"))


# --- a disk that is full ---------------------------------------------------------------------------------------------

# Files of more than so many bytes cannot be written, from when a file is there.
LIMITED = """
import pathlib, resource, threading, time
def lower():
    while not pathlib.Path({there!r}).exists():
        time.sleep(0.001)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500 * 1024, 500 * 1024))
threading.Thread(target=lower, daemon=True).start()
"""
SHORT = [*TINY, "--epochs", "3", "--gap_images", "0"]


@pytest.mark.parametrize("there", ["config.yaml", "checkpoint/state.json"])
def test_a_full_disk_is_one_line_and_keeps_what_was_whole(there, recipe_server, tmp_path):
    folder = tmp_path / "run"
    before = LIMITED.format(there=str(folder / there))
    printed = recipe_server.run(1, *SHORT, "--output_dir", str(folder), code=2, before=before)
    (line,) = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert re.match(r"error: cannot write to output_dir .*MiB free there\); make room, or name another folder", line)
    assert "Traceback" not in printed
    left = {path.name for path in folder.iterdir()} - {"metrics.csv", "best.safetensors"}
    whole = {"checkpoint"} if "checkpoint" in there else set()
    assert left == {".lock", "config.yaml", *whole}
    assert ("continue with --resume auto" in line) == bool(whole)


# --- optimisation ----------------------------------------------------------------------------------------------------


def rates(steps_per_epoch: int, *arguments: str) -> list[float]:
    config = train.parse_settings(["--config", CONFIG, "--epochs", "10", *arguments])
    return [train.learning_rate(config, step, steps_per_epoch) for step in range(10 * steps_per_epoch)]


def test_the_learning_rate_follows_its_schedule():
    found = rates(4, "--lr_schedule", "multistep", "--milestones", "[3,5,8]", "--lr", "0.1", "--warmup_epochs", "0")
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    theirs = torch.optim.lr_scheduler.MultiStepLR(optimizer, [12, 20, 32], gamma=0.1)
    for rate in found:
        assert rate == pytest.approx(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    found = rates(5, "--warmup_epochs", "2", "--lr", "0.4")
    assert found[:10] == pytest.approx([0.4 * (step + 1) / 10 for step in range(10)])
    assert (found[10], found[30]) == (pytest.approx(0.4), pytest.approx(0.2))
    assert found[10:] == sorted(found[10:], reverse=True)
    assert set(rates(5, "--lr_schedule", "constant", "--warmup_epochs", "0", "--lr", "0.03")) == {0.03}


def test_layer_decay_scales_the_learning_rate_by_depth(in_process, tmp_path, monkeypatch):
    seen = []
    original = train.set_learning_rate
    monkeypatch.setattr(train, "set_learning_rate", lambda *a: (original(*a), seen.append(a[0].param_groups))[0])
    in_process("--layer_decay", "0.5", "--opt", "adamw", "--max_steps", "1", "--output_dir", str(tmp_path / "run"))
    scales = {group["lr_scale"] for group in seen[0]}
    assert {1.0, 0.5, 0.25} <= scales
    assert all(group["lr"] / group["lr_scale"] == pytest.approx(0.1 / 18) for group in seen[0])
    assert 0.0 in {group["weight_decay"] for group in seen[0]}  # norms and biases


def test_the_linear_scheme_rises_and_is_measured(in_process, tmp_path):
    in_process("--epochs", "2", "--drop_prob", "0.4", "--drop_schedule", "linear", "--output_dir", str(tmp_path / "r"))
    rows = rows_of(tmp_path / "r")
    assert [float(row["drop_prob"]) for row in rows] == pytest.approx([0.2, 0.4])
    # a sub-model of bdropdml loses half of it
    assert [float(row["drop_rate"]) for row in rows] == pytest.approx([0.1, 0.2], abs=0.02)


def test_a_clipped_gradient_bounds_the_step(in_process, tmp_path):
    one_step = ["--max_steps", "1", "--momentum", "0", "--weight_decay", "0", "--warmup_epochs", "0", "--lr", "1"]
    weights = {}
    for name, norm in (("free", "1e9"), ("clipped", "0.001"), ("still", "1e-12")):
        in_process(*one_step, "--clip_grad_norm", norm, "--output_dir", str(tmp_path / name))
        weights[name] = load_file(tmp_path / name / "model.safetensors")
    trained = [name for name in weights["still"] if "running_" not in name and "num_batches" not in name]

    def length(name: str) -> float:
        return sum((weights[name][key] - weights["still"][key]).square().sum() for key in trained).sqrt().item()

    assert length("clipped") == pytest.approx(0.001, rel=0.01)
    assert length("free") > 0.1


def two_convolutions(*_arguments: object, **_options: object) -> nn.Module:
    """A network for digits that torch.compile is soon done with."""
    return nn.Sequential(
        OrderedDict(
            stem=nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU()),
            body=nn.Sequential(nn.Conv2d(8, 16, 3, 1, 1), nn.ReLU()),
            head=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)),
        )
    )


def test_a_compiled_run_is_the_eager_one(in_process, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "create_model", two_convolutions)
    monkeypatch.setattr(torch._inductor.config, "fallback_random", True)  # the masks that eager mode draws
    arguments = ["--sites", "[body]", "--epochs", "1"]
    for compiled in ("false", "true"):
        in_process(*arguments, "--compile", compiled, "--output_dir", str(tmp_path / compiled))
    (eager,), (compiled,) = (rows_of(tmp_path / name) for name in ("false", "true"))
    numbers = {name for name, value in eager.items() if value and "second" not in name}
    assert {"train_loss", "train_kl", "test_ce", "gap_kl"} <= numbers
    for name in numbers:
        near = {"abs": 0.5} if name.endswith(("top1", "agreement", "_1", "_2", "ece")) else {"rel": 1e-3}
        assert float(compiled[name]) == pytest.approx(float(eager[name]), **near), name
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("true", "false"))
    assert ours.keys() == theirs.keys() == two_convolutions().state_dict().keys()
    assert all(torch.allclose(ours[name].float(), theirs[name].float(), atol=1e-5) for name in ours)


def test_the_average_follows_the_weights(in_process, tmp_path):
    """Against the definition: the first step is copied, then ema += (1 - decay) (weights - ema) with timm's warm-up."""
    for steps in (1, 2):
        in_process("--ema_decay", "0.1", "--max_steps", str(steps), "--output_dir", str(tmp_path / str(steps)))
    first, second = (load_file(tmp_path / str(steps) / "model.safetensors") for steps in (1, 2))
    averages = [load_file(tmp_path / str(steps) / "ema.safetensors") for steps in (1, 2)]
    for name in first:
        torch.testing.assert_close(averages[0][name], first[name])
        if first[name].is_floating_point():
            torch.testing.assert_close(averages[1][name], first[name] + 0.9 * (second[name] - first[name]))
    assert result_of(tmp_path / "2")["top1_ema_last"] == float(rows_of(tmp_path / "2")[0]["ema_top1"])


@pytest.mark.parametrize("mixing", [["--mixup", "1", "--method", "none"], ["--mixup", "0.5", "--cutmix", "1"]])
def test_mixed_images_train_on_mixed_labels(mixing, in_process, tmp_path, monkeypatch):
    add, targets = results.Meter.add, []
    monkeypatch.setattr(results.Meter, "add", lambda meter, *given: (targets.append(given[2]), add(meter, *given))[1])
    in_process(*mixing, "--epochs", "1", "--output_dir", str(tmp_path / "run"))
    mixed = torch.cat(targets)
    assert mixed.shape == (STEPS * 128, 10)
    torch.testing.assert_close(mixed.sum(1), torch.ones(len(mixed)))
    assert ((mixed > 0.01).sum(1) == 2).float().mean() > 0.5


def test_unlabelled_images_train_with_the_divergence_alone(in_process, tmp_path):
    arguments = ["--train_images", "128", "--unlabelled_images", "512", "--batch_size", "64", "--epochs", "1"]
    in_process(*arguments, "--alpha", "1", "--output_dir", str(tmp_path / "run"))
    (row,) = rows_of(tmp_path / "run")
    assert int(row["images_seen"]) == 128  # those with a label
    # alpha 1: the mean over sub-models of T^2 KL over all 2 * 64 rows of a step
    assert float(row["train_loss"]) == pytest.approx(9 * float(row["train_kl"]) / 2, rel=1e-4)


# --- what is measured ------------------------------------------------------------------------------------------------


def test_the_gap_is_that_of_two_forwards():
    """Against train mode itself, on a network without batch norm, where the masks are all that differs."""
    torch.manual_seed(0)
    network = models.create_model("test_convnext", num_classes=10, in_chans=1)
    apply_rblock(network, input_size=(1, 32, 32))
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    images = torch.randn(24, 1, 32, 32)
    before = torch.get_rng_state()
    gap = results.train_inference_gap(network, iter([images[:16], images[16:]]), seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(module.training for module in network.modules())

    torch.manual_seed(5)
    with torch.no_grad():
        full = network.eval()(images).softmax(1)
        network.train()
        parts = [network(batch).chunk(2) for batch in (images[:16], images[16:])]
    divergence, agreeing = [], []
    for sub_model in (0, 1):
        masked = torch.cat([part[sub_model] for part in parts]).softmax(1)
        divergence.append((full * (full / masked).log()).sum(1))
        agreeing.append((full.argmax(1) == masked.argmax(1)).float())
    assert gap["gap_kl"] == pytest.approx(torch.cat(divergence).mean().item(), rel=1e-4)
    assert gap["gap_agreement"] == pytest.approx(100 * torch.cat(agreeing).mean().item(), abs=1e-4)
    assert gap["gap_kl"] > 1e-4
    assert gap["drop_rate"] == pytest.approx(0.1, abs=0.03)


def test_the_gap_leaves_statistics_of_batch_norm_alone():
    network = models.create_model("test_resnet", num_classes=10)
    apply_rblock(network, input_size=(3, 32, 32))
    before = copy.deepcopy(network.state_dict())
    results.train_inference_gap(network, iter([torch.randn(8, 3, 32, 32)]), seed=0)
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


def test_measuring_the_gap_changes_nothing(in_process, tmp_path):
    for images in ("0", "100"):
        in_process(
            "--epochs", "2", "--train_images", "512", "--gap_images", images, "--output_dir", str(tmp_path / images)
        )
    without, with_gap = timeless(rows_of(tmp_path / "0")), timeless(rows_of(tmp_path / "100"))
    measured = ("gap_kl", "gap_agreement", "drop_rate")
    assert all(float(row["gap_kl"]) > 0 for row in with_gap)
    assert [row | dict.fromkeys(measured, "") for row in with_gap] == without


def test_scores_follow_their_definitions():
    logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 3.0, 0.0], [0.0, 0.0, 0.5]])
    labels = torch.tensor([0, 1, 2, 2])
    scores = results.score_logits(logits, labels, "test")
    shares = logits.softmax(1)
    assert scores["test_top1"] == 75
    assert scores["test_ce"] == pytest.approx(-shares[range(4), labels].log().mean().item())
    confidence, right = shares.amax(1), torch.tensor([1.0, 1.0, 0.0, 1.0])  # each in a bin of its own
    assert scores["test_ece"] == pytest.approx(100 * (confidence - right).abs().mean().item(), rel=1e-5)


def test_the_terms_of_a_row_make_its_loss(in_process, tmp_path):
    in_process("--combine", "sum", "--epochs", "2", "--output_dir", str(tmp_path / "run"))
    for row in rows_of(tmp_path / "run"):
        both = (float(row["train_top1_1"]) + float(row["train_top1_2"])) / 2
        assert float(row["train_top1"]) == pytest.approx(both)
        terms = 0.9 * 2 * float(row["train_ce"]) + 0.1 * 9 * float(row["train_kl"])
        assert float(row["train_loss"]) == pytest.approx(terms, rel=1e-4)
    with safe_open(tmp_path / "run" / "best.safetensors", "pt") as file:
        about = json.loads(file.metadata()["about"])
    best = max(rows_of(tmp_path / "run"), key=lambda row: float(row["test_top1"]))
    assert (about["epoch"], about["test_top1"]) == (int(best["epoch"]), float(best["test_top1"]))


def test_tensorboard_gets_every_number(in_process, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    in_process("--epochs", "2", "--trackers", "[tensorboard]", "--output_dir", str(tmp_path / "run"))
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "logs" / "rblock-fx"))
    events.Reload()
    rows = rows_of(tmp_path / "run")
    for name in ("train_loss", "test_top1", "test_ece", "gap_kl"):
        logged = [(event.step, event.value) for event in events.Scalars(name)]
        assert logged == [(int(row["step"]), pytest.approx(float(row[name]))) for row in rows]
