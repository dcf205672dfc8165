"""Returns of sessions, per request and per position.

Shape letters: B sessions, T requests, K positions.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def discounted_returns(rewards: Float[Tensor, "B T"], gamma: float) -> Float[Tensor, "B T"]:
    """Return from each request on.

        G_t = r_t + γ G_{t+1},   G_T = 0

    With γ = 0 the returns are the rewards. Rewards past a session's end must be 0.
    """
    returns = []
    following = torch.zeros_like(rewards[:, 0])
    for step in reversed(range(rewards.shape[1])):
        following = rewards[:, step] + gamma * following
        returns.append(following)
    return torch.stack(returns[::-1], dim=1)


def position_returns(
    rewards: Float[Tensor, "B T K"], following: Float[Tensor, "B T"], gamma: float
) -> Float[Tensor, "B T K"]:
    """Reward-to-go of each position: what it and the positions below it earn, and all later requests.

        G_{t,k} = Σ_{j ≥ k} r_{t,j} + γ F_t

    with F_t what follows is worth: the return G_{t+1}, or an estimate V(s_{t+1}) of it. What the positions above earned
    does not depend on the item at k, so leaving it out keeps the policy gradient unbiased wherever responses at a
    position do not depend on the positions below it, and lowers its variance.
    """
    to_go = rewards.flip(2).cumsum(2).flip(2)
    return to_go + gamma * following[..., None]
