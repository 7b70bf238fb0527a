"""Starting the processes of bench_scaling.py, and stopping them."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile

import harness
import scaling_worker
from harness import Row


def launch(job: Row, timeout: float) -> Row:
    """Run a job in real processes and read what they found; a failure ends the benchmark with their output."""
    worker = str(pathlib.Path(scaling_worker.__file__).resolve())
    processes = job["processes"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = os.environ | {
        "OMP_NUM_THREADS": str(job["threads"]),
        "PYTHONPATH": os.pathsep.join([str(harness.ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    with tempfile.TemporaryDirectory() as folder:
        job_path, result_path = pathlib.Path(folder, "job.json"), pathlib.Path(folder, "result.json")
        job_path.write_text(json.dumps(job))
        command = [sys.executable, *(torchrun if processes > 1 else []), worker, str(job_path), str(result_path)]
        child = subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # so that a launcher can be stopped together with its workers
        )
        try:
            output, _ = child.communicate(timeout=timeout)
        except BaseException as error:
            os.killpg(child.pid, signal.SIGKILL)
            output, _ = child.communicate()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            raise SystemExit(f"{output}\n{processes} process(es) took longer than {timeout:g} s (--timeout)") from None
        if child.returncode != 0 or not result_path.exists():
            raise SystemExit(f"{output}\n{processes} process(es) failed with exit code {child.returncode}")
        result: Row = json.loads(result_path.read_text())
    if result["world_size"] != processes or sorted(result["ranks"]) != list(range(processes)):
        raise SystemExit(f"{processes} process(es) were asked for; {result['ranks']} took part")
    return result
