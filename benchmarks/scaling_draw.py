"""The tables and the picture of bench_scaling.py, from the rows of its JSON file."""

import pathlib
from typing import Any

import cost_model
import harness
from harness import Row

from rblock_fx.tables import format_table

PLAIN, MEASURED, PREDICTED = "tab:gray", "tab:blue", "tab:orange"


def table(rows: list[Row]) -> str:
    """What was measured, what had been predicted of it, and what is predicted of GPUs."""
    measured, predicted = split(rows)
    parts = [*(_measured_tables(measured) if measured else []), *([_predicted_table(predicted)] if predicted else [])]
    return "\n\n".join(parts)


def split(rows: list[Row]) -> tuple[list[Row], list[Row]]:
    """The rows that were measured, and the predictions for GPUs."""
    return [row for row in rows if row["kind"] == "measured"], [row for row in rows if row["kind"] != "measured"]


def _measured_tables(rows: list[Row]) -> list[str]:
    many = str(rows[0]["processes"])
    return [
        f"Steps on 1 -> {many} processes of {rows[0]['threads']} thread(s), the same batch on each. Efficiency is the "
        f"step on one process over that on {many}.\n\n{_efficiencies(rows, many)}",
        "Cost model, predicted by list_sites alone beside counted, both over plain training; of plain training, "
        "measured: communication k\nand update u over compute, and what "
        f"{many} processes that share nothing take beside one.\n\n{_inputs_of_the_model(rows)}",
        f"Step ratios, predicted beside measured.\n\n{_predictions(rows)}",
    ]


def _efficiencies(rows: list[Row], many: str) -> str:
    return format_table(
        ("model", "sites", "plain s", "R-Block s", f"ratio, 1 [quartiles], {many}", "", "efficiency plain", "R-Block",
         "R-Block / plain"),
        [
            (
                row["model"],
                row["selection"],
                " -> ".join(f"{row['seconds']['plain'][n]['median']:.3f}" for n in ("1", many)),
                " -> ".join(f"{row['seconds']['rblock'][n]['median']:.3f}" for n in ("1", many)),
                _with_quartiles(row["step_ratio"]["1"]),
                _with_quartiles(row["step_ratio"][many]),
                f"{row['efficiency']['plain']['median']:.2f}",
                f"{row['efficiency']['rblock']['median']:.2f}",
                _with_quartiles(row["efficiency"]["ratio"]),
            )
            for row in rows
        ],
    )  # fmt: skip


def _inputs_of_the_model(rows: list[Row]) -> str:
    return format_table(
        ("model", "sites", "FLOP ratio", "bounds", "counted", "activations", "counted", "gradient MB", "k", "u",
         "contention"),
        [
            (
                row["model"],
                row["selection"],
                f"{row['flop_ratio']['predicted']:.3f}",
                "-".join(f"{bound:.3f}" for bound in row["flop_ratio"]["bounds"]),
                f"{row['flop_ratio']['counted']:.3f}",
                f"{row['activation_ratio']['predicted']:.2f}",
                f"{row['activation_ratio']['counted']:.2f}",
                f"{row['gradient_bytes'] / 1e6:.0f}",
                f"{row['shares']['communication']:.2f}",
                f"{row['shares']['update']:.2f}",
                f"{row['contention']:.2f}",
            )
            for row in rows
        ],
    )  # fmt: skip


def _predictions(rows: list[Row]) -> str:
    return format_table(
        ("model", "sites", "prediction", "predicted", "measured", "error"),
        [
            (
                row["model"],
                row["selection"],
                name,
                f"{check['predicted']:.3f}",
                _with_quartiles({"median": check["measured"], "quartiles": check["quartiles"]}),
                f"{check['error']:+.1%}",
            )
            for row in rows
            for name, check in row["predictions"].items()
        ],
    )


def _predicted_table(rows: list[Row]) -> str:
    assumed = rows[0]["assumed"]
    devices = [entry["devices"] for entry in rows[0]["predictions"]]
    body = format_table(
        ("model", "sites", "FLOP ratio", *(f"N = {n}" for n in devices), f"k at {devices[-1]}"),
        [
            (
                row["model"],
                row["selection"],
                f"{row['flop_ratio']:.3f}",
                *("-".join(f"{bound:.3f}" for bound in entry["step_ratio"]) for entry in row["predictions"]),
                f"{row['predictions'][-1]['communication']:.2f}",
            )
            for row in rows
        ],
    )
    return (
        f"PREDICTED step ratio on N GPUs, no GPU was measured: assumed {assumed['flop_rate']:.3g} FLOP/s achieved and "
        f"{assumed['bandwidth']:.3g} bytes/s sent per GPU,\n{assumed['batch']} images of {assumed['image']} a GPU; "
        f"all-reduce without overlap - with full overlap.\n\n{body}"
    )


def _with_quartiles(spread: Row) -> str:
    low, high = spread["quartiles"]
    return f"{spread['median']:.2f} [{low:.2f}, {high:.2f}]"


def draw(rows: list[Row], path: pathlib.Path) -> None:
    """Step ratios predicted and measured, efficiencies, and the ratio by the share of communication."""
    measured, predicted = split(rows)
    with harness.figure(path, columns=3, size=(17, 6.2)) as axes:
        _draw_ratios(axes[0, 0], measured)
        _draw_efficiencies(axes[0, 1], measured)
        _draw_predictions(axes[0, 2], predicted)


def _draw_ratios(axis: Any, rows: list[Row]) -> None:
    many = str(rows[0]["processes"])
    for place, row in enumerate(rows):
        checks = list(row["predictions"].values())
        for offset, check, marker, count in ((-0.15, checks[0], "o", "1"), (0.15, checks[2], "s", many)):
            low, high = check["quartiles"]
            error = [[check["measured"] - low], [high - check["measured"]]]
            processes = "1 process" if count == "1" else f"{count} processes"
            labels = (f"measured, {processes}", "predicted") if place == 0 else (None, None)
            axis.errorbar(
                check["measured"], place + offset, xerr=error, fmt=marker, color=MEASURED, capsize=3, label=labels[0]
            )
            axis.plot(
                check["predicted"], place + offset, "|", color=PREDICTED, markersize=16, markeredgewidth=3,
                label=labels[1] if count == "1" else None,
            )  # fmt: skip
    _name_rows(axis, rows)
    axis.set_xlabel("seconds of an R-Block step / plain step")
    axis.set_title("Step ratio")
    _legend_below(axis)


def _draw_efficiencies(axis: Any, rows: list[Row]) -> None:
    for place, row in enumerate(rows):
        efficiency = row["efficiency"]
        for offset, method, color, label in ((-0.19, "plain", PLAIN, "plain"), (0.19, "rblock", MEASURED, "R-Block")):
            spread = efficiency[method]
            low, high = spread["quartiles"]
            axis.barh(
                place + offset, spread["median"], 0.36, color=color, label=label if place == 0 else None,
                xerr=[[spread["median"] - low], [high - spread["median"]]], error_kw={"capsize": 2},
            )  # fmt: skip
        right = max(efficiency[method]["quartiles"][1] for method in ("plain", "rblock"))
        axis.text(right + 0.03, place, f"x {efficiency['ratio']['median']:.2f}", va="center", fontweight="bold")
    _name_rows(axis, rows)
    axis.set_xlim(0, 1.25 * max(row["efficiency"][m]["quartiles"][1] for row in rows for m in ("plain", "rblock")))
    axis.set_xlabel("efficiency (bold: R-Block / plain)")
    axis.set_title(f"Weak scaling, 1 to {rows[0]['processes']} processes")
    _legend_below(axis)


def _name_rows(axis: Any, rows: list[Row]) -> None:
    axis.set_yticks(range(len(rows)), [f"{row['model']}\n{row['selection']}" for row in rows])
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.grid(axis="x", alpha=0.3)


def _draw_predictions(axis: Any, rows: list[Row]) -> None:
    shares = [10 ** (exponent / 40) for exponent in range(-80, 81)]
    models = list(dict.fromkeys(row["model"] for row in rows))
    for row in rows:
        color = f"C{models.index(row['model'])}"
        for overlap, style in ((False, "-"), (True, ":")):
            ratios = [cost_model.step_ratio(row["flop_ratio"], share, overlap=overlap) for share in shares]
            label = row["model"] if not overlap and row["selection"] == "all" else None
            axis.plot(shares, ratios, style, color=color, label=label)
        for entry in row["predictions"][1:]:
            axis.plot(entry["communication"], entry["step_ratio"][0], ".", color=color, markersize=9)
        axis.annotate(
            row["selection"], (shares[0], row["flop_ratio"]), xytext=(3, 3), textcoords="offset points", fontsize=7
        )
    axis.plot([], [], "-", color="black", label="no overlap")
    axis.plot([], [], ":", color="black", label="full overlap")
    assumed = rows[0]["assumed"]
    devices = ", ".join(str(entry["devices"]) for entry in rows[0]["predictions"][1:])
    speeds = f"{assumed['flop_rate'] / 1e12:g} TFLOP/s and {assumed['bandwidth'] / 1e9:g} GB/s"
    axis.plot([], [], ".", color="black", label=f"N = {devices} GPUs of {speeds} (assumed)")
    axis.set_xscale("log")
    axis.set_xlabel("k: all-reduce / compute of a plain step")
    axis.set_ylabel("seconds of an R-Block step / plain step")
    axis.set_title("Predicted for N devices; no GPU was measured")
    axis.grid(alpha=0.3)
    _legend_below(axis, columns=2)


def _legend_below(axis: Any, columns: int = 3) -> None:
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=columns, fontsize=8, frameon=False)
