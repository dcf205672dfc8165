import numpy as np
import pytest
from gate_evidence import SUPPORTED, ab, consistency, difference, evidence, guarded, guardrail, sequence, value
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from components.evaluation.exploit_probes import ExploitVerdict
from components.evaluation.policy_value import Estimand, NotIdentified
from components.experiment.ab import AbResult
from components.experiment.evidence import GateEvidence, TrustSummary
from components.experiment.gate import Decision, GateConfig, Outcome, decide, decide_offline
from components.experiment.guardrails import GuardrailMargins, Metric
from components.interactions.contract import RatioAssumption

CONFIG = GateConfig()
EXPLOIT = ExploitVerdict(policy="new", supported=False, text="It earns 0.9 in the world model, 0.5 by the log.")


def unknown(**changes) -> NotIdentified:
    return NotIdentified(**({"policy": "new", "estimand": Estimand.ONE_REQUEST, "reason": "Clicks only."} | changes))


def with_champion(**changes) -> GateEvidence:
    fields = {"champion_policy": "old", "champion": value(policy="old"), "comparison": difference()}
    return evidence(**(fields | changes))


FULL = RatioAssumption.FULL_SLATE
CASCADE = RatioAssumption.CASCADE
SIMULATED = "simulated in a world model"
FEWER_CLICKS = guardrail(Metric.CLICKS, treatment=0.9)
PERHAPS_FEWER_CLICKS = guardrail(Metric.CLICKS, treatment=0.95)
MORE_EXITS = guardrail(Metric.FIRST_REQUEST_EXITS, treatment=1.2)
FEWER_EXITS = guardrail(Metric.FIRST_REQUEST_EXITS, treatment=0.5)
NO_PURCHASES = guardrail(Metric.PURCHASES, treatment=0.0, control=0.0, error=0.0)


@pytest.mark.parametrize(
    ("given_evidence", "outcome", "check"),
    [
        (evidence(), "promote", None),
        (evidence(ab=ab(label="true simulator")), "promote", None),
        (with_champion(), "promote", None),
        (evidence(ratio_assumption=CASCADE), "promote", None),
        (evidence(ratio_assumption=CASCADE, offline=value(ratio=CASCADE)), "promote", None),
        (evidence(data_passed=None), "hold", "data"),
        (evidence(data_passed=False), "hold", "data"),
        (evidence(trust=None), "hold", "world model"),
        (evidence(trust=TrustSummary(passed=False)), "hold", "world model"),
        (evidence(exploit=EXPLOIT), "hold", "exploit"),
        (evidence(exploit=None), "hold", "exploit"),
        (evidence(offline=None), "hold", "identification of the challenger"),
        (evidence(cross_check=None), "hold", "cross-check"),
        (evidence(cross_check=unknown()), "hold", "cross-check"),
        (evidence(cross_check=value(estimator="DR", estimand=Estimand.SESSION)), "hold", "cross-check"),
        (evidence(cross_check=value(estimator="DR", lower=None, upper=None)), "hold", "cross-check"),
        (evidence(cross_check=value(estimator="DR", value=0.8, lower=0.7, upper=0.9)), "hold", "cross-check"),
        (evidence(cross_check=value(estimator="DR", value=0.7, lower=0.59, upper=0.8)), "promote", None),
        (evidence(offline=unknown()), "hold", "identification of the challenger"),
        (evidence(offline=value(estimand=Estimand.SESSION)), "hold", "estimand of the challenger"),
        (evidence(offline=value(estimand=Estimand.SESSION_AVERAGE)), "hold", "estimand of the challenger"),
        (evidence(offline=value(ratio=CASCADE)), "hold", "ratio of the challenger"),
        (evidence(offline=value(cap=10.0)), "hold", "cap of the challenger"),
        (evidence(offline=value(unknown_share=0.06)), "hold", "feedback of the challenger"),
        (evidence(offline=value(effective_sample_size=499.0)), "hold", "sample size of the challenger"),
        (
            evidence(offline=value(n_requests=100_000, effective_sample_size=999.0)),
            "hold",
            "sample size of the challenger",
        ),
        (
            evidence(offline=value(mean_weight=0.8, mean_weight_lower=0.7, mean_weight_upper=0.89)),
            "hold",
            "weights of the challenger",
        ),
        (
            evidence(offline=value(mean_weight=1.3, mean_weight_lower=1.11, mean_weight_upper=1.5)),
            "hold",
            "weights of the challenger",
        ),
        (
            evidence(offline=value(mean_weight_lower=None, mean_weight_upper=None)),
            "hold",
            "weights of the challenger",
        ),
        (evidence(offline=value(difference_lower=0.0)), "hold", "gain"),
        (evidence(offline=value(difference_lower=None, difference_upper=None)), "hold", "gain"),
        (evidence(offline=value(confidence=0.8)), "hold", "gain"),
        (with_champion(champion=None), "hold", "identification of the champion"),
        (with_champion(champion=unknown(policy="old")), "hold", "identification of the champion"),
        (
            with_champion(champion=value(policy="old", effective_sample_size=90.0)),
            "hold",
            "sample size of the champion",
        ),
        (with_champion(comparison=None), "hold", "gain"),
        (with_champion(comparison=difference(lower=-0.01)), "hold", "gain"),
        (with_champion(comparison=difference(estimand=Estimand.SESSION)), "hold", "gain"),
        (evidence(offline=value(propensities_estimated=True)), "canary", "propensities"),
        (evidence(propensities=None), "hold", "consistency of the logging probabilities"),
        (evidence(propensities=consistency(0.3, 0.0009, 1.0)), "hold", "consistency of the logging probabilities"),
        (evidence(propensities=consistency(0.3, 0.0011, 1.0)), "promote", None),
        (evidence(ab=None), "canary", "A/B"),
        (evidence(ab=None, ab_started=True), "hold", "A/B"),
        (evidence(ab=ab(sample_ratio_p_value=0.0009)), "hold", "A/B"),
        # Above 0 by 2.13 standard errors: enough at the planned end, not enough where one could look every day.
        (evidence(ab=ab(difference=0.1, lower=0.008, upper=0.192)), "promote", None),
        (
            evidence(ab=ab(lower=0.008, upper=0.192, looked_early=True, sequence=sequence(0.008, 0.192))),
            "canary",
            "A/B",
        ),
        (evidence(ab=ab(looked_early=True, sequence=sequence(0.1, 0.3))), "promote", None),
        (evidence(ab=ab(looked_early=True, sequence=sequence(-0.3, -0.1))), "hold", "A/B"),
        # Nobody could act on it early: its looks decide nothing.
        (evidence(ab=ab(sequence=sequence(-0.3, -0.1))), "promote", None),
        # 1.8 standard errors above 0: 3.6 % of equal policies get so far.
        (evidence(ab=ab(difference=0.092, lower=-0.008, upper=0.192)), "canary", "A/B"),
        (evidence(ab=ab(guardrails=guarded(FEWER_CLICKS))), "hold", "guardrail clicks"),
        (evidence(ab=ab(guardrails=guarded(PERHAPS_FEWER_CLICKS))), "canary", "guardrail clicks"),
        (evidence(ab=ab(guardrails=guarded(MORE_EXITS))), "hold", "guardrail first request exits"),
        (evidence(ab=ab(guardrails=guarded(FEWER_EXITS))), "promote", None),
        (evidence(ab=ab(guardrails=guarded(NO_PURCHASES))), "promote", None),
        (evidence(ab=ab(guardrails=guarded()[1:])), "hold", "guardrail session length"),
        (evidence(ab=ab(difference=-0.2, lower=-0.3, upper=-0.1)), "hold", "A/B"),
        (evidence(ab=ab(difference=0.1, lower=-0.1)), "canary", "A/B"),
        (evidence(ab=ab(label=SIMULATED)), "canary", "A/B"),
        (evidence(ab=ab(label=SIMULATED, difference=-0.2, lower=-0.3, upper=-0.1)), "hold", "A/B"),
    ],
)
def test_each_piece_of_evidence_leads_where_it_should(given_evidence, outcome, check):
    decision = decide(given_evidence, CONFIG)
    assert decision.outcome == outcome, [reason.text for reason in decision.reasons if not reason.passed]
    assert [reason.check for reason in decision.reasons if not reason.passed] == ([check] if check else [])


def test_a_champion_must_be_beaten_even_where_the_behavior_policy_is():
    assert decide(with_champion(comparison=difference(lower=-0.5)), CONFIG).outcome is Outcome.HOLD


def test_a_higher_bar_holds_what_a_lower_one_lets_through():
    assert decide(evidence(ab=None), GateConfig(min_difference=0.05)).outcome is Outcome.CANARY
    assert decide(evidence(ab=None), GateConfig(min_difference=0.1)).outcome is Outcome.HOLD
    assert decide(evidence(), GateConfig(ess_floor_share=0.06)).outcome is Outcome.HOLD


@pytest.mark.parametrize(
    "setting",
    [
        {"ess_floor_requests": 100},
        {"ess_floor_share": 0.001},
        {"min_difference": -1},
        {"confidence": 0.5},
        {"weight_tolerance": 0.5},
        {"max_unknown_share": 0.5},
        {"sample_ratio_p_value": 0.0001},
        {"ab_level": 0.05},
        {"guardrails": {"clicks": 0.06}},
        {"guardrails": {"purchases": 0.2}},
        {"guardrails": {"session_length": None}},
        {"approve": True},
    ],
)
def test_no_setting_makes_the_gate_milder(setting):
    with pytest.raises(ValidationError):
        GateConfig(**setting)


@pytest.mark.parametrize(
    "changes",
    [
        {"offline": value(policy="other")},
        {"exploit": SUPPORTED.model_copy(update={"policy": "other"})},
        {"ab": ab(treatment="other")},
        {"champion_policy": "old", "champion": value(policy="other")},
        {"champion_policy": "old", "comparison": difference(reference="other")},
        {"champion_policy": "old", "ab": ab(control="other")},
        {"cross_check": value(policy="other")},
        {"comparison": difference()},
        {"ab_started": False},
    ],
)
def test_evidence_about_another_policy_is_refused(changes):
    with pytest.raises(ValidationError):
        evidence(**changes)


def test_reasons_give_their_numbers_in_sentences():
    reasons = {reason.check: reason.text for reason in decide(evidence(), CONFIG).reasons}
    assert reasons["sample size of the challenger"] == (
        "The challenger's estimate rests on an effective 2,000 of 40,000 logged requests; at least 500 are needed."
    )
    assert reasons["gain"] == (
        "Per request the challenger is estimated to earn +0.2 against the log's behavior policy "
        "(95% interval +0.1 to +0.3); the whole interval must lie above 0."
    )
    assert reasons["data"] == "The log met its data checks. 12 of 40,012 requests were quarantined."
    assert reasons["A/B"].endswith(
        "+0.2, +20.0% (95% interval +0.1 to +0.3). The challenger is better: the lower bound at level 0.03 is +0.104."
    )
    assert reasons["guardrail purchases"] == (
        "Purchases of a session: 1 against 1, +0.0% and at worst -2.5%. That is within the margin of 10%."
    )


def test_an_ab_that_could_be_acted_upon_early_needs_bounds_that_hold_at_every_look():
    reasons = decide(evidence(ab=ab(looked_early=True)), CONFIG).reasons
    assert [reason.check for reason in reasons if reason.allows is Outcome.HOLD] == [
        "A/B",
        *(f"guardrail {metric.value.replace('_', ' ')}" for metric in Metric),
    ]


def test_guardrails_are_judged_at_every_look_too_where_one_could_look_every_day():
    # 2.2 standard errors within the margin: clear at the planned end, unclear in a confidence sequence.
    near = guardrail(Metric.CLICKS, treatment=0.98)
    at_end = ab(guardrails=guarded(near))
    early = ab(guardrails=guarded(near), looked_early=True, sequence=sequence(0.1, 0.3))
    assert decide(evidence(ab=at_end), CONFIG).outcome is Outcome.PROMOTE
    assert decide(evidence(ab=early), CONFIG).outcome is Outcome.CANARY


def test_a_smaller_margin_holds_a_stricter_bar():
    near = evidence(ab=ab(guardrails=guarded(guardrail(Metric.CLICKS, treatment=0.99))))
    assert decide(near, CONFIG).outcome is Outcome.PROMOTE
    assert decide(near, GateConfig(guardrails=GuardrailMargins(clicks=0.01))).outcome is Outcome.CANARY


def test_a_stricter_level_lets_less_through():
    close = evidence(ab=ab(difference=0.1, lower=0.008, upper=0.192))
    assert decide(close, GateConfig(ab_level=0.01)).outcome is Outcome.CANARY


def test_where_the_log_gives_no_value_there_is_none_that_the_world_model_could_exceed():
    decision = decide(evidence(offline=unknown(), exploit=None), CONFIG)
    assert "exploit" not in [reason.check for reason in decision.reasons]
    assert decision.outcome is Outcome.HOLD


def test_the_world_model_is_named_with_its_score_and_its_weakest_part():
    trust = TrustSummary(passed=True, score=0.236, weakest="reward of a session", reasons=("It is calibrated.",))
    reasons = {reason.check: reason.text for reason in decide(evidence(trust=trust), CONFIG).reasons}
    assert reasons["world model"] == (
        "The world model may be trusted. Its score is 0.24, that of its weakest part (reward of a session). "
        "It is calibrated."
    )
    assert reasons["exploit"] == SUPPORTED.text


def test_what_a_simulated_ab_took_from_the_log_allows_a_canary_and_what_it_leaves_out_holds():
    untold = ab(label=SIMULATED, guardrails=guarded()[1:])
    assert decide(evidence(ab=untold), CONFIG).outcome is Outcome.HOLD
    replayed = decide(evidence(ab=untold.model_copy(update={"replayed": (Metric.SESSION_LENGTH,)})), CONFIG)
    assert replayed.outcome is Outcome.CANARY
    reasons = {reason.check: reason for reason in replayed.reasons}
    assert not reasons["guardrail session length"].passed
    assert reasons["guardrail clicks"].passed


@pytest.mark.parametrize("label", ["live", "true simulator"])
def test_users_who_are_not_simulated_replay_nothing(label):
    with pytest.raises(ValidationError, match="replayed: session_length in an A/B that is"):
        AbResult.model_validate(ab(label=label).model_dump() | {"replayed": ("session_length",)})


def test_evidence_and_decision_survive_json():
    for given_evidence in (evidence(), with_champion(), evidence(offline=unknown(), ab=None)):
        assert GateEvidence.model_validate_json(given_evidence.model_dump_json()) == given_evidence
        decision = decide(given_evidence, CONFIG)
        assert Decision.model_validate_json(decision.model_dump_json()) == decision


def test_an_estimate_from_fitted_probabilities_says_so_in_every_reason_that_rests_on_it():
    fitted = evidence(
        offline=value(propensities_estimated=True), propensities=consistency(0.0001, estimated=True), ab=None
    )
    reasons = {reason.check: reason.text for reason in decide(fitted, CONFIG).reasons}
    assert "with estimated probabilities" in reasons["identification of the challenger"]
    assert "propensities estimated" in reasons["gain"]
    assert "a fitted estimate" in reasons["propensities"]
    assert reasons["consistency of the logging probabilities"].startswith("The estimated probabilities cannot be those")
    logged = " ".join(reason.text for reason in decide(evidence(ab=None), CONFIG).reasons)
    assert "estimated prob" not in logged and "propensities estimated" not in logged


values = st.builds(
    value,
    estimand=st.sampled_from(Estimand),
    ratio=st.sampled_from(RatioAssumption),
    effective_sample_size=st.sampled_from([100.0, 2_000.0]),
    cap=st.sampled_from([10.0, 200.0]),
    mean_weight_upper=st.sampled_from([0.5, 1.06, None]),
    difference_lower=st.sampled_from([-0.1, 0.1, None]),
    propensities_estimated=st.booleans(),
)
INTERVALS = ((-0.3, -0.1), (-0.3, 0.3), (0.1, 0.3))
abs_ = st.builds(
    lambda ends, **changes: ab(difference=sum(ends) / 2, lower=ends[0], upper=ends[1], **changes),
    ends=st.sampled_from(INTERVALS),
    label=st.sampled_from(["live", "true simulator", SIMULATED]),
    sample_ratio_p_value=st.sampled_from([0.0001, 0.5]),
    looked_early=st.booleans(),
    sequence=st.sampled_from([None, sequence(-0.1, 0.3), sequence(0.1, 0.3)]),
    guardrails=st.sampled_from([(), guarded(), guarded(FEWER_CLICKS), guarded(PERHAPS_FEWER_CLICKS)]),
)
OPTIONAL = ("data_passed", "trust", "exploit", "offline", "cross_check", "champion", "comparison", "propensities", "ab")


@st.composite
def any_evidence(draw: st.DrawFn) -> GateEvidence:
    """Mostly sound evidence, so that every outcome occurs."""
    sound = draw(st.booleans())
    championed = draw(st.booleans())
    found = with_champion() if championed else evidence()
    if sound:
        return found.model_copy(update=draw(st.fixed_dictionaries({}, optional={"ab": abs_})))
    ab_started = draw(st.booleans())
    return GateEvidence(
        challenger="new",
        champion_policy=found.champion_policy,
        ab_started=ab_started,
        ratio_assumption=draw(st.sampled_from(RatioAssumption)),
        data_passed=draw(st.sampled_from([None, False, True])),
        trust=draw(st.none() | st.builds(TrustSummary, passed=st.booleans())),
        exploit=draw(st.sampled_from([None, SUPPORTED, EXPLOIT])),
        offline=draw(st.none() | values | st.builds(unknown)),
        cross_check=draw(st.none() | values | st.builds(unknown)),
        champion=draw(st.none() | values.map(lambda v: v.model_copy(update={"policy": "old"}))) if championed else None,
        comparison=draw(st.none() | st.builds(difference, lower=st.sampled_from([-0.1, 0.02]))) if championed else None,
        propensities=draw(st.none() | st.builds(consistency, st.sampled_from([0.0001, 0.5]))),
        ab=draw(st.none() | abs_) if ab_started else None,
    )


@settings(max_examples=150, deadline=None)
@given(any_evidence(), st.sets(st.sampled_from(OPTIONAL), min_size=1))
def test_removing_evidence_never_raises_the_outcome(given_evidence, removed):
    poorer = given_evidence.model_copy(update=dict.fromkeys(removed))
    assert decide(poorer, CONFIG).outcome.rank <= decide(given_evidence, CONFIG).outcome.rank


@settings(max_examples=150, deadline=None)
@given(any_evidence(), st.booleans())
def test_offline_evidence_alone_never_exceeds_canary(given_evidence, ab_started):
    offline_only = given_evidence.model_copy(update={"ab": None, "ab_started": ab_started})
    assert decide(offline_only, CONFIG).outcome is not Outcome.PROMOTE


@settings(max_examples=150, deadline=None)
@given(any_evidence())
def test_an_ab_in_a_world_model_never_exceeds_canary(given_evidence):
    simulated = given_evidence.model_copy(update={"ab": ab(label=SIMULATED), "ab_started": True})
    assert decide(simulated, CONFIG).outcome is not Outcome.PROMOTE


@settings(max_examples=150, deadline=None)
@given(abs_, st.sets(st.sampled_from(Metric), min_size=1))
def test_leaving_out_guardrails_or_looks_never_raises_the_outcome(result, removed):
    whole = decide(evidence(ab=result), CONFIG).outcome
    fewer = tuple(part for part in result.guardrails if part.metric not in removed)
    assert decide(evidence(ab=result.model_copy(update={"guardrails": fewer})), CONFIG).outcome.rank <= whole.rank
    if result.looked_early:
        unseen = evidence(ab=result.model_copy(update={"sequence": None}))
        assert decide(unseen, CONFIG).outcome.rank <= whole.rank


def test_the_outcomes_are_ordered():
    assert list(np.argsort([outcome.rank for outcome in (Outcome.HOLD, Outcome.CANARY, Outcome.PROMOTE)])) == [0, 1, 2]


@pytest.mark.parametrize("given_ab", [ab(), ab(lower=-0.3, upper=-0.1, difference=-0.2), ab(sample_ratio_p_value=0.0)])
def test_the_offline_decision_is_the_one_without_any_ab(given_ab):
    alone = decide(evidence(ab=None), CONFIG)
    assert alone.outcome is Outcome.CANARY
    assert decide_offline(evidence(ab=given_ab), CONFIG) == alone
    assert decide_offline(evidence(ab=None, ab_started=True), CONFIG) == alone
    assert decide_offline(evidence(ab=given_ab, data_passed=False), CONFIG).outcome is Outcome.HOLD
