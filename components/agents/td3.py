"""Twin delayed DDPG (Fujimoto et al., ICML 2018): DDPG whose critics do not believe what is too good.

    targets  ã = clip(μ⁻(s′) + clip(ε, −c, c), −1, 1),  ε ~ N(0, σ²)
             y = r + γ (1 − d) min(Q₁⁻(s′, ã), Q₂⁻(s′, ã))
    critics  minimise (Q₁(s, a) − y)² + (Q₂(s, a) − y)²
    every few updates only:
        actor    maximise Q₁(s, μ(s))
        targets  θ⁻ ← θ⁻ + τ (θ − θ⁻),  of critics and actor

over steps (s, a, r, s′, d) drawn from a replay, where d says that the session ended. Exploration is Gaussian noise.

Shape letters: B steps, S numbers of an observation, A of an action.
"""

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
from components.objectives.value_targets import smoothed_actions, soft_update, td_target
from components.policies.continuous_policy import Scaled, layers
from components.policies.deterministic_policy import DeterministicPolicy


class Td3Config(OffPolicyConfig):
    """TD3."""

    annealed: float = Field(
        default=0.5, ge=0, le=1, description="Share of the steps, the last ones, over which learning rates fall to 0."
    )
    exploration: float = Field(default=0.1, ge=0, description="Deviation of the noise on actions while learning.")
    delay: int = Field(default=2, ge=1, description="Updates of the critics for each of the actor and the targets.")
    smoothing: float = Field(default=0.2, ge=0, description="Deviation of the noise on the targets' actions.")
    smoothing_clip: float = Field(default=0.5, ge=0, description="Largest size of that noise.")


class Td3:
    """Actor, twin critics and their targets.

    Args:
        observation_scale: largest size of each number of an observation; its device is the agent's.
        action_size: A.
        config: of which schedule and replay are `learn`'s.
        seed: of initial weights and of all chance.
    """

    def __init__(self, observation_scale: Float[Tensor, " S"], action_size: int, config: Td3Config, seed: int) -> None:
        device, observation_size = observation_scale.device, len(observation_scale)
        weights = torch.Generator().manual_seed(seed)
        sizes = (observation_size, config.hidden, config.hidden, action_size)
        self._actor = layers(sizes, weights, norm=config.layer_norm).to(device)
        critics = TwinCritics(observation_size + action_size, config.hidden, config.layer_norm, weights)
        self._critics = critics.to(device)
        self._target_actor = deepcopy(self._actor).requires_grad_(False)
        self._target_critics = deepcopy(self._critics).requires_grad_(False)
        self._actor_parameters = list(self._actor.parameters())
        self._critic_parameters = list(self._critics.parameters())
        self._followers = [*self._target_actor.parameters(), *self._target_critics.parameters()]
        self._actor_optimizer = torch.optim.Adam(self._actor_parameters, lr=config.actor_rate, fused=True)
        self._critic_optimizer = torch.optim.Adam(self._critic_parameters, lr=config.critic_rate, fused=True)
        self.optimizers = (self._actor_optimizer, self._critic_optimizer)
        self._config = config
        self._scale = observation_scale if config.scale_observations else torch.ones_like(observation_scale)
        self._updates = 0
        self.policy = DeterministicPolicy(Scaled(self._actor, self._scale))
        self.chance = torch.Generator(device).manual_seed(int(torch.randint(2**62, (), generator=weights)))

    @torch.no_grad()
    def explore(self, observations: Float[Tensor, "B S"]) -> Float[Tensor, "B A"]:
        """The policy's actions with noise, clipped to the box."""
        actions = self.policy.mode(observations)
        noise = torch.randn(actions.shape, generator=self.chance, device=actions.device)
        return (actions + self._config.exploration * noise).clamp(-1.0, 1.0)

    def update(self, batch: Transitions) -> None:
        """One step of the critics; every few times one of the actor, and the targets follow."""
        config = self._config
        observations, next_observations = batch.observations / self._scale, batch.next_observations / self._scale

        with torch.no_grad():
            next_actions = self._target_actor(next_observations).tanh()
            next_actions = smoothed_actions(next_actions, config.smoothing, config.smoothing_clip, self.chance)
            next_values = torch.minimum(*self._target_critics(next_observations, next_actions))
            targets = td_target(batch.rewards, batch.ended, next_values, config.gamma)
        first, second = self._critics(observations, batch.actions)
        critic_loss = functional.mse_loss(first, targets) + functional.mse_loss(second, targets)
        self._critic_optimizer.zero_grad()
        critic_loss.backward()
        self._critic_optimizer.step()

        self._updates += 1
        if self._updates % config.delay:
            return
        actor_loss = -self._critics.first_of(observations, self._actor(observations).tanh()).mean()
        self._actor_optimizer.zero_grad()
        # Gradients of the critic's own weights would be thrown away.
        actor_loss.backward(inputs=self._actor_parameters)
        self._actor_optimizer.step()
        soft_update(self._followers, [*self._actor_parameters, *self._critic_parameters], config.tau)


def train_td3(
    environment: ContinuousEnvironment[State], config: Td3Config, seed: int, watch: Watch = unwatched
) -> DeterministicPolicy:
    """Learn a policy in an environment.

    Args:
        environment: on whose device all happens.
        config: the defaults are for Virtual Taobao, where no action matters later and γ is 0.
        seed: of the only sources of chance; the same one gives the same parameters.
        watch: told after each iteration.

    Raises:
        InputError: an iteration would do no update, or the replay cannot hold the steps of one.
    """
    agent = Td3(environment.observation_scale, environment.action_size, config, seed)
    learn(environment, agent, config, watch)
    return agent.policy
