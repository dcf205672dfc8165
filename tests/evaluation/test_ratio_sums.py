"""Intervals of ratios of sums where few users hold the weight."""

import numpy as np
import pytest
from scipy import stats

from components.evaluation.ncis import one_request_ncis
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
