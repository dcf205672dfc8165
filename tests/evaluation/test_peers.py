"""On the same arrays our estimates are those of obp, wherever both mean the same. `make test-peers` installs it."""

from typing import Any

import numpy as np
import pytest

from components.evaluation.doubly_robust import ModelRewards, doubly_robust
from components.evaluation.importance_sampling import importance_sampling
from components.evaluation.logged_requests import LoggedRequests
from components.evaluation.ncis import one_request_ncis
from components.interactions.contract import RatioAssumption
from flows.benchmarks.speed import normalized_bootstrap

N_REQUESTS, N_ACTIONS = 2_000, 5

ope = pytest.importorskip("obp.ope", reason="obp is not installed: make test-peers")


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    """A bandit's log in obp's words."""
    generator = np.random.default_rng(0)
    behavior, target = generator.dirichlet(np.ones(N_ACTIONS), size=(2, N_REQUESTS))
    action = (generator.random(N_REQUESTS)[:, None] > behavior.cumsum(1)[:, :-1]).sum(1)
    return {
        "reward": generator.normal(1.0, 0.5, N_REQUESTS) + 0.1 * action,
        "action": action,
        "pscore": behavior[np.arange(N_REQUESTS), action],
        "action_dist": target[:, :, None],
    }


@pytest.fixture(scope="module")
def log(arrays: dict[str, np.ndarray]) -> LoggedRequests:
    """The same log in ours; every request is of a user of its own, as obp takes it."""
    rows = np.arange(N_REQUESTS)
    return LoggedRequests(
        rewards=arrays["reward"],
        behavior_log_probs=np.log(arrays["pscore"]),
        target_log_probs=np.log(arrays["action_dist"][rows, arrays["action"], 0]),
        user=rows,
        session=rows,
        step=np.zeros(N_REQUESTS, dtype=np.int64),
    )


def test_ncis_below_its_cap_is_the_self_normalised_estimate(arrays: dict[str, Any], log: LoggedRequests) -> None:
    cap = 2.0 * float(np.exp(log.log_ratios.max())) + N_REQUESTS

    ours = one_request_ncis(log, policy="target", ratio=RatioAssumption.FULL_SLATE, cap=cap)

    theirs = ope.SelfNormalizedInverseProbabilityWeighting().estimate_policy_value(**arrays)
    assert ours.value == pytest.approx(theirs, rel=1e-9)
    assert ours.cap_share == 0.0


def test_importance_sampling_below_its_cap_is_the_inverse_propensity_score(
    arrays: dict[str, Any], log: LoggedRequests
) -> None:
    ours = importance_sampling(log, policy="target", ratio=RatioAssumption.FULL_SLATE, cap=1e9)

    theirs = ope.InverseProbabilityWeighting().estimate_policy_value(**arrays)
    assert ours.value == pytest.approx(theirs, rel=1e-9)


def test_doubly_robust_below_its_cap_is_obps(arrays: dict[str, Any], log: LoggedRequests) -> None:
    rewards = np.random.default_rng(2).normal(1.0, 0.3, (N_REQUESTS, N_ACTIONS))
    expected = (arrays["action_dist"][:, :, 0] * rewards).sum(1)
    model = ModelRewards(logged=rewards[np.arange(N_REQUESTS), arrays["action"]], target=expected)

    ours = doubly_robust(log, model, policy="target", ratio=RatioAssumption.FULL_SLATE, cap=1e9)

    theirs = ope.DoublyRobust().estimate_policy_value(**arrays, estimated_rewards_by_reg_model=rewards[:, :, None])
    assert ours.value == pytest.approx(theirs, rel=1e-9)


def test_the_benchmark_resamples_normalised_values_as_obp_does(arrays: dict[str, Any], log: LoggedRequests) -> None:
    weights = np.exp(log.log_ratios)

    low, high = normalized_bootstrap(weights * log.rewards / weights.mean(), 2_000, np.random.default_rng(1))

    theirs = ope.SelfNormalizedInverseProbabilityWeighting().estimate_interval(
        **arrays, n_bootstrap_samples=2_000, random_state=1
    )
    # Both draw at random: 2,000 resamples give a bound to about 4 % of the width.
    width = high - low
    assert low == pytest.approx(theirs["95.0% CI (lower)"], abs=0.1 * width)
    assert high == pytest.approx(theirs["95.0% CI (upper)"], abs=0.1 * width)
