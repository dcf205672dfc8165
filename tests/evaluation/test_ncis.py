from functools import reduce

import numpy as np
import pytest
from scipy import stats

from components.errors import InputError
from components.evaluation.logged_requests import LoggedRequests
from components.evaluation.ncis import fixed_cap_ncis, one_request_ncis, one_request_sums, one_request_value
from components.evaluation.policy_value import Estimand
from components.evaluation.ratio_sums import compare, merge, ratio_bootstrap
from components.interactions.contract import RatioAssumption

NAMES = {"policy": "challenger", "ratio": RatioAssumption.FULL_SLATE}


def assert_same(first, second, tolerance=1e-12):
    first, second = first.model_dump(), second.model_dump()
    for key, value in first.items():
        if isinstance(value, float):
            assert second[key] == pytest.approx(value, rel=tolerance, abs=tolerance), key
        else:
            assert second[key] == value, key


def test_the_value_by_hand(make_log):
    # Weights 1, 2 (3 capped at 2), 0.5, 1.5: (1·1 + 2·0 + 0.5·2 + 1.5·4) / 5; the log's mean is 7/4.
    log = make_log([1, 0, 2, 4], np.log([1, 3, 0.5, 1.5]))
    value = one_request_ncis(log, **NAMES)
    assert value.value == pytest.approx(8 / 5)
    assert value.behavior_value == pytest.approx(7 / 4)
    assert value.difference == pytest.approx(8 / 5 - 7 / 4)
    assert value.effective_sample_size == pytest.approx(5**2 / (1 + 4 + 0.25 + 2.25))
    assert (value.cap, value.cap_share, value.max_weight) == pytest.approx((2, 0.25, 2))
    assert value.mean_weight == pytest.approx(6 / 4)
    assert (value.n_requests, value.n_units, value.n_users) == (4, 4, 4)
    assert value.estimand is Estimand.ONE_REQUEST


def test_the_interval_by_hand(make_log):
    # Users {0, 1} and {2}; weights 1, 1, 2; V = (0 + 2 + 2·3) / 4 = 2.
    # Influences: user a ((0 - 2) + (2 - 2)) / 4 = -1/2, user b 2·(3 - 2) / 4 = 1/2; Var = 2/1 · (1/4 + 1/4) = 1.
    log = make_log([0, 2, 3], np.log([1, 1, 2]), user=[4, 4, 9])
    value = one_request_ncis(log, **NAMES, cap=2.0)
    half_width = stats.t.ppf(0.975, 1)
    assert (value.lower, value.upper) == pytest.approx((2 - half_width, 2 + half_width))
    # Logged mean 5/3 with influences (2 - 10/3)/3 = -4/9 and 4/9; the difference's are -1/18 and 1/18.
    half_width *= np.sqrt(2 * 2 / 18**2)
    assert (value.difference_lower, value.difference_upper) == pytest.approx((1 / 3 - half_width, 1 / 3 + half_width))


def test_the_behavior_policy_itself_has_the_logged_mean_and_no_difference(make_log):
    rewards = np.random.default_rng(1).normal(size=50)
    value = one_request_ncis(make_log(rewards, np.zeros(50)), **NAMES)
    assert value.value == pytest.approx(rewards.mean(), abs=1e-15)
    assert (value.difference_lower, value.difference_upper) == pytest.approx((0, 0), abs=1e-15)
    assert (value.mean_weight, value.effective_sample_size) == pytest.approx((1, 50))


def test_a_constant_reward_gives_that_constant(random_log):
    log = LoggedRequests(
        np.full_like(random_log.rewards, 0.3),
        random_log.behavior_log_probs,
        random_log.target_log_probs,
        random_log.user,
        random_log.session,
        random_log.step,
    )
    value = one_request_ncis(log, **NAMES)
    assert (value.value, value.lower, value.upper) == pytest.approx((0.3, 0.3, 0.3), abs=1e-12)


def test_the_order_of_requests_does_not_matter(random_log):
    shuffled = random_log.take(np.random.default_rng(2).permutation(len(random_log.rewards)))
    assert_same(one_request_ncis(random_log, **NAMES), one_request_ncis(shuffled, **NAMES))


def test_shards_merge_to_the_estimate_of_the_whole_log(random_log):
    cap = np.sqrt(len(random_log.rewards))
    shard = np.random.default_rng(3).integers(0, 5, size=len(random_log.rewards))
    parts = [one_request_sums(random_log.take(shard == number), cap) for number in range(5)]
    assert_same(one_request_value(reduce(merge, parts), **NAMES), one_request_ncis(random_log, **NAMES))


def test_shards_with_different_caps_are_refused(random_log):
    with pytest.raises(InputError, match="capped at 30 and 31"):
        merge(one_request_sums(random_log, 30.0), one_request_sums(random_log, 31.0))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("sign", [-1, 1])
def test_log_ratios_of_700_neither_overflow_nor_vanish(make_log, sign):
    log_ratios = sign * np.array([700.0, 699.0, 700.0, 0.0])
    value = one_request_ncis(make_log([1, 2, 3, 4], log_ratios), **NAMES)
    # Above: capped at 2, so (2·1 + 2·2 + 2·3 + 1·4) / 7. Below: nothing but the last request has any weight.
    assert value.value == pytest.approx(16 / 7 if sign > 0 else 4)
    tiny = one_request_ncis(make_log([1, 2, 3, 4], [-700, -700, -700 + np.log(2), -700]), **NAMES)
    assert tiny.value == pytest.approx((1 + 2 + 6 + 4) / 5)
    assert tiny.effective_sample_size == pytest.approx(25 / 7)


def test_shards_of_very_different_weights_merge_without_loss(make_log):
    log = make_log([1, 2, 3, 4], [-700, -699, -1, 0.5])
    parts = [one_request_sums(log.take(np.array(rows)), 2.0) for rows in ([0, 1], [2, 3])]
    assert_same(one_request_value(reduce(merge, parts), **NAMES), one_request_ncis(log, **NAMES))


def test_a_cap_below_the_square_root_of_the_requests_is_refused(random_log):
    with pytest.raises(InputError, match="below √n"):
        one_request_ncis(random_log, **NAMES, cap=10.0)


def test_a_single_user_gives_a_value_without_bounds(make_log):
    value = one_request_ncis(make_log([0, 1], [0, 0], user=[5, 5]), **NAMES)
    assert (value.lower, value.difference_upper, value.mean_weight_lower) == (None, None, None)
    assert value.interval == "none"


def test_the_paired_difference_to_oneself_is_exactly_nothing(random_log):
    sums = one_request_sums(random_log, 30.0)
    names = {"policy": "a", "reference": "b", "estimand": Estimand.ONE_REQUEST}
    difference = compare(sums, sums, **names)
    assert (difference.difference, difference.lower, difference.upper) == (0, 0, 0)


def test_the_paired_difference_to_the_behavior_policy_is_the_values_own_difference(random_log):
    behavior = LoggedRequests(
        random_log.rewards,
        random_log.behavior_log_probs,
        random_log.behavior_log_probs,
        random_log.user,
        random_log.session,
        random_log.step,
    )
    cap = np.sqrt(len(random_log.rewards))
    difference = compare(
        one_request_sums(random_log, cap),
        one_request_sums(behavior, cap),
        policy="a",
        reference="b",
        estimand=Estimand.ONE_REQUEST,
    )
    value = one_request_ncis(random_log, **NAMES)
    expected = (value.difference, value.difference_lower, value.difference_upper)
    assert (difference.difference, difference.lower, difference.upper) == pytest.approx(expected, abs=1e-12)


def test_policies_on_different_logs_are_not_compared(random_log):
    names = {"policy": "a", "reference": "b", "estimand": Estimand.ONE_REQUEST}
    with pytest.raises(InputError, match="different logs"):
        compare(one_request_sums(random_log, 30.0), one_request_sums(random_log.take(np.arange(99)), 30.0), **names)


class Bandit:
    """Two kinds of users, three slates; a user's rewards share a taste of their own, and users differ in requests."""

    kind_share = np.array([0.4, 0.6])
    behavior = np.array([[0.5, 0.3, 0.2], [0.3, 0.3, 0.4]])
    target = np.array([[0.2, 0.3, 0.5], [0.1, 0.7, 0.2]])
    mean_reward = np.array([[0.2, 0.5, 0.9], [0.4, 0.7, 0.1]])
    mean_requests = np.array([3.0, 6.0])

    def value(self, policy: np.ndarray) -> float:
        requests = self.kind_share * self.mean_requests
        return float(requests @ (policy * self.mean_reward).sum(axis=1) / requests.sum())

    def draw(self, n_users: int, generator: np.random.Generator) -> LoggedRequests:
        kind = generator.choice(2, size=n_users, p=self.kind_share)
        taste = generator.normal(0, 0.5, size=n_users)
        n_requests = 1 + generator.poisson(self.mean_requests[kind] - 1)
        user = np.repeat(np.arange(n_users), n_requests)
        slate = (generator.random(len(user))[:, None] > self.behavior[kind[user]].cumsum(axis=1)[:, :2]).sum(axis=1)
        noise = generator.normal(0, 0.3, size=len(user))
        return LoggedRequests(
            rewards=self.mean_reward[kind[user], slate] + taste[user] + noise,
            behavior_log_probs=np.log(self.behavior[kind[user], slate]),
            target_log_probs=np.log(self.target[kind[user], slate]),
            user=user,
            session=user,
            step=np.zeros(len(user), dtype=np.int64),
        )


def test_the_interval_holds_the_true_value_in_95_of_100_logs():
    bandit, generator = Bandit(), np.random.default_rng(11)
    true_value = bandit.value(bandit.target)
    true_difference = true_value - bandit.value(bandit.behavior)
    values = [one_request_ncis(bandit.draw(300, generator), **NAMES) for _ in range(400)]
    low, high = stats.binom.interval(0.95, len(values), 0.95)
    assert low <= sum(v.lower <= true_value <= v.upper for v in values) <= high
    assert low <= sum(v.difference_lower <= true_difference <= v.difference_upper for v in values) <= high
    assert low <= sum(v.mean_weight_lower <= 1 <= v.mean_weight_upper for v in values) <= high
    mistakes = np.array([v.value for v in values]) - true_value
    assert abs(mistakes.mean()) < 4 * mistakes.std() / np.sqrt(len(values))


def test_a_cap_does_not_move_the_mean_weight():
    bandit, generator = Bandit(), np.random.default_rng(14)
    for _ in range(20):
        log = bandit.draw(300, generator)
        uncapped = one_request_ncis(log, **NAMES, cap=1_000.0)
        capped = fixed_cap_ncis(log, **NAMES, cap=0.9)
        assert capped.cap_share > 0.2
        assert capped.mean_weight == pytest.approx(uncapped.mean_weight, rel=1e-12)
        assert capped.mean_weight_lower == pytest.approx(uncapped.mean_weight_lower, rel=1e-12)


def test_an_interval_that_took_requests_for_independent_would_be_too_narrow():
    log = Bandit().draw(2_000, np.random.default_rng(12))
    alone = LoggedRequests(
        log.rewards,
        log.behavior_log_probs,
        log.target_log_probs,
        np.arange(len(log.user)),
        log.session,
        log.step,
    )
    clustered, independent = one_request_ncis(log, **NAMES), one_request_ncis(alone, **NAMES)
    assert independent.value == pytest.approx(clustered.value)
    assert clustered.upper - clustered.lower > 1.2 * (independent.upper - independent.lower)


def test_the_bootstrap_over_users_agrees_with_the_delta_method():
    log = Bandit().draw(2_000, np.random.default_rng(13))
    value = one_request_ncis(log, **NAMES)
    sums = one_request_sums(log, value.cap)
    bootstrap = ratio_bootstrap(sums, np.random.default_rng(14), n_resamples=2_000)
    width = value.upper - value.lower
    assert (bootstrap.lower, bootstrap.upper) == pytest.approx((value.lower, value.upper), abs=0.1 * width)
    width = value.difference_upper - value.difference_lower
    expected = (value.difference_lower, value.difference_upper)
    assert (bootstrap.difference_lower, bootstrap.difference_upper) == pytest.approx(expected, abs=0.1 * width)


def test_the_bootstrap_of_a_constant_reward_has_no_width(make_log):
    # Resampling normalised terms instead of ratios would spread here.
    log = make_log(np.full(40, 0.5), np.random.default_rng(15).normal(size=40))
    bootstrap = ratio_bootstrap(one_request_sums(log, 7.0), np.random.default_rng(16))
    assert (bootstrap.lower, bootstrap.upper) == pytest.approx((0.5, 0.5))


def test_the_same_generator_state_gives_the_same_bootstrap(random_log):
    sums = one_request_sums(random_log, 30.0)
    first, second = (ratio_bootstrap(sums, np.random.default_rng(17), n_resamples=50) for _ in range(2))
    assert first == second
