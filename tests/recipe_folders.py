"""Finished runs as recipes/train.py leaves them, with numbers that the test chooses."""

import json
from collections.abc import Sequence
from pathlib import Path

import yaml

CONFIG = "configs/digits.yaml"


def write_table(path: Path, **changes: object) -> Path:
    """A table of four methods on one column; changes replace its keys."""
    grid = {
        "title": "A <small> table",
        "output_dir": str(path.with_suffix("")),
        "seeds": [0, 1, 2],
        "stages": [0.5, 1.0],
        "columns": [{"name": "digits", "config": CONFIG, "set": {"epochs": 4}}],
        "rows": [
            {"name": "plain", "set": {"method": "none"}},
            {"name": "DropBlock", "set": {"method": "dropblock", "drop_prob": 0.1}, "against": ["plain"]},
            {
                "name": "BDropDML", "set": {"method": "bdropdml"}, "paper": {"digits": [50.0, 60.0]},
                "against": ["DropBlock", "plain"],
            },
            {"name": "C-DropBlock", "set": {"method": "c-dropblock"}},
        ],
    }  # fmt: skip
    path.write_text(yaml.safe_dump(grid | changes, sort_keys=False))
    return path


def metrics_text(top1: Sequence[float], gap: bool = True) -> str:
    """metrics.csv with these test top-1, one row per epoch."""
    lines = ["epoch,test_top1,test_ce,seconds,images_seen,wall_seconds,gap_kl,gap_agreement,drop_rate"]
    for epoch, value in enumerate(top1, 1):
        ends = f"{0.5 / epoch},{90 + epoch},0.1" if gap else ",,"
        lines.append(f"{epoch},{value},{2 - value / 100},2.0,{1257 * epoch},{2.0 * epoch},{ends}")
    return "\n".join(lines) + "\n"


def write_run(folder: Path, config: dict, top1: Sequence[float], **changes: object) -> dict:
    """A finished run; changes replace keys of result.json. Returns what result.json holds."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({k: v for k, v in config.items() if k != "num_processes"}))
    (folder / "metrics.csv").write_text(metrics_text(top1, config["method"] != "none"))
    result = {
        "top1_best": max(top1), "top1_last": top1[-1], "epochs": len(top1), "seed": config["seed"],
        "method": config["method"], "num_processes": 1, "wall_time_seconds": 2.0 * len(top1), "device": "cpu",
        "config": {key: value for key, value in config.items() if key != "num_processes"},
        "versions": {"torch": "1.2.3"},
    }  # fmt: skip
    (folder / "result.json").write_text(json.dumps(result | changes))
    return result | changes
