"""The gate: a pure function from evidence to hold, canary or promote, with its reasons.

Each check states the most that it allows, and the outcome is the least of these:

=================  ==================================================================  ==============
check              asks                                                                else at most
=================  ==================================================================  ==============
data               did the log meet its data checks                                    hold
world model        may the world model be trusted                                      hold
exploit            does the log support what the world model promises of it            hold
identification     can the log tell the challenger's value at all                      hold
estimand           is the estimate of one request's reward                             hold
ratio              is the importance ratio valid for this log                          hold
cap                were weights capped no lower than √n                                hold
feedback           is the reward of all but few requests known                         hold
sample size        is the effective sample size at its floor                           hold
weights            is the mean weight near the 1 that it should be                     hold
cross-check        does the world model, mended by the log (DR), say the same          hold
gain               does the challenger beat what serves now, by its interval           hold
propensities       were the logging probabilities logged, not fitted                   canary
consistency        can the slates have been shown with these probabilities             hold
A/B                was there one, sound, above 0, in live traffic or a true simulator  hold or canary
guardrails         did the A/B show each guarded metric to be within its margin        hold or canary
=================  ==================================================================  ==============

Estimand, ratio, cap, feedback, sample size and weights are asked of the champion's estimate too. Missing evidence
holds. Every setting can make the gate stricter than the defaults and none can make it milder, so no flag approves.

The A/B is judged by one-sided bounds at `ab_level`: of challengers that equal the control at most that share passes
(3 % by default), at the planned end of an A/B that nobody could act upon before, and at any look of one that somebody
could. Guardrails only lower that share.
"""

from collections.abc import Iterator
from enum import StrEnum

from pydantic import BaseModel, ConfigDict, Field

from components.evaluation.policy_value import Estimand, NotIdentified, PolicyValue
from components.evaluation.propensity_check import FINDING_P_VALUE, PropensityCheck
from components.evaluation.weights import default_cap, ess_floor
from components.experiment.ab import AbResult
from components.experiment.evidence import GateEvidence
from components.experiment.guardrails import GuardrailMargins, Metric
from components.interactions.contract import RatioAssumption


class Outcome(StrEnum):
    """What may be done with a challenger."""

    HOLD = "hold"
    """It does not serve."""
    CANARY = "canary"
    """It may serve a small share of users, compared with what serves now."""
    PROMOTE = "promote"
    """It may take the champion's place."""

    @property
    def rank(self) -> int:
        """0 for hold, 1 for canary, 2 for promote."""
        return list(Outcome).index(self)


class GateConfig(BaseModel):
    """What evidence must reach. Bounds let every setting be made stricter than its default, never milder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ess_floor_requests: float = Field(default=500.0, ge=500, description="Smallest effective sample size that counts.")
    ess_floor_share: float = Field(
        default=0.01, ge=0.01, le=1, description="The same as a share of the log's requests; the larger of both holds."
    )
    min_difference: float = Field(
        default=0.0,
        ge=0,
        description="Reward per request by which the whole offline interval must exceed what serves now.",
    )
    confidence: float = Field(
        default=0.95, ge=0.95, lt=1, description="Confidence that offline intervals must have been made for."
    )
    weight_tolerance: float = Field(
        default=0.1, gt=0, le=0.1, description="How far the whole interval of the mean weight may lie from 1."
    )
    max_unknown_share: float = Field(
        default=0.05,
        ge=0,
        le=0.05,
        description="Share of requests with unknown reward up to which the others are taken to speak for them.",
    )
    sample_ratio_p_value: float = Field(
        default=0.001, ge=0.001, le=0.5, description="An A/B whose sample-ratio check falls below this is unsound."
    )
    ab_level: float = Field(
        default=0.03,
        gt=0,
        le=0.03,
        description="How often a challenger that equals the control passes the A/B: level of its one-sided bounds.",
    )
    guardrails: GuardrailMargins = GuardrailMargins()
    propensity_p_value: float = Field(
        default=FINDING_P_VALUE,
        ge=FINDING_P_VALUE,
        le=0.5,
        description="Logging probabilities are wrong where the least likely of all tests of them falls below this.",
    )

    def ess_floor(self, n: int) -> float:
        """Effective sample size from which an estimate on n requests counts."""
        return ess_floor(n, self.ess_floor_requests, self.ess_floor_share)


class Reason(BaseModel):
    """One check: what it saw, and the most that it allows."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    check: str = Field(description="Name of the check.")
    passed: bool = Field(description="Whether nothing seen here stands against promotion.")
    allows: Outcome = Field(description="The highest outcome that this check allows.")
    text: str = Field(description="What was seen, in a sentence with its numbers.")


class Decision(BaseModel):
    """The gate's outcome: the lowest that any of its reasons allows."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    outcome: Outcome = Field(description="Hold, canary or promote.")
    reasons: tuple[Reason, ...] = Field(description="Every check that was made, in order.")


class GateRecord(BaseModel):
    """What a policy carries with it, so that whoever releases it can judge it again, with what came to light since."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    evidence: GateEvidence = Field(description="All that the gate was told.")
    config: GateConfig = Field(description="What it asked for.")

    def decision(self) -> Decision:
        """What the gate said of the challenger before it served anybody."""
        return decide(self.evidence, self.config)

    def live_decision(self, ab: AbResult | None) -> Decision:
        """What the gate says of it by its A/B in live traffic, which takes the place of a simulated one.

        Args:
            ab: None where there is no result yet, which holds.

        Raises:
            ValueError: the A/B is of another policy.
        """
        told = {name: getattr(self.evidence, name) for name in GateEvidence.model_fields}
        return decide(GateEvidence(**told | {"ab": ab, "ab_started": True}), self.config)


def decide(evidence: GateEvidence, config: GateConfig) -> Decision:
    """What may be done with the challenger, and why. Offline evidence alone never leads past canary."""
    reasons = (
        _data(evidence),
        _trust(evidence),
        *_exploit(evidence),
        *_offline(evidence, config),
        _ab(evidence, config),
        *_guardrails(evidence, config),
    )
    return Decision(
        outcome=min((reason.allows for reason in reasons), key=lambda allowed: allowed.rank), reasons=reasons
    )


def decide_offline(evidence: GateEvidence, config: GateConfig) -> Decision:
    """What the gate says of the same evidence before there is any A/B: hold, or a canary."""
    return decide(evidence.model_copy(update={"ab": None, "ab_started": False}), config)


def _reason(check: str, text: str, *, passed: bool, otherwise: Outcome = Outcome.HOLD) -> Reason:
    return Reason(check=check, passed=passed, allows=Outcome.PROMOTE if passed else otherwise, text=text)


def _data(evidence: GateEvidence) -> Reason:
    if evidence.data_passed is None:
        return _reason("data", "The data checks gave no result.", passed=False)
    verdict = "The log met its data checks." if evidence.data_passed else "The log failed its data checks."
    return _reason("data", f"{verdict} {evidence.data_text}".rstrip(), passed=evidence.data_passed)


def _trust(evidence: GateEvidence) -> Reason:
    if evidence.trust is None:
        return _reason("world model", "There is no trust report on the world model.", passed=False)
    verdict = "may be trusted" if evidence.trust.passed else "may not be trusted"
    trust = evidence.trust
    score = (
        "" if trust.score is None else f" Its score is {trust.score:.2f}, that of its weakest part ({trust.weakest})."
    )
    text = " ".join((f"The world model {verdict}.{score}", *trust.reasons))
    return _reason("world model", text, passed=trust.passed)


def _exploit(evidence: GateEvidence) -> Iterator[Reason]:
    """Asked where the log gives the challenger's value; elsewhere there is nothing to compare with, and that holds."""
    verdict = evidence.exploit
    if verdict is not None:
        yield _reason("exploit", verdict.text, passed=verdict.supported)
    elif isinstance(evidence.offline, PolicyValue):
        text = "The challenger's value in the world model was not compared with its value by the log."
        yield _reason("exploit", text, passed=False)


def _offline(evidence: GateEvidence, config: GateConfig) -> Iterator[Reason]:
    challenger = evidence.offline
    yield _identification("challenger", challenger)
    if isinstance(challenger, PolicyValue):
        yield from _soundness("challenger", challenger, evidence.ratio_assumption, config)
        yield _cross_check(challenger, evidence.cross_check)
    if evidence.champion_policy is None:
        if isinstance(challenger, PolicyValue):
            yield _gain(
                "the log's behavior policy",
                challenger.difference,
                challenger.difference_lower,
                challenger.difference_upper,
                challenger.confidence,
                config,
                estimated=challenger.propensities_estimated,
            )
    else:
        yield _identification("champion", evidence.champion)
        if isinstance(evidence.champion, PolicyValue):
            yield from _soundness("champion", evidence.champion, evidence.ratio_assumption, config)
        yield _gain_over_champion(evidence, config)
    if isinstance(challenger, PolicyValue):
        estimated = challenger.propensities_estimated
        text = (
            "The probabilities under which the log's slates were shown are a fitted estimate: a canary at most."
            if estimated
            else "The probabilities under which the log's slates were shown were logged."
        )
        yield _reason("propensities", text, passed=not estimated, otherwise=Outcome.CANARY)
        yield _consistency(evidence.propensities, config)


def _consistency(check: PropensityCheck | None, config: GateConfig) -> Reason:
    name = "consistency of the logging probabilities"
    if check is None:
        return _reason(name, "Nothing tested whether the logging probabilities fit the slates.", passed=False)
    worst = check.worst
    passed = worst.p_value >= config.propensity_p_value
    kind = "estimated" if check.estimated else "logged"
    verdict = (
        f"The {kind} probabilities are consistent with the slates that were shown."
        if passed
        else f"The {kind} probabilities cannot be those under which the slates were shown."
    )
    what = "the mean weight" if worst.kind == "mean weight" else f"the weighted share of {worst.slates} by probability"
    return _reason(
        name,
        f"{verdict} Of {len(check.tests)} tests on {check.n_requests:,} requests the least likely is {what} of the "
        f"{worst.target} ({worst.observed:.3f}, {worst.lower:.3f} to {worst.upper:.3f}, where {worst.expected:g} is "
        f"expected; corrected p = {worst.p_value:.2g}, at least {config.propensity_p_value:g} is needed).",
        passed=passed,
    )


def _identification(role: str, estimate: PolicyValue | NotIdentified | None) -> Reason:
    check = f"identification of the {role}"
    if estimate is None:
        return _reason(check, f"There is no offline estimate of the {role}.", passed=False)
    if isinstance(estimate, NotIdentified):
        return _reason(check, f"The {role}'s value cannot be known from this log. {estimate.reason}", passed=False)
    how = ", with estimated probabilities of its slates" if estimate.propensities_estimated else ""
    return _reason(check, f"The log can tell the value of the {role} ({estimate.policy}){how}.", passed=True)


def _soundness(role: str, estimate: PolicyValue, assumption: RatioAssumption, config: GateConfig) -> Iterator[Reason]:
    yield _reason(
        f"estimand of the {role}",
        f"The {role}'s estimate ({estimate.estimator}) is of {estimate.estimand.value!r}; "
        f"the gate reads {Estimand.ONE_REQUEST.value!r} and no other.",
        passed=estimate.estimand is Estimand.ONE_REQUEST,
    )
    # Where responses depend on the positions above only, the ratio of the whole slate is valid too, and only noisier.
    yield _reason(
        f"ratio of the {role}",
        f"The {role}'s estimate uses the {estimate.ratio.value!r} ratio, and the log declares {assumption.value!r}.",
        passed=estimate.ratio in (RatioAssumption.FULL_SLATE, assumption),
    )
    lowest = default_cap(estimate.n_units)
    yield _reason(
        f"cap of the {role}",
        f"The {role}'s weights were capped at {estimate.cap:.4g} ({estimate.cap_share:.2%} of requests were cut); "
        f"the cap may be no lower than {lowest:.4g}.",
        passed=estimate.cap >= lowest,
    )
    yield _reason(
        f"feedback of the {role}",
        f"The reward of {estimate.unknown_share:.2%} of the log's requests is unknown and they were left out; at most "
        f"{config.max_unknown_share:.2%} may be.",
        passed=estimate.unknown_share <= config.max_unknown_share,
    )
    floor = config.ess_floor(estimate.n_requests)
    yield _reason(
        f"sample size of the {role}",
        f"The {role}'s estimate rests on an effective {estimate.effective_sample_size:,.0f} of {estimate.n_requests:,} "
        f"logged requests; at least {floor:,.0f} are needed.",
        passed=estimate.effective_sample_size >= floor,
    )
    yield _weights(role, estimate, config)


def _weights(role: str, estimate: PolicyValue, config: GateConfig) -> Reason:
    check = f"weights of the {role}"
    lower, upper = estimate.mean_weight_lower, estimate.mean_weight_upper
    if lower is None or upper is None:
        return _reason(check, f"The {role}'s mean importance weight has no interval.", passed=False)
    near = lower <= 1 + config.weight_tolerance and upper >= 1 - config.weight_tolerance
    verdict = "agrees with" if near else "is clearly off"
    return _reason(
        check,
        f"The {role}'s mean importance weight is {estimate.mean_weight:.3f} (interval {lower:.3f} to {upper:.3f}) and "
        f"{verdict} the 1 it should be.",
        passed=near,
    )


def _cross_check(challenger: PolicyValue, check: PolicyValue | NotIdentified | None) -> Reason:
    if not isinstance(check, PolicyValue) or check.estimand is not Estimand.ONE_REQUEST:
        return _reason("cross-check", "There is no second estimate of the challenger's value (DR).", passed=False)
    if challenger.lower is None or challenger.upper is None or check.lower is None or check.upper is None:
        return _reason("cross-check", "The two estimates of the challenger's value have no intervals.", passed=False)
    agree = challenger.lower <= check.upper and check.lower <= challenger.upper
    verdict = "agree" if agree else "contradict each other: propensities or rewards cannot be what the log says"
    return _reason(
        "cross-check",
        f"{challenger.estimator} estimates {challenger.value:.4g} ({challenger.lower:.4g} to {challenger.upper:.4g}) "
        f"and {check.estimator} {check.value:.4g} ({check.lower:.4g} to {check.upper:.4g}); they {verdict}.",
        passed=agree,
    )


def _gain_over_champion(evidence: GateEvidence, config: GateConfig) -> Reason:
    comparison = evidence.comparison
    if comparison is None:
        text = f"There is no paired comparison with the champion ({evidence.champion_policy})."
        return _reason("gain", text, passed=False)
    if comparison.estimand is not Estimand.ONE_REQUEST:
        text = f"The comparison with the champion is of {comparison.estimand.value!r}; the gate reads 'one_request'."
        return _reason("gain", text, passed=False)
    return _gain(
        f"the champion ({comparison.reference})",
        comparison.difference,
        comparison.lower,
        comparison.upper,
        comparison.confidence,
        config,
        estimated=isinstance(evidence.offline, PolicyValue) and evidence.offline.propensities_estimated,
    )


def _gain(
    reference: str,
    difference: float,
    lower: float | None,
    upper: float | None,
    confidence: float,
    config: GateConfig,
    *,
    estimated: bool,
) -> Reason:
    if lower is None or upper is None:
        return _reason("gain", f"The difference to {reference} has no interval.", passed=False)
    if confidence < config.confidence:
        text = f"The difference to {reference} has a {confidence:.0%} interval; {config.confidence:.0%} is asked for."
        return _reason("gain", text, passed=False)
    return _reason(
        "gain",
        f"Per request the challenger is estimated to earn {difference:+.4g} against {reference} "
        f"({confidence:.0%} interval {lower:+.4g} to {upper:+.4g}{', propensities estimated' * estimated}); the whole "
        f"interval must lie above {config.min_difference:g}.",
        passed=lower > config.min_difference,
    )


def _ab(evidence: GateEvidence, config: GateConfig) -> Reason:
    ab = evidence.ab
    if ab is None and evidence.ab_started:
        return _reason(
            "A/B", "An A/B was started, but there is no result; one needs at least two users in each arm.", passed=False
        )
    if ab is None:
        text = "There was no A/B yet; offline evidence leads to a canary at most."
        return _reason("A/B", text, passed=False, otherwise=Outcome.CANARY)
    if ab.sample_ratio_p_value < config.sample_ratio_p_value:
        return _reason(
            "A/B",
            f"The A/B is unsound: {ab.treatment_users:,} of {ab.treatment_users + ab.control_users:,} users got the "
            f"challenger where {ab.planned_share:.0%} were planned (p = {ab.sample_ratio_p_value:.2g}).",
            passed=False,
        )
    bounds = ab.bounds(config.ab_level)
    if bounds is None:
        text = "The A/B could be acted upon before its planned end, and there are no bounds that hold at every look."
        return _reason("A/B", text, passed=False)
    early = " It could be acted upon early, so its confidence sequence counts." if ab.looked_early else ""
    seen = f"{_ab_text(ab)}{early}"
    if bounds.upper < 0:
        text = f"{seen} The challenger is worse: its upper bound at level {config.ab_level:.2g} is {bounds.upper:+.4g}."
        return _reason("A/B", text, passed=False)
    lower = f"the lower bound at level {config.ab_level:.2g} is {bounds.lower:+.4g}"
    if bounds.lower <= 0:
        text = (
            f"{seen} That is not conclusive: {lower}. Analysed once, an A/B of this size finds a difference "
            f"of {ab.minimum_detectable_effect:.4g} with 80 % probability."
        )
        return _reason("A/B", text, passed=False, otherwise=Outcome.CANARY)
    if ab.label == "simulated in a world model":
        text = f"{seen} The users were simulated by a learned model, so this leads to a canary at most."
        return _reason("A/B", text, passed=False, otherwise=Outcome.CANARY)
    return _reason("A/B", f"{seen} The challenger is better: {lower}.", passed=True)


def _guardrails(evidence: GateEvidence, config: GateConfig) -> Iterator[Reason]:
    """One reason for each guarded metric of an A/B; one that is missing holds."""
    ab = evidence.ab
    if ab is None:
        return
    seen = {guardrail.metric: guardrail for guardrail in ab.guardrails}
    for metric in Metric:
        check, margin = f"guardrail {metric.value.replace('_', ' ')}", config.guardrails.of(metric)
        if metric in ab.replayed:
            text = f"The {metric.text}: simulated sessions took it from the logged ones, so it tells nothing."
            yield _reason(check, text, passed=False, otherwise=Outcome.CANARY)
            continue
        if metric not in seen:
            yield _reason(check, f"The A/B does not tell of the {metric.text}.", passed=False)
            continue
        judged = ab.judge(seen[metric], margin, config.ab_level)
        if judged is None:
            text = f"There are no bounds on the {metric.text} that hold at every look."
            yield _reason(check, text, passed=False)
            continue
        treatment, control = seen[metric].treatment.mean, seen[metric].control.mean
        numbers = f"{treatment:.4g} against {control:.4g}"
        if judged.change is not None and judged.worst_change is not None:
            numbers += f", {judged.change:+.1%} and at worst {judged.worst_change:+.1%}"
        verdict = {
            "non-inferior": f"That is within the margin of {margin:.0%}.",
            "inferior": f"That is beyond the margin of {margin:.0%}.",
            "unclear": f"Whether that is within the margin of {margin:.0%} is unclear: a canary at most.",
        }[judged.verdict]
        yield _reason(
            check,
            f"{metric.text[0].upper()}{metric.text[1:]}: {numbers}. {verdict}",
            passed=judged.verdict == "non-inferior",
            otherwise=Outcome.HOLD if judged.verdict == "inferior" else Outcome.CANARY,
        )


def _ab_text(ab: AbResult) -> str:
    relative = "" if ab.relative_difference is None else f", {ab.relative_difference:+.1%}"
    return (
        f"In the A/B ({ab.label}; {ab.treatment_users:,} users against {ab.control_users:,}) a session earned "
        f"{ab.treatment_mean:.4g} with {ab.treatment} and {ab.control_mean:.4g} with {ab.control}: {ab.difference:+.4g}"
        f"{relative} ({ab.confidence:.0%} interval {ab.lower:+.4g} to {ab.upper:+.4g})."
    )
