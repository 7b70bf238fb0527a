"""What the lines of `zoo.py` say together: results/zoo.json, and the table by family in the README."""

import collections
import json
import os
import pathlib
import platform
import statistics
import sys
from typing import Any

from benchmarks.harness import versions

ROOT = pathlib.Path(__file__).parent.parent
LINES = ROOT / "benchmarks" / "results" / "zoo.jsonl"
SUMMARY = ROOT / "benchmarks" / "results" / "zoo.json"
README = ROOT / "README.md"
MARKS = ("<!-- zoo: begin -->\n", "<!-- zoo: end -->")


def read_lines() -> list[dict[str, Any]]:
    """The architectures that have been examined, a dictionary each."""
    if not LINES.exists():
        return []
    return [json.loads(text) for text in LINES.read_text().splitlines() if text.strip()]


def report(names: list[str], write_readme: bool) -> None:
    """Write the summary from the lines, and the table from the summary."""
    known = {line["name"]: line for line in read_lines()}
    missing = [name for name in names if name not in known]
    if missing:
        sys.exit(f"{len(missing)} architectures have no line yet, e.g. {missing[:3]}: python benchmarks/zoo.py run")
    summary = summarise([known[name] for name in names])
    lines = ",\n".join(json.dumps(line) for line in summary["architectures"])
    text = json.dumps({**summary, "architectures": []}, indent=1)
    SUMMARY.write_text(text.replace('"architectures": []', f'"architectures": [\n{lines}\n]') + "\n")
    print(json.dumps({key: value for key, value in summary.items() if key != "architectures"}, indent=1))
    table = markdown_table(summary["architectures"])
    print(table)
    if write_readme:
        before, _, rest = README.read_text().partition(MARKS[0])
        _, _, after = rest.partition(MARKS[1])
        README.write_text(before + MARKS[0] + table + MARKS[1] + after)


def summarise(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts over all architectures, versions and machine, and the lines themselves."""
    converted = [line for line in lines if line["status"] == "converted"]
    numbers = [line["numbers"] for line in converted if "numbers" in line]
    small = sorted(line["seconds"] for line in converted if line["parameters"] <= 100e6)
    checks = ("eval_equal", "keys_equal", "rows_doubled", "halves_differ", "gradients_equal", "gradients_finite")
    return {
        "versions": versions(),
        "commits": dict(collections.Counter(line["commit"] for line in lines)),
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "architectures_tried": len(lines),
        "timm": len([line for line in lines if line["name"].startswith("timm/")]),
        "timm_with_maps": len([line for line in lines if line["maps"]]),
        "timm_with_maps_converted": len([line for line in converted if line["maps"]]),
        "status": dict(collections.Counter(line["status"] for line in lines)),
        "refusals": _refusals(lines),
        "early_forks": {line["name"]: line["early_fork_reason"] for line in converted if line["early_fork_reason"]},
        "keys_equal": sum(line["keys_equal"] for line in converted),
        "conversion_seconds_up_to_100M_parameters": {
            "architectures": len(small),
            "median": statistics.median(small),
            "95th_percentile": small[int(0.95 * len(small))],
            "largest": small[-1],
            "above_one_second": [
                f"{line['name']}: {line['seconds']}"
                for line in converted
                if line["seconds"] > 1 and line["parameters"] <= 100e6
            ],
        },
        "listing_seconds_largest": max(line["seconds_listing"] for line in converted),
        "with_weights": {
            "architectures": len(numbers),
            **{check: sum(number[check] for number in numbers) for check in checks},
            "undropped_error_up_to_1e-4": sum(undropped(number) <= 1e-4 for number in numbers),
            "exceptions": {
                line["name"]: line["numbers"]
                for line in converted
                if "numbers" in line
                and not (all(line["numbers"][check] for check in checks) and undropped(line["numbers"]) <= 1e-4)
            },
        },
        "architectures": lines,
    }


def undropped(number: dict[str, Any]) -> float:
    """The error, in double precision where single is not enough."""
    return number.get("undropped_error_float64", number["undropped_error"])


def _refusals(lines: list[dict[str, Any]]) -> dict[str, list[str]]:
    """The names of what is refused, by the reason without names and numbers of the model."""
    reasons: dict[str, list[str]] = collections.defaultdict(list)
    for line in lines:
        if line["status"] == "refused":
            text = line["error"]
            reason = "no stage with a feature map" if "has no stage" in text else " ".join(text.split(" ")[2:14])
            reasons[reason].append(line["name"])
    return dict(reasons)


def markdown_table(lines: list[dict[str, Any]]) -> str:
    """One row per family."""
    families: dict[str, list[dict[str, Any]]] = collections.defaultdict(list)
    for line in lines:
        families[line["family"]].append(line)
    rows = ["| family | tried | converted | with weights | cost | seconds |", "|---|---|---|---|---|---|"]
    for family in sorted(families):
        members = families[family]
        converted = [line for line in members if line["status"] == "converted"]
        costs = [line["cost"] for line in converted]
        seconds = [line["seconds"] for line in converted]
        rows.append(
            f"| {family} | {len(members)} | {len(converted)} | {sum('numbers' in line for line in converted)} | "
            + (f"{min(costs):.2f}-{max(costs):.2f} | {statistics.median(seconds):.2f} |" if converted else "- | - |")
        )
    return "\n".join(rows) + "\n"
