"""The generalised advantage estimate by hand and against its textbook sum; utilities that seek risk."""

import math

import pytest
import torch

from components.objectives.advantages import exponential_utilities, generalised_advantages, standardised


def column(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers)[:, None]


def test_advantages_by_hand_with_an_end_in_the_middle():
    advantages = generalised_advantages(
        rewards=column(1.0, 2.0, 3.0),
        ended=torch.tensor([[False], [True], [False]]),
        values=column(10.0, 20.0, 40.0),
        last_values=torch.tensor([80.0]),
        gamma=0.5,
        trace=0.5,
    )
    last = 3 + 0.5 * 80 - 40
    second = 2 - 20
    first = (1 + 0.5 * 20 - 10) + 0.25 * second
    assert advantages[:, 0].tolist() == [first, second, last]


@pytest.mark.parametrize("trace", [0.0, 0.3, 0.95, 1.0])
def test_advantages_are_the_textbook_sum_of_errors_up_to_each_sessions_end(trace):
    n_steps, n_sessions, gamma = 7, 5, 0.9
    generator = torch.Generator().manual_seed(0)
    rewards, values = (torch.randn(n_steps, n_sessions, generator=generator) for _ in range(2))
    last = torch.randn(n_sessions, generator=generator)
    ended = torch.rand(n_steps, n_sessions, generator=generator) < 0.3
    advantages = generalised_advantages(rewards, ended, values, last, gamma, trace)
    following = torch.cat([values[1:], last[None]])
    for b in range(n_sessions):
        for t in range(n_steps):
            total, weight = 0.0, 1.0
            for k in range(t, n_steps):
                over = bool(ended[k, b])
                total += weight * float(rewards[k, b] + (0.0 if over else gamma * following[k, b]) - values[k, b])
                weight *= gamma * trace
                if over:
                    break
            assert float(advantages[t, b]) == pytest.approx(total, abs=1e-5)


def test_lambda_0_gives_errors_of_one_step_and_lambda_1_returns_less_values():
    rewards, values, last = column(1.0, 2.0, 4.0), column(3.0, 5.0, 7.0), torch.tensor([16.0])
    running = torch.zeros(3, 1, dtype=torch.bool)
    one_step = generalised_advantages(rewards, running, values, last, 0.5, trace=0.0)
    assert one_step[:, 0].tolist() == [1 + 2.5 - 3, 2 + 3.5 - 5, 4 + 8 - 7]
    whole = generalised_advantages(rewards, running, values, last, 0.5, trace=1.0)
    assert whole[:, 0].tolist() == [1 + 1 + 1 + 2 - 3, 2 + 2 + 4 - 5, 4 + 8 - 7]


def test_what_follows_an_end_is_not_looked_at():
    ended = torch.tensor([[False], [True]])
    arguments = column(1.0, 2.0), ended, column(3.0, 5.0)
    near, far = (generalised_advantages(*arguments, torch.tensor([last]), 0.9, 0.9) for last in (0.0, 1e6))
    assert torch.equal(near, far)


def test_without_discount_an_advantage_is_the_reward_less_the_value():
    running = torch.zeros(2, 1, dtype=torch.bool)
    advantages = generalised_advantages(column(1.0, 2.0), running, column(3.0, 5.0), torch.tensor([9.0]), 0.0, 0.9)
    assert advantages[:, 0].tolist() == [-2.0, -3.0]


def test_utilities_are_the_advantages_at_0_and_convex_above():
    advantages = torch.tensor([-2.0, 0.0, 2.0])
    assert torch.equal(exponential_utilities(advantages, 0.0), advantages)
    expected = [(math.exp(0.5 * a) - 1) / 0.5 for a in (-2.0, 0.0, 2.0)]
    assert exponential_utilities(advantages, 0.5).tolist() == pytest.approx(expected)
    assert torch.allclose(exponential_utilities(advantages, 1e-4), advantages, atol=1e-3)


def test_utilities_of_any_advantage_are_finite():
    assert exponential_utilities(torch.tensor([1e30]), 2.0).isfinite().all()


def test_standardised_advantages_have_mean_0_and_deviation_1_and_equal_ones_are_0():
    out = standardised(torch.tensor([1.0, 3.0]))
    assert out.tolist() == pytest.approx([-1.0, 1.0])
    assert standardised(torch.full((4,), 5.0)).tolist() == [0.0] * 4
