"""Follows a session and says how its user would answer each item: the part of the user model that policies carry.

The state consumes every request, slate and response, clicked or not:

    x_t = [Σ shown, Σ clicked, Σ purchased, clicks, purchases of request t−1; Σ events, last event, context of t]
    s_t = GRU(s_{t−1}, W x_t)
    click(s, i)    = ⟨W_c s, e_i⟩ + b_i + ⟨a + A s, pair(s, i)⟩
    purchase(s, i) = ⟨W_p s, ē_i⟩ + ⟨b_p, ē_i⟩ + a_p · pair(s, i),      ē_i = e_i with no gradient into the trunk

with e_i = id embedding + W_f features_i, so an item that training never saw still has its features. IRecGAN (Bai, Guan
and Wang, NeurIPS 2019) follows clicked items alone with an LSTM, which may take the GRU's place; its state is the
special case with the other sums left out.
"""

from typing import Literal

import torch
from jaxtyping import Float, Int
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from components.interactions.batching import Requests, SessionBatch
from components.interactions.covisitation import N_NEIGHBORS, Covisitation
from components.interactions.vocabulary import UNKNOWN
from components.policies.slate_policy import SessionState

#: pair(state, item): last touched, how recently touched, how often among the recent, how often it follows the last one.
PAIR_FEATURES = ("is_last", "recency", "count", "covisitation")
RECENCY_DECAY = 0.8
#: Rate at which "follows the last item" begins to tell: the feature is ln(1 + P(item | last) / rate).
FOLLOW_RATE = 0.01


class EncoderConfig(BaseModel):
    """Size of the session encoder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    item_width: int = Field(default=32, ge=4, le=512, description="Width D of the item embeddings.")
    cell: Literal["gru", "lstm"] = Field(default="gru", description="Recurrent cell; IRecGAN's is the LSTM.")
    hidden_width: int = Field(default=64, ge=4, le=1024, description="Width H of the recurrent state.")
    recent_items: int = Field(default=8, ge=1, le=50, description="Items R that the state remembers by name.")
    min_touches: int = Field(
        default=5,
        ge=0,
        description="Items that users clicked or visited less often share the unknown item's embedding.",
    )


class EncoderShape(BaseModel):
    """Everything that is needed to build an encoder before its weights are loaded."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    n_indices: int = Field(ge=3, description="Vocabulary size V, padding and unknown included.")
    n_item_features: int = Field(ge=0, description="Width F of the items' content features.")
    n_context: int = Field(ge=0, description="Width C of the encoded context.")
    reads_slates: bool = Field(
        default=True, description="False for logs without slates: the state then follows organic events alone."
    )
    config: EncoderConfig = EncoderConfig()


def feature_weights(n_features: int, width: int) -> nn.Parameter:
    """W_f, as torch begins a linear layer; there are logs whose items have no features."""
    bound = max(n_features, 1) ** -0.5
    return nn.Parameter(torch.empty(n_features, width).uniform_(-bound, bound))


def over_sessions(
    recurrent: nn.GRU | nn.LSTM, x: Float[Tensor, "B T X"], batch: SessionBatch
) -> Float[Tensor, "B T H"]:
    """Outputs of a recurrent network at every request of sessions; it is not run beyond their ends: zeros there."""
    packed = pack_padded_sequence(x, batch.lengths.clamp(min=1), batch_first=True, enforce_sorted=False)
    output, _ = pad_packed_sequence(recurrent(packed)[0], batch_first=True, total_length=x.shape[1])
    return output


class SessionEncoder(nn.Module):
    """Recurrent state of a session, with click and purchase logits of items under it."""

    item_features: Tensor
    id_rows: Tensor
    neighbors: Tensor
    neighbor_weights: Tensor
    one_visit: Tensor
    unlisted: Tensor

    def __init__(self, shape: EncoderShape) -> None:
        super().__init__()
        self.shape = shape
        width, hidden = shape.config.item_width, shape.config.hidden_width
        self.register_buffer("item_features", torch.zeros(shape.n_indices, shape.n_item_features))
        self.register_buffer("id_rows", torch.arange(shape.n_indices))
        self.register_buffer("neighbors", torch.zeros(shape.n_indices, N_NEIGHBORS, dtype=torch.long))
        self.register_buffer("neighbor_weights", torch.zeros(shape.n_indices, N_NEIGHBORS))
        self.register_buffer("one_visit", torch.zeros(shape.n_indices))
        self.register_buffer("unlisted", torch.zeros(shape.n_indices))
        self.id_embedding = nn.Embedding(shape.n_indices, width, padding_idx=0)
        nn.init.normal_(self.id_embedding.weight.data[1:], std=0.05)
        nn.init.zeros_(self.id_embedding.weight.data[:1])
        self.feature_weights = feature_weights(shape.n_item_features, width)
        self.input = nn.Linear(5 * width + 2 + shape.n_context, hidden)
        cell = nn.LSTM if shape.config.cell == "lstm" else nn.GRU
        self.recurrent = cell(hidden, hidden, batch_first=True)
        self.click_query = nn.Linear(hidden, width)
        self.click_bias = nn.Embedding(shape.n_indices, 1, padding_idx=0)
        nn.init.zeros_(self.click_bias.weight)
        self.click_item = nn.Linear(width, 1)
        self.click_pair = nn.Linear(len(PAIR_FEATURES), 1, bias=False)
        self.click_pair_query = nn.Linear(hidden, len(PAIR_FEATURES), bias=False)
        nn.init.zeros_(self.click_pair_query.weight)
        self.purchase_query = nn.Linear(hidden, width)
        self.purchase_item = nn.Linear(width, 1)
        self.purchase_pair = nn.Linear(len(PAIR_FEATURES), 1, bias=False)

    def know_items(self, item_features: Float[Tensor, "V F"], covisitation: Covisitation) -> None:
        """Fill in what is known of the items before training; rare ones share the unknown item's embedding.

        Touches count and not displays: a list of 25 hotels shows many that teach nothing but their own chance.
        """
        self.item_features.copy_(item_features)
        known = covisitation.touches >= self.shape.config.min_touches
        self.id_rows.copy_(torch.where(known, self.id_rows, self.id_rows.clamp(max=UNKNOWN)))
        self.neighbors.copy_(covisitation.neighbors)
        self.neighbor_weights.copy_(covisitation.weights)
        self.one_visit.copy_(covisitation.one_visit)
        self.unlisted.copy_(covisitation.unlisted)

    def item_vectors(self, items: Int[Tensor, "*X"]) -> Float[Tensor, "*X D"]:
        """e_i; zero for padding."""
        return self._look_up(self.id_embedding, items) + self.item_features[items] @ self.feature_weights

    def _look_up(self, embedding: nn.Embedding, items: Int[Tensor, "*X"]) -> Float[Tensor, "*X D"]:
        # A dense gradient of each look-up would cost more than all else where the catalogue is large; who trains the
        # encoder sums the sparse ones and makes them dense once a step.
        return functional.embedding(self.id_rows[items], embedding.weight, padding_idx=0, sparse=self.training)

    def start(self, requests: Requests) -> SessionState:
        """State at a session's first request."""
        n = requests.candidates.shape[0]
        hidden = requests.context.new_zeros(n, self.shape.config.hidden_width)
        blank = SessionState(
            hidden=hidden,
            recent=requests.events.new_zeros(n, self.shape.config.recent_items),
            memory=hidden if isinstance(self.recurrent, nn.LSTM) else None,
        )
        nothing = requests.candidates.new_zeros(n, 1)
        zero = requests.context.new_zeros(n, 1)
        return self.advance(blank, nothing, zero, zero, requests)

    def advance(
        self,
        state: SessionState,
        slates: Int[Tensor, "B K"],
        clicks: Float[Tensor, "B K"],
        purchases: Float[Tensor, "B K"],
        requests: Requests,
    ) -> SessionState:
        """State at the next request."""
        x = self._input(slates, clicks, purchases, requests.events, requests.context)
        recent = self._remember(state.recent, slates[:, None], clicks[:, None], requests.events[:, None])[:, 0]
        if isinstance(self.recurrent, nn.LSTM):
            assert state.memory is not None, "states of whole sessions cannot be advanced"
            _, (hidden, memory) = self.recurrent(x[:, None], (state.hidden[None], state.memory[None]))
            return SessionState(hidden[0], recent, memory[0])
        _, hidden = self.recurrent(x[:, None], state.hidden[None])
        return SessionState(hidden[0], recent)

    def states(self, batch: SessionBatch) -> SessionState:
        """State at every request of whole sessions, as B·T rows."""

        def before(values: Tensor) -> Tensor:
            return torch.cat([torch.zeros_like(values[:, :1]), values[:, :-1]], dim=1)

        slates, clicks, purchases = before(batch.slates), before(batch.clicks), before(batch.purchases)
        x = self._input(slates, clicks, purchases, batch.events, batch.context)
        hidden = over_sessions(self.recurrent, x, batch)
        blank = batch.events.new_zeros(len(batch.users), self.shape.config.recent_items)
        recent = self._remember(blank, slates, clicks, batch.events)
        return SessionState(hidden.flatten(0, 1), recent.flatten(0, 1))

    def _input(
        self,
        slates: Int[Tensor, "*B K"],
        clicks: Float[Tensor, "*B K"],
        purchases: Float[Tensor, "*B K"],
        events: Int[Tensor, "*B E"],
        context: Float[Tensor, "*B C"],
    ) -> Float[Tensor, "*B H"]:
        done = self.item_vectors(events)
        if self.shape.reads_slates:
            shown = self.item_vectors(slates)
            answered = [shown.sum(-2), (shown * clicks[..., None]).sum(-2), (shown * purchases[..., None]).sum(-2)]
        else:
            answered = [torch.zeros_like(done[..., 0, :])] * 3
        parts = [
            *answered,
            done.sum(-2),
            done[..., -1, :],
            clicks.sum(-1, keepdim=True),
            purchases.sum(-1, keepdim=True),
            context,
        ]
        projected: Tensor = self.input(torch.cat(parts, dim=-1))
        return torch.tanh(projected)

    def _remember(
        self,
        recent: Int[Tensor, "B R"],
        slates: Int[Tensor, "B T K"],
        clicks: Float[Tensor, "B T K"],
        events: Int[Tensor, "B T E"],
    ) -> Int[Tensor, "B T R"]:
        """Latest touched items first: a request's events, the clicks on the slate before it, then what was known."""
        touched = torch.cat([self._clicked(slates, clicks), events], dim=2)
        packed, count = _packed(torch.cat([recent.flip(1), touched.flatten(1)], dim=1))
        latest = count[:, recent.shape[1] + touched.shape[2] - 1 :: touched.shape[2]] - 1
        places = latest[..., None] - torch.arange(recent.shape[1], device=packed.device)
        # The last column is padding.
        found = packed.gather(1, torch.where(places >= 0, places, packed.shape[1] - 1).flatten(1))
        return found.unflatten(1, places.shape[1:])

    def _clicked(self, slates: Int[Tensor, "B T K"], clicks: Float[Tensor, "B T K"]) -> Int[Tensor, "B T K"]:
        return torch.where((clicks > 0) & self.shape.reads_slates, slates, 0).int()

    def own_followers(self, batch: SessionBatch, state: SessionState) -> Int[Tensor, "M L"]:
        """Items that each request's own session turns to after its last item, now or at any other time; 0 is padding.

        They are among what co-visitation counted, if the session is one of those that it counted; of a request's events
        the batch knows the latest alone.
        """
        touched = torch.cat([batch.events, self._clicked(batch.slates, batch.clicks)], dim=2)
        packed, count = _packed(touched.flatten(1))
        packed = packed[:, : int(count.max()) + 1]
        last = state.recent[:, 0].reshape(batch.mask.shape)
        after_last = packed[:, None, :-1] == last[:, :, None]
        return torch.where(after_last, packed[:, None, 1:], 0).flatten(0, 1)

    def pair_features(
        self, state: SessionState, items: Int[Tensor, "B X"], counted: Int[Tensor, "B L"] | None = None
    ) -> Float[Tensor, "B X P"]:
        """What the session's recent items say of each item.

        Args:
            state: B sessions.
            items: X items for each of them.
            counted: items whose visit after the last item is among those that co-visitation counted. It is left out,
                or the feature would give away what is to be learned.
        """
        recent = state.recent
        last = recent[:, 0].long()
        same = (items[:, :, None] == recent[:, None, :]) & (recent[:, None, :] > 0)
        decay = RECENCY_DECAY ** torch.arange(recent.shape[1], device=items.device)
        neighbors, weights = self.neighbors[last], self.neighbor_weights[last]
        follows = ((items[:, :, None] == neighbors[:, None, :]) * weights[:, None, :]).sum(2)
        if counted is not None:
            own = (items[:, :, None] == counted[:, None, :]).any(2)
            one_visit = self.one_visit[last][:, None]
            follows = follows - own * one_visit
            # Without that visit the item would not be listed, as others that follow as often are not. Half a visit
            # stands for equality, which rounding might miss.
            follows = torch.where(follows > self.unlisted[last][:, None] + 0.5 * one_visit, follows, 0.0)
        touched = same.float()
        followed = (follows / FOLLOW_RATE).log1p()
        return torch.stack([touched[:, :, 0], (touched * decay).amax(2), touched.sum(2).log1p(), followed], dim=2)

    def click_logits(
        self, state: SessionState, items: Int[Tensor, "B X"], counted: Int[Tensor, "B L"] | None = None
    ) -> Float[Tensor, "B X"]:
        """Click logit of each item, whatever its position."""
        vectors = self.item_vectors(items)
        logits = torch.einsum("bd,bxd->bx", self.click_query(state.hidden), vectors)
        return logits + self._item_logits(vectors, items) + self._click_pair_logits(state, items, counted)

    def catalogue_logits(self, state: SessionState, items: Int[Tensor, " X"]) -> Float[Tensor, "B X"]:
        """Click logits of one list of distinct items for every session: `click_logits` without its gather.

        The pair features are zero but for recent items and followers of the last one, so only those are computed.
        """
        near = self.near_items(state)
        logits = self.unpaired_logits(state, items)
        rows, columns, places = self.places(near, items)
        return logits.index_put_((rows, places), self._click_pair_logits(state, near)[rows, columns], accumulate=True)

    def unpaired_logits(self, state: SessionState, items: Int[Tensor, " X"]) -> Float[Tensor, "B X"]:
        """`catalogue_logits` of sessions that none of the items is near to."""
        vectors = self.item_vectors(items)
        return torch.addmm(self._item_logits(vectors, items), self.click_query(state.hidden), vectors.T)

    def near_items(self, state: SessionState) -> Int[Tensor, "B X"]:
        """Items with pair features: recent ones and followers of the last one, each once; 0 is padding."""
        near = torch.cat([state.recent.long(), self.neighbors[state.recent[:, 0].long()]], dim=1)
        again = (near[:, :, None] == near[:, None, :]).tril(-1).any(2)
        return torch.where(again, 0, near)

    def places(
        self, named: Int[Tensor, "B Y"], items: Int[Tensor, " X"]
    ) -> tuple[Int[Tensor, " P"], Int[Tensor, " P"], Int[Tensor, " P"]]:
        """Where the items that sessions name stand on a list of distinct items: rows and columns of `named`, places."""
        place = torch.full((self.shape.n_indices,), -1, device=items.device)
        place[items] = torch.arange(len(items), device=items.device)
        place[0] = -1
        found = place[named]
        rows, columns = torch.nonzero(found >= 0, as_tuple=True)
        return rows, columns, found[rows, columns]

    def _item_logits(self, vectors: Float[Tensor, "*X D"], items: Int[Tensor, "*X"]) -> Float[Tensor, "*X"]:
        return self.click_item(vectors)[..., 0] + self._look_up(self.click_bias, items)[..., 0]

    def _click_pair_logits(
        self, state: SessionState, items: Int[Tensor, "B X"], counted: Int[Tensor, "B L"] | None = None
    ) -> Float[Tensor, "B X"]:
        weights = self.click_pair.weight + self.click_pair_query(state.hidden)
        return torch.einsum("bp,bxp->bx", weights, self.pair_features(state, items, counted))

    def purchase_logits(
        self, state: SessionState, items: Int[Tensor, "B X"], counted: Int[Tensor, "B L"] | None = None
    ) -> Float[Tensor, "B X"]:
        """Purchase logit of each item, given that it is clicked; trains its own head only."""
        vectors = self.item_vectors(items).detach()
        logits = torch.einsum("bd,bxd->bx", self.purchase_query(state.hidden.detach()), vectors)
        pair = self.purchase_pair(self.pair_features(state, items, counted))[..., 0]
        return logits + self.purchase_item(vectors)[..., 0] + pair


def _packed(line: Int[Tensor, "B L"]) -> tuple[Int[Tensor, "B W"], Int[Tensor, "B L"]]:
    """Items in order without the gaps between them, zeros after them; and how many there are up to each place."""
    count, width = (line > 0).cumsum(1), line.shape[1]
    # One column more takes in the padding.
    place = torch.where(line > 0, count - 1, width)
    return line.new_zeros(len(line), width + 1).scatter(1, place, line), count
