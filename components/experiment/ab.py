"""A/B comparison of two policies on the users each of them served.

The estimand is the mean reward of a session; `arm.py` says how an arm's mean and its variance come from its users. The
arms are independent, so the variance of their difference is the sum of theirs (Welch), and bounds at the planned end
use Student's t with Welch and Satterthwaite's degrees of freedom. An A/B that could be acted upon before its planned
end is judged by its confidence sequence instead (`sequential.py`).
"""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int
from pydantic import BaseModel, ConfigDict, Field, model_validator
from scipy import stats

from components.errors import InputError
from components.experiment.arm import ArmMean, Bounds, Contrast, arm_sums, fixed_bounds
from components.experiment.covariate import CovariateAdjustment, adjust_by_covariate
from components.experiment.guardrails import Guardrail, GuardrailVerdict, Metric, judge_guardrail
from components.experiment.sequential import ConfidenceSequence, confidence_sequence

AbLabel = Literal["live", "true simulator", "simulated in a world model"]

#: With which probability an A/B should find the difference that is called detectable.
POWER = 0.8
#: Of an arm: with one there is no variance between users.
FEWEST_USERS = 2
#: How many salted hashes there are.
HASHES = 2**64


class AbResult(BaseModel):
    """What an A/B showed. Differences are treatment minus control, in reward per session."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    label: AbLabel = Field(description="Who the users were; users simulated by a learned model are weaker evidence.")
    treatment: str = Field(description="The policy that asks to serve.")
    control: str = Field(description="The policy that it is compared with.")
    treatment_users: int = Field(ge=2, description="Users whom the treatment served.")
    control_users: int = Field(ge=2, description="Users whom the control served.")
    treatment_sessions: int = Field(ge=2, description="Sessions of the treatment's users.")
    control_sessions: int = Field(ge=2, description="Sessions of the control's users.")
    planned_share: float = Field(gt=0, lt=1, description="Share of users that was meant to get the treatment.")
    treatment_mean: float = Field(
        description="Mean reward of a session under the treatment, adjusted where there is an adjustment."
    )
    control_mean: float = Field(description="Mean reward of a session under the control, adjusted likewise.")
    difference: float = Field(description="Treatment mean minus control mean.")
    lower: float = Field(description="Lower end of the difference's interval.")
    upper: float = Field(description="Upper end of the difference's interval.")
    confidence: float = Field(gt=0, lt=1, description="How often such intervals hold the true difference.")
    relative_difference: float | None = Field(description="Difference over control mean; None where that is 0.")
    sample_ratio_p_value: float = Field(
        ge=0, le=1, description="How likely shares at least this far from the plan are when users were assigned by it."
    )
    minimum_detectable_effect: float = Field(
        ge=0, description="Smallest true difference that an A/B of this size finds with 80 % probability."
    )
    conclusive: bool = Field(description="Whether the interval leaves out 0.")
    standard_error: float = Field(ge=0, description="Of the difference, clustered by user.")
    degrees_of_freedom: float = Field(gt=0, description="Of the difference's Student t: Welch and Satterthwaite's.")
    adjustment: CovariateAdjustment | None = Field(
        default=None,
        description="How means were adjusted by what users earned before the A/B; None where they were not.",
    )
    guardrails: tuple[Guardrail, ...] = Field(default=(), description="Metrics that the treatment must not harm.")
    replayed: tuple[Metric, ...] = Field(
        default=(),
        description="Metrics that simulated sessions take from logged ones, whatever the policy: they tell nothing.",
    )
    sequence: ConfidenceSequence | None = Field(
        default=None, description="Looks at the difference, day by day and without adjustment."
    )
    looked_early: bool = Field(
        default=False,
        description="Whether the A/B could be acted upon before its planned end: the last look then counts, "
        "in bounds that hold at every look.",
    )

    def bounds(self, level: float) -> Bounds | None:
        """One-sided bounds on the difference, each wrong with at most this probability however the A/B was looked at.

        None where it was looked at early and there is no confidence sequence.
        """
        if self.looked_early:
            return None if self.sequence is None else self.sequence.bounds(level)
        half_width = float(stats.t.ppf(1 - level, self.degrees_of_freedom)) * self.standard_error
        return Bounds(self.difference - half_width, self.difference + half_width)

    def judge(self, guardrail: Guardrail, margin: float, level: float) -> GuardrailVerdict | None:
        """A guardrail against its margin, in the bounds that count; None where `bounds` gives none."""
        if not self.looked_early:
            return judge_guardrail(guardrail, margin, level)
        if self.sequence is None:
            return None
        return judge_guardrail(guardrail, margin, level, self.sequence.planned_sessions)

    @model_validator(mode="after")
    def _only_simulations_replay(self) -> "AbResult":
        if self.replayed and self.label != "simulated in a world model":
            raise ValueError(f"replayed: {self.replayed[0].value} in an A/B that is {self.label!r}; expected none")
        return self

    @model_validator(mode="after")
    def _conclusive_by_its_interval(self) -> "AbResult":
        if self.conclusive != (self.lower > 0 or self.upper < 0):
            raise ValueError(f"conclusive: {self.conclusive} contradicts the interval {self.lower:g} to {self.upper:g}")
        return self


class Assignment:
    """Where users' salted hashes lie among all hashes: the same on every machine and in every version.

    A user who is in at one share is in at every larger one, so a rollout that grows takes nobody out. Different salts
    give independent assignments.

    Raises:
        InputError: the salt is empty.
    """

    def __init__(self, salt: str) -> None:
        if not salt:
            raise InputError(
                "salt: is empty; expected the experiment's name, so that no two experiments share their arms"
            )
        self._salted = hashlib.blake2b(len(salt.encode()).to_bytes(4, "big") + salt.encode(), digest_size=8)

    def is_lowest(self, user_id: str, share: float) -> bool:
        """Whether a user's hash falls into the lowest share of all hashes."""
        return self.place(user_id) < _threshold(share)

    def is_highest(self, user_id: str, share: float) -> bool:
        """Whether a user's hash falls into the highest share: never one of the lowest, where both sum to at most 1."""
        return self.place(user_id) >= HASHES - _threshold(share)

    def place(self, user_id: str) -> int:
        """A user's hash, from 0 to `HASHES` − 1."""
        digest = self._salted.copy()
        digest.update(user_id.encode())
        return int.from_bytes(digest.digest(), "big")


def _threshold(share: float) -> int:
    if not 0 <= share <= 1:
        raise InputError(f"share: {share} lies outside 0 to 1")
    return int(share * HASHES)


def assign_arm(user_ids: Iterable[str], *, salt: str, share: float) -> Bool[np.ndarray, " U"]:
    """Which users get the treatment: those whose salted hash falls into the lowest share of all hashes.

    Raises:
        InputError: the salt is empty or the share lies outside 0 to 1.
    """
    assignment = Assignment(salt)
    threshold = _threshold(share)
    return np.fromiter((assignment.place(user_id) < threshold for user_id in user_ids), dtype=bool)


def analyze_ab(
    user: Int[np.ndarray, " S"],
    rewards: Float[np.ndarray, " S"],
    treated: Bool[np.ndarray, " S"],
    *,
    label: AbLabel,
    treatment: str,
    control: str,
    planned_share: float,
    confidence: float = 0.95,
    covariate: Float[np.ndarray, " S"] | None = None,
    metrics: Mapping[Metric, Float[np.ndarray, " S"]] | None = None,
    replayed: tuple[Metric, ...] = (),
    day: Int[np.ndarray, " S"] | None = None,
    planned_sessions: int | None = None,
    looked_early: bool = False,
) -> AbResult:
    """Compare two arms from their sessions.

    Args:
        user: code of each session's user.
        rewards: summed reward of each session.
        treated: whether the session's user was assigned to the treatment.
        label: who the users were.
        treatment: name of the policy that asks to serve.
        control: name of the policy that it is compared with.
        planned_share: share of users that was meant to get the treatment.
        confidence: of the intervals.
        covariate: mean reward of each session's user before the A/B, NaN where the user is new; reduces the variance.
        metrics: guarded metrics of each session.
        replayed: of them, those that the sessions took from a log whatever the policy; they are not compared.
        day: of each session, from 0; the difference is then looked at as it stood at each day's end.
        planned_sessions: sessions of both arms that were planned before the A/B began; those that there are, where
            nothing is given.
        looked_early: whether anyone could act on the A/B before its planned end.

    Raises:
        InputError: arrays do not fit each other, rewards or metrics are not finite, a user is in both arms or has two
            pasts, the A/B was looked at early without a plan, an arm has fewer than two users, or the planned share
            does not lie between 0 and 1.
    """
    if not (user.ndim == 1 and user.shape == rewards.shape == treated.shape):
        raise InputError(
            f"A/B: user, rewards and treated have shapes {user.shape}, {rewards.shape} and {treated.shape}; "
            "expected one value per session in each"
        )
    columns = {"covariate": covariate, "day": day, **{metric.value: part for metric, part in (metrics or {}).items()}}
    for name, column in columns.items():
        if column is not None and column.shape != user.shape:
            raise InputError(
                f"A/B: {name} has shape {column.shape}; expected one value for each of {len(user)} sessions"
            )
    for name, values in {
        "rewards": rewards,
        **{metric.value: part for metric, part in (metrics or {}).items()},
    }.items():
        if not np.isfinite(values).all():
            raise InputError(f"A/B: {np.count_nonzero(~np.isfinite(values))} {name} are not finite; expected numbers")
    if day is not None and (day < 0).any():
        raise InputError(f"A/B: day {day.min()} lies before the first, which is 0")
    if looked_early and planned_sessions is None:
        raise InputError(
            "A/B: planned_sessions is missing; bounds that hold at every look need a plan from before the A/B began"
        )
    if not 0 < planned_share < 1:
        raise InputError(f"planned_share: {planned_share} does not lie between 0 and 1")
    users, firsts, codes = np.unique(user, return_index=True, return_inverse=True)
    n_sessions = np.bincount(codes)
    n_treated = np.bincount(codes, treated)
    if (mixed := (n_treated > 0) & (n_treated < n_sessions)).any():
        raise InputError(
            f"A/B: {np.count_nonzero(mixed)} users are in both arms, first user {users[np.argmax(mixed)]}; "
            "expected one arm per user"
        )
    treatment_arm = _arm_mean(codes[treated], rewards[treated], f"treatment {treatment}")
    control_arm = _arm_mean(codes[~treated], rewards[~treated], f"control {control}")
    adjustment = None
    if covariate is not None:
        past = covariate[firsts]
        if not np.array_equal(past[codes], covariate, equal_nan=True):
            raise InputError("A/B: covariate differs between sessions of one user; expected the user's past in each")
        totals = np.bincount(codes, rewards)
        adjusted = adjust_by_covariate(totals, n_sessions, past, n_treated > 0, treatment_arm, control_arm)
        if adjusted is not None:
            treatment_arm, control_arm, adjustment = adjusted.treatment, adjusted.control, adjusted.adjustment
    contrast = Contrast.between(treatment_arm, control_arm)
    interval = fixed_bounds(contrast, (1 - confidence) / 2)
    sequence = None
    if day is not None:
        planned = len(user) if planned_sessions is None else planned_sessions
        sequence = confidence_sequence(codes, day, rewards, treated, planned_sessions=planned, confidence=confidence)
    n_users = len(users)
    sample_ratio = stats.chisquare(
        [treatment_arm.n_users, control_arm.n_users], [n_users * planned_share, n_users * (1 - planned_share)]
    )
    return AbResult(
        label=label,
        treatment=treatment,
        control=control,
        treatment_users=treatment_arm.n_users,
        control_users=control_arm.n_users,
        treatment_sessions=treatment_arm.n_sessions,
        control_sessions=control_arm.n_sessions,
        planned_share=planned_share,
        treatment_mean=treatment_arm.mean,
        control_mean=control_arm.mean,
        difference=contrast.value,
        lower=interval.lower,
        upper=interval.upper,
        confidence=confidence,
        relative_difference=contrast.value / control_arm.mean if control_arm.mean else None,
        sample_ratio_p_value=float(sample_ratio.pvalue),
        minimum_detectable_effect=float(stats.norm.ppf((1 + confidence) / 2) + stats.norm.ppf(POWER))
        * contrast.standard_error,
        conclusive=interval.lower > 0 or interval.upper < 0,
        standard_error=contrast.standard_error,
        degrees_of_freedom=contrast.degrees,
        adjustment=adjustment,
        guardrails=tuple(
            Guardrail(
                metric=metric,
                treatment=arm_sums(codes[treated], values[treated]).mean(),
                control=arm_sums(codes[~treated], values[~treated]).mean(),
            )
            for metric, values in (metrics or {}).items()
            if metric not in replayed
        ),
        replayed=replayed,
        sequence=sequence,
        looked_early=looked_early,
    )


def _arm_mean(user: Int[np.ndarray, " S"], rewards: Float[np.ndarray, " S"], name: str) -> ArmMean:
    sums = arm_sums(user, rewards)
    if sums.n_users < FEWEST_USERS:
        raise InputError(f"A/B: {name} has {sums.n_users} users; an interval needs at least {FEWEST_USERS} in each arm")
    return sums.mean()
