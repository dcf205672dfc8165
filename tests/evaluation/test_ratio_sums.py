"""Intervals of ratios of sums where few users hold the weight."""

import numpy as np
import pytest
from scipy import stats

from components.evaluation.ncis import one_request_ncis, one_request_sums
from components.evaluation.ratio_sums import merge_shards, ratio_bootstrap
from components.interactions.contract import RatioAssumption

NAMES = {"policy": "challenger", "ratio": RatioAssumption.FULL_SLATE}


def test_degrees_of_freedom_follow_from_the_kurtosis_of_the_influences(make_log):
    # Weights 1: the value is the mean 0.9 / 10 and each influence (r - 0.09) / 10.
    rewards = np.array([0.9] + [0.0] * 9)
    value = one_request_ncis(make_log(rewards, np.zeros(10)), **NAMES)
    influence = (rewards - 0.09) / 10
    kurtosis = 10 * (influence**4).sum() / (influence**2).sum() ** 2
    degrees = 2 * 10 / (kurtosis - 1)
    assert degrees < 9
    half_width = stats.t.ppf(0.975, degrees) * np.sqrt(10 / 9 * (influence**2).sum())
    assert (value.lower, value.upper) == pytest.approx((0.09 - half_width, 0.09 + half_width))


def test_light_tails_keep_the_degrees_of_the_users(make_log):
    rewards = np.array([0.0, 1.0] * 10)
    value = one_request_ncis(make_log(rewards, np.zeros(20)), **NAMES)
    assert value.upper - value.value == pytest.approx(stats.t.ppf(0.975, 19) * np.sqrt(20 / 19 * 20 * 0.025**2))


def test_resamples_draw_every_user_alike_whatever_their_block(make_log):
    # 300 users are one block and a part of another: the mean reward of a resample is binomial, drawn exactly.
    rewards = np.array([0.0] * 256 + [1.0] * 44)
    sums = one_request_sums(make_log(rewards, np.zeros(300)), 20.0)
    bounds = ratio_bootstrap(sums, np.random.default_rng(0), n_resamples=20_000)
    expected = stats.binom.ppf([0.025, 0.975], 300, 44 / 300) / 300
    assert (bounds.lower, bounds.upper) == pytest.approx(expected, abs=1.1 / 300)


def test_shards_that_come_one_by_one_merge_to_the_sums_of_the_whole_log(random_log):
    shard = np.random.default_rng(3).integers(0, 7, size=len(random_log.rewards))
    parts = [{"all": one_request_sums(random_log.take(shard == number), 30.0)} for number in range(7)]
    parts[2]["some"] = parts[4]["some"] = parts[2]["all"]
    merged = merge_shards(iter(parts))
    whole = one_request_sums(random_log, 30.0)
    np.testing.assert_array_equal(merged["all"].users, whole.users)
    for field in ("numerators", "denominators", "ratios", "rewards", "units"):
        np.testing.assert_allclose(getattr(merged["all"], field), getattr(whole, field), rtol=1e-12, atol=1e-12)
    assert merged["all"].effective.value == pytest.approx(whole.effective.value, rel=1e-12)
    np.testing.assert_allclose(merged["some"].numerators, 2 * parts[2]["all"].numerators)
