"""Tells real sessions from generated ones, request by request (IRecGAN, section 3.2).

    d_t = w · GRU(Σ shown, Σ clicked, Σ purchased, events, counts, left, context)_{1..t},   D(session) = σ(mean_t d_t)

Means run over real requests only, so that padding tells nothing of a session's length; lists enter with their feedback,
so what was shown and not wanted counts as well.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from components.interactions.batching import SessionBatch
from components.policies.session_encoder import SessionEncoder, feature_weights, over_sessions


class Discriminator(nn.Module):
    """Belief that a session is real."""

    item_features: Tensor
    reads_leaving: Tensor
    """Whether leaving is read: false where logged sessions are all censored, and generated ones told apart by that."""

    def __init__(self, encoder: SessionEncoder, width: int = 24, hidden: int = 32) -> None:
        super().__init__()
        shape = encoder.shape
        # Where the log has no slates, generated sessions have, and would be told apart by that alone.
        self.reads_slates = shape.reads_slates
        self.register_buffer("item_features", encoder.item_features.clone())
        self.register_buffer("reads_leaving", torch.ones((), dtype=torch.bool))
        self.id_embedding = nn.Embedding(shape.n_indices, width, padding_idx=0)
        nn.init.normal_(self.id_embedding.weight.data[1:], std=0.05)
        self.feature_weights = feature_weights(shape.n_item_features, width)
        self.recurrent = nn.GRU(4 * width + 3 + shape.n_context, hidden, batch_first=True)
        self.output = nn.Linear(hidden, 1)

    def step_logits(self, batch: SessionBatch) -> Float[Tensor, "B T"]:
        """d_t of every request, from the session up to it."""
        slates, clicks, purchases = batch.slates, batch.clicks, batch.purchases
        if not self.reads_slates:
            slates, clicks, purchases = slates[..., :0], clicks[..., :0], purchases[..., :0]
        shown = self._vectors(slates)
        parts = [
            shown.sum(2),
            (shown * clicks[..., None]).sum(2),
            (shown * purchases[..., None]).sum(2),
            self._vectors(batch.events).sum(2),
            clicks.sum(2, keepdim=True),
            purchases.sum(2, keepdim=True),
            (batch.left & self.reads_leaving)[..., None].float(),
            batch.context,
        ]
        logits: Tensor = self.output(over_sessions(self.recurrent, torch.cat(parts, dim=2), batch))[..., 0]
        return logits

    def session_logits(self, batch: SessionBatch) -> Float[Tensor, " B"]:
        """Logit of D for whole sessions."""
        return (self.step_logits(batch) * batch.mask).sum(1) / batch.mask.sum(1).clamp(min=1)

    def beliefs(self, batch: SessionBatch) -> Float[Tensor, "B T"]:
        """D of the session up to each request; 0 beyond its end."""
        so_far = (self.step_logits(batch) * batch.mask).cumsum(1) / batch.mask.cumsum(1).clamp(min=1)
        return torch.sigmoid(so_far) * batch.mask

    @torch.no_grad()
    def relative_beliefs(self, batch: SessionBatch) -> Float[Tensor, "B T"]:
        """Beliefs over their mean at the same step: rewards keep their scale, believable sessions weigh more."""
        beliefs = self.beliefs(batch)
        mean = beliefs.sum(0) / batch.mask.sum(0).clamp(min=1)
        return beliefs / mean.clamp(min=1e-6)

    def _vectors(self, items: Tensor) -> Tensor:
        return self.id_embedding(items) + self.item_features[items] @ self.feature_weights
