import itertools

import numpy as np
import pytest
from pydantic import ValidationError
from scipy import stats

from components.errors import InputError
from components.experiment.ab import AbResult, analyze_ab, assign_arm

NAMES = {"label": "live", "treatment": "new", "control": "old"}
IDS = [f"user-{number}" for number in range(20_000)]


def test_the_difference_and_its_interval_by_hand():
    # Treatment: users with (sessions, reward) (2, 4) and (1, 5): mean 3, residuals -2 and 2, variance 2·8/9 = 16/9.
    # Control: (1, 1) and (1, 3): mean 2, residuals -1 and 1, variance 2·2/4 = 1. Degrees (25/9)² / ((16/9)² + 1).
    result = analyze_ab(
        np.array([0, 0, 1, 2, 3]),
        np.array([1.0, 3, 5, 1, 3]),
        np.array([True, True, True, False, False]),
        planned_share=0.5,
        **NAMES,
    )
    deviation = np.sqrt(25 / 9)
    half_width = stats.t.ppf(0.975, (25 / 9) ** 2 / ((16 / 9) ** 2 + 1)) * deviation
    assert (result.treatment_mean, result.control_mean, result.difference) == pytest.approx((3, 2, 1))
    assert (result.lower, result.upper) == pytest.approx((1 - half_width, 1 + half_width))
    assert result.relative_difference == pytest.approx(0.5)
    assert result.minimum_detectable_effect == pytest.approx((1.959964 + 0.841621) * deviation, rel=1e-6)
    assert (result.treatment_users, result.control_users) == (2, 2)
    assert (result.treatment_sessions, result.control_sessions) == (3, 2)
    assert result.sample_ratio_p_value == pytest.approx(1)
    assert not result.conclusive


def sessions(generator, n_users, effect, share=0.5):
    """Users with 1 to 5 sessions and a taste of their own."""
    n_sessions = generator.integers(1, 6, size=n_users)
    user = np.repeat(np.arange(n_users), n_sessions)
    treated = (generator.random(n_users) < share)[user]
    rewards = generator.normal(size=n_users)[user] + generator.normal(size=len(user)) + effect * treated
    return user, rewards, treated


def test_the_interval_holds_the_true_difference_in_95_of_100_experiments():
    generator = np.random.default_rng(0)
    results = [analyze_ab(*sessions(generator, 200, 0.3), planned_share=0.5, **NAMES) for _ in range(400)]
    low, high = stats.binom.interval(0.95, 400, 0.95)
    assert low <= sum(result.lower <= 0.3 <= result.upper for result in results) <= high


def test_the_minimum_detectable_effect_is_found_with_80_percent_probability():
    generator = np.random.default_rng(1)
    effect = analyze_ab(*sessions(generator, 20_000, 0.0), planned_share=0.5, **NAMES).minimum_detectable_effect * 10
    results = [analyze_ab(*sessions(generator, 200, effect), planned_share=0.5, **NAMES) for _ in range(400)]
    assert sum(result.lower > 0 for result in results) / 400 == pytest.approx(0.8, abs=0.06)


def test_identical_rewards_everywhere_are_no_difference():
    result = analyze_ab(np.arange(4), np.ones(4), np.array([True, True, False, False]), planned_share=0.5, **NAMES)
    assert (result.difference, result.lower, result.upper, result.conclusive) == (0, 0, 0, False)


def test_a_share_of_users_far_from_the_plan_shows_in_the_sample_ratio_check():
    user, rewards, treated = sessions(np.random.default_rng(2), 2_000, 0.0, share=0.5)
    assert analyze_ab(user, rewards, treated, planned_share=0.5, **NAMES).sample_ratio_p_value > 0.01
    assert analyze_ab(user, rewards, treated, planned_share=0.4, **NAMES).sample_ratio_p_value < 1e-6


def test_a_user_in_both_arms_is_refused():
    with pytest.raises(InputError, match="1 users are in both arms, first user 7"):
        analyze_ab(np.array([7, 7, 8]), np.ones(3), np.array([True, False, True]), planned_share=0.5, **NAMES)


def test_an_arm_of_one_user_is_refused():
    with pytest.raises(InputError, match="control old has 1 users"):
        analyze_ab(np.arange(3), np.ones(3), np.array([True, True, False]), planned_share=0.5, **NAMES)


def test_rewards_that_are_no_numbers_are_refused():
    with pytest.raises(InputError, match="1 rewards are not finite"):
        analyze_ab(
            np.arange(4),
            np.array([1, 2, np.nan, 3]),
            np.array([True, True, False, False]),
            planned_share=0.5,
            **NAMES,
        )


def test_a_result_survives_json_and_cannot_claim_to_be_conclusive_against_its_interval():
    result = analyze_ab(*sessions(np.random.default_rng(3), 500, 2.0), planned_share=0.5, **NAMES)
    assert result.conclusive
    assert AbResult.model_validate_json(result.model_dump_json()) == result
    with pytest.raises(ValidationError, match="contradicts the interval"):
        AbResult(**(result.model_dump() | {"conclusive": False}))


def test_assignment_is_the_same_forever():
    # Written down once: a change here would move users between the arms of a running experiment.
    ids = [f"user-{number}" for number in range(16)]
    assert "".join("01"[int(arm)] for arm in assign_arm(ids, salt="summer", share=0.5)) == "0010000000111010"


def test_assignment_does_not_depend_on_who_else_is_asked_about():
    together = assign_arm(IDS[:100], salt="a", share=0.3)
    alone = np.concatenate([assign_arm([user_id], salt="a", share=0.3) for user_id in IDS[:100]])
    assert (together == alone).all()


def test_a_user_in_treatment_stays_there_when_the_share_grows():
    arms = [assign_arm(IDS, salt="a", share=share) for share in (0.0, 0.05, 0.1, 0.5, 1.0)]
    assert not arms[0].any() and arms[-1].all()
    for smaller, larger in itertools.pairwise(arms):
        assert (larger | ~smaller).all()


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.9])
def test_the_share_of_users_in_treatment_is_the_one_asked_for(share):
    assert stats.binomtest(int(assign_arm(IDS, salt="a", share=share).sum()), len(IDS), share).pvalue > 0.001


def test_experiments_with_different_salts_assign_independently():
    both = assign_arm(IDS, salt="a", share=0.5) & assign_arm(IDS, salt="b", share=0.5)
    assert stats.binomtest(int(both.sum()), len(IDS), 0.25).pvalue > 0.001


def test_an_empty_salt_and_an_impossible_share_are_refused():
    with pytest.raises(InputError, match="salt"):
        assign_arm(IDS, salt="", share=0.5)
    with pytest.raises(InputError, match=r"share: 1.5"):
        assign_arm(IDS, salt="a", share=1.5)


def test_an_ab_looked_at_early_needs_a_plan_from_before_it_began():
    user = np.arange(400)
    rewards = np.random.default_rng(0).normal(size=400)
    names = {"label": "live", "treatment": "new", "control": "old", "planned_share": 0.5}
    arguments = {"day": user // 100, "looked_early": True, **names}
    with pytest.raises(InputError, match="planned_sessions is missing"):
        analyze_ab(user, rewards, user % 2 == 0, **arguments)
    assert analyze_ab(user, rewards, user % 2 == 0, planned_sessions=1_000, **arguments).sequence is not None
