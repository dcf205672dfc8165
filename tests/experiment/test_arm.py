from functools import reduce
from itertools import accumulate
from operator import add

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.experiment.arm import ArmMean, Contrast, arm_sums, daily_sums, fixed_bounds

USER = np.array([0, 0, 0, 1, 2])
DAY = np.array([0, 2, 2, 1, 0])
VALUES = np.array([1.0, 2, 4, 3, 5])


def test_sums_by_hand():
    # Users with (sessions, total): (3, 7), (1, 3), (1, 5).
    sums = arm_sums(USER, VALUES)
    assert (sums.n_users, sums.n_sessions, sums.total) == (3, 5, 15)
    assert (sums.user_squares, sums.user_products) == (49 + 9 + 25, 21 + 3 + 5)
    assert (sums.session_counts_squared, sums.session_squares) == (11, 55)


def test_a_mean_and_its_variances_by_hand():
    # Mean 3; the users' residuals are -2, 0 and 2: 3/2 · 8 / 25. Sessions spread by 4 + 1 + 1 + 0 + 4 = 10: 10 / 25.
    mean = arm_sums(USER, VALUES).mean()
    assert (mean.n_users, mean.n_sessions, mean.mean) == (3, 5, 3)
    assert mean.variance == pytest.approx(12 / 25)
    assert mean.session_variance == pytest.approx(10 / 25)


def test_a_returning_user_changes_the_sums_of_the_day():
    first, second, third = daily_sums(USER, DAY, VALUES, 3)
    assert (first.n_users, second.n_users, third.n_users) == (2, 1, 0)
    assert third.user_squares == 7**2 - 1**2
    assert third.session_counts_squared == 3**2 - 1**2


sessions = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3), st.integers(-8, 8)), min_size=1, max_size=40).map(
    lambda rows: tuple(np.array(column) for column in zip(*rows, strict=True))
)


@given(sessions)
def test_the_running_total_of_days_is_what_all_sessions_until_then_give(rows):
    user, day, values = rows
    for number, so_far in enumerate(accumulate(daily_sums(user, day, values.astype(float), 4), add)):
        until = day <= number
        if until.any():
            assert so_far == arm_sums(user[until], values[until].astype(float))
        else:
            assert so_far.n_sessions == 0


@given(sessions, st.permutations(range(24)))
def test_sums_of_users_and_days_add_up_in_any_order(rows, order):
    user, _, values = rows
    # Values are whole numbers, so sums are exact and must be equal, not only close.
    parts = [
        part for code in range(6) for part in daily_sums(*(a[user == code] for a in rows[:2]), values[user == code], 4)
    ]
    assert reduce(add, [parts[index] for index in order]) == arm_sums(user, values)


def test_equal_users_leave_no_variance_however_large_their_values():
    mean = arm_sums(np.arange(1_000) // 2, np.full(1_000, 1e6 / 3)).mean()
    assert mean.variance == pytest.approx(0, abs=1e-6 * mean.mean**2 / 1_000)
    assert mean.variance >= 0


def arm(n_users: int, mean: float, variance: float) -> ArmMean:
    return ArmMean(n_users=n_users, n_sessions=n_users, mean=mean, variance=variance, session_variance=variance)


def test_a_contrast_with_a_multiple_of_the_control_by_hand():
    contrast = Contrast.between(arm(11, 3.0, 0.25), arm(21, 4.0, 1.0), factor=0.5)
    assert (contrast.value, contrast.variance, contrast.standard_error) == (1.0, 0.5, pytest.approx(np.sqrt(0.5)))
    assert contrast.degrees == pytest.approx(0.25 / (0.25**2 / 10 + 0.25**2 / 20))


def test_bounds_of_certain_means_are_the_difference():
    bounds = fixed_bounds(Contrast.between(arm(2, 1.0, 0.0), arm(2, 1.0, 0.0)), 0.03)
    assert (bounds.lower, bounds.upper) == (0, 0)
