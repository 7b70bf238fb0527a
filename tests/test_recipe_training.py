"""What people expect of a training script: kills, signals, schedules, averages, trackers, what it measures."""

import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import OrderedDict
from pathlib import Path

import psutil
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from training import epoch, measure, models, optimise, settings

from tests import recipe_files as files
from tests.recipe_tools import (
    CONFIG,
    ENVIRONMENT,
    ONE_PROCESS,
    ROOT,
    SCRIPT,
    TINY,
    TWO_PROCESSES,
    RecipeServer,
    fails,
    kill_tree,
    launch,
    recipe_in_process,
    result_of,
    rows_of,
    snapshot,
)

EVERYTHING = [  # whatever carries state from step to step
    *TINY, "--epochs", "6", "--ema_decay", "0.9", "--mixup", "0.2", "--accumulate_steps", "2",
    "--drop_schedule", "linear", "--clip_grad_norm", "1", "--warmup_epochs", "1",
]  # fmt: skip
STEPS = 9  # in an epoch of TINY


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    running = RecipeServer(tmp_path_factory.mktemp("server"))
    yield running
    running.close()


def steps_of(folder: Path) -> int:
    """The steps that the newest complete checkpoint of a run has; 0 before the first."""
    for name in ("checkpoint", "checkpoint.previous"):
        try:
            state = json.loads((folder / name / "state.json").read_text())["state"]
        except (FileNotFoundError, NotADirectoryError):
            continue
        return len(state["rows"]) * STEPS + state["epoch_steps"]
    return 0


def wait_for_steps(folder: Path, steps: int, pid: int) -> None:
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        if steps_of(folder) >= steps:
            return
        time.sleep(0.005)
    raise AssertionError("the run ended early")


def assert_equal_runs(one: Path, two: Path) -> None:
    """Bit-equal weights of every kind, and equal metrics but for the times."""
    for name in ("model", "best", "ema"):
        ours, theirs = (load_file(folder / f"{name}.safetensors") for folder in (one, two))
        assert ours.keys() == theirs.keys()
        assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []
    timeless = [[{k: v for k, v in row.items() if "second" not in k} for row in rows_of(run)] for run in (one, two)]
    assert timeless[0] == timeless[1]


# --- ends and beginnings ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[1, 2], ids=["one process", "two processes"])
def uninterrupted(request, tmp_path_factory) -> tuple[int, Path]:
    """A number of processes, and the run that they make, launched as users do, when nothing comes between."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    launcher = {1: ONE_PROCESS, 2: TWO_PROCESSES}[request.param]
    launch([*launcher, *SCRIPT, *EVERYTHING, "--output_dir", str(folder)])
    assert result_of(folder)["num_processes"] == request.param
    return request.param, folder


def test_a_run_killed_at_ten_random_moments_gives_the_very_same_weights(uninterrupted, server, tmp_path):
    processes, whole = uninterrupted
    run = tmp_path / "run"
    arguments = [*SCRIPT[1:], *EVERYTHING, "--checkpoint_steps", "1", "--resume", "auto", "--output_dir", str(run)]
    moments = random.Random(0)
    for _ in range(10):
        pids = server.start(processes, *arguments)
        try:
            wait_for_steps(run, steps_of(run) + 1, pids[0])
            time.sleep(moments.uniform(0, 0.3))  # into a step, an evaluation, or the writing of a checkpoint
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
            codes = server.wait()
        assert codes == [-signal.SIGKILL] * processes
    assert not (run / "result.json").exists()
    server.run(processes, *arguments)
    assert_equal_runs(run, whole)


def test_a_signal_lets_the_step_finish_and_saves(uninterrupted, server, tmp_path):
    processes, whole = uninterrupted
    number = {1: signal.SIGINT, 2: signal.SIGTERM}[processes]
    run = tmp_path / "run"
    arguments = [*SCRIPT[1:], *EVERYTHING, "--resume", "auto", "--output_dir", str(run)]
    pids = server.start(processes, *arguments, "--checkpoint_steps", str(STEPS + 2))
    wait_for_steps(run, STEPS + 2, pids[0])
    os.kill(pids[-1], number)  # one of them is told, and all of them end
    assert server.wait() == [0] * processes
    told = re.findall(r"stopped at step (\d+) and saved; --resume auto goes on from there", server.log.read_text())
    assert steps_of(run) == int(told[-1]) >= STEPS + 2
    assert not (run / "result.json").exists()
    server.run(processes, *arguments)
    assert_equal_runs(run, whole)


def test_torchrun_passes_a_signal_on(tmp_path):
    command = [*TWO_PROCESSES, *SCRIPT, *EVERYTHING, "--checkpoint_steps", "2", "--output_dir", str(tmp_path / "run")]
    process = subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        wait_for_steps(tmp_path / "run", 2, process.pid)
        process.send_signal(signal.SIGTERM)
        printed, _ = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            kill_tree(process)
    told = re.search(r"stopped at step (\d+) and saved", printed)
    assert told, printed
    assert steps_of(tmp_path / "run") == int(told[1])


def test_the_same_seed_gives_the_same_run_and_another_seed_another(in_process, tmp_path):
    for name, seed in (("one", "3"), ("two", "3"), ("other", "4")):
        in_process(*EVERYTHING[4:], "--epochs", "1", "--seed", seed, "--output_dir", str(tmp_path / name))
    assert_equal_runs(tmp_path / "one", tmp_path / "two")
    assert rows_of(tmp_path / "one")[0]["train_loss"] != rows_of(tmp_path / "other")[0]["train_loss"]


# one step an epoch, so that metrics.csv has the loss of every step; LayerNorm looks at one sample alone
TRAJECTORY = [
    "--model", "test_convnext", "--model_kwargs", "{}", "--image_size", "32", "--batch_size", "1200", "--epochs", "6",
    "--drop_prob", "0", "--warmup_epochs", "0", "--lr", "0.02",
]  # fmt: skip


@pytest.fixture(scope="module")
def trajectory(tmp_path_factory) -> list[dict[str, str]]:
    folder = tmp_path_factory.mktemp("trajectory") / "run"
    with recipe_in_process() as run:
        run(*TRAJECTORY, "--output_dir", str(folder))
    return rows_of(folder)


def assert_same_trajectory(rows: list[dict[str, str]], others: list[dict[str, str]]) -> None:
    for name in ("train_loss", "train_ce", "test_ce"):
        assert [float(row[name]) for row in rows] == pytest.approx([float(row[name]) for row in others], abs=1e-5)
    assert len(rows) == 6
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"]) - 0.05  # it does train


def test_two_processes_with_half_the_batch_take_the_steps_of_one(trajectory, tmp_path):
    launch([*TWO_PROCESSES, *SCRIPT, *TINY, *TRAJECTORY, "--output_dir", str(tmp_path / "run")])
    assert result_of(tmp_path / "run")["num_processes"] == 2
    assert_same_trajectory(rows_of(tmp_path / "run"), trajectory)


def test_accumulated_gradients_are_those_of_the_whole_batch(trajectory, in_process, tmp_path):
    in_process(*TRAJECTORY, "--accumulate_steps", "3", "--output_dir", str(tmp_path / "run"))
    assert_same_trajectory(rows_of(tmp_path / "run"), trajectory)


def test_max_steps_ends_a_run_that_can_go_on(in_process, tmp_path):
    steps = STEPS + 4
    arguments = ["--epochs", "3", "--output_dir", str(tmp_path / "run")]
    in_process(*arguments, "--max_steps", str(steps))
    result, rows = result_of(tmp_path / "run"), rows_of(tmp_path / "run")
    assert (result["steps"], result["stopped_early"], result["images_seen"]) == (steps, True, steps * 128)
    assert [int(row["step"]) for row in rows] == [min(steps, STEPS * (index + 1)) for index in range(len(rows))]
    in_process(*arguments, "--resume", "auto")
    in_process("--epochs", "3", "--output_dir", str(tmp_path / "whole"))
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "whole"))
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert result_of(tmp_path / "run")["stopped_early"] is False
    assert [int(row["step"]) for row in rows_of(tmp_path / "run")] == [9, 18, 27]


@pytest.mark.parametrize("dataset", ["wds/shards", "image_folder"])
def test_data_from_disk_goes_on_within_an_epoch(dataset, in_process, tmp_path):
    """Streams skip what was seen; images in folders are augmented in loader workers, each by its own seed."""
    if dataset == "wds/shards":
        data = ["--data_dir", str(files.write_shards(tmp_path / "data", png=files.noisy_png)), "--num_classes", "3"]
    else:
        data = ["--data_dir", str(files.write_folders(tmp_path / "data", per_class=8)), "--num_workers", "2"]
    arguments = ["--dataset", dataset, *data, "--batch_size", "4", "--image_size", "32", "--epochs", "2"]
    in_process(*arguments, "--output_dir", str(tmp_path / "whole"))
    for steps in ("4", "8"):  # of six in an epoch
        in_process(*arguments, "--max_steps", steps, "--resume", "auto", "--output_dir", str(tmp_path / "run"))
    in_process(*arguments, "--resume", "auto", "--output_dir", str(tmp_path / "run"))
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "whole"))
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert [row["train_loss"] for row in rows_of(tmp_path / "run")] == [
        row["train_loss"] for row in rows_of(tmp_path / "whole")
    ]
    assert result_of(tmp_path / "run")["steps"] == 12


def test_a_loss_that_is_no_number_ends_the_run_at_its_step(in_process, tmp_path, monkeypatch):
    train_on, seen = epoch.train_on, []

    def poisoned(*arguments):
        loss, *rest = train_on(*arguments)
        seen.append(loss)
        return (loss * float("nan") if len(seen) == 12 else loss, *rest)

    monkeypatch.setattr(epoch, "train_on", poisoned)
    folder = tmp_path / "run"
    with pytest.raises(settings.RecipeError, match=rf"step 12 \(epoch 2\); the last good checkpoint is {folder}/check"):
        in_process("--epochs", "3", "--output_dir", str(folder))
    assert steps_of(folder) == STEPS
    assert len(seen) == 12


# --- a disk that is full ---------------------------------------------------------------------------------------------

UNSHARED = ["unshare", "--user", "--map-root-user", "--mount", "bash", "-c"]  # may mount, without being root

# Files of more than so many bytes cannot be written, from the start or from when a file is there.
LIMITED = """
import pathlib, resource, runpy, sys, threading, time
limit, there = int(sys.argv[1]), pathlib.Path(sys.argv[2])
def lower():
    while not there.exists():
        time.sleep(0.001)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
lower() if there.exists() else threading.Thread(target=lower, daemon=True).start()
sys.argv = sys.argv[3:]
sys.path.insert(0, str(pathlib.Path(sys.argv[0]).parent))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_in_little_room(folder: Path, kibibytes: int, after: Path) -> subprocess.CompletedProcess[str] | None:
    """Run in a tmpfs of that size, which is copied to `after` at the end; None where none can be mounted."""
    mount = f"mount -t tmpfs -o size={kibibytes}k tmpfs {folder.parent}"
    if subprocess.run([*UNSHARED, mount], capture_output=True, check=False).returncode != 0:
        return None
    command = shlex.join([sys.executable, *SCRIPT, *SHORT, "--output_dir", str(folder)])
    script = f"{mount}; {command}; rc=$?; cp -r {folder} {after}; exit $rc"
    return subprocess.run([*UNSHARED, script], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)


def run_with_small_files(folder: Path, kibibytes: int, there: Path) -> subprocess.CompletedProcess[str]:
    """Run with a limit on the size of a file from when `there` exists."""
    command = [sys.executable, "-c", LIMITED, str(1024 * kibibytes), str(there), *SCRIPT, *SHORT]
    command += ["--output_dir", str(folder)]
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)


SHORT = [*TINY, "--epochs", "3", "--gap_images", "0"]


def test_a_disk_without_room_for_a_checkpoint_is_one_line(tmp_path):
    folder = tmp_path / "run"
    done = run_with_small_files(folder, 500, there=folder)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert re.match(r"error: cannot write to output_dir .*MiB free there\); make room, or name another folder", line), (
        line
    )
    assert {path.name for path in folder.iterdir()} == {".lock", "config.yaml"}


@pytest.mark.parametrize("way", ["tmpfs", "limit"])
def test_a_disk_that_fills_up_is_one_line_and_keeps_what_was_whole(way, tmp_path):
    """With room for one checkpoint of 4,600 KiB and not for two; where nothing can be mounted, under a limit alone."""
    (tmp_path / "small").mkdir()
    folder = tmp_path / "small" / "run"
    done = run_in_little_room(folder, 7_000, tmp_path / "after") if way == "tmpfs" else None
    if done is None:
        done = run_with_small_files(folder, 500, there=folder / "checkpoint" / "state.json")
    else:
        folder = tmp_path / "after"
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert re.match(r"error: cannot write to output_dir .*small.*MiB free there", line), line
    assert "continue with --resume auto" in line
    assert steps_of(folder) == STEPS
    left = {path.name for path in folder.iterdir()}
    assert left - {"metrics.csv"} == {".lock", "config.yaml", "checkpoint", "best.safetensors"}


# --- optimisation ----------------------------------------------------------------------------------------------------


def test_the_papers_schedule_is_that_of_pytorch():
    config = settings.read_config(
        ["--config", CONFIG, "--lr_schedule", "multistep", "--milestones", "[3,5,8]", "--epochs", "10", "--lr", "0.1",
         "--warmup_epochs", "0"]
    )  # fmt: skip
    optimizers = [torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1) for _ in range(2)]
    ours = optimise.make_scheduler(config, optimizers[0], steps_per_epoch=4)
    theirs = torch.optim.lr_scheduler.MultiStepLR(optimizers[1], [12, 20, 32], gamma=0.1)
    for _ in range(40):
        assert ours.get_last_lr() == pytest.approx(theirs.get_last_lr())
        for optimizer, scheduler in zip(optimizers, (ours, theirs), strict=True):
            optimizer.step()
            scheduler.step()


def test_the_linear_scheme_rises_to_the_drop_rate_and_is_measured(in_process, tmp_path):
    in_process("--epochs", "4", "--drop_prob", "0.4", "--drop_schedule", "linear", "--output_dir", str(tmp_path / "r"))
    rows = rows_of(tmp_path / "r")
    assert [float(row["drop_prob"]) for row in rows] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    # a sub-model of bdropdml loses half of it
    assert [float(row["drop_rate"]) for row in rows] == pytest.approx([0.05, 0.1, 0.15, 0.2], abs=0.02)


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


def two_convolutions() -> nn.Module:
    """A network for digits that torch.compile is soon done with."""
    return nn.Sequential(
        OrderedDict(
            stem=nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU()),
            body=nn.Sequential(nn.Conv2d(8, 16, 3, 1, 1), nn.ReLU()),
            head=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)),
        )
    )


def test_a_compiled_run_is_the_eager_one(in_process, tmp_path, monkeypatch):
    monkeypatch.setitem(models.SMALL, "two_convolutions", ("resnet18", lambda _: two_convolutions()))
    monkeypatch.setattr(torch._inductor.config, "fallback_random", True)  # the masks that eager mode draws
    arguments = ["--model", "two_convolutions", "--model_kwargs", "{}", "--sites", "[body]", "--epochs", "1"]
    for compiled in ("false", "true"):
        in_process(*arguments, "--compile", compiled, "--output_dir", str(tmp_path / compiled))
    (eager,), (compiled,) = (rows_of(tmp_path / name) for name in ("false", "true"))
    numbers = {name for name, value in eager.items() if value and "second" not in name}
    assert {"train_loss", "train_kl", "test_ce", "gap_kl"} <= numbers
    for name in numbers:
        near = {"abs": 0.5} if "top1" in name or "agreement" in name else {"rel": 1e-3}  # an image is 0.1 to 0.2 %
        assert float(compiled[name]) == pytest.approx(float(eager[name]), **near), name
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("true", "false"))
    assert ours.keys() == theirs.keys() == two_convolutions().state_dict().keys()
    assert all(torch.allclose(ours[name].float(), theirs[name].float(), atol=1e-5) for name in ours)


def test_the_average_follows_the_weights(in_process, tmp_path):
    """Against the definition: the first step is copied, then ema += (1 - decay) (weights - ema) with timm's warm-up."""
    for steps in (1, 2):
        arguments = ["--ema_decay", "0.1", "--max_steps", str(steps), "--output_dir", str(tmp_path / str(steps))]
        in_process(*arguments)
    first, second = (load_file(tmp_path / str(steps) / "model.safetensors") for steps in (1, 2))
    averages = [load_file(tmp_path / str(steps) / "ema.safetensors") for steps in (1, 2)]
    for name in first:
        torch.testing.assert_close(averages[0][name], first[name])
        if first[name].is_floating_point():
            torch.testing.assert_close(averages[1][name], first[name] + 0.9 * (second[name] - first[name]))
    rows = rows_of(tmp_path / "2")
    assert 0 <= float(rows[0]["ema_top1"]) <= 100
    assert result_of(tmp_path / "2")["top1_ema_last"] == float(rows[0]["ema_top1"])


@pytest.mark.parametrize("method", ["bdropdml", "none"])
@pytest.mark.parametrize(
    "mixing", [["--mixup", "1"], ["--cutmix", "1"], ["--mixup", "0.5", "--cutmix", "1"]], ids=" ".join
)
def test_mixed_images_train_on_mixed_labels(mixing, method, in_process, tmp_path, monkeypatch):
    targets = []
    train_on = epoch.train_on

    def listen(*arguments):
        result = train_on(*arguments)
        targets.append(result[2])
        return result

    monkeypatch.setattr(epoch, "train_on", listen)
    in_process(*mixing, "--method", method, "--epochs", "1", "--output_dir", str(tmp_path / "run"))
    mixed = torch.cat(targets)
    assert mixed.shape == (STEPS * 128, 10)
    torch.testing.assert_close(mixed.sum(1), torch.ones(len(mixed)))
    assert ((mixed > 0.01).sum(1) == 2).float().mean() > 0.5
    assert 0 < float(rows_of(tmp_path / "run")[0]["train_top1"]) < 100


def test_an_odd_share_cannot_be_mixed(tmp_path, capsys, monkeypatch):
    line = fails(
        capsys, monkeypatch, "--config", CONFIG, "--mixup", "1", "--batch_size", "33",
        "--output_dir", str(tmp_path / "run"),
    )  # fmt: skip
    assert "an even number of them for mixup and cutmix" in line


# --- what is measured ------------------------------------------------------------------------------------------------


def test_the_gap_is_that_of_two_forwards(tmp_path):
    """Against train mode itself, on a network without batch norm, where the masks are all that differs."""
    config = settings.read_config(
        ["--config", CONFIG, "--model", "test_convnext", "--model_kwargs", "{}", "--output_dir", str(tmp_path)]
    )
    torch.manual_seed(0)
    network = models.build_model(config, num_classes=10, channels=1)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    images = torch.randn(24, 1, 32, 32)
    before = torch.get_rng_state()
    gap = measure.train_inference_gap(network, [(images[:16],), (images[16:],)], lambda batch: batch, seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    assert not network.training

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


def test_measuring_the_gap_changes_nothing(in_process, tmp_path):
    for images in ("0", "100"):
        in_process("--epochs", "2", "--gap_images", images, "--output_dir", str(tmp_path / images))
    without, with_gap = rows_of(tmp_path / "0"), rows_of(tmp_path / "100")
    assert {row["gap_kl"] for row in without} == {""}
    assert all(float(row["gap_kl"]) > 0 for row in with_gap)
    measured = ("gap_kl", "gap_agreement", "drop_rate")
    same = [[{k: v for k, v in r.items() if k not in measured and "second" not in k} for r in rows]
            for rows in (without, with_gap)]  # fmt: skip
    assert same[0] == same[1]


@pytest.mark.parametrize("method", ["none", "dropblock", "bdropdml"])
def test_a_row_has_what_its_method_has(method, in_process, tmp_path):
    in_process("--method", method, "--epochs", "1", "--output_dir", str(tmp_path / "run"))
    (row,) = rows_of(tmp_path / "run")
    pairs = {"train_kl", "train_top1_1", "train_top1_2", "train_agreement"}
    masked = {"drop_prob", "gap_kl", "gap_agreement", "drop_rate"}
    empty = {name for name, value in row.items() if value == ""} - {"ema_ce", "ema_top1"}
    assert empty == {"none": pairs | masked, "dropblock": pairs, "bdropdml": set()}[method]
    if method == "bdropdml":
        both = (float(row["train_top1_1"]) + float(row["train_top1_2"])) / 2
        assert float(row["train_top1"]) == pytest.approx(both)
        terms = 0.9 * 2 * float(row["train_ce"]) + 0.1 * 9 * float(row["train_kl"])
        assert float(row["train_loss"]) == pytest.approx(terms, rel=1e-4)


def test_the_best_weights_say_which_epoch_they_are_of(in_process, tmp_path):
    in_process("--epochs", "3", "--output_dir", str(tmp_path / "run"))
    with safe_open(tmp_path / "run" / "best.safetensors", "pt") as file:
        about = json.loads(file.metadata()["row"])
    best = max(rows_of(tmp_path / "run"), key=lambda row: float(row["test_top1"]))
    assert about == {"epoch": int(best["epoch"]), "test_top1": float(best["test_top1"])}


# --- trackers --------------------------------------------------------------------------------------------------------


def test_tensorboard_gets_every_number(in_process, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    in_process("--epochs", "2", "--trackers", "[tensorboard]", "--output_dir", str(tmp_path / "run"))
    events = EventAccumulator(str(tmp_path / "run" / "logs" / "rblock-fx"))
    events.Reload()
    rows = rows_of(tmp_path / "run")
    for name in ("train_loss", "test_top1", "gap_kl", "drop_rate"):
        logged = [(event.step, event.value) for event in events.Scalars(name)]
        assert logged == [(int(row["step"]), pytest.approx(float(row[name]))) for row in rows]


@pytest.mark.parametrize(
    ("tracker", "message"),
    [
        ("tensorbord", "unknown tracker 'tensorbord'; did you mean tensorboard"),
        ("aim", "trackers: aim is not installed; pip install aim"),
    ],
)
def test_a_tracker_that_is_not_there(tracker, message, tmp_path, capsys, monkeypatch):
    line = fails(
        capsys, monkeypatch, "--config", CONFIG, "--trackers", f"[{tracker}]", "--output_dir", str(tmp_path / "run")
    )
    assert re.search(message, line), line
    assert snapshot(tmp_path) == {}
