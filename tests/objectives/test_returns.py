"""Returns against numbers worked out by hand."""

import torch

from components.objectives.returns import discounted_returns, position_returns


def test_discounted_returns_by_hand():
    returns = discounted_returns(torch.tensor([[1.0, 10.0, 100.0]]), gamma=0.5)
    assert returns.tolist() == [[1 + 5 + 25, 10 + 50, 100]]


def test_without_discount_returns_are_sums_and_with_gamma_0_they_are_rewards():
    rewards = torch.tensor([[1.0, 10.0, 100.0]])
    assert discounted_returns(rewards, gamma=1.0).tolist() == [[111, 110, 100]]
    assert discounted_returns(rewards, gamma=0.0).tolist() == rewards.tolist()


def test_a_position_earns_what_it_and_those_below_it_and_later_requests_earn():
    rewards, following = torch.tensor([[[1.0, 2.0], [4.0, 8.0]]]), torch.tensor([[12.0, 0.0]])
    assert position_returns(rewards, following, gamma=0.5).tolist() == [[[3 + 6, 2 + 6], [12, 8]]]
