"""Ratios of weighted sums, kept as one row of sums per user, and the intervals that follow from these rows.

Shapes: U users, T columns. Every self-normalised estimate here has the form

    V = Σ_t A_t / B_t,    A_t = Σ_u A_ut = Σ w r,    B_t = Σ_u B_ut = Σ w

with T = 1 for the one-request estimand and one column per step for sessions. Users are independent of each other and
their requests are not, so V varies as the mean of its influence on users (delta method, clustered by user):

    ψ_u = Σ_t (A_ut − (A_t / B_t) B_ut) / B_t,    Var V = U / (U − 1) Σ_u ψ_u²

and bounds are V ± t_{U−1} √Var V. The logged mean R / N = Σ_u R_u / Σ_u N_u has the same form, so the difference of two
values has the difference of their influences, and its interval is paired by user.

Sums add, so a log may be read in shards and on several machines: `merge` gives the same estimate as the whole log.
Weights are stored divided by exp(log_scale), since log ratios of ±700 leave float64 when they are squared.
"""

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Int
from scipy import stats

from components.errors import InputError
from components.evaluation.policy_value import Estimand, PolicyDifference, PolicyValue
from components.interactions.contract import RatioAssumption

#: Bootstrap counts held in memory at once.
COUNTS_PER_BLOCK = 1 << 23


@dataclass(frozen=True)
class RatioSums:
    """What an estimate needs to know of a log: sums per user. Units are requests or, for sessions, sessions."""

    users: Int[np.ndarray, " U"]
    """Codes in ascending order."""
    numerators: Float[np.ndarray, "U T"]
    """Σ w r, divided by exp(log_scales)."""
    denominators: Float[np.ndarray, "U T"]
    """Σ w, divided by exp(log_scales). The last column holds each unit's final weight once."""
    squared_weights: Float[np.ndarray, " U"]
    """Σ w² of the final weights, divided by exp(2 · last log_scale)."""
    log_scales: Float[np.ndarray, " T"]
    rewards: Float[np.ndarray, " U"]
    """Σ r."""
    units: Float[np.ndarray, " U"]
    """How many units the user has."""
    n_requests: int
    n_capped: int
    """Requests whose weight was cut to the cap."""
    max_log_weight: float
    cap: float


def merge(first: RatioSums, second: RatioSums) -> RatioSums:
    """Sums of two shards of one log together; a user may be in both, a session may not.

    Raises:
        InputError: the shards were capped differently.
    """
    if first.cap != second.cap:
        raise InputError(f"cap: shards were capped at {first.cap:g} and {second.cap:g}; expected the same cap in all")
    users = np.union1d(first.users, second.users)
    n_columns = max(len(first.log_scales), len(second.log_scales))
    first, second = _widen(first, n_columns), _widen(second, n_columns)
    log_scales = np.maximum(first.log_scales, second.log_scales)
    numerators, denominators = np.zeros((2, len(users), n_columns))
    squared_weights, rewards, units = np.zeros((3, len(users)))
    for shard in (first, second):
        rows = np.searchsorted(users, shard.users)
        shrink = np.exp(shard.log_scales - log_scales)
        numerators[rows] += shard.numerators * shrink
        denominators[rows] += shard.denominators * shrink
        squared_weights[rows] += shard.squared_weights * shrink[-1] ** 2
        rewards[rows] += shard.rewards
        units[rows] += shard.units
    return RatioSums(
        users=users,
        numerators=numerators,
        denominators=denominators,
        squared_weights=squared_weights,
        log_scales=log_scales,
        rewards=rewards,
        units=units,
        n_requests=first.n_requests + second.n_requests,
        n_capped=first.n_capped + second.n_capped,
        max_log_weight=max(first.max_log_weight, second.max_log_weight),
        cap=first.cap,
    )


def _widen(sums: RatioSums, n_columns: int) -> RatioSums:
    """The same sums with more steps: past its longest session's end a shard has no reward, and its final weights."""
    extra = n_columns - len(sums.log_scales)
    return replace(
        sums,
        numerators=np.pad(sums.numerators, ((0, 0), (0, extra))),
        denominators=np.pad(sums.denominators, ((0, 0), (0, extra)), mode="edge"),
        log_scales=np.pad(sums.log_scales, (0, extra), mode="edge"),
    )


@dataclass(frozen=True)
class _Mean:
    """An estimate and each user's influence on it."""

    value: float
    influence: Float[np.ndarray, " U"]

    def minus(self, other: "_Mean") -> "_Mean":
        return _Mean(self.value - other.value, self.influence - other.influence)

    def bounds(self, confidence: float) -> tuple[float, float] | tuple[None, None]:
        n_users = len(self.influence)
        if n_users < 2:
            return None, None
        deviation = np.sqrt(n_users / (n_users - 1) * np.square(self.influence).sum())
        half_width = float(stats.t.ppf((1 + confidence) / 2, n_users - 1) * deviation)
        return self.value - half_width, self.value + half_width


def _target_value(sums: RatioSums) -> _Mean:
    totals = sums.denominators.sum(axis=0)
    ratios = sums.numerators.sum(axis=0) / totals
    return _Mean(float(ratios.sum()), ((sums.numerators - ratios * sums.denominators) / totals).sum(axis=1))


def _mean_per_unit(totals: Float[np.ndarray, " U"], units: Float[np.ndarray, " U"]) -> _Mean:
    mean = totals.sum() / units.sum()
    return _Mean(float(mean), (totals - mean * units) / units.sum())


def value_from_sums(
    sums: RatioSums,
    *,
    policy: str,
    estimator: str,
    estimand: Estimand,
    ratio: RatioAssumption,
    propensities_estimated: bool,
    confidence: float,
) -> PolicyValue:
    """The estimate V with its user-clustered interval; bounds are None where the log has fewer than two users."""
    value = _target_value(sums)
    behavior = _mean_per_unit(sums.rewards, sums.units)
    difference = value.minus(behavior)
    final_weights = sums.denominators[:, -1]
    mean_weight = _mean_per_unit(final_weights * np.exp(sums.log_scales[-1]), sums.units)
    lower, upper = value.bounds(confidence)
    difference_lower, difference_upper = difference.bounds(confidence)
    mean_weight_lower, mean_weight_upper = mean_weight.bounds(confidence)
    return PolicyValue(
        policy=policy,
        estimator=estimator,
        estimand=estimand,
        ratio=ratio,
        value=value.value,
        lower=lower,
        upper=upper,
        confidence=confidence,
        effective_sample_size=float(final_weights.sum() ** 2 / sums.squared_weights.sum()),
        n_requests=sums.n_requests,
        n_units=int(sums.units.sum()),
        n_users=len(sums.users),
        cap=sums.cap,
        cap_share=sums.n_capped / sums.n_requests,
        max_weight=float(np.exp(sums.max_log_weight)),
        mean_weight=mean_weight.value,
        mean_weight_lower=mean_weight_lower,
        mean_weight_upper=mean_weight_upper,
        behavior_value=behavior.value,
        difference=difference.value,
        difference_lower=difference_lower,
        difference_upper=difference_upper,
        propensities_estimated=propensities_estimated,
        interval="none" if lower is None else "user-clustered delta method",
    )


def compare(
    policy_sums: RatioSums,
    reference_sums: RatioSums,
    *,
    policy: str,
    reference: str,
    estimand: Estimand,
    confidence: float = 0.95,
) -> PolicyDifference:
    """Value of one policy minus that of another on the same log, with an interval paired by user.

    Raises:
        InputError: the sums are not of the same log.
    """
    same_users = np.array_equal(policy_sums.users, reference_sums.users)
    if not (same_users and np.array_equal(policy_sums.units, reference_sums.units)):
        raise InputError(
            f"{policy} and {reference} were estimated on different logs ({policy_sums.n_requests} requests of "
            f"{len(policy_sums.users)} users, {reference_sums.n_requests} of {len(reference_sums.users)}); "
            "a paired difference needs the same log"
        )
    difference = _target_value(policy_sums).minus(_target_value(reference_sums))
    lower, upper = difference.bounds(confidence)
    return PolicyDifference(
        policy=policy,
        reference=reference,
        estimand=estimand,
        difference=difference.value,
        lower=lower,
        upper=upper,
        confidence=confidence,
        n_users=len(policy_sums.users),
    )


@dataclass(frozen=True)
class BootstrapIntervals:
    """Percentile intervals of the value and of its difference to the logged mean."""

    lower: float
    upper: float
    difference_lower: float
    difference_upper: float


def ratio_bootstrap(
    sums: RatioSums, generator: np.random.Generator, *, n_resamples: int = 1000, confidence: float = 0.95
) -> BootstrapIntervals:
    """Intervals by drawing users with replacement and forming every ratio anew in each resample.

    Resampling the terms w r / Σ w instead, normalised once, ignores that Σ w moves together with Σ w r and gives
    intervals several times too wide.

    Args:
        sums: of the whole log.
        generator: where the resamples come from.
        n_resamples: more give steadier bounds.
        confidence: how often such intervals hold the truth.

    Raises:
        InputError: so few users hold all the weight that a resample without them has none.
    """
    n_users, n_columns = sums.numerators.shape
    columns = np.column_stack([sums.numerators, sums.denominators, sums.rewards, sums.units])
    block = max(1, COUNTS_PER_BLOCK // n_users)
    resamples = np.concatenate(
        [
            _resample_counts(min(block, n_resamples - start), n_users, generator) @ columns
            for start in range(0, n_resamples, block)
        ]
    )
    numerators, denominators = resamples[:, :n_columns], resamples[:, n_columns : 2 * n_columns]
    if not denominators.all():
        raise InputError(
            f"bootstrap: some resamples of the {n_users} users hold no weight; too few users carry the estimate"
        )
    values = (numerators / denominators).sum(axis=1)
    differences = values - resamples[:, -2] / resamples[:, -1]
    tail = (1 - confidence) / 2
    bounds = np.quantile(np.column_stack([values, differences]), [tail, 1 - tail], axis=0)
    return BootstrapIntervals(*bounds.T.ravel().tolist())


def _resample_counts(n_resamples: int, n_users: int, generator: np.random.Generator) -> Float[np.ndarray, "R U"]:
    """How often each resample draws each user."""
    drawn = generator.integers(n_users, size=(n_resamples, n_users))
    drawn += np.arange(n_resamples)[:, None] * n_users
    counts = np.bincount(drawn.ravel(), minlength=n_resamples * n_users)
    return counts.reshape(n_resamples, n_users).astype(np.float64)
