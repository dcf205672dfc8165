"""Rates per CPU-second (user and system time of this process), of two ways that take turns."""

import time
from collections.abc import Callable

import numpy as np

from flows.benchmarks import Figure


def cpu_seconds(act: Callable[[], object]) -> float:
    """What it costs to act once."""
    started = time.process_time()
    act()
    return time.process_time() - started


def in_turns(ours: Callable[[], int], theirs: Callable[[], int], repeats: int) -> dict[str, float]:
    """Units per CPU-second of two ways to do the same; each call says how many units it did.

    Each is a median of the repeats, and so is the ratio, of the repeats' own ratios.
    """

    def rate(act: Callable[[], int]) -> float:
        started = time.process_time()
        return act() / (time.process_time() - started)

    rates = np.array([(rate(ours), rate(theirs)) for _ in range(repeats)])
    return {
        "ours": float(np.median(rates[:, 0])),
        "theirs": float(np.median(rates[:, 1])),
        "ratio": float(np.median(rates[:, 0] / rates[:, 1])),
    }


def rate_figures(name: str, rates: dict[str, float], unit: str, other: str, at_least: float) -> dict[str, Figure]:
    """The ratio with its target, and both rates."""
    return {
        f"{name}.ratio": Figure(
            value=rates["ratio"], unit="times", target=f"at least {at_least:g}", holds=rates["ratio"] >= at_least
        ),
        f"{name}.ours": Figure(value=rates["ours"], unit=unit),
        f"{name}.theirs": Figure(value=rates["theirs"], unit=f"{unit}, {other}"),
    }
