"""Launching, killing and looking at runs of the recipe."""

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch
import train
from accelerate.state import AcceleratorState, GradientState
from training import settings

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "recipes"
CONFIG = str(RECIPES / "configs" / "digits.yaml")
SCRIPT = [str(RECIPES / "train.py"), "--config", CONFIG]
ONE_PROCESS = [sys.executable, "-m", "accelerate.commands.launch"]
TWO_PROCESSES = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
TINY = ["--image_size", "16", "--batch_size", "128"]  # under a second an epoch


# no accelerator, whatever the machine has: bit-equality is promised on a CPU; one thread, so that neighbours do no harm
ENVIRONMENT = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def launch(command: list[str]) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done


def result_of(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text())


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@contextmanager
def recipe_in_process() -> Iterator[Callable[..., None]]:
    """Run the recipe inside this process, as if it were a fresh one without launcher and accelerator."""

    def reset() -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            patch.delenv(name, raising=False)
        patch.setattr(torch.accelerator, "is_available", lambda: False)
        reset()
        yield lambda *arguments: (reset(), train.train(settings.read_config(["--config", CONFIG, *TINY, *arguments])))
        reset()


def fails(capsys, monkeypatch, *arguments: str) -> str:
    """The one line that the recipe ends with, in this process; exit code 2 is asserted."""
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        train.main()
    assert exit_.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


def kill_tree(process: subprocess.Popen) -> None:
    """SIGKILL to a launcher and its workers, which torchrun puts in sessions of their own."""
    for victim in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
        victim.kill()
    process.wait()
