"""Ratios of weighted sums, kept as one row of sums per user, and the intervals that follow from these rows.

Shapes: U users, T columns. Every self-normalised estimate here has the form

    V = Σ_t A_t / B_t,    A_t = Σ_u A_ut,    B_t = Σ_u B_ut

with A = Σ w r and B = Σ w where it is self-normalised and B = n where it is not; T = 1 for a request as a whole, one
column per position for the cascade and per step for sessions. Users are independent of each other and their requests
are not, so V varies as the mean of its influence on users (delta method, clustered by user):

    ψ_u = Σ_t (A_ut − (A_t / B_t) B_ut) / B_t,    Var V = U / (U − 1) Σ_u ψ_u²

and bounds are V ± t_ν √Var V. Where few users hold much of the weight, Var V is itself a poor guess, and Student's t
has to know: ν = min(U − 1, 2U / (κ − 1)), with κ the kurtosis of the influences, matches the variance of Var V
(Satterthwaite 1946; normal influences have κ = 3 and ν = U − 1). The logged mean R / N = Σ_u R_u / Σ_u N_u has the same
form, so the difference of two values has the difference of their influences, and its interval is paired by user.

Sums add, so a log may be read in shards and on several machines: `merge` gives the same estimate as the whole log, and
`merge_shards` that of a log whose shards come one by one.
Weights are stored divided by exp(log_scale), since log ratios of ±700 leave float64 when they are squared.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import TypeVar

import numpy as np
from jaxtyping import Float, Int
from scipy import special

from components.errors import InputError
from components.evaluation.policy_value import Estimand, PolicyDifference, PolicyValue
from components.evaluation.weights import LARGEST_LOG_WEIGHT, EffectiveSize, capped_log_weights
from components.interactions.contract import RatioAssumption

#: Bootstrap counts held in memory at once.
COUNTS_PER_BLOCK = 1 << 20
#: Users of a block: as many as a byte tells apart, since random bits are what a resample costs.
USERS_PER_BLOCK = 256
Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class RatioSums:
    """What an estimate needs to know of a log: sums per user. Units are requests or, for sessions, sessions."""

    users: Int[np.ndarray, " U"]
    """Codes in ascending order."""
    numerators: Float[np.ndarray, "U T"]
    """A, divided by exp(log_scales)."""
    denominators: Float[np.ndarray, "U T"]
    """B, divided by exp(log_scales)."""
    log_scales: Float[np.ndarray, " T"]
    ratios: Float[np.ndarray, " U"]
    """Σ ρ of the units' ratios, cut at LARGEST_LOG_WEIGHT and not at the cap, divided by exp(log_ratio_scale): what the
    mean weight is made from."""
    log_ratio_scale: float
    effective: EffectiveSize
    """Of the units' final weights; with the cascade, of each position's."""
    rewards: Float[np.ndarray, " U"]
    """Σ r."""
    units: Float[np.ndarray, " U"]
    """How many units the user has."""
    n_requests: int
    n_capped: int
    """Requests whose weight was cut to the cap."""
    cap: float


@dataclass(frozen=True)
class Column:
    """What N units contribute to one ratio, divided by exp(log_scale)."""

    numerators: Float[np.ndarray, " N"]
    denominators: Float[np.ndarray, " N"]
    log_scale: float = 0.0


def sum_by_user(
    user: Int[np.ndarray, " N"],
    columns: Sequence[Column],
    *,
    log_ratios: Float[np.ndarray, " N"],
    rewards: Float[np.ndarray, " N"],
    n_requests: int,
    n_capped: int,
    cap: float,
    positions: Sequence[tuple[Float[np.ndarray, " N"], Float[np.ndarray, " N"]]] = (),
) -> RatioSums:
    """Sums per user over N units.

    Args:
        user: code of each unit's user.
        columns: contributions to each ratio.
        log_ratios: of each unit, before the cap.
        rewards: logged reward of each unit.
        n_requests: that the units hold.
        n_capped: requests whose weight was cut to the cap.
        cap: of the weights.
        positions: rewards and final log weights of each position, where they have weights of their own.
    """
    users, codes = np.unique(user, return_inverse=True)
    uncapped = np.minimum(log_ratios, LARGEST_LOG_WEIGHT)
    scale = float(uncapped.max())

    def total(values: Float[np.ndarray, " N"]) -> Float[np.ndarray, " U"]:
        return np.bincount(codes, values, len(users))

    return RatioSums(
        users=users,
        numerators=np.column_stack([total(column.numerators) for column in columns]),
        denominators=np.column_stack([total(column.denominators) for column in columns]),
        log_scales=np.array([column.log_scale for column in columns]),
        ratios=total(np.exp(uncapped - scale)),
        log_ratio_scale=scale,
        effective=EffectiveSize.of(positions or [(rewards, capped_log_weights(log_ratios, cap))]),
        rewards=total(rewards),
        units=np.bincount(codes).astype(np.float64),
        n_requests=n_requests,
        n_capped=n_capped,
        cap=cap,
    )


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
    ratios, rewards, units = np.zeros((3, len(users)))
    log_ratio_scale = max(first.log_ratio_scale, second.log_ratio_scale)
    for shard in (first, second):
        rows = np.searchsorted(users, shard.users)
        shrink = np.exp(shard.log_scales - log_scales)
        numerators[rows] += shard.numerators * shrink
        denominators[rows] += shard.denominators * shrink
        ratios[rows] += shard.ratios * np.exp(shard.log_ratio_scale - log_ratio_scale)
        rewards[rows] += shard.rewards
        units[rows] += shard.units
    return RatioSums(
        users=users,
        numerators=numerators,
        denominators=denominators,
        log_scales=log_scales,
        ratios=ratios,
        log_ratio_scale=log_ratio_scale,
        effective=first.effective.merge(second.effective),
        rewards=rewards,
        units=units,
        n_requests=first.n_requests + second.n_requests,
        n_capped=first.n_capped + second.n_capped,
        cap=first.cap,
    )


def merge_shards(shards: Iterable[Mapping[Name, RatioSums]]) -> dict[Name, RatioSums]:
    """Sums of a whole log from those of its shards, by name; a shard that has nothing to say leaves a name out.

    Shards are merged as a binary counter carries, like with like: no row is copied more than log₂(shards) times.

    Args:
        shards: at least one.
    """
    waiting: list[dict[Name, RatioSums]] = []
    for number, shard in enumerate(shards, start=1):
        waiting.append(dict(shard))
        while number % 2 == 0:
            second, first = waiting.pop(), waiting.pop()
            waiting.append(_merge_names(first, second))
            number //= 2
    return reduce(_merge_names, reversed(waiting))


def _merge_names(first: dict[Name, RatioSums], second: dict[Name, RatioSums]) -> dict[Name, RatioSums]:
    """Both together; they are emptied, so that no more than one name is held twice."""
    merged = {}
    for name in [*first, *(name for name in second if name not in first)]:
        parts = [shard.pop(name) for shard in (first, second) if name in shard]
        merged[name] = reduce(merge, parts)
    return merged


def _widen(sums: RatioSums, n_columns: int) -> RatioSums:
    """The same sums with more steps: past its longest session's end a shard has no reward, and its final weights."""
    extra = n_columns - len(sums.log_scales)
    if extra == 0:
        return sums
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

    def plus(self, other: "_Mean") -> "_Mean":
        return _Mean(self.value + other.value, self.influence + other.influence)

    def minus(self, other: "_Mean") -> "_Mean":
        return _Mean(self.value - other.value, self.influence - other.influence)

    def with_bounds(self, confidence: float) -> tuple[float, float | None, float | None]:
        """The estimate and its interval's ends; None where there are fewer than two users."""
        n_users = len(self.influence)
        if n_users < 2:
            return self.value, None, None
        squares = np.square(self.influence)
        total = float(squares.sum())
        if total**2 == 0:
            # Weights of nothing: what they vary by is nothing too, or so little that its square is.
            return self.value, self.value, self.value
        kurtosis = n_users * float(squares @ squares) / total**2
        degrees = n_users - 1 if kurtosis <= 1 else min(n_users - 1, 2 * n_users / (kurtosis - 1))
        half_width = float(special.stdtrit(degrees, (1 + confidence) / 2)) * np.sqrt(n_users / (n_users - 1) * total)
        return self.value, self.value - half_width, self.value + half_width


def _target_value(sums: RatioSums) -> _Mean:
    columns = zip(sums.numerators.T, sums.denominators.T, strict=True)
    return reduce(_Mean.plus, (_ratio(numerators, denominators) for numerators, denominators in columns))


def _ratio(numerators: Float[np.ndarray, " U"], denominators: Float[np.ndarray, " U"], scale: float = 1.0) -> _Mean:
    """Ratio of the sums, times a scale."""
    total = denominators.sum()
    ratio = numerators.sum() / total
    # In place: memory that was never touched before costs more than what is computed in it.
    influence = ratio * denominators
    np.subtract(numerators, influence, out=influence)
    influence *= scale / total
    return _Mean(float(scale * ratio), influence)


def value_from_sums(
    sums: RatioSums,
    estimator: str,
    estimand: Estimand,
    *,
    policy: str,
    ratio: RatioAssumption,
    propensities_estimated: bool = False,
    confidence: float = 0.95,
) -> PolicyValue:
    """The estimate V with its user-clustered interval; bounds are None where the log has fewer than two users."""
    max_ratio = float(np.exp(sums.log_ratio_scale))
    mean_weight, *mean_weight_bounds = _ratio(sums.ratios, sums.units, max_ratio).with_bounds(confidence)
    target, behavior = _target_value(sums), _ratio(sums.rewards, sums.units)
    value, lower, upper = target.with_bounds(confidence)
    difference, *difference_bounds = target.minus(behavior).with_bounds(confidence)
    return PolicyValue(
        policy=policy,
        estimator=estimator,
        estimand=estimand,
        ratio=ratio,
        value=value,
        lower=lower,
        upper=upper,
        confidence=confidence,
        effective_sample_size=sums.effective.value,
        n_requests=sums.n_requests,
        n_units=int(sums.units.sum()),
        n_users=len(sums.users),
        cap=sums.cap,
        cap_share=sums.n_capped / sums.n_requests,
        max_weight=min(max_ratio, sums.cap),
        mean_weight=mean_weight,
        mean_weight_lower=mean_weight_bounds[0],
        mean_weight_upper=mean_weight_bounds[1],
        behavior_value=behavior.value,
        difference=difference,
        difference_lower=difference_bounds[0],
        difference_upper=difference_bounds[1],
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
    between = _target_value(policy_sums).minus(_target_value(reference_sums))
    difference, lower, upper = between.with_bounds(confidence)
    return PolicyDifference(
        policy=policy,
        reference=reference,
        estimand=estimand,
        difference=difference,
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
    """How often each resample draws each user.

    First how many of the draws fall into each block of users, then where in its block each of them falls.
    """
    counts = np.empty((n_resamples, n_users))
    starts = np.arange(0, n_users, USERS_PER_BLOCK)
    sizes = np.diff(starts, append=n_users)
    for row, drawn in zip(counts, generator.multinomial(n_users, sizes / n_users, size=n_resamples), strict=True):
        users, n_in_last = np.repeat(starts, drawn), int(drawn[-1])
        whole, last = users[: n_users - n_in_last], users[n_users - n_in_last :]
        whole += generator.integers(USERS_PER_BLOCK, size=len(whole), dtype=np.uint8)
        last += generator.integers(sizes[-1], size=len(last), dtype=np.uint8)
        row[:] = np.bincount(users, minlength=n_users)
    return counts
