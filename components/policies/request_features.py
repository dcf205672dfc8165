"""φ(observation, candidate): what ranking weights weigh. Each is derivable from any log.

The user model's click and purchase logits, log popularity, what the session's recent items say of the candidate, and
the item's own content features; standardised over training requests, so that weights compare.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from components.interactions.batching import Requests
from components.interactions.contract import Responses, Reward
from components.policies.session_encoder import PAIR_FEATURES, SessionEncoder
from components.policies.slate_policy import SessionState

#: Places of the user model's logits among the features.
CLICK, PURCHASE = 0, 1


class RequestFeatures(nn.Module):
    """The session encoder, frozen, and the request-item features that it gives."""

    log_counts: Tensor
    mean: Tensor
    scale: Tensor

    def __init__(self, encoder: SessionEncoder) -> None:
        super().__init__()
        self.encoder = encoder.requires_grad_(False)
        self.register_buffer("log_counts", torch.zeros(encoder.shape.n_indices))
        self.register_buffer("mean", torch.zeros(self.width))
        self.register_buffer("scale", torch.ones(self.width))

    @property
    def width(self) -> int:
        """Number of features P."""
        return 3 + len(PAIR_FEATURES) + self.encoder.shape.n_item_features

    def forward(self, state: SessionState, requests: Requests) -> Float[Tensor, "B N P"]:
        """Standardised features of every candidate; zero for padding."""
        standardised = (self._raw(state, requests) - self.mean) / self.scale
        return standardised * (requests.candidates > 0)[..., None]

    def _raw(self, state: SessionState, requests: Requests) -> Float[Tensor, "B N P"]:
        items = requests.candidates
        named = torch.stack(
            [
                self.encoder.click_logits(state, items),
                self.encoder.purchase_logits(state, items),
                self.log_counts[items],
            ],
            dim=2,
        )
        return torch.cat([named, self.encoder.pair_features(state, items), self.encoder.item_features[items]], dim=2)

    @torch.no_grad()
    def fit(self, state: SessionState, requests: Requests, counts: Float[Tensor, " V"]) -> None:
        """Set popularity from training counts and the standardisation from training requests."""
        self.log_counts.copy_(counts.log1p())
        real: Bool[Tensor, "B N"] = requests.candidates > 0
        rows = self._raw(state, requests)[real]
        spread, mean = torch.std_mean(rows, dim=0)
        self.mean.copy_(mean)
        self.scale.copy_(torch.where(spread > 1e-6, spread, 1.0))

    def expected_reward_weights(self, reward: Reward, *, responses: Responses, sells: bool) -> Float[Tensor, " P"]:
        """Weights that rank by log E[reward], to first order around the mean logits: one nat for each of its nats.

            log E[r] = log P(click) + log(w_click + w_purchase σ(p))

        with P(click) = σ(c), or ∝ exp(c) where one item of a slate is chosen; c, p the user model's logits.

        Args:
            reward: what responses are worth; where nothing above 0 is to be expected, all weights are 0.
            responses: how the user model answers slates.
            sells: whether the user model knows of purchases; where not, its purchase logits say nothing.
        """
        click, purchase = torch.sigmoid(self.mean[[CLICK, PURCHASE]])
        earned_by_sale = (reward.weights.get("purchased", 0.0) if sells else 0.0) * purchase
        earned = reward.weights.get("clicked", 0.0) + earned_by_sale
        weights = torch.zeros_like(self.mean)
        if earned > 0:
            click_slope = 1.0 - click if responses == "per_position" else torch.ones(())
            slopes = torch.stack([click_slope, earned_by_sale * (1.0 - purchase) / earned])
            weights[[CLICK, PURCHASE]] = slopes * self.scale[[CLICK, PURCHASE]]
        return weights
