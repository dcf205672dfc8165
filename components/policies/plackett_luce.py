"""The Plackett-Luce distribution over ordered slates.

Positions are filled in order, each by a softmax over the candidates that are left:

    π(a₁ … a_K) = Π_k exp(u_{a_k}) / Σ_{j not in a₁ … a_{k-1}} exp(u_j)

Sorting u + Gumbel noise and keeping the first K samples from exactly this distribution (Kool, van Hoof and Welling
2019).
Shape letters: B requests, N candidates, K positions.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from components.interactions.vocabulary import UNKNOWN

#: Utility of what is not there: finite, so that no gradient meets inf - inf, and beyond all utilities that are.
NOTHING = -1e30


def sample(logits: Float[Tensor, "B N"], slate_size: int, generator: torch.Generator) -> Int[Tensor, "B K"]:
    """Candidates of an ordered slate, as places in the candidate list; -1 where fewer than K candidates exist.

    Args:
        logits: utilities u; -inf marks padding.
        slate_size: positions K to fill.
        generator: source of the Gumbel noise.
    """
    uniform = torch.rand(logits.shape, generator=generator, device=logits.device)
    gumbel = -torch.log(-torch.log(uniform.clamp(1e-20, 1.0 - 1e-7)))
    top = (logits + gumbel).topk(min(slate_size, logits.shape[1]), dim=1)
    places = torch.where(torch.isfinite(top.values), top.indices, -1)
    missing = slate_size - places.shape[1]
    return torch.nn.functional.pad(places, (0, missing), value=-1) if missing else places


def log_prob(logits: Float[Tensor, "B N"], places: Int[Tensor, "B K"]) -> Float[Tensor, "B K"]:
    """Log-probability of each position's item given the positions above it; its sum over K is the slate's.

    The candidates that are left at a position are those of the positions from it on and those that are never shown, so
    one pass over the candidates and one over the slate give every normaliser; nothing is subtracted.

    Positions with place -1 hold nothing and count 0. A slate that repeats a candidate has -inf.
    """
    filled, index = places >= 0, places.clamp(min=0)
    repeated = (places[:, :, None] == places[:, None, :]).tril(-1).any(2)
    possible = torch.isfinite(logits).gather(1, index) & ~repeated
    utility = logits.clamp(min=NOTHING)
    chosen = torch.where(filled & possible, utility.gather(1, index), NOTHING)
    # One column more takes in the positions that hold nothing.
    shown = torch.zeros(len(logits), logits.shape[1] + 1, dtype=torch.bool, device=logits.device)
    shown = shown.scatter(1, torch.where(filled, places, logits.shape[1]), True)[:, :-1]
    never_shown = utility.masked_fill(shown, NOTHING).logsumexp(1, keepdim=True)
    from_here_on = chosen.flip(1).logcumsumexp(1).flip(1)
    log_probs = chosen - torch.logaddexp(never_shown, from_here_on)
    return torch.where(filled, torch.where(possible, log_probs, -torch.inf), 0.0)


def entropy(logits: Float[Tensor, "B N"]) -> Float[Tensor, " B"]:
    """Entropy in nats of the first position, -Σ p log p; the later positions follow from the same utilities."""
    log_p = logits.log_softmax(1)
    return -(log_p.exp() * torch.where(torch.isfinite(log_p), log_p, 0.0)).sum(1)


def divergence(logits: Float[Tensor, "B N"], reference: Float[Tensor, "B N"]) -> Float[Tensor, " B"]:
    """Rényi divergence of order 2 of the first position in nats: log Σ π² / reference.

    The second moment of importance weights is exp of it, so a log of n requests that the reference wrote has about
    n · exp(−divergence) effective requests for π, position by position.
    """
    return (2.0 * logits.log_softmax(1) - reference.log_softmax(1)).nan_to_num(nan=-torch.inf).logsumexp(1)


def places_of(slates: Int[Tensor, "B K"], candidates: Int[Tensor, "B N"]) -> Int[Tensor, "B K"]:
    """Place of each slate item among the candidates; -1 for padding.

    Items that the vocabulary does not know have one index together: the first of them on a slate takes the first place
    of such a candidate, the second the next.

    Raises:
        ValueError: a slate holds an item that is no candidate: no policy over these candidates could have shown it.
    """
    same: Bool[Tensor, "B K N"] = slates[:, :, None] == candidates[:, None, :]
    filled = slates != 0
    unknown = slates == UNKNOWN
    if bool((unknown.sum(1) > 1).any()):
        same = same & (~unknown[:, :, None] | (same.cumsum(2) == unknown.cumsum(1)[:, :, None]))
    if not bool((same.any(2) | ~filled).all()):
        row, position = torch.nonzero(filled & ~same.any(2))[0].tolist()
        raise ValueError(f"request {row}, position {position}: item {int(slates[row, position])} is not a candidate")
    return torch.where(filled, same.to(torch.int8).argmax(2), -1)
