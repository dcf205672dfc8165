"""REINFORCE for continuous actions, with a learned baseline (Williams, 1992): whole sessions, one update for them all.

    minimise  −mean (G_t − V(s_t)) log π(a_t | s_t)  −  η H(π),     mean (V(s_t) − G_t)²,     G_t = r_t + γ G_{t+1}

The baseline V looks at no action, so the gradient is unbiased; and no value stands for rewards to come, as in A2C: the
sessions run to their ends. With `seeking` the advantage is its exponential utility, an addition of ours.
(`reinforce.py` is the one for slates.)

Shape letters: B sessions, T steps of the longest, M steps of all.
"""

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from components.agents.on_policy import OnPolicyConfig, actor_and_critic, anneal, clip_gradients, entropy
from components.agents.watch import Watch, unwatched
from components.environments.continuous import ContinuousEnvironment, State
from components.objectives.advantages import exponential_utilities, standardised
from components.objectives.policy_gradient import policy_gradient_loss
from components.objectives.returns import discounted_returns
from components.policies import tanh_gaussian
from components.policies.continuous_policy import TanhGaussianPolicy


class ContinuousReinforceConfig(OnPolicyConfig):
    """REINFORCE for continuous actions."""

    sessions: int = Field(default=256, ge=1, description="Whole sessions of an update.")


def train_continuous_reinforce(
    environment: ContinuousEnvironment[State], config: ContinuousReinforceConfig, seed: int, watch: Watch = unwatched
) -> TanhGaussianPolicy:
    """Learn a policy by REINFORCE.

    Args:
        environment: where sessions run; they must end.
        config: sizes and step sizes.
        seed: of all chance.
        watch: told of the policy after each update.
    """
    policy, baseline = actor_and_critic(environment, config.hidden, config.log_deviation, seed)
    generator = torch.Generator(environment.observation_scale.device).manual_seed(seed)
    rates = (config.learning_rate, config.critic_rate)
    groups = [{"params": list(policy.parameters())}, {"params": list(baseline.parameters())}]
    optimizer = torch.optim.Adam(groups, fused=True)
    steps = 0
    while steps < config.steps:
        anneal(optimizer, rates, 1 - steps / config.steps if config.anneal else 1.0)
        observations, latents, returns = whole_sessions(environment, policy, config.sessions, config.gamma, generator)
        steps += len(returns)
        values = baseline(observations)[:, 0]
        advantages = exponential_utilities(returns - values.detach(), config.seeking)
        if config.standardise:
            advantages = standardised(advantages)
        mean, log_deviation = policy.parameters_of(observations)
        log_probs = tanh_gaussian.log_density(latents, mean, log_deviation)
        loss = policy_gradient_loss(log_probs, advantages, torch.ones_like(log_probs, dtype=torch.bool))
        if config.entropy > 0:
            loss = loss - config.entropy * entropy(mean, log_deviation, generator)
        loss = loss + (values - returns).square().mean()
        optimizer.zero_grad()
        loss.backward()
        clip_gradients(policy, baseline, config.clip_norm)
        optimizer.step()
        watch(policy, steps)
    return policy


@torch.no_grad()
def whole_sessions(
    environment: ContinuousEnvironment[State],
    policy: TanhGaussianPolicy,
    n_sessions: int,
    gamma: float,
    generator: torch.Generator,
) -> tuple[Float[Tensor, "M S"], Float[Tensor, "M A"], Float[Tensor, " M"]]:
    """Observations, actions before tanh and returns of all steps of new users' sessions, each until it ends."""
    state = environment.reset(n_sessions, generator)
    alive = torch.arange(n_sessions, device=generator.device)
    observations, latents, users, rewards = [], [], [], []
    while len(alive):
        seen = environment.observe(state)
        latent = tanh_gaussian.draw(*policy.parameters_of(seen), generator)
        outcome, state = environment.step(state, latent.tanh(), generator)
        observations.append(seen)
        latents.append(latent)
        users.append(alive)
        rewards.append(outcome.rewards.new_zeros(n_sessions).index_copy(0, alive, outcome.rewards))
        stay = torch.nonzero(~outcome.ended)[:, 0]
        alive, state = alive[stay], state.select(stay)
    # Rewards past a session's end are 0, so one pass over the rectangle gives the returns of all.
    returns = discounted_returns(torch.stack(rewards, dim=1), gamma)
    step = torch.repeat_interleave(torch.tensor([len(rows) for rows in users], device=generator.device))
    return torch.cat(observations), torch.cat(latents), returns[torch.cat(users), step]
