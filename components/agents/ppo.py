"""Proximal policy optimisation (Schulman et al., 2017): several passes over each batch of steps, kept near its policy.

    minimise  −mean min(ρ A, clamp(ρ, 1 − ε, 1 + ε) A)  −  η H(π)          ρ = π(a | s) / b(a | s)
              mean (V(s) − (A + V_b(s)))²

A is the generalised advantage estimate under the policy b and the critic V_b that collected the steps. Policy and critic
share nothing, so the weight of the critic's loss is its step size.

Shape letters: B sessions, T steps, M = T·B steps of an iteration, S numbers of an observation, A of an action.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from components.agents.on_policy import Experience, actor_and_critic, collect
from components.agents.watch import Watch, unwatched
from components.environments.continuous import ContinuousEnvironment, RunningSessions, State
from components.objectives.policy_gradient import clipped_surrogate_loss, divergence_from_behavior, standardised
from components.policies import tanh_gaussian
from components.policies.continuous_policy import TanhGaussianPolicy


class PpoConfig(BaseModel):
    """Proximal policy optimisation."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int = Field(default=1_000_000, ge=1, description="Environment steps, of all sessions together.")
    sessions: int = Field(default=1024, ge=1, description="Sessions that run side by side.")
    session_steps: int = Field(default=8, ge=1, description="T: steps of each session before the policy improves.")
    epochs: int = Field(default=4, ge=1, le=1_000, description="Passes over the steps of an iteration, at most.")
    minibatch: int = Field(default=2048, ge=1, description="Steps of one update.")
    hidden: tuple[int, ...] = Field(default=(64, 64), description="Units of the layers of policy and critic.")
    gamma: float = Field(default=0.0, ge=0, le=1, description="Discount per step; 0 looks at one step alone.")
    trace: float = Field(default=0.95, ge=0, le=1, description="λ: how far rewards are believed before the critic is.")
    clip: float = Field(default=0.2, gt=0, description="ε: how far an action's probability may move, as a share.")
    target_divergence: float | None = Field(
        default=None, gt=0, description="Nats from the policy that acted after which no further pass begins."
    )
    standardise: bool = Field(default=True, description="Whether advantages are standardised in each minibatch.")
    entropy: float = Field(default=0.0, ge=0, description="η: reward per nat of entropy; keeps the policy exploring.")
    log_deviation: float = Field(default=-0.5, ge=-5, le=2, description="log σ of the first actions, before tanh.")
    learning_rate: float = Field(default=1e-3, gt=0, le=1, description="Adam's step size at first.")
    critic_rate: float = Field(default=1e-3, gt=0, le=1, description="Adam's step size of the critic at first.")
    anneal: bool = Field(default=True, description="Whether step sizes fall to 0, in equal parts per iteration.")
    clip_norm: float = Field(default=0.5, gt=0, description="Largest norm of the gradient of each network.")


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
    optimizer = torch.optim.Adam(
        [
            {"params": policy.parameters(), "lr": config.learning_rate},
            {"params": critic.parameters(), "lr": config.critic_rate},
        ],
        fused=True,
    )
    iterate(environment, policy, critic, (optimizer,), optimizer.step, config, seed, watch)
    return policy


def iterate(environment, policy, critic, optimizers, step, config, seed, watch) -> None:
    generator = torch.Generator(environment.observation_scale.device).manual_seed(seed)
    sessions = RunningSessions(environment, config.sessions, generator)
    n_iterations = -(-config.steps // (config.sessions * config.session_steps))
    schedules = [torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.0, n_iterations) for o in optimizers]
    for iteration in range(n_iterations):
        experience = collect(
            sessions, policy, critic, config.session_steps, config.gamma, config.trace, generator
        )
        improve(policy, critic, experience, step, config, generator)
        if config.anneal:
            for schedule in schedules:
                schedule.step()
        watch(policy, (iteration + 1) * config.sessions * config.session_steps)


def improve(policy, critic, experience, step, config, generator) -> None:
    n = len(experience.log_probs)
    actor_parameters, critic_parameters = list(policy.parameters()), list(critic.parameters())
    for _ in range(config.epochs):
        order = torch.randperm(n, generator=generator, device=generator.device)
        shuffled = experience.select(order)
        for start in range(0, n, config.minibatch):
            part = shuffled.select(slice(start, start + config.minibatch))
            mean, log_deviation = policy.parameters_of(part.observations)
            log_probs = tanh_gaussian.log_density(part.latents, mean, log_deviation)
            advantages = standardised(part.advantages) if config.standardise else part.advantages
            loss = clipped_surrogate_loss(log_probs, part.log_probs, advantages, config.clip)
            if config.entropy > 0:
                drawn = tanh_gaussian.draw(mean, log_deviation, generator)
                loss = loss + config.entropy * tanh_gaussian.log_density(drawn, mean, log_deviation).mean()
            loss = loss + (critic(part.observations)[:, 0] - part.returns).square().mean()
            for p in actor_parameters + critic_parameters:
                p.grad = None
            loss.backward()
            nn.utils.clip_grad_norm_(actor_parameters, config.clip_norm, foreach=True)
            nn.utils.clip_grad_norm_(critic_parameters, config.clip_norm, foreach=True)
            step()
        if config.target_divergence is not None:
            if divergence_from_behavior(log_probs.detach(), part.log_probs) > config.target_divergence:
                break
