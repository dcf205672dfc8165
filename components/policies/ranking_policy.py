"""Policies that follow a session with a frozen encoder: one constant weight vector, or a learned scorer."""

from typing import Literal

import torch
from jaxtyping import Float, Int
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from components.interactions.batching import Requests, SessionBatch
from components.policies.request_features import RequestFeatures
from components.policies.session_encoder import EncoderShape, SessionEncoder
from components.policies.slate_policy import SessionState, SlatePolicy

#: No candidate falls further than this many nats behind the best: each keeps at least exp(−bound) / N of position 1,
#: the stated floor.
GAP_BOUND = 16.0


def bounded(utility: Float[Tensor, "B N"], requests: Requests) -> Float[Tensor, "B N"]:
    """Utilities below the best, u − max u, shrunk as a whole where its range exceeds the bound; -inf for padding.

    Shrinking gaps together keeps the order and the proportions of all candidates. A function that flattens out makes
    ties of the far ones, and the lower positions of a slate are drawn from those.
    """
    is_candidate = requests.candidates > 0
    best = torch.where(is_candidate, utility, -torch.inf).amax(1, keepdim=True)
    gap = torch.where(is_candidate, best - utility, 0.0)
    shrink = GAP_BOUND / gap.amax(1, keepdim=True).clamp(min=GAP_BOUND)
    return torch.where(is_candidate, -gap * shrink, -torch.inf)


class EncodedPolicy(SlatePolicy):
    """Base of policies whose state is the session encoder's."""

    def __init__(self, features: RequestFeatures, slate_size: int) -> None:
        super().__init__()
        self.features = features
        self.slate_size = slate_size

    def start(self, requests: Requests) -> SessionState:
        """The encoder's state at the first request."""
        return self.features.encoder.start(requests)

    def advance(
        self,
        state: SessionState,
        slates: Int[Tensor, "B K"],
        clicks: Float[Tensor, "B K"],
        purchases: Float[Tensor, "B K"],
        requests: Requests,
    ) -> SessionState:
        """The encoder's state at the next request."""
        return self.features.encoder.advance(state, slates, clicks, purchases, requests)

    def states(self, batch: SessionBatch) -> SessionState:
        """The encoder's state at every request."""
        return self.features.encoder.states(batch)


class RankingPolicy(EncodedPolicy):
    """u_i = ⟨w, φ_i⟩ with one constant weight vector, as tuned in industry."""

    weights: Tensor

    def __init__(self, features: RequestFeatures, slate_size: int) -> None:
        super().__init__(features, slate_size)
        self.register_buffer("weights", torch.zeros(features.width))

    def logits(self, state: SessionState, requests: Requests) -> Float[Tensor, "B N"]:
        """Bounded utilities."""
        return bounded(self.features(state, requests) @ self.weights, requests)


class Scorer(nn.Module):
    """Utility of each candidate from the state: u_i = ⟨w(s), φ_i⟩ + ⟨q(s), e_i⟩ + b_i, all zero before training."""

    def __init__(self, features: RequestFeatures, width: int = 64) -> None:
        super().__init__()
        shape = features.encoder.shape
        item_width = shape.config.item_width
        self.own_items = nn.Embedding(shape.n_indices, item_width, padding_idx=0)
        nn.init.normal_(self.own_items.weight.data[1:], std=0.1)
        self.trunk = nn.Sequential(
            nn.Linear(shape.config.hidden_width + shape.n_context, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh()
        )
        self.weights = nn.Linear(width, features.width)
        self.query = nn.Linear(width, 2 * item_width)
        self.bias = nn.Embedding(shape.n_indices, 1, padding_idx=0)
        for parameter in (self.weights.weight, self.weights.bias, self.query.weight, self.query.bias, self.bias.weight):
            nn.init.zeros_(parameter)

    def forward(
        self, features: RequestFeatures, phi: Float[Tensor, "B N P"], state: SessionState, requests: Requests
    ) -> Float[Tensor, "B N"]:
        """Unbounded utilities."""
        trunk = self.trunk(torch.cat([state.hidden, requests.context], dim=1))
        rows = features.encoder.id_rows[requests.candidates]
        vectors = torch.cat([features.encoder.item_vectors(requests.candidates), self.own_items(rows)], dim=2)
        utility = torch.einsum("bp,bnp->bn", self.weights(trunk), phi)
        utility = utility + torch.einsum("bd,bnd->bn", self.query(trunk), vectors)
        return utility + self.bias(rows)[..., 0]


class NeuralSlatePolicy(EncodedPolicy):
    """u = (1 − strength) · behavior's utility + strength · learned utility.

    At strength 0 this is the estimate of the logging policy, at 1 the policy as trained; between them lies, but for the
    bound on utilities, the geometric path π ∝ behavior^(1−α) · trained^α. On it the release is chosen so that the log
    can still judge it.
    """

    strength: Tensor

    def __init__(self, features: RequestFeatures, slate_size: int) -> None:
        super().__init__(features, slate_size)
        self.behavior = Scorer(features)
        self.learned = Scorer(features)
        self.register_buffer("strength", torch.ones(()))

    def start_at_behavior(self) -> None:
        """Let the learned utility be that of the logging policy, as far as it was estimated."""
        self.learned.load_state_dict(self.behavior.state_dict())

    @torch.no_grad()
    def start_at(self, weights: Float[Tensor, " P"]) -> None:
        """Let the untrained learned utility be that of one constant weight vector."""
        self.learned.weights.bias.copy_(weights)

    def logits(self, state: SessionState, requests: Requests) -> Float[Tensor, "B N"]:
        """Bounded utilities."""
        if self.strength == 0:
            return self.behavior_logits(state, requests)
        phi = self.features(state, requests)
        utility = self.strength * self.learned(self.features, phi, state, requests)
        if self.strength != 1:
            utility = utility + (1.0 - self.strength) * self.behavior(self.features, phi, state, requests)
        return bounded(utility, requests)

    def behavior_logits(self, state: SessionState, requests: Requests) -> Float[Tensor, "B N"]:
        """Utilities of the estimated logging policy."""
        return bounded(self.behavior(self.features, self.features(state, requests), state, requests), requests)


class PolicyShape(BaseModel):
    """Everything that is needed to build a policy before its weights are loaded."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["ranking", "neural"]
    slate_size: int = Field(ge=1)
    encoder: EncoderShape

    def build(self) -> RankingPolicy | NeuralSlatePolicy:
        """A policy of this shape; its weights are to be loaded."""
        features = RequestFeatures(SessionEncoder(self.encoder))
        return (
            RankingPolicy(features, self.slate_size)
            if self.kind == "ranking"
            else NeuralSlatePolicy(features, self.slate_size)
        )
