"""What critics of continuous actions are fitted to, and the networks that follow them slowly.

With Q a critic, Q⁻ its target network, d = 1 where the session ended with the step and 0 elsewhere:

    y = r + γ (1 − d) V(s′)                                                     Lillicrap et al., DDPG, 2016, eq. 5
    V(s′) = min(Q₁⁻(s′, ã), Q₂⁻(s′, ã)),
        ã = clip(μ⁻(s′) + clip(ε, −c, c), −1, 1),  ε ~ N(0, σ²)                 Fujimoto et al., TD3, 2018, algorithm 1
    V(s′) = min(Q₁⁻(s′, a′), Q₂⁻(s′, a′)) − α log π(a′ | s′),  a′ ~ π(· | s′)   Haarnoja et al., SAC, 2018b, eq. 3 and 5

No gradient flows through targets: call these where none is recorded.

Shape letters: B steps, A numbers of an action.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def td_target(
    rewards: Float[Tensor, " B"], ended: Bool[Tensor, " B"], next_values: Float[Tensor, " B"], gamma: float
) -> Float[Tensor, " B"]:
    """One-step target: r + γ V(s′), and r alone where the session ended. With γ = 0 it is the rewards."""
    return rewards + gamma * next_values.masked_fill(ended, 0.0)


def smoothed_actions(
    actions: Float[Tensor, "B A"], deviation: float, clip: float, generator: torch.Generator
) -> Float[Tensor, "B A"]:
    """TD3's ã: the target policy's actions, each number moved by a Gaussian step of at most `clip`, within the box."""
    noise = torch.randn(actions.shape, generator=generator, device=actions.device)
    return (actions + (deviation * noise).clamp_(-clip, clip)).clamp_(-1.0, 1.0)


def soft_value(
    first: Float[Tensor, " B"],
    second: Float[Tensor, " B"],
    log_probs: Float[Tensor, " B"],
    temperature: Float[Tensor, ""],
) -> Float[Tensor, " B"]:
    """SAC's V: min(Q₁, Q₂) − α log π. At α = 0 it is the minimum of the twins, as TD3 has it."""
    return torch.minimum(first, second) - temperature * log_probs


def temperature_loss(
    log_temperature: Float[Tensor, ""], log_probs: Float[Tensor, " B"], target_entropy: float
) -> Float[Tensor, ""]:
    """SAC's loss of the temperature: −log α · mean(log π + H), no gradient flows into log π.

    The gradient with respect to log α is −mean(log π) − H, the entropy less its target: a policy whose entropy is above
    the target lowers the temperature. (Haarnoja et al., 2018b, eq. 18 has α before the mean; their code has log α.)
    """
    return -log_temperature * (log_probs.detach().mean() + target_entropy)


@torch.no_grad()
def soft_update(targets: Sequence[Tensor], sources: Sequence[Tensor], tau: float) -> None:
    """Move target parameters towards the learned ones, in place: θ⁻ ← θ⁻ + τ (θ − θ⁻) (Polyak averaging)."""
    torch._foreach_lerp_(list(targets), list(sources), tau)
