"""Proximal policy optimisation (Schulman et al., 2017): several passes over each batch of steps, kept near its policy.

    minimise  −mean min(ρ A, clamp(ρ, 1 − ε, 1 + ε) A)  −  η H(π)          ρ = π(a | s) / b(a | s)
              mean (V(s) − (A + V_b(s)))²

A is the generalised advantage estimate under the policy b and the critic V_b that collected the steps; with `seeking`
its exponential utility, an addition of ours. Policy and critic share nothing, so the weight of the critic's loss is its
step size.

Shape letters: B sessions, T steps, M = T·B steps of an iteration, S numbers of an observation, A of an action.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from pydantic import Field
from torch import nn

from components.agents.on_policy import (
    Experience,
    OnPolicyConfig,
    actor_and_critic,
    anneal,
    clip_gradients,
    collect,
    entropy,
)
from components.agents.watch import Watch, unwatched
from components.environments.continuous import ContinuousEnvironment, RunningSessions, State
from components.objectives.advantages import exponential_utilities, standardised
from components.objectives.policy_gradient import clipped_surrogate_loss, divergence_from_behavior
from components.policies import tanh_gaussian
from components.policies.continuous_policy import TanhGaussianPolicy


class PpoConfig(OnPolicyConfig):
    """Proximal policy optimisation."""

    session_steps: int = Field(default=4, ge=1, description="T: steps of each session before the policy improves.")
    epochs: int = Field(default=2, ge=1, le=1_000, description="Passes over the steps of an iteration, at most.")
    minibatch: int = Field(default=1024, ge=1, description="Steps of one update.")
    trace: float = Field(default=0.95, ge=0, le=1, description="λ: how far rewards are believed before the critic is.")
    clip: float = Field(default=0.2, gt=0, description="ε: how far an action's probability may move, as a share.")
    target_divergence: float | None = Field(
        default=None, gt=0, description="Nats from the policy that acted after which no further pass begins."
    )
    log_deviation: float = Field(default=0.0, ge=-5, le=2, description="log σ at first, of actions before tanh.")
    learning_rate: float = Field(default=1e-3, gt=0, le=1, description="Adam's step size at first.")
    critic_rate: float = Field(default=1e-3, gt=0, le=1, description="Adam's step size of the critic at first.")


#: PPO's own published settings (Schulman et al., 2017, table 3, Mujoco), with the first deviation and the clipped
#: gradient of its reference code; the report on Virtual Taobao gives PPO's result (CTR 0.37) and none of its settings.
#: Theirs is one session of 2,048 steps between improvements, ours 32 of 64: they are as many steps of one policy.
PUBLISHED = PpoConfig(
    steps=200_000,
    sessions=32,
    session_steps=64,
    epochs=10,
    minibatch=64,
    hidden=(64, 64),
    gamma=0.99,
    trace=0.95,
    clip=0.2,
    seeking=0.0,
    log_deviation=0.0,
    learning_rate=3e-4,
    critic_rate=3e-4,
    anneal=False,
    clip_norm=0.5,
)


def train_ppo(
    environment: ContinuousEnvironment[State], config: PpoConfig, seed: int, watch: Watch = unwatched
) -> TanhGaussianPolicy:
    """Learn a policy by PPO.

    Args:
        environment: where sessions run.
        config: sizes and step sizes.
        seed: of all chance.
        watch: told of the policy after each iteration.
    """
    policy, critic = actor_and_critic(environment, config.hidden, config.log_deviation, seed)
    learn(environment, policy, critic, config, seed, watch)
    return policy


def learn(
    environment: ContinuousEnvironment[State],
    policy: TanhGaussianPolicy,
    critic: nn.Module,
    config: PpoConfig,
    seed: int,
    watch: Watch,
    begin_update: Callable[[], None] = lambda: None,
) -> None:
    """Train given networks in place.

    Args:
        environment: where sessions run.
        policy: acts and learns.
        critic: values (M, 1) of observations; learns.
        config: sizes and step sizes.
        seed: of all chance.
        watch: told of the policy after each iteration.
        begin_update: called before each update; parameters that it makes need no gradient stay as they are.
    """
    generator = torch.Generator(environment.observation_scale.device).manual_seed(seed)
    sessions = RunningSessions(environment, config.sessions, generator)
    rates = (config.learning_rate, config.critic_rate)
    groups = [{"params": list(policy.parameters())}, {"params": list(critic.parameters())}]
    optimizer = torch.optim.Adam(groups, fused=True)
    steps_each = config.sessions * config.session_steps
    n_iterations = -(-config.steps // steps_each)
    for iteration in range(n_iterations):
        anneal(optimizer, rates, 1 - iteration / n_iterations if config.anneal else 1.0)
        experience = collect(sessions, policy, critic, config.session_steps, config.gamma, config.trace, generator)
        experience = replace(experience, advantages=exponential_utilities(experience.advantages, config.seeking))
        improve(policy, critic, optimizer, experience, config, generator, begin_update)
        watch(policy, (iteration + 1) * steps_each)


def improve(
    policy: TanhGaussianPolicy,
    critic: nn.Module,
    optimizer: torch.optim.Optimizer,
    experience: Experience,
    config: PpoConfig,
    generator: torch.Generator,
    begin_update: Callable[[], None],
) -> None:
    """Passes over the steps of an iteration, in minibatches that are shuffled anew for each."""
    for _ in range(config.epochs):
        order = torch.randperm(len(experience.log_probs), generator=generator, device=generator.device)
        log_ratios = []
        for rows in order.split(config.minibatch):
            part = experience.select(rows)
            begin_update()
            optimizer.zero_grad()
            mean, log_deviation = policy.parameters_of(part.observations)
            log_probs = tanh_gaussian.log_density(part.latents, mean, log_deviation)
            advantages = standardised(part.advantages) if config.standardise else part.advantages
            loss = clipped_surrogate_loss(log_probs, part.log_probs, advantages, config.clip)
            if config.entropy > 0:
                loss = loss - config.entropy * entropy(mean, log_deviation, generator)
            loss = loss + (critic(part.observations)[:, 0] - part.returns).square().mean()
            loss.backward()
            clip_gradients(policy, critic, config.clip_norm)
            optimizer.step()
            log_ratios.append((log_probs.detach(), part.log_probs))
        if config.target_divergence is not None:
            new, old = (torch.cat(parts) for parts in zip(*log_ratios, strict=True))
            if divergence_from_behavior(new, old) > config.target_divergence:
                break
