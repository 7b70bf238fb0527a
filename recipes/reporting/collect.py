"""The runs of a folder as the report sees them: of a sweep with what is missing, or of any folder of runs."""

import json
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from sweeping.grid import PER_RUN, Column, Grid, Row, make_grid
from sweeping.run_state import State, look, read_result, read_rows
from training.settings import RecipeError, read_config

DATA_KEYS = ("dataset", "model", "model_kwargs", "image_size", "train_images", "data_dir", "train_split", "test_split",
             "num_classes")  # fmt: skip


@dataclass
class Trial:
    """One run of a cell: its state, and what it has written so far."""

    seed: int
    folder: Path
    state: State
    why: str = ""
    result: dict[str, Any] | None = None
    rows: list[dict[str, float]] = field(default_factory=list)


@dataclass
class Runs:
    """A grid and what is there of it."""

    grid: Grid
    cells: dict[tuple[str, str], dict[str, Any]]  # (column, row) -> its settings
    trials: dict[tuple[str, str], list[Trial]]  # (column, row) -> one per seed
    command: str | None  # completes the runs; None where no sweep made them

    def done(self, column: str, row: str) -> list[Trial]:
        """The finished runs of a cell, by seed."""
        return [trial for trial in self.trials.get((column, row), []) if trial.result is not None]

    def figures(self, column: str, row: str, key: str) -> dict[int, float]:
        """Seed -> a number of result.json, of the finished runs that have it."""
        found = {trial.seed: (trial.result or {}).get(key) for trial in self.done(column, row)}
        return {seed: float(value) for seed, value in found.items() if value is not None}

    def last(self, column: str, row: str, key: str) -> dict[int, float]:
        """Seed -> the last epoch's cell of metrics.csv, of the finished runs that have it."""
        return {
            trial.seed: trial.rows[-1][key] for trial in self.done(column, row) if trial.rows and key in trial.rows[-1]
        }

    def rows_of(self, column: str) -> list[Row]:
        """The rows that this column has."""
        return [row for row in self.grid.rows if (column, row.name) in self.cells]


def collect(folder: Path) -> Runs:
    """What lies in a sweep's output_dir, or in any folder of runs.

    Raises:
        RecipeError: there is nothing to report on, or sweep.yaml or a run's folder is not what it should be.
    """
    if (folder / "sweep.yaml").exists():
        return collect_sweep(folder)
    configs = sorted(folder.rglob("config.yaml")) if folder.is_dir() else []
    results = sorted(folder.rglob("result.json")) if folder.is_dir() else []
    folders = sorted({path.parent for path in (*configs, *results)})
    if not folders:
        raise RecipeError(
            f"{folder} holds no sweep.yaml and no run; expected a sweep's output_dir, e.g. runs/table3_smoke"
        )
    return collect_folder(folder, folders)


def collect_sweep(folder: Path) -> Runs:
    """The runs that a sweep's sweep.yaml lists, there or not.

    Raises:
        RecipeError: sweep.yaml is damaged.
    """
    path = folder / "sweep.yaml"
    try:
        record = yaml.safe_load(path.read_text())
        grid = make_grid(record["grid"])
        cells = {(column, row): settings for column, rows in record["cells"].items() for row, settings in rows.items()}
        words = shlex.split(str(record["command"]))
        words[words.index("--output_dir") + 1] = str(folder)  # where the runs lie now
        command = shlex.join(words)
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise RecipeError(f"{path} cannot be read: {type(error).__name__}: {error}; run the sweep again") from error
    trials = {}
    for (column, row), settings in cells.items():
        runs = [(seed, folder / column / row / f"seed{seed}") for seed in grid.seeds]
        trials[column, row] = [read_trial(seed, run, settings | {"seed": seed}) for seed, run in runs]
    return Runs(grid, cells, trials, command)


def read_trial(seed: int, folder: Path, settings: dict[str, Any]) -> Trial:
    """One run as it lies there; a run of other settings is no run of this cell, so it counts as broken."""
    try:
        found = look(folder, settings)
    except RecipeError as error:
        return Trial(seed, folder, "broken", str(error))
    try:
        rows = read_rows(folder)
    except (OSError, ValueError) as error:
        return Trial(seed, folder, "broken", str(error))
    return Trial(seed, folder, found.state, found.why, found.result, rows)


def collect_folder(folder: Path, folders: list[Path]) -> Runs:
    """Runs that no sweep made, grouped by their settings apart from the seed; rows are named by what differs.

    Raises:
        RecipeError: two runs have the same settings and seed.
    """
    loose = [(path, settings) for path in folders if (settings := settings_of(path)) is not None]
    if not loose:
        raise RecipeError(f"{folder} holds no run whose settings can be read; expected config.yaml or result.json")
    columns: dict[str, dict[str, list[tuple[Path, dict[str, Any]]]]] = {}
    names = named_apart([{key: settings.get(key) for key in DATA_KEYS} for _, settings in loose], ("dataset", "model"))
    for name, run in zip(names, loose, strict=True):
        columns.setdefault(name, {}).setdefault("", []).append(run)
    cells: dict[tuple[str, str], dict[str, Any]] = {}
    trials: dict[tuple[str, str], list[Trial]] = {}
    methods: dict[str, str] = {}
    for column, runs in columns.items():
        free = PER_RUN | set(DATA_KEYS)
        kept = [{key: value for key, value in settings.items() if key not in free} for _, settings in runs[""]]
        for row, (path, settings) in zip(named_apart(kept, ("method",)), runs[""], strict=True):
            group = trials.setdefault((column, row), [])
            if any(trial.seed == settings["seed"] for trial in group):
                raise RecipeError(
                    f"{path} and another folder hold the same run ({column}, {row}, seed {settings['seed']})"
                )
            group.append(read_trial(settings["seed"], path, settings))
            cells[column, row], methods[row] = settings, settings["method"]
    for group in trials.values():
        group.sort(key=lambda trial: trial.seed)
    seeds = sorted({trial.seed for group in trials.values() for trial in group})
    single = {role: [row for row, method in methods.items() if method == name] for role, name in
              (("baseline", "none"), ("compare", "dropblock"))}  # fmt: skip
    rows = [Row(row, baseline=single["baseline"] == [row], compare=single["compare"] == [row]) for row in methods]
    return Runs(
        Grid(f"Runs in {folder}", str(folder), seeds, [Column(name, "") for name in columns], rows), cells, trials, None
    )


def settings_of(folder: Path) -> dict[str, Any] | None:
    """The settings of the run in a folder; None if neither of its files can be read."""
    try:
        settings: dict[str, Any] = read_result(folder / "result.json")["config"]
    except (OSError, ValueError):
        try:
            settings = vars(read_config(["--config", str(folder / "config.yaml")]))
        except RecipeError:
            return None
    given: dict[str, Any] = json.loads(json.dumps(settings))
    return given


def named_apart(settings: list[dict[str, Any]], lead: tuple[str, ...]) -> list[str]:
    """A name for each: the lead keys' values, then the other keys in which they differ, as folder names may be."""
    varying = [
        key for key in settings[0] if key not in lead and any(other.get(key) != settings[0][key] for other in settings)
    ]
    names = []
    for values in settings:
        words = [str(values[key]) for key in lead] + [f"{key}={values.get(key)}" for key in varying]
        names.append("-".join("".join(c if c.isalnum() or c in "._=+-" else "" for c in word) for word in words))
    return names


def shared_settings(runs: Runs) -> tuple[dict[str, Any], dict[tuple[str, str], dict[str, Any]]]:
    """The settings that all cells share, and of each cell those that not all share."""
    cells = [
        {key: value for key, value in settings.items() if key not in ("output_dir", "seed", "resume")}
        for settings in runs.cells.values()
    ]
    keys = dict.fromkeys(key for settings in cells for key in settings)
    shared = {key: cells[0].get(key) for key in keys if all(c.get(key) == cells[0].get(key) for c in cells)}
    own = {
        name: {k: v for k, v in cell.items() if k not in shared} for name, cell in zip(runs.cells, cells, strict=True)
    }
    return shared, own


def completing(runs: Runs) -> str | None:
    """The command that does what is missing; None if nothing is, or no sweep made the runs."""
    missing = [trial for group in runs.trials.values() for trial in group if trial.result is None]
    return runs.command if missing else None
