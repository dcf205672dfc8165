"""What a run leaves to be read: `evidence.json`, `decision.json` and `lineage.json`."""

from datetime import datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from components.evaluation.cap_sensitivity import CapSensitivity
from components.evaluation.exploit_probes import ExploitProbes
from components.evaluation.policy_value import Estimate
from components.evaluation.propensity_check import PropensityCheck
from components.evaluation.support import SupportDistance
from components.evaluation.trust_score import TrustScore
from components.evaluation.world_model_trust import WorldModelTrust
from components.experiment.ab import AbResult
from components.experiment.gate import Decision
from components.experiment.ledger import LedgerSummary
from components.policies.policy_folder import DESCRIPTION, WEIGHTS
from components.validation.checks import DataChecks
from flows.config import LoopConfig

#: Files of a policy, whose bytes are its identity.
POLICY_FILES = (DESCRIPTION, WEIGHTS)


class Curve(BaseModel):
    """A learning curve."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    x: str = Field(description="What the steps are.")
    y: str = Field(description="What the values are, with their unit.")
    values: tuple[float, ...]


class Release(BaseModel):
    """How far along the path from the logging policy to the trained one the release lies."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    strength: float = Field(description="0: the logging policy; 1: the policy as trained.")
    validation_ess: float | None = Field(
        description="Effective requests on validation, of those with known rewards; None where there are no slates, or "
        "nothing was pulled back."
    )
    required_ess: float | None = Field(description="What the release had to keep on validation.")
    propensities_estimated: bool = Field(
        default=False, description="Whether the effective requests rest on fitted log_probs of the logging policy."
    )


class RankingQuality(BaseModel):
    """How well a policy predicts what users turned to, where value is not identified."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    policy: str
    hit_rate_1: float = Field(description="Share of requests whose clicked item the policy ranks first.")
    hit_rate_10: float = Field(description="Share of requests whose clicked item is among its first ten.")
    n_requests: int


class SplitSummary(BaseModel):
    """Size of one split."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    n_requests: int
    n_sessions: int


class Evidence(BaseModel):
    """Everything that the decision was made from, and what makes it understandable."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    loop: str
    source: str
    limits: tuple[str, ...] = Field(description="What the log cannot tell.")
    evidence_level: str
    ratio_assumption: str
    reward: str = Field(description="Name, version and weights of the reward, in one line.")
    data: DataChecks
    splits: tuple[SplitSummary, ...]
    trust: WorldModelTrust
    probes: ExploitProbes = Field(description="Policies whose value was asked of the world model and of the log.")
    trust_score: TrustScore = Field(description="Trust in the world model, from its report and the probes.")
    curves: tuple[Curve, ...]
    releases: dict[str, Release] = Field(description="By policy.")
    gating: Estimate = Field(description="One-request NCIS of the challenger: the estimate that gates.")
    estimates: tuple[Estimate, ...] = Field(
        description="All off-policy estimates: gating ones, session and literature NCIS."
    )
    cap_sensitivity: CapSensitivity | None = Field(
        default=None, description="The challenger's estimate along a grid of caps."
    )
    support: tuple[SupportDistance, ...] = Field(
        default=(), description="How far each policy lies from what the log shows; empty where there are no estimates."
    )
    propensity_check: PropensityCheck | None = Field(
        default=None,
        description="Whether the log's log_probs fit its slates; None where no estimate rests on them.",
    )
    ranking: tuple[RankingQuality, ...] = ()
    ab: AbResult | None
    ledger: LedgerSummary | None = Field(
        default=None, description="How right offline estimates were until this run, itself among them."
    )
    seconds: dict[str, float] = Field(description="Time that each stage took when it was computed.")


class Package(BaseModel):
    """What the packaging stage made."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    policy_tag: str = Field(description="The challenger in the model store.")
    baseline_tag: str = Field(description="The baseline in the model store.")
    bento_tag: str = Field(description="The Bento with which both travel.")
    policy_digest: str = Field(description="Digest of the challenger's files.")


class Forgotten(BaseModel):
    """That users' rows were deleted from what a run learned from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    users: int = Field(ge=1, description="Of how many users; one that was forgotten twice counts twice.")
    at: datetime = Field(description="When that happened last.")

    @property
    def text(self) -> str:
        """The mark as a sentence."""
        users = "1 user" if self.users == 1 else f"{self.users:,} users"
        return f"Not replayable: rows of {users} were deleted from its data, last on {self.at:%Y-%m-%d}."


class Lineage(BaseModel):
    """What the result depends on; the same lineage trains the same policy again."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: str
    started: datetime
    config: LoopConfig
    data_digest: str = Field(description="Canonical digest of the log's content.")
    dvc_digest: str | None = Field(description="DVC's digest of the imported folder; None outside a DVC repository.")
    code_digest: str
    lock_digest: str
    commit: str | None
    path: str | None = Field(
        default=None,
        description="File or folder that the source read; null for a simulator and the endpoint's own log.",
    )
    seed: int
    threads: int
    stages: dict[str, str] = Field(description="Key of each stage.")
    reused: tuple[str, ...] = Field(description="Stages that an earlier run had finished.")
    policy_digest: str = Field(description="Digest of the released policy's files.")
    policy_tag: str | None = Field(
        description="Tag of the packaged policy in the model store; null for actions, which nothing serves."
    )
    baseline_tag: str | None = Field(description="Tag of the packaged baseline, as for the policy.")
    bento_tag: str | None = Field(description="Tag of the Bento with which both travel, as for the policy.")
    forgotten: Forgotten | None = Field(
        default=None, description="Null while the lineage can be replayed; what was deleted from its data since."
    )


class RunSummary(BaseModel):
    """A run in one line."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: str
    loop: str
    source: str
    started: datetime
    outcome: Literal["hold", "canary", "promote"]
    folder: str


def outcome_of(decision: Decision) -> Literal["hold", "canary", "promote"]:
    """The decision's outcome as a word."""
    return decision.outcome.value
