"""A simulated shop whose truth is known: the default source, and the judge of what was learned from its log.

Users have a hidden interest z_u in the items' latent space, drawn around the center of an observable segment, and a
hidden patience. A request offers N candidates and shows K of them. Positions are examined from the top:

    P(examine k+1 | examine k) = 0.95 without a click at k, 0.75 after one
    P(click k | examined)      = σ(−1.9 + d · 2.2 ⟨z_u, v_i⟩ + (1 − d) · 1.3 q_i − s_u · price_i)
    P(purchase | click)        = σ(−1.7 + d · 1.5 ⟨z_u, v_i⟩ + q_i / 2 − 2 s_u · price_i)
    patience ← min(2, patience + 0.6 · clicks + 0.6 · purchases − 0.55),     P(leave) = σ(−patience)

with v_i the item's latent vector, q_i its quality, s_u the segment's price sensitivity and d the dial from "one slate
fits all" (0) to "fully personal" (1). A click draws the interest towards the item and chance moves it: interests drift.
Since clicks buy patience, the horizon depends on the actions. Feedback at a position depends only on that position and
those above it: the cascade ratio holds.

Tastes can have moved since the old system was set up: each segment's center c_s is turned by the share ρ of half a
circle towards a direction of its own, and its users' interests follow. Items, prices and qualities stay.

    c_s ← cos(πρ) c_s + sin(πρ) w_s,     w_s ⊥ c_s, ‖w_s‖ = 1,     z_u ∝ c_s + 0.55 ε_u

At ρ = 1/2 the center says nothing of what it was, at ρ = 1 it is the opposite; ε_u, which sets users apart from their
segment, stays theirs.
"""

import math
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl
import torch
from jaxtyping import Float, Int
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor
from torch.nn import functional

from components.environments.interface import Feedback
from components.environments.rollout import log_rows, rollout
from components.interactions.batching import MAX_EVENTS, Requests
from components.interactions.contract import Evidence, Feature, Manifest, RatioAssumption, Reward
from components.interactions.log_folder import Log, write_log
from components.interactions.tensor_record import TensorRecord
from components.interactions.vocabulary import FIRST_ITEM
from components.policies.slate_policy import MemorylessPolicy, SessionState

SEGMENTS = ("bargain", "family", "gadget", "premium", "trend")
DEVICES = ("desktop", "phone", "tablet")
CATEGORIES = tuple(f"category-{number}" for number in range(10))
PRICE_SENSITIVITY = (0.9, 0.6, 0.4, 0.1, 0.3)
LATENT = 6
MAX_STEPS = 30
#: Chance to examine the next position after none, and after a click.
EXAMINED_NEXT, EXAMINED_NEXT_AFTER_CLICK = 0.95, 0.75
#: Spread of users around their segment, of a day around its user, and of the drift after each request.
USER_SPREAD, DAY_SPREAD, DRIFT = 0.55, 0.25, 0.05
#: How far a click draws the interest towards its item.
CLICK_PULL = 0.15
#: Requests of one session follow each other by this; feedback is known by the end of the session's longest case.
REQUEST_GAP = timedelta(seconds=40)
FEEDBACK_DELAY = timedelta(minutes=30)
FIRST_DAY = datetime(2026, 1, 5, tzinfo=UTC)


class Config(BaseModel):
    """The default source: a shop that can be asked for the truth."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["storefront"] = "storefront"
    world_seed: int = Field(default=7, ge=0, description="Seed of the shop itself: items, users, tastes.")
    log_seed: int = Field(default=1, ge=0, description="Seed of the traffic: the same seed gives the same log.")
    n_users: int = Field(default=12_000, ge=20, description="Users of the shop.")
    n_sessions: int = Field(default=40_000, ge=10, description="Sessions in the log.")
    n_items: int = Field(default=240, ge=20, description="Items of the shop.")
    n_candidates: int = Field(default=12, ge=4, le=50, description="Candidates of a request.")
    slate_size: int = Field(default=4, ge=1, le=10, description="Items shown at a request.")
    personal: float = Field(
        default=0.8, ge=0, le=1, description="Dial from one slate fits all (0) to fully personal (1)."
    )
    behavior_sharpness: float = Field(
        default=1.0, ge=0, le=3, description="How strongly the logging policy follows its scores; 0 shows at random."
    )
    taste_shift: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="How far segments' tastes have turned since the old system came: 0.5 unrelated, 1 opposite.",
    )
    days: int = Field(default=28, ge=1, le=366, description="Days over which the log's sessions are spread.")

    @model_validator(mode="after")
    def _slates_fit_candidates_fit_items(self) -> "Config":
        if not self.slate_size <= self.n_candidates <= self.n_items:
            raise ValueError(
                f"slate_size = {self.slate_size}, n_candidates = {self.n_candidates}, n_items = {self.n_items}: "
                "expected each to be at most the next"
            )
        return self


@dataclass(frozen=True)
class StorefrontState(TensorRecord):
    """Hidden and visible state of B sessions."""

    interest: Float[Tensor, "B L"]
    patience: Float[Tensor, " B"]
    sensitivity: Float[Tensor, " B"]
    context: Float[Tensor, "B C"]
    candidates: Int[Tensor, "B N"]


class Storefront:
    """The shop as an environment. With `reveal_truth` its requests carry what an oracle may read."""

    reward = Reward()

    def __init__(self, config: Config, *, reveal_truth: bool = False) -> None:
        self.config = config
        self.slate_size = config.slate_size
        self.n_users = config.n_users
        self.reveal_truth = reveal_truth
        world = torch.Generator().manual_seed(config.world_seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=world)

        def choose(n_values: int, n: int) -> Tensor:
            return torch.randint(n_values, (n,), generator=world)

        n_items = config.n_items
        categories = functional.normalize(normal(len(CATEGORIES), LATENT), dim=1)
        segments = functional.normalize(normal(len(SEGMENTS), LATENT), dim=1)
        self.category = choose(len(CATEGORIES), n_items)
        self.price = torch.rand(n_items, generator=world)
        quality = normal(n_items)
        self.rating = quality + 0.5 * normal(n_items)
        latent = functional.normalize(categories[self.category] + 0.25 * normal(n_items, LATENT), dim=1)
        # Rows 0 and 1 are padding and unknown, as in a vocabulary, so that its indices are the shop's own.
        self.latent = functional.pad(latent, (0, 0, FIRST_ITEM, 0))
        self.quality = functional.pad(quality, (FIRST_ITEM, 0))
        self.item_price = functional.pad(self.price, (FIRST_ITEM, 0))
        self.segment = choose(len(SEGMENTS), config.n_users)
        deviation = USER_SPREAD * normal(config.n_users, LATENT)
        # Drawn last, so that a shift changes nothing else of the shop.
        self.segment_interest = _turned(segments, normal(*segments.shape), config.taste_shift)
        self.interest = functional.normalize(self.segment_interest[self.segment] + deviation, dim=1)
        # What the old system knows: ratings, and which categories a segment liked on the whole before any shift.
        self.affinity = segments @ categories.T
        self.item_ids = tuple(f"item-{number:04d}" for number in range(n_items))
        self.user_ids = tuple(f"user-{number:05d}" for number in range(config.n_users))

    def reset(self, users: Int[Tensor, " B"], generator: torch.Generator) -> StorefrontState:
        """Open a session: the user's interest of the day, patience and device."""
        n = len(users)
        interest = self.interest[users] + DAY_SPREAD * torch.randn(n, LATENT, generator=generator)
        device = torch.randint(len(DEVICES), (n,), generator=generator)
        context = torch.cat(
            [
                functional.one_hot(device, len(DEVICES)),
                functional.one_hot(self.segment[users], len(SEGMENTS)),
            ],
            dim=1,
        ).float()
        return StorefrontState(
            interest=functional.normalize(interest, dim=1),
            patience=1.4 + 0.5 * torch.randn(n, generator=generator),
            sensitivity=torch.tensor(PRICE_SENSITIVITY)[self.segment[users]],
            context=context,
            candidates=self._draw_candidates(n, generator),
        )

    def observe(self, state: StorefrontState) -> Requests:
        """Candidates and context; the truth only where this shop reveals it."""
        truth = None
        if self.reveal_truth:
            click, purchase = self.click_and_purchase(state.interest, state.sensitivity, state.candidates)
            weights = self.reward.weights
            truth = click * (weights["clicked"] + weights["purchased"] * purchase)
        return Requests(
            candidates=state.candidates,
            context=state.context,
            events=state.candidates.new_zeros(len(state.candidates), MAX_EVENTS),
            truth=truth,
        )

    def step(
        self, state: StorefrontState, slates: Int[Tensor, "B K"], generator: torch.Generator
    ) -> tuple[Feedback, StorefrontState]:
        """Users examine their slates, click, buy, drift, and stay or leave."""
        click_prob, purchase_prob = self.click_and_purchase(state.interest, state.sensitivity, slates)
        chance = torch.rand(4, *slates.shape, generator=generator)
        examined = torch.ones(len(slates), dtype=torch.bool)
        clicks = torch.zeros(slates.shape)
        for position in range(slates.shape[1]):
            clicked = examined & (chance[0, :, position] < click_prob[:, position])
            clicks[:, position] = clicked.float()
            examined = examined & (
                chance[1, :, position] < torch.where(clicked, EXAMINED_NEXT_AFTER_CLICK, EXAMINED_NEXT)
            )
        purchases = clicks * (chance[2] < purchase_prob)
        patience = (state.patience + 0.6 * clicks.sum(1) + 0.6 * purchases.sum(1) - 0.55).clamp(max=2.0)
        left = chance[3, :, 0] < torch.sigmoid(-patience)
        interest = self.drifted(state.interest, slates, clicks, generator)
        return Feedback(clicks, purchases, left), replace(
            state, interest=interest, patience=patience, candidates=self._draw_candidates(len(slates), generator)
        )

    def drifted(
        self,
        interest: Float[Tensor, "B L"],
        slates: Int[Tensor, "B K"],
        clicks: Float[Tensor, "B K"],
        generator: torch.Generator,
    ) -> Float[Tensor, "B L"]:
        """Interest at the next request: clicks draw it, chance moves it."""
        pull = (clicks[:, :, None] * self.latent[slates]).sum(1)
        drift = DRIFT * torch.randn(interest.shape, generator=generator)
        return functional.normalize(interest + CLICK_PULL * pull + drift, dim=1)

    def click_and_purchase(
        self, interest: Float[Tensor, "B L"], sensitivity: Float[Tensor, " B"], items: Int[Tensor, "B X"]
    ) -> tuple[Float[Tensor, "B X"], Float[Tensor, "B X"]]:
        """P(click | examined) and P(purchase | click) of items; 0 for padding."""
        dial = self.config.personal
        match = (self.latent[items] * interest[:, None, :]).sum(2)
        quality = self.quality[items]
        price = sensitivity[:, None] * self.item_price[items]
        click = torch.sigmoid(-1.9 + dial * 2.2 * match + (1.0 - dial) * 1.3 * quality - price)
        purchase = torch.sigmoid(-1.7 + dial * 1.5 * match + 0.5 * quality - 2.0 * price)
        shown = items > 0
        return click * shown, purchase * shown

    def _draw_candidates(self, n: int, generator: torch.Generator) -> Int[Tensor, "B N"]:
        """A retrieval stage's yield: distinct items, all equally likely."""
        noise = torch.rand(n, self.config.n_items, generator=generator)
        return noise.topk(self.config.n_candidates, dim=1).indices + FIRST_ITEM

    def manifest(self, loop: str) -> Manifest:
        """What this shop's log means."""
        return Manifest(
            loop=loop,
            source="storefront",
            evidence=Evidence.PROPENSITIES,
            ratio_assumption=RatioAssumption.CASCADE,
            responses="per_position",
            slate_size=self.slate_size,
            context=(
                Feature(name="device", kind="categorical", values=DEVICES),
                Feature(name="segment", kind="categorical", values=SEGMENTS),
            ),
            item_features=(
                Feature(name="category", kind="categorical", values=CATEGORIES),
                Feature(name="price", kind="numeric"),
                Feature(name="rating", kind="numeric"),
            ),
            reward=self.reward,
            limits=("The shop is simulated: its true values are known, and say nothing about a real shop.",),
        )

    def items(self) -> pl.DataFrame:
        """The item table: what anyone may know of the items."""
        return pl.DataFrame(
            {
                "item_id": self.item_ids,
                "category": [CATEGORIES[code] for code in self.category.tolist()],
                "price": self.price.numpy(),
                "rating": self.rating.numpy(),
            }
        )


def _turned(centers: Float[Tensor, "S L"], directions: Float[Tensor, "S L"], share: float) -> Float[Tensor, "S L"]:
    """Unit vectors turned by a share of half a circle, each in its plane with a direction."""
    sideways = directions - (directions * centers).sum(1, keepdim=True) * centers
    angle = math.pi * share
    return math.cos(angle) * centers + math.sin(angle) * functional.normalize(sideways, dim=1)


class BehaviorPolicy(MemorylessPolicy):
    """The shop's old system: ratings and the segment's liked categories, with utilities bounded to ±sharpness.

    The bound is its entropy floor: no candidate is less than exp(−2 · sharpness) times as likely as another.
    """

    def __init__(self, storefront: Storefront) -> None:
        super().__init__()
        self.slate_size = storefront.slate_size
        self.sharpness = storefront.config.behavior_sharpness
        self.score = functional.pad(0.5 * storefront.rating, (FIRST_ITEM, 0))
        self.affinity = functional.pad(storefront.affinity[:, storefront.category], (FIRST_ITEM, 0))

    def logits(self, state: SessionState, requests: Requests) -> Float[Tensor, "B N"]:
        """Bounded scores of the candidates."""
        segment = requests.context[:, len(DEVICES) :].argmax(1)
        score = self.score[requests.candidates] + self.affinity[segment[:, None], requests.candidates]
        return torch.where(requests.candidates > 0, self.sharpness * torch.tanh(score), -torch.inf)


def write_storefront_log(config: Config, loop: str, out: Path) -> Log:
    """Simulate the log of the shop under its old system; the same configuration gives the same log."""
    storefront = Storefront(config)
    generator = torch.Generator().manual_seed(config.log_seed)
    users = torch.randint(config.n_users, (config.n_sessions,), generator=generator)
    seconds = torch.rand(config.n_sessions, generator=generator, dtype=torch.float64) * config.days * 86_400
    batch = rollout(storefront, BehaviorPolicy(storefront), users, generator, MAX_STEPS)
    rows = log_rows(
        batch,
        manifest=storefront.manifest(loop),
        item_ids=storefront.item_ids,
        user_ids=storefront.user_ids,
        started=pl.Series([FIRST_DAY + timedelta(seconds=float(second)) for second in np.sort(seconds.numpy())]),
        request_gap=REQUEST_GAP,
        feedback_delay=FEEDBACK_DELAY,
        policy="storefront-old-system",
    )
    return write_log(out, storefront.manifest(loop), [rows], storefront.items())
