"""The summary of the lines of `zoo.py`: results/zoo.json, and the table by family of benchmarks/README.md."""

import collections
import json
import os
import platform
import statistics
import sys
import textwrap
from typing import Any

from benchmarks.environment import versions
from benchmarks.harness import RESULTS

LINES = RESULTS / "zoo.jsonl"
SUMMARY = RESULTS / "zoo.json"
CHECKS = ("eval_equal", "keys_equal", "rows_doubled", "halves_differ", "gradients_equal", "gradients_finite")

Line = dict[str, Any]


def read_lines() -> list[Line]:
    """The architectures that have been examined."""
    if not LINES.exists():
        return []
    return [json.loads(text) for text in LINES.read_text().splitlines() if text.strip()]


def report(names: list[str]) -> None:
    """Write the summary from the lines, and print it with the table."""
    known = {line["name"]: line for line in read_lines()}
    missing = [name for name in names if name not in known]
    if missing:
        sys.exit(f"{len(missing)} architectures have no line yet, e.g. {missing[0]}: python benchmarks/zoo.py run")
    summary = summarise([known[name] for name in names])
    lines = ",\n".join(json.dumps(line) for line in summary.pop("architectures"))
    head = json.dumps(summary, indent=1).removesuffix("\n}")
    SUMMARY.write_text(f'{head},\n "architectures": [\n{lines}\n]\n}}\n')
    print(json.dumps(summary, indent=1))
    print(markdown(list(known.values())))


def summarise(lines: list[Line]) -> dict[str, Any]:
    """Counts over all architectures, versions and machine, and the lines themselves."""
    converted = [line for line in lines if line["status"] == "converted"]
    weighted = [line for line in converted if "numbers" in line]
    return {
        "versions": versions(),
        "commits": dict(collections.Counter(line["commit"] for line in lines)),
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "architectures_tried": len(lines),
        "timm_with_maps": len([line for line in lines if line["maps"]]),
        "timm_with_maps_converted": len([line for line in converted if line["maps"]]),
        "status": dict(collections.Counter(line["status"] for line in lines)),
        "with_weights": {
            "architectures": len(weighted),
            **{check: sum(line["numbers"][check] for line in weighted) for check in CHECKS},
            "undropped_error_up_to_1e-4": sum(undropped_error(line["numbers"]) <= 1e-4 for line in weighted),
            "exceptions": {line["name"]: line["numbers"] for line in weighted if failed_checks(line["numbers"])},
        },
        "architectures": lines,
    }


def failed_checks(numbers: Line) -> list[str]:
    """The checks that an architecture with weights does not pass."""
    failed = [check for check in CHECKS if not numbers[check]]
    return failed + ["undropped_error"] * (undropped_error(numbers) > 1e-4)


def undropped_error(numbers: Line) -> float:
    """The error at drop_prob 0, in double precision where single is not enough."""
    return float(numbers.get("undropped_error_float64", numbers["undropped_error"]))


def count_in_words(summary: Line) -> str:
    """The counts of a summary in words."""
    status, weighted = summary["status"], summary["with_weights"]
    words = (
        f"Of {summary['architectures_tried']:,} architectures of timm and torchvision, {status['converted']:,} convert "
        f"and {status['refused']} are refused; {summary['timm_with_maps_converted']} of timm's "
        f"{summary['timm_with_maps']} with feature maps convert (`benchmarks/results/zoo.json`, commits "
        f"{', '.join(summary['commits'])}). {weighted['architectures']} were run with weights; "
        f"{len(weighted['exceptions'])} of them failed a check."
    )
    return textwrap.fill(words, 120) + "\n"


def markdown(lines: list[Line]) -> str:
    """The table of benchmarks/README.md: one row per family."""
    families: dict[str, list[Line]] = collections.defaultdict(list)
    for line in lines:
        families[line["family"]].append(line)
    rows = ["| family | tried | converted | with weights | cost | seconds |", "|---|---|---|---|---|---|"]
    for family, members in sorted(families.items()):
        converted = [line for line in members if line["status"] == "converted"]
        costs = [line["cost"] for line in converted]
        seconds = [line["seconds"] for line in converted]
        rows.append(
            f"| {family} | {len(members)} | {len(converted)} | {sum('numbers' in line for line in converted)} | "
            + (f"{min(costs):.2f}-{max(costs):.2f} | {statistics.median(seconds):.2f} |" if converted else "- | - |")
        )
    return "\n".join(rows) + "\n"
