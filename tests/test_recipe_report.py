"""The report: statistics against independent oracles, tables against the runs, the page as a browser reads it."""

import base64
import io
import itertools
import json
import math
import os
import re
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import report
import sweep
import yaml
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread
from reporting import collect, seed_stats
from scipy import stats
from sweeping import grid as grids
from training import settings

from tests.recipe_folders import CONFIG, write_run, write_table

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "recipes"


PERCENT = st.floats(0, 100).map(lambda value: round(value, 2))


# --- statistics ------------------------------------------------------------------------------------------------------


@given(st.lists(PERCENT, min_size=1, max_size=8))
def test_a_summary_is_the_textbooks(values):
    found = seed_stats.summarise(values)
    mean = sum(values) / len(values)
    assert (found.seeds, found.mean) == (len(values), pytest.approx(mean))
    if len(values) == 1:
        assert found.deviation is None
    else:
        assert found.deviation == pytest.approx(math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1)))
    assert (found.interval is None) == (len(values) < 3)
    if found.interval:
        low, high = found.interval
        assert min(values) - 1e-9 <= low <= mean + 1e-9
        assert mean - 1e-9 <= high <= max(values) + 1e-9
        assert (low < high) == (len(set(values)) > 1)


@given(st.lists(PERCENT, min_size=3, max_size=5))
def test_the_bootstrap_interval_is_that_of_all_resamples(values):
    """Of few seeds every resample can be listed: below the bounds lie 2.5 % and 97.5 %, to the drawing's error."""
    means = [sum(drawn) / len(values) for drawn in itertools.product(values, repeat=len(values))]
    low, high = seed_stats.summarise(values).interval
    for bound, share in ((low, 0.025), (high, 0.975)):
        assert np.mean([mean < bound - 1e-6 for mean in means]) <= share + 0.01
        assert np.mean([mean <= bound + 1e-6 for mean in means]) >= share - 0.01


def test_nothing_has_no_summary():
    assert seed_stats.summarise([]) is None
    assert seed_stats.compare({0: 1.0}, {1: 1.0}) is None
    assert seed_stats.holm([]) == []


@given(
    st.dictionaries(st.integers(0, 9), PERCENT, max_size=10), st.dictionaries(st.integers(0, 9), PERCENT, max_size=10)
)
def test_the_paired_test_is_the_formula(ours, theirs):
    seeds = sorted(set(ours) & set(theirs))
    found = seed_stats.compare(ours, theirs)
    if not seeds:
        assert found is None
        return
    differences = [ours[seed] - theirs[seed] for seed in seeds]
    n, mean = len(seeds), sum(differences) / len(seeds)
    assert (found.seeds, found.difference) == (n, pytest.approx(mean, abs=1e-9))
    if n < 2 or max(differences) - min(differences) < 1e-9:
        assert (found.interval, found.p) == (None, None)
        return
    error = math.sqrt(sum((d - mean) ** 2 for d in differences) / (n - 1) / n)
    assert found.p == pytest.approx(2 * stats.t.sf(abs(mean) / error, n - 1), rel=1e-6, abs=1e-12)
    reach = stats.t.ppf(0.975, n - 1) * error
    assert found.interval == pytest.approx((mean - reach, mean + reach), rel=1e-6, abs=1e-6)


@given(st.lists(st.none() | st.floats(0, 1), max_size=8))
def test_holm_is_the_definition(p_values):
    """Adjusted p of a test: over all at most as large, the largest of (how many are at least as large) times p."""
    given_p = sorted(p for p in p_values if p is not None)
    for p, adjusted in zip(p_values, seed_stats.holm(p_values), strict=True):
        if p is None:
            assert adjusted is None
            continue
        candidates = [(len(given_p) - rank) * other for rank, other in enumerate(given_p) if other <= p]
        assert adjusted == pytest.approx(min(1.0, max(candidates)))


def test_holm_of_a_published_example():
    assert seed_stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


@given(st.lists(PERCENT, min_size=1, max_size=60), st.sampled_from([[0.2, 0.4, 0.6, 0.8, 1.0], [0.29, 1.0], [0.01]]))
def test_best_until_is_brute_force(values, stages):
    epochs = len(values)
    expected = []
    for stage in stages:
        finished = [e for e in range(1, epochs + 1) if e * 100 <= round(stage * 100) * epochs] or [1]
        expected.append(max(values[epoch - 1] for epoch in finished))
    assert seed_stats.best_until(values, stages, epochs) == expected


def test_a_stage_that_is_not_reached_has_no_best():
    assert seed_stats.best_until([1.0, 3.0, 2.0], [0.2, 0.6, 0.8], 5) == [1.0, 3.0, None]


# --- folders ---------------------------------------------------------------------------------------------------------

TOP1 = {"plain": 60.0, "DropBlock": 61.0, "BDropDML": 63.0, "C-DropBlock": 62.0}
NOISE = (0.0, 0.31, -0.17)


def make_sweep(tmp_path: Path, without: tuple[str, ...] = (), sparse: bool = False, **changes: object) -> Path:
    """A sweep's folder as sweep.py leaves it, its runs written; without names runs that are not there."""
    asked = sweep.read_options([str(write_table(tmp_path / "t.yaml", **changes))])
    grid = sweep.asked_grid(asked)
    runs = grids.grid_runs(grid, [])
    folder = Path(grid.output_dir)
    folder.mkdir()
    (folder / "sweep.yaml").write_text(yaml.safe_dump(sweep.sweep_record(grid, runs, asked), sort_keys=False))
    for run in runs:
        if run.name in without:
            continue
        seed = run.config.seed
        top = TOP1[run.row] + NOISE[seed] + 0.1 * seed * len(run.row)
        write_run(run.folder, grids.plain(run.config), [top / 2, top - 5, top, top - 1 - seed / 7], sparse=sparse)
    return folder


def tables_of(text: str, heading: str) -> list[list[dict[str, str]]]:
    """The tables below a heading, each as rows by column; of two columns of one name, the second has a 2."""
    section = re.split(r"\n#+ ", text.split(f"# {heading}\n", 1)[1])[0]
    found = []
    for block in re.findall(r"(?:^\|.*\n?)+", section, re.M):
        lines = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in block.strip().splitlines()]
        names = [name + "2" * (name in lines[0][:place]) for place, name in enumerate(lines[0])]
        found.append([dict(zip(names, line, strict=True)) for line in lines[2:]])
    return found


def text_of(folder: Path) -> str:
    page = report.write_report(folder, folder / "report")
    assert page == folder / "report" / "report.html"
    return (folder / "report" / "report.md").read_text()


def test_tables_hold_the_runs_numbers(tmp_path):
    text = text_of(make_sweep(tmp_path))
    assert "**12 of 12 runs**" in text
    assert "Missing runs" not in text
    best = {name: [top + NOISE[s] + 0.1 * s * len(name) for s in range(3)] for name, top in TOP1.items()}
    (rows,) = tables_of(text, "Top-1")
    assert [row["method"] for row in rows] == list(TOP1)
    for row in rows:
        values = best[row["method"]]
        assert row["best epoch, mean ± sd"] == f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}"
        low, high = map(float, row["95 % interval"].split(" … "))
        assert min(values) - 0.01 <= low < np.mean(values) < high <= max(values) + 0.01
        assert row["last epoch, mean ± sd"].startswith(
            f"{np.mean([v - 1 - s / 7 for s, v in enumerate(values)]):.2f} ± "
        )
        assert row["seeds"] == "3 of 3"
    assert [row["paper"] for row in rows] == ["-", "-", "60.00", "-"]
    (glance,) = tables_of(text, "At a glance")
    assert [row["ours, digits"] for row in glance][2] == f"**{np.mean(best['BDropDML']):.2f}**"
    assert [row["paper, digits"] for row in glance] == ["-", "-", "60.00", "-"]
    (stages,) = tables_of(text, "Best until each stage")
    assert {"method": "BDropDML", "whose": "paper", "50 %": "50.00", "100 %": "60.00"} in stages
    ours = next(row for row in stages if row["method"] == "plain")
    assert ours["50 %"].startswith(f"{np.mean(best['plain']) - 5:.2f} ± ")
    assert ours["100 %"].startswith(f"{np.mean(best['plain']):.2f} ± ")


def test_one_seed_gives_differences_and_no_test(tmp_path):
    text = text_of(make_sweep(tmp_path, seeds=[1]))
    first, _ = tables_of(text, "Tests, seed by seed")
    assert all(row["difference"] != "-" and row["p"] == row["p, Holm"] == "-" for row in first)
    assert text.count("(no tests: they need two common seeds that differ)") == 2  # best epoch, last epoch
    assert "a family of" not in text


def test_tests_are_paired_by_seed_and_corrected_over_the_table(tmp_path):
    text = text_of(make_sweep(tmp_path))
    best = {name: [top + NOISE[s] + 0.1 * s * len(name) for s in range(3)] for name, top in TOP1.items()}
    first, _ = tables_of(text, "Tests, seed by seed")
    assert "a family of 5 tests" in text
    pairs = [(row["method"], row["against"]) for row in first]
    assert pairs == [(n, "plain") for n in list(TOP1)[1:]] + [(n, "DropBlock") for n in list(TOP1)[2:]]
    p_values = [stats.ttest_rel(best[one], best[other]).pvalue for one, other in pairs]
    for row, (one, other), p in zip(first, pairs, p_values, strict=True):
        assert float(row["difference"]) == pytest.approx(np.mean(best[one]) - np.mean(best[other]), abs=0.006)
        assert row["common seeds"] == "3"
        if not row["p"].startswith("<"):
            assert float(row["p"]) == pytest.approx(p, rel=0.06)
    smallest = min(range(5), key=p_values.__getitem__)
    assert float(first[smallest]["p, Holm"]) == pytest.approx(min(1, 5 * p_values[smallest]), rel=0.06)


def test_missing_and_broken_runs_are_shown_with_the_command(tmp_path):
    gone = (
        "digits/plain/seed1",
        "digits/plain/seed2",
        "digits/BDropDML/seed0",
        "digits/BDropDML/seed1",
        "digits/BDropDML/seed2",
    )
    folder = make_sweep(tmp_path, without=gone)
    (folder / "digits" / "DropBlock" / "seed0" / "result.json").write_text("{")
    (folder / "digits" / "DropBlock" / "seed1" / "metrics.csv").write_text("epoch,test_top1\n1,x\n")
    (folder / "digits" / "C-DropBlock" / "seed0" / "metrics.csv").write_text("epoch,test_top1\n1,50\n")
    other = folder / "digits" / "C-DropBlock" / "seed1" / "result.json"
    other.write_text(other.read_text().replace('"lr": 0.05', '"lr": 0.5'))
    text = text_of(folder)
    assert "**3 of 12 runs**" in text
    (missing,) = tables_of(text, "Missing runs")
    by_cell = {(row["row"], row["seeds"]): row for row in missing}
    assert by_cell["plain", "1, 2"]["state"] == "to do"
    assert by_cell["DropBlock", "0"]["state"] == by_cell["DropBlock", "1"]["state"] == "broken"
    assert "metrics.csv" in by_cell["DropBlock", "1"]["why"]
    assert "1 rows and result.json says 4 epochs" in by_cell["C-DropBlock", "0"]["why"]
    assert "lr (there 0.5, asked 0.05)" in by_cell["C-DropBlock", "1"]["why"]
    assert re.search(
        r"To complete:\n\n```\npython recipes/sweep\.py .*t\.yaml --output_dir ", text.replace(str(ROOT) + "/", "")
    )
    (top1,) = tables_of(text, "Top-1")
    seeds = {row["method"]: row["seeds"] for row in top1}
    assert seeds == {"plain": "1 of 3", "DropBlock": "1 of 3", "BDropDML": "0 of 3", "C-DropBlock": "1 of 3"}
    assert set(top1[2].values()) == {"BDropDML", "60.00", "-", "0 of 3"}  # no number where there is no run
    first, _ = tables_of(text, "Tests, seed by seed")
    assert {row["p"] for row in first} == {"-"}
    (glance,) = tables_of(text, "At a glance")
    assert glance[2]["ours, digits"] == "- (0 of 3)"


def test_no_run_at_all_is_a_report_of_dashes(tmp_path):
    every = tuple(f"digits/{name}/seed{seed}" for name in TOP1 for seed in range(3))
    folder = make_sweep(tmp_path, without=every)
    text = text_of(folder)
    assert "**0 of 12 runs**" in text
    assert "No run is finished." in text
    assert sorted(path.name for path in (folder / "report").iterdir()) == ["report.html", "report.md"]


def test_costs_are_relative_to_plain_and_gaps_are_those_of_the_last_epoch(tmp_path):
    folder = make_sweep(tmp_path)
    for path in (folder / "digits" / "BDropDML").rglob("result.json"):
        result = json.loads(path.read_text())
        path.write_text(json.dumps(result | {"wall_time_seconds": 12.0 + result["seed"]}))
    rows = {row["method"]: row for row in tables_of(text_of(folder), "Cost and gap")[0]}
    assert rows["plain"]["relative to plain"] == "1.00 ± 0.00"
    assert rows["BDropDML"]["relative to plain"] == f"{13 / 8:.2f} ± {np.std([12 / 8, 13 / 8, 14 / 8], ddof=1):.2f}"
    assert rows["BDropDML"]["gap, KL in nats"] == "0.1250 ± 0.0000"
    assert rows["BDropDML"]["gap, agreement %"] == "94.00 ± 0.00"
    assert rows["BDropDML"]["drop rate"] == "0.1000 ± 0.0000"
    assert (rows["plain"]["gap, KL in nats"], rows["plain"]["images/s"]) == ("-", "-")


def test_columns_that_a_run_did_not_write_are_left_out(tmp_path):
    folder = make_sweep(tmp_path, sparse=True)
    rows = tables_of(text_of(folder), "Cost and gap")[0]
    assert {row["gap, KL in nats"] for row in rows} == {"-"}
    assert sorted(path.name for path in (folder / "report").glob("*.png")) == [
        "accuracy-digits.png",
        "curves-digits.png",
    ]


# --- the page --------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """What a browser would load and where links lead; every tag that needs one has its end."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.tags.append(tag)
        self.ids += [values["id"]] if "id" in values else []
        self.links += [values["href"]] if tag == "a" else []
        self.loads += [
            values[key] for key in ("src", "srcset", "data", "poster", "href") if key in values and tag != "a"
        ]
        if tag not in ("meta", "link", "img", "br", "hr"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def assert_self_contained(page: Path, pictures: int) -> Page:
    text = page.read_text()
    found = Page(text)
    images = [source for source in found.loads if source.startswith("data:image/png;base64,")]
    assert sorted(set(found.loads) - set(images)) == ["data:,"]
    assert len(images) == pictures == len(list(page.parent.glob("*.png")))
    for source in images:
        pixels = imread(io.BytesIO(base64.b64decode(source.split(",", 1)[1], validate=True)), format="png")
        assert pixels.shape[0] > 200
        assert pixels.shape[1] > 500
        assert pixels[..., :3].std() > 0.01  # something is drawn
    assert not re.search(r"https?:|url\(|@import|<script", text)
    assert found.links
    assert {link.removeprefix("#") for link in found.links} == set(found.ids)
    assert len(set(found.ids)) == len(found.ids)
    return found


def test_the_page_needs_nothing_else(tmp_path):
    folder = make_sweep(tmp_path)
    text_of(folder)
    page = folder / "report" / "report.html"
    found = assert_self_contained(page, pictures=4)
    names = {path.name for path in page.parent.glob("*.png")}
    assert names == {f"{kind}-digits.png" for kind in ("accuracy", "curves", "cost", "gap")}
    assert "small" not in found.tags  # the title's <small> is text
    assert "A &lt;small&gt; table</title>" in page.read_text()
    assert found.tags.count("table") == len(re.findall(r"^\| ---", (page.parent / "report.md").read_text(), re.M)) >= 7


def test_a_report_is_written_anew(tmp_path):
    folder = make_sweep(tmp_path)
    first = text_of(folder)
    assert text_of(folder) == first


# --- runs that no sweep made -----------------------------------------------------------------------------------------


def loose_runs(tmp_path: Path) -> Path:
    folder = tmp_path / "loose"
    for method, extra in (("none", []), ("bdropdml", ["--alpha", "0.3"]), ("bdropdml", ["--alpha", "0.5"])):
        for seed in (0, 1):
            words = [
                "--config",
                str(RECIPES / CONFIG),
                "--method",
                method,
                "--seed",
                str(seed),
                "--epochs",
                "3",
                *extra,
            ]
            path = folder / f"{method}{''.join(extra)}{seed}"
            config = settings.read_config([*words, "--output_dir", str(path)])
            write_run(path, grids.plain(config), [50.0 + seed, 60.0, 70.0 + seed * len(extra)])
    return folder


def test_a_folder_of_runs_is_grouped_by_what_differs(tmp_path):
    folder = loose_runs(tmp_path)
    unfinished = settings.read_config(
        ["--config", str(RECIPES / CONFIG), "--output_dir", "x", "--epochs", "3", "--seed", "2", "--method", "none"]
    )
    (folder / "started").mkdir()
    (folder / "started" / "config.yaml").write_text(settings.to_yaml(unfinished))
    text = text_of(folder)
    assert "**6 of 7 runs**" in text
    (rows,) = tables_of(text, "Top-1")
    assert {row["method"]: row["seeds"] for row in rows} == {
        "none-alpha=0.1": "2 of 3", "bdropdml-alpha=0.3": "2 of 2", "bdropdml-alpha=0.5": "2 of 2",
    }  # fmt: skip
    first, _ = tables_of(text, "Tests, seed by seed")
    assert {row["against"] for row in first} == {"none-alpha=0.1"}
    assert_self_contained(folder / "report" / "report.html", pictures=4)


def test_what_cannot_be_reported_on_is_told(tmp_path, monkeypatch, capsys):
    with pytest.raises(settings.RecipeError, match=r"holds no sweep\.yaml and no run; expected a sweep's output_dir"):
        collect.collect(tmp_path / "nothing")
    folder = loose_runs(tmp_path)
    config = json.loads((folder / "none0" / "result.json").read_text())["config"]
    write_run(folder / "again", config, [1.0])
    with pytest.raises(
        settings.RecipeError, match=r"hold the same run \(digits-test_resnet, none-alpha=0\.1, seed 0\)"
    ):
        collect.collect(folder)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "result.json").write_text("{")
    with pytest.raises(settings.RecipeError, match=r"bad holds no run whose settings can be read"):
        collect.collect(tmp_path / "bad")
    (tmp_path / "bad" / "sweep.yaml").write_text("grid: 3")
    with pytest.raises(settings.RecipeError, match=r"sweep\.yaml cannot be read: .*; run the sweep again"):
        collect.collect(tmp_path / "bad")
    (tmp_path / "file").write_text("")
    with pytest.raises(settings.RecipeError, match=r"cannot write the report to .*file/report: Not a directory"):
        report.write_report(loose_runs(tmp_path / "more"), tmp_path / "file" / "report")
    with pytest.raises(settings.RecipeError, match=r"report\.py --help"):
        report.read_options(["runs", "--out", "x"])
    monkeypatch.setattr(sys, "argv", ["report.py", str(tmp_path / "nothing")])
    with pytest.raises(SystemExit) as exit_:
        report.main()
    assert exit_.value.code == 2
    assert re.fullmatch(r"error: .*holds no sweep\.yaml and no run.*\n", capsys.readouterr().err)


# --- from nothing to the page ----------------------------------------------------------------------------------------


def test_a_tiny_sweep_from_nothing_to_the_page(tmp_path):
    """Two methods, the real launcher, both at a time; then a damaged result is done again, and only that."""
    rows = [
        {"name": "plain", "baseline": True, "set": {"method": "none"}},
        {"name": "BDropDML", "set": {"method": "bdropdml"}},
    ]
    columns = [{"name": "digits", "config": CONFIG, "set": {"epochs": 2, "image_size": 16, "batch_size": 128}}]
    table = write_table(tmp_path / "tiny.yaml", rows=rows, columns=columns, seeds=[0])
    command = [sys.executable, str(RECIPES / "sweep.py"), str(table), "--jobs", "2", "--report"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "tiny"
    results = sorted(folder.rglob("result.json"))
    assert len(results) == 2
    assert "**2 of 2 runs**" in (folder / "report" / "report.md").read_text()
    assert_self_contained(folder / "report" / "report.html", pictures=len(list((folder / "report").glob("*.png"))))

    weights = {path: path.parent.joinpath("model.safetensors").read_bytes() for path in results}
    results[0].write_text(results[0].read_text()[:50])
    times = {path: path.stat().st_mtime_ns for path in results}
    time.sleep(0.01)
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 done" in done.stdout
    assert "1 broken" in done.stdout
    assert [path for path in results if path.stat().st_mtime_ns != times[path]] == [results[0]]
    assert json.loads(results[0].read_text())["epochs"] == 2
    assert {path: path.parent.joinpath("model.safetensors").read_bytes() for path in results} == weights
