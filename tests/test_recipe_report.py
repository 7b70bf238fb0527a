"""The report: statistics against independent oracles, tables against the runs, the page as a browser reads it."""

import base64
import json
import math
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import findings
import numpy as np
import pandas as pd
import pytest
import report
import study
import sweep
import yaml
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from settings import RecipeError

from tests.recipe_folders import CONFIG, write_run, write_table

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "recipes"
PERCENT = st.floats(0, 100).map(lambda value: round(value, 2))
BY_SEED = st.dictionaries(st.integers(0, 9), PERCENT, max_size=10).map(lambda values: pd.Series(values, dtype=float))


# --- statistics ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seeds", [2, 3, 5, 10])
def test_t_intervals_cover_95_percent(seeds):
    """A percentile bootstrap of three seeds covers 76 %."""
    drawn = np.random.default_rng(0).normal(70, 0.4, (4000, seeds))
    intervals = [findings.t_interval(pd.Series(values)) for values in drawn]
    covered = np.mean([low <= 70 <= high for low, high in intervals])
    assert abs(covered - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 4000)


def test_one_seed_has_no_interval_and_equal_seeds_no_width():
    assert np.isnan(findings.t_interval(pd.Series([1.0]))).all()
    assert findings.t_interval(pd.Series([2.0, 2.0])) == (2.0, 2.0)


@given(BY_SEED, BY_SEED)
def test_the_paired_test_is_the_formula(ours, theirs):
    seeds = sorted(set(ours.index) & set(theirs.index))
    found = findings.compare(ours, theirs)
    assert found["seeds"] == len(seeds)
    differences = np.array([ours[seed] - theirs[seed] for seed in seeds])
    if len(seeds) < 2 or np.ptp(differences) < 1e-9:
        assert math.isnan(found["p"])
        return
    n, mean, error = len(seeds), differences.mean(), stats.sem(differences)
    assert found["difference"] == pytest.approx(mean, abs=1e-9)
    assert found["p"] == pytest.approx(2 * stats.t.sf(abs(mean) / error, n - 1), rel=1e-6, abs=1e-12)
    reach = stats.t.ppf(0.975, n - 1) * error
    assert (found["low"], found["high"]) == pytest.approx((mean - reach, mean + reach), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize(("seeds", "tests"), [(3, 1), (5, 1), (5, 6), (10, 24)])
def test_the_smallest_visible_difference_is_found_in_80_percent(seeds, tests):
    smallest = findings.smallest_visible(0.4, seeds, tests)
    drawn = np.random.default_rng(0).normal(smallest, 0.4, (20000, seeds))
    found = stats.ttest_1samp(drawn, 0, axis=1).pvalue < 0.05 / tests
    assert found.mean() == pytest.approx(0.8, abs=0.012)


def test_without_spread_no_difference_is_the_smallest():
    assert all(math.isnan(findings.smallest_visible(*a)) for a in ((0.4, 1, 1), (0.0, 3, 1), (math.nan, 3, 1)))


@given(st.lists(PERCENT, min_size=1, max_size=60), st.sampled_from([[0.2, 0.4, 0.6, 0.8, 1.0], [0.29, 1.0], [0.01]]))
def test_best_until_is_brute_force(values, stages):
    epochs = len(values)
    ends = [[e for e in range(1, epochs + 1) if e * 100 <= round(stage * 100) * epochs] or [1] for stage in stages]
    assert findings.best_until(pd.Series(values), stages, epochs) == [max(values[: max(end)]) for end in ends]


# --- a sweep's folder ------------------------------------------------------------------------------------------------

TOP1 = {  # best top-1 by row and seed
    "plain": (60.0, 60.31, 59.83), "DropBlock": (60.4, 60.0, 60.1), "BDropDML": (63.1, 63.2, 62.9),
    "C-DropBlock": (62.0, 62.0, 62.1),
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A sweep's folder as sweep.py leaves it, every run written."""
    asked = sweep.read_options([str(write_table(tmp_path_factory.mktemp("whole") / "t.yaml"))])
    table = sweep.requested_table(asked)
    runs = study.plan_runs(table, [])
    for run in runs:
        top = TOP1[run.row][run.seed]
        write_run(run.folder, run.settings, [top / 2, top - 5, top, top - 1 - run.seed / 7])
    record = sweep.sweep_record(table, runs, asked)
    Path(table.output_dir, "sweep.yaml").write_text(yaml.safe_dump(record, sort_keys=False))
    return Path(table.output_dir)


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "t")


def last_of(row):
    return np.array([top - 1 - seed / 7 for seed, top in enumerate(TOP1[row])])


def part_of(folder):
    found = findings.collect_study(folder)
    comparisons = findings.compare_primary(found)
    part = report.column_part(found, comparisons, "digits")
    frames = {key: frame.set_index("method") for key, frame in part.items() if isinstance(frame, pd.DataFrame)}
    return found, comparisons, frames


def test_tables_hold_the_runs_numbers(folder):
    found, _, tables = part_of(folder)
    for row in TOP1:
        line, last = tables["measures"].loc[row], last_of(row)
        low, high = stats.t.interval(0.95, 2, last.mean(), stats.sem(last))
        assert line["seeds"] == "3 of 3"
        assert line["top-1, last epoch (%)"] == f"{last.mean():.2f} ± {last.std(ddof=1):.2f}"
        assert line["95 % interval of top-1, last epoch (%)"] == f"{low:.2f} to {high:.2f}"
        assert line["negative log-likelihood"].startswith(f"{2 - last.mean() / 100:.4f} ± ")
    glance = report.glance_table(found).set_index("method")
    best = np.mean(TOP1["BDropDML"])
    assert glance.loc["BDropDML", "ours, digits"].startswith(f"{best:.2f} ± ")
    assert glance.loc["BDropDML", "paper, digits"] == "60.00"
    stages = tables["stages"].loc["BDropDML"].set_index("whose")
    assert list(stages.loc["paper"]) == ["50.00", "60.00"]
    assert list(stages.loc["ours"].str.split(" ").str[0]) == [f"{best - 5:.2f}", f"{best:.2f}"]


def test_primary_comparisons_are_corrected_by_holm(folder):
    _, comparisons, _ = part_of(folder)
    first = comparisons[comparisons["measure"] == "top1_last"]
    pairs = [("DropBlock", "plain"), ("BDropDML", "DropBlock"), ("BDropDML", "plain")]
    assert list(zip(first["row"], first["against"], strict=True)) == pairs
    p = np.array([stats.ttest_rel(last_of(a), last_of(b)).pvalue for a, b in pairs])
    assert list(first["p"]) == pytest.approx(list(p))
    by_definition = [min(1, max((3 - rank) * q for rank, q in enumerate(np.sort(p)) if q <= own)) for own in p]
    assert list(first["holm"]) == pytest.approx(by_definition)
    assert comparisons.loc[comparisons["measure"] != "top1_last", "holm"].isna().all()


def test_each_comparison_has_its_verdict(folder):
    found, comparisons, _ = part_of(folder)
    said = dict(zip(["DropBlock", "BDropDML", "both"], report.sentences(found, comparisons), strict=True))
    assert said["DropBlock"][0] == "not"
    assert said["DropBlock"][1].startswith("DropBlock is not distinguishable from plain: top-1, last epoch (%) +0.1")
    difference, smallest = (last_of("BDropDML") - last_of("DropBlock")), comparisons["smallest"].dropna().iloc[1]
    start = f"BDropDML is better than DropBlock: top-1, last epoch (%) +{difference.mean():.2f}"
    assert said["BDropDML"][1].startswith(start)
    assert said["BDropDML"][1].endswith(
        f", 3 seeds), at 1.00 times its training time. The study could have seen a difference of {smallest:.2f}."
    )
    table = yaml.safe_load((folder / "sweep.yaml").read_text())
    table["table"]["measures"] = ["test_ce"]  # lower is better
    (folder / "sweep.yaml").write_text(yaml.safe_dump(table))
    found, comparisons, _ = part_of(folder)
    assert [verdict for verdict, _ in report.sentences(found, comparisons)] == ["not", "better", "better"]
    assert report.lower_is_better("test_ece")
    assert not report.lower_is_better("top1_last")


def test_what_cannot_be_tested_is_said(folder):
    for run in [folder / "digits" / "plain" / "seed0", *folder.glob("digits/*/seed[12]")]:
        shutil.rmtree(run)
    found, comparisons, _ = part_of(folder)
    said = [sentence for _, sentence in report.sentences(found, comparisons)]
    assert said[0] == "DropBlock cannot be tested against plain: no common seed."
    assert said[1] == "BDropDML cannot be tested against DropBlock: one common seed, difference +2.70."


def test_costs_are_relative_to_the_first_row(folder):
    for path in (folder / "digits" / "BDropDML").rglob("result.json"):
        result = json.loads(path.read_text())
        path.write_text(json.dumps(result | {"wall_time_seconds": 12.0 + result["seed"]}))
    _, comparisons, tables = part_of(folder)
    costs = tables["costs"]
    assert costs.loc["plain", "time relative to plain"] == "1.00 ± 0.00"
    assert costs.loc["BDropDML", "time relative to plain"] == f"{13 / 8:.2f} ± {1 / 8:.2f}"
    assert costs.loc["BDropDML", "gap, KL in nats"] == "0.1250 ± 0.0000"
    assert pd.isna(costs.loc["plain", "gap, KL in nats"])
    assert set(comparisons[comparisons["row"] == "BDropDML"]["time"]) == {13 / 8}


def test_measures_are_shown_where_a_run_has_them(folder):
    assert "calibration error (%)" not in part_of(folder)[2]["measures"]
    path = folder / "digits" / "plain" / "seed0" / "metrics.csv"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([f"{lines[0]},test_ece", *(f"{line},4.0" for line in lines[1:])]))
    assert part_of(folder)[2]["measures"].loc["plain", "calibration error (%)"] == "4.00"


def test_missing_and_broken_runs_have_their_command(folder, tmp_path):
    for seed in (1, 2):
        shutil.rmtree(folder / "digits" / "plain" / f"seed{seed}")
    (folder / "digits" / "DropBlock" / "seed0" / "result.json").write_text("{")
    other = folder / "digits" / "C-DropBlock" / "seed1" / "result.json"
    result = json.loads(other.read_text())
    other.write_text(json.dumps(result | {"config": result["config"] | {"lr": 0.7}}))
    found, _, tables = part_of(folder)
    missing = report.missing_table(found).set_index("row")
    assert tuple(missing.loc["plain", ["state", "seeds"]]) == ("to do", "1, 2")
    assert tuple(missing.loc["DropBlock", ["state", "seeds"]]) == ("broken", "0")
    assert "lr (there 0.7, asked " in missing.loc["C-DropBlock", "why"]
    assert tables["measures"].loc["plain", "seeds"] == "1 of 3"
    page = report.write_report(folder, tmp_path / "out").read_text()
    assert "<strong>8 of 12 runs</strong>" in page
    assert re.search(r"<pre>python .*sweep\.py .*t\.yaml --output_dir ", page)


def test_a_sweep_without_runs_is_a_page_of_dashes(folder):
    shutil.rmtree(folder / "digits")
    page = report.write_report(folder, folder / "report").read_text()
    assert "<strong>0 of 12 runs</strong>" in page
    assert "No run is finished." in page
    assert "<img" not in page


# --- the page --------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """What a browser would load and where links lead; every tag that needs one has its end."""

    def __init__(self, path):
        super().__init__()
        self.loads, self.links, self.ids, self.tags, self.open = [], [], [], [], []
        self.feed(path.read_text())
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.tags.append(tag)
        self.ids += [values["id"]] if "id" in values else []
        self.links += [values["href"]] if tag == "a" else []
        self.loads += [values[key] for key in ("src", "srcset", "data", "href") if key in values and tag != "a"]
        if tag not in ("meta", "link", "img", "br", "hr"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def assert_self_contained(path, pictures):
    page, start = Page(path), "data:image/svg+xml;base64,"
    assert [source for source in page.loads if not source.startswith(start)] == ["data:,"]
    images = [base64.b64decode(source.removeprefix(start)) for source in page.loads if source.startswith(start)]
    assert len(images) == pictures
    for image in images:
        root = ElementTree.fromstring(image)
        assert len(list(root.iter("{http://www.w3.org/2000/svg}path"))) > 20  # something is drawn
        assert not re.search(rb'(href|src)="(?!#)', image)
    assert not re.search(r"https?:|url\(|@import|<script", path.read_text())
    assert {link.removeprefix("#") for link in page.links} <= set(page.ids)
    assert len(set(page.ids)) == len(page.ids)
    return page


def test_the_page_needs_nothing_else(folder):
    path = report.write_report(folder, folder / "report")
    page = assert_self_contained(path, pictures=4)
    assert "small" not in page.tags  # the title's <small> is text
    assert "<h1>A &lt;small&gt; table</h1>" in path.read_text()
    assert sorted(file.name for file in path.parent.iterdir()) == ["comparisons.csv", "report.html", "runs.csv"]
    assert len(pd.read_csv(path.with_name("runs.csv"))) == 12
    before = path.read_bytes()
    assert report.write_report(folder, folder / "report").read_bytes() == before


def test_columns_that_no_run_wrote_have_no_picture(folder):
    for path in folder.rglob("metrics.csv"):
        pd.read_csv(path)[["epoch", "test_top1"]].to_csv(path, index=False)
    assert_self_contained(report.write_report(folder, folder / "report"), pictures=2)


def loose_runs(folder):
    """Runs that no sweep made: plain, and two with another alpha, of two seeds each."""
    for method, extra in (("none", []), ("bdropdml", ["--alpha", "0.3"]), ("bdropdml", ["--alpha", "0.5"])):
        for seed in (0, 1):
            path = folder / f"{method}{''.join(extra)}{seed}"
            words = ["--config", str(RECIPES / CONFIG), "--method", method, "--seed", str(seed), "--epochs", "3"]
            settings = study.check_settings_of_run([*words, *extra, "--output_dir", str(path)])
            write_run(path, settings, [50.0 + seed, 60.0, 70.0 + seed * len(extra)])
    return folder


def test_a_folder_of_runs_is_grouped_by_what_differs(tmp_path):
    folder = loose_runs(tmp_path / "loose")
    settings = json.loads((folder / "none0" / "result.json").read_text())["config"]
    (folder / "started").mkdir()
    (folder / "started" / "config.yaml").write_text(yaml.safe_dump(settings | {"seed": 2}))
    (folder / "config.yaml").write_text("model: not a run of ours")
    found = findings.collect_study(folder)
    assert found.runs.groupby("row")["state"].apply(list).to_dict() == {
        "none-alpha=0.1": ["done", "done", "to do"],
        "bdropdml-alpha=0.3": ["done"] * 2, "bdropdml-alpha=0.5": ["done"] * 2,
    }  # fmt: skip
    assert {row.name: row.against for row in found.table.rows}["bdropdml-alpha=0.3"] == ["none-alpha=0.1"]
    assert_self_contained(report.write_report(folder, folder / "report"), pictures=4)


def test_what_cannot_be_reported_on_is_one_error(tmp_path, monkeypatch, capsys):
    folder = loose_runs(tmp_path / "loose")
    write_run(folder / "again", json.loads((folder / "none0" / "result.json").read_text())["config"], [1.0])
    with pytest.raises(RecipeError, match=r"two folders in .*loose hold the same run"):
        findings.collect_study(folder)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "sweep.yaml").write_text("table: 3")
    with pytest.raises(RecipeError, match=r"sweep\.yaml cannot be read: .*; run the sweep again"):
        findings.collect_study(tmp_path / "bad")
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match=r"cannot write the report to .*file/report: Not a directory"):
        report.write_report(loose_runs(tmp_path / "more"), tmp_path / "file" / "report")
    for words, message in (
        ([str(tmp_path / "none")], "holds no sweep.yaml and no run"),
        (["a", "--out", "b"], "--out b"),
    ):
        monkeypatch.setattr(sys, "argv", ["report.py", *words])
        with pytest.raises(SystemExit) as ending:
            report.main()
        assert ending.value.code == 2
        assert re.fullmatch(rf"error: .*{message}.*\n", capsys.readouterr().err)


@pytest.mark.nightly
def test_a_tiny_sweep_from_nothing_to_the_page(tmp_path):
    """Two methods, the real launcher, both at a time; then a damaged result is repeated, and only that."""
    rows = [{"name": "plain", "set": {"method": "none"}}, {"name": "BDropDML", "set": {}, "against": ["plain"]}]
    columns = [{"name": "digits", "config": CONFIG, "set": {"epochs": 2, "image_size": 16, "batch_size": 128}}]
    table = write_table(tmp_path / "tiny.yaml", rows=rows, columns=columns, seeds=[0], stages=[])
    command = [sys.executable, str(RECIPES / "sweep.py"), str(table), "--jobs", "2", "--report"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    results = sorted((tmp_path / "tiny").rglob("result.json"))
    page = tmp_path / "tiny" / "report" / "report.html"
    assert_self_contained(page, pictures=4)
    assert "BDropDML cannot be tested against plain: one common seed" in page.read_text()
    weights = [path.with_name("model.safetensors").read_bytes() for path in results]
    results[0].write_text(results[0].read_text()[:50])
    times = [path.stat().st_mtime_ns for path in results]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 runs, 1 done, 1 broken" in done.stdout
    assert [path.stat().st_mtime_ns != before for path, before in zip(results, times, strict=True)] == [True, False]
    assert [path.with_name("model.safetensors").read_bytes() for path in results] == weights
