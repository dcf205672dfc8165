import math

import pytest
import torch

from components.objectives.value_targets import (
    smoothed_actions,
    soft_update,
    soft_value,
    td_target,
    temperature_loss,
)


def test_the_target_of_a_session_that_goes_on_has_the_discounted_value_and_that_of_one_that_ended_has_not():
    target = td_target(torch.tensor([1.0, 1.0]), torch.tensor([False, True]), torch.tensor([10.0, 10.0]), gamma=0.9)
    assert target.tolist() == pytest.approx([10.0, 1.0])


def test_a_value_that_is_not_a_number_does_not_reach_the_target_of_a_session_that_ended():
    target = td_target(torch.tensor([2.0]), torch.tensor([True]), torch.tensor([torch.nan]), gamma=0.9)
    assert target.tolist() == [2.0]


def test_without_discounting_the_targets_are_the_rewards():
    rewards = torch.tensor([1.0, -2.0])
    assert td_target(rewards, torch.tensor([False, False]), torch.tensor([5.0, 5.0]), gamma=0.0).equal(rewards)


def test_the_soft_value_takes_the_lower_twin_and_adds_the_entropy():
    value = soft_value(torch.tensor([3.0, 1.0]), torch.tensor([2.0, 4.0]), torch.tensor([-1.0, 0.5]), torch.tensor(0.2))
    assert value.tolist() == pytest.approx([2.0 + 0.2, 1.0 - 0.1])


def test_without_temperature_the_soft_value_is_the_minimum_of_the_twins():
    first, second = torch.tensor([3.0, 1.0]), torch.tensor([2.0, 4.0])
    assert soft_value(first, second, torch.tensor([-9.0, 9.0]), torch.tensor(0.0)).tolist() == [2.0, 1.0]


def test_smoothing_noise_is_clipped_and_actions_stay_in_the_box():
    actions = torch.tensor([[0.0, 0.95]]).expand(4_000, 2)
    smoothed = smoothed_actions(actions, deviation=1.0, clip=0.5, generator=torch.Generator().manual_seed(0))
    noise = smoothed[:, 0]
    assert noise.abs().max() == pytest.approx(0.5)
    # Of a standard Gaussian 61.7 % lie beyond one half.
    assert (noise.abs() == 0.5).float().mean() == pytest.approx(2 * 0.30854, abs=0.03)
    assert smoothed[:, 1].max() == 1.0
    assert smoothed[:, 1].min() == pytest.approx(0.45)
    assert actions[0].tolist() == pytest.approx([0.0, 0.95])


def test_without_deviation_nothing_is_smoothed():
    actions = torch.tensor([[0.3, -1.0]])
    assert smoothed_actions(actions, 0.0, 0.5, torch.Generator().manual_seed(0)).equal(actions)


def test_the_gradient_of_the_log_temperature_is_the_entropy_less_its_target():
    log_temperature = torch.tensor(math.log(0.3), requires_grad=True)
    log_probs = torch.tensor([1.0, -2.0, 4.0], requires_grad=True)
    temperature_loss(log_temperature, log_probs, target_entropy=-2.0).backward()
    assert log_temperature.grad is not None
    # Entropy −mean(1, −2, 4) = −1, target −2: above it, so that a step against the gradient lowers the temperature.
    assert log_temperature.grad.item() == pytest.approx(-1.0 - (-2.0))
    assert log_probs.grad is None


def test_soft_updates_go_a_share_of_the_way():
    target, source = (
        [torch.tensor([1.0, 2.0]), torch.tensor([[4.0]])],
        [torch.tensor([3.0, 2.0]), torch.tensor([[0.0]])],
    )
    soft_update(target, source, tau=0.25)
    assert target[0].tolist() == [1.5, 2.0]
    assert target[1].tolist() == [[3.0]]
    assert source[0].tolist() == [3.0, 2.0]
    soft_update(target, source, tau=1.0)
    assert target[0].equal(source[0])
