"""Every benchmark runs, quickly, as its users run it: JSON, table, picture, --show, --help. Nothing here is timed."""

import contextlib
import importlib.util
import json
import math
import os
import runpy
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import pytest
import torch

from benchmarks import bench_step, harness, readme

ROOT = Path(__file__).parent.parent
SCRIPTS = ["rate", "convert", "masks", "step", "profile"]
SHARED_OPTIONS = ["--help", "--quick", "--rounds", "--threads", "--seed", "--device", "--output", "--show"]
OPTIONS = {
    "rate": ["--standard-error"],
    "convert": ["--models"],
    "masks": ["--dtypes", "--channels_last"],
    "profile": ["--dtypes"],
    "step": ["--models", "--modes", "--methods", "--batch", "--channels_last", "--autocast"],
}


def run(script, *arguments):
    """What a benchmark prints, started as the README says."""
    command = [sys.executable, f"benchmarks/bench_{script}.py", *map(str, arguments)]
    # The package that is tested here, should another be installed.
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": paths}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run_here(script, monkeypatch, capsys, *arguments):
    """The same in this process, which has imported everything: for what measures nothing."""
    path = ROOT / "benchmarks" / f"bench_{script}.py"
    monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
    monkeypatch.syspath_prepend(path.parent)
    capsys.readouterr()
    with contextlib.suppress(SystemExit):
        runpy.run_path(str(path), run_name="__main__")
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """Run each benchmark at most once: its file and what it printed."""
    known = {}

    def quick_run(script):
        if script not in known:
            path = tmp_path_factory.mktemp(script) / f"{script}.json"
            known[script] = path, run(script, "--quick", "--threads", 1, "--device", "cpu", "--output", path)
        return known[script]

    return quick_run


def numbers_in(value):
    """Every number of any nesting."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for item in value for number in numbers_in(item)]
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else []


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_result_file_says_what_was_measured_and_where(script, quick):
    path, _ = quick(script)
    result = json.loads(path.read_text())
    assert result["benchmark"] == script
    assert f"benchmarks/bench_{script}.py --quick" in result["command"]
    environment = result["environment"]
    assert set(environment["versions"]) == {"python", "torch", "torchvision", "timm", "rblock_fx"}
    assert environment["threads"] == 1
    assert environment["device"] == "cpu"
    assert environment["options"]["seed"] == 0
    assert environment["options"]["quick"] is True
    assert {"commit", "cpu", "cores", "platform"} <= set(environment)
    assert result["seconds"] > 0
    assert result["rows"]
    numbers = numbers_in(result["rows"])
    assert len(numbers) >= len(result["rows"])
    assert all(map(math.isfinite, numbers))


def test_compiled_steps_are_measured_like_eager_ones(tmp_path, monkeypatch):
    real, seen = torch.compile, []

    def graphs_alone(network, **options):  # the compiler itself takes minutes; test_compile.py has it
        seen.append(options)
        return real(network, **options, backend="eager")

    monkeypatch.setattr(torch, "compile", graphs_alone)
    path = tmp_path / "step.json"
    bench_step.main(["--quick", "--modes", "compiled", "--threads", "1", "--device", "cpu", "--output", str(path)])
    rows = json.loads(path.read_text())["rows"]
    assert [(row["mode"], row["method"]) for row in rows] == [
        ("compiled", method) for method in ("plain", "two forwards", "R-Block, last two")
    ]
    assert len(seen) == len(rows)
    assert all(options["fullgraph"] for options in seen)


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_picture_shows_something(script, quick):
    path, _ = quick(script)
    pixels = matplotlib.image.imread(path.with_suffix(".png"))
    height, width, _ = pixels.shape
    assert min(height, width) >= 400
    assert pixels[..., :3].std() > 0.05
    assert (pixels[..., :3] < 0.5).any(axis=2).sum() > 2000  # ink, not a blank page


@pytest.mark.parametrize("script", SCRIPTS)
def test_show_prints_the_same_table_without_measuring(script, quick, monkeypatch, capsys):
    path, printed = quick(script)
    before = path.read_bytes()
    path.with_suffix(".png").unlink()
    assert run_here(script, monkeypatch, capsys, "--show", path) == printed
    assert path.read_bytes() == before
    assert path.with_suffix(".png").exists()
    table, _, written = printed.rstrip().rpartition("\n\n")
    assert str(path) in written
    assert table.count("\n") >= len(json.loads(before)["rows"]) / 5  # a line may hold a row per competitor


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_every_option_and_the_commands(script, monkeypatch, capsys):
    text = run_here(script, monkeypatch, capsys, "--help")
    missing = [option for option in [*SHARED_OPTIONS, *OPTIONS.get(script, [])] if option not in text]
    assert missing == []
    assert f"python benchmarks/bench_{script}.py --quick" in text
    assert f"benchmarks/results/{script}-" in text


def rates(path):
    """The first table of bench_rate.py: (library, map, block size, rate asked) and the row."""
    rows = [row for row in json.loads(path.read_text())["rows"] if row["table"] == "rate"]
    return {(row["library"], tuple(row["map"]), row["block_size"], row["asked"]): row for row in rows}


def test_ours_reaches_the_rate_asked_for(quick):
    ours = {key: row for key, row in rates(quick("rate")[0]).items() if key[0] == "rblock_fx exact"}
    assert len(ours) == 4 * 2 * 2
    for (_, _, _, asked), row in ours.items():
        assert abs(row["reached"] - asked) <= 0.002 + 4 * row["standard_error"]
        assert row["standard_error"] <= 0.003
        assert abs(row["expected"] - asked) < 1e-9
        assert abs(row["expected_float32"] - asked) < 1e-5


def test_the_other_libraries_are_as_far_off_as_the_design_says(quick):
    found = rates(quick("rate")[0])
    for library, shape, block_size, asked, reached in [
        ("timm", (7, 7), 7, 0.1, 0.930),
        ("timm", (14, 14), 7, 0.1, 0.209),
        ("torchvision", (7, 7), 7, 0.1, 0.100),
        ("torchvision", (14, 14), 7, 0.1, 0.093),
        ("rblock_fx eq6", (7, 7), 7, 0.1, 0.055),
        ("rblock_fx eq6", (14, 14), 7, 0.1, 0.074),
    ]:
        row = found[library, shape, block_size, asked]
        assert abs(row["reached"] - reached) <= 0.002 + 4 * row["standard_error"]
    assert abs(found["timm", (7, 7), 7, 0.1]["reached"] - 0.1) > 0.5


def test_what_raises_is_in_the_file_with_its_message(quick):
    path, printed = quick("rate")
    row = rates(path)["torchvision", (4, 4), 7, 0.1]
    assert row["reached"] is None
    assert "block size should be odd" in row["raises"]
    assert row["raises"] in printed


def test_the_sub_models_of_every_method_drop_what_they_should(quick):
    rows = [row for row in json.loads(quick("rate")[0].read_text())["rows"] if row["table"] == "method"]
    assert len(rows) == 10
    for row in rows:
        for part in ("sub_model_1", "sub_model_2"):
            assert abs(row[part] - row["expected_each"]) <= 0.002 + 4 * row[f"{part}_error"], (row["method"], part)
        if row["expected_union"] is not None:
            assert abs(row["union"] - row["expected_union"]) <= 0.002 + 4 * row["union_error"], row["method"]
        if row["method"] in ("bdropdml", "sdropdml", "c-dropblock", "c-drop"):
            assert row["overlap"] == 0


def test_the_rates_in_the_repository_keep_the_bar():
    found = rates(ROOT / "benchmarks" / "results" / "rate-cpu.json")
    ours = {key: row for key, row in found.items() if key[0] == "rblock_fx exact"}
    assert len(ours) >= 100
    assert [key for key, row in ours.items() if abs(row["reached"] - key[3]) > 0.002] == []
    assert [key for key, row in ours.items() if abs(row["expected"] - key[3]) > 1e-9] == []
    assert max(row["standard_error"] for row in found.values() if row["reached"] is not None) < 0.002


def test_every_conversion_has_its_baselines(quick):
    rows = json.loads(quick("convert")[0].read_text())["rows"]
    kinds = {kind: [row for row in rows if row["kind"] == kind] for kind in ("model", "growth", "cold", "meta")}
    assert all(kinds.values())
    assert sum(map(len, kinds.values())) == len(rows)
    for row in [*kinds["model"], *kinds["growth"]]:
        assert row["parameters"] > 0
        assert row["modules"] > len(row["sites"]) > 0
        for what in ("convert", "build", "forward"):
            assert row[f"{what}_seconds"]["median"] > 0
    deeper = [row["modules"] for row in kinds["growth"] if row["axis"] == "depth"]
    wider = [(row["modules"], row["parameters"]) for row in kinds["growth"] if row["axis"] == "width"]
    assert deeper == sorted(set(deeper))
    assert len({modules for modules, _ in wider}) == 1
    assert len({parameters for _, parameters in wider}) == len(wider)


def test_the_exponent_of_a_power_law_is_found(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location("convert_report", ROOT / "benchmarks" / "convert_report.py")
    report = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(report)
    factor, exponent = report.power_law([1, 2, 4, 8], [0.5 * x**0.75 for x in (1, 2, 4, 8)])
    assert factor == pytest.approx(0.5)
    assert exponent == pytest.approx(0.75)


def test_the_readme_shows_the_result_files():
    text = readme.README.read_text()
    assert readme.fill(text, list(readme.TABLES)) == text
    for name in readme.TABLES:
        assert f"python benchmarks/bench_{name}.py" in text
        environment = json.loads((readme.RESULTS / f"{name}-cpu.json").read_text())["environment"]
        assert environment["versions"]["torch"]
        assert (readme.RESULTS / f"{name}-cpu.png").stat().st_size > 10_000


def test_kept_rows_are_those_that_were_not_measured_anew(tmp_path):
    path = tmp_path / "steps.json"
    for model, seconds in [("a", 1), ("b", 2), ("a", 3)]:
        parser = harness.command_line("steps", None)
        rows = [{"model": model, "seconds": seconds}]
        harness.run(
            "steps",
            parser,
            lambda _options, rows=rows: rows,
            lambda rows: f"{len(rows)} rows",
            lambda _rows, path: path.write_bytes(b""),
            ["--keep", "--threads", str(torch.get_num_threads()), "--output", str(path)],
            key=["model"],
        )
    result = json.loads(path.read_text())
    assert result["rows"] == [{"model": "b", "seconds": 2}, {"model": "a", "seconds": 3}]
    assert [run["environment"]["versions"]["torch"] for run in result["earlier_runs"]] == [torch.__version__] * 2
