"""The gate's word on a policy of continuous actions: the same gate, told by a log of actions.

*World model* and *exploit* ask about a model that was learned from such a log. A policy that learned in a simulator, or
in that very model, and lives off what is wrong there shows itself in the same way: the model promises what the log does
not support, or what the log cannot check, since the actions lie where nobody logged any.

Beside the verdict stands the same for the policy pulled back to the log's actions (`policies/pulled_back.py`): what is
left of it under the constraint that the log can judge it.
"""

from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field

from components.evaluation.action_evidence import ActionEvidence, StudiedLog, action_evidence
from components.evaluation.action_trust import probe_action_policy
from components.evaluation.exploit_probes import Probe, exploit_probes, probe_parts
from components.evaluation.policy_value import PolicyValue
from components.evaluation.trust_score import trust_score
from components.evaluation.world_model_trust import TrustConfig, WorldModelTrust
from components.experiment.evidence import GateEvidence, TrustSummary
from components.experiment.gate import Decision, GateConfig, decide
from components.policies.continuous_policy import ContinuousPolicy
from components.policies.pulled_back import PulledBack
from components.world_model.action_model import ActionModel


@dataclass(frozen=True)
class Judge:
    """A held-out log of actions, and the world model that was learned from others: what policies are judged by."""

    studied: StudiedLog
    model: ActionModel
    trust: WorldModelTrust
    gate: GateConfig
    limits: TrustConfig


class ContinuousVerdict(BaseModel):
    """What may be done with a policy of actions, and with what its log supports of it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    evidence: ActionEvidence
    probe: Probe | None = Field(description="By world model and log; None where the log gives no value.")
    decision: Decision
    pulled_back_evidence: ActionEvidence = Field(description="Of the policy pulled back to the log's actions.")
    pulled_back_decision: Decision


def judge_continuous(
    judge: Judge, policy: ContinuousPolicy, name: str, *, data_passed: bool | None, data_text: str = ""
) -> ContinuousVerdict:
    """The gate's word on a policy, and on the same policy pulled back to the log's actions.

    Args:
        judge: log and world model.
        policy: the challenger.
        name: of the challenger.
        data_passed: whether the log met its data checks; None, where they were not made, holds.
        data_text: what they saw.

    Raises:
        InputError: the policy's log-densities are no numbers.
    """
    evidence, probe, decision = judge_policy(judge, policy, name, data_passed, data_text)
    left, _, left_decision = judge_policy(
        judge, pulled_back(judge, policy), f"{name}, pulled back", data_passed, data_text
    )
    return ContinuousVerdict(
        evidence=evidence,
        probe=probe,
        decision=decision,
        pulled_back_evidence=left,
        pulled_back_decision=left_decision,
    )


def pulled_back(judge: Judge, policy: ContinuousPolicy) -> PulledBack:
    """The policy pulled back to where the log's effective sample size stays above the gate's floor."""
    return judge.studied.pulled_back(policy, _floor(judge))


def _floor(judge: Judge) -> float:
    return judge.gate.ess_floor(judge.studied.rewards.n_known)


def judge_policy(
    judge: Judge, policy: ContinuousPolicy, name: str, data_passed: bool | None, data_text: str = ""
) -> tuple[ActionEvidence, Probe | None, Decision]:
    """Evidence, probe and the gate's word on one policy as it is; arguments and errors are `judge_continuous`'s."""
    evidence, probe = action_evidence(judge.studied, policy, name), None
    if isinstance(evidence.value, PolicyValue):
        probe = probe_action_policy(judge.model, judge.studied, policy, evidence, _floor(judge))
    probes = () if probe is None else (probe,)
    record = exploit_probes(probes, name, judge.limits)
    trust = trust_score((*judge.trust.parts, *probe_parts(probes, record.agreement, name, judge.limits)))
    told = GateEvidence(
        challenger=name,
        champion_policy=None,
        ab_started=False,
        ratio_assumption=judge.studied.log.manifest.ratio_assumption,
        data_passed=data_passed,
        data_text=data_text,
        trust=TrustSummary(passed=trust.passed, score=trust.score, weakest=trust.weakest, reasons=trust.reasons),
        exploit=record.verdict,
        offline=evidence.value,
        cross_check=evidence.cross_check,
        propensities=judge.studied.densities,
    )
    return evidence, probe, decide(told, judge.gate)
