"""The policy-gradient loss and capped weights against closed forms."""

import math

import torch

from components.objectives.policy_gradient import capped_weights, policy_gradient_loss


def test_the_loss_is_the_masked_mean_of_minus_log_prob_times_advantage():
    log_probs = torch.tensor([-1.0, -2.0, -torch.inf], requires_grad=True)
    loss = policy_gradient_loss(log_probs, torch.tensor([3.0, 5.0, 7.0]), torch.tensor([True, True, False]))
    assert loss.item() == (3 + 10) / 2
    loss.backward()
    assert log_probs.grad.tolist() == [-1.5, -2.5, 0.0]


def test_no_gradient_flows_into_advantages_and_an_empty_mask_costs_nothing():
    advantages = torch.tensor([2.0], requires_grad=True)
    loss = policy_gradient_loss(torch.tensor([-1.0], requires_grad=True), advantages, torch.tensor([False]))
    assert loss.item() == 0.0
    loss.backward()
    assert advantages.grad is None


def test_capped_weights_are_ratios_up_to_the_cap():
    target, behavior = torch.tensor([0.5, 0.9, 0.0]).log(), torch.tensor([0.25, 0.1, 0.5]).log()
    weights = capped_weights(target, behavior, cap=5.0)
    assert torch.allclose(weights, torch.tensor([2.0, 5.0, 0.0]))
    assert math.isclose(float(capped_weights(target, behavior, cap=math.inf)[1]), 9.0, rel_tol=1e-6)
