"""The records of off-policy evaluation: what a policy is worth, by how much it differs, or why neither can be known."""

from enum import StrEnum
from typing import Annotated, Literal, NotRequired, TypedDict

from pydantic import BaseModel, ConfigDict, Field

from components.evaluation.logged_requests import KnownRewards
from components.interactions.contract import Evidence, RatioAssumption


class Estimand(StrEnum):
    """What an estimate is an estimate of."""

    ONE_REQUEST = "one_request"
    """Mean over logged requests of E[reward | logged state, slate ~ target]: the state stays the logging policy's."""
    SESSION = "session"
    """E[summed reward of a session] when the target policy answers each of its requests."""
    SESSION_AVERAGE = "session_average"
    """Mean over sessions of a weighted mean reward within each: what literature NCIS gives, and no policy's value."""


class About(TypedDict):
    """What an estimate is about, besides the log: the same keywords for every estimator."""

    policy: str
    """Name of the target policy."""
    ratio: RatioAssumption
    """Which importance ratio is used."""
    propensities_estimated: NotRequired[bool]
    """Whether the behavior log_probs were fitted; not where it is left out."""
    confidence: NotRequired[float]
    """Of the intervals; 0.95 where it is left out."""


class PolicyValue(BaseModel):
    """What a policy is worth, from a log that another one wrote. A bound is None where none can be claimed."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    kind: Literal["value"] = "value"
    policy: str = Field(description="The target policy: the one that is judged.")
    estimator: str = Field(description="Name of the estimator.")
    estimand: Estimand = Field(description="What this is an estimate of.")
    ratio: RatioAssumption = Field(description="Which importance ratio was used.")
    value: float = Field(description="The estimate, in units of the log's reward.")
    lower: float | None = Field(description="Lower end of the value's interval.")
    upper: float | None = Field(description="Upper end of the value's interval.")
    confidence: float = Field(
        gt=0, lt=1, description="How often intervals made this way hold the truth, where there are any."
    )
    effective_sample_size: float = Field(
        ge=0, description="Kish's effective number of `n_units`; with the cascade, that of its positions together."
    )
    n_requests: int = Field(ge=1, description="Requests that the estimate is made from.")
    unknown_share: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Share of the log's requests that were left out: a reward of theirs or their session's is unknown.",
    )
    n_units: int = Field(ge=1, description="What the weights are counted over: requests, or sessions for `session`.")
    n_users: int = Field(ge=1, description="Users of the log: the clusters of every interval.")
    cap: float = Field(gt=0, description="Largest weight allowed.")
    cap_share: float = Field(ge=0, le=1, description="Share of requests whose weight was cut to the cap.")
    max_weight: float = Field(ge=0, description="Largest weight after capping.")
    mean_weight: float = Field(
        ge=0, description="Mean weight before capping; 1 in expectation when propensities are right."
    )
    mean_weight_lower: float | None = Field(description="Lower end of the mean weight's interval.")
    mean_weight_upper: float | None = Field(description="Upper end of the mean weight's interval.")
    behavior_value: float = Field(description="Logged mean of the same estimand: what the behavior policy earned.")
    difference: float = Field(description="Value minus behavior value.")
    difference_lower: float | None = Field(description="Lower end of the difference's interval, paired by user.")
    difference_upper: float | None = Field(description="Upper end of the difference's interval, paired by user.")
    propensities_estimated: bool = Field(description="Whether the logging policy's log_probs were fitted, not logged.")
    interval: Literal["user-clustered delta method", "none"] = Field(description="How the intervals were made.")


class NotIdentified(BaseModel):
    """No estimate exists: the log cannot tell what the policy is worth, whatever is computed from it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["not_identified"] = "not_identified"
    policy: str = Field(description="The target policy.")
    estimand: Estimand = Field(description="What was asked for.")
    reason: str = Field(description="Why it cannot be known, in one sentence.")


Estimate = Annotated[PolicyValue | NotIdentified, Field(discriminator="kind")]


class PolicyDifference(BaseModel):
    """Value of one target policy minus that of another, from the same log and paired by user."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    policy: str = Field(description="The policy that asks to serve.")
    reference: str = Field(description="The policy it is compared with.")
    estimand: Estimand = Field(description="What the values are estimates of.")
    difference: float = Field(description="Value of `policy` minus value of `reference`.")
    lower: float | None = Field(description="Lower end of the difference's interval.")
    upper: float | None = Field(description="Upper end of the difference's interval.")
    confidence: float = Field(gt=0, lt=1, description="How often such intervals hold the truth.")
    n_users: int = Field(ge=1, description="Users of the log: the clusters of the interval.")


def identify(evidence: Evidence, rewards: KnownRewards, *, propensities_estimated: bool = False) -> str | None:
    """Why a log cannot tell the value of a policy other than its own, in one sentence; None where it can.

    Args:
        evidence: what the log's manifest says.
        rewards: what is known of them.
        propensities_estimated: whether log_probs were fitted for a log that has slates without them.
    """
    if evidence is Evidence.CLICKS:
        return "The log holds clicks only and not the slates that were shown, so no other policy can be judged on it."
    if evidence is Evidence.SLATES and not propensities_estimated:
        return "The log does not say with which probability its slates were shown, and no estimate of it was given."
    if rewards.n_known == 0:
        return "No request's reward is known: feedback that it weighs is missing everywhere."
    if rewards.lowest == rewards.highest:
        return (
            f"Every logged request has the reward {rewards.lowest:g}: the log does not vary in what is to be "
            "optimized, so every policy would get the same value."
        )
    return None
