"""What a user does with a slate: clicks, purchases given clicks, and leaving. IRecGAN's user model, factorised.

    per position:  P(click k | s, slate, clicks above) = σ(click(s, i_k) + p_k + c · clicks above)
    choice:        P(click k | s, slate)               ∝ exp(click(s, i_k) + p_k),  P(none) ∝ exp(skip(s))
    no slates:     P(next item i | s)                  ∝ exp(click(s, i)) over the whole catalogue
    P(purchase k | click k)                            = σ(purchase(s, i_k)), 0 where training saw no purchase
    P(leave | s, slate, response)                      = σ(f(s, Σ shown, Σ clicked, numbers of clicks and purchases))

s, click and purchase are the session encoder's. Censored ends contribute the survival up to them and nothing after.
IRecGAN (Bai, Guan and Wang, NeurIPS 2019, section 3.1) is the choice form with "leave" in the place of "none".
"""

from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from components.interactions.batching import SessionBatch
from components.interactions.contract import Responses
from components.interactions.tensor_record import TensorRecord
from components.policies.session_encoder import SessionEncoder
from components.policies.slate_policy import SessionState


@dataclass(frozen=True)
class Likelihood:
    """Weighted negative log-likelihoods in nats, summed, with what they were summed over; sums of batches add."""

    click: Float[Tensor, ""]
    purchase: Float[Tensor, ""]
    leave: Float[Tensor, ""]
    n_click: Float[Tensor, ""]
    """Positions (per position), slates (choice) or next items (no slates)."""
    n_purchase: Float[Tensor, ""]
    n_leave: Float[Tensor, ""]
    """Requests after which staying or leaving is known."""
    n_request: Float[Tensor, ""]

    def __add__(self, other: "Likelihood") -> "Likelihood":
        return Likelihood(*(mine + its for mine, its in zip(self._values(), other._values(), strict=True)))

    def _values(self) -> tuple[Tensor, ...]:
        return self.click, self.purchase, self.leave, self.n_click, self.n_purchase, self.n_leave, self.n_request

    @property
    def total(self) -> Float[Tensor, ""]:
        """Sum of all parts: what training minimises."""
        return self.click + self.purchase + self.leave

    @property
    def per_request(self) -> Float[Tensor, ""]:
        """Sum of all parts over the requests."""
        return self.total / self.n_request.clamp(min=1.0)

    @property
    def per_click(self) -> float:
        """Mean click part: nats per position, slate or next item."""
        return float(self.click / self.n_click.clamp(min=1.0))


class UserModel(nn.Module):
    """The likelihood of responses, and samples of them."""

    sells: Tensor
    """Whether purchases can be sampled: false where training saw none, and the purchase head learned nothing."""
    knows_leaving: Tensor
    """Whether leaving can be sampled: false where training never saw whether a user stayed."""

    def __init__(self, encoder: SessionEncoder, slate_size: int, responses: Responses) -> None:
        super().__init__()
        hidden, width = encoder.shape.config.hidden_width, encoder.shape.config.item_width
        self.encoder = encoder
        self.slate_size = slate_size
        self.responses = responses
        self.position = nn.Parameter(torch.zeros(slate_size))
        self.clicks_above = nn.Parameter(torch.zeros(()))
        self.register_buffer("sells", torch.ones((), dtype=torch.bool))
        self.register_buffer("knows_leaving", torch.ones((), dtype=torch.bool))
        self.skip = nn.Linear(hidden, 1)
        self.leave = nn.Sequential(nn.Linear(hidden + 2 * width + 2, 32), nn.Tanh(), nn.Linear(32, 1))

    @property
    def shared_weights(self) -> list[Tensor]:
        """The few weights that every item and session shares: positions and pair features."""
        return [self.position, self.clicks_above, self.encoder.click_pair.weight, self.encoder.purchase_pair.weight]

    def click_logits(
        self, state: SessionState, slates: Int[Tensor, "B K"], counted: Int[Tensor, "B L"] | None = None
    ) -> Float[Tensor, "B K"]:
        """Logit of each position before the clicks above it count; -inf for padding."""
        logits = self.encoder.click_logits(state, slates, counted) + self.position
        return torch.where(slates > 0, logits, -torch.inf)

    def leave_logits(
        self,
        state: SessionState,
        slates: Int[Tensor, "B K"],
        clicks: Float[Tensor, "B K"],
        purchases: Float[Tensor, "B K"],
    ) -> Float[Tensor, " B"]:
        """Logit of leaving after the response."""
        if self.slate_size:
            shown = self.encoder.item_vectors(slates)
            answered = [shown.sum(1), (shown * clicks[..., None]).sum(1)]
        else:
            answered = [state.hidden.new_zeros(len(slates), self.encoder.shape.config.item_width)] * 2
        parts = [
            state.hidden,
            *answered,
            clicks.sum(1, keepdim=True),
            purchases.sum(1, keepdim=True),
        ]
        logits: Tensor = self.leave(torch.cat(parts, dim=1))
        return logits[:, 0]

    def log_likelihood(
        self,
        batch: SessionBatch,
        weights: Float[Tensor, "B T"] | None = None,
        negatives: Int[Tensor, " X"] | None = None,
        negative_log_q: Float[Tensor, " X"] | None = None,
        *,
        counted: bool = False,
    ) -> Likelihood:
        """Negative log-likelihood of the responses of whole sessions, masks respected.

        Args:
            batch: logged or generated sessions.
            weights: weight of each request; 1 for all where not given.
            negatives: for logs without slates, distinct items that stand for the catalogue (sampled softmax).
            negative_log_q: log of the chance with which each of them is drawn.
            counted: whether these sessions are among those that co-visitation counted, as training sessions are: what
                it says of them then leaves them out.
        """
        states, flat, real = self.encoder.states(batch), FlatRequests.of(batch), batch.mask.flatten()
        own = self.encoder.own_followers(batch, states)[real] if counted else None
        # Beyond the ends of sessions there is nothing to learn: most of a batch, where one session is long.
        state, flat = states.select(real), flat.select(real)
        weight = flat.mask.float() if weights is None else weights[batch.mask]
        click, n_click = self._click_losses(state, batch, flat, negatives, negative_log_q, own)
        bought = weight[:, None] * flat.clicks * flat.purchase_observed
        purchase = functional.binary_cross_entropy_with_logits(
            self.encoder.purchase_logits(state, flat.slates, own), flat.purchases, reduction="none"
        )
        known = weight * flat.leave_observed
        leave = functional.binary_cross_entropy_with_logits(
            self.leave_logits(state, flat.slates, flat.clicks, flat.purchases), flat.left.float(), reduction="none"
        )
        return Likelihood(
            click=(weight * click).sum(),
            purchase=(bought * purchase).sum(),
            leave=(known * leave).sum(),
            n_click=(weight * n_click).sum(),
            n_purchase=bought.sum(),
            n_leave=known.sum(),
            n_request=weight.sum(),
        )

    def click_losses(self, batch: SessionBatch) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
        """Exact negative log-likelihood of each request's clicks in nats, and of how many of them (as `n_click`)."""
        real = batch.mask.flatten()
        state, flat = self.encoder.states(batch).select(real), FlatRequests.of(batch).select(real)
        losses, numbers = self._click_losses(state, batch, flat, None, None, None)
        nothing = losses.new_zeros(batch.mask.shape)
        return nothing.masked_scatter(batch.mask, losses), nothing.masked_scatter(batch.mask, numbers)

    def _click_losses(
        self,
        state: SessionState,
        batch: SessionBatch,
        flat: "FlatRequests",
        negatives: Int[Tensor, " X"] | None,
        negative_log_q: Float[Tensor, " X"] | None,
        counted: Int[Tensor, "M L"] | None,
    ) -> tuple[Float[Tensor, " M"], Float[Tensor, " M"]]:
        if self.slate_size == 0:
            return self._next_item_losses(state, next_items(batch)[batch.mask], counted, negatives, negative_log_q)
        if self.responses == "choice":
            return self._choice_losses(state, flat, counted)
        return self._position_losses(state, flat, counted)

    def _position_losses(
        self, state: SessionState, flat: "FlatRequests", counted: Int[Tensor, "M L"] | None
    ) -> tuple[Tensor, Tensor]:
        above = flat.clicks.cumsum(1) - flat.clicks
        logits = self.encoder.click_logits(state, flat.slates, counted)
        logits = logits + self.position + self.clicks_above * above
        loss = functional.binary_cross_entropy_with_logits(logits, flat.clicks, reduction="none")
        return (flat.observed * loss).sum(1), flat.observed.float().sum(1)

    def _choice_losses(
        self, state: SessionState, flat: "FlatRequests", counted: Int[Tensor, "M L"] | None
    ) -> tuple[Tensor, Tensor]:
        log_p = self._choice_log_probs(state, flat.slates, counted)
        none = 1.0 - flat.clicks.sum(1, keepdim=True).clamp(max=1.0)
        chosen = torch.cat([flat.clicks, none], dim=1)
        known = flat.observed.any(1).float()
        return known * -(chosen * torch.where(chosen > 0, log_p, 0.0)).sum(1), known

    def _choice_log_probs(
        self, state: SessionState, slates: Int[Tensor, "B K"], counted: Int[Tensor, "B L"] | None = None
    ) -> Float[Tensor, "B K+1"]:
        return torch.cat([self.click_logits(state, slates, counted), self.skip(state.hidden)], dim=1).log_softmax(1)

    def _next_item_losses(
        self,
        state: SessionState,
        targets: Int[Tensor, " M"],
        counted: Int[Tensor, "M L"] | None,
        negatives: Int[Tensor, " X"] | None,
        negative_log_q: Float[Tensor, " X"] | None,
    ) -> tuple[Tensor, Tensor]:
        known = targets > 0
        rows = torch.nonzero(known)[:, 0]
        counted = None if counted is None else counted[rows]
        losses = self._chosen_item_losses(state.select(rows), targets[rows].long(), counted, negatives, negative_log_q)
        return losses.new_zeros(len(targets)).index_copy(0, rows, losses), known.float()

    def _chosen_item_losses(
        self,
        state: SessionState,
        targets: Int[Tensor, " M"],
        counted: Int[Tensor, "M L"] | None,
        negatives: Int[Tensor, " X"] | None,
        negative_log_q: Float[Tensor, " X"] | None,
    ) -> Float[Tensor, " M"]:
        if negatives is None:
            logits = self.encoder.catalogue_logits(state, torch.arange(1, self.encoder.shape.n_indices))
            return functional.cross_entropy(logits, targets - 1, reduction="none")
        assert negative_log_q is not None
        # Sampled softmax (Bengio and Senécal 2008). Items near to the session hold much of the probability, so they are
        # summed exactly; the drawn ones stand for the rest, each for 1 / (chance to be drawn).
        near = self.encoder.near_items(state)
        exact = torch.cat([targets[:, None], torch.where(near == targets[:, None], 0, near)], dim=1)
        return -self._sampled_log_probs(state, exact, negatives, negative_log_q, counted)[:, 0]

    def _sampled_log_probs(
        self,
        state: SessionState,
        exact: Int[Tensor, "M Y"],
        drawn: Int[Tensor, " X"],
        drawn_log_q: Float[Tensor, " X"],
        counted: Int[Tensor, "M L"] | None = None,
    ) -> Float[Tensor, "M Y+X"]:
        """Log-probabilities of items that are named, then of those that stand for the rest of the catalogue."""
        exact_logits = self.encoder.click_logits(state, exact, counted).where(exact > 0, -torch.inf)
        drawn_logits = self.encoder.unpaired_logits(state, drawn) - drawn_log_q
        rows, _, places = self.encoder.places(exact, drawn)
        drawn_logits = drawn_logits.index_put_((rows, places), drawn_logits.new_tensor(-torch.inf))
        return torch.cat([exact_logits, drawn_logits], dim=1).log_softmax(1)

    def click_probabilities(
        self, state: SessionState, slates: Int[Tensor, "B K"], clicks: Float[Tensor, "B K"]
    ) -> Float[Tensor, "B K"]:
        """P(click) of each position, given the clicks above it that took place."""
        if self.responses == "choice":
            return self._choice_log_probs(state, slates)[:, :-1].exp()
        above = clicks.cumsum(1) - clicks
        return torch.sigmoid(self.click_logits(state, slates) + self.clicks_above * above)

    def expected_responses(
        self, state: SessionState, slates: Int[Tensor, "B K"]
    ) -> tuple[Float[Tensor, "B K"], Float[Tensor, "B K"]]:
        """E[click] and E[purchase] of each position of slates that nobody has answered yet; exact.

        Per position the number of clicks above is chance too: its distribution grows by one position at a time.
        """
        if self.responses == "choice":
            clicks = self._choice_log_probs(state, slates)[:, :-1].exp()
        else:
            logits = self.click_logits(state, slates)
            n_above = torch.arange(slates.shape[1] + 1)
            p_above = (n_above == 0).float().expand(len(slates), -1)
            expected = []
            for position in range(slates.shape[1]):
                clicked = p_above * torch.sigmoid(logits[:, position, None] + self.clicks_above * n_above)
                expected.append(clicked.sum(1))
                p_above = p_above - clicked + functional.pad(clicked[:, :-1], (1, 0))
            clicks = torch.stack(expected, dim=1)
        return clicks, clicks * torch.sigmoid(self.encoder.purchase_logits(state, slates)) * self.sells

    @torch.no_grad()
    def sample_responses(
        self, state: SessionState, slates: Int[Tensor, "B K"], generator: torch.Generator
    ) -> tuple[Float[Tensor, "B K"], Float[Tensor, "B K"], Bool[Tensor, " B"]]:
        """Clicks, purchases and leaving, sampled as the likelihood has them."""
        chance = torch.rand(3, *slates.shape, generator=generator)
        clicks = torch.zeros(slates.shape)
        if self.responses == "choice":
            probabilities = self._choice_log_probs(state, slates).exp()
            chosen = torch.multinomial(probabilities, 1, generator=generator)
            clicks = torch.zeros(probabilities.shape).scatter(1, chosen, 1.0)[:, :-1]
        else:
            logits = self.click_logits(state, slates)
            above = torch.zeros(len(slates))
            for position in range(slates.shape[1]):
                probability = torch.sigmoid(logits[:, position] + self.clicks_above * above)
                clicks[:, position] = (chance[0, :, position] < probability).float()
                above = above + clicks[:, position]
        bought = chance[1] < torch.sigmoid(self.encoder.purchase_logits(state, slates))
        purchases = clicks * (bought & self.sells)
        left = self.sample_leaving(state, slates, clicks, purchases, generator)
        return clicks, purchases, left

    @torch.no_grad()
    def sample_next_items(
        self,
        state: SessionState,
        drawn: Int[Tensor, " X"],
        drawn_log_q: Float[Tensor, " X"],
        generator: torch.Generator,
    ) -> Int[Tensor, " B"]:
        """Next items, for logs without slates.

        Items near to the session have their own probability; the rest of the catalogue is represented by X drawn items,
        as in training (sampling-importance-resampling), since a softmax over all of it would cost most of a simulation.
        """
        near = self.encoder.near_items(state)
        probabilities = self._sampled_log_probs(state, near, drawn, drawn_log_q).exp()
        chosen = torch.multinomial(probabilities, 1, generator=generator)
        return torch.cat([near, drawn.expand(len(near), -1)], dim=1).gather(1, chosen)[:, 0]

    @torch.no_grad()
    def sample_leaving(
        self,
        state: SessionState,
        slates: Int[Tensor, "B K"],
        clicks: Float[Tensor, "B K"],
        purchases: Float[Tensor, "B K"],
        generator: torch.Generator,
    ) -> Bool[Tensor, " B"]:
        """Who leaves after the response."""
        hazard = torch.sigmoid(self.leave_logits(state, slates, clicks, purchases))
        return torch.rand(len(hazard), generator=generator) < hazard


@dataclass(frozen=True)
class FlatRequests(TensorRecord):
    """The response columns of a batch with B and T joined: M = B·T rows."""

    mask: Bool[Tensor, " M"]
    slates: Int[Tensor, "M K"]
    clicks: Float[Tensor, "M K"]
    purchases: Float[Tensor, "M K"]
    observed: Bool[Tensor, "M K"]
    purchase_observed: Bool[Tensor, "M K"]
    left: Bool[Tensor, " M"]
    leave_observed: Bool[Tensor, " M"]

    @classmethod
    def of(cls, batch: SessionBatch) -> "FlatRequests":
        """The requests of a batch."""
        return cls(**{field.name: getattr(batch, field.name).flatten(0, 1) for field in fields(cls)})


def next_items(batch: SessionBatch) -> Int[Tensor, "B T"]:
    """First organic item after each request, for logs without slates; 0 where the session ends."""
    following = batch.events[:, 1:]
    first = following.gather(2, (following > 0).to(torch.int8).argmax(2, keepdim=True))[:, :, 0]
    return functional.pad(first, (0, 1)) * batch.mask
