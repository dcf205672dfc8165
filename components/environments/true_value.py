"""What a policy is truly worth in a simulator: the values that off-policy estimates from its logs are estimates of.

    one request   E[reward | logged state, slate ~ target], over the requests of the behavior policy's sessions
    session       E[summed reward of a session] where the target answers every request

Both by simulation: with n sessions the error is that of a mean over them, and it is returned with the value.
"""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from components.environments.interface import Environment, State
from components.environments.rollout import Survivors, continue_sessions, open_sessions, position_rewards, rollout
from components.policies.slate_policy import SlatePolicy


class TrueValue(NamedTuple):
    """A mean over simulated sessions and its standard error."""

    value: float
    standard_error: float


def true_session_value(
    environment: Environment[State],
    target: SlatePolicy,
    users: Int[Tensor, " B"],
    generator: torch.Generator,
    max_steps: int,
) -> TrueValue:
    """Mean summed reward of one session of each user."""
    rewards = rollout(environment, target, users, generator, max_steps).rewards.double().sum((1, 2))
    return TrueValue(float(rewards.mean()), float(rewards.std() / np.sqrt(len(rewards))))


@torch.inference_mode()
def true_one_request_value(
    environment: Environment[State],
    behavior: SlatePolicy,
    target: SlatePolicy,
    users: Int[Tensor, " B"],
    generator: torch.Generator,
    max_steps: int,
) -> TrueValue:
    """Mean reward of the target's slates at the requests of the behavior policy's sessions, one of each user.

    Every request of the behavior policy is answered a second time, by a slate of the target's; what follows it is
    thrown away. The error is clustered by session.
    """
    opened = open_sessions(environment, behavior, users, generator)
    steps = [Survivors(torch.arange(len(users)), opened)]
    batch = continue_sessions(environment, behavior, opened, generator, max_steps, on_step=steps.append)
    states = target.states(batch)
    n_steps = batch.mask.shape[1]
    rewards, requests = torch.zeros(2, len(users), dtype=torch.float64)
    for step, (rows, point) in enumerate((part.rows, part.point) for part in steps):
        choice = target.act(states.select(rows * n_steps + step), point.requests, generator)
        feedback, _ = environment.step(point.state, choice.slates, generator)
        earned = position_rewards(environment.reward, feedback.clicks, feedback.purchases).double().sum(1)
        rewards[rows] += earned
        requests[rows] += 1.0
    value = rewards.sum() / requests.sum()
    error = torch.sqrt((rewards - value * requests).square().sum()) / requests.sum()
    return TrueValue(float(value), float(error))
