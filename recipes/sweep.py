"""Run a table of experiments: every method on every data set and model with every seed, each run once.

    python recipes/sweep.py table3_smoke --dry_run
    python recipes/sweep.py table3_smoke --jobs 2 --report
    python recipes/sweep.py table1 --seeds [0,1,2,3,4] --cluster slurm --cluster_options '{slurm_partition: gpu}'
    python recipes/sweep.py table3 --output_dir runs/short -- --epochs 20 --milestones [8,13,18]

The first lists the commands. The second runs them two at a time, each on a GPU of its own if there are two, and writes
the report. The third submits each run to SLURM (pip install submitit). The fourth passes options to every run. Runs are
in OUTPUT_DIR/column/row/seed0 with their logs beside them. Run the same command again to go on after an interruption:
finished runs are skipped, interrupted ones resumed, broken ones repeated.
"""

import itertools
import os
import queue
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from argparse import ArgumentError
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
import yaml
from filelock import FileLock, Timeout
from findings import Found, inspect_all, inspect_run, refuse_other_sweep
from jsonargparse import ArgumentParser, Namespace
from settings import PositiveInt, RecipeError, exit_with
from study import Run, Table, plan_runs, read_table, shown_path

# what train.py says of a folder that it can neither continue nor start in
UNUSABLE = re.compile(r"error: (\(process \d+\) )?(resume: |output_dir .* holds )")
STOP_SECONDS = 120  # after Ctrl-C a run finishes its step and saves; then it is killed

Command = list[str]
Start = Callable[[Run, Command], tuple[str, Path]]  # runs a command to its end; returns (last line of its log, the log)


def main() -> None:
    """Run the table of the command line; exit status 2 for a mistake, 1 if a run failed, 130 if interrupted."""
    for number in (signal.SIGINT, signal.SIGTERM):  # SIGINT, too: a shell starts background jobs with it ignored
        signal.signal(number, signal.default_int_handler)
    try:
        sys.exit(sweep(read_options(sys.argv[1:])))
    except RecipeError as error:
        exit_with(error)
    except KeyboardInterrupt:
        sys.exit(130)


def read_options(words: list[str]) -> Namespace:
    """Parse a command line; everything after -- goes to train.py unchanged.

    Raises:
        RecipeError: an option is unknown or has the wrong type or range.
    """
    cut = words.index("--") if "--" in words else len(words)
    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False, description=__doc__.partition("\n\n")[0])
    parser.add_argument("table", type=str, help="the name of a table in recipes/tables, or the path of a YAML file")
    parser.add_argument("--output_dir", type=str | None, help="instead of the table's")
    parser.add_argument("--config", type=str | None, help="one column with this config, instead of the table's columns")
    parser.add_argument("--seeds", type=list[int] | None, help="instead of the table's, e.g. [0,1,2]")
    parser.add_argument("--jobs", type=PositiveInt, default=1, help="runs at a time, each on a GPU of its own")
    parser.add_argument("--num_processes", type=PositiveInt, default=1, help="processes (GPUs) of each run")
    parser.add_argument("--cluster", type=Literal["slurm", "local"] | None, help="submit through submitit")
    parser.add_argument("--cluster_options", type=dict[str, Any], default={}, help="e.g. '{timeout_min: 600}'")
    parser.add_argument("--dry_run", action="store_true", help="list the commands and start nothing")
    parser.add_argument("--report", action="store_true", help="write the report at the end")
    try:
        options = parser.parse_args(words[:cut])
    except ArgumentError as error:
        raise RecipeError(f"{error}; python recipes/sweep.py --help lists the options") from error
    if options.cluster_options and not options.cluster:
        raise RecipeError("--cluster_options needs a cluster, e.g. --cluster slurm")
    options.extra = words[cut + 1 :]
    return options


def sweep(options: Namespace) -> int:
    """Run the whole sweep and return the exit status.

    Raises:
        RecipeError: the table, a run's settings or the contents of the output folder do not fit; nothing was started.
    """
    table = requested_table(options)
    runs = plan_runs(table, options.extra, options.num_processes)
    record, folder = sweep_record(table, runs, options), Path(table.output_dir)
    found = inspect_all(runs)
    refuse_other_sweep(folder / "sweep.yaml", record)
    commands = [command_of(run) for run in runs]
    if options.dry_run:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without a traceback
        for state, command in zip(found, commands, strict=True):
            print(f"{shlex.join(command)}  # {state.state}{f': {state.why}' if state.why else ''}")
        return 0
    with lock(folder):
        (folder / "sweep.yaml.tmp").write_text(yaml.safe_dump(record, sort_keys=False))
        (folder / "sweep.yaml.tmp").replace(folder / "sweep.yaml")
        counts = ", ".join(f"{n} {state}" for state, n in Counter(state.state for state in found).items())
        print(f"{table.title}: {len(runs)} runs, {counts}", flush=True)
        todo = [(r, c) for r, c, state in zip(runs, commands, found, strict=True) if state.state != "done"]
        outcomes, interrupted = run_all(todo, options, folder)
        ended = Counter(outcome.what for outcome in outcomes) + Counter({"not started": len(todo) - len(outcomes)})
        print(", ".join(f"{n} {what}" for what, n in ended.items()) or "nothing to do")
        failed = [outcome for outcome in outcomes if outcome.found.state != "done"]
        for outcome in failed:
            print(f"{outcome.run.name}: {outcome.last_line} (log: {outcome.log})", file=sys.stderr)
        if interrupted:
            print("interrupted; run the same command again to go on", file=sys.stderr)
            return 130
        if options.report:
            from report import write_report

            print(f"report: {write_report(folder, folder / 'report')}")
    return int(bool(failed))


def requested_table(options: Namespace) -> Table:
    """Read the table and replace in it what the command line gives."""
    given = {key: options[key] for key in ("output_dir", "seeds") if options[key] is not None}
    if options.config is not None:
        given["columns"] = [{"name": Path(options.config).stem, "config": options.config}]
    return read_table(options.table, **given)


def command_of(run: Run) -> Command:
    """Return the command that starts or continues a run, as a user could paste it."""
    processes = run.settings["num_processes"]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--num_processes", str(processes)]
    if processes > 1:  # torchrun's workers, also on a CPU; port 0: runs side by side need different ports
        command += ["--multi_gpu", "--main_process_port", "0"]
    train = shown_path(Path(__file__).resolve().with_name("train.py"))
    return [*command, train, *run.options, "--resume", "auto"]


def sweep_record(table: Table, runs: list[Run], options: Namespace) -> dict[str, Any]:
    """Return the contents of sweep.yaml: the table, the command that completes it, and the settings of each cell."""
    launch = ["python", shown_path(Path(__file__).resolve()), options.table, "--output_dir", table.output_dir]
    launch += ["--config", options.config] if options.config is not None else []
    launch += ["--seeds", str(table.seeds).replace(" ", "")]
    launch += ["--num_processes", str(options.num_processes)] if options.num_processes > 1 else []
    launch += ["--", *options.extra] if options.extra else []
    cells: dict[str, dict[str, Any]] = {}
    for run in runs:
        own = {key: value for key, value in run.settings.items() if key not in ("output_dir", "seed", "resume")}
        cells.setdefault(run.column, {})[run.row] = own
    return {"command": shlex.join(launch), "table": asdict(table), "cells": cells}


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Create the folder and hold it: RecipeError if another process does, or if it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock", blocking=False):
            yield
    except Timeout as error:
        raise RecipeError(f"another process works in {folder}; wait for it, or choose another --output_dir") from error
    except OSError as error:
        raise RecipeError(f"cannot write to {folder}: {error.strerror}; choose another --output_dir") from error


@dataclass(frozen=True)
class Outcome:
    """How a run ended that was started: by what its folder holds, whatever its exit status."""

    run: Run
    what: str
    last_line: str
    log: Path
    found: Found


def run_all(todo: list[tuple[Run, Command]], options: Namespace, folder: Path) -> tuple[list[Outcome], bool]:
    """Start every run, `--jobs` at a time; one that fails does not stop the others.

    Returns:
        the outcomes, and whether Ctrl-C or SIGTERM ended the sweep early.
    """
    here = Processes(options.jobs, options.num_processes)
    start = here.start if options.cluster is None else submitter(options, here, folder / "submitit")
    # SLURM has a queue of its own: submit everything at once, unless the user limits it
    workers = max(1, len(todo)) if options.cluster == "slurm" and options.jobs == 1 else options.jobs
    interrupted = False
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(run_once, run, command, start) for run, command in todo]
        try:
            for count, future in enumerate(as_completed(futures), 1):
                outcome = future.result()
                top1 = outcome.found.result.get("top1_last")
                tail = outcome.last_line if top1 is None else f"top-1 {top1:.2f} %"
                print(f"[{count}/{len(todo)}] {outcome.run.name}: {outcome.what}: {tail}", flush=True)
        except KeyboardInterrupt:
            interrupted = True
            pool.shutdown(wait=False, cancel_futures=True)  # those that have not started
            if options.cluster:
                print("submitted jobs go on; end them with the cluster's own tools (scancel)", flush=True)
                os._exit(130)  # the threads wait for jobs that may take days
            print("stopping: the runs save and end", flush=True)
            here.stop()
    return [future.result() for future in futures if not future.cancelled()], interrupted


def run_once(run: Run, command: Command, start: Start) -> Outcome:
    """Start or continue a run; a folder that train.py cannot continue is renamed, once, and never deleted."""
    line, log = start(run, command)
    aside = ""
    if UNUSABLE.match(line):
        names = (run.folder.with_name(f"{run.folder.name}.unusable{number}") for number in itertools.count(1))
        moved = run.folder.rename(next(name for name in names if not name.exists()))
        aside = f" (the old files are in {moved.name})"
        line, log = start(run, command)
    try:
        found = inspect_run(run.folder, run.settings)
    except RecipeError as error:
        found, line = Found("broken", str(error)), str(error)
    what = {"done": "done", "to resume": "stopped"}.get(found.state, "failed")
    return Outcome(run, what + aside, line, log, found)


def last_line(text: str) -> str:
    """Return the line that says why a run ended: train.py's own error if there is one, else the last one."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1] if lines else "no output")


class Processes:
    """The runs that are processes of this machine, and its GPUs."""

    def __init__(self, jobs: int, num_processes: int) -> None:
        """Share the GPUs between the jobs, and the cores between the processes unless OMP_NUM_THREADS is set."""
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count()))))
        gpus = [gpu.strip() for gpu in visible.split(",") if gpu.strip()]
        if 0 < len(gpus) < jobs * num_processes:
            print(f"{jobs} runs at a time on {len(gpus)} GPUs: runs share a GPU", flush=True)
        self.shares: queue.SimpleQueue[dict[str, str]] = queue.SimpleQueue()  # one per job: its part of the environment
        turns = itertools.cycle(gpus)
        for _ in range(jobs):
            own = dict.fromkeys(itertools.islice(turns, num_processes))
            self.shares.put({"CUDA_VISIBLE_DEVICES": ",".join(own)} if own else {})
        threads = max(1, len(os.sched_getaffinity(0)) // (jobs * num_processes))
        self.environment = {"OMP_NUM_THREADS": str(threads)} | os.environ
        self.alive: set[subprocess.Popen[bytes]] = set()
        self.lock = threading.Lock()
        self.stopped = False

    @contextmanager
    def gpus(self) -> Iterator[dict[str, str]]:
        """Hold one job's GPUs; yields the environment variable, none without GPUs."""
        share = self.shares.get()
        try:
            yield share
        finally:
            self.shares.put(share)

    def start(self, run: Run, command: Command) -> tuple[str, Path]:
        """Run a command to its end and append its output to the log beside the run's folder."""
        log = run.folder.with_name(f"{run.folder.name}.log")
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file, self.gpus() as gpus:
            begin = file.tell()
            with self.lock:
                if self.stopped:
                    return "stopped before it started", log
                # a session of its own: the terminal's Ctrl-C must not reach the launcher, which would leave its workers
                process = subprocess.Popen(
                    command, stdout=file, stderr=subprocess.STDOUT, env=self.environment | gpus, start_new_session=True
                )
                self.alive.add(process)
            process.wait()
            with self.lock:
                self.alive.discard(process)
        return last_line(log.read_bytes()[begin:].decode(errors="replace")), log

    def stop(self) -> None:
        """Send SIGINT to the training processes, which save and end, and their launchers with them."""
        with self.lock:
            self.stopped = True
            alive = list(self.alive)
        for process in alive:
            with suppress(psutil.NoSuchProcess):
                launcher = psutil.Process(process.pid)
                for worker in launcher.children() or [launcher]:
                    worker.send_signal(signal.SIGINT)
        deadline = time.monotonic() + STOP_SECONDS
        while any(process.poll() is None for process in alive) and time.monotonic() < deadline:
            time.sleep(0.1)
        for process in alive:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def submitter(options: Namespace, here: Processes, folder: Path) -> Start:
    """Return a function that submits a command and waits for its end; RecipeError if submitit rejects the options."""
    try:
        import submitit
        from submitit.helpers import CommandFunction
    except ImportError as error:
        raise RecipeError("--cluster needs submitit: pip install 'rblock-fx[slurm]'") from error
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster=options.cluster)
        # a day, where submitit's default is minutes; the next sweep resumes a run that was cut
        executor.update_parameters(**({"timeout_min": 24 * 60} | options.cluster_options))
    except Exception as error:  # submitit raises several, RuntimeError without sbatch, NameError for an option
        raise RecipeError(f"--cluster {options.cluster} with {options.cluster_options}: {error}") from error
    cwd = Path.cwd()

    def start(_: Run, command: Command) -> tuple[str, Path]:
        with ExitStack() as stack:  # submitit's local jobs would see no GPU otherwise; SLURM assigns its own
            gpus = stack.enter_context(here.gpus()) if options.cluster == "local" else {}
            prefix = ["env", *(f"{name}={value}" for name, value in gpus.items())] if gpus else []
            job = executor.submit(CommandFunction([*prefix, *command], cwd=cwd))
            try:
                job.result()
            except Exception as error:  # failed, cancelled or lost; the run's folder shows what it left
                return last_line(f"{error}\n{job.stdout() or ''}\n{job.stderr() or ''}"), job.paths.stderr
            return last_line(job.stdout() or ""), job.paths.stdout

    return start


if __name__ == "__main__":
    main()
