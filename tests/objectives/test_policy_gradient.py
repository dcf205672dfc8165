"""The policy-gradient loss and capped weights against closed forms."""

import math

import pytest
import torch

from components.objectives.policy_gradient import (
    capped_weights,
    clipped_surrogate_loss,
    divergence_from_behavior,
    policy_gradient_loss,
)


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


def surrogate(ratio: float, advantage: float) -> tuple[float, float]:
    """Loss at a ratio with clip 0.2, and its gradient to log π."""
    log_prob = torch.tensor([math.log(ratio)], requires_grad=True)
    loss = clipped_surrogate_loss(log_prob, torch.zeros(1), torch.tensor([advantage]), 0.2)
    loss.backward()
    return loss.item(), log_prob.grad.item()


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.1, 2.0, -2.2, -2.2),  # within the clip: ρ A
        (1.5, 2.0, -2.4, 0.0),  # gone too far up: 1.2 A and nothing more to gain
        (0.5, 2.0, -1.0, -1.0),  # gone down by mistake: may come back
        (0.5, -2.0, 1.6, 0.0),  # gone too far down: 0.8 A
        (1.5, -2.0, 3.0, 3.0),  # gone up by mistake
    ],
)
def test_the_clipped_objective_and_its_gradient_by_hand(ratio, advantage, loss, gradient):
    assert surrogate(ratio, advantage) == pytest.approx((loss, gradient), rel=1e-5, abs=1e-7)


def test_at_the_policy_that_acted_the_clipped_gradient_is_the_policy_gradient():
    behavior, advantages = torch.tensor([-1.0, -2.0, -0.5]), torch.tensor([3.0, -5.0, 7.0])
    clipped, plain = (behavior.clone().requires_grad_() for _ in range(2))
    clipped_surrogate_loss(clipped, behavior, advantages, 0.2).backward()
    policy_gradient_loss(plain, advantages, torch.ones(3, dtype=torch.bool)).backward()
    assert torch.allclose(clipped.grad, plain.grad)


def test_the_divergence_is_0_for_equal_policies_and_meets_the_closed_form_of_two_gaussians():
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(200_000, generator=generator)
    near, far = (torch.distributions.Normal(mean, 1.0).log_prob(drawn) for mean in (0.0, 0.3))
    assert float(divergence_from_behavior(near, near)) == 0.0
    # KL of N(0, 1) from N(0.3, 1) is 0.3² / 2; the estimate's own deviation is about 2e-4.
    assert float(divergence_from_behavior(far, near)) == pytest.approx(0.045, abs=1e-3)
