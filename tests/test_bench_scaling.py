"""bench_scaling.py started as a user would, with real processes; no time that it measures is judged."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib import image

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"
ENVIRONMENT = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def bench(*arguments, cwd=None):
    command = [sys.executable, str(BENCHMARKS / "bench_scaling.py"), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    path = tmp_path_factory.mktemp("scaling") / "scaling.json"
    done = bench("--quick", "--rounds", 2, "--output", path, cwd=path.parent)
    assert done.returncode == 0, done.stderr + done.stdout
    return path, done.stdout


def test_the_result_is_of_one_and_of_two_processes(quick):
    result = json.loads(quick[0].read_text())
    measured = [row for row in result["rows"] if row["kind"] == "measured"]
    assert [row["selection"] for row in measured] == ["last two", "all"]
    for row in measured:
        assert row["world_sizes"] == [1, 2]
        assert row["threads"] == 1
        assert {len(row["seconds"][method]) for method in ("plain", "rblock")} == {2}
        assert all(row["step_ratio"][n]["rounds"] == 2 for n in ("1", "2"))
        assert row["flop_ratio"]["bounds"][0] - 0.01 < row["flop_ratio"]["counted"] < row["flop_ratio"]["bounds"][1]
        for check in row["predictions"].values():
            assert check["error"] == pytest.approx(check["predicted"] / check["measured"] - 1)


def test_what_is_said_of_gpus_is_a_prediction_from_what_was_assumed(quick):
    path, output = quick
    predicted = [row for row in json.loads(path.read_text())["rows"] if row["kind"] != "measured"]
    assert [row["kind"] for row in predicted] == ["predicted, not measured"] * 2
    for row in predicted:
        assert row["assumed"] == {"flop_rate": 40e12, "bandwidth": 25e9, "batch": 64, "image": 224}
        assert [entry["devices"] for entry in row["predictions"]] == [1, 2, 8, 64]
        assert row["predictions"][0]["step_ratio"] == pytest.approx([row["flop_ratio"]] * 2)
    assert "PREDICTED step ratio on N GPUs, no GPU was measured" in output


def test_the_picture_is_not_blank(quick):
    pixels = image.imread(quick[0].with_suffix(".png"))[..., :3]
    assert pixels.shape[0] > 400
    thirds = [pixels[:, i * pixels.shape[1] // 3 : (i + 1) * pixels.shape[1] // 3] for i in range(3)]
    assert all((third.min(axis=2) < 0.9).mean() > 0.01 for third in thirds)


def test_show_prints_the_same_tables_and_runs_nothing(quick):
    path, output = quick
    before = path.read_bytes()
    done = bench("--show", path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == output
    assert path.read_bytes() == before


def launched(job, timeout):
    """A launch of the script's own, alone."""
    code = f"from scaling_launch import launch; launch({job!r}, {timeout})"
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=BENCHMARKS,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


JOB = {"processes": 2, "threads": 1, "device": "cpu", "seed": 0, "rounds": 1, "cases": []}


def test_a_worker_that_fails_ends_the_benchmark_with_its_output():
    case = {"model": "no_such_model", "image": 64, "batch": 2, "selections": {}}
    done = launched(JOB | {"cases": [case]}, 100)
    assert done.returncode == 1
    assert "Unknown model (no_such_model)" in done.stderr
    assert "2 process(es) failed with exit code 1" in done.stderr


def test_processes_that_take_too_long_are_stopped():
    done = launched(JOB, 0.5)
    assert done.returncode == 1
    assert "2 process(es) took longer than 0.5 s (--timeout)" in done.stderr


def test_two_processes_are_compared_with_one():
    done = bench("--processes", 1)
    assert done.returncode == 1
    assert "--processes 1 is compared with one process; expected 2 or more" in done.stderr
