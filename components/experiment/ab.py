"""A/B comparison of two policies on the users each of them served.

The estimand is the mean reward of a session. Users are assigned, and one user's sessions depend on each other, so an
arm's mean is a ratio of sums over its U users and its variance is clustered by user (delta method):

    m = Σ_u R_u / Σ_u n_u        Var m = U / (U − 1) Σ_u (R_u − m n_u)² / (Σ_u n_u)²

with R_u the summed reward and n_u the number of sessions of user u. The arms are independent, so the variance of their
difference is the sum of theirs (Welch), and bounds use Student's t with Welch and Satterthwaite's degrees of freedom.
"""

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int
from pydantic import BaseModel, ConfigDict, Field, model_validator
from scipy import stats

from components.errors import InputError

AbLabel = Literal["live", "true simulator", "simulated in a world model"]

#: With which probability an A/B should find the difference that is called detectable.
POWER = 0.8


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
    treatment_mean: float = Field(description="Mean reward of a session under the treatment.")
    control_mean: float = Field(description="Mean reward of a session under the control.")
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

    @model_validator(mode="after")
    def _conclusive_by_its_interval(self) -> "AbResult":
        if self.conclusive != (self.lower > 0 or self.upper < 0):
            raise ValueError(f"conclusive: {self.conclusive} contradicts the interval {self.lower:g} to {self.upper:g}")
        return self


def assign_arm(user_ids: Iterable[str], *, salt: str, share: float) -> Bool[np.ndarray, " U"]:
    """Which users get the treatment: those whose salted hash falls into the lowest share of all hashes.

    The same on every machine and in every version. A user who is in at one share is in at every larger one, so a
    rollout that grows takes nobody out. Different salts give independent assignments.

    Raises:
        InputError: the salt is empty or the share lies outside 0 to 1.
    """
    if not salt:
        raise InputError("salt: is empty; expected the experiment's name, so that no two experiments share their arms")
    if not 0 <= share <= 1:
        raise InputError(f"share: {share} lies outside 0 to 1")
    salted = hashlib.blake2b(len(salt.encode()).to_bytes(4, "big") + salt.encode(), digest_size=8)
    threshold = int(share * 2**64)
    return np.fromiter((_hash(salted, user_id) < threshold for user_id in user_ids), dtype=bool)


def _hash(salted: "hashlib.blake2b", user_id: str) -> int:
    digest = salted.copy()
    digest.update(user_id.encode())
    return int.from_bytes(digest.digest(), "big")


@dataclass(frozen=True)
class _Arm:
    n_users: int
    n_sessions: int
    mean: float
    variance: float
    """Of the mean."""

    @classmethod
    def of(cls, totals: Float[np.ndarray, " U"], n_sessions: Int[np.ndarray, " U"], name: str) -> "_Arm":
        n_users = len(totals)
        if n_users < 2:
            raise InputError(f"A/B: {name} has {n_users} users; an interval needs at least 2 in each arm")
        mean = totals.sum() / n_sessions.sum()
        residuals = totals - mean * n_sessions
        variance = n_users / (n_users - 1) * np.square(residuals).sum() / n_sessions.sum() ** 2
        return cls(n_users, int(n_sessions.sum()), float(mean), float(variance))


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
        confidence: of the interval.

    Raises:
        InputError: arrays do not fit each other, rewards are not finite, a user is in both arms, an arm has fewer than
            two users, or the planned share does not lie between 0 and 1.
    """
    if not (user.ndim == 1 and user.shape == rewards.shape == treated.shape):
        raise InputError(
            f"A/B: user, rewards and treated have shapes {user.shape}, {rewards.shape} and {treated.shape}; "
            "expected one value per session in each"
        )
    if not np.isfinite(rewards).all():
        raise InputError(f"A/B: {np.count_nonzero(~np.isfinite(rewards))} rewards are not finite; expected numbers")
    if not 0 < planned_share < 1:
        raise InputError(f"planned_share: {planned_share} does not lie between 0 and 1")
    users, codes = np.unique(user, return_inverse=True)
    n_sessions = np.bincount(codes)
    n_treated = np.bincount(codes, treated)
    if (mixed := (n_treated > 0) & (n_treated < n_sessions)).any():
        raise InputError(
            f"A/B: {np.count_nonzero(mixed)} users are in both arms, first user {users[np.argmax(mixed)]}; "
            "expected one arm per user"
        )
    in_treatment = n_treated > 0
    totals = np.bincount(codes, rewards)
    treatment_arm = _Arm.of(totals[in_treatment], n_sessions[in_treatment], f"treatment {treatment}")
    control_arm = _Arm.of(totals[~in_treatment], n_sessions[~in_treatment], f"control {control}")

    difference = treatment_arm.mean - control_arm.mean
    variance = treatment_arm.variance + control_arm.variance
    deviation = math.sqrt(variance)
    half_width = 0.0
    if variance > 0:
        degrees = variance**2 / (
            treatment_arm.variance**2 / (treatment_arm.n_users - 1)
            + control_arm.variance**2 / (control_arm.n_users - 1)
        )
        half_width = float(stats.t.ppf((1 + confidence) / 2, degrees)) * deviation
    n_users = len(users)
    sample_ratio = stats.chisquare(
        [treatment_arm.n_users, control_arm.n_users], [n_users * planned_share, n_users * (1 - planned_share)]
    )
    lower, upper = difference - half_width, difference + half_width
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
        difference=difference,
        lower=lower,
        upper=upper,
        confidence=confidence,
        relative_difference=difference / control_arm.mean if control_arm.mean else None,
        sample_ratio_p_value=float(sample_ratio.pvalue),
        minimum_detectable_effect=float(stats.norm.ppf((1 + confidence) / 2) + stats.norm.ppf(POWER)) * deviation,
        conclusive=lower > 0 or upper < 0,
    )
