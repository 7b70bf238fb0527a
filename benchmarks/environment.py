"""Where a benchmark ran: versions, commit, processor, device, options."""

import argparse
import contextlib
import os
import pathlib
import platform
import re
import subprocess
from typing import Any

import timm
import torch
import torchvision

import rblock_fx

ROOT = pathlib.Path(__file__).parent.parent


def describe_environment(options: argparse.Namespace) -> dict[str, Any]:
    """Versions, machine, threads and every option: all that one needs to repeat the run."""
    return {
        "versions": versions(),
        "commit": commit(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device_name(options.device),
        "platform": platform.platform(),
        "options": {
            name: str(value) if isinstance(value, pathlib.Path) else value for name, value in vars(options).items()
        },
    }


def versions() -> dict[str, Any]:
    """Versions of Python and of the packages that are measured."""
    packages = (torch, torchvision, timm, rblock_fx)
    return {"python": platform.python_version()} | {package.__name__: str(package.__version__) for package in packages}


def device_name(device: str) -> str:
    """`cpu`, or the name of the GPU, as part of a file name."""
    if torch.device(device).type != "cuda":
        return "cpu"
    return torch.cuda.get_device_name(device).lower().replace(" ", "-")


def commit() -> str | None:
    """The commit that is measured, with "+" where files differ from it; None outside a repository."""
    status = ["git", "status", "--porcelain", "--", "rblock_fx", "benchmarks/*.py"]
    try:
        head, changed = (
            subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
            for command in (["git", "rev-parse", "HEAD"], status)
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head[:10] + ("+" if changed else "")


def _cpu() -> str:
    """The processor, as Linux names it."""
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*: (.*)", pathlib.Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        return found.group(1) if found else platform.processor()
    return platform.processor()
