import numpy as np
import pytest

from components.evaluation.importance_sampling import (
    importance_sampling,
    per_decision_importance_sampling,
    session_importance_sampling,
)
from components.evaluation.policy_value import Estimand
from components.interactions.contract import RatioAssumption

NAMES = {"policy": "challenger", "ratio": RatioAssumption.FULL_SLATE}


def test_the_one_request_value_by_hand(make_log):
    # Weights 1, 2 (3 capped at 2), 0.5, 1.5: (1·1 + 2·0 + 0.5·2 + 1.5·4) / 4.
    value = importance_sampling(make_log([1, 0, 2, 4], np.log([1, 3, 0.5, 1.5])), **NAMES)
    assert value.value == pytest.approx(8 / 4)
    assert value.mean_weight == pytest.approx(6 / 4)
    assert (value.cap, value.cap_share, value.estimand) == (2, 0.25, Estimand.ONE_REQUEST)


def test_session_values_by_hand(make_log):
    # Session 0: ratio 2, reward 1. Session 1: ratios 1/2 and 3, rewards 2 and 4.
    log = make_log([1, 2, 4], np.log([2, 0.5, 3]), user=[0, 1, 1], session=[0, 1, 1], step=[0, 0, 1])
    whole = session_importance_sampling(log, **NAMES, cap=100.0)
    assert whole.value == pytest.approx((2 * 1 + 1.5 * 6) / 2)
    by_decision = per_decision_importance_sampling(log, **NAMES, cap=100.0)
    assert by_decision.value == pytest.approx((2 * 1 + 0.5 * 2 + 1.5 * 4) / 2)
    for value in (whole, by_decision):
        assert value.estimand is Estimand.SESSION
        assert value.behavior_value == pytest.approx(7 / 2)
        assert value.mean_weight == pytest.approx((2 + 1.5) / 2)
        assert (value.n_units, value.n_requests) == (2, 3)


def test_the_behavior_policy_itself_has_the_logged_mean(random_log):
    log = random_log.take(np.arange(len(random_log.rewards)))
    object.__setattr__(log, "target_log_probs", log.behavior_log_probs)
    assert importance_sampling(log, **NAMES).value == pytest.approx(log.rewards.mean(), abs=1e-12)
    for estimator in (session_importance_sampling, per_decision_importance_sampling):
        value = estimator(log, **NAMES)
        assert value.value == pytest.approx(log.rewards.sum() / 300, abs=1e-12)
        assert (value.difference_lower, value.difference_upper) == pytest.approx((0, 0), abs=1e-12)


def test_order_does_not_matter(random_log):
    shuffled = random_log.take(np.random.default_rng(2).permutation(len(random_log.rewards)))
    for estimator in (importance_sampling, session_importance_sampling, per_decision_importance_sampling):
        first, second = estimator(random_log, **NAMES), estimator(shuffled, **NAMES)
        assert first.value == pytest.approx(second.value, abs=1e-12)
        assert first.upper == pytest.approx(second.upper, abs=1e-12)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("log_ratio", [-700.0, 700.0])
def test_log_ratios_of_700_do_not_overflow(make_log, log_ratio):
    log = make_log([1, 2, 3], [log_ratio] * 3, [0, 1, 2], [0, 1, 2], [0, 0, 0])
    for estimator in (importance_sampling, session_importance_sampling, per_decision_importance_sampling):
        assert estimator(log, **NAMES).value == pytest.approx(2 * np.sqrt(3) if log_ratio > 0 else 0, abs=1e-12)
