"""Deep deterministic policy gradient (Lillicrap et al., ICLR 2016): a policy climbs what a critic says of its actions.

    critic   minimise (Q(s, a) − y)²,   y = r + γ (1 − d) Q⁻(s′, μ⁻(s′))
    actor    maximise Q(s, μ(s))
    targets  θ⁻ ← θ⁻ + τ (θ − θ⁻),  of critic and actor

over steps (s, a, r, s′, d) drawn from a replay, where d says that the session ended. Exploration is Gaussian noise.
Output layers start at a tenth of their usual size, so that actions begin near the middle of the box; with LayerNorm its
gains start uniform in (0, 1), as in the agent that is published with Virtual Taobao.

Shape letters: B steps, S numbers of an observation, A of an action.
"""

from copy import deepcopy

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from components.agents.off_policy import OffPolicyConfig, learn
from components.agents.watch import Watch, unwatched
from components.environments.continuous import ContinuousEnvironment, State, Transitions
from components.objectives.value_targets import soft_update, td_target
from components.policies.continuous_policy import Scaled, layers
from components.policies.deterministic_policy import DeterministicPolicy


class DdpgConfig(OffPolicyConfig):
    """DDPG."""

    layer_norm: bool = Field(default=True, description="Whether hidden layers are normalised before their activation.")
    exploration: float = Field(default=0.2, ge=0, description="Deviation of the noise on actions while learning.")


#: As published with Virtual Taobao: `main.py` and `ddpg.py` of github.com/eyounx/VirtualTaobao (virtualTB/
#: ReinforcementLearning), which run 1,000 sessions of 7.8 steps in the mean. What differs: there no step is twice in a
#: batch, and the deviation of LayerNorm divides by n − 1.
PUBLISHED = DdpgConfig(
    steps=7_800,
    sessions=1,
    random_steps=0,
    updates_per_step=5,
    batch=128,
    replay=1_000_000,
    hidden=128,
    layer_norm=True,
    scale_observations=False,
    actor_rate=1e-4,
    critic_rate=1e-3,
    gamma=0.95,
    tau=0.001,
    exploration=0,
)


class Critic(nn.Module):
    """Q(s, a); actions join at the second layer, as in the paper's section 7."""

    def __init__(
        self, observation_size: int, action_size: int, hidden: int, layer_norm: bool, generator: torch.Generator
    ) -> None:
        super().__init__()
        first = layers((observation_size, hidden), generator)
        self.of_observations = nn.Sequential(*first, *([nn.LayerNorm(hidden)] if layer_norm else []), nn.ReLU())
        self.of_both = layers((hidden + action_size, hidden, 1), generator, norm=layer_norm)

    def forward(self, observations: Float[Tensor, "B S"], actions: Float[Tensor, "B A"]) -> Float[Tensor, " B"]:
        """Values of actions."""
        return self.of_both(torch.cat([self.of_observations(observations), actions], dim=1))[:, 0]


class Ddpg:
    """Actor, critic and their targets.

    Args:
        observation_scale: largest size of each number of an observation; its device is the agent's.
        action_size: A.
        config: of which schedule and replay are `learn`'s.
        seed: of initial weights and of all chance.
    """

    def __init__(self, observation_scale: Float[Tensor, " S"], action_size: int, config: DdpgConfig, seed: int) -> None:
        device, observation_size = observation_scale.device, len(observation_scale)
        weights = torch.Generator().manual_seed(seed)
        actor = layers((observation_size, config.hidden, config.hidden, action_size), weights, norm=config.layer_norm)
        critic = Critic(observation_size, action_size, config.hidden, config.layer_norm, weights)
        _start(actor, actor[-1], weights)
        _start(critic, critic.of_both[-1], weights)
        self._actor, self._critic = actor.to(device), critic.to(device)
        self._target_actor = deepcopy(self._actor).requires_grad_(False)
        self._target_critic = deepcopy(self._critic).requires_grad_(False)
        self._actor_parameters, self._critic_parameters = list(actor.parameters()), list(critic.parameters())
        self._followers = [*self._target_actor.parameters(), *self._target_critic.parameters()]
        self._actor_optimizer = torch.optim.Adam(self._actor_parameters, lr=config.actor_rate, fused=True)
        self._critic_optimizer = torch.optim.Adam(self._critic_parameters, lr=config.critic_rate, fused=True)
        self.optimizers = (self._actor_optimizer, self._critic_optimizer)
        self._config = config
        self._scale = observation_scale if config.scale_observations else torch.ones_like(observation_scale)
        self.policy = DeterministicPolicy(Scaled(self._actor, self._scale))
        self.chance = torch.Generator(device).manual_seed(int(torch.randint(2**62, (), generator=weights)))

    @torch.no_grad()
    def explore(self, observations: Float[Tensor, "B S"]) -> Float[Tensor, "B A"]:
        """The policy's actions with noise, clipped to the box."""
        actions = self.policy.mode(observations)
        noise = torch.randn(actions.shape, generator=self.chance, device=actions.device)
        return (actions + self._config.exploration * noise).clamp(-1.0, 1.0)

    def update(self, batch: Transitions) -> None:
        """One step of the critic, one of the actor, and the targets follow."""
        observations, next_observations = batch.observations / self._scale, batch.next_observations / self._scale

        with torch.no_grad():
            next_values = self._target_critic(next_observations, self._target_actor(next_observations).tanh())
            targets = td_target(batch.rewards, batch.ended, next_values, self._config.gamma)
        critic_loss = functional.mse_loss(self._critic(observations, batch.actions), targets)
        self._critic_optimizer.zero_grad()
        critic_loss.backward()
        self._critic_optimizer.step()

        actor_loss = -self._critic(observations, self._actor(observations).tanh()).mean()
        self._actor_optimizer.zero_grad()
        # Gradients of the critic's own weights would be thrown away.
        actor_loss.backward(inputs=self._actor_parameters)
        self._actor_optimizer.step()

        soft_update(self._followers, [*self._actor_parameters, *self._critic_parameters], self._config.tau)


@torch.no_grad()
def _start(network: nn.Module, output: nn.Module, generator: torch.Generator) -> None:
    for parameter in output.parameters():
        parameter.mul_(0.1)
    for module in network.modules():
        if isinstance(module, nn.LayerNorm):
            module.weight.uniform_(generator=generator)


def train_ddpg(
    environment: ContinuousEnvironment[State], config: DdpgConfig, seed: int, watch: Watch = unwatched
) -> DeterministicPolicy:
    """Learn a policy in an environment.

    Args:
        environment: on whose device all happens.
        config: the defaults are for Virtual Taobao, where no action matters later and γ is 0; `PUBLISHED` is the
            setting published with it.
        seed: of the only sources of chance; the same one gives the same parameters.
        watch: told after each iteration.

    Raises:
        InputError: an iteration would do no update, or the replay cannot hold the steps of one.
    """
    agent = Ddpg(environment.observation_scale, environment.action_size, config, seed)
    learn(environment, agent, config, watch)
    return agent.policy
