"""What the world model expects: exact for given slates, and a fair sample for a policy's own."""

import numpy as np
import pytest
import torch

from components.environments.storefront import BehaviorPolicy, Storefront
from components.evaluation.direct_method import draw_like_logged, sample_slates
from components.evaluation.logged_policy import logged_requests
from components.interactions.batching import SessionReader
from components.interactions.contract import RatioAssumption, Reward
from components.interactions.log_folder import Log
from components.interactions.vocabulary import Vocabulary
from components.policies.slate_policy import UniformPolicy


def test_sampled_slates_are_the_target_policys(storefront_log: Log, storefront: Storefront, shop_model) -> None:
    reader = SessionReader(storefront_log, Vocabulary.fit(storefront_log))
    behavior, target = BehaviorPolicy(storefront), UniformPolicy(4)
    reward = Reward(weights={"clicked": 1.0})
    slates = sample_slates(reader, target, shop_model, reward, torch.Generator().manual_seed(0), behavior)
    n = storefront_log.manifest.n_requests
    assert slates.model.logged.shape == slates.model.target.shape == (n,)
    # The uniform policy's slates have one probability; under the logging policy E[β / π] over them is at most 1.
    mean = np.exp(-slates.log_ratios).mean()
    assert mean == pytest.approx(1.0, abs=0.1)
    with_itself = sample_slates(reader, behavior, shop_model, reward, torch.Generator().manual_seed(0), behavior)
    np.testing.assert_allclose(with_itself.log_ratios, 0.0, atol=1e-5)
    # The model's mean for the logging policy's own slates, drawn anew, is that for the logged ones.
    difference = with_itself.model.target - with_itself.model.logged
    assert abs(difference.mean()) < 4 * difference.std() / np.sqrt(n)


def test_rows_are_in_the_order_of_the_logged_requests(storefront_log: Log, storefront: Storefront, shop_model) -> None:
    reader = SessionReader(storefront_log, Vocabulary.fit(storefront_log))
    judged = logged_requests(reader, BehaviorPolicy(storefront), RatioAssumption.CASCADE)
    slates = sample_slates(
        reader, UniformPolicy(4), shop_model, Reward(weights={"clicked": 1.0}), torch.Generator().manual_seed(0)
    )
    assert slates.log_ratios is None
    assert len(slates.take(judged.known).model.logged) == len(judged.requests.rewards)
    np.testing.assert_allclose(slates.model.positions.sum(1), slates.model.logged)
    # The policy that wrote the log gives each position the log_prob that was logged.
    positions = judged.requests.positions
    np.testing.assert_allclose(positions.behavior_log_probs, positions.target_log_probs, atol=1e-5)


def test_drawn_slates_are_as_long_as_the_logged_ones(storefront: Storefront) -> None:
    requests = storefront.observe(storefront.reset(torch.arange(2), torch.Generator().manual_seed(0)))
    policy = BehaviorPolicy(storefront)
    logged = torch.tensor([[5, 9, 0, 0], [3, 4, 8, 7]])
    drawn = draw_like_logged(policy, policy.start(requests), requests, logged, torch.Generator().manual_seed(1))
    assert torch.equal(drawn.slates > 0, logged > 0)
    # The log_prob of what is left is that of the shorter slate.
    again = policy.log_prob(policy.start(requests), requests, drawn.slates)
    torch.testing.assert_close(again, drawn.log_probs)
