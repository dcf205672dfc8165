"""What the gate is told about a challenger: one small record per stage, and None where a stage gave none."""

from pydantic import BaseModel, ConfigDict, Field, model_validator

from components.evaluation.exploit_probes import ExploitVerdict
from components.evaluation.policy_value import Estimate, PolicyDifference
from components.evaluation.propensity_check import PropensityCheck
from components.experiment.ab import AbResult
from components.interactions.contract import RatioAssumption


class TrustSummary(BaseModel):
    """Whether the world model that the challenger was trained in may be trusted."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    passed: bool = Field(description="Whether every check of the world model held.")
    score: float | None = Field(default=None, ge=0, le=1, description="The smallest of its parts' scores.")
    weakest: str | None = Field(default=None, description="The part that the score is of.")
    reasons: tuple[str, ...] = Field(default=(), description="What was checked and seen, in sentences.")


class GateEvidence(BaseModel):
    """Everything that the gate decides from.

    What *exists* (who serves now, whether an A/B was started) is stated apart from the records, so that leaving out a
    record that speaks against the challenger never helps it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    challenger: str = Field(description="The policy that asks to serve.")
    champion_policy: str | None = Field(description="The policy that serves now; None where none does.")
    ab_started: bool = Field(description="Whether an A/B of the challenger was started.")
    ratio_assumption: RatioAssumption = Field(description="Which importance ratio is valid for the log.")
    data_passed: bool | None = Field(default=None, description="Whether the log met its data checks.")
    data_text: str = Field(default="", description="What the data checks saw, in one sentence.")
    trust: TrustSummary | None = Field(default=None, description="The world model's trust report.")
    exploit: ExploitVerdict | None = Field(
        default=None, description="Whether the log supports what the world model promises of the challenger."
    )
    offline: Estimate | None = Field(default=None, description="One-request NCIS of the challenger.")
    cross_check: Estimate | None = Field(default=None, description="DR of the challenger on the same log.")
    champion: Estimate | None = Field(default=None, description="One-request NCIS of the champion on the same log.")
    comparison: PolicyDifference | None = Field(
        default=None, description="Challenger minus champion on the same log, paired by user."
    )
    propensities: PropensityCheck | None = Field(
        default=None, description="Whether the log's log_probs are consistent with the slates that were shown."
    )
    ab: AbResult | None = Field(default=None, description="The A/B of the challenger.")

    @model_validator(mode="after")
    def _about_these_policies(self) -> "GateEvidence":
        named = {
            "exploit": (self.exploit and self.exploit.policy, self.challenger),
            "offline": (self.offline and self.offline.policy, self.challenger),
            "cross_check": (self.cross_check and self.cross_check.policy, self.challenger),
            "champion": (self.champion and self.champion.policy, self.champion_policy),
            "comparison.policy": (self.comparison and self.comparison.policy, self.challenger),
            "comparison.reference": (self.comparison and self.comparison.reference, self.champion_policy),
            "ab.treatment": (self.ab and self.ab.treatment, self.challenger),
        }
        if self.champion_policy is not None:
            # Guardrails and gain are relative to the control: it has to be what serves.
            named["ab.control"] = (self.ab and self.ab.control, self.champion_policy)
        for record, (seen, expected) in named.items():
            if seen is not None and seen != expected:
                raise ValueError(f"{record}: is about policy {seen!r}; expected {expected!r}")
        if self.ab is not None and not self.ab_started:
            raise ValueError("ab_started: is false, yet there is the result of an A/B")
        return self
