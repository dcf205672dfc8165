"""Advantage actor-critic, all sessions in step (A2C; Mnih et al., A3C, 2016, alg. S3): one update a batch of steps.

    minimise  −mean A log π(a | s)  −  η H(π),     mean (V(s) − (A + V_b(s)))²

With λ = 1 A is the paper's n-step advantage, Σ_{k<n} γ^k r_{t+k} + γ^n V(s_{t+n}) − V(s_t), n reaching to the end of
the batch; with `seeking` its exponential utility, an addition of ours. Policy and critic share nothing.

Shape letters: B sessions, T steps, M = T·B steps of an update.
"""

import torch
from pydantic import Field

from components.agents.on_policy import OnPolicyConfig, actor_and_critic, anneal, clip_gradients, collect, entropy
from components.agents.watch import Watch, unwatched
from components.environments.continuous import ContinuousEnvironment, RunningSessions, State
from components.objectives.advantages import exponential_utilities, standardised
from components.objectives.policy_gradient import policy_gradient_loss
from components.policies import tanh_gaussian
from components.policies.continuous_policy import TanhGaussianPolicy


class A2cConfig(OnPolicyConfig):
    """Advantage actor-critic."""

    session_steps: int = Field(default=2, ge=1, description="T: steps of each session in an update.")
    trace: float = Field(default=1.0, ge=0, le=1, description="λ: how far rewards are believed before the critic is.")


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
