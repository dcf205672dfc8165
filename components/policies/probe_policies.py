"""Policies that nobody would serve: they ask a world model what it says of slates that the log hardly shows."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from components.interactions.batching import Requests, SessionBatch
from components.policies.slate_policy import MemorylessPolicy, SessionState, SlatePolicy


class ConstantPolicy(MemorylessPolicy):
    """One utility for each item, whoever asks: scores standardised over the items, `sharpness` nats for a deviation."""

    utilities: Tensor

    def __init__(
        self, slate_size: int, scores: Float[Tensor, " V"], known: Float[Tensor, " V"], sharpness: float = 1.0
    ) -> None:
        """Rank by `scores`; items that are not `known` (0) get the mean."""
        super().__init__()
        self.slate_size = slate_size
        spread, mean = torch.std_mean(scores[known > 0], correction=0)
        utilities = sharpness * (scores - mean) / spread.clamp(min=1e-12)
        self.register_buffer("utilities", torch.where(known > 0, utilities, 0.0))

    def logits(self, state: SessionState, requests: Requests) -> Float[Tensor, "B N"]:
        """The items' utilities."""
        return torch.where(requests.candidates > 0, self.utilities[requests.candidates], -torch.inf)


class InvertedPolicy(SlatePolicy):
    """Prefers what another policy avoids: its utilities with the sign turned."""

    def __init__(self, policy: SlatePolicy) -> None:
        super().__init__()
        self.policy = policy
        self.slate_size = policy.slate_size

    def start(self, requests: Requests) -> SessionState:
        """The other policy's state."""
        return self.policy.start(requests)

    def advance(
        self,
        state: SessionState,
        slates: Int[Tensor, "B K"],
        clicks: Float[Tensor, "B K"],
        purchases: Float[Tensor, "B K"],
        requests: Requests,
    ) -> SessionState:
        """The other policy's next state."""
        return self.policy.advance(state, slates, clicks, purchases, requests)

    def states(self, batch: SessionBatch) -> SessionState:
        """The other policy's states."""
        return self.policy.states(batch)

    def logits(self, state: SessionState, requests: Requests) -> Float[Tensor, "B N"]:
        """−u of every candidate."""
        return torch.where(requests.candidates > 0, -self.policy.logits(state, requests), -torch.inf)
