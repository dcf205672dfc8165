from functools import reduce

import numpy as np
import pytest

from components.evaluation.logged_requests import LoggedRequests
from components.evaluation.ncis import one_request_ncis
from components.evaluation.policy_value import Estimand
from components.evaluation.ratio_sums import merge
from components.evaluation.session_ncis import session_ncis, session_sums, session_value
from components.interactions.contract import RatioAssumption

NAMES = {"policy": "challenger", "ratio": RatioAssumption.FULL_SLATE}


def test_a_short_sessions_weight_is_carried_past_its_end(make_log):
    # Session 0: one request, ratio 2, reward 1. Session 1: two requests, ratios 1 and 3, rewards 2 and 4.
    # Step 0: (2·1 + 1·2) / (2 + 1); step 1: (1·3·4) / (2 carried + 3).
    log = make_log([1, 2, 4], np.log([2, 1, 3]), user=[0, 1, 1], session=[0, 1, 1], step=[0, 0, 1])
    value = session_ncis(log, **NAMES, cap=100.0)
    assert value.value == pytest.approx(4 / 3 + 12 / 5)
    assert value.behavior_value == pytest.approx(7 / 2)
    assert value.effective_sample_size == pytest.approx(25 / 13)
    assert value.mean_weight == pytest.approx(5 / 2)
    assert (value.n_requests, value.n_units, value.n_users) == (3, 2, 2)
    assert value.estimand is Estimand.SESSION


def test_cumulative_weights_are_capped(make_log):
    log = make_log([1, 1, 1], np.log([4, 4, 1]), user=[0, 0, 1], session=[0, 0, 1], step=[0, 1, 0])
    value = session_ncis(log, **NAMES, cap=8.0)
    assert value.value == pytest.approx((4 + 1) / 5 + 8 / 9)
    assert (value.cap_share, value.max_weight) == pytest.approx((1 / 3, 8))


def test_the_behavior_policy_itself_has_the_logged_mean_of_session_rewards(random_log):
    log = LoggedRequests(
        random_log.rewards,
        random_log.behavior_log_probs,
        random_log.behavior_log_probs,
        random_log.user,
        random_log.session,
        random_log.step,
    )
    value = session_ncis(log, **NAMES)
    assert value.value == pytest.approx(random_log.rewards.sum() / 300, abs=1e-12)
    assert (value.difference_lower, value.difference_upper) == pytest.approx((0, 0), abs=1e-12)


def test_sessions_of_one_request_have_the_one_request_value(make_log):
    generator = np.random.default_rng(4)
    log = make_log(generator.normal(size=200), generator.normal(size=200), user=generator.integers(0, 50, size=200))
    of_sessions, of_requests = session_ncis(log, **NAMES), one_request_ncis(log, **NAMES)
    for field in ("value", "lower", "upper", "difference_lower", "effective_sample_size", "mean_weight_upper"):
        assert getattr(of_sessions, field) == pytest.approx(getattr(of_requests, field), abs=1e-12)


def test_shards_of_whole_sessions_merge_to_the_estimate_of_the_whole_log(random_log):
    cap = np.sqrt(300)
    # Unequal lengths of the longest session, so that shards differ in their number of steps.
    short = np.isin(random_log.session, random_log.session[random_log.step >= 2], invert=True)
    shards = [short, ~short & (random_log.session % 2 == 0), ~short & (random_log.session % 2 == 1)]
    parts = [session_sums(random_log.take(rows), cap) for rows in shards]
    assert len({len(part.log_scales) for part in parts}) > 1
    merged = session_value(reduce(merge, parts), **NAMES).model_dump()
    for field, expected in session_ncis(random_log, **NAMES).model_dump().items():
        if isinstance(expected, float):
            assert merged[field] == pytest.approx(expected, rel=1e-12, abs=1e-12), field
        else:
            assert merged[field] == expected, field


@pytest.mark.filterwarnings("error")
def test_products_of_huge_and_tiny_ratios_neither_overflow_nor_vanish(make_log):
    log_ratios = [-700, -700, -700, -700 + np.log(3), 700, 700]
    log = make_log([1, 2, 3, 4, 5, 6], log_ratios, [0, 0, 1, 1, 2, 2], [0, 0, 1, 1, 2, 2], [0, 1, 0, 1, 0, 1])
    assert session_ncis(log, **NAMES).value == pytest.approx(11)
    without_huge = session_ncis(log.take(np.arange(4)), **NAMES)
    assert without_huge.value == pytest.approx((1 + 3) / 2 + (2 + 3 * 4) / 4)


def test_a_policy_that_lengthens_sessions_gets_the_value_of_their_length():
    # A good slate (shown with probability 1/2) keeps the session alive for one more request, at most 3; reward 1 each.
    # Under the target it is shown with probability 4/5: 1 + 0.8 + 0.64.
    generator = np.random.default_rng(5)
    good = generator.random((20_000, 3)) < 0.5
    alive = np.column_stack([np.ones(20_000, bool), good[:, 0], good[:, 0] & good[:, 1]])
    session, step = np.nonzero(alive)
    shown_good = good[session, step]
    log = LoggedRequests(
        rewards=np.ones(len(session)),
        behavior_log_probs=np.full(len(session), np.log(0.5)),
        target_log_probs=np.log(np.where(shown_good, 0.8, 0.2)),
        user=session,
        session=session,
        step=step,
    )
    value = session_ncis(log, **NAMES)
    assert value.lower < 1 + 0.8 + 0.64 < value.upper
    assert value.upper - value.lower < 0.1
    assert value.behavior_value == pytest.approx(1.75, abs=0.03)
