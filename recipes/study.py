"""A table of experiments: what its YAML says, and the runs that it asks for.

A run is one training: a column of the table (data set and model), a row (method) and a seed. recipes/sweep.py starts
the runs of a table and recipes/report.py reports on them.
"""

import contextlib
import json
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from jsonargparse import ArgumentParser

from rblock_fx import apply_rblock, describe

RECIPES = Path(__file__).resolve().parent
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=+-]*")  # a column's or row's name is also the name of a folder
RESERVED = ("config", "output_dir", "seed", "resume")  # the sweep sets these itself
# settings that do not change what a run computes; max_steps does
FREE = {"output_dir", "resume", "checkpoint_steps", "trackers", "data_dir", "download", "num_workers"}
OLDER = {
    "combine": "sum",
    "filter_bias_and_bn": False,
}  # what a run did before the setting existed, where that is not today's default
SITE_SETTINGS = ("sites", "method", "drop_prob", "block_size", "calibration", "batch_norm")

Settings = dict[str, Any]


class StudyError(ValueError):
    """A mistake in a table, in its settings or in its folders: one line for the user, no traceback."""


def exit_with(error: Exception) -> NoReturn:
    """Print a mistake in one line and exit with status 2."""
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(2)


def check_settings_of_run(options: list[str]) -> Settings:
    """Return every setting of train.py for these options as JSON values; raises StudyError if it refuses them."""
    from settings import RecipeError
    from train import parse_settings

    try:
        settings: Settings = json.loads(json.dumps(asdict(parse_settings(options))))
    except RecipeError as error:
        raise StudyError(str(error)) from error
    return settings


def cost_of_run(settings: Settings) -> float:
    """Return the FLOPs of a training step over those of plain training, computed on a model without weights.

    The data set is not loaded, so its number of classes is unknown here. With 10 or 100 classes the cost of ResNet-18
    differs by less than 0.01 %.
    """
    from models import create_model

    if settings["method"] == "none":
        return 1.0
    arguments = {key: value for key, value in settings["model_kwargs"].items() if key != "pretrained"}
    with torch.device("meta"):
        model = create_model(settings["model"], num_classes=100, in_chans=3, **arguments)
    size = settings["image_size"]
    apply_rblock(model, input_size=(3, size, size), **{name: settings[name] for name in SITE_SETTINGS})
    return float(describe(model).cost)


@dataclass
class Column:
    """One data set with one model: a config relative to recipes/, and the settings that differ from it."""

    name: str
    config: str
    set: Settings = field(default_factory=dict)


@dataclass
class Row:
    """One method.

    Attributes:
        name: also the name of a folder.
        set: settings that differ from the column's.
        times: factors of the column's numbers, e.g. {lr: 1.8}; epochs takes milestones and warm-up along.
        equal_cost: a row's name; this row trains for so many epochs that both cost the same.
        against: the rows that this one is compared with: the study's primary comparisons.
        paper: the paper's top-1 in percent by column, one number per stage if the table has stages.
    """

    name: str
    set: Settings = field(default_factory=dict)
    times: dict[str, float] = field(default_factory=dict)
    equal_cost: str | None = None
    against: list[str] = field(default_factory=list)
    paper: dict[str, float | list[float]] = field(default_factory=dict)


@dataclass
class Table:
    """Every row on every column with every seed; recipes/tables/table3_smoke.yaml explains the keys.

    Attributes:
        title: of the report.
        output_dir: where the runs go: OUTPUT_DIR/column/row/seed0.
        seeds: of each row on each column.
        columns: data sets with models.
        rows: methods; costs are relative to the first.
        measures: keys of result.json, or columns of metrics.csv at the last epoch. The first one decides.
        stages: shares of the epochs, for the best accuracy until each.
    """

    title: str
    output_dir: str
    seeds: list[int]
    columns: list[Column]
    rows: list[Row]
    measures: list[str] = field(default_factory=lambda: ["top1_last", "top1_best", "test_ce", "test_ece"])
    stages: list[float] = field(default_factory=list)


def find_table(table: str) -> Path:
    """Return the file of a table's name (table3_smoke) or path; raises StudyError if there is none."""
    path = (
        RECIPES / "tables" / f"{table}.yaml" if NAME.fullmatch(table) and not table.endswith(".yaml") else Path(table)
    )
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in (RECIPES / "tables").glob("*.yaml")))
        raise StudyError(f"no table {table!r}; expected the path of a YAML file or one of {known}")
    return path


def read_table(path: Path) -> Table:
    """Read a table from a YAML file.

    Raises:
        StudyError: a key is unknown or missing, a value has the wrong type, or the parts do not fit together.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Table, as_group=False)
    try:
        return make_table(parser.parse_path(path).as_dict())
    except Exception as error:  # jsonargparse, PyYAML and the file system raise errors of their own
        raise StudyError(f"table {path}: {error}; recipes/tables/table3_smoke.yaml explains the keys") from error


def make_table(values: dict[str, Any]) -> Table:
    """Build a table from plain dicts and lists; raises StudyError naming everything that does not fit together."""
    columns = [Column(**dict(column)) for column in values["columns"]]
    rows = [Row(**dict(row)) for row in values["rows"]]
    table = Table(**values | {"columns": columns, "rows": rows, "output_dir": os.path.expanduser(values["output_dir"])})
    problems = [*name_problems(table), *row_problems(table)]
    if problems:
        raise StudyError("; ".join(problems))
    return table


def name_problems(table: Table) -> Iterator[str]:
    """Find names, seeds, stages and measures that cannot be, one sentence each."""
    for what, cells in (("columns", table.columns), ("rows", table.rows)):
        names = [cell.name.casefold() for cell in cells]  # some file systems ignore the case
        if not names:
            yield f"{what} is empty; expected at least one"
        for cell in cells:
            if not NAME.fullmatch(cell.name):
                yield f"{what}: {cell.name!r} is not a folder name; expected {NAME.pattern}"
            if names.count(cell.name.casefold()) > 1:
                yield f"{what}: the name {cell.name!r} occurs twice"
            if taken := [key for key in RESERVED if key in cell.set]:
                yield f"{cell.name}: set has {', '.join(taken)}, which the sweep sets; leave it out"
    if not table.seeds or len(set(table.seeds)) < len(table.seeds) or min(table.seeds) < 0:
        yield f"seeds is {table.seeds}; expected different numbers from 0, e.g. [0, 1, 2]"
    if sorted(set(table.stages)) != table.stages or any(not 0 < stage <= 1 for stage in table.stages):
        yield f"stages is {table.stages}; expected rising shares of the epochs, e.g. [0.2, 0.6, 1.0]"
    if not table.measures:
        yield "measures is empty; expected at least one, e.g. [top1_last]"


def row_problems(table: Table) -> Iterator[str]:
    """Find rows that name unknown rows, or whose paper values do not match the stages."""
    rows = {row.name: row for row in table.rows}
    for row in table.rows:
        named = [("against", name) for name in row.against] + [("equal_cost", n) for n in [row.equal_cost] if n]
        for key, name in named:
            if name not in rows or name == row.name:
                yield f"row {row.name}: {key} names {name!r}; expected another row of the table"
            elif key == "equal_cost" and rows[name].equal_cost:
                yield f"row {row.name}: equal_cost names {name}, which has equal_cost itself"
        for column, value in row.paper.items():
            if (len(value) if isinstance(value, list) else 0) != (expected := len(table.stages)):
                shape = f"a list of {expected}, one per stage" if expected else "one number, as the table has no stages"
                yield f"row {row.name}: paper[{column}] is {value}; expected {shape}"


@dataclass(frozen=True)
class Run:
    """One training: its place in the table, the options of train.py, and all settings that they give."""

    column: str
    row: str
    seed: int
    settings: Settings
    options: list[str]

    @property
    def folder(self) -> Path:
        """Where the run writes."""
        return Path(self.settings["output_dir"])

    @property
    def name(self) -> str:
        """The run's path below the sweep's folder."""
        return f"{self.column}/{self.row}/seed{self.seed}"


def plan_runs(table: Table, extra: list[str], num_processes: int = 1) -> list[Run]:
    """List every run, seed by seed, so that an interrupted sweep has compared all rows on the first seeds.

    `extra` are options of train.py for every run, which has num_processes processes. Raises StudyError naming every
    cell that train.py would refuse.
    """
    bad = [option for option in extra if option.split("=")[0] in {f"--{name}" for name in RESERVED}]
    if bad:
        raise StudyError(f"{bad[0]} is set by the sweep; leave it out after --, e.g. -- --epochs 2")
    cells, problems = [], []
    for column in table.columns:
        for row in table.rows:
            try:
                cells.append((column.name, row.name, *settings_of_cell(table, column, row, extra)))
            except StudyError as error:
                problems.append(f"{column.name}/{row.name}: {error}")
    if problems:
        raise StudyError(f"{len(problems)} cells of {table.title!r} cannot run: {' | '.join(problems)}")
    runs = []
    for seed in table.seeds:
        for column_name, row_name, settings, options in cells:
            place = {"seed": seed, "output_dir": str(Path(table.output_dir, column_name, row_name, f"seed{seed}"))}
            all_settings = settings | place | {"num_processes": num_processes}
            runs.append(Run(column_name, row_name, seed, all_settings, [*options, *as_options(place)]))
    return runs


def settings_of_cell(table: Table, column: Column, row: Row, extra: list[str]) -> tuple[Settings, list[str]]:
    """Return a cell's settings and the options that give them; raises StudyError if train.py would refuse them."""
    options = ["--config", shown_path(RECIPES / column.config), *as_options(column.set | row.set), *extra]
    settings, factors = check_settings_of_run(options), dict(row.times)
    if row.equal_cost:
        other = next(other for other in table.rows if other.name == row.equal_cost)
        goal, _ = settings_of_cell(table, column, other, extra)
        factors["epochs"] = cost_of_run(goal) * goal["epochs"] / (cost_of_run(settings) * settings["epochs"])
    if factors:
        options += as_options(multiply(settings, factors))
        settings = check_settings_of_run(options)
    return settings, options


def multiply(settings: Settings, factors: dict[str, float]) -> Settings:
    """Return the settings that factors change; whole numbers stay whole, epochs takes milestones and warm-up along."""
    if "epochs" in factors:
        factors = {key: factors["epochs"] for key in ("milestones", "warmup_epochs") if settings.get(key)} | factors
    changed: Settings = {}
    for key, factor in factors.items():
        match settings.get(key):
            case bool() | None | str() | dict() as value:
                raise StudyError(f"times: {key} is {value!r}, which is not a number")
            case list() as values:
                changed[key] = [round(value * factor) for value in values]
            case value:
                changed[key] = round(value * factor) if isinstance(value, int) else round(value * factor, 12)
    return changed


def differences(before: Settings, now: Settings) -> list[str]:
    """Name the settings in which two runs differ, apart from those in FREE.

    A setting that an older run does not have had OLDER's value, or else today's default.
    """
    if missing := now.keys() - before.keys() - {"num_processes"}:
        before = {key: OLDER[key] for key in missing & OLDER.keys()} | before
        known = {key: value for key, value in before.items() if key in now and key != "num_processes"}
        with contextlib.suppress(StudyError):  # then the missing settings count as different
            before = check_settings_of_run(as_options(known)) | before
    return [
        f"{key} (there {before.get(key)!r}, asked {now.get(key)!r})"
        for key in sorted((before.keys() | now.keys()) - FREE)
        if before.get(key) != now.get(key)
    ]


def as_options(values: Settings) -> list[str]:
    """Write settings as a command line has them: --key value, everything but strings as JSON."""
    pairs = ((f"--{key}", value if isinstance(value, str) else json.dumps(value)) for key, value in values.items())
    return [word for pair in pairs for word in pair]


def shown_path(path: Path) -> str:
    """Return a path as a user in the current folder would type it."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)
