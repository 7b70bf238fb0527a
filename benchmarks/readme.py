"""The tables of both READMEs, from the result files: `python benchmarks/readme.py` writes them between their marks."""

import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from benchmarks import bench_convert, bench_masks, bench_memory, bench_rate, bench_step, zoo_report
from benchmarks.environment import ROOT
from benchmarks.harness import RESULTS

DOCUMENTS = (ROOT / "README.md", ROOT / "benchmarks" / "README.md")
MEASURED = (bench_step, bench_masks, bench_memory, bench_rate, bench_convert)


def build_tables() -> dict[str, str]:
    """Name of a mark -> its text in Markdown, from the measurements on a CPU."""
    summary = json.loads(zoo_report.SUMMARY.read_text())
    tables = {"zoo": zoo_report.markdown(summary["architectures"]), "zoo_counts": zoo_report.count_in_words(summary)}
    for script in MEASURED:
        name = script.__name__.removeprefix("benchmarks.")
        result = json.loads((RESULTS / f"{name.removeprefix('bench_')}-cpu.json").read_text())
        tables[name] = script.markdown(result["rows"])
    return tables


def fill(text: str) -> str:
    """Put each table between its marks, where a document has them."""
    for name, table in build_tables().items():
        begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
        if begin in text:
            before, after = text.split(begin)
            text = before + begin + table + end + after.split(end)[1]
    return text


if __name__ == "__main__":
    for document in DOCUMENTS:
        document.write_text(fill(document.read_text()))
