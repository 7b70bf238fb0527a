"""Run a table of experiments: every method on every data set and model with every seed, each run once.

    python recipes/sweep.py table3_smoke --dry_run
    python recipes/sweep.py table3_smoke --jobs 2 --report
    python recipes/sweep.py table1 --seeds [0,1,2,3,4] --cluster slurm --cluster_options '{slurm_partition: gpu}'
    python recipes/sweep.py table3 --output_dir runs/short -- --epochs 20 --milestones [8,13,18]

The first lists the commands, the second runs them two at a time and writes the report, the third sends each to a SLURM
cluster (pip install submitit), the fourth gives every run options of train.py. Runs lie in
OUTPUT_DIR/column/row/seed0, their logs beside them. The same command again goes on where the last one ended: finished
runs are skipped, interrupted ones resumed, broken ones done again.
"""

import shlex
import sys
from argparse import ArgumentError
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_type_hints

import yaml
from jsonargparse import ArgumentParser
from sweeping.grid import (
    PER_RUN,
    Grid,
    Run,
    differences,
    find_table,
    grid_runs,
    make_grid,
    plain,
    read_grid,
    shown_path,
)
from sweeping.jobs import Outcome, run_all
from sweeping.run_state import Found, look
from training.run_folder import claim, write_atomically, writing
from training.settings import RecipeError, argument_error, exit_with

SWEEP_FILE = "sweep.yaml"


@dataclass
class Options:
    """The command line of a sweep."""

    table: str
    output_dir: str | None = None  # instead of the table's
    config: str | None = None  # one column of this config instead of the table's columns
    seeds: list[int] | None = None  # instead of the table's
    jobs: int = 1  # runs at a time
    num_processes: int = 1  # of each run, on one machine
    cluster: Literal["slurm", "local"] | None = None  # submit through submitit instead of starting processes here
    cluster_options: dict[str, Any] = field(default_factory=dict)  # of submitit's update_parameters
    dry_run: bool = False
    report: bool = False
    extra: list[str] = field(default_factory=list)  # what follows --


def main() -> None:
    """Read the options and run the table; exit code 2 for a mistake, 1 if a run failed, 130 if interrupted."""
    try:
        code = sweep(read_options(sys.argv[1:]))
    except RecipeError as error:
        exit_with(error)
    sys.exit(code)


def sweep(options: Options) -> int:
    """The whole sweep, top to bottom; returns the exit code.

    Raises:
        RecipeError: the table, a run's settings or what lies in the output folder do not fit; nothing has started.
    """
    grid = asked_grid(options)
    runs = grid_runs(grid, options.extra)
    found = look_at_all(runs)
    folder = Path(grid.output_dir)
    record = sweep_record(grid, runs, options)
    refuse_other_sweep(folder, record)
    commands = [command_of(run, options.num_processes) for run in runs]
    if options.dry_run:
        for state, command in zip(found, commands, strict=True):
            print(f"{shlex.join(command)}  # {state.state}{f': {state.why}' if state.why else ''}")
        return 0
    with claim(folder):
        return start_runs(options, grid, runs, commands, found, record)


def start_runs(
    options: Options, grid: Grid, runs: list[Run], commands: list[list[str]], found: list[Found], record: dict[str, Any]
) -> int:
    """Write sweep.yaml, start what is not done, tell what became of it; returns the exit code.

    Raises:
        RecipeError: the folder cannot be written.
    """
    folder = Path(grid.output_dir)
    with writing(folder):
        write_atomically(folder / SWEEP_FILE, lambda file: file.write_text(yaml.safe_dump(record, sort_keys=False)))
    todo = [(run, command) for run, command, state in zip(runs, commands, found, strict=True) if state.state != "done"]
    counts = Counter(state.state for state in found)
    print(
        f"{grid.title}: {len(runs)} runs, {', '.join(f'{count} {state}' for state, count in counts.items())}",
        flush=True,
    )
    outcomes, interrupted = run_all(todo, options.jobs, options.cluster, options.cluster_options, folder)
    summarise(runs, found, outcomes)
    if options.report and not interrupted:
        from report import write_report

        print(f"report: {write_report(folder, folder / 'report')}")
    if interrupted:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return int(any(not outcome.done for outcome in outcomes.values()))


def read_options(words: list[str]) -> Options:
    """The options of a command line; what follows -- goes to train.py as it stands.

    Raises:
        RecipeError: an option is unknown, has the wrong type or range.
    """
    cut = words.index("--") if "--" in words else len(words)
    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False, description=__doc__.partition("\n\n")[0])
    parser.add_argument("table", type=str, help="a table's name (recipes/tables) or the path of a YAML file")
    parser.add_argument("--output_dir", type=str | None, help="instead of the table's")
    parser.add_argument("--config", type=str | None, help="one column of this train config instead of the table's")
    parser.add_argument("--seeds", type=list[int] | None, help="instead of the table's, e.g. [0,1,2]")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--num_processes", type=int, default=1, help="processes of each run, on one machine")
    parser.add_argument("--cluster", type=Literal["slurm", "local"] | None, help="submit through submitit")
    parser.add_argument(
        "--cluster_options", type=dict[str, Any], default={}, help="e.g. '{timeout_min: 600, gpus_per_node: 1}'"
    )
    parser.add_argument("--dry_run", action="store_true", help="list the commands and start nothing")
    parser.add_argument("--report", action="store_true", help="write the report at the end")
    try:
        options = Options(**parser.parse_args(words[:cut]).as_dict(), extra=words[cut + 1 :])
    except ArgumentError as error:
        raise argument_error(error, get_type_hints(Options), "recipes/sweep.py") from error
    for name in ("jobs", "num_processes"):
        if getattr(options, name) < 1:
            raise RecipeError(f"{name} is {getattr(options, name)}; expected at least 1, e.g. --{name} 1")
    if options.cluster_options and not options.cluster:
        raise RecipeError("cluster_options without a cluster; name it, e.g. --cluster slurm")
    return options


def asked_grid(options: Options) -> Grid:
    """The table with what the command line puts in its place.

    Raises:
        RecipeError: there is no such table, or it does not fit together.
    """
    grid = read_grid(find_table(options.table))
    values = asdict(grid)
    if options.config is not None:
        values["columns"] = [{"name": Path(options.config).stem, "config": options.config}]
    given = {"output_dir": options.output_dir, "seeds": options.seeds}
    return make_grid(values | {key: value for key, value in given.items() if value is not None})


def look_at_all(runs: list[Run]) -> list[Found]:
    """The state of every run's folder.

    Raises:
        RecipeError: names every folder that holds another experiment.
    """
    found, problems = [], []
    for run in runs:
        try:
            found.append(look(run.folder, plain(run.config)))
        except RecipeError as error:
            problems.append(str(error))
    if problems:
        raise RecipeError(" | ".join(problems))
    return found


def command_of(run: Run, num_processes: int) -> list[str]:
    """What starts or continues a run, as a user could paste it."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--num_processes", str(num_processes)]
    if num_processes > 1:  # torchrun's workers, with or without an accelerator; port 0: runs side by side must not meet
        command += ["--multi_gpu", "--main_process_port", "0"]
    train = shown_path(Path(__file__).resolve().with_name("train.py"))
    return [*command, train, *run.options, "--resume", "auto"]


def sweep_record(grid: Grid, runs: list[Run], options: Options) -> dict[str, Any]:
    """What sweep.yaml keeps: the grid, the command that completes it, and each cell's resolved settings."""
    launch = ["python", shown_path(Path(__file__).resolve()), options.table, "--output_dir", grid.output_dir]
    launch += ["--config", options.config] if options.config is not None else []
    launch += ["--seeds", str(grid.seeds).replace(" ", "")]
    launch += ["--num_processes", str(options.num_processes)] * (options.num_processes > 1)
    launch += ["--", *options.extra] * bool(options.extra)
    cells: dict[str, dict[str, Any]] = {}
    for run in runs:
        settings = {
            key: value for key, value in plain(run.config).items() if key not in ("output_dir", "seed", "resume")
        }
        cells.setdefault(run.column, {})[run.row] = settings
    return {"command": shlex.join(launch), "grid": asdict(grid), "extra": options.extra, "cells": cells}


def refuse_other_sweep(folder: Path, record: dict[str, Any]) -> None:
    """A folder's sweep may grow by seeds, rows and columns; it may not become another one.

    Raises:
        RecipeError: sweep.yaml is unreadable, or has runs that this grid has not, or has them with other settings.
    """
    path = folder / SWEEP_FILE
    if not path.exists():
        return
    try:
        before = yaml.safe_load(path.read_text())
        seeds, cells = before["grid"]["seeds"], before["cells"]
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise RecipeError(
            f"{path} cannot be read ({type(error).__name__}); move it away: mv {path} {path}.old"
        ) from error
    lost = [f"seed {seed}" for seed in seeds if seed not in record["grid"]["seeds"]]
    for column, rows in cells.items():
        for row, settings in rows.items():
            now = record["cells"].get(column, {}).get(row)
            if now is None:
                lost.append(f"{column}/{row}")
            else:
                changed = differences(settings, now, PER_RUN)
                lost += [f"{column}/{row} with other settings: {', '.join(changed)}"] * bool(changed)
    if lost:
        raise RecipeError(
            f"{folder} holds a sweep that this one does not contain: {'; '.join(lost)}. Name another folder with "
            f"--output_dir, or go on with that one: {before.get('command', 'see ' + str(path))}"
        )


def summarise(runs: list[Run], found: list[Found], outcomes: dict[str, Outcome]) -> None:
    """One line a run: what became of it, and the last word of one that failed."""
    from rblock_fx.tables import format_table

    lines = []
    for run, state in zip(runs, found, strict=True):
        outcome = outcomes.get(run.name)
        result = state.result if outcome is None else outcome.result
        what = "skipped, done before" if state.state == "done" else "not started" if outcome is None else outcome.what
        top1 = (f"{result['top1_best']:.2f}", f"{result['top1_last']:.2f}") if result else (None, None)
        lines.append((run.name, what, *top1))
    print(format_table(("run", "state", "best top-1", "last top-1"), lines))
    for name, outcome in outcomes.items():
        if not outcome.done:
            print(f"{name}: {outcome.last_line} (log: {outcome.log})", file=sys.stderr)


if __name__ == "__main__":
    main()
