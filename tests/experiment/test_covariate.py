import numpy as np
import pytest
from scipy import stats

from components.errors import InputError
from components.experiment.ab import analyze_ab

NAMES = {"label": "live", "treatment": "new", "control": "old", "planned_share": 0.5}
EFFECT, CORRELATION = 0.3, 0.7


def experiment(generator, n_users=600):
    """Users with one to three sessions, whose past correlates with what they earn by `CORRELATION`."""
    past = generator.normal(2.0, 1.0, size=n_users)
    in_treatment = generator.random(n_users) < 0.5
    n_sessions = generator.integers(1, 4, size=n_users)
    user = np.repeat(np.arange(n_users), n_sessions)
    # The noise is one draw a user, and the influence on the mean scales both alike with the number of sessions.
    noise = generator.normal(size=n_users) * np.sqrt(1 / CORRELATION**2 - 1)
    rewards = (5.0 + past + noise + EFFECT * in_treatment)[user]
    return user, rewards, in_treatment[user], past[user]


def test_the_adjusted_difference_is_unbiased_and_its_variance_smaller_by_one_minus_the_squared_correlation():
    generator = np.random.default_rng(0)
    raw, adjusted, reported, covered, expected = [], [], [], 0, []
    for _ in range(400):
        user, rewards, treated, past = experiment(generator)
        result = analyze_ab(user, rewards, treated, covariate=past, **NAMES)
        raw.append(result.adjustment.unadjusted_difference)
        adjusted.append(result.difference)
        reported.append(result.adjustment.variance_ratio)
        covered += result.lower <= EFFECT <= result.upper
        # A user of n sessions counts n times: the correlation is that of the weighted influence with the past.
        weights = np.bincount(user) * (np.bincount(user, rewards) / np.bincount(user) - rewards.mean())
        first = np.unique(user, return_index=True)[1]
        expected.append(1 - np.corrcoef(weights, past[first])[0, 1] ** 2)
    assert np.mean(adjusted) == pytest.approx(EFFECT, abs=4 * np.std(adjusted) / 20)
    assert np.mean(reported) == pytest.approx(np.mean(expected), abs=0.02)
    assert np.var(adjusted) / np.var(raw) == pytest.approx(np.mean(expected), abs=0.1)
    assert np.mean(expected) < 0.65
    low, high = stats.binom.interval(0.999, 400, 0.95)
    assert low <= covered <= high


def test_with_one_session_a_user_the_variance_ratio_is_one_minus_the_squared_correlation():
    generator = np.random.default_rng(1)
    past = generator.normal(size=40_000)
    rewards = CORRELATION * past + np.sqrt(1 - CORRELATION**2) * generator.normal(size=40_000)
    treated = generator.random(40_000) < 0.5
    result = analyze_ab(np.arange(40_000), rewards, treated, covariate=past, **NAMES)
    assert result.adjustment.variance_ratio == pytest.approx(1 - CORRELATION**2, abs=0.01)
    assert result.adjustment.slope == pytest.approx(CORRELATION, abs=0.02)


def test_where_the_past_foretells_everything_only_the_effect_is_left():
    past = np.array([1.0, 2, 4, 8, 3, 5, 9, 7])
    treated = np.arange(8) < 4
    result = analyze_ab(np.arange(8), 2 * past + treated, treated, covariate=past, **NAMES)
    assert result.difference == pytest.approx(1)
    assert result.treatment_mean - result.control_mean == pytest.approx(1)
    assert result.adjustment.slope == pytest.approx(2)
    assert result.adjustment.variance_ratio == pytest.approx(0, abs=1e-12)
    assert result.adjustment.unadjusted_difference == pytest.approx(1 + 2 * (15 / 4 - 24 / 4))


def test_users_without_a_past_count_as_its_mean():
    user, rewards, treated, past = experiment(np.random.default_rng(2))
    new = user % 3 == 0
    unknown = np.where(new, np.nan, past)
    first = np.unique(user, return_index=True)[1]
    filled = np.where(new, np.nanmean(unknown[first]), past)
    with_gaps = analyze_ab(user, rewards, treated, covariate=unknown, **NAMES)
    without = analyze_ab(user, rewards, treated, covariate=filled, **NAMES)
    assert with_gaps.difference == pytest.approx(without.difference)
    assert with_gaps.standard_error == pytest.approx(without.standard_error)
    assert (with_gaps.adjustment.known_share, without.adjustment.known_share) == (pytest.approx(2 / 3), 1)


def test_where_nobody_has_a_past_nothing_is_adjusted():
    user, rewards, treated, past = experiment(np.random.default_rng(3))
    assert analyze_ab(user, rewards, treated, covariate=np.full_like(past, np.nan), **NAMES) == analyze_ab(
        user, rewards, treated, **NAMES
    )


def test_a_past_that_is_the_same_for_all_adjusts_by_nothing():
    user, rewards, treated, past = experiment(np.random.default_rng(4))
    result = analyze_ab(user, rewards, treated, covariate=np.ones_like(past), **NAMES)
    assert (result.adjustment.slope, result.adjustment.variance_ratio) == (0, pytest.approx(1))


def test_a_past_that_is_infinite_or_differs_within_a_user_is_refused():
    user, treated = np.array([0, 0, 1, 2, 3]), np.array([True, True, True, False, False])
    with pytest.raises(InputError, match="covariate differs between sessions of one user"):
        analyze_ab(user, np.ones(5), treated, covariate=np.array([1.0, 2, 3, 4, 5]), **NAMES)
    with pytest.raises(InputError, match="1 covariates are infinite"):
        analyze_ab(user, np.ones(5), treated, covariate=np.array([1.0, 1, np.inf, 4, 5]), **NAMES)
