"""The training curves of one run as a picture."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, MaxNLocator, NullFormatter

SERIES = (("train", "tab:gray", "training images, as trained"), ("test", "tab:blue", "test images, full network"))


def draw_curves(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Cross-entropy and top-1 over the epochs, training beside test.

    Args:
        rows: the rows of metrics.csv, one per epoch.
        title: the figure's title.
        path: where the PNG goes.
    """
    epochs = [row["epoch"] for row in rows]
    # a Figure without pyplot needs no display and no backend
    figure = Figure(figsize=(10, 4), layout="constrained")
    loss, top1 = figure.subplots(1, 2)
    for axes, key, name in ((loss, "ce", "cross-entropy (nats)"), (top1, "top1", "top-1 accuracy (%)")):
        for split, color, label in SERIES:
            # a dot on each epoch: a run of one epoch is a picture too
            axes.plot(epochs, [row[f"{split}_{key}"] for row in rows], ".-", color=color, label=label)
        axes.set(xlabel="epoch", ylabel=name, xlim=(epochs[0] - 0.5, epochs[-1] + 0.5))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
    loss.set_yscale("log")
    loss.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    loss.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    loss.yaxis.set_minor_formatter(NullFormatter())
    loss.legend(loc="upper right")
    # the first third of a run climbs from chance; the axis starts after it, where curves can be told apart
    late = [row[f"{split}_top1"] for row in rows[len(rows) // 3 :] for split, *_ in SERIES]
    margin = max(0.5, 0.05 * (max(late) - min(late)))
    top1.set_ylim(min(late) - margin, max(late) + margin)
    top1.legend(loc="lower right")
    figure.suptitle(title)
    figure.savefig(path, dpi=120, format="png")
