"""Every benchmark runs quickly from its command line, in this process; no time that it measures is judged."""

import contextlib
import io
import json
import math

import matplotlib.image
import pytest
import torch

from benchmarks import bench_masks, bench_rate, harness, models, readme

SCRIPTS = {script.__name__.rpartition("_")[2]: script for script in readme.MEASURED}
SHARED_OPTIONS = ["--quick", "--rounds", "--threads", "--seed", "--device", "--output", "--show"]
OPTIONS = {
    "rate": [],
    "convert": ["--models", "--keep"],
    "masks": ["--dtypes", "--keep"],
    "memory": ["--models", "--batch", "--keep"],
    "step": ["--models", "--modes", "--methods", "--batch", "--channels_last", "--autocast", "--keep"],
}
EXTRA = {"step": ["--modes", "eager", "compiled"]}


@pytest.fixture(autouse=True)
def _threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """Run each benchmark at most once: its file and its output."""
    known = {}
    compile_real = torch.compile

    def compile_graphs(network, **options):
        assert options["fullgraph"]
        return compile_real(network, **options, backend="eager")  # the compiler itself is tested in test_compile.py

    def run_quickly(name):
        if name not in known:
            path = tmp_path_factory.mktemp(name) / f"{name}.json"
            arguments = ["--quick", "--threads", "1", "--device", "cpu", "--output", str(path), *EXTRA.get(name, [])]
            with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
                patch.setattr(torch, "compile", compile_graphs)
                SCRIPTS[name].main(arguments)
            known[name] = path, printed.getvalue()
        return known[name]

    return run_quickly


def rows_of(path):
    return json.loads(path.read_text())["rows"]


def committed(name):
    return rows_of(harness.RESULTS / f"{name}-cpu.json")


def numbers_in(value):
    """Every number of any nesting."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for item in value for number in numbers_in(item)]
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else []


@pytest.mark.parametrize("name", SCRIPTS)
def test_result_file_records_environment_and_finite_numbers(name, quick):
    result = json.loads(quick(name)[0].read_text())
    assert result["benchmark"] == name
    assert f"benchmarks/bench_{name}.py --quick" in result["command"]
    environment = result["environment"]
    assert set(environment["versions"]) == {"python", "torch", "torchvision", "timm", "rblock_fx"}
    assert environment["threads"] == 1
    assert environment["device"] == "cpu"
    assert environment["options"]["quick"] is True
    assert {"commit", "cpu", "cores", "platform"} <= set(environment)
    numbers = numbers_in(result["rows"])
    assert len(numbers) >= len(result["rows"]) > 0
    assert all(map(math.isfinite, numbers))


@pytest.mark.parametrize("name", SCRIPTS)
def test_show_prints_the_same_and_draws_a_figure(name, quick, capsys):
    path, printed = quick(name)
    before = path.read_bytes()
    path.with_suffix(".png").unlink()
    SCRIPTS[name].main(["--show", str(path)])
    assert capsys.readouterr().out == printed
    assert path.read_bytes() == before
    pixels = matplotlib.image.imread(path.with_suffix(".png"))
    assert min(pixels.shape[:2]) >= 400
    assert (pixels[..., :3] < 0.5).any(axis=2).sum() > 2000  # ink, not a blank page


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_names_every_option_and_the_commands(name, capsys):
    with pytest.raises(SystemExit, match="0"):
        SCRIPTS[name].main(["--help"])
    text = capsys.readouterr().out
    assert [option for option in [*SHARED_OPTIONS, *OPTIONS[name]] if option not in text] == []
    assert f"python benchmarks/bench_{name}.py --quick" in text
    assert f"benchmarks/results/{name}-" in text


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("masks", ["--dtypes", "float8"], "argument --dtypes: invalid choice: 'float8'"),
        ("step", ["--device", "tpu"], "argument --device: expected cpu or cuda, got 'tpu'"),
        ("step", ["--device", "cuda:99"], "argument --device: cuda:99: this machine has"),
        ("memory", ["--batch", "0"], "argument --batch: expected a whole number of at least 1, got '0'"),
        ("rate", ["--output", "rate.png"], "argument --output: expected a name that ends in .json, got 'rate.png'"),
        (
            "convert",
            ["--models", "resnet50"],
            "argument --models: expected timm/NAME or torchvision/NAME, got 'resnet50'",
        ),
        ("rate", ["--show", "absent.json"], "absent.json: No such file or directory"),
        ("rate", ["--show", "README.md"], "README.md is not a JSON file"),
        ("rate", ["--show", "benchmarks/results/step-cpu.json"], "step-cpu.json is not a result of bench_rate.py"),
    ],
)
def test_wrong_options_end_in_one_line(name, arguments, message, capsys, monkeypatch):
    monkeypatch.chdir(readme.ROOT)
    with pytest.raises(SystemExit, match="2"):
        SCRIPTS[name].main(arguments)
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_keep_replaces_only_measured_rows(tmp_path):
    path = tmp_path / "steps.json"
    for model, seconds in [("a", 1), ("b", 2), ("a", 3)]:
        harness.run(
            "steps",
            harness.command_line("steps", None),
            lambda _options, row={"model": model, "seconds": seconds}: [row],
            lambda rows: f"{len(rows)} rows",
            lambda _rows, path: path.write_bytes(b""),
            ["--keep", "--threads", "1", "--output", str(path)],
            key=["model"],
        )
    result = json.loads(path.read_text())
    assert result["rows"] == [{"model": "b", "seconds": 2}, {"model": "a", "seconds": 3}]
    assert [run["environment"]["versions"]["torch"] for run in result["earlier_runs"]] == [torch.__version__] * 2


def test_readmes_show_the_result_files():
    texts = [document.read_text() for document in readme.DOCUMENTS]
    assert list(map(readme.fill, texts)) == texts
    text = texts[-1]
    for name in readme.build_tables():
        assert f"<!-- {name}: begin -->" in text
    for name in SCRIPTS:
        assert f"python benchmarks/bench_{name}.py" in text
        assert (harness.RESULTS / f"{name}-cpu.png").stat().st_size > 10_000


def test_steps_are_measured_eager_and_compiled(quick):
    rows = rows_of(quick("step")[0])
    methods = ("plain", "two forwards", "R-Block, last two")
    assert [(row["mode"], row["method"]) for row in rows] == [(m, n) for m in ("eager", "compiled") for n in methods]
    assert [row["flops_over_plain"] for row in rows if row["method"] == "two forwards"] == [2, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_operations_draw_a_pair_in_every_step(dtype):
    x = torch.ones(16, 8, 9, 9, dtype=dtype)
    gamma = 0.05
    first, second = bench_masks.fork_in_plain_operations(x, gamma).chunk(2)
    assert not ((first == 0) & (second == 0)).any()
    blocks = (first == 0) | (second == 0)
    assert torch.equal(blocks, blocks[:, :1].expand_as(blocks))
    assert float(blocks.float().mean()) == pytest.approx(bench_rate.coverage(gamma, (9, 9), 3), abs=0.1)
    assert first.float().mean((1, 2, 3)).allclose(torch.ones(16), atol=1e-2)
    assert not torch.equal(first, bench_masks.fork_in_plain_operations(x, gamma)[:16])


def test_every_mask_is_compared_with_every_competitor(quick):
    rows = rows_of(quick("masks")[0])
    assert len(rows) == 4
    for row in rows:
        assert set(row["seconds"]) == {"cat", *bench_masks.COMPETITORS}
        assert (
            set(row["over_cat"]) == set(row["over_eager"]) == set(row["over_compiled"]) == set(bench_masks.COMPETITORS)
        )


def test_exact_calibration_reaches_the_requested_rate(quick):
    ours = [row for row in rows_of(quick("rate")[0]) if row["library"] == bench_rate.EXACT]
    assert len(ours) == 4 * 2 * 2
    for row in ours:
        assert abs(row["reached"] - row["asked"]) <= 0.002 + 4 * row["standard_error"]
        assert row["standard_error"] <= 0.003
        assert abs(row["expected"] - row["asked"]) < 1e-9


def test_other_libraries_miss_the_rate_as_recorded(quick):
    found = bench_rate.cells_of(rows_of(quick("rate")[0]))
    for library, shape, reached in [
        ("timm", (7, 7), 0.930),
        ("timm", (14, 14), 0.209),
        ("torchvision", (7, 7), 0.100),
        ("torchvision", (14, 14), 0.093),
        ("rblock_fx eq6", (7, 7), 0.055),
        ("rblock_fx eq6", (14, 14), 0.074),
    ]:
        row = found[shape, 7, 0.1][library]
        assert abs(row["reached"] - reached) <= 0.002 + 4 * row["standard_error"]


def test_errors_of_libraries_are_recorded(quick):
    path, printed = quick("rate")
    row = bench_rate.cells_of(rows_of(path))[(4, 4), 7, 0.1]["torchvision"]
    assert row["reached"] is None
    assert "block size should be odd" in row["raises"]
    assert row["raises"] in printed


def test_committed_rates_are_within_the_tolerance():
    ours = [row for row in committed("rate") if row["library"] == bench_rate.EXACT]
    assert len(ours) >= 100
    assert [row for row in ours if abs(row["reached"] - row["asked"]) > bench_rate.TOLERANCE] == []
    assert [row for row in ours if abs(row["expected"] - row["asked"]) > 1e-9] == []


def test_conversions_are_compared_with_build_and_forward(quick):
    rows = rows_of(quick("convert")[0])
    assert len(rows) == 4
    for row in rows:
        assert row["parameters"] > row["modules"] > len(row["sites"]) > 0
        assert all(row[f"{kind}_seconds"]["median"] > 0 for kind in ("convert", "build", "forward"))


def test_memory_is_ordered_as_its_definitions_say(quick):
    rows = rows_of(quick("memory")[0])
    assert [row["method"] for row in rows] == list(models.METHODS)
    assert all(row["rest"] + row["activations"] <= row["peak"] <= row["allocator"] for row in rows)


def test_committed_memory_is_within_five_percent_of_ideal():
    rows = [row for row in committed("memory") if "ideal_peak" in row]
    assert {row["model"] for row in rows} == set(models.STUDIED)
    assert max(row["peak"] / row["ideal_peak"] for row in rows) <= 1.05
    assert max(row["activations"] / row["ideal_activations"] for row in rows) <= 1.05
