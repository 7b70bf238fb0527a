"""Lint, format and types, so that one command checks everything."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


TOOLS = [
    ["ruff", "check"],
    ["ruff", "format", "--check"],
    ["mypy"],
]


@pytest.mark.parametrize("tool", TOOLS, ids=" ".join)
def test_the_tools_are_content(tool):
    done = subprocess.run([sys.executable, "-m", *tool], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_top_level_holds_what_was_agreed():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    top = {path.split("/")[0] for path in tracked if not path.startswith(".")}
    assert top <= {"pyproject.toml", "rblock_fx", "recipes", "tests", "benchmarks", "README.md"}
