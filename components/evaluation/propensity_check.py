"""Are a log's log_probs those under which its slates were shown? What must hold of them, whatever the policies are.

If slates a were drawn from b, then for every policy π and every function f of situation s and slate

    E_b[w f(s, a)] = E_π[f(s, a)],    w = π(a | s) / b(a | s)

so each pair (π, f) is a test. One that fails shows that b is wrong. Two kinds of f are asked:

- *mean weight*, f = 1, for several policies. Claims that are too high (log_probs of 0, logarithms to base 10) pull it
  below 1, and claims that do not fit their slates (of another request, of another version) push it above.
- *calibration*, f = rank of a's probability among n − 1 slates drawn from the fitted logging policy π = b̂, in n / 2
  groups of equal expectation: the rank histogram of ensemble forecasts (Hamill 2001), weighted. It sees what cancels in
  the mean: claims too low for likely slates and too high for unlikely ones. Where the claims are b̂ themselves, w = 1,
  and it is the plain histogram: do slates occur as often as their estimate says.

Estimates by the cascade rest on what each position claims, given those above it. The slate down to any position is an
ordered slate too, so its weights have mean 1 as well: that is asked of π = b̂ for each position but the last.

Power and level hang on the tail of w. A sound log with a heavy tail usually misses its few huge weights, its mean lies
below 1, and a symmetric interval around it leaves 1 out far too often. So policies are judged *near b̂*, at the furthest
α of the geometric path

    π_α ∝ b̂^(1−α) π^α    with    log E_b̂[(π_α / b̂)²] ≤ log 1.5    (taking all positions for the first)

α is chosen from the policies and the situations alone, never from the slates that were shown, and every π_α is a
policy, so the test is valid however wrong b̂ is; b̂ being near b is what makes it sharp. b̂ must not have been fitted
on the sessions that are tested.

Each test compares sums per user, two-sided, by Student's t on users − 1 degrees of freedom. What is left of the skew is
taken out twice: the spread is that around the expectation, and the statistic is made symmetric (Hall 1992, "On the
removal of skewness by transformation"). Holm's method corrects for the number of tests. Measured on 1,000 sound logs of
50 users: the smallest p-value falls below 5 % in 4-5 % of them and below 0.1 % in at most 0.2 %; by the plain t-test it
does in 8-11 % and 1-2 %.

A difference within `tolerance` of the expectation is no finding: rounding, where log_probs were logged; a stated
misfit, where they are estimated, since no estimate is exactly right.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from pydantic import BaseModel, ConfigDict, Field
from scipy import stats
from torch import Tensor

from components.evaluation.weights import LARGEST_LOG_WEIGHT
from components.interactions.batching import SessionBatch
from components.interactions.contract import RatioAssumption
from components.policies import plackett_luce
from components.policies.slate_policy import SlatePolicy

#: Steps along the path from the fitted logging policy (0) to the judged one (1), furthest first.
STRENGTHS = (1.0, 0.7, 0.5, 0.35, 0.25, 0.175, 0.125, 0.0625)
#: Largest second moment that weights may have by the fitted logging policy.
SECOND_MOMENT = 1.5
#: Slates that are ranked: the one that was shown, and draws of the fitted logging policy.
RANKED = 10
#: Relative differences up to which log_probs count as right.
LOGGED_TOLERANCE, ESTIMATED_TOLERANCE = 0.002, 0.1
#: p-value below which log_probs are called wrong; a log of users too few to ever get there is not tested.
FINDING_P_VALUE = 0.001
FITTED = "fitted logging policy"
GROUPS = tuple(f"slates {2 * group + 1} and {2 * group + 2} of {RANKED}" for group in range(RANKED // 2))

#: Utilities of the candidates at each of a batch's M requests, in the order of its mask.
BatchLogits = Callable[[SessionBatch], Float[Tensor, "M N"]]


class PropensityTest(BaseModel):
    """One expectation, and what the log's weights made of it."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    kind: str = Field(description="'mean weight' or 'calibration'.")
    target: str = Field(description="The policy that weights lead to.")
    strength: float = Field(description="Where on the path from the fitted logging policy (0) to the target (1).")
    slates: str = Field(description="The slates that are counted.")
    expected: float = Field(description="Their share under that policy.")
    observed: float = Field(description="Their weighted share of the log.")
    lower: float = Field(description="Lower end of the observed share's 95 % interval, clustered by user.")
    upper: float = Field(description="Upper end of it.")
    p_value: float = Field(ge=0, le=1, description="Of a difference beyond the tolerance, corrected for all tests.")


class PropensityCheck(BaseModel):
    """Whether a log's log_probs are consistent with the slates that were shown."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    estimated: bool = Field(description="Whether the log_probs were fitted, not logged.")
    tolerance: float = Field(ge=0, description="Relative difference that is no finding.")
    n_requests: int = Field(ge=1, description="Requests that were looked at.")
    n_users: int = Field(ge=2, description="Users of them: the clusters of every test.")
    tests: tuple[PropensityTest, ...] = Field(min_length=1, description="Every test that was made.")

    @property
    def worst(self) -> PropensityTest:
        """The test with the smallest p-value, and of those the one that is furthest off."""
        return min(self.tests, key=lambda test: (test.p_value, -abs(test.observed / test.expected - 1.0)))


def batch_logits(policy: SlatePolicy) -> BatchLogits:
    """Utilities of one policy, whoever the user is."""

    def logits(batch: SessionBatch) -> Tensor:
        flat = batch.mask.flatten()
        return policy.logits(policy.states(batch).select(flat), batch.requests().select(flat))

    return logits


@dataclass(frozen=True)
class Expectation:
    """One test before it is made."""

    kind: str
    target: str
    strength: float
    slates: str
    expected: float
    weighted: Float[np.ndarray, " M"]
    """w f of each request."""


def check_propensities(
    sessions: Iterable[SessionBatch],
    fitted: BatchLogits,
    targets: Mapping[str, SlatePolicy],
    generator: torch.Generator,
    *,
    ratio: RatioAssumption = RatioAssumption.FULL_SLATE,
    estimated: bool = False,
) -> PropensityCheck | None:
    """Test the log_probs of sessions; None where fewer than two users leave nothing to test with.

    Args:
        sessions: sessions that the fitted policy was not fitted on.
        fitted: utilities of the fitted logging policy.
        targets: policies whose mean weight is asked, by name.
        generator: of the draws.
        ratio: the one that estimates use; for the cascade the log_probs of positions are tested too.
        estimated: whether the log_probs are those of the fitted policy, not logged.
    """
    collected = _collect(sessions, fitted, targets, generator, ratio)
    if collected is None:
        return None
    claimed = collected.claimed
    weights = np.exp(np.minimum(collected.fitted - claimed, LARGEST_LOG_WEIGHT))
    expectations = []
    if not estimated:
        expectations.append(Expectation("mean weight", FITTED, 0.0, "all", 1.0, weights))
        for position, log_weights in enumerate(collected.prefixes.T, start=1):
            above = np.exp(np.minimum(log_weights, LARGEST_LOG_WEIGHT))
            expectations.append(Expectation("mean weight", FITTED, 0.0, f"down to position {position}", 1.0, above))
    for name, by_strength in collected.targets.items():
        strength = _near_enough(collected.second_moments[name])
        near = np.exp(np.minimum(by_strength[strength] - claimed, LARGEST_LOG_WEIGHT))
        expectations.append(Expectation("mean weight", name, STRENGTHS[strength], "all", 1.0, near))
    for group, name in enumerate(GROUPS):
        inside = weights * (collected.groups == group)
        expectations.append(Expectation("calibration", FITTED, 0.0, name, 1.0 / len(GROUPS), inside))
    return judge_expectations(expectations, collected.users, estimated=estimated)


def judge_expectations(
    expectations: list[Expectation], users: Int[np.ndarray, " M"], *, estimated: bool
) -> PropensityCheck | None:
    """Test expectations on the same requests; None where they are of too few users for any of them to fail.

    The spread is that around the expectation, so no statistic of U users exceeds √U however wrong log_probs are.

    Args:
        expectations: at least one.
        users: codes of the requests' users.
        estimated: whether log_probs were fitted: a larger tolerance holds then.
    """
    _, codes = np.unique(users, return_inverse=True)
    sizes = np.bincount(codes)
    n_users, n_requests = len(sizes), len(codes)
    if n_users < 2 or 2.0 * len(expectations) * stats.t.sf(np.sqrt(n_users), n_users - 1) >= FINDING_P_VALUE:
        return None
    tolerance = ESTIMATED_TOLERANCE if estimated else LOGGED_TOLERANCE
    deviations = np.array(
        [np.bincount(codes, part.weighted) - part.expected * sizes for part in expectations], dtype=np.float64
    )
    shift = deviations.sum(1) / n_requests
    # The spread around what is expected, not around what was seen: a sample that missed its large weights lies low and
    # looks narrow at once.
    errors = np.sqrt(np.square(deviations).sum(1)) / n_requests
    beyond = np.sign(shift) * np.maximum(
        np.abs(shift) - tolerance * np.array([part.expected for part in expectations]), 0
    )
    statistics = np.divide(beyond, errors, out=np.zeros(len(shift)), where=errors > 0)
    centered = deviations - deviations.mean(1, keepdims=True)
    spread = np.square(centered).mean(1) ** 1.5
    skewness = np.divide((centered**3).mean(1), spread, out=np.zeros(len(shift)), where=spread > 0)
    symmetric = without_skew(statistics, skewness, n_users)
    p_values = holm(np.where(beyond == 0, 1.0, 2.0 * stats.t.sf(np.abs(symmetric), n_users - 1)))
    reach = stats.t.ppf(0.975, n_users - 1) * errors
    return PropensityCheck(
        estimated=estimated,
        tolerance=tolerance,
        n_requests=n_requests,
        n_users=n_users,
        tests=tuple(
            PropensityTest(
                kind=part.kind,
                target=part.target,
                strength=part.strength,
                slates=part.slates,
                expected=part.expected,
                observed=float(part.expected + shift[row]),
                lower=float(part.expected + shift[row] - reach[row]),
                upper=float(part.expected + shift[row] + reach[row]),
                p_value=float(p_values[row]),
            )
            for row, part in enumerate(expectations)
        ),
    )


def without_skew(
    statistics: Float[np.ndarray, " J"], skewness: Float[np.ndarray, " J"], n: int
) -> Float[np.ndarray, " J"]:
    """t-statistics of the means of n skewed numbers each, made symmetric by a monotone cubic (Hall 1992, eq. 2.1)."""
    scaled = skewness / np.sqrt(n)
    symmetric: Float[np.ndarray, " J"] = (
        statistics + scaled * np.square(statistics) / 3 + np.square(scaled) * statistics**3 / 27 + scaled / 6
    )
    return symmetric


def holm(p_values: Float[np.ndarray, " J"]) -> Float[np.ndarray, " J"]:
    """p-values corrected for their number: that any of them falls below α by chance has at most probability α.

    Holm (1979): the j-th smallest of J is multiplied by J − j + 1, and none may fall below one before it.
    """
    order = np.argsort(p_values)
    factors = np.arange(len(p_values), 0, -1)
    corrected = np.empty(len(p_values))
    corrected[order] = np.minimum(np.maximum.accumulate(factors * p_values[order]), 1.0)
    return corrected


@dataclass(frozen=True)
class _Collected:
    """What the tests are made from: log_probs of the shown slates of M requests, and their groups by rank."""

    users: Int[np.ndarray, " M"]
    claimed: Float[np.ndarray, " M"]
    fitted: Float[np.ndarray, " M"]
    groups: Int[np.ndarray, " M"]
    prefixes: Float[np.ndarray, "M J"]
    """log(b̂ / b) of the slate down to each position but the last; J = 0 where positions are not tested."""
    targets: dict[str, Float[np.ndarray, "S M"]]
    """By strength."""
    second_moments: dict[str, Float[np.ndarray, "S M"]]
    """Logarithms, by strength; they depend on no slate that was shown but for its length."""


def _near_enough(log_moments: Float[np.ndarray, "S M"]) -> int:
    """Row of the furthest strength whose weights have a small second moment; the nearest where none has."""
    with np.errstate(over="ignore"):
        moments = np.exp(log_moments).mean(1)
    return int(np.argmax(moments <= SECOND_MOMENT)) if (moments <= SECOND_MOMENT).any() else len(STRENGTHS) - 1


@torch.inference_mode()
def _collect(
    sessions: Iterable[SessionBatch],
    fitted: BatchLogits,
    targets: Mapping[str, SlatePolicy],
    generator: torch.Generator,
    ratio: RatioAssumption,
) -> _Collected | None:
    columns: dict[str, list[Tensor]] = {"users": [], "claimed": [], "fitted": [], "groups": [], "prefixes": []}
    along: dict[str, list[Tensor]] = {name: [] for name in targets}
    moments: dict[str, list[Tensor]] = {name: [] for name in targets}
    for batch in sessions:
        known = torch.isfinite(batch.log_probs)[batch.mask]
        if not known.any():
            continue
        flat = batch.mask.flatten()
        requests, slates = batch.requests().select(flat), batch.slates[batch.mask]
        places = plackett_luce.places_of(slates, requests.candidates)[known]
        base = fitted(batch)[known]
        by_position = plackett_luce.log_prob(base, places).double()
        per_slate = by_position.sum(1)
        above = by_position[:, :0]
        if ratio is RatioAssumption.CASCADE and batch.position_log_probs is not None:
            above = (by_position - batch.position_log_probs[batch.mask][known]).cumsum(1)[:, :-1]
        columns["prefixes"].append(above)
        columns["users"].append(batch.users[torch.nonzero(batch.mask)[:, 0]][known])
        columns["claimed"].append(batch.log_probs[batch.mask][known])
        columns["fitted"].append(per_slate)
        columns["groups"].append(_ranks(base, places, per_slate, generator) // 2)
        n_positions = (places >= 0).sum(1)
        for name, policy in targets.items():
            logits = policy.logits(policy.states(batch).select(flat), requests)[known]
            difference = torch.where(torch.isfinite(base), logits - base, 0.0)
            path = [base + strength * difference for strength in STRENGTHS]
            along[name].append(torch.stack([plackett_luce.log_prob(at, places).double().sum(1) for at in path]))
            moments[name].append(torch.stack([n_positions * plackett_luce.divergence(at, base) for at in path]))
    if not columns["users"]:
        return None
    return _Collected(
        **{name: torch.cat(parts).numpy() for name, parts in columns.items()},
        targets={name: torch.cat(parts, 1).numpy() for name, parts in along.items()},
        second_moments={name: torch.cat(parts, 1).double().numpy() for name, parts in moments.items()},
    )


def _ranks(
    logits: Float[Tensor, "M N"],
    places: Int[Tensor, "M K"],
    log_probs: Float[Tensor, " M"],
    generator: torch.Generator,
) -> Int[Tensor, " M"]:
    """How many of RANKED − 1 draws of the same length are less likely than each slate; ties are put in random order."""
    below = torch.zeros(len(places), dtype=torch.int64)
    own = torch.rand(len(places), generator=generator)
    for _ in range(RANKED - 1):
        drawn = plackett_luce.sample(logits, places.shape[1], generator)
        drawn = torch.where(places >= 0, drawn, -1)
        other = plackett_luce.log_prob(logits, drawn).double().sum(1)
        before = torch.rand(len(places), generator=generator) < own
        below += (other < log_probs) | ((other == log_probs) & before)
    return below
