from dataclasses import replace
from functools import reduce

import numpy as np
import pytest

from components.errors import InputError
from components.evaluation.doubly_robust import (
    ModelRewards,
    doubly_robust,
    doubly_robust_sums,
    doubly_robust_value,
)
from components.evaluation.importance_sampling import importance_sampling
from components.evaluation.logged_requests import LoggedRequests, Positions
from components.evaluation.ratio_sums import merge
from components.interactions.contract import RatioAssumption

NAMES = {"policy": "challenger", "ratio": RatioAssumption.FULL_SLATE}


def test_the_value_by_hand(make_log):
    # Weights 1, 2 (3 capped at 2), 2, 1; the mean of v is 0.5.
    log = make_log([1, 0, 2, 4], np.log([1, 3, 2, 1]))
    model = ModelRewards(logged=np.array([0.5, 1.0, 1.0, 3.0]), target=np.array([0.2, 0.4, 0.6, 0.8]))
    expected = 0.5 + (1 * 0.5 + 2 * -1 + 2 * 1 + 1 * 1) / 4
    assert doubly_robust(log, model, **NAMES).value == pytest.approx(expected)


def test_a_model_that_says_nothing_leaves_importance_sampling(random_log):
    nothing = np.zeros(len(random_log.rewards))
    value = doubly_robust(random_log, ModelRewards(nothing, nothing), **NAMES)
    reference = importance_sampling(random_log, **NAMES)
    assert (value.value, value.lower, value.upper) == pytest.approx((reference.value, reference.lower, reference.upper))


def test_a_model_that_knows_the_rewards_needs_no_weights(random_log):
    target = np.random.default_rng(1).normal(size=len(random_log.rewards))
    value = doubly_robust(random_log, ModelRewards(random_log.rewards, target), **NAMES)
    assert value.value == pytest.approx(target.mean())


def test_shards_merge_and_order_does_not_matter(random_log):
    generator = np.random.default_rng(2)
    n = len(random_log.rewards)
    model = ModelRewards(generator.normal(size=n), generator.normal(size=n))
    whole = doubly_robust(random_log, model, **NAMES)
    shard = generator.integers(0, 4, size=n)
    parts = [
        doubly_robust_sums(random_log.take(shard == number), model.take(shard == number), np.sqrt(n))
        for number in range(4)
    ]
    merged = doubly_robust_value(reduce(merge, parts), **NAMES)
    order = generator.permutation(n)
    shuffled = doubly_robust(random_log.take(order), model.take(order), **NAMES)
    for other in (merged, shuffled):
        for field in ("value", "lower", "upper", "difference_lower", "effective_sample_size", "mean_weight_upper"):
            assert getattr(other, field) == pytest.approx(getattr(whole, field), rel=1e-12, abs=1e-12), field


class TwoStates:
    """Two states, two actions; propensities differ by state."""

    behavior = np.array([[0.7, 0.3], [0.4, 0.6]])
    target = np.array([[0.2, 0.8], [0.9, 0.1]])
    reward = np.array([[0.1, 0.6], [0.5, 0.2]])

    def draw(self, n, generator, behavior_claimed, model):
        state = generator.integers(0, 2, size=n)
        action = (generator.random(n) > self.behavior[state, 0]).astype(int)
        rewards = (generator.random(n) < self.reward[state, action]).astype(float)
        arrays = (np.log(claimed[state, action]) for claimed in (behavior_claimed, self.target))
        index = np.arange(n)
        log = LoggedRequests(rewards, *arrays, index, index, np.zeros(n, dtype=np.int64))
        return log, ModelRewards(model[state, action], (self.target * model).sum(axis=1)[state])


def test_it_is_right_where_either_the_propensities_or_the_model_are():
    world, generator = TwoStates(), np.random.default_rng(3)
    truth = (world.target * world.reward).sum() / 2
    wrong_model, wrong_propensities = np.array([[0.9, 0.0], [0.0, 0.9]]), np.full((2, 2), 0.5)
    for claimed, model, right in (
        (world.behavior, wrong_model, True),
        (wrong_propensities, world.reward, True),
        (wrong_propensities, wrong_model, False),
    ):
        value = doubly_robust(*world.draw(60_000, generator, claimed, model), **NAMES)
        assert bool(abs(value.value - truth) < 0.01) is right


def test_what_the_model_explains_narrows_the_interval():
    world, generator = TwoStates(), np.random.default_rng(4)
    log, model = world.draw(20_000, generator, world.behavior, world.reward)
    value, reference = doubly_robust(log, model, **NAMES), importance_sampling(log, **NAMES)
    assert value.upper - value.lower < 0.85 * (reference.upper - reference.lower)


@pytest.mark.parametrize("bad", [np.zeros(3), np.full(4, np.nan)])
def test_model_rewards_that_do_not_fit_are_refused(make_log, bad):
    log = make_log([1, 0, 1, 0], [0, 0, 0, 0])
    with pytest.raises(InputError, match=r"model rewards \(logged\)"):
        doubly_robust(log, ModelRewards(bad, np.zeros(len(bad))), **NAMES)


def test_the_cascade_needs_what_the_model_expects_of_each_position(make_log):
    zeros, log = np.zeros(2), make_log([1, 0], [0, 0])
    rewards = log.rewards[:, None]
    positions = Positions(rewards, log.behavior_log_probs[:, None], log.target_log_probs[:, None])
    with pytest.raises(InputError, match="cascade"):
        doubly_robust(
            replace(log, positions=positions), ModelRewards(zeros, zeros), policy="a", ratio=RatioAssumption.CASCADE
        )
