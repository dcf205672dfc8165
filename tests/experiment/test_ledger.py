from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from components.errors import InputError
from components.evaluation.exploit_probes import ExploitVerdict
from components.evaluation.policy_value import Estimand, NotIdentified, PolicyDifference, PolicyValue
from components.evaluation.propensity_check import PropensityCheck, PropensityTest
from components.experiment.ab import AbResult
from components.experiment.arm import ArmMean
from components.experiment.evidence import GateEvidence, TrustSummary
from components.experiment.gate import GateConfig, Outcome
from components.experiment.guardrails import Guardrail, Metric
from components.experiment.ledger import (
    Correlation,
    LedgerAb,
    LedgerEntry,
    OfflineDifference,
    Proportion,
    Score,
    enter,
    summarize,
)
from components.interactions.contract import RatioAssumption

#: A guarded metric that does not change.
SAME = ArmMean(n_users=5_000, n_sessions=9_000, mean=1.0, variance=1e-4, session_variance=1e-4)
NCIS, SESSION = "one-request NCIS", "session NCIS"
DAY = datetime(2026, 4, 1, tzinfo=UTC)
#: Intervals of A/Bs by what they say.
BETTER, WORSE, UNCLEAR = (0.1, 0.3), (-0.3, -0.1), (-0.1, 0.3)


def ab(bounds: tuple[float, float] = BETTER, **changes) -> LedgerAb:
    lower, upper = bounds
    fields = {
        "label": "live",
        "control": "old",
        "difference": (lower + upper) / 2,
        "lower": lower,
        "upper": upper,
        "confidence": 0.95,
        "sample_ratio_p_value": 0.5,
    }
    return LedgerAb(**(fields | changes))


def predicted(difference: float, reference: str | None = "old", **changes) -> OfflineDifference:
    fields = {
        "estimator": NCIS,
        "estimand": Estimand.ONE_REQUEST,
        "reference": reference,
        "difference": difference,
        "lower": None,
        "upper": None,
        "effective_sample_size": 900.0,
    }
    return OfflineDifference(**(fields | changes))


def entry(day: int, passed: bool, followed: LedgerAb | None, *offline: OfflineDifference, **changes) -> LedgerEntry:
    fields = {
        "run": f"shop-{day}",
        "started": DAY + timedelta(days=day),
        "loop": "shop",
        "source": "storefront",
        "reward": "clicks",
        "data_digest": f"log-{day}",
        "challenger": "new",
        "champion": "old",
        "offline": offline,
        "passed": passed,
        "outcome": Outcome.CANARY if passed else Outcome.HOLD,
        "ab": followed,
    }
    return LedgerEntry(**(fields | changes))


def score(entries: list[LedgerEntry], judge: str = "gate", label: str = "live") -> Score:
    (summary,) = summarize(entries)
    (found,) = (part for kind in summary.labels if kind.label == label for part in kind.scores if part.judge == judge)
    return found


def counts(proportion: Proportion | None) -> tuple[int, int] | None:
    return None if proportion is None else (proportion.count, proportion.total)


def test_exact_intervals_are_those_of_the_closed_forms():
    # With k of n: none seen, 1 − (α/2)^(1/n) is the upper end; all seen, (α/2)^(1/n) the lower; one of two solves p².
    none, all_of_them, one = Proportion.of(0, 4), Proportion.of(5, 5), Proportion.of(1, 2)
    assert none is not None and all_of_them is not None and one is not None
    assert (none.lower, none.upper) == pytest.approx((0, 1 - 0.025 ** (1 / 4)))
    assert (all_of_them.lower, all_of_them.upper) == pytest.approx((0.025 ** (1 / 5), 1))
    assert (one.lower, one.upper) == pytest.approx((1 - 0.975**0.5, 0.975**0.5))
    assert Proportion.of(0, 0) is None


def test_an_exact_interval_holds_the_true_share_in_at_least_95_of_100_ledgers():
    n, share = 9, 0.3
    covered = [(part := Proportion.of(k, n)) and part.lower <= share <= part.upper for k in range(n + 1)]
    assert stats.binom.pmf(np.arange(n + 1), n, share)[covered].sum() >= 0.95


def test_precision_and_missed_improvements_of_a_ledger_counted_by_hand():
    # Passed: two better, one worse, one unclear. Held: one better, two worse, one unclear.
    verdicts = [(True, BETTER), (True, BETTER), (True, WORSE), (True, UNCLEAR)]
    verdicts += [(False, BETTER), (False, WORSE), (False, WORSE), (False, UNCLEAR)]
    # The estimator puts all but the last two above 0.
    entries = [
        entry(day, passed, ab(bounds, difference=bounds[0] + 0.01 * day), predicted(5.5 - day))
        for day, (passed, bounds) in enumerate(verdicts)
    ]
    gate, estimator = score(entries), score(entries, NCIS)
    assert (gate.n, gate.n_passed, gate.n_undecided) == (8, 4, 2)
    assert counts(gate.precision) == (2, 3)
    assert counts(gate.false_negative_rate) == (1, 3)
    assert gate.correlation is None
    assert (estimator.n, estimator.n_passed, estimator.n_undecided) == (8, 6, 2)
    assert counts(estimator.precision) == (3, 5)
    assert counts(estimator.false_negative_rate) == (0, 3)
    assert [(point.run, point.offline) for point in estimator.points][:2] == [("shop-0", 5.5), ("shop-1", 4.5)]


def test_correlations_by_hand():
    # Deviations −1.5, −0.5, 0.5, 1.5 and −2, −1, 1, 2: 7 / √(5 · 10). The ranks agree.
    entries = [
        entry(day, True, ab((value - 0.1, value + 0.1), difference=value), predicted(float(day)))
        for day, value in enumerate((0.0, 1.0, 3.0, 4.0))
    ]
    correlation = score(entries, NCIS).correlation
    assert correlation is not None
    assert correlation.pearson == pytest.approx(7 / 50**0.5)
    assert correlation.spearman == pytest.approx(1)


def test_a_correlations_interval_is_fishers():
    x, y = np.arange(10.0), np.array([1.0, 0, 3, 2, 5, 4, 7, 6, 9, 8])
    correlation = Correlation.of(list(x), list(y))
    assert correlation is not None
    half_width = stats.norm.ppf(0.975) / np.sqrt(10 - 3)
    r = np.corrcoef(x, y)[0, 1]
    assert np.arctanh([correlation.lower, correlation.upper]) == pytest.approx(
        [np.arctanh(r) - half_width, np.arctanh(r) + half_width]
    )


@pytest.mark.parametrize(
    ("offline", "later"),
    [
        ([], []),
        ([1.0, 2.0, 4.0], [1.0, 2.0, 3.0]),
        ([1.0, 1.0, 1.0, 1.0 + 1e-15], [1.0, 2.0, 3.0, 4.0]),
        ([1.0, 2.0, 3.0, 4.0], [0.0] * 4),
    ],
)
def test_few_pairs_and_pairs_that_do_not_vary_have_no_correlation(offline, later):
    assert Correlation.of(offline, later) is None


def test_where_all_were_passed_nobody_knows_what_would_have_been_missed():
    assert score([entry(0, True, ab(BETTER))]).false_negative_rate is None
    assert counts(score([entry(0, True, ab(BETTER)), entry(1, False, ab(WORSE))]).false_negative_rate) == (0, 1)


def test_where_nothing_was_passed_and_decided_there_is_no_precision():
    found = score([entry(0, True, ab(UNCLEAR)), entry(1, False, ab(BETTER))])
    assert found.precision is None
    assert counts(found.false_negative_rate) == (1, 1)


def test_an_interval_that_ends_at_0_is_undecided():
    assert [ab(bounds).verdict for bounds in ((0.0, 0.2), (-0.2, 0.0), (1e-9, 0.2), (-0.2, -1e-9))] == [
        "undecided",
        "undecided",
        "improvement",
        "worse",
    ]


def test_an_unsound_ab_is_counted_and_used_for_nothing():
    (summary,) = summarize([entry(0, True, ab()), entry(1, True, ab(WORSE, sample_ratio_p_value=1e-6))])
    (label,) = summary.labels
    assert (label.n, label.n_unsound, label.n_logs) == (1, 1, 1)
    assert [counts(part.precision) for part in label.scores] == [(1, 1)]


def test_labels_are_never_pooled_and_the_strongest_comes_first():
    world_model = "simulated in a world model"
    entries = [
        entry(0, True, ab(WORSE, label=world_model)),
        entry(1, True, ab(BETTER, label="true simulator")),
        entry(1, True, ab(UNCLEAR)),
    ]
    (summary,) = summarize(entries)
    assert [label.label for label in summary.labels] == ["live", "true simulator", world_model]
    assert [counts(label.scores[0].precision) for label in summary.labels] == [None, (1, 1), (0, 1)]


def test_loops_sources_and_rewards_are_never_pooled():
    others = [entry(1, True, ab(), **{name: "other"}) for name in ("loop", "source", "reward")]
    summaries = summarize([entry(0, True, ab()), *others])
    assert [(part.loop, part.source, part.reward) for part in summaries] == [
        ("other", "storefront", "clicks"),
        ("shop", "other", "clicks"),
        ("shop", "storefront", "clicks"),
        ("shop", "storefront", "other"),
    ]
    assert all(label.n == 1 for part in summaries for label in part.labels)


def test_an_estimate_is_held_against_the_abs_own_question_where_it_was_asked():
    to_log, to_control = predicted(0.5, None), predicted(-0.2, "old")
    only_log = predicted(0.7, None, estimator=SESSION, estimand=Estimand.SESSION)
    for offline in ((to_log, to_control, only_log), (only_log, to_control, to_log)):
        (summary,) = summarize([entry(0, True, ab(), *offline)])
        (label,) = summary.labels
        assert [(part.judge, part.contrast, [point.offline for point in part.points]) for part in label.scores] == [
            ("gate", "control", []),
            (NCIS, "control", [-0.2]),
            (SESSION, "log", [0.7]),
        ]


def test_differences_to_different_references_are_never_pooled():
    entries = [
        entry(0, True, ab(), predicted(0.1, None), champion=None),
        entry(1, True, ab(control="older"), predicted(0.2, None), predicted(0.3, "old")),
        entry(2, True, ab(), predicted(0.4, "old"), champion="old"),
    ]
    (summary,) = summarize(entries)
    (label,) = summary.labels
    assert [(part.judge, part.contrast, part.n) for part in label.scores] == [
        ("gate", "control", 1),
        ("gate", "log", 1),
        ("gate", "another policy", 1),
        (NCIS, "control", 1),
        (NCIS, "log", 2),
    ]
    assert label.n == 3


def test_the_same_observation_under_another_gate_counts_once_with_the_latest_verdict():
    again = entry(3, False, ab(), predicted(0.1), data_digest="log-0")
    (label,) = summarize([again, entry(0, True, ab(), predicted(0.1))])[0].labels
    assert label.n == 1
    assert [(part.judge, part.n_passed) for part in label.scores] == [("gate", 0), (NCIS, 1)]
    assert [point.run for part in label.scores for point in part.points] == ["shop-3"]


def test_predictions_wait_for_an_ab_until_any_follows():
    waiting = entry(0, True, None, predicted(0.1))
    (summary,) = summarize([waiting, entry(1, True, None, predicted(0.2))])
    assert (summary.n_waiting, summary.labels) == (2, ())
    (summary,) = summarize([waiting, waiting.model_copy(update={"ab": ab()})])
    assert summary.n_waiting == 0


ENTRIES = st.lists(
    st.builds(
        lambda day, passed, bounds, label, offline, reference: entry(
            day, passed, ab(bounds, label=label), predicted(offline, None), predicted(offline - 0.1, reference)
        ),
        st.integers(0, 40),
        st.booleans(),
        st.sampled_from((BETTER, WORSE, UNCLEAR)),
        st.sampled_from(("live", "true simulator")),
        st.floats(-1, 1),
        st.sampled_from(("old", "other")),
    ),
    max_size=12,
    unique_by=lambda entry: entry.run,
)


@settings(max_examples=60, deadline=None)
@given(ENTRIES, st.randoms(use_true_random=False))
def test_neither_order_nor_repetition_of_entries_changes_a_summary(entries, random):
    once = summarize(entries)
    shuffled = entries + random.choices(entries, k=3) if entries else []
    random.shuffle(shuffled)
    assert summarize(shuffled) == once
    # A run that reused everything says the same under a later name.
    repeated = [
        part.model_copy(update={"run": f"{part.run}-again", "started": part.started + timedelta(hours=1)})
        for part in entries
    ]
    again = summarize(entries + repeated)
    without_points = [label.model_dump(exclude={"scores": {"__all__": {"points"}}}) for s in once for label in s.labels]
    assert [
        label.model_dump(exclude={"scores": {"__all__": {"points"}}}) for s in again for label in s.labels
    ] == without_points


@settings(max_examples=60, deadline=None)
@given(ENTRIES)
def test_every_sound_ab_is_in_one_score_of_the_gate_and_the_counts_add_up(entries):
    for summary in summarize(entries):
        for label in summary.labels:
            gates = [part for part in label.scores if part.judge == "gate"]
            assert sum(part.n for part in gates) == label.n
            assert sum(part.n_undecided for part in gates) == label.n_undecided
            for part in label.scores:
                assert part.n_passed <= part.n
                for proportion in (part.precision, part.false_negative_rate):
                    if proportion is not None:
                        assert 0 <= proportion.lower <= proportion.count / proportion.total <= proportion.upper <= 1
                        assert proportion.total <= part.n - part.n_undecided


def value(policy: str, worth: float, ess: float = 2_000.0, **changes) -> PolicyValue:
    fields = {
        "policy": policy,
        "estimator": NCIS,
        "estimand": Estimand.ONE_REQUEST,
        "ratio": RatioAssumption.FULL_SLATE,
        "value": worth,
        "lower": worth - 0.1,
        "upper": worth + 0.1,
        "confidence": 0.95,
        "effective_sample_size": ess,
        "n_requests": 40_000,
        "n_units": 40_000,
        "n_users": 5_000,
        "cap": 200.0,
        "cap_share": 0.001,
        "max_weight": 200.0,
        "mean_weight": 1.01,
        "mean_weight_lower": 0.96,
        "mean_weight_upper": 1.06,
        "behavior_value": 0.3,
        "difference": worth - 0.3,
        "difference_lower": worth - 0.4,
        "difference_upper": worth - 0.2,
        "propensities_estimated": False,
        "interval": "user-clustered delta method",
    }
    return PolicyValue(**(fields | changes))


def result(**changes) -> AbResult:
    fields = {
        "label": "live",
        "treatment": "new",
        "control": "old",
        "treatment_users": 5_000,
        "control_users": 5_000,
        "treatment_sessions": 9_000,
        "control_sessions": 9_000,
        "planned_share": 0.5,
        "treatment_mean": 1.2,
        "control_mean": 1.0,
        "difference": 0.2,
        "lower": 0.1,
        "upper": 0.3,
        "confidence": 0.95,
        "relative_difference": 0.2,
        "sample_ratio_p_value": 0.6,
        "minimum_detectable_effect": 0.12,
        "conclusive": True,
        "standard_error": 0.051,
        "degrees_of_freedom": 9_000.0,
        "guardrails": tuple(Guardrail(metric=metric, treatment=SAME, control=SAME) for metric in Metric),
    }
    return AbResult(**(fields | changes))


SOUND = PropensityCheck(
    estimated=False,
    tolerance=0.002,
    n_requests=40_000,
    n_users=5_000,
    tests=(
        PropensityTest(
            kind="mean weight",
            target="uniform policy",
            strength=0.5,
            slates="all",
            expected=1.0,
            observed=1.02,
            lower=0.98,
            upper=1.06,
            p_value=0.3,
        ),
    ),
)


def evidence(**changes) -> GateEvidence:
    fields = {
        "challenger": "new",
        "champion_policy": None,
        "ab_started": True,
        "ratio_assumption": RatioAssumption.FULL_SLATE,
        "data_passed": True,
        "trust": TrustSummary(passed=True),
        "exploit": ExploitVerdict(policy="new", supported=True, text="It keeps to the log."),
        "offline": value("new", 0.5),
        "cross_check": value("new", 0.5, estimator="DR"),
        "propensities": SOUND,
        "ab": result(),
    }
    return GateEvidence(**(fields | changes))


def entered(told: GateEvidence, *estimates: PolicyValue | NotIdentified) -> LedgerEntry:
    named = {"loop": "shop", "source": "table", "reward": "clicks", "data_digest": "log", "run": "shop-1"}
    return enter(told, estimates, GateConfig(), started=DAY, **named)


def test_an_entry_has_every_estimate_of_the_challenger_against_the_log_and_every_other_policy():
    estimates = [
        value("new", 0.5),
        value("new", 2.0, 300.0, estimator=SESSION, estimand=Estimand.SESSION, behavior_value=1.5, difference=0.5),
        value("old", 0.4, 700.0),
    ]
    made = entered(evidence(), *estimates)
    assert [
        (part.estimator, part.reference, pytest.approx(part.difference), part.lower, part.effective_sample_size)
        for part in made.offline
    ] == [
        (NCIS, None, 0.2, pytest.approx(0.1), 2_000),
        (NCIS, "old", 0.1, None, 700),
        (SESSION, None, 0.5, pytest.approx(1.6), 300),
    ]
    assert LedgerEntry.model_validate_json(made.model_dump_json()) == made


def test_a_paired_comparison_gives_its_interval():
    comparison = PolicyDifference(
        policy="new",
        reference="old",
        estimand=Estimand.ONE_REQUEST,
        difference=0.1,
        lower=0.02,
        upper=0.18,
        confidence=0.95,
        n_users=5_000,
    )
    told = evidence(champion_policy="old", champion=value("old", 0.4), comparison=comparison)
    made = entered(told, value("new", 0.5), value("old", 0.4))
    assert (made.offline[1].reference, made.offline[1].lower, made.offline[1].upper) == ("old", 0.02, 0.18)
    assert made.champion == "old"


@pytest.mark.parametrize(
    ("changes", "passed", "outcome"),
    [
        ({}, True, Outcome.PROMOTE),
        ({"ab": result(difference=-0.2, lower=-0.3, upper=-0.1)}, True, Outcome.HOLD),
        ({"ab": None, "ab_started": True}, True, Outcome.HOLD),
        ({"data_passed": False}, False, Outcome.HOLD),
        ({"offline": value("new", 0.35)}, False, Outcome.HOLD),
    ],
)
def test_the_gates_offline_verdict_knows_nothing_of_the_ab(changes, passed, outcome):
    made = entered(evidence(**changes), value("new", 0.5))
    assert (made.passed, made.outcome) == (passed, outcome)


def test_a_challenger_of_unknown_value_was_not_passed():
    unknown = NotIdentified(policy="new", estimand=Estimand.ONE_REQUEST, reason="Clicks only.")
    made = entered(evidence(offline=unknown), unknown)
    assert (made.offline, made.passed) == ((), False)
    assert [part.judge for part in summarize([made])[0].labels[0].scores] == ["gate"]


def test_a_later_ab_must_be_of_the_challenger_and_as_sure_as_the_gate_asks():
    made = entered(evidence(), value("new", 0.5))
    later = made.followed_by(result(difference=0.15, control="champion"))
    assert later.ab is not None
    assert (later.ab.difference, later.ab.control, later.run) == (0.15, "champion", made.run)
    with pytest.raises(InputError, match="treatment: is 'newer'; expected 'new', the challenger of run shop-1"):
        made.followed_by(result(treatment="newer"))
    with pytest.raises(InputError, match=r"confidence: is 0\.8; expected 0\.95 or more"):
        made.followed_by(result(confidence=0.8))
