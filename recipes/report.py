"""A report on a sweep: the paper's numbers beside ours, tests, costs and pictures, as Markdown and one HTML page.

    python recipes/report.py runs/table3_smoke
    python recipes/report.py runs --output /tmp/report

RUNS is a sweep's output_dir, or any folder of runs, which are then grouped by their settings. report.md, report.html
(self-contained) and the pictures go to RUNS/report. Runs that are missing are shown as missing.
"""

import sys
from argparse import ArgumentError
from pathlib import Path

from jsonargparse import ArgumentParser
from reporting.collect import collect
from reporting.figures import draw_figures
from reporting.page import to_html
from reporting.text import report_text
from training.run_folder import write_atomically
from training.settings import RecipeError, argument_error, exit_with


def main() -> None:
    """Read the options and write the report; exit code 2 for a mistake."""
    try:
        runs, output = read_options(sys.argv[1:])
        print(write_report(runs, output or runs / "report"))
    except RecipeError as error:
        exit_with(error)


def read_options(words: list[str]) -> tuple[Path, Path | None]:
    """(the folder of runs, where the report goes) of a command line.

    Raises:
        RecipeError: an option is unknown or missing.
    """
    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False, description=__doc__.partition("\n\n")[0])
    parser.add_argument("runs", type=str, help="a sweep's output_dir, or any folder of runs")
    parser.add_argument("--output", type=str | None, help="where the report goes; RUNS/report by default")
    try:
        options = parser.parse_args(words)
    except ArgumentError as error:
        raise argument_error(error, {"output": str}, "recipes/report.py") from error
    return Path(options.runs), Path(options.output) if options.output is not None else None


def write_report(folder: Path, output: Path) -> Path:
    """Write report.md, report.html and the pictures; returns the page's path.

    Raises:
        RecipeError: there is nothing to report on, or the output cannot be written.
    """
    runs = collect(folder)
    try:
        output.mkdir(parents=True, exist_ok=True)
        figures = draw_figures(runs, output)
        text = report_text(runs, figures)
        write_atomically(output / "report.md", lambda file: file.write_text(text, encoding="utf-8"))
        page = to_html(text, runs.grid.title, output)
        write_atomically(output / "report.html", lambda file: file.write_text(page, encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"cannot write the report to {output}: {error.strerror}") from error
    return output / "report.html"


if __name__ == "__main__":
    main()
