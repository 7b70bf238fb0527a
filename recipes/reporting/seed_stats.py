"""What a handful of seeds allows one to say: intervals, paired tests, Holm's correction, best until a stage."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
RESAMPLES = 9999


class Summary(NamedTuple):
    """Mean, sample standard deviation (None of one value), 95 % interval of the mean (None of fewer than three)."""

    seeds: int
    mean: float
    deviation: float | None
    interval: tuple[float, float] | None


class Comparison(NamedTuple):
    """Mean difference over common seeds, its 95 % t interval, and the paired t-test's p; None where there is none."""

    seeds: int
    difference: float
    interval: tuple[float, float] | None
    p: float | None


def summarise(values: Sequence[float]) -> Summary | None:
    """What a method's seeds say of it; None without values.

    The interval is the percentile bootstrap's over seeds. Of one or two values it would be no more than the values
    themselves, so there is none; of values that are all equal it has no width.
    """
    if not values:
        return None
    mean = math.fsum(values) / len(values)
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    interval = None
    if len(values) >= 3:
        interval = (mean, mean)
        if min(values) < max(values):
            drawn = stats.bootstrap(
                (values,), np.mean, confidence_level=CONFIDENCE, n_resamples=RESAMPLES, method="percentile", rng=0
            )
            interval = (float(drawn.confidence_interval.low), float(drawn.confidence_interval.high))
    return Summary(len(values), mean, deviation, interval)


def compare(ours: dict[int, float], theirs: dict[int, float]) -> Comparison | None:
    """Two methods on the seeds that both have; None without a common seed.

    Args:
        ours: seed -> value.
        theirs: seed -> value of the method to compare with.

    Returns:
        ours minus theirs. The test and its interval need two seeds or more and differences that are not all equal:
        without spread, the t statistic has no scale.
    """
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return None
    a, b = [ours[seed] for seed in seeds], [theirs[seed] for seed in seeds]
    differences = [x - y for x, y in zip(a, b, strict=True)]
    mean = math.fsum(differences) / len(seeds)
    # what is left of rounding is no spread: 1e-9 of a percentage point
    if len(seeds) < 2 or max(differences) - min(differences) < 1e-9:
        return Comparison(len(seeds), mean, None, None)
    test = stats.ttest_rel(a, b)
    interval = test.confidence_interval(CONFIDENCE)
    return Comparison(len(seeds), mean, (float(interval.low), float(interval.high)), float(test.pvalue))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down correction over one family of tests; None, no test, stays None and is not counted."""
    order = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, index) in enumerate(order):
        largest = max(largest, (len(order) - rank) * p)  # never below a smaller p's
        adjusted[index] = min(1.0, largest)
    return adjusted


def best_until(values: Sequence[float], stages: Sequence[float], epochs: int) -> list[float | None]:
    """The highest of the first values, for each share of the epochs; None for a stage that the run has not reached.

    Args:
        values: one per epoch so far, from the first.
        stages: shares in (0, 1]; of a fraction of an epoch counts what is finished, at least the first epoch.
        epochs: how many the whole run has.
    """
    # 0.29 * 100 is 28.999999999999996
    ends = [max(1, math.floor(round(stage * epochs, 9))) for stage in stages]
    return [max(values[:end]) if end <= len(values) else None for end in ends]
