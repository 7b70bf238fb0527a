"""How a report was made: what its figures are, the settings, the versions and the commands."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from reporting.collect import Runs, shared_settings
from reporting.seed_stats import CONFIDENCE, RESAMPLES

DASH = "-"


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; None is a dash."""
    cells = [[DASH if cell is None else str(cell).replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in [list(header), ["---"] * len(header), *cells])


def methods_part(runs: Runs) -> list[str]:
    """What each figure is, the settings, the versions and the commands."""
    shared, own = shared_settings(runs)
    held = [trial.result for group in runs.trials.values() for trial in group if trial.result]
    return [
        "### What the figures are",
        "\n".join(
            (
                "- **Top-1** is the share of test images whose class the full network, masks off, gets right.",
                "- **sd** is the sample standard deviation over seeds (divisor n - 1); of one seed there is none.",
                f"- **95 % interval** of a mean: percentile bootstrap over seeds, {RESAMPLES} resamples "
                "(scipy.stats.bootstrap). Of fewer than three seeds there is none; of seeds that are all equal it has "
                "no width; of three to ten it is narrower than it should be.",
                "- **Tests**: paired t-test over the seeds that both methods have (scipy.stats.ttest_rel), two-sided; "
                f"the interval of the difference is its {100 * CONFIDENCE:g} % t interval. With one common seed, or "
                "where all differences are equal, there is no test.",
                "- **Holm**: p corrected for all tests of this report at the same epoch (best or last), all columns.",
                "- **Gap**: mean KL(full network || sub-model) on held-out images, and the share of them on which the "
                "two give the same class. **Drop rate**: measured share of the non-zero activations at the masked maps "
                "that a sub-model zeroes.",
                f"- **{DASH}**: no such number.",
            )
        ),
        "### Settings that all runs share",
        f"```\n{settings_text(shared)}\n```",
        "### Settings in which they differ",
        *differing_part(own),
        "### Versions",
        versions_part(held),
        "### Commands",
        f"```\n{runs.command}\n```"
        if runs.command
        else "No sweep made these runs; each folder's config.yaml repeats its run:\n\n"
        "```\naccelerate launch recipes/train.py --config FOLDER/config.yaml --output_dir NEW_FOLDER\n```",
    ]


def settings_text(settings: dict[str, Any]) -> str:
    """Settings as lines of key: value, as YAML reads them."""
    return "\n".join(
        f"{key}: {value if isinstance(value, str) else json.dumps(value)}" for key, value in settings.items()
    )


def differing_part(own: dict[tuple[str, str], dict[str, Any]]) -> list[str]:
    """A row for each cell, a column for each setting that not all share."""
    keys = list(dict.fromkeys(key for settings in own.values() for key in settings))
    if not keys:
        return ["None but the seed."]
    lines = [
        (*name, *(None if s.get(k) is None else s[k] if isinstance(s[k], str) else json.dumps(s[k]) for k in keys))
        for name, s in own.items()
    ]
    return [table(("column", "row", *keys), lines)]


def versions_part(results: list[dict[str, Any]]) -> str:
    """Each version that the runs were made with, and by how many of them if not by all."""
    if not results:
        return "No run is finished."
    counts = Counter((name, str(value)) for result in results for name, value in result["versions"].items())
    texts = (
        f"{name} {v}" + ("" if n == len(results) else f" ({n} of {len(results)} runs)")
        for (name, v), n in counts.items()
    )
    return ", ".join(texts) + "."
