"""Figures of what several seeds gave, and of cases that were counted."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float
from scipy import stats

from flows.benchmarks import Figure


def columns(results: list[dict[str, float]]) -> dict[str, Float[np.ndarray, " S"]]:
    """The values of all seeds by name."""
    return {name: np.array([result[name] for result in results]) for name in results[0]}


def mean_of_seeds(
    values: Float[np.ndarray, " S"], unit: str, target: str | None = None, above: float | None = None
) -> Figure:
    """Mean over seeds with Student's interval, which values that are all alike do not have.

    Args:
        values: one of each seed.
        unit: of the values.
        target: what the mean was to be, in words.
        above: the target holds where the whole interval lies above it.
    """
    mean, n = float(values.mean()), len(values)
    interval = None
    if n > 1 and values.std() > 0:
        half = float(stats.t.ppf(0.975, n - 1) * values.std(ddof=1) / np.sqrt(n))
        interval = (mean - half, mean + half)
    lowest = mean if interval is None else interval[0]
    holds = None if above is None else lowest > above
    return Figure(value=mean, interval=interval, unit=unit, target=target, holds=holds)


def share_of_seeds(
    happened: Float[np.ndarray, " S"], target: str | None = None, holds: Callable[[float], bool] | None = None
) -> Figure:
    """Share of the seeds whose value is 1 and not 0."""
    return share_of(float(happened.sum()), len(happened), "seeds", target, holds)


def share_of(
    hits: float, n: float, what: str, target: str | None = None, holds: Callable[[float], bool] | None = None
) -> Figure:
    """Share of n cases with the exact binomial interval; `holds` says of a share whether the target is met."""
    share, interval = hits / n, stats.binomtest(round(hits), round(n)).proportion_ci()
    return Figure(
        value=share,
        interval=(float(interval.low), float(interval.high)),
        unit=f"share of {n:.0f} {what}",
        target=target,
        holds=None if holds is None else holds(share),
    )
