"""Launching, killing and looking at runs of the recipe."""

import csv
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import train
from accelerate.state import AcceleratorState, GradientState

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "recipes"
CONFIG = str(RECIPES / "configs" / "digits.yaml")
SCRIPT = [str(RECIPES / "train.py"), "--config", CONFIG]
ONE_PROCESS = [sys.executable, "-m", "accelerate.commands.launch"]
TWO_PROCESSES = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
TINY = ["--image_size", "16", "--batch_size", "128"]  # under a second an epoch
STEPS = 9  # in an epoch of TINY

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


def timeless(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    return [{name: value for name, value in row.items() if "second" not in name} for row in rows]


def step_of(folder: Path) -> int:
    """The steps that the newest complete checkpoint of a run has; 0 before the first."""
    for name in ("checkpoint", "checkpoint.previous"):
        try:
            return json.loads((folder / name / "state.json").read_text())["state"]["step"]
        except (FileNotFoundError, NotADirectoryError):
            continue
    return 0


def assert_equal_runs(one: Path, two: Path) -> None:
    """Equal bytes of weights of every kind, and equal metrics but for the times."""
    names = [path.name for path in one.glob("*.safetensors")]
    assert "model.safetensors" in names
    for name in names:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    assert timeless(rows_of(one)) == timeless(rows_of(two))


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
        yield lambda *arguments: (reset(), train.train(train.parse_settings(["--config", CONFIG, *TINY, *arguments])))
        reset()


def fails(capsys, monkeypatch, *arguments: str, main: Callable[[], None] = train.main) -> str:
    """The one line that a script ends with, in this process; exit status 2 is asserted."""
    monkeypatch.setattr(sys, "argv", ["script.py", *arguments])
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


SERVER = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
import train
for line in sys.stdin:
    request = json.loads(line)
    pids = []
    for environment in request["environments"]:
        pid = os.fork()
        if pid == 0:
            os.environ.update(environment)
            sys.argv = ["train.py", *request["arguments"]]
            output = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            code = 1
            try:
                exec(request["before"])
                train.main()
                code = 0
            except SystemExit as ending:
                code = ending.code
            finally:
                os._exit(code)
        pids.append(pid)
    print(json.dumps(pids), flush=True)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]), flush=True)
"""


class RecipeServer:
    """Starts the recipe as one process or as several ranks that find each other as under torchrun.

    Each is a process of its own, forked from one that has imported everything, which is most of what a launch waits
    for.
    """

    def __init__(self, folder: Path) -> None:
        self.log = folder / "recipe.log"
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(RECIPES)], cwd=ROOT, env=ENVIRONMENT,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def start(self, processes: int, *arguments: str, before: str = "") -> list[int]:
        """Start a run after some lines of Python, and return the pids of its ranks."""
        environments: list[dict[str, str]] = [{}]
        if processes > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = str(free.getsockname()[1])
            environments = [
                {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), "MASTER_PORT": port,
                 "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1"}
                for rank in range(processes)
            ]  # fmt: skip
        self.log.unlink(missing_ok=True)
        arguments = arguments if "--config" in arguments else ("--config", CONFIG, *arguments)
        request = {"environments": environments, "arguments": arguments, "log": str(self.log), "before": before}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def wait(self) -> list[int]:
        """The exit codes of the ranks; -9 of one that was killed."""
        return json.loads(self.process.stdout.readline())

    def run(self, processes: int, *arguments: str, code: int = 0, before: str = "") -> str:
        """A run from its start to its end; returns what it printed."""
        self.start(processes, *arguments, before=before)
        assert self.wait() == [code] * processes, self.log.read_text()
        return self.log.read_text()

    def close(self) -> None:
        """End the process that forks."""
        self.process.stdin.close()
        self.process.wait()
