"""What a log of actions lets one expect of an action: the model that DR mends.

    q(s, a) = E[r | s, a]  by least squares, a network with two hidden layers
    v(s)    = 1/J Σ_j q(s, a_j),    a_j ~ π(· | s)

Two networks, each fitted to one half of the users and asked of the other: q must not have been fitted to what it is
mended by (cross-fitting, Chernozhukov et al. 2018).

Shape letters: M requests, S numbers of an observation, A of an action.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from components.evaluation.doubly_robust import ModelRewards
from components.interactions.continuous_batches import LoggedActions, observation_scale, read_actions
from components.interactions.log_folder import Log
from components.policies.continuous_policy import layers

HIDDEN, BATCH, RATE, PASSES = 64, 1_024, 2e-3, 3
#: Actions of the target policy that v averages over, J.
N_SAMPLES = 4


@dataclass(frozen=True)
class ActionRewards:
    """Two networks; users with an even code are asked of the second, which learned from the others."""

    networks: tuple[nn.Module, nn.Module]
    scale: Float[Tensor, " S"]
    """Largest size of each number of an observation in the log, or 1."""

    @torch.no_grad()
    def of(self, part: LoggedActions, drawn: Float[Tensor, "D M A"]) -> ModelRewards:
        """What is expected of the logged actions, and of D draws of a policy at each request."""
        target = torch.stack([self._expect(part, actions.float()) for actions in drawn]).mean(0)
        return ModelRewards(self._expect(part, part.actions).numpy(), target.numpy())

    def _expect(self, part: LoggedActions, actions: Float[Tensor, "M A"]) -> Float[Tensor, " M"]:
        inputs = torch.cat([part.observations / self.scale, actions], dim=1)
        first, second = (network(inputs)[:, 0] for network in self.networks)
        return torch.where(part.users % 2 == 0, second, first).double()


def fit_action_rewards(log: Log, seed: int) -> ActionRewards:
    """Fit both networks, part by part."""
    scale = observation_scale(log)
    generator = torch.Generator().manual_seed(seed)
    size = len(scale) + log.manifest.action_size
    networks = tuple(layers((size, HIDDEN, HIDDEN, 1), generator) for _ in range(2))
    optimizers = [torch.optim.Adam(network.parameters(), lr=RATE) for network in networks]
    for _ in range(PASSES):
        for part in read_actions(log):
            for half, (network, optimizer) in enumerate(zip(networks, optimizers, strict=True)):
                rows = part.select(part.reward_known & (part.users % 2 == half))
                order = torch.randperm(len(rows.rewards), generator=generator)
                for chosen in order.split(BATCH):
                    inputs = torch.cat([rows.observations[chosen] / scale, rows.actions[chosen]], dim=1)
                    loss = functional.mse_loss(network(inputs)[:, 0], rows.rewards[chosen].float())
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
    return ActionRewards((networks[0].eval(), networks[1].eval()), scale)
