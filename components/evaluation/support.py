"""How far a policy's slates lie outside what a log shows: there a world model is free to say anything.

    divergence     D₂ = log(n Σ w² / (Σ w)²) = −log(ESS / n),    w = π(slate_i | i) / β(slate_i | i)
    outside share  1/n Σ_i Σ_a π(a | i) · 1[β(a | i) < φ / N_i],    φ = 0.1

over logged requests i with N_i candidates each. The first is the Rényi divergence of order 2 of the target policy
π from the logging policy β, as the one-request estimate's weights give it: those of whole slates, whichever ratio it
uses. But weights are those of slates that were shown: of items that the log never shows they know nothing. The second
looks at them: the share of the policy's first items that the logging policy shows there less often than a tenth of
chance. The log holds the probability of what was shown alone, so β of the other candidates is that of the fitted
logging policy.
"""

import math
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from components.evaluation.weights import EffectiveSize
from components.interactions.batching import Sessions
from components.policies.slate_policy import SlatePolicy

BATCH_SESSIONS = 1_024
#: φ: an item that is shown first less often than this times chance is one that the log hardly shows.
SUPPORT_FLOOR = 0.1


class SupportDistance(BaseModel):
    """How far a policy lies from what a log shows."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    policy: str
    divergence: float = Field(
        description="Rényi divergence of order 2 from the logging policy, −log(ESS / n), in nats."
    )
    outside_share: float = Field(
        ge=0,
        le=1,
        description="Share of its first items that the logging policy shows less often than a tenth of chance; or of "
        "its actions that lie farther out than 99 of 100 logged ones.",
    )
    of: Literal["first items", "actions"] = Field(default="first items", description="What the share is of.")

    @property
    def text(self) -> str:
        """The distance in a sentence, without a full stop."""
        outside = (
            f"the log hardly shows {self.outside_share:.1%} of its first items"
            if self.of == "first items"
            else f"{self.outside_share:.1%} of its actions lie farther out than 99 of 100 logged ones"
        )
        return f"{self.policy} lies {self.divergence:.2f} nats from the logging policy, and {outside}"


def support_distance(
    name: str, effective: EffectiveSize, policy: SlatePolicy, logging: SlatePolicy, sessions: Sessions
) -> SupportDistance:
    """Support distance of a policy on a log.

    Args:
        name: of the policy.
        effective: of the policy's one-request estimate on the log.
        policy: the one that is judged.
        logging: the fitted logging policy.
        sessions: of the log, or a sample of them.
    """
    return SupportDistance(
        policy=name,
        divergence=math.log(effective.n / effective.of_positions[-1]),
        outside_share=outside_share(policy, logging, sessions),
    )


@torch.inference_mode()
def outside_share(policy: SlatePolicy, logging: SlatePolicy, sessions: Sessions) -> float:
    """Share of a policy's first items that the logging policy hardly shows."""
    outside, n = 0.0, 0
    for batch in sessions.batches(BATCH_SESSIONS):
        flat = batch.mask.flatten()
        requests = batch.requests().select(flat)
        target, behavior = (
            judged.logits(judged.states(batch).select(flat), requests).softmax(1) for judged in (policy, logging)
        )
        chance = 1.0 / (requests.candidates > 0).sum(1, keepdim=True)
        outside += float((target * (behavior < SUPPORT_FLOOR * chance)).sum())
        n += len(target)
    return min(outside / max(n, 1), 1.0)
