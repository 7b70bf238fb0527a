"""What lies in a run's folder: a finished run, one to resume, a broken result, another experiment, or nothing."""

import csv
import json
import math
from pathlib import Path
from typing import Any, Literal, NamedTuple

from training.run_folder import CHECKPOINTS
from training.settings import RecipeError, read_config

from sweeping.grid import differences

State = Literal["done", "to do", "to resume", "broken"]
NUMBERS = ("top1_best", "top1_last", "epochs", "seed", "wall_time_seconds")


class Found(NamedTuple):
    """The state of a folder, its result if it is done, and what is wrong if it is broken."""

    state: State
    result: dict[str, Any] | None = None
    why: str = ""


def read_result(path: Path) -> dict[str, Any]:
    """A result.json with the keys and numbers that a finished run writes.

    Raises:
        ValueError: says what is wrong with it.
        OSError: it cannot be read.
    """
    try:
        result = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error
    if not isinstance(result, dict):
        raise ValueError(f"{path.name} holds no mapping")
    missing = [key for key in (*NUMBERS, "method", "config", "versions") if key not in result]
    if missing:
        raise ValueError(f"{path.name} lacks {', '.join(missing)}")
    wrong = [key for key in NUMBERS if isinstance(result[key], bool) or not isinstance(result[key], int | float)]
    wrong += [key for key in NUMBERS if key not in wrong and not math.isfinite(result[key])]
    wrong += [key for key in ("config", "versions") if not isinstance(result[key], dict)]
    if wrong:
        raise ValueError(f"{path.name}: {', '.join(f'{key} is {result[key]!r}' for key in wrong)}")
    return result


def look(folder: Path, config: dict[str, Any]) -> Found:
    """What lies in a folder that a run of these settings is to fill. Writes nothing.

    Args:
        folder: the run's output_dir.
        config: the settings that are asked for, as grid.plain gives them.

    Raises:
        RecipeError: another experiment lies there, finished or not; names the settings that differ.
    """
    if not folder.exists() or not any(folder.iterdir()):
        return Found("to do")
    why = ""
    if (folder / "result.json").exists():
        try:
            result = read_result(folder / "result.json")
            refuse_other(folder, result["config"], config)
            check_rows(result, read_rows(folder))
        except RecipeError:
            raise
        except (ValueError, OSError) as error:
            why = f"{error or type(error).__name__}"
        else:
            return Found("done", result)
    if (folder / "config.yaml").exists():
        try:
            before = vars(read_config(["--config", str(folder / "config.yaml")]))
        except RecipeError as error:
            return Found("broken", why=why or f"config.yaml: {error}")
        refuse_other(folder, before, config)
    if why:
        return Found("broken", why=why)
    return Found("to resume" if any((folder / name).exists() for name in CHECKPOINTS) else "to do")


def check_rows(result: dict[str, Any], rows: list[dict[str, float]]) -> None:
    """A result says what its run's metrics.csv says.

    Raises:
        ValueError: it does not.
    """
    if len(rows) != result["epochs"]:
        raise ValueError(f"metrics.csv has {len(rows)} rows and result.json says {result['epochs']} epochs")
    accuracies = [row["test_top1"] for row in rows if "test_top1" in row]
    if len(accuracies) != len(rows):
        raise ValueError("metrics.csv has rows without test_top1")
    for name, value in (("top1_best", max(accuracies)), ("top1_last", accuracies[-1])):
        if not math.isclose(value, result[name], rel_tol=1e-9):
            raise ValueError(f"result.json says {name} {result[name]} and metrics.csv {value}")


def refuse_other(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """A folder of another experiment is neither counted nor overwritten.

    Raises:
        RecipeError: names the folder, the settings that differ, and the ways out.
    """
    changed = differences(json.loads(json.dumps(before)), now)
    if changed:
        raise RecipeError(
            f"{folder} holds a run of other settings: {', '.join(changed)}; name another folder with --output_dir, "
            f"or move that run away: mv {folder} {folder}.other"
        )


def read_rows(folder: Path) -> list[dict[str, float]]:
    """metrics.csv as numbers, an empty cell left out; no rows where there is no file yet.

    Raises:
        ValueError: a cell is no number.
    """
    path = folder / "metrics.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        try:
            return [{key: float(cell) for key, cell in row.items() if cell not in ("", None)}
                    for row in csv.DictReader(file)]  # fmt: skip
        except ValueError as error:
            raise ValueError(f"{path.name}: {error}") from error
