"""Starting many runs: some at a time on this machine, or through submitit on a cluster."""

import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from training.settings import RecipeError

from sweeping.grid import Run, plain
from sweeping.run_state import look

# what train.py says of a folder that it can neither continue nor start in
UNUSABLE = re.compile(r"error: (\(process \d+\) )?(resume: |output_dir .* holds )")
STOP_SECONDS = 120  # after Ctrl-C: a run finishes its step and saves; then it is killed

Command = list[str]
Start = Callable[[Run, Command], tuple[str, Path]]  # runs a command to its end -> (last line of its log, the log)


@dataclass(frozen=True)
class Outcome:
    """What became of a run that was started."""

    what: str
    last_line: str
    log: Path
    result: dict[str, Any] | None

    @property
    def done(self) -> bool:
        """Whether a valid result lies there; the exit code does not decide that."""
        return self.result is not None


def run_all(
    todo: list[tuple[Run, Command]], jobs: int, cluster: str | None, cluster_options: dict[str, Any], folder: Path
) -> tuple[dict[str, Outcome], bool]:
    """Start every run, `jobs` at a time; one that fails does not stop the others.

    Args:
        todo: the runs and their commands, in the order in which they start.
        jobs: how many at a time; on SLURM, whose queue knows better, all are submitted at once unless it is above 1.
        cluster: None for processes of this machine, else submitit's name of the cluster.
        cluster_options: for submitit's update_parameters.
        folder: where submitit keeps its files.

    Returns:
        the outcome by the run's name, and whether Ctrl-C or SIGTERM ended the sweep early.

    Raises:
        RecipeError: submitit is not installed, or does not take the options.
    """
    here = Processes(jobs)
    start = here.start if cluster is None else submitter(cluster, cluster_options, folder / "submitit")
    workers = max(1, len(todo)) if cluster == "slurm" and jobs == 1 else jobs
    outcomes: dict[str, Outcome] = {}
    interrupted = False
    with ThreadPoolExecutor(workers) as pool, signals_as_interrupt():
        pending = {pool.submit(run_once, run, command, start): run for run, command in todo}
        try:
            while pending:
                collect(pending, outcomes, len(todo))
        except KeyboardInterrupt:
            interrupted = True
            for future in pending:
                future.cancel()
            if cluster is None:
                print("stopping: the runs save and end", flush=True)
                here.stop()
            else:
                print("submitted jobs go on; end them with the cluster's own tools (scancel)", flush=True)
                os._exit(130)  # the threads wait for jobs that may take days
            pending = {future: run for future, run in pending.items() if not future.cancelled()}
            while pending:
                collect(pending, outcomes, len(todo))
    return outcomes, interrupted


def collect(pending: dict[Future[Outcome], Run], outcomes: dict[str, Outcome], total: int) -> None:
    """Wait for the next runs to end and tell them."""
    ended, _ = wait(pending, timeout=1, return_when=FIRST_COMPLETED)
    for future in ended:
        run = pending.pop(future)
        outcome = outcomes[run.name] = future.result()
        tail = f"top-1 {outcome.result['top1_last']:.2f} %" if outcome.result else outcome.last_line
        print(f"[{len(outcomes)}/{total}] {run.name}: {outcome.what}: {tail}", flush=True)


def run_once(run: Run, command: Command, start: Start) -> Outcome:
    """Start a run, or continue it; a folder that train.py cannot continue is set aside, once, and never deleted."""
    line, log = start(run, command)
    aside = ""
    if UNUSABLE.match(line):
        moved = set_aside(run.folder)
        aside = f", what lay there is in {moved.name}"
        line, log = start(run, command)
    try:
        found = look(run.folder, plain(run.config))
    except RecipeError as error:
        return Outcome("failed" + aside, str(error), log, None)
    what = {"done": "done", "to resume": "stopped, to resume"}.get(found.state, "failed")
    return Outcome(what + aside, line, log, found.result)


def set_aside(folder: Path) -> Path:
    """Rename a folder to the first free name beside it."""
    number = 1
    while (new := folder.with_name(f"{folder.name}.unusable{number}")).exists():
        number += 1
    return folder.rename(new)


def last_line(text: str) -> str:
    """The line that tells why a run ended: train.py's own error if there is one, else the last that is not blank."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1] if lines else "no output")


class Processes:
    """The runs that are processes of this machine, so that Ctrl-C can end each of them well."""

    def __init__(self, jobs: int) -> None:
        """Share the cores between the jobs, unless OMP_NUM_THREADS says otherwise."""
        threads = max(1, len(os.sched_getaffinity(0)) // jobs)
        self.environment = {"OMP_NUM_THREADS": str(threads)} | os.environ
        self.alive: set[subprocess.Popen[bytes]] = set()
        self.lock = threading.Lock()
        self.stopped = False

    def start(self, run: Run, command: Command) -> tuple[str, Path]:
        """Run a command to its end, its output appended to the log beside the run's folder."""
        log = run.folder.with_name(f"{run.folder.name}.log")
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            begin = file.tell()
            with self.lock:
                if self.stopped:
                    return "stopped before it started", log
                # a session of its own: the terminal's Ctrl-C must not reach the launcher, which would leave its workers
                process = subprocess.Popen(
                    command, stdout=file, stderr=subprocess.STDOUT, env=self.environment, start_new_session=True
                )
                self.alive.add(process)
            process.wait()
            with self.lock:
                self.alive.discard(process)
        with log.open("rb") as file:
            file.seek(begin)
            return last_line(file.read().decode(errors="replace")), log

    def stop(self) -> None:
        """SIGINT to the training processes, which save and end; their launchers end with them."""
        with self.lock:
            self.stopped = True
            alive = list(self.alive)
        for process in alive:
            for worker in workers_of(process.pid):
                worker.send_signal(signal.SIGINT)
        deadline = time.monotonic() + STOP_SECONDS
        while any(process.poll() is None for process in alive):
            if time.monotonic() > deadline:
                for process in alive:
                    if process.poll() is None:
                        os.killpg(process.pid, signal.SIGKILL)
                return
            time.sleep(0.1)


def workers_of(launcher: int) -> list[psutil.Process]:
    """The processes that train: the launcher's children, or the launcher itself while it has none."""
    try:
        process = psutil.Process(launcher)
        return process.children() or [process]
    except psutil.NoSuchProcess:
        return []


def submitter(cluster: str, options: dict[str, Any], folder: Path) -> Start:
    """A start that submits each command through submitit and waits for its end.

    Raises:
        RecipeError: submitit is not installed, or does not take the options.
    """
    try:
        import submitit
        from submitit.helpers import CommandFunction
    except ImportError as error:
        raise RecipeError("--cluster needs submitit; install it: pip install 'rblock-fx[slurm]'") from error
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
        # a day: submitit's own default is minutes; a run that it cuts is resumed by the next sweep
        executor.update_parameters(**({"timeout_min": 24 * 60} | options))
    except Exception as error:  # submitit raises several, RuntimeError without sbatch, NameError for an option
        raise RecipeError(f"cluster {cluster} with {options}: {error}") from error
    here = Path.cwd()

    def start(_: Run, command: Command) -> tuple[str, Path]:
        job = executor.submit(CommandFunction(command, cwd=here))
        try:
            job.result()
        except Exception as error:  # the job failed, was cancelled or lost; the result decides what it left
            return last_line(f"{error}\n{job.stdout() or ''}\n{job.stderr() or ''}"), job.paths.stderr
        return last_line(job.stdout() or ""), job.paths.stdout

    return start


@contextmanager
def signals_as_interrupt() -> Iterator[None]:
    """End as by Ctrl-C when the machine's owner or a scheduler asks, in a shell's background as well."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # SIGINT, too: a shell starts what runs in its background with SIGINT ignored, and the runs would inherit that
    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
