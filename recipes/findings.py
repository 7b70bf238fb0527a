"""What lies in the folders of runs, and what it says: states, tables of numbers, and tests over seeds."""

import contextlib
import json
import math
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import yaml
from scipy import stats
from settings import RecipeError
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower
from study import FREE, Column, Row, Run, Settings, Table, differences, make_table

NUMBERS = ("top1_best", "top1_last", "epochs", "seed", "wall_time_seconds", "num_processes")
CHECKPOINTS = ("checkpoint", "checkpoint.previous")
DATA_SETTINGS = ("model_kwargs", "image_size", "train_images", "data_dir")
LEVEL, POWER = 0.05, 0.8  # of the tests; of the smallest difference that a study could have seen


@dataclass(frozen=True)
class Found:
    """The state of a run's folder, what is wrong with it if it is broken, and what it holds if the run is finished."""

    state: Literal["done", "to do", "to resume", "broken"]
    why: str = ""
    result: dict[str, Any] = field(default_factory=dict)
    metrics: pd.DataFrame = field(default_factory=pd.DataFrame)


def inspect_run(folder: Path, settings: Settings) -> Found:
    """Look at a folder that a run with these settings is to fill; write nothing.

    Args:
        folder: the run's output_dir.
        settings: what is asked for, with num_processes unless any number will do.

    Raises:
        RecipeError: another experiment lies there, finished or not; names the settings that differ.
    """
    if not folder.exists() or not any(folder.iterdir()):
        return Found("to do")
    found = Found("to resume" if any((folder / name).exists() for name in CHECKPOINTS) else "to do")
    before: Settings = {}
    try:
        if (folder / "result.json").exists():
            found = Found("done", "", *read_finished(folder))
            before = found.result["config"] | {"num_processes": found.result["num_processes"]}
    except (OSError, ValueError, TypeError) as error:
        found = Found("broken", " ".join(str(error).split()))
    try:
        if not before and (folder / "config.yaml").exists():
            before = {"num_processes": settings.get("num_processes")} | read_config(folder)
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        found = Found("broken", found.why or f"config.yaml: {' '.join(str(error).split())}")
    if before and (changed := differences(before, {"num_processes": before["num_processes"]} | settings)):
        raise RecipeError(
            f"{folder} holds a run with other settings: {', '.join(changed)}; choose another folder with --output_dir, "
            f"or move that run away: mv {folder} {folder}.other"
        )
    return found


def inspect_all(runs: list[Run]) -> list[Found]:
    """Look at every run's folder; raises RecipeError naming every folder that holds another experiment."""
    found, problems = [], []
    for run in runs:
        try:
            found.append(inspect_run(run.folder, run.settings))
        except RecipeError as error:
            problems.append(str(error))
    if problems:
        raise RecipeError(" | ".join(problems))
    return found


def read_config(folder: Path) -> Settings:
    """Read the settings that a run began with, as JSON values."""
    settings: Settings = json.loads(json.dumps(dict(yaml.safe_load((folder / "config.yaml").read_text()))))
    return settings


def read_finished(folder: Path) -> tuple[dict[str, Any], pd.DataFrame]:
    """Read result.json and metrics.csv; raises ValueError unless they are whole and made from each other."""
    result = dict(json.loads((folder / "result.json").read_text()))
    wrong = [key for key in NUMBERS if type(result.get(key)) not in (int, float) or not math.isfinite(result[key])]
    wrong += [key for key in ("config", "versions") if not isinstance(result.get(key), dict)]
    if wrong:
        raise ValueError(f"result.json: {', '.join(f'{key} is {result.get(key)!r}' for key in wrong)}")
    metrics = pd.read_csv(folder / "metrics.csv", dtype=float)
    if len(metrics) != result["epochs"] or "test_top1" not in metrics:
        raise ValueError(f"metrics.csv has {len(metrics)} rows of top-1 and result.json has {result['epochs']} epochs")
    for name, values in (("top1_best", metrics["test_top1"]), ("top1_last", metrics["test_top1"].tail(1))):
        if not np.isclose(values, result[name], rtol=1e-9, atol=0).any():
            raise ValueError(f"{name} is {result[name]} in result.json and {values.max()} in metrics.csv")
    return result, metrics


def refuse_other_sweep(path: Path, record: dict[str, Any]) -> None:
    """Refuse a sweep without a folder's seeds, rows and columns (RecipeError); `inspect_all` compares the settings."""
    if not path.exists():
        return
    try:
        before = yaml.safe_load(path.read_text())
        lost = [f"seed {seed}" for seed in before["table"]["seeds"] if seed not in record["table"]["seeds"]]
        lost += [f"{c}/{r}" for c, rows in before["cells"].items() for r in rows if r not in record["cells"].get(c, {})]
        command = before["command"]
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise RecipeError(
            f"{path} cannot be read ({type(error).__name__}); move it away: mv {path} {path}.old"
        ) from error
    if lost:
        raise RecipeError(
            f"{path.parent} holds a sweep that this one does not contain: {'; '.join(lost)}. "
            f"Choose another --output_dir, or go on with that one: {command}"
        )


@dataclass
class Study:
    """A table and what is there of it.

    Attributes:
        table: the rows, columns and seeds that were asked for.
        cells: (column, row) -> its settings.
        runs: one line per run: column, row, seed, state, why; result.json and the last epoch's metrics if finished.
        epochs: one line per epoch of the finished runs: column, row, seed, and what metrics.csv has.
        command: completes the runs; None if no sweep made them.
    """

    table: Table
    cells: dict[tuple[str, str], Settings]
    runs: pd.DataFrame
    epochs: pd.DataFrame
    command: str | None

    def values(self, column: str, row: str, name: str) -> "pd.Series[float]":
        """Return a measure of the finished runs of a cell, by seed."""
        runs = self.runs[(self.runs["column"] == column) & (self.runs["row"] == row) & (self.runs["state"] == "done")]
        values = runs.set_index("seed").get(name, pd.Series(dtype=float))
        return pd.to_numeric(values, errors="coerce").dropna()


def collect_study(folder: Path) -> Study:
    """Read a sweep's output_dir, or any folder of runs; raises RecipeError if there is nothing to report on."""
    path = folder / "sweep.yaml"
    if not path.exists():
        return collect_loose(folder)
    try:
        record = yaml.safe_load(path.read_text())
        table = make_table(record["table"])
        cells = {(c, row): settings for c, rows in record["cells"].items() for row, settings in rows.items()}
        words = shlex.split(record["command"])
        words[words.index("--output_dir") + 1] = str(folder)  # where the runs are now
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise RecipeError(f"{path} cannot be read: {type(error).__name__}: {error}; run the sweep again") from error
    places = [(*cell, seed, Path(folder, *cell, f"seed{seed}")) for cell in cells for seed in table.seeds]
    return Study(table, cells, *read_runs(places, cells), shlex.join(words))


def collect_loose(folder: Path) -> Study:
    """Read runs that no sweep made; columns are data and model, rows are named by the settings in which they differ."""
    found: dict[Path, Settings] = {}
    for path in sorted(folder.rglob("config.yaml")):
        with contextlib.suppress(OSError, ValueError, TypeError, yaml.YAMLError):
            settings = read_config(path.parent)
            if {"dataset", "model", "method", "seed"} <= settings.keys():  # another tool's config.yaml has others
                found[path.parent] = settings
    if not found:
        raise RecipeError(f"{folder} holds no sweep.yaml and no run; expected a sweep's output_dir")
    frame = pd.DataFrame([{key: json.dumps(value) for key, value in settings.items()} for settings in found.values()])
    varying = [key for key in frame if key not in FREE | {"seed"} and frame[key].nunique(dropna=False) > 1]
    places, cells = [], {}
    for path, settings in found.items():
        own = {key: f"{key}={settings.get(key)}" for key in varying if key not in ("dataset", "model", "method")}
        column = [settings["dataset"], settings["model"], *(own[key] for key in own if key in DATA_SETTINGS)]
        row = [settings["method"], *(own[key] for key in own if key not in DATA_SETTINGS)]
        places.append(("-".join(column), "-".join(row), int(settings["seed"]), path))
        cells[places[-1][:2]] = settings
    if len({place[:3] for place in places}) < len(places):
        raise RecipeError(f"two folders in {folder} hold the same run; move one of them away")
    rows = sorted(dict.fromkeys(row for _, row in cells), key=lambda row: not row.startswith("none"))
    plain = [row for row in rows if row.startswith("none")]
    table = Table(
        f"Runs in {folder}", str(folder), sorted({seed for _, _, seed, _ in places}),
        [Column(column, "") for column in dict.fromkeys(column for column, _ in cells)],
        [Row(row, against=plain if len(plain) == 1 and row not in plain else []) for row in rows],
    )  # fmt: skip
    return Study(table, cells, *read_runs(places, cells), None)


Place = tuple[str, str, int, Path]  # column, row, seed, folder


def read_runs(places: list[Place], cells: dict[tuple[str, str], Settings]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return Study's runs and epochs; a run with other settings than its cell's counts as broken."""
    lines, epochs = [], [pd.DataFrame(columns=["column", "row", "seed"])]
    for column, row, seed, folder in places:
        try:
            found = inspect_run(folder, cells[column, row] | {"seed": seed})
        except RecipeError as error:
            found = Found("broken", str(error))
        place = {"column": column, "row": row, "seed": seed}
        last = found.metrics.iloc[-1].to_dict() if found.state == "done" else {}
        lines.append(last | found.result | place | {"state": found.state, "why": found.why})
        if found.state == "done":
            epochs.append(found.metrics.assign(**place))
    return pd.DataFrame(lines), pd.concat(epochs[1:] or epochs, ignore_index=True)


def lower_is_better(measure: str) -> bool:
    """Whether a measure is a loss, a calibration error or a divergence."""
    return measure.endswith(("_ce", "_nll", "_ece", "_loss", "_kl", "_brier"))


def t_interval(values: "pd.Series[float]") -> tuple[float, float]:
    """Return the 95 % t interval of the mean; NaN for fewer than two values, no width for equal ones."""
    if len(values) < 2:
        return math.nan, math.nan
    reach = stats.t.ppf(1 - LEVEL / 2, len(values) - 1) * values.std() / math.sqrt(len(values))
    return float(values.mean() - reach), float(values.mean() + reach)


def compare(ours: "pd.Series[float]", theirs: "pd.Series[float]") -> dict[str, float]:
    """Compare two methods on the seeds that both have: a paired t test.

    Args:
        ours: values by seed.
        theirs: values by seed of the other method.

    Returns:
        seeds, difference (ours minus theirs), its 95 % interval low to high, its sd over seeds, and p. Without two
        seeds, or if all differences are equal up to rounding, p is NaN: t has no scale.
    """
    difference = (ours - theirs).dropna()  # aligned by seed
    low, high = t_interval(difference)
    tested = len(difference) > 1 and np.ptp(difference) > 1e-9
    return {
        "seeds": len(difference), "difference": difference.mean(), "low": low, "high": high, "sd": difference.std(),
        "p": float(stats.ttest_1samp(difference, 0).pvalue) if tested else math.nan,
    }  # fmt: skip


def smallest_visible(sd: float, seeds: int, tests: int) -> float:
    """Return the true difference that a paired t test finds with probability POWER at level LEVEL / tests.

    Args:
        sd: of the differences over seeds.
        seeds: how many.
        tests: in the family; Holm's first step has this level.
    """
    if seeds < 2 or not sd > 0:
        return math.nan
    effect = TTestPower().solve_power(nobs=seeds, alpha=LEVEL / max(1, tests), power=POWER)
    return float(np.squeeze(effect)) * sd


def compare_primary(study: Study) -> pd.DataFrame:
    """Compare every row with the rows that its `against` names, on every column.

    Returns:
        one line per comparison and measure: column, row, against, measure, what `compare` returns, and time, the wall
        time over the other row's; for the first measure also holm, p corrected over all its lines, and smallest, the
        difference that the study could have seen.
    """
    names = ["column", "row", "against", "measure", "seeds", "difference", "low", "high", "sd", "p", "time"]
    measures = [name for name in study.table.measures if name in study.runs] or study.table.measures[:1]
    lines = []
    for column in study.table.columns:
        for row in study.table.rows:
            for against in row.against:
                pair = (row.name, against)
                if not all((column.name, name) in study.cells for name in pair):
                    continue
                seconds, others = (study.values(column.name, name, "wall_time_seconds") for name in pair)
                place = {"column": column.name, "row": row.name, "against": against}
                for measure in measures:
                    numbers = compare(*(study.values(column.name, name, measure) for name in pair))
                    lines.append(place | {"measure": measure} | numbers | {"time": (seconds / others).mean()})
    found = pd.DataFrame(lines, columns=names).assign(holm=math.nan, smallest=math.nan)
    family = found.index[(found["measure"] == measures[0]) & found["p"].notna()]
    if len(family):
        found.loc[family, "holm"] = multipletests(found.loc[family, "p"], method="holm")[1]
        found.loc[family, "smallest"] = [
            smallest_visible(sd, seeds, len(family)) for sd, seeds in found.loc[family, ["sd", "seeds"]].to_numpy()
        ]
    return found


def best_until(values: "pd.Series[float]", stages: list[float], epochs: int) -> list[float]:
    """Return the highest of the first values for each share of the epochs; at least the first epoch counts."""
    # 0.29 * 100 is 28.999999999999996
    return [float(values.iloc[: max(1, math.floor(round(stage * epochs, 9)))].max()) for stage in stages]
