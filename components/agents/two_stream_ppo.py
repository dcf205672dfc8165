"""PPO whose networks see what never changes in a session and what does through two streams, updated at two speeds.

    h = W [f(static), g(dynamic)] + b;   g, W and b improve in every update, f in every n-th only

Published (the report on Virtual Taobao's "improved PPO", CTR about 1.0 after 5,000 iterations): two streams of
3 x 128 units, one for the 88 static and one for the 3 dynamic numbers of an observation, joined by one layer; the
dynamic stream is updated 100 times as often as the static one. It says no more. Our reading: policy and critic have two
streams each; an update is one minibatch; the joining layer and the deviation go with the dynamic stream; the static
stream steps in every 100th update by that update's gradient; tanh between layers; the rest is PPO (`ppo.py`).

Shape letters: M observations, S numbers of an observation.
"""

from collections.abc import Sequence
from itertools import count

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from components.agents import ppo
from components.agents.on_policy import start_alike
from components.agents.ppo import PpoConfig, learn
from components.agents.watch import Watch, unwatched
from components.environments.continuous import ContinuousEnvironment, State
from components.errors import InputError
from components.policies.continuous_policy import Scaled, TanhGaussianPolicy, layers


class TwoStreamPpoConfig(PpoConfig):
    """PPO with a static and a dynamic stream."""

    static_size: int = Field(
        default=88, ge=1, description="How many numbers of an observation, its first ones, a session never changes."
    )
    static_every: int = Field(default=10, ge=1, description="Updates of the dynamic stream for one of the static.")
    hidden: tuple[int, ...] = Field(
        default=(128, 128, 128), min_length=1, description="Units of the layers of each stream."
    )


#: The published streams at our reading of their updates, on PPO's own published settings.
PUBLISHED = TwoStreamPpoConfig(
    **{**ppo.PUBLISHED.model_dump(), "hidden": (128, 128, 128), "static_size": 88, "static_every": 100}
)


class TwoStreams(nn.Module):
    """Two networks, of the first numbers and of the others, joined by one layer."""

    def __init__(self, static_size: int, size: int, hidden: Sequence[int], n_outputs: int, chance: torch.Generator):
        super().__init__()
        self.sizes = (static_size, size - static_size)
        self.static, self.dynamic = (
            nn.Sequential(layers((inward, *hidden), chance, activation=nn.Tanh), nn.Tanh()) for inward in self.sizes
        )
        self.join = layers((2 * hidden[-1], n_outputs), chance)

    def forward(self, observations: Float[Tensor, "M S"]) -> Float[Tensor, "M O"]:
        """Outputs of the joining layer."""
        static, dynamic = observations.split(self.sizes, dim=1)
        return self.join(torch.cat([self.static(static), self.dynamic(dynamic)], dim=1))


def train_two_stream_ppo(
    environment: ContinuousEnvironment[State], config: TwoStreamPpoConfig, seed: int, watch: Watch = unwatched
) -> TanhGaussianPolicy:
    """Learn a policy by PPO with two streams.

    Args:
        environment: where sessions run; the first numbers of its observations are those that stay.
        config: sizes and step sizes.
        seed: of all chance.
        watch: told of the policy after each iteration.

    Raises:
        InputError: there are no dynamic numbers.
    """
    size, scale = environment.observation_size, environment.observation_scale
    if config.static_size >= size:
        raise InputError(
            f"two_stream_ppo.static_size = {config.static_size}: expected 1 to {size - 1}, as observations have {size} "
            "numbers; without dynamic ones use ppo"
        )
    chance = torch.Generator().manual_seed(seed)
    actor, critic = (
        TwoStreams(config.static_size, size, config.hidden, n_outputs, chance).to(scale.device)
        for n_outputs in (environment.action_size, 1)
    )
    start_alike(actor)
    policy = TanhGaussianPolicy(Scaled(actor, scale), environment.action_size, config.log_deviation).to(scale.device)
    updates = count(1)

    def begin_update() -> None:
        due = next(updates) % config.static_every == 0
        # Without a gradient the optimiser leaves parameters and their moments alone, and no time is spent on it.
        for network in (actor, critic):
            network.static.requires_grad_(due)

    learn(environment, policy, Scaled(critic, scale), config, seed, watch, begin_update)
    policy.requires_grad_(True)
    return policy
