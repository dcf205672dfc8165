"""Advantage actor-critic, all sessions in step (A2C; Mnih et al., A3C, 2016, alg. S3): one update a batch of steps.

    minimise  −mean A log π(a | s)  −  η H(π),     mean (V(s) − (A + V_b(s)))²

With λ = 1 A is the paper's n-step advantage, Σ_{k<n} γ^k r_{t+k} + γ^n V(s_{t+n}) − V(s_t), n reaching to the end of
the batch; with `seeking` its exponential utility, an addition of ours. Policy and critic share nothing.

Shape letters: B sessions, T steps, M = T·B steps of an update.
"""

import torch
from pydantic import BaseModel, ConfigDict, Field

from components.agents.on_policy import actor_and_critic, anneal, clip_gradients, collect, entropy
from components.agents.watch import Watch, unwatched
from components.environments.continuous import ContinuousEnvironment, RunningSessions, State
from components.objectives.advantages import exponential_utilities, standardised
from components.objectives.policy_gradient import policy_gradient_loss
from components.policies import tanh_gaussian
from components.policies.continuous_policy import TanhGaussianPolicy


class A2cConfig(BaseModel):
    """Advantage actor-critic."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int = Field(default=400_000, ge=1, description="Environment steps of all sessions; whole updates.")
    sessions: int = Field(default=1024, ge=1, description="Sessions that run side by side.")
    session_steps: int = Field(default=2, ge=1, description="T: steps of each session in an update.")
    hidden: tuple[int, ...] = Field(default=(64, 64), description="Units of the layers of policy and critic.")
    gamma: float = Field(default=0.0, ge=0, le=1, description="Discount per step; 0 looks at one step alone.")
    trace: float = Field(default=1.0, ge=0, le=1, description="λ: how far rewards are believed before the critic is.")
    seeking: float = Field(
        default=1.0,
        ge=0,
        description="β, per unit of reward: 0 maximises the expected return; above 0 actions that did far better than "
        "expected weigh more, which leaves plateaus but likes gambles.",
    )
    standardise: bool = Field(default=True, description="Whether advantages are standardised in each update.")
    entropy: float = Field(default=0.0, ge=0, description="η: reward per nat of entropy; keeps the policy exploring.")
    log_deviation: float = Field(default=-0.5, ge=-5, le=2, description="log σ at first, of actions before tanh.")
    learning_rate: float = Field(default=3e-3, gt=0, le=1, description="Adam's step size at first.")
    critic_rate: float = Field(default=3e-3, gt=0, le=1, description="Adam's step size of the critic at first.")
    anneal: bool = Field(default=True, description="Whether step sizes fall to 0, in equal parts per update.")
    clip_norm: float = Field(default=0.5, gt=0, description="Largest norm of the gradient of each network.")


def train_a2c(
    environment: ContinuousEnvironment[State], config: A2cConfig, seed: int, watch: Watch = unwatched
) -> TanhGaussianPolicy:
    """Learn a policy by A2C.

    Args:
        environment: where sessions run.
        config: sizes and step sizes.
        seed: of all chance.
        watch: told of the policy after each update.
    """
    policy, critic = actor_and_critic(environment, config.hidden, config.log_deviation, seed)
    generator = torch.Generator(environment.observation_scale.device).manual_seed(seed)
    sessions = RunningSessions(environment, config.sessions, generator)
    rates = (config.learning_rate, config.critic_rate)
    groups = [{"params": list(policy.parameters())}, {"params": list(critic.parameters())}]
    optimizer = torch.optim.Adam(groups, fused=True)
    steps_each = config.sessions * config.session_steps
    n_updates = -(-config.steps // steps_each)
    for update in range(n_updates):
        anneal(optimizer, rates, 1 - update / n_updates if config.anneal else 1.0)
        seen = collect(sessions, policy, critic, config.session_steps, config.gamma, config.trace, generator)
        advantages = exponential_utilities(seen.advantages, config.seeking)
        if config.standardise:
            advantages = standardised(advantages)
        mean, log_deviation = policy.parameters_of(seen.observations)
        log_probs = tanh_gaussian.log_density(seen.latents, mean, log_deviation)
        loss = policy_gradient_loss(log_probs, advantages, torch.ones_like(log_probs, dtype=torch.bool))
        if config.entropy > 0:
            loss = loss - config.entropy * entropy(mean, log_deviation, generator)
        loss = loss + (critic(seen.observations)[:, 0] - seen.returns).square().mean()
        optimizer.zero_grad()
        loss.backward()
        clip_gradients(policy, critic, config.clip_norm)
        optimizer.step()
        watch(policy, (update + 1) * steps_each)
    return policy
