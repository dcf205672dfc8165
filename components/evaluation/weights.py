"""Importance weights: the capped ratio in log space, and how many requests it leaves.

    w = min(π / β, c)        log w = min(log π − log β, log c)

A cap trades variance for bias. A fixed one (c = 10 is common) biases every estimate of a policy that differs much from
the logging one; a cap that grows like √n cuts off less and less as the log grows, so its bias vanishes too.

Kish's effective number of n weights is (Σw)² / Σw². An estimate by the cascade has weights of its own at each position
k, and its variance is about Σ_k σ_k² / n_k: the rewards' variance at a position over its effective number. So many
requests of equal weights would have the same:

    n_eff = Σ_k σ_k² / Σ_k (σ_k² / n_k),        n_k = (Σ_i w_ik)² / Σ_i w_ik²

the harmonic mean of the positions' effective numbers, weighted by their share of the logged reward's variance, which no
judged policy can move. With one position, or the same weights at all of them, it is Kish's number; no position's n_k is
below its share of n_eff.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from components.errors import InputError

#: Where weights are not capped: larger ones are a finding already, and their fourth powers would leave float64.
LARGEST_LOG_WEIGHT = 150.0


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


@dataclass(frozen=True)
class EffectiveSize:
    """The sums that n_eff is made from, by position; those of two shards add."""

    weights: Float[np.ndarray, " K"]
    """Σ w, divided by exp(log_scales)."""
    squared_weights: Float[np.ndarray, " K"]
    """Σ w², divided by exp(2 · log_scales)."""
    log_scales: Float[np.ndarray, " K"]
    rewards: Float[np.ndarray, " K"]
    squared_rewards: Float[np.ndarray, " K"]
    n: int

    @classmethod
    def of(cls, positions: Sequence[tuple[Float[np.ndarray, " M"], Float[np.ndarray, " M"]]]) -> "EffectiveSize":
        """The sums over M requests, from the rewards and the final log weights of each position."""
        log_scales = np.array([log_weights.max() for _, log_weights in positions])
        weights = [np.exp(log_weights - scale) for (_, log_weights), scale in zip(positions, log_scales, strict=True)]
        return cls(
            weights=np.array([part.sum() for part in weights]),
            squared_weights=np.array([np.square(part).sum() for part in weights]),
            log_scales=log_scales,
            rewards=np.array([rewards.sum() for rewards, _ in positions], dtype=np.float64),
            squared_rewards=np.array([np.square(rewards).sum() for rewards, _ in positions], dtype=np.float64),
            n=len(weights[0]),
        )

    def merge(self, other: "EffectiveSize") -> "EffectiveSize":
        """The sums over the requests of both."""
        log_scales = np.maximum(self.log_scales, other.log_scales)
        mine, its = np.exp(self.log_scales - log_scales), np.exp(other.log_scales - log_scales)
        return EffectiveSize(
            weights=mine * self.weights + its * other.weights,
            squared_weights=mine**2 * self.squared_weights + its**2 * other.squared_weights,
            log_scales=log_scales,
            rewards=self.rewards + other.rewards,
            squared_rewards=self.squared_rewards + other.squared_rewards,
            n=self.n + other.n,
        )

    @property
    def of_positions(self) -> Float[np.ndarray, " K"]:
        """n_k; the last is that of whole slates, since the slate down to the last position is the slate."""
        return np.square(self.weights) / self.squared_weights

    @property
    def value(self) -> float:
        """n_eff; where no position's reward varies, all count alike."""
        variances = np.maximum(self.squared_rewards / self.n - np.square(self.rewards / self.n), 0.0)
        shares = variances / variances.sum() if variances.any() else np.full(len(variances), 1 / len(variances))
        return float(1.0 / (shares / self.of_positions).sum())


def ess_floor(n: int, at_least: float = 500.0, share: float = 0.01) -> float:
    """Effective sample size from which an estimate on n requests counts: max(at_least, share · n)."""
    return max(at_least, share * n)
