import numpy as np
import pytest

from components.evaluation.literature_ncis import literature_ncis
from components.evaluation.policy_value import Estimand
from components.interactions.contract import RatioAssumption

NAMES = {"policy": "challenger", "ratio": RatioAssumption.FULL_SLATE}


def test_weights_are_normalised_inside_each_session(make_log):
    # Session 0: (1·2 + 3·4) / 4; session 1: 5; ratio 30 is capped at 10, alone in its session.
    log = make_log([2, 4, 5], np.log([1, 3, 30]), user=[0, 0, 1], session=[0, 0, 1], step=[0, 1, 0])
    value = literature_ncis(log, **NAMES)
    assert value.value == pytest.approx((14 / 4 + 5) / 2)
    assert value.behavior_value == pytest.approx((3 + 5) / 2)
    assert (value.cap, value.cap_share, value.max_weight) == pytest.approx((10, 1 / 3, 10))


def test_on_sessions_of_one_request_every_policy_gets_the_logged_mean(make_log):
    generator = np.random.default_rng(0)
    rewards = generator.normal(size=100)
    for log_ratios in (generator.normal(size=100), 3 * rewards, -3 * rewards):
        value = literature_ncis(make_log(rewards, log_ratios), **NAMES)
        assert value.value == pytest.approx(rewards.mean())
        assert value.difference == pytest.approx(0, abs=1e-15)


def test_it_claims_no_interval_and_names_an_estimand_of_its_own(random_log):
    value = literature_ncis(random_log, **NAMES)
    assert value.estimand is Estimand.SESSION_AVERAGE
    assert value.interval == "none"
    assert {value.lower, value.upper, value.difference_lower, value.difference_upper, value.mean_weight_lower} == {None}


@pytest.mark.filterwarnings("error")
def test_log_ratios_of_700_neither_overflow_nor_vanish(make_log):
    log = make_log([1, 3, 5, 7], [-700, -700, 700, 700], [0, 0, 1, 1], [0, 0, 1, 1], [0, 1, 0, 1])
    assert literature_ncis(log, **NAMES).value == pytest.approx((2 + 6) / 2)
