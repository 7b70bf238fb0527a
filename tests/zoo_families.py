"""The smallest converted architecture of every family in results/zoo.json, and a draw of 20 families per commit."""

import json
import random
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
SUMMARY = json.loads((ROOT / "benchmarks" / "results" / "zoo.json").read_text())
COMPARED = 20


def find_smallest():
    """Family -> its line of the smallest architecture that was converted."""
    members = {}
    for line in sorted(SUMMARY["architectures"], key=lambda line: line.get("parameters", 0)):
        if line["status"] == "converted":
            members.setdefault(line["family"], line)
    return members


MEMBERS = find_smallest()
WEIGHTED = [family for family, line in MEMBERS.items() if "numbers" in line]


def read_commit():
    """The checked-out commit, which every process of a test run agrees on."""
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "no commit"


def draw_families(commit):
    """The families with outputs to compare at this commit."""
    return random.Random(commit).sample(WEIGHTED, COMPARED)
