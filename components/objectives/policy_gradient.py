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
