import math

import numpy as np
import pytest
from scipy import optimize, stats

from components.experiment.ab import analyze_ab
from components.experiment.sequential import FIRST_LOOK_USERS, boundary, confidence_sequence

LEVEL = 0.03
N_DAYS = 14


def test_the_boundary_by_hand():
    # α = 0.05: κ* solves −W₋₁(−4α²/e) − 1. At κ = 3: z² = 2 · 4/3 · log(1 + 2 / 0.1).
    w = optimize.brentq(lambda x: x * math.exp(x) + 4 * 0.05**2 / math.e, -20, -1)
    clock = 3 / (-w - 1)
    assert boundary(clock, 0.05, 1.0) == pytest.approx(math.sqrt(8 / 3 * math.log(21)))
    assert boundary(1_000 * clock, 0.05, 1_000.0) == pytest.approx(boundary(clock, 0.05, 1.0))


def test_the_boundary_is_nearly_narrowest_at_the_planned_end():
    def half_width(planned: float) -> float:
        return boundary(1.0, LEVEL, planned)

    best = min(half_width(planned) for planned in np.geomspace(0.01, 100, 400))
    assert half_width(1.0) <= 1.001 * best
    assert half_width(0.1) > 1.05 * best and half_width(10.0) > 1.05 * best


def test_a_brownian_motion_crosses_the_boundary_in_at_most_its_level():
    # 20,000 paths at 400 times over four decades: the level, less what lies between and beyond the times.
    generator = np.random.default_rng(0)
    times = np.geomspace(0.01, 100, 400)
    steps = np.sqrt(np.diff(times, prepend=0.0))
    thresholds = np.array([boundary(time, LEVEL, 1.0) * math.sqrt(time) for time in times])
    path, crossed = np.zeros(20_000), np.zeros(20_000, dtype=bool)
    for step, threshold in zip(steps, thresholds, strict=True):
        path += step * generator.standard_normal(len(path))
        crossed |= path > threshold
    assert 0.012 < crossed.mean() < LEVEL


def once(generator):
    """Users who come once."""
    n = 2_000
    return np.arange(n), np.sort(generator.integers(N_DAYS, size=n)), generator.lognormal(0.0, 1.2, size=n)


def returning(generator):
    """Users who come again on any day, some of them always worth more: half of the variance lies between users."""
    n_users, n = 800, 3_000
    taste = generator.lognormal(0.0, 0.8, size=n_users)
    user = generator.integers(n_users, size=n)
    return user, np.sort(generator.integers(N_DAYS, size=n)), taste[user] * generator.lognormal(0.0, 0.8, size=n)


def peeks(sessions, generator, effect=0.0):
    user, day, rewards = sessions(generator)
    treated = (generator.random(user.max() + 1) < 0.5)[user]
    rewards = rewards + effect * treated
    return user, day, rewards, treated


@pytest.mark.parametrize("sessions", [once, returning])
def test_equal_policies_pass_no_more_often_than_designed_although_one_looks_every_day(sessions):
    generator = np.random.default_rng(1)
    always_valid = naive = 0
    for _ in range(400):
        user, day, rewards, treated = peeks(sessions, generator)
        sequence = confidence_sequence(user, day, rewards, treated, planned_sessions=len(user))
        assert len(sequence.looks) >= N_DAYS - 3
        at_level = [
            look.difference - boundary(look.clock, LEVEL, len(user)) * look.standard_error for look in sequence.looks
        ]
        at_one_look = [look.difference - stats.norm.ppf(1 - LEVEL) * look.standard_error for look in sequence.looks]
        always_valid += max(at_level) > 0
        naive += max(at_one_look) > 0
    assert always_valid <= stats.binom.ppf(0.999, 400, LEVEL)
    # The same looks at bounds that are made for one: far beyond the level.
    assert naive > 2.5 * LEVEL * 400


@pytest.mark.parametrize("sessions", [once, returning])
def test_all_intervals_together_hold_the_true_difference(sessions):
    generator = np.random.default_rng(2)
    missed = 0
    for _ in range(200):
        user, day, rewards, treated = peeks(sessions, generator, effect=0.4)
        looks = confidence_sequence(user, day, rewards, treated, planned_sessions=len(user)).looks
        missed += any(not look.lower <= 0.4 <= look.upper for look in looks)
    assert missed <= stats.binom.ppf(0.999, 200, 0.05)


def test_a_wrong_plan_costs_width_and_not_validity():
    generator = np.random.default_rng(3)
    missed = {0.1: 0, 10.0: 0}
    widths = {0.1: [], 1.0: [], 10.0: []}
    for _ in range(150):
        user, day, rewards, treated = peeks(once, generator)
        for factor in widths:
            planned = round(factor * len(user))
            looks = confidence_sequence(user, day, rewards, treated, planned_sessions=planned).looks
            widths[factor].append(looks[-1].upper - looks[-1].lower)
            if factor in missed:
                missed[factor] += any(not look.lower <= 0 <= look.upper for look in looks)
    assert max(missed.values()) <= stats.binom.ppf(0.999, 150, 0.05)
    assert np.mean(widths[1.0]) < min(np.mean(widths[0.1]), np.mean(widths[10.0]))


def test_the_clock_counts_users_who_come_once_and_runs_faster_where_they_come_again():
    generator = np.random.default_rng(4)
    user, day, rewards, treated = peeks(once, generator)
    last = confidence_sequence(user, day, rewards, treated, planned_sessions=2_000).looks[-1]
    assert last.clock == pytest.approx(2_000, rel=0.01)
    user, day, rewards, treated = peeks(returning, generator)
    last = confidence_sequence(user, day, rewards, treated, planned_sessions=3_000).looks[-1]
    assert last.clock > 1.3 * last.n_sessions


def test_the_last_look_sees_what_the_analysis_at_the_end_sees():
    user, day, rewards, treated = peeks(returning, np.random.default_rng(5))
    result = analyze_ab(
        user, rewards, treated, label="live", treatment="new", control="old", planned_share=0.5, day=day
    )
    last = result.sequence.looks[-1]
    assert (last.difference, last.standard_error) == pytest.approx((result.difference, result.standard_error))
    assert (last.n_users, last.n_sessions) == (len(np.unique(user)), len(user))
    assert last.lower < result.lower < result.upper < last.upper
    assert result.sequence.bounds(LEVEL).lower < result.bounds(LEVEL).lower
    early = result.model_copy(update={"looked_early": True})
    assert early.bounds(LEVEL) == result.sequence.bounds(LEVEL)


def test_there_is_no_look_before_each_arm_has_enough_users():
    n = 2 * FIRST_LOOK_USERS
    user, treated = np.arange(n), np.arange(n) % 2 == 0
    rewards = np.random.default_rng(6).normal(size=n)
    day = np.where(np.arange(n) < n - 1, 0, 1)
    looks = confidence_sequence(user, day, rewards, treated, planned_sessions=n).looks
    assert [look.day for look in looks] == [2]
    assert confidence_sequence(user[:-1], day[:-1], rewards[:-1], treated[:-1], planned_sessions=n) is None


def test_rewards_that_are_all_alike_leave_no_doubt():
    n = 4 * FIRST_LOOK_USERS
    day, treated = np.zeros(n, dtype=int), np.arange(n) % 2 == 0
    (look,) = confidence_sequence(np.arange(n), day, np.ones(n), treated, planned_sessions=n).looks
    assert (look.difference, look.lower, look.upper) == (0, 0, 0)
