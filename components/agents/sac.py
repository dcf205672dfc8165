"""Soft actor-critic (Haarnoja et al., "Soft Actor-Critic Algorithms and Applications", 2018b): rewards and entropy.

    targets      a′ ~ π(· | s′);   y = r + γ (1 − d) (min(Q₁⁻(s′, a′), Q₂⁻(s′, a′)) − α log π(a′ | s′))
    critics      minimise (Q₁(s, a) − y)² + (Q₂(s, a) − y)²
    actor        a ~ π(· | s);   minimise α log π(a | s) − min(Q₁(s, a), Q₂(s, a))
    temperature  log α falls by a step along −log π(a | s) − H: the entropy is held at its target H
    followers    θ⁻ ← θ⁻ + τ (θ − θ⁻),  of the critics

over steps (s, a, r, s′, d) drawn from a replay, where d says that the session ended. π is a Gaussian squashed by tanh,
whose mean and deviation the actor says; it explores by itself.

Shape letters: B steps, S numbers of an observation, A of an action.
"""

import math
from copy import deepcopy

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from components.agents.off_policy import OffPolicyConfig, learn
from components.agents.twin_critics import TwinCritics
from components.agents.watch import Watch, unwatched
from components.environments.continuous import ContinuousEnvironment, State, Transitions
from components.objectives.value_targets import soft_update, soft_value, td_target, temperature_loss
from components.policies.continuous_policy import Scaled, TanhGaussianPolicy, layers


class SacConfig(OffPolicyConfig):
    """SAC."""

    actor_rate: float = Field(default=1e-3, gt=0, description="Adam's learning rate of the actor.")
    critic_rate: float = Field(default=2e-3, gt=0, description="Adam's learning rate of the critics.")
    temperature_rate: float = Field(default=3e-3, ge=0, description="Adam's learning rate of log α; 0 holds α.")
    temperature: float = Field(default=0.2, gt=0, description="α at first, in reward for each nat.")
    target_entropy: float | None = Field(default=None, description="H in nats; without it −A of A numbers.")


class Sac:
    """Actor, twin critics, their targets and the temperature.

    Args:
        observation_scale: largest size of each number of an observation; its device is the agent's.
        action_size: A.
        config: of which schedule and replay are `learn`'s.
        seed: of initial weights and of all chance.
    """

    def __init__(self, observation_scale: Float[Tensor, " S"], action_size: int, config: SacConfig, seed: int) -> None:
        device, observation_size = observation_scale.device, len(observation_scale)
        weights = torch.Generator().manual_seed(seed)
        sizes = (observation_size, config.hidden, config.hidden, 2 * action_size)
        actor = layers(sizes, weights, norm=config.layer_norm).to(device)
        critics = TwinCritics(observation_size + action_size, config.hidden, config.layer_norm, weights)
        self._critics = critics.to(device)
        self._target_critics = deepcopy(self._critics).requires_grad_(False)
        self._log_temperature = torch.tensor(math.log(config.temperature), device=device, requires_grad=True)
        self._target_entropy = -float(action_size) if config.target_entropy is None else config.target_entropy
        self._actor_parameters = list(actor.parameters())
        self._critic_parameters = list(self._critics.parameters())
        self._followers = list(self._target_critics.parameters())
        self._actor_optimizer = torch.optim.Adam(self._actor_parameters, lr=config.actor_rate, fused=True)
        self._critic_optimizer = torch.optim.Adam(self._critic_parameters, lr=config.critic_rate, fused=True)
        self._temperature_optimizer = torch.optim.Adam([self._log_temperature], lr=config.temperature_rate, fused=True)
        self.optimizers = (self._actor_optimizer, self._critic_optimizer, self._temperature_optimizer)
        self._config = config
        self._scale = observation_scale if config.scale_observations else torch.ones_like(observation_scale)
        #: Of scaled observations; `policy` is the same of observations as they are.
        self._scaled_policy = TanhGaussianPolicy(actor, action_size)
        self.policy = TanhGaussianPolicy(Scaled(actor, self._scale), action_size).to(device)
        self.chance = torch.Generator(device).manual_seed(int(torch.randint(2**62, (), generator=weights)))

    @property
    def temperature(self) -> Float[Tensor, ""]:
        """α."""
        return self._log_temperature.detach().exp()

    @torch.no_grad()
    def explore(self, observations: Float[Tensor, "B S"]) -> Float[Tensor, "B A"]:
        """Actions that the policy draws."""
        return self.policy.act(observations, self.chance).actions

    def update(self, batch: Transitions) -> None:
        """One step of critics, actor and temperature, and the targets follow."""
        observations, next_observations = batch.observations / self._scale, batch.next_observations / self._scale
        temperature = self.temperature

        with torch.no_grad():
            following = self._scaled_policy.act(next_observations, self.chance)
            first, second = self._target_critics(next_observations, following.actions)
            next_values = soft_value(first, second, following.log_probs, temperature)
            targets = td_target(batch.rewards, batch.ended, next_values, self._config.gamma)
        first, second = self._critics(observations, batch.actions)
        critic_loss = functional.mse_loss(first, targets) + functional.mse_loss(second, targets)
        self._critic_optimizer.zero_grad()
        critic_loss.backward()
        self._critic_optimizer.step()

        choice = self._scaled_policy.act(observations, self.chance)
        first, second = self._critics(observations, choice.actions)
        actor_loss = -soft_value(first, second, choice.log_probs, temperature).mean()
        self._actor_optimizer.zero_grad()
        # Gradients of the critics' own weights would be thrown away.
        actor_loss.backward(inputs=self._actor_parameters)
        self._actor_optimizer.step()

        self._temperature_optimizer.zero_grad()
        temperature_loss(self._log_temperature, choice.log_probs, self._target_entropy).backward()
        self._temperature_optimizer.step()

        soft_update(self._followers, self._critic_parameters, self._config.tau)


def train_sac(
    environment: ContinuousEnvironment[State], config: SacConfig, seed: int, watch: Watch = unwatched
) -> TanhGaussianPolicy:
    """Learn a policy in an environment.

    Args:
        environment: on whose device all happens.
        config: the defaults are for Virtual Taobao, where no action matters later and γ is 0.
        seed: of the only sources of chance; the same one gives the same parameters.
        watch: told after each iteration.

    Raises:
        InputError: an iteration would do no update, or the replay cannot hold the steps of one.
    """
    agent = Sac(environment.observation_scale, environment.action_size, config, seed)
    learn(environment, agent, config, watch)
    return agent.policy
