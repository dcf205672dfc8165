"""Importance weights: the capped ratio in log space, and how many requests it leaves.

    w = min(π / β, c)        log w = min(log π − log β, log c)

A cap trades variance for bias. A fixed one (c = 10 is common) biases every estimate of a policy that differs much from
the logging one; a cap that grows like √n cuts off less and less as the log grows, so its bias vanishes too.
"""

import math

import numpy as np
from jaxtyping import Float

from components.errors import InputError


def default_cap(n: int) -> float:
    """The lowest cap that an estimate from n weights may use: √n."""
    return math.sqrt(n)


def check_cap(cap: float, n: int) -> None:
    """Refuse a cap that would bias an estimate from n weights.

    Raises:
        InputError: the cap is below √n.
    """
    if cap < default_cap(n):
        raise InputError(f"cap: {cap:g} is below √n = {default_cap(n):g} for n = {n}; a lower cap biases the estimate")


def capped_log_weights(log_ratios: Float[np.ndarray, " M"], cap: float) -> Float[np.ndarray, " M"]:
    """min(log ratio, log cap) of each ratio.

    Raises:
        InputError: the cap is not a finite number above 0.
    """
    if not (math.isfinite(cap) and cap > 0):
        raise InputError(f"cap: {cap} is no finite number above 0")
    capped: Float[np.ndarray, " M"] = np.minimum(log_ratios, math.log(cap))
    return capped


def effective_sample_size(log_weights: Float[np.ndarray, " M"]) -> float:
    """Kish's (Σw)² / Σw²: how many equally weighted requests say as much; 1 to M, whatever the weights' scale."""
    weights = np.exp(log_weights - log_weights.max())
    return float(weights.sum() ** 2 / np.square(weights).sum())


def ess_floor(n: int, at_least: float = 500.0, share: float = 0.01) -> float:
    """Effective sample size from which an estimate on n requests counts: max(at_least, share · n)."""
    return max(at_least, share * n)
