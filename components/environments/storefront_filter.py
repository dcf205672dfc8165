"""What the shop's users let anyone know: the Bayes filter of their hidden interest, and the policy that lives by it.

Whoever knows the shop but not its users believes in P interests z_p of each session, drawn as the shop draws them for
the user's segment. A response re-weighs them by its likelihood and they drift as the shop lets them drift:

    w_p ∝ P(clicks, purchases | slate, z_p),     P summed over which positions were examined

With P large this is the exact posterior (Gordon, Salmond and Smith 1993), so no policy that sees sessions alone can
know more: between it and the oracle, which reads minds, lies what nothing can learn.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from components.environments.storefront import (
    DAY_SPREAD,
    DEVICES,
    EXAMINED_NEXT,
    EXAMINED_NEXT_AFTER_CLICK,
    LATENT,
    PRICE_SENSITIVITY,
    USER_SPREAD,
    BehaviorPolicy,
    Storefront,
)
from components.interactions.batching import Requests, SessionBatch
from components.policies.slate_policy import SessionState, SlatePolicy


class FilterPolicy(SlatePolicy):
    """u_i = behavior's utility + weight · E[reward of i, once examined | session so far].

    Args:
        storefront: the shop; its parameters are known, its users are not.
        weight: 0 is the logging policy; large is greedy.
        n_particles: interests P that stand for the belief.
        seed: of the particles.
    """

    def __init__(self, storefront: Storefront, weight: float, n_particles: int = 128, seed: int = 0) -> None:
        super().__init__()
        self.storefront, self.weight, self.n_particles = storefront, weight, n_particles
        self.slate_size = storefront.slate_size
        self.behavior = BehaviorPolicy(storefront)
        self.generator = torch.Generator().manual_seed(seed)

    def start(self, requests: Requests) -> SessionState:
        """Interests of the user's segment."""
        shape = (len(requests.candidates), self.n_particles, LATENT)
        center = self.storefront.segment_interest[_segment(requests)][:, None]
        user = functional.normalize(center + USER_SPREAD * torch.randn(shape, generator=self.generator), dim=2)
        day = functional.normalize(user + DAY_SPREAD * torch.randn(shape, generator=self.generator), dim=2)
        return SessionState(day.flatten(1), requests.candidates.new_zeros(len(day), 0))

    def advance(
        self,
        state: SessionState,
        slates: Int[Tensor, "B K"],
        clicks: Float[Tensor, "B K"],
        purchases: Float[Tensor, "B K"],
        requests: Requests,
    ) -> SessionState:
        """Interests re-drawn by the likelihood of the response, then drifted."""
        weights = self.log_likelihood(state, slates, clicks, purchases, requests).softmax(1)
        kept = torch.multinomial(weights, self.n_particles, replacement=True, generator=self.generator)
        interest = self._interest(state).gather(1, kept[:, :, None].expand(-1, -1, LATENT))
        drifted = self.storefront.drifted(
            interest.flatten(0, 1),
            slates.repeat_interleave(self.n_particles, 0),
            clicks.repeat_interleave(self.n_particles, 0),
            self.generator,
        )
        return SessionState(drifted.reshape(len(slates), -1), state.recent)

    def states(self, batch: SessionBatch) -> SessionState:
        """Particles at every request of whole sessions, as B·T rows."""
        steps = []
        for step in range(batch.mask.shape[1]):
            requests = Requests(batch.candidates[:, step], batch.context[:, step], batch.events[:, step])
            if step == 0:
                state = self.start(requests)
            else:
                last = step - 1
                slates, clicks, purchases = batch.slates[:, last], batch.clicks[:, last], batch.purchases[:, last]
                state = self.advance(state, slates, clicks, purchases, requests)
            steps.append(state.hidden)
        hidden = torch.stack(steps, dim=1).flatten(0, 1)
        return SessionState(hidden, batch.candidates.new_zeros(len(hidden), 0))

    def logits(self, state: SessionState, requests: Requests) -> Float[Tensor, "B N"]:
        """The logging policy's utilities, tilted by what the belief expects of each candidate."""
        click, purchase = self._click_and_purchase(self._interest(state), requests, requests.candidates)
        weights = self.storefront.reward.weights
        expected = (click * (weights["clicked"] + weights["purchased"] * purchase)).mean(1)
        return self.behavior.logits(state, requests) + self.weight * expected

    def log_likelihood(
        self,
        state: SessionState,
        slates: Int[Tensor, "B K"],
        clicks: Float[Tensor, "B K"],
        purchases: Float[Tensor, "B K"],
        requests: Requests,
    ) -> Float[Tensor, "B P"]:
        """Log-likelihood of a response under each particle, examination summed out."""
        click, purchase = self._click_and_purchase(self._interest(state), requests, slates)
        examined = torch.ones_like(click[..., 0])
        total = torch.zeros_like(examined)
        for position in range(slates.shape[1]):
            clicked, bought = clicks[:, position, None] > 0, purchases[:, position, None] > 0
            p, q = click[..., position], purchase[..., position]
            total = total + torch.where(clicked, examined * p, 1.0 - examined * p).log()
            total = total + torch.where(clicked, torch.where(bought, q, 1.0 - q).log(), 0.0)
            # After no click: examined and not clicked, over not clicked.
            still = torch.where(clicked, 1.0, examined * (1.0 - p) / (1.0 - examined * p))
            examined = still * torch.where(clicked, EXAMINED_NEXT_AFTER_CLICK, EXAMINED_NEXT)
        return total

    def _interest(self, state: SessionState) -> Float[Tensor, "B P L"]:
        return state.hidden.unflatten(1, (self.n_particles, LATENT))

    def _click_and_purchase(
        self, interest: Float[Tensor, "B P L"], requests: Requests, items: Int[Tensor, "B X"]
    ) -> tuple[Float[Tensor, "B P X"], Float[Tensor, "B P X"]]:
        many = interest.shape[1]
        sensitivity = torch.tensor(PRICE_SENSITIVITY)[_segment(requests)].repeat_interleave(many)
        click, purchase = self.storefront.click_and_purchase(
            interest.flatten(0, 1), sensitivity, items.repeat_interleave(many, 0)
        )
        return click.unflatten(0, (-1, many)), purchase.unflatten(0, (-1, many))


def _segment(requests: Requests) -> Int[Tensor, " B"]:
    return requests.context[:, len(DEVICES) :].argmax(1)
