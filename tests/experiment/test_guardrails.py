import numpy as np
import pytest
import torch
from scipy import stats

from components.environments.rollout import rollout
from components.environments.storefront import BehaviorPolicy
from components.errors import InputError
from components.experiment.ab import analyze_ab
from components.experiment.arm import ArmMean
from components.experiment.guardrails import Guardrail, GuardrailMargins, Metric, judge_guardrail, session_metrics

LEVEL = 0.03


def guardrail(metric, treatment, control, error=0.1, n_users=100_000):
    """A metric with this standard error of the mean in each arm."""
    arms = [
        ArmMean(n_users=n_users, n_sessions=n_users, mean=mean, variance=error**2, session_variance=error**2)
        for mean in (treatment, control)
    ]
    return Guardrail(metric=metric, treatment=arms[0], control=arms[1])


def test_the_slack_and_its_bound_by_hand():
    # s = 9.9 − 0.95 · 10 = 0.4 with standard error 0.1 √(1 + 0.95²); the bound lies 1.8808 of them below.
    judged = judge_guardrail(guardrail(Metric.CLICKS, 9.9, 10.0), 0.05, LEVEL)
    least = 0.4 - stats.norm.ppf(0.97) * 0.1 * np.sqrt(1 + 0.95**2)
    assert judged.verdict == "non-inferior"
    assert judged.change == pytest.approx(-0.01)
    assert judged.worst_change == pytest.approx(least / 10 - 0.05, abs=1e-6)


@pytest.mark.parametrize(
    ("metric", "treatment", "verdict"),
    [
        (Metric.CLICKS, 10.5, "non-inferior"),
        (Metric.CLICKS, 9.6, "unclear"),
        (Metric.CLICKS, 9.4, "unclear"),
        (Metric.CLICKS, 9.0, "inferior"),
        (Metric.FIRST_REQUEST_EXITS, 9.0, "non-inferior"),
        (Metric.FIRST_REQUEST_EXITS, 10.4, "unclear"),
        (Metric.FIRST_REQUEST_EXITS, 11.0, "inferior"),
    ],
)
def test_a_metric_is_within_beyond_or_unclear(metric, treatment, verdict):
    judged = judge_guardrail(guardrail(metric, treatment, 10.0), 0.05, LEVEL)
    assert judged.verdict == verdict
    within = judged.worst_change <= 0.05 if metric.less_is_better else judged.worst_change >= -0.05
    assert within == (verdict == "non-inferior")


def test_bounds_for_every_look_ask_for_more():
    near = guardrail(Metric.CLICKS, 9.85, 10.0)
    assert judge_guardrail(near, 0.05, LEVEL).verdict == "non-inferior"
    assert judge_guardrail(near, 0.05, LEVEL, planned_sessions=200_000).verdict == "unclear"


def test_what_never_happens_in_either_arm_is_unharmed():
    judged = judge_guardrail(guardrail(Metric.PURCHASES, 0.0, 0.0, error=0.0), 0.1, LEVEL)
    assert (judged.verdict, judged.change, judged.worst_change) == ("non-inferior", None, None)
    # What the control never did, and the treatment does, is harm where less is better.
    exits = judge_guardrail(guardrail(Metric.FIRST_REQUEST_EXITS, 0.2, 0.0, error=0.001), 0.1, LEVEL)
    assert exits.verdict == "inferior"


def test_a_metric_at_its_margin_passes_as_often_as_designed():
    generator = np.random.default_rng(0)
    passed = 0
    for _ in range(1_000):
        user = np.repeat(np.arange(400), 2)
        in_treatment = user < 200
        values = generator.exponential(np.where(in_treatment, 0.95, 1.0))
        result = analyze_ab(
            user, values, in_treatment, label="live", treatment="new", control="old", planned_share=0.5,
            metrics={Metric.CLICKS: values},
        )  # fmt: skip
        passed += result.judge(result.guardrails[0], 0.05, LEVEL).verdict == "non-inferior"
    low, high = stats.binom.interval(0.999, 1_000, LEVEL)
    assert low <= passed <= high


def test_metrics_of_sessions_are_counted_from_the_batch(storefront):
    generator = torch.Generator().manual_seed(0)
    batch = rollout(storefront, BehaviorPolicy(storefront), torch.arange(100), generator, 8)
    metrics = session_metrics(batch)
    for session in range(100):
        n = int(batch.mask[session].sum())
        assert metrics[Metric.SESSION_LENGTH][session] == n
        assert metrics[Metric.CLICKS][session] == batch.clicks[session, :n].sum()
        assert metrics[Metric.PURCHASES][session] == batch.purchases[session, :n].sum()
        assert metrics[Metric.FIRST_REQUEST_EXITS][session] == (n == 1)
    assert 0 < metrics[Metric.FIRST_REQUEST_EXITS].mean() < 1
    # A session that is cut after its first request was not left there.
    cut = session_metrics(rollout(storefront, BehaviorPolicy(storefront), torch.arange(100), generator, 1))
    assert 0 < cut[Metric.FIRST_REQUEST_EXITS].sum() < 100


def test_there_is_a_margin_for_every_metric():
    assert {metric.value for metric in Metric} == set(GuardrailMargins.model_fields)


@pytest.mark.parametrize(
    ("column", "message"),
    [(np.ones(3), r"clicks has shape \(3,\); expected one value for each of 4"), (np.full(4, np.nan), "4 clicks")],
)
def test_metrics_that_do_not_fit_the_sessions_are_refused(column, message):
    with pytest.raises(InputError, match=message):
        analyze_ab(
            np.arange(4), np.ones(4), np.arange(4) < 2, label="live", treatment="new", control="old", planned_share=0.5,
            metrics={Metric.CLICKS: column},
        )  # fmt: skip
