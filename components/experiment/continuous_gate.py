"""The gate's word on a policy of continuous actions, from a log of actions alone.

The gate's checks (`gate`) are asked as they are, but for three:

- *world model* and *exploit* ask about the learned model that a policy of slates was trained in. A policy of actions
  learns in a simulator or from the log; that it exploits a simulator shows in what the log cannot support, and this is
  asked by *support*: do nearly all of its actions lie where the log has some?
- *consistency of the logging probabilities* tests slates by their probabilities. Of densities it asks whether the
  Gaussian of the logged actions, whose weights hardly vary, has the mean weight 1.

Beside the verdict stands the same for the policy pulled back to the log's support (`action_support`): what is left of
it under the constraint that the log can judge it.
"""

from pydantic import BaseModel, ConfigDict, Field

from components.evaluation.action_evidence import ActionEvidence, StudiedLog, action_evidence
from components.evaluation.action_support import MOST_OUTSIDE, WITHIN, PulledBack
from components.evaluation.policy_value import PolicyValue
from components.evaluation.weights import ess_floor
from components.experiment.evidence import GateEvidence
from components.experiment.gate import Decision, GateConfig, Outcome, Reason, decide
from components.interactions.contract import RatioAssumption
from components.policies.continuous_policy import ContinuousPolicy

SUPPORT, CONSISTENCY = "support", "consistency of the logging probabilities"
#: Checks of `gate` that stand for others here, or for nothing.
REPLACED = frozenset({"world model", "exploit", CONSISTENCY})


class ContinuousVerdict(BaseModel):
    """What may be done with a policy of actions, and with what its log supports of it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    evidence: ActionEvidence
    decision: Decision
    pulled_back_evidence: ActionEvidence = Field(description="Of the policy pulled back to the log's support.")
    pulled_back_decision: Decision


def judge_continuous(
    studied: StudiedLog,
    policy: ContinuousPolicy,
    name: str,
    config: GateConfig,
    *,
    data_passed: bool | None,
    data_text: str = "",
) -> ContinuousVerdict:
    """The gate's word on a policy, and on the same policy pulled back to the log's support.

    Args:
        studied: the log that another policy wrote.
        policy: the challenger.
        name: of the challenger.
        config: what the gate asks for.
        data_passed: whether the log met its data checks; None, where they were not made, holds.
        data_text: what they saw.

    Raises:
        InputError: the policy's log-densities are no numbers.
    """
    constrained = pulled_back(studied, policy, config)
    evidence = action_evidence(studied, policy, name)
    constrained_evidence = action_evidence(studied, constrained, f"{name}, pulled back")
    return ContinuousVerdict(
        evidence=evidence,
        decision=decide_continuous(evidence, studied.densities, config, data_passed, data_text),
        pulled_back_evidence=constrained_evidence,
        pulled_back_decision=decide_continuous(constrained_evidence, studied.densities, config, data_passed, data_text),
    )


def pulled_back(studied: StudiedLog, policy: ContinuousPolicy, config: GateConfig) -> PulledBack:
    """The policy pulled back to where the log's effective sample size stays above the gate's floor."""
    floor = ess_floor(studied.rewards.n_known, config.ess_floor_requests, config.ess_floor_share)
    return studied.pulled_back(policy, floor)


def decide_continuous(
    evidence: ActionEvidence,
    densities: PolicyValue | None,
    config: GateConfig,
    data_passed: bool | None,
    data_text: str = "",
) -> Decision:
    """What may be done with a policy of actions, and why; without an A/B a canary at most.

    Args:
        evidence: what the log tells of the policy.
        densities: the estimate by whose mean weight the logged densities are tested.
        config: what the gate asks for.
        data_passed: whether the log met its data checks.
        data_text: what they saw.
    """
    told = GateEvidence(
        challenger=evidence.policy,
        champion_policy=None,
        ab_started=False,
        ratio_assumption=RatioAssumption.FULL_SLATE,
        data_passed=data_passed,
        data_text=data_text,
        offline=evidence.value,
        cross_check=evidence.cross_check,
    )
    asked = [reason for reason in decide(told, config).reasons if reason.check not in REPLACED]
    reasons = (*asked, _support(evidence), _consistency(densities, config))
    return Decision(
        outcome=min((reason.allows for reason in reasons), key=lambda allowed: allowed.rank), reasons=reasons
    )


def _support(evidence: ActionEvidence) -> Reason:
    support = evidence.support
    verdict = "within" if support.inside else "outside of"
    return _reason(
        SUPPORT,
        f"The challenger acts {verdict} what the log shows: {support.outside_share:.1%} of its actions lie farther out "
        f"than {WITHIN:.0%} of the logged ones, which end {support.radius:.2f} deviations from their mean (half of the "
        f"challenger's lie beyond {support.median_distance:.2f}); at most {MOST_OUTSIDE:.0%} may.",
        passed=support.inside,
    )


def _consistency(densities: PolicyValue | None, config: GateConfig) -> Reason:
    if densities is None or densities.mean_weight_lower is None or densities.mean_weight_upper is None:
        return _reason(CONSISTENCY, "Nothing tested whether the logged densities fit the actions.", passed=False)
    lower, upper = densities.mean_weight_lower, densities.mean_weight_upper
    near = lower <= 1 + config.weight_tolerance and upper >= 1 - config.weight_tolerance
    verdict = "are consistent with" if near else "cannot be those of"
    return _reason(
        CONSISTENCY,
        f"The logged densities {verdict} the actions: the mean weight of the {densities.policy} is "
        f"{densities.mean_weight:.3f} ({lower:.3f} to {upper:.3f}), where 1 is expected.",
        passed=near,
    )


def _reason(check: str, text: str, *, passed: bool) -> Reason:
    return Reason(check=check, passed=passed, allows=Outcome.PROMOTE if passed else Outcome.HOLD, text=text)
