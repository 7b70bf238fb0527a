"""A table of experiments: what its YAML may say, the runs that it asks for, and the settings of each."""

import json
import os
import re
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from training.run_folder import FREE_ON_RESUME
from training.settings import Config, RecipeError, near, read_config

RECIPES = Path(__file__).resolve().parents[1]
TABLES = RECIPES / "tables"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=+-]*")  # a column's or row's name is a folder's name, too
PER_RUN = FREE_ON_RESUME - {"max_steps"} | {"seed"}  # settings that do not make it another experiment
RESERVED = ("config", "output_dir", "seed", "resume")  # the sweep sets these itself


@dataclass
class Column:
    """One data set with one model: a config of recipes/configs and what differs from it."""

    name: str
    config: str  # relative to recipes/, or absolute
    set: dict[str, Any] = field(default_factory=dict)


@dataclass
class Row:
    """One method, as the settings that differ from the column's."""

    name: str
    set: dict[str, Any] = field(default_factory=dict)
    baseline: bool = False  # plain training: what the other rows are compared with first
    compare: bool = False  # and second: DropBlock
    paper: dict[str, float | list[float]] = field(default_factory=dict)  # column -> percent; one per stage with stages


@dataclass
class Grid:
    """Every row on every column with every seed; tables/table3_smoke.yaml explains each key where it stands."""

    title: str
    output_dir: str
    seeds: list[int]
    columns: list[Column]
    rows: list[Row]
    stages: list[float] = field(default_factory=list)  # shares of the epochs, for the best-until-stage columns


@dataclass(frozen=True)
class Run:
    """One training: where it stands in the grid, its resolved settings, and the options that give them."""

    column: str
    row: str
    config: Config
    options: tuple[str, ...]

    @property
    def folder(self) -> Path:
        """Where the run writes."""
        return Path(self.config.output_dir)

    @property
    def name(self) -> str:
        """Column, row and seed, as the run's path below the sweep's folder."""
        return f"{self.column}/{self.row}/seed{self.config.seed}"


def find_table(table: str) -> Path:
    """The file of a table's name (table3_smoke) or path.

    Raises:
        RecipeError: there is none.
    """
    path = TABLES / f"{table}.yaml" if NAME.fullmatch(table) and not table.endswith(".yaml") else Path(table)
    if not path.is_file():
        known = sorted(file.stem for file in TABLES.glob("*.yaml"))
        raise RecipeError(
            f"no table {table!r} ({path} is no file); {near(table, known)} Known: {', '.join(known)}; or give a path"
        )
    return path


def read_grid(path: Path) -> Grid:
    """The grid in a YAML file, every key and type checked.

    Raises:
        RecipeError: a key is unknown or missing, a value has the wrong type, or names do not fit together.
    """
    try:
        return make_grid(make_parser().parse_path(path).as_dict())
    except Exception as error:  # jsonargparse, PyYAML and the file system each have their own
        raise RecipeError(f"table {path}: {error}; recipes/tables/table3_smoke.yaml explains the keys") from error


def make_parser() -> ArgumentParser:
    """The keys of a table's YAML."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Grid, as_group=False)
    return parser


def make_grid(values: dict[str, Any]) -> Grid:
    """A grid of plain dicts and lists, checked for what types alone do not say.

    Raises:
        RecipeError: names every inconsistency at once.
    """
    values = values | {
        "columns": [Column(**dict(column)) for column in values["columns"]],
        "rows": [Row(**dict(row)) for row in values["rows"]],
    }
    grid = Grid(**values | {"output_dir": os.path.expanduser(values["output_dir"])})
    problems = list(inconsistencies(grid))
    if problems:
        raise RecipeError("; ".join(problems))
    return grid


def inconsistencies(grid: Grid) -> list[str]:
    """What is wrong with a grid in itself, one sentence each."""
    problems = []
    for what, names in (("columns", [c.name for c in grid.columns]), ("rows", [r.name for r in grid.rows])):
        problems += [f"{what} is empty; expected at least one"] * (not names)
        problems += [
            f"{what}: name {n!r} is no folder name; expected {NAME.pattern}" for n in names if not NAME.fullmatch(n)
        ]
        folded = [name.casefold() for name in names]  # some file systems do not tell cases apart
        twice = sorted({name for name in folded if folded.count(name) > 1})
        problems += [f"{what}: name {name!r} stands there twice" for name in twice]
    if not grid.seeds or len(set(grid.seeds)) < len(grid.seeds) or min(grid.seeds) < 0:
        problems.append(f"seeds is {grid.seeds}; expected different numbers from 0, e.g. [0, 1, 2]")
    if sorted(set(grid.stages)) != grid.stages or any(not 0 < stage <= 1 for stage in grid.stages):
        problems.append(
            f"stages is {grid.stages}; expected rising shares of the epochs, e.g. [0.2, 0.4, 0.6, 0.8, 1.0]"
        )
    for role in ("baseline", "compare"):
        chosen = [row.name for row in grid.rows if getattr(row, role)]
        problems += [f"rows {', '.join(chosen)} all have {role}: true; expected at most one"] * (len(chosen) > 1)
    for row in grid.rows:
        for name, value in row.paper.items():
            got, expected = (len(value) if isinstance(value, list) else 0), len(grid.stages)
            if got != expected:
                what = f"a list of {expected}, one per stage" if expected else "one number, as the grid has no stages"
                problems.append(f"row {row.name}: paper[{name}] is {value}; expected {what}")
    cells: list[Column | Row] = [*grid.columns, *grid.rows]
    for cell in cells:
        taken = sorted(set(cell.set) & set(RESERVED))
        problems += [f"{cell.name}: set has {', '.join(taken)}, which the sweep itself sets; leave it out"] * bool(
            taken
        )
    return problems


def grid_runs(grid: Grid, extra: list[str]) -> list[Run]:
    """Every run of the grid, seed by seed, so that an interrupted sweep has compared all rows on the first seeds.

    Args:
        grid: the table.
        extra: options of train.py that every run gets, after the table's own.

    Raises:
        RecipeError: names every cell whose settings train.py would refuse, each once.
    """
    runs, problems = [], []
    bad = [option for option in extra if option.split("=")[0] in {f"--{name}" for name in RESERVED}]
    if bad:
        raise RecipeError(f"{bad[0]} is set by the sweep; leave it out after --, e.g. -- --epochs 2")
    for seed in grid.seeds:
        for column in grid.columns:
            for row in grid.rows:
                config = RECIPES / column.config
                folder = Path(grid.output_dir) / column.name / row.name / f"seed{seed}"
                overrides = as_options(column.set | row.set)
                options = ("--config", shown_path(config), *overrides, *extra)
                options += ("--seed", str(seed), "--output_dir", str(folder))
                try:
                    runs.append(Run(column.name, row.name, read_config(list(options)), options))
                except RecipeError as error:
                    problems.append(f"{column.name}/{row.name}: {error}")
    if problems:
        once = list(dict.fromkeys(problems))
        raise RecipeError(f"{len(once)} cells of {grid.title!r} cannot run: {' | '.join(once)}")
    return runs


def as_options(values: dict[str, Any]) -> list[str]:
    """Settings as a command line says them: --key value, with what is no string as JSON."""
    pairs = ((f"--{key}", value if isinstance(value, str) else json.dumps(value)) for key, value in values.items())
    return [word for pair in pairs for word in pair]


def shown_path(path: Path) -> str:
    """A path as a user at the present folder would type it."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def differences(before: dict[str, Any], now: dict[str, Any], free: set[str] = PER_RUN - {"seed"}) -> list[str]:
    """Settings in which two runs differ, apart from the free ones, each as 'key (there ..., asked ...)'.

    A setting that an older run does not name had the value that is its default today.
    """
    before = defaults() | before
    return [
        f"{key} (there {before.get(key)!r}, asked {now.get(key)!r})"
        for key in sorted((before.keys() | now.keys()) - free)
        if before.get(key) != now.get(key)
    ]


def defaults() -> dict[str, Any]:
    """The default of every setting that has one."""
    given = {item.name: item.default for item in fields(Config) if item.default is not MISSING}
    made = {item.name: item.default_factory() for item in fields(Config) if item.default_factory is not MISSING}
    return given | made


def plain(config: Config) -> dict[str, Any]:
    """A run's settings as JSON gives them back."""
    values: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    return values
