"""What the world model expects: exact for given slates, and a fair sample for a policy's own."""

from itertools import product

import numpy as np
import pytest
import torch

from components.environments.storefront import BehaviorPolicy, Storefront
from components.evaluation.direct_method import sample_slates
from components.evaluation.logged_policy import logged_requests
from components.interactions.batching import SessionReader
from components.interactions.contract import Reward
from components.interactions.log_folder import Log
from components.interactions.vocabulary import Vocabulary
from components.policies.slate_policy import UniformPolicy


def test_expected_responses_are_those_of_all_possible_ones(make_model):
    model = make_model(3)
    model.clicks_above.data.fill_(-0.7)
    model.position.data.copy_(torch.tensor([0.3, 0.0, -0.4]))
    slates = torch.tensor([[4, 9, 2], [7, 3, 0]], dtype=torch.int32)
    batch_state = model.encoder.start(_requests(2))
    clicks, purchases = model.expected_responses(batch_state, slates)
    total = torch.zeros(2, 3)
    for answer in product([0.0, 1.0], repeat=3):
        given = torch.tensor([answer, answer])
        p = model.click_probabilities(batch_state, slates, given)
        chance = torch.where(given > 0, p, 1 - p).prod(1)
        total += chance[:, None] * given
    torch.testing.assert_close(clicks, total, atol=1e-6, rtol=1e-5)
    bought = torch.sigmoid(model.encoder.purchase_logits(batch_state, slates))
    torch.testing.assert_close(purchases, total * bought, atol=1e-6, rtol=1e-5)
    assert clicks[1, 2] == 0


def test_expected_choices_are_their_probabilities(make_model):
    model = make_model(3, "choice")
    slates = torch.tensor([[4, 9, 2]], dtype=torch.int32)
    state = model.encoder.start(_requests(1))
    clicks, _ = model.expected_responses(state, slates)
    torch.testing.assert_close(clicks, model.click_probabilities(state, slates, torch.zeros(1, 3)))
    assert 0 < float(clicks.sum()) < 1


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
    judged = logged_requests(reader, UniformPolicy(4), BehaviorPolicy(storefront))
    slates = sample_slates(
        reader, UniformPolicy(4), shop_model, Reward(weights={"clicked": 1.0}), torch.Generator().manual_seed(0)
    )
    assert slates.log_ratios is None
    assert len(slates.take(judged.known).model.logged) == len(judged.requests.rewards)
    # The policy that wrote the log gives each slate the log_prob that was logged.
    np.testing.assert_allclose(
        judged.requests.positions.behavior_log_probs.sum(1), judged.requests.behavior_log_probs, atol=1e-4
    )


def _requests(n: int):
    from components.interactions.batching import MAX_EVENTS, Requests

    return Requests(
        torch.zeros(n, 0, dtype=torch.int32), torch.zeros(n, 0), torch.zeros(n, MAX_EVENTS, dtype=torch.int32)
    )
