import math

import pytest
import torch
from torch import nn

from components.policies.continuous_policy import ContinuousPolicy
from components.policies.deterministic_policy import DeterministicPolicy


def policy_at(*modes: float, deviation: float) -> DeterministicPolicy:
    """Whatever it observes, its modes are these."""
    network = nn.Linear(1, len(modes))
    with torch.no_grad():
        network.weight.zero_()
        network.bias.copy_(torch.tensor(modes).atanh())
    return DeterministicPolicy(network, deviation)


def test_it_is_a_policy_of_continuous_actions_and_its_mode_is_the_squashed_output():
    policy = policy_at(0.3, -0.8, deviation=0.1)
    assert isinstance(policy, ContinuousPolicy)
    assert policy.mode(torch.zeros(2, 1)).tolist() == [pytest.approx([0.3, -0.8])] * 2


@pytest.mark.parametrize("mode", [0.0, 0.5, -0.97, 0.99999])
@pytest.mark.parametrize("deviation", [0.05, 0.3, 20.0])
def test_the_density_integrates_to_one(mode, deviation):
    policy = policy_at(mode, deviation=deviation)
    edges = torch.linspace(-1, 1, 40_001, dtype=torch.float64)
    middles = ((edges[1:] + edges[:-1]) / 2).float()
    density = policy.log_prob(torch.zeros(len(middles), 1), middles[:, None]).double().exp()
    assert (density * (2 / len(middles))).sum().item() == pytest.approx(1.0, abs=1e-4)


def test_the_density_is_that_of_the_gaussian_over_its_mass_in_the_box():
    density = policy_at(0.5, deviation=0.5).log_prob(torch.zeros(1, 1), torch.tensor([[0.0]])).exp()
    # φ(−1) / 0.5 over Φ(1) − Φ(−3).
    by_hand = math.exp(-0.5) / math.sqrt(2 * math.pi) / 0.5 / (0.8413447 - 0.0013499)
    assert density.item() == pytest.approx(by_hand, rel=1e-6)


def test_densities_of_the_numbers_of_an_action_multiply():
    action = torch.tensor([[0.2, -0.9]])
    together = policy_at(0.3, -0.8, deviation=0.2).log_prob(torch.zeros(1, 1), action)
    alone = [
        policy_at(mode, deviation=0.2).log_prob(torch.zeros(1, 1), action[:, [place]])
        for place, mode in enumerate((0.3, -0.8))
    ]
    assert together.item() == pytest.approx(sum(alone).item())


def test_an_action_outside_of_the_box_is_never_taken():
    densities = policy_at(0.9, deviation=0.2).log_prob(torch.zeros(3, 1), torch.tensor([[1.0], [1.001], [-1.5]]))
    assert densities.isfinite().tolist() == [True, False, False]
    assert densities[1].item() == -math.inf


@pytest.mark.parametrize(("mode", "deviation"), [(0.2, 0.1), (0.98, 0.1), (-0.9, 0.6)])
def test_what_is_drawn_follows_the_density(mode, deviation):
    policy, n = policy_at(mode, deviation=deviation), 40_000
    choice = policy.act(torch.zeros(n, 1), torch.Generator().manual_seed(0))
    assert choice.actions.abs().max() <= 1
    points = torch.linspace(-1, 1, 2_001)[:-1] + 0.0005
    cumulative = policy.log_prob(torch.zeros(2_000, 1), points[:, None]).exp().cumsum(0) * 0.001
    for quantile in (0.1, 0.5, 0.9):
        at = points[(cumulative < quantile).sum()].item() + 0.0005
        # Three standard errors of a share of n draws, and the width of a step.
        assert (choice.actions <= at).float().mean().item() == pytest.approx(quantile, abs=0.0075 + 0.005)


def test_the_density_that_comes_with_an_action_is_the_one_it_is_asked_for():
    policy = policy_at(0.99, -0.4, deviation=0.1)
    choice = policy.act(torch.zeros(500, 1), torch.Generator().manual_seed(1))
    torch.testing.assert_close(choice.log_probs, policy.log_prob(torch.zeros(500, 1), choice.actions))
    assert choice.log_probs.isfinite().all()


def test_a_mode_on_the_very_edge_with_a_narrow_deviation_still_has_finite_densities():
    policy = DeterministicPolicy(nn.Identity(), 1e-3)
    observations = torch.tensor([[40.0, -40.0]])
    choice = policy.act(observations.expand(1_000, 2), torch.Generator().manual_seed(2))
    assert choice.log_probs.isfinite().all()
    assert (choice.actions[:, 0] > 0.99).all()
    assert (choice.actions[:, 1] < -0.99).all()


def test_gradients_flow_through_the_mode():
    policy = policy_at(0.5, deviation=0.1)
    policy.mode(torch.ones(1, 1)).sum().backward()
    assert policy.network.bias.grad.item() == pytest.approx(1 - 0.25)
