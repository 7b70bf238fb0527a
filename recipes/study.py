"""A table of experiments: what its YAML says, and the runs that it asks for.

A run is one training: a column of the table (data set and model), a row (method) and a seed. recipes/sweep.py starts
the runs of a table and recipes/report.py reports on them.
"""

import contextlib
import json
import os
from argparse import ArgumentError
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from jsonargparse import ArgumentParser
from settings import ClosedUnitInterval, NonNegativeInt, RecipeError

from rblock_fx import apply_rblock, describe

if TYPE_CHECKING:  # made at run time, where no type checker sees it
    FolderName = str
else:
    from jsonargparse.typing import restricted_string_type

    FolderName = restricted_string_type("FolderName", r"^[A-Za-z0-9][A-Za-z0-9._=+-]*$")

RECIPES = Path(__file__).resolve().parent
RESERVED = ("config", "output_dir", "seed", "resume")  # the sweep sets these itself
# settings that do not change what a run computes; max_steps does
FREE = {"output_dir", "resume", "checkpoint_steps", "trackers", "data_dir", "download", "num_workers"}
# what a run did before the setting existed, where that is not today's default
OLDER = {"combine": "sum", "filter_bias_and_bn": False}
SITE_SETTINGS = ("sites", "method", "drop_prob", "block_size", "calibration", "batch_norm")

Settings = dict[str, Any]


@dataclass
class Column:
    """One data set with one model: a config relative to recipes/, and the settings that differ from it."""

    name: FolderName
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

    name: FolderName
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
    seeds: list[NonNegativeInt]
    columns: list[Column]
    rows: list[Row]
    measures: list[str] = field(default_factory=lambda: ["top1_last", "top1_best", "test_ce", "test_ece"])
    stages: list[ClosedUnitInterval] = field(default_factory=list)


def read_table(name: str, **changes: Any) -> Table:
    """Read a table by its name (table3_smoke) or path; changes replace its keys.

    Raises:
        RecipeError: there is no such table, or `make_table` rejects it.
    """
    tables = {path.stem: path for path in sorted((RECIPES / "tables").glob("*.yaml"))}
    path = tables.get(name, Path(name))
    if not path.is_file():
        raise RecipeError(f"no table {name!r}; expected the path of a YAML file or one of {', '.join(tables)}")
    try:
        return make_table(dict(yaml.safe_load(path.read_text())) | changes)
    except (OSError, TypeError, ValueError, yaml.YAMLError) as error:
        raise RecipeError(f"table {path}: {error}; recipes/tables/table3_smoke.yaml explains the keys") from error


def make_table(values: dict[str, Any]) -> Table:
    """Build a table from plain dicts and lists.

    Raises:
        RecipeError: a key is unknown or missing, a value has the wrong type, or the parts do not fit together.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Table, as_group=False)
    try:
        values = json.loads(json.dumps(parser.parse_object(values).as_dict()))  # plain numbers and strings
    except ArgumentError as error:
        raise RecipeError(" ".join(str(error).split())) from error
    columns, rows = ([make(**cell) for cell in values[key]] for make, key in ((Column, "columns"), (Row, "rows")))
    table = Table(**values | {"columns": columns, "rows": rows, "output_dir": os.path.expanduser(values["output_dir"])})
    if problems := list(find_problems(table)):
        raise RecipeError("; ".join(problems))
    return table


def find_problems(table: Table) -> Iterator[str]:
    """Say what the types do not: parts of a table that do not fit together, one sentence each."""
    for key in ("seeds", "columns", "rows", "measures"):
        if not getattr(table, key):
            yield f"{key} is empty; expected at least one"
    if len(set(table.seeds)) < len(table.seeds) or sorted(set(table.stages)) != table.stages:
        yield f"seeds is {table.seeds} and stages is {table.stages}; expected different seeds and rising stages"
    rows = {row.name: row for row in table.rows}
    for cells in (table.columns, table.rows):
        names = [cell.name.casefold() for cell in cells]  # some file systems ignore the case
        for cell in cells:
            if names.count(cell.name.casefold()) > 1:
                yield f"the name {cell.name!r} occurs twice"
            if taken := [key for key in RESERVED if key in cell.set]:
                yield f"{cell.name}: set has {', '.join(taken)}, which the sweep sets; leave it out"
    for row in table.rows:
        for name in [*row.against, *([row.equal_cost] if row.equal_cost else [])]:
            if name not in rows or name == row.name:
                yield f"row {row.name} names {name!r}; expected another row of the table"
            elif name == row.equal_cost and rows[name].equal_cost:
                yield f"row {row.name}: equal_cost names {name}, which has equal_cost itself"
        for column, value in row.paper.items():
            if (len(value) if isinstance(value, list) else 0) != len(table.stages):
                yield f"row {row.name}: paper[{column}] is {value}; expected one number, or with stages one per stage"


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

    `extra` are options of train.py for every run, which has num_processes processes. Raises RecipeError naming every
    cell that train.py would refuse.
    """
    bad = [option for option in extra if option.split("=")[0] in {f"--{name}" for name in RESERVED}]
    if bad:
        raise RecipeError(f"{bad[0]} is set by the sweep; leave it out after --, e.g. -- --epochs 2")
    cells, problems = [], []
    for column in table.columns:
        for row in table.rows:
            try:
                cells.append((column.name, row.name, *settings_of_cell(table, column, row, extra)))
            except RecipeError as error:
                problems.append(f"{column.name}/{row.name}: {error}")
    if problems:
        raise RecipeError(f"{len(problems)} cells of {table.title!r} cannot run: {' | '.join(problems)}")
    runs = []
    for seed in table.seeds:
        for column_name, row_name, settings, options in cells:
            place = {"seed": seed, "output_dir": str(Path(table.output_dir, column_name, row_name, f"seed{seed}"))}
            all_settings = settings | place | {"num_processes": num_processes}
            runs.append(Run(column_name, row_name, seed, all_settings, [*options, *as_options(place)]))
    return runs


def settings_of_cell(table: Table, column: Column, row: Row, extra: list[str]) -> tuple[Settings, list[str]]:
    """Return a cell's settings and the options that give them; raises RecipeError if train.py would refuse them."""
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


def check_settings_of_run(options: list[str]) -> Settings:
    """Return every setting of train.py for these options as JSON values; raises RecipeError if it refuses them."""
    from train import parse_settings

    settings: Settings = json.loads(json.dumps(asdict(parse_settings(options))))
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


def multiply(settings: Settings, factors: dict[str, float]) -> Settings:
    """Return the settings that factors change; whole numbers stay whole, epochs takes milestones and warm-up along."""
    if "epochs" in factors:
        factors = {key: factors["epochs"] for key in ("milestones", "warmup_epochs") if settings.get(key)} | factors
    changed: Settings = {}
    for key, factor in factors.items():
        value = settings.get(key)
        numbers: list[Any] = value if isinstance(value, list) else [value]
        if not all(type(number) in (int, float) for number in numbers):
            raise RecipeError(f"times: {key} is {value!r}, which is not a number")
        scaled = [round(x * factor) if isinstance(x, int) else round(x * factor, 12) for x in numbers]
        changed[key] = scaled if isinstance(value, list) else scaled[0]
    return changed


def differences(before: Settings, now: Settings) -> list[str]:
    """Name the settings in which two runs differ, apart from those in FREE.

    A setting that an older run does not have had OLDER's value, or else today's default.
    """
    if missing := now.keys() - before.keys() - {"num_processes"}:
        before = {key: OLDER[key] for key in missing & OLDER.keys()} | before
        known = {key: value for key, value in before.items() if key in now and key != "num_processes"}
        with contextlib.suppress(RecipeError):  # then the missing settings count as different
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
