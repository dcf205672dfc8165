import re
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path

import pytest
from ledger_entries import ab_result, ledger_entry

from components.errors import InputError
from components.evaluation.cap_sensitivity import CapPoint, CapSensitivity
from components.evaluation.exploit_probes import ExploitProbes, ExploitVerdict, Probe, RankAgreement
from components.evaluation.policy_value import Estimand, NotIdentified, PolicyValue
from components.evaluation.propensity_check import PropensityCheck, PropensityTest
from components.evaluation.support import SupportDistance
from components.evaluation.trust_score import TrustPart, trust_score
from components.evaluation.two_sample import TwoSampleTest
from components.evaluation.world_model_trust import Calibration, GeneratedAgainstReal, WorldModelTrust
from components.experiment.ab import AbResult
from components.experiment.arm import ArmMean
from components.experiment.covariate import CovariateAdjustment
from components.experiment.evidence import GateEvidence, TrustSummary
from components.experiment.gate import Decision, GateConfig, decide
from components.experiment.guardrails import Guardrail, Metric
from components.experiment.ledger import LedgerEntry, LedgerSummary, summarize
from components.experiment.sequential import ConfidenceSequence, Look
from components.interactions.contract import RatioAssumption
from components.validation.checks import BadRow, DataChecks
from components.validation.data_docs import ExpectationResult
from flows.config import LoopConfig
from flows.report import write_report
from flows.run_record import Curve, Evidence, Lineage, RankingQuality, Release, SplitSummary

CLICKS_ONLY = "The log holds clicks only and not the slates that were shown, so no other policy can be judged on it."


def policy_value(
    policy: str, estimator: str, estimand: Estimand, value: float, half_width: float | None
) -> PolicyValue:
    logged = 1.62 if estimand is Estimand.SESSION else 0.4031
    n = 5_984 if estimand is Estimand.SESSION else 24_310
    claimed = half_width is not None
    width = half_width or 0.0
    return PolicyValue(
        policy=policy,
        estimator=estimator,
        estimand=estimand,
        ratio=RatioAssumption.FULL_SLATE,
        value=value,
        lower=value - width if claimed else None,
        upper=value + width if claimed else None,
        confidence=0.95,
        effective_sample_size=212.4 if estimand is Estimand.SESSION else 1_893.6,
        n_requests=24_310,
        n_units=n,
        n_users=4_120,
        cap=155.92,
        cap_share=0.0004,
        max_weight=155.92,
        mean_weight=0.991,
        mean_weight_lower=0.957 if claimed else None,
        mean_weight_upper=1.025 if claimed else None,
        behavior_value=logged,
        difference=value - logged,
        difference_lower=value - logged - 0.8 * width if claimed else None,
        difference_upper=value - logged + 0.8 * width if claimed else None,
        propensities_estimated=False,
        interval="user-clustered delta method" if claimed else "none",
    )


TRUST = WorldModelTrust(
    click_nats=0.3312,
    baseline_nats=0.3641,
    baseline="click rate of each position",
    calibrations=(
        Calibration(
            response="clicks",
            predicted=(0.02, 0.05, 0.08, 0.11, 0.15, 0.19, 0.24, 0.3, 0.37, 0.49),
            observed=(0.019, 0.052, 0.077, 0.113, 0.151, 0.186, 0.243, 0.31, 0.362, 0.5),
            error=0.0042,
            n=52_310,
        ),
        Calibration(
            response="purchases", predicted=(0.05, 0.12, 0.2), observed=(0.04, 0.13, 0.22), error=0.013, n=8_201
        ),
        Calibration(
            response="leaving", predicted=(0.11, 0.2, 0.26, 0.4), observed=(0.1, 0.22, 0.25, 0.43), error=0.018, n=9_100
        ),
    ),
    sessions=(
        GeneratedAgainstReal(
            quantity="requests of a session", real=4.03, generated=4.19, gap=0.0397, standard_error=0.011
        ),
        GeneratedAgainstReal(
            quantity="reward of a session", real=1.62, generated=1.59, gap=-0.0185, standard_error=0.02
        ),
    ),
    two_sample=TwoSampleTest(
        auc=0.511, lower=0.496, upper=0.525, p_value=0.059, n_pairs=2_987, n_users=2_376, strongest="largest reward"
    ),
    discriminator_accuracy=0.534,
    parts=(
        TrustPart(
            name="likelihood gain",
            passed=True,
            score=1.0,
            text="Held-out clicks cost 0.331 nats; by click rate of each position alone they cost 0.364.",
        ),
        TrustPart(
            name="calibration of clicks",
            passed=True,
            score=0.86,
            text="Predicted clicks are off by 0.004 on average (limit 0.03).",
        ),
        TrustPart(
            name="requests of a session",
            passed=True,
            score=0.59,
            text="Generated sessions differ by +4.0% in requests of a session (real 4.03, limit 15%).",
        ),
    ),
)
CHECKED = TrustPart(name="exploit gap", passed=True, score=0.84, text="It overrates no policy clearly.")
UNCHECKED = TrustPart(name="exploit gap", passed=None, score=None, text="Nothing to check its values against.")


def probe(policy: str, model: float, log: PolicyValue, *, effective: float = 2_000.0) -> Probe:
    return Probe(
        policy=policy,
        model_value=model,
        model_half_width=0.004,
        log_value=log.model_copy(update={"effective_sample_size": effective}),
        gap=model - log.value,
        gap_lower=model - log.value - 0.013,
        gap_upper=model - log.value + 0.013,
        support=SupportDistance(policy=policy, divergence=2.55, outside_share=0.004),
        needed_ess=500.0,
    )


def guardrail(metric: Metric, treatment: float, control: float) -> Guardrail:
    arms = [
        ArmMean(n_users=10_000, n_sessions=10_000, mean=mean, variance=1e-4 * mean**2, session_variance=1e-4 * mean**2)
        for mean in (treatment, control)
    ]
    return Guardrail(metric=metric, treatment=arms[0], control=arms[1])


AB = AbResult(
    label="true simulator",
    treatment="reinforce",
    control="cem",
    treatment_users=10_031,
    control_users=9_969,
    treatment_sessions=10_031,
    control_sessions=9_969,
    planned_share=0.5,
    treatment_mean=1.913,
    control_mean=1.792,
    difference=0.121,
    lower=0.061,
    upper=0.181,
    confidence=0.95,
    relative_difference=0.121 / 1.792,
    sample_ratio_p_value=0.661,
    minimum_detectable_effect=0.0858,
    conclusive=True,
    standard_error=0.0306,
    degrees_of_freedom=19_998.0,
    adjustment=CovariateAdjustment(slope=0.14, known_share=0.92, variance_ratio=0.913, unadjusted_difference=0.124),
    guardrails=tuple(
        guardrail(metric, treatment, control)
        for metric, treatment, control in (
            (Metric.SESSION_LENGTH, 3.94, 3.88),
            (Metric.CLICKS, 2.67, 2.55),
            (Metric.PURCHASES, 0.601, 0.604),
            (Metric.FIRST_REQUEST_EXITS, 0.243, 0.24),
        )
    ),
    sequence=ConfidenceSequence(
        confidence=0.95,
        planned_sessions=20_000,
        looks=tuple(
            Look(
                day=day,
                n_users=2_000 * day,
                n_sessions=2_000 * day,
                difference=0.124,
                standard_error=0.0306 * (10 / day) ** 0.5,
                clock=2_000.0 * day,
                lower=0.124 - 0.3 / day**0.5,
                upper=0.124 + 0.3 / day**0.5,
            )
            for day in range(1, 11)
        ),
    ),
)
CHECKS = DataChecks(
    n_requests=97_214,
    n_sessions=24_000,
    n_users=7_611,
    n_items=240,
    n_quarantined=7,
    quarantine_reasons={"slate_repeats_an_item": 2, "session_of_a_bad_row": 5},
    examples=(
        BadRow(
            rule="slate_repeats_an_item",
            request_id="session-000012-1",
            seen="slate = ['item-007', 'item-007', 'item-031', 'item-101']",
            expected="each item at most once in the slate",
        ),
    ),
    expectations=(
        ExpectationResult(
            name="Enough requests are accepted",
            metric="accepted_requests",
            success=True,
            observed=97_207.0,
            expected="at least 100",
            severity="error",
        ),
        ExpectationResult(
            name="The reward differs between requests",
            metric="reward_range",
            success=False,
            observed=0.0,
            expected="above 0",
            severity="warning",
        ),
    ),
    profile={"mean_session_length": 4.0505, "click_rate": 0.0911, "reward_range": 14.0},
    passed=True,
)
LINEAGE = Lineage(
    run="20260401-120000-shop",
    started=datetime(2026, 4, 1, 12, tzinfo=UTC),
    config=LoopConfig(),
    data_digest="3f5a" * 16,
    dvc_digest=None,
    code_digest="9c01" * 16,
    lock_digest="77be" * 16,
    commit="f438ef6a0d2b5a4c7a2f0e1d9b8c7a6f5e4d3c2b+changes",
    seed=0,
    threads=1,
    stages={"import": "a1" * 32, "validation": "b2" * 32, "world-model": "c3" * 32, "policy": "d4" * 32},
    reused=("import", "validation"),
    policy_digest="51dd" * 16,
    policy_tag="shop-policy:k3jx5lq2",
    baseline_tag="shop-cem:p0o9i8u7",
    bento_tag="recommender:m2n4b6v8",
)
CONSISTENCY = PropensityCheck(
    estimated=False,
    tolerance=0.002,
    n_requests=24_310,
    n_users=4_120,
    tests=(
        PropensityTest(
            kind="mean weight",
            target="uniform policy",
            strength=0.5,
            slates="all",
            expected=1.0,
            observed=0.994,
            lower=0.981,
            upper=1.007,
            p_value=0.83,
        ),
        PropensityTest(
            kind="calibration",
            target="fitted logging policy",
            strength=0.0,
            slates="slates 1 and 2 of 10",
            expected=0.2,
            observed=0.198,
            lower=0.192,
            upper=0.204,
            p_value=1.0,
        ),
    ),
)
ONE_REQUEST = policy_value("reinforce", "one-request NCIS", Estimand.ONE_REQUEST, 0.4466, 0.0121)
PROBES = ExploitProbes(
    challenger="reinforce",
    probes=(
        probe("reinforce", 0.4571, ONE_REQUEST),
        probe("random", 0.3711, policy_value("random", "one-request NCIS", Estimand.ONE_REQUEST, 0.3654, 0.0101)),
        probe(
            "constant",
            0.4712,
            policy_value("constant", "one-request NCIS", Estimand.ONE_REQUEST, 0.4402, 0.05),
            effective=212.0,
        ),
    ),
    agreement=RankAgreement(n_policies=2, n_pairs=1, n_agreeing=1, kendall_tau=1.0),
    verdict=ExploitVerdict(policy="reinforce", supported=True, text="It earns 0.457 and 0.447; that is no exploit."),
)
UNPROBED = ExploitProbes(challenger="reinforce", probes=(), agreement=None, verdict=None)
IDENTIFIED = Evidence(
    loop="shop",
    source="storefront",
    limits=("The shop is simulated: its true values are known, and say nothing about a real shop.",),
    evidence_level="propensities",
    ratio_assumption="cascade",
    reward="weighted-feedback, version 1: 1 × clicked + 3 × purchased",
    data=CHECKS,
    splits=(SplitSummary(name="train", n_requests=48_000, n_sessions=11_900),),
    trust=TRUST,
    probes=PROBES,
    trust_score=trust_score((*TRUST.parts, CHECKED)),
    curves=(
        Curve(name="user model, train", x="pass", y="nats a request", values=(1.61, 1.5, 1.44, 1.41, 1.4)),
        Curve(name="user model, validation", x="pass", y="nats a request", values=(1.6, 1.52, 1.47, 1.46, 1.46)),
        Curve(name="discriminator", x="round", y="accuracy (0.5: cannot tell)", values=(0.61, 0.534)),
        Curve(
            name="REINFORCE in the world model",
            x="step",
            y="reward of a session",
            values=tuple(1.6 + 0.4 * (1 - 0.95**step) + 0.02 * (-1) ** step for step in range(60)),
        ),
    ),
    releases={"reinforce": Release(strength=0.75, validation_ess=1_130.2, required_ess=750.0)},
    gating=ONE_REQUEST,
    estimates=(
        ONE_REQUEST,
        policy_value("reinforce", "DR", Estimand.ONE_REQUEST, 0.4441, 0.0103),
        policy_value("reinforce", "NCIS with cap 10", Estimand.ONE_REQUEST, 0.4309, 0.0071),
        policy_value("reinforce", "session NCIS", Estimand.SESSION, 1.84, 0.31),
        policy_value("reinforce", "literature NCIS", Estimand.SESSION_AVERAGE, 0.4188, None),
        policy_value("cem", "one-request NCIS", Estimand.ONE_REQUEST, 0.4247, 0.0098),
        policy_value("cem", "session NCIS", Estimand.SESSION, 1.73, 0.22),
        policy_value("cem", "literature NCIS", Estimand.SESSION_AVERAGE, 0.4107, None),
    ),
    cap_sensitivity=CapSensitivity(
        policy="reinforce",
        usual_cap=10.0,
        gating_cap=155.92,
        points=tuple(
            CapPoint(
                cap=cap, value=value, lower=value - 0.01, upper=value + 0.01, effective_sample_size=ess, cap_share=cut
            )
            for cap, value, ess, cut in (
                (1.0, 0.4102, 21_001.0, 0.43),
                (10.0, 0.4309, 6_100.0, 0.07),
                (155.92, 0.4466, 1_893.6, 0.0004),
                (15_592.0, 0.4471, 1_801.0, 0.0),
            )
        ),
    ),
    support=(
        SupportDistance(policy="reinforce", divergence=2.553, outside_share=0.004),
        SupportDistance(policy="cem", divergence=2.411, outside_share=0.0),
    ),
    propensity_check=CONSISTENCY,
    ab=AB,
    seconds={"import": 21.3, "validation": 9.42, "world-model": 92.0, "policy": 61.8},
)
NOT_IDENTIFIED = IDENTIFIED.model_copy(
    update={
        "source": "sessions",
        "evidence_level": "clicks",
        "limits": ("No slates were recorded.", "Sessions stand in for users."),
        "gating": NotIdentified(policy="reinforce", estimand=Estimand.ONE_REQUEST, reason=CLICKS_ONLY),
        "estimates": (),
        "cap_sensitivity": None,
        "support": (),
        "probes": UNPROBED,
        "trust_score": trust_score((*TRUST.parts, UNCHECKED)),
        "propensity_check": None,
        "ranking": (RankingQuality(policy="reinforce", hit_rate_1=0.091, hit_rate_10=0.403, n_requests=20_114),),
        "releases": {"reinforce": Release(strength=1.0, validation_ess=None, required_ess=None)},
        "ab": AB.model_copy(
            update={
                "label": "simulated in a world model",
                "lower": -0.03,
                "conclusive": False,
                "adjustment": None,
                "guardrails": (*AB.guardrails[1:], guardrail(Metric.SESSION_LENGTH, 3.8, 4.0)),
            }
        ),
    }
)
#: With little to draw, which is what takes the time, for tests of something else.
PLAIN = IDENTIFIED.model_copy(
    update={
        "curves": (),
        "trust": TRUST.model_copy(update={"calibrations": (), "sessions": ()}),
        "probes": UNPROBED,
        "estimates": (ONE_REQUEST,),
        "cap_sensitivity": None,
        "support": (),
        "ab": AB.model_copy(update={"sequence": None}),
    }
)


def decision_on(evidence: Evidence) -> Decision:
    return decide(
        GateEvidence(
            challenger=evidence.gating.policy,
            champion_policy=None,
            ab_started=True,
            ratio_assumption=RatioAssumption(evidence.ratio_assumption),
            data_passed=evidence.data.passed,
            trust=TrustSummary(passed=evidence.trust_score.passed, reasons=evidence.trust_score.reasons),
            exploit=evidence.probes.verdict,
            offline=evidence.gating,
            cross_check=next((part for part in evidence.estimates if getattr(part, "estimator", "") == "DR"), None),
            propensities=evidence.propensity_check,
            ab=evidence.ab,
        ),
        GateConfig(),
    )


class Reader(HTMLParser):
    """A page as a browser reads it: the text, the places it refers to, the ids, and the elements."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text, self.references, self.ids, self.tags = "", [], [], []
        self.feed(page)
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attributes:
            if name.endswith(("src", "href", "srcset", "action", "data")):
                self.references.append(value)
            if name == "id":
                self.ids.append(value)

    def handle_data(self, text: str) -> None:
        self.text += text


def written(evidence: Evidence, folder: Path) -> str:
    out = folder / "report.html"
    write_report(evidence, decision_on(evidence), LINEAGE, out)
    return out.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def identified(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of IDENTIFIED."""
    return written(IDENTIFIED, tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def not_identified(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of NOT_IDENTIFIED."""
    return written(NOT_IDENTIFIED, tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module", params=["identified", "not identified"])
def evidence(request: pytest.FixtureRequest) -> Evidence:
    return IDENTIFIED if request.param == "identified" else NOT_IDENTIFIED


@pytest.fixture(scope="module")
def page(evidence: Evidence, identified: str, not_identified: str) -> str:
    return identified if evidence is IDENTIFIED else not_identified


def test_the_two_cases_are_a_promotion_and_a_hold() -> None:
    assert [decision_on(case).outcome.value for case in (IDENTIFIED, NOT_IDENTIFIED)] == ["promote", "hold"]


def test_the_page_refers_to_nothing_outside_its_run_folder(page: str) -> None:
    reader = Reader(page)
    outward = [place for place in reader.references if not place.startswith("#")]
    assert outward == ["data_docs/index.html"]
    assert not re.search(r"url\((?!#)|@import", page)
    assert {"script", "link", "iframe"}.isdisjoint(reader.tags)


def test_the_page_is_small(page: str) -> None:
    assert len(page.encode()) < 1_500_000


def test_ids_are_unique_and_references_within_the_page_lead_somewhere(page: str) -> None:
    reader = Reader(page)
    assert len(set(reader.ids)) == len(reader.ids)
    inward = [place.removeprefix("#") for place in reader.references if place.startswith("#")]
    inward += re.findall(r"url\(#([^)]+)\)", page)
    assert set(inward) <= set(reader.ids)


def test_the_decision_comes_before_the_data_checks(page: str, evidence: Evidence) -> None:
    text = Reader(page.split("</style>")[1]).text
    decision = text.index(decision_on(evidence).outcome.value.upper())
    assert decision < text.index("What this log can and cannot tell") < text.index("Rows put aside")


def test_the_title_names_loop_and_decision(page: str, evidence: Evidence) -> None:
    title = re.search("<title>(.*)</title>", page)
    assert title is not None
    assert evidence.loop in title[1]
    assert decision_on(evidence).outcome.value.upper() in title[1]


def test_every_reason_is_on_the_page_with_a_sign_that_is_no_color(page: str, evidence: Evidence) -> None:
    text = Reader(page).text
    for reason in decision_on(evidence).reasons:
        sign = (
            "✓ passed" if reason.passed else "✗ stands against" if reason.allows == "hold" else "▲ limits to a canary"
        )
        assert f"{sign} {reason.check}{reason.text}" in text


def test_limits_trust_and_quarantine_are_on_the_page(page: str, evidence: Evidence) -> None:
    text = Reader(page).text
    for sentence in (
        *evidence.limits,
        *evidence.trust_score.reasons,
        "session-000012-1",
        "The reward differs between requests",
    ):
        assert sentence in text


def test_what_stands_against_a_decision_comes_before_what_passed(not_identified: str) -> None:
    text = Reader(not_identified).text
    assert text.index("✗ stands against") < text.index("▲ limits to a canary") < text.index("✓ passed")


def test_the_ab_stands_with_its_bound_its_guardrails_and_its_looks(identified: str) -> None:
    text = Reader(identified).text
    assert "The gate's lower bound is +0.0634, at level 3 %: so often would a policy that equals “cem” pass" in text
    assert "its looks decide nothing" in text
    assert "the variance of the difference is 0.913 times what it would be without" in text
    assert "✓ within requests of a session 3.940 3.880 +1.5 % −1.1 % −5 %" in _spaced(identified)
    exits = "✓ within share of sessions left after the first request 0.2430 0.2400 +1.2 % +4.1 % +10 %"
    assert exits in _spaced(identified)
    assert "At the last look, day 10 with 20,000 users, it was +0.124 (+0.0291 to +0.219)" in identified


def test_a_guardrail_that_is_unclear_or_beyond_its_margin_shows(not_identified: str, tmp_path: Path) -> None:
    assert "▲ unclear requests of a session" in _spaced(not_identified)
    worse = AB.model_copy(update={"guardrails": (guardrail(Metric.CLICKS, 2.0, 2.6),), "looked_early": True})
    evidence = PLAIN.model_copy(update={"ab": worse})
    assert "✗ beyond clicks of a session" in _spaced(written(evidence, tmp_path))
    unseen = PLAIN.model_copy(update={"ab": worse.model_copy(update={"sequence": None})})
    assert "✗ no bounds clicks of a session" in _spaced(written(unseen, tmp_path))


def test_an_ab_of_rewards_alone_has_a_page(tmp_path: Path) -> None:
    bare = AB.model_copy(update={"adjustment": None, "guardrails": (), "sequence": None})
    page = written(PLAIN.model_copy(update={"ab": bare}), tmp_path)
    text = Reader(page).text
    assert "Minimum detectable effect" in text
    assert "Looks, day by day" not in text
    assert "looks-" not in page


def _spaced(page: str) -> str:
    """The page's words with one space between cells; a number and its unit stay together with one."""
    return " ".join(re.sub(r"<[^>]*>", " ", page).split())


def test_where_nothing_is_identified_a_reason_and_hit_rates_take_the_place_of_the_plot(not_identified: str) -> None:
    text = Reader(not_identified).text
    assert f"No estimate exists for reinforce. {CLICKS_ONLY}" in text
    assert "40.3 %" in text
    assert "forest-" not in not_identified


def test_an_estimate_stands_with_estimand_sample_size_floor_and_cap_share(identified: str) -> None:
    text = Reader(identified).text
    assert "0.4466 (0.4345 to 0.4587)" in text
    assert "ESS 1,894, floor 500; < 0.1 % capped" in text
    assert "ESS 212, below its floor 500" in text
    assert "0.4188 (no interval claimed)" in text
    assert 'aria-label="Estimated reward per request' in identified
    assert 'aria-label="Estimated reward per session' in identified


def test_the_score_stands_with_its_weakest_part_and_every_part(page: str, evidence: Evidence) -> None:
    text = Reader(page).text
    assert "Its trust score is 0.59 on a scale from 0 to 1: that of its weakest part, requests of a session." in text
    for part in evidence.trust_score.parts:
        sign = "· unknown" if part.passed is None else "✓ held"
        assert f"{sign} {part.name}" in text


def test_probes_stand_with_both_values_gap_and_support_distance(identified: str) -> None:
    text = Reader(identified).text
    assert 'aria-label="Reward per request by the world model' in identified
    assert "gap +0.0105 (−0.00250 to +0.0235)" in text
    assert "ESS 212, too few to count" in text
    assert "The log supports what the world model promises. It earns 0.457 and 0.447; that is no exploit." in text
    assert "Distance from what the log shows" in text and "2.41" in text


def test_where_no_policy_has_a_value_none_was_probed_and_the_page_says_so(not_identified: str) -> None:
    assert "None were asked: this log gives no value of any policy" in Reader(not_identified).text
    assert "probes-" not in not_identified


def test_text_of_users_is_escaped(tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script> & $x"
    evidence = IDENTIFIED.model_copy(
        update={
            "limits": (hostile,),
            "reward": hostile,
            "source": hostile,
            "curves": (Curve(name=hostile, x=hostile, y=hostile, values=(1.0, 2.0)),),
            "estimates": (policy_value(hostile, "one-request NCIS", Estimand.ONE_REQUEST, 0.4, 0.1),),
            "ab": AB.model_copy(update={"control": hostile}),
            "probes": PROBES.model_copy(update={"probes": (probe(hostile, 0.4, ONE_REQUEST),)}),
        }
    )
    reader = Reader(written(evidence, tmp_path))
    assert "script" not in reader.tags
    assert hostile in reader.text


def test_the_same_records_give_the_same_bytes(tmp_path: Path, evidence: Evidence, page: str) -> None:
    assert written(evidence, tmp_path) == page


def test_a_run_without_estimates_curves_and_ab_has_a_page(tmp_path: Path) -> None:
    bare = NOT_IDENTIFIED.model_copy(
        update={
            "ranking": (),
            "curves": (),
            "ab": None,
            "releases": {},
            "splits": (),
            "seconds": {},
            "trust": TRUST.model_copy(update={"calibrations": (), "sessions": (), "discriminator_accuracy": None}),
        }
    )
    assert "There was no A/B." in Reader(written(bare, tmp_path)).text


def test_flat_and_empty_curves_and_certain_predictions_can_be_drawn(tmp_path: Path) -> None:
    never = Calibration(response="purchases", predicted=(0.0,), observed=(0.0,), error=0.0, n=3)
    odd = PLAIN.model_copy(
        update={
            "curves": (
                Curve(name="empty", x="step", y="nats", values=()),
                Curve(name="flat", x="step", y="nats", values=(1.0,)),
            ),
            "trust": TRUST.model_copy(update={"calibrations": (never,)}),
        }
    )
    assert "empty has no steps" in Reader(written(odd, tmp_path)).text


def test_a_page_replaces_an_older_one_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("older")
    assert written(PLAIN, tmp_path).startswith("<!doctype html>")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_a_page_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"missing/report\.html: cannot be written"):
        write_report(PLAIN, decision_on(PLAIN), LINEAGE, tmp_path / "missing" / "report.html")


def ledger(*entries: LedgerEntry) -> LedgerSummary:
    (summary,) = summarize(entries)
    return summary


def panel(summary: LedgerSummary | None, folder: Path) -> str:
    """The text of the ledger's part of the page."""
    page = written(PLAIN.model_copy(update={"ledger": summary}), folder)
    return Reader(page[page.index('<section id="ledger">') : page.index('<section id="lineage">')]).text


def test_the_ledger_has_one_table_for_each_kind_of_ab_with_counts_and_intervals(tmp_path: Path) -> None:
    weak = "simulated in a world model"
    entries = [ledger_entry(day, offline=0.1 * day, ab=ab_result(0.1 * day)) for day in range(6)]
    entries += [
        ledger_entry(6, offline=-0.2, ab=ab_result(0.4), passed=False),
        ledger_entry(7, ab=ab_result(0.3, weak)),
    ]
    text = panel(ledger(*entries), tmp_path)
    live, simulated = text.index("A/Bs: live"), text.index(f"A/Bs: {weak}")
    assert live < simulated
    assert "Only 7 A/Bs of this kind so far: too few" in text[live:simulated]
    assert "in neither share: 2 of 7" in text[live:simulated]
    assert "the gate, before the A/B what was logged7 4 of 4 (39.8 % to 100 %) 1 of 5 (0.5 % to 71.6 %)" in text[
        live:simulated
    ].replace("\N{NO-BREAK SPACE}", " ")
    assert "Only one A/B of this kind so far: too few" in text[simulated:]
    assert "weaker evidence, which counts for no other kind" in text[simulated:]
    assert "unknown: all were passed" in text[simulated:]


def test_enough_abs_of_as_many_logs_need_no_warning_and_fewer_logs_do(tmp_path: Path) -> None:
    many = [ledger_entry(day, ab=ab_result(0.1 + 0.01 * day)) for day in range(20)]
    assert "too few" not in panel(ledger(*many), tmp_path)
    assert "depend on each other" not in panel(ledger(*many), tmp_path)
    one_log = [entry.model_copy(update={"data_digest": "one"}) for entry in many]
    assert "The estimates come from one log: those of one log depend on each other" in panel(ledger(*one_log), tmp_path)


def test_predictions_are_drawn_against_their_abs_with_this_run_marked(tmp_path: Path) -> None:
    own = ledger_entry(1, offline=0.0471, ab=ab_result(0.3), run=LINEAGE.run)
    text = panel(ledger(ledger_entry(0, ab=ab_result()), own), tmp_path)
    assert "The diamond is this run: offline +0.0471, in the A/B +0.300." in text
    assert "live: 2 A/Bs" in text
    assert "The diamond" not in panel(ledger(ledger_entry(0, ab=ab_result())), tmp_path)


def test_a_ledger_without_predictions_has_a_table_and_no_drawing(tmp_path: Path) -> None:
    summary = ledger(ledger_entry(0, ab=ab_result(), offline=0.1).model_copy(update={"offline": (), "passed": False}))
    assert "1 of 1 (2.5 % to 100 %)" in panel(summary, tmp_path).replace("\N{NO-BREAK SPACE}", " ")
    page = written(PLAIN.model_copy(update={"ledger": summary}), tmp_path)
    assert 'id="ledger-' not in page


@pytest.mark.parametrize("summary", [None, ledger(ledger_entry())], ids=["no ledger", "no A/B"])
def test_a_ledger_without_abs_says_so(summary: LedgerSummary | None, tmp_path: Path) -> None:
    assert "No A/B has followed an offline estimate yet." in panel(summary, tmp_path)


def test_a_page_with_a_ledger_is_the_same_bytes_again_and_its_ids_are_unique(tmp_path: Path) -> None:
    entries = [
        ledger_entry(day, ab=ab_result(0.1 * day, label))
        for day, label in enumerate(("live", "true simulator", "live"))
    ]
    evidence = PLAIN.model_copy(update={"ledger": ledger(*entries)})
    again = Evidence.model_validate_json(evidence.model_dump_json())
    assert written(again, tmp_path) == written(evidence, tmp_path)
    ids = Reader(written(IDENTIFIED.model_copy(update={"ledger": evidence.ledger}), tmp_path)).ids
    assert len(set(ids)) == len(ids)


def test_the_test_of_the_logged_probabilities_is_on_the_page(identified: str) -> None:
    text = Reader(identified).text
    assert "Do the logged probabilities fit the slates?" in text
    assert "calibration: slates 1 and 2 of 10" in text
    assert "propensities estimated" not in text.lower()


def test_estimated_propensities_are_said_wherever_an_estimate_rests_on_them(tmp_path: Path) -> None:
    def fitted(estimate: PolicyValue) -> PolicyValue:
        return estimate.model_copy(update={"propensities_estimated": True})

    evidence = PLAIN.model_copy(
        update={
            "evidence_level": "slates",
            "probes": PROBES,
            "gating": fitted(ONE_REQUEST),
            "estimates": tuple(fitted(part) for part in IDENTIFIED.estimates if isinstance(part, PolicyValue)),
            "propensity_check": CONSISTENCY.model_copy(update={"estimated": True}),
            "releases": {
                "reinforce": Release(
                    strength=0.75, validation_ess=1_130.2, required_ess=750.0, propensities_estimated=True
                )
            },
        }
    )
    page = written(evidence, tmp_path)
    text = Reader(page).text
    assert decision_on(evidence).outcome.value == "canary"
    assert "▲ Propensities estimated." in text  # what the log can tell
    assert "against what was logged; propensities estimated" in text  # at the decision
    assert "1,130 (propensities estimated)" in text  # at the release
    assert "Do the estimated probabilities fit the slates?" in text
    # In each of the three forests: once a row, and in the caption beside and within the drawing.
    drawings = [part for part in re.findall(r"<svg.*?</svg>", page, re.DOTALL) if 'aria-label="Estimated rew' in part]
    assert [drawing.count("▲ propensities estimated") for drawing in drawings] == [4, 2, 2]
    assert text.count("none, propensities estimated.") + text.count("intervals, propensities estimated.") == 3
