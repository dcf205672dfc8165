"""Policy-gradient losses and importance weights shared by the agents."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def policy_gradient_loss(
    log_probs: Float[Tensor, "*B"], advantages: Float[Tensor, "*B"], mask: Bool[Tensor, "*B"]
) -> Float[Tensor, ""]:
    """Mean over the mask of −log π(a) · A (Williams 1992); no gradient flows into the advantages.

    An empty mask gives 0.
    """
    losses = -torch.where(mask, log_probs, 0.0) * advantages.detach() * mask
    return losses.sum() / mask.sum().clamp(min=1)


def capped_weights(
    target_log_probs: Float[Tensor, "*B"], behavior_log_probs: Float[Tensor, "*B"], cap: float
) -> Float[Tensor, "*B"]:
    """min(π(a) / b(a), cap), without gradient: one-request weights of logged actions. At cap = ∞ they are unbiased."""
    log_ratio = (target_log_probs - behavior_log_probs).detach()
    return log_ratio.clamp(max=torch.tensor(cap).log().item()).exp()


def clipped_surrogate_loss(
    log_probs: Float[Tensor, " M"],
    behavior_log_probs: Float[Tensor, " M"],
    advantages: Float[Tensor, " M"],
    clip: float,
) -> Float[Tensor, ""]:
    """Minus the clipped surrogate objective (Schulman et al., PPO, 2017, eq. 7), a mean over M actions.

        L = −mean min(ρ A, clamp(ρ, 1 − ε, 1 + ε) A),   ρ = π(a) / b(a)

    An action whose ratio has gone further than the clip to the better side (up where A > 0, down where A < 0) has no
    gradient; one that has gone to the worse side keeps its own, ρ A ∇log π. At ρ = 1 the gradient is that of
    −mean A log π. No gradient flows into the advantages.

    Args:
        log_probs: of the policy that learns, log π(a).
        behavior_log_probs: of the policy that acted, log b(a).
        advantages: A of each action.
        clip: ε.
    """
    ratio = (log_probs - behavior_log_probs).exp()
    advantages = advantages.detach()
    return -torch.minimum(ratio * advantages, ratio.clamp(1.0 - clip, 1.0 + clip) * advantages).mean()


def divergence_from_behavior(
    log_probs: Float[Tensor, " M"], behavior_log_probs: Float[Tensor, " M"]
) -> Float[Tensor, ""]:
    """An estimate of KL(b ‖ π) from M actions of b, never negative: mean (ρ − 1 − log ρ), ρ = π(a) / b(a).

    Unbiased, as E_b[ρ] = 1, and less noisy than mean −log ρ (Schulman, Approximating KL divergence, 2020).
    """
    log_ratio = log_probs - behavior_log_probs
    return (log_ratio.expm1() - log_ratio).mean()
