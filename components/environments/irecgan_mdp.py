"""IRecGAN's simulated MDP (Bai, Guan and Wang, NeurIPS 2019; published code, `mdp.py`), whose optimum can be computed.

S states and N items, all of them candidates at each request; sessions open in state 0. From a slate A of K items one is
drawn, and is clicked or ends the session:

    P(draw i | s, A) = r(s, i) / Σ_{j in A} r(s, j),     P(click | s, i drawn) = r(s, i),     r(s, i) ~ U(0, 1)
    click: reward 1 and s' ~ P(· | s, i) = softmax(U(0, 1)^S);     no click: the user leaves

The order of a slate says nothing, but which item is drawn depends on all of it: only the full-slate ratio is valid.
The value of a slate, undiscounted and without the cap on clicks that a rollout sets, is a ratio of sums:

    Q(s, A) = Σ_{i in A} r_i c_i / Σ_{i in A} r_i,     c_i = r_i · (1 + Σ_{s'} P(s' | s, i) V(s'))

so the best of all slates is found exactly (Dinkelbach, Management Science 1967): show the K largest r_i (c_i − λ)
with λ the ratio so far, until λ grows no more. The optimum fills its slates with items of r near 0: they are hardly
ever drawn, while a middling item often is and then ends the session.

The published behavior policies are random (`UniformPolicy`), max (`myopic_policy`) and mix (`MixPolicy`). With the
state observed the context is its one-hot code; hidden, the context is empty, and policies that know the MDP tell the
state from the revealed truth.

Shape letters: B users, S states, V item indices (padding and unknown included), N candidates, K positions.
"""

import math
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import polars as pl
import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor
from torch.nn import functional

from components.environments.interface import Feedback
from components.environments.rollout import log_rows, rollout
from components.interactions.batching import MAX_EVENTS, Requests
from components.interactions.contract import Evidence, Feature, Manifest, RatioAssumption, Reward
from components.interactions.log_folder import Log, write_log
from components.interactions.tensor_record import TensorRecord
from components.interactions.vocabulary import FIRST_ITEM
from components.policies import plackett_luce
from components.policies.slate_policy import MemorylessPolicy, SessionState, SlateChoice, SlatePolicy

START = 0
FIRST_SESSION = datetime(2026, 1, 1, tzinfo=UTC)
SESSION_GAP, REQUEST_GAP, FEEDBACK_DELAY = timedelta(minutes=1), timedelta(seconds=20), timedelta(seconds=1)
#: Utility in nats of the items that a policy means to show; the sampler's noise spans 20, so no other is sampled.
CERTAIN = 30.0


@dataclass(frozen=True)
class MdpState(TensorRecord):
    """States of B sessions."""

    current: Int[Tensor, " B"]


class IRecGanMdp:
    """The MDP as an environment. All users are alike.

    Args:
        n_states: states S.
        n_items: items N.
        slate_size: items K of a slate.
        seed: draws appeal and transitions: the same seed is the same MDP, observed or hidden.
        state_observed: whether the context is the one-hot state (C = S) or empty (C = 0).
        reveal_truth: whether requests carry r(s, ·), the expected reward of each candidate once it is drawn.
    """

    reward = Reward(weights={"clicked": 1.0})

    def __init__(
        self,
        *,
        n_states: int = 10,
        n_items: int = 50,
        slate_size: int = 10,
        seed: int = 7,
        state_observed: bool = True,
        reveal_truth: bool = False,
    ) -> None:
        world = torch.Generator().manual_seed(seed)
        self.n_states = n_states
        self.slate_size = slate_size
        self.state_observed = state_observed
        self.reveal_truth = reveal_truth
        appeal = torch.rand(n_states, n_items, generator=world)
        transition = torch.rand(n_states, n_items, n_states, generator=world).softmax(2)
        # Columns 0 and 1 are padding and unknown, as in a vocabulary.
        self.appeal: Float[Tensor, "S V"] = functional.pad(appeal, (FIRST_ITEM, 0))
        self.transition: Float[Tensor, "S V S"] = functional.pad(transition, (0, 0, FIRST_ITEM, 0))
        self.items: Int[Tensor, " N"] = torch.arange(n_items) + FIRST_ITEM
        # Padded, so that a vocabulary, which sorts by id, gives the items these very indices.
        self.item_ids = tuple(f"item-{number:04d}" for number in range(n_items))

    def reset(self, users: Int[Tensor, " B"], generator: torch.Generator) -> MdpState:
        """All sessions open in the start state."""
        return MdpState(torch.full((len(users),), START))

    def observe(self, state: MdpState) -> Requests:
        """All items as candidates; state and truth only where this MDP shows them."""
        n = len(state.current)
        one_hot = functional.one_hot(state.current, self.n_states).float()
        return Requests(
            candidates=self.items.expand(n, -1),
            context=one_hot if self.state_observed else one_hot[:, :0],
            events=torch.zeros(n, MAX_EVENTS, dtype=torch.long),
            truth=self.appeal[state.current, FIRST_ITEM:] if self.reveal_truth else None,
        )

    def step(
        self, state: MdpState, slates: Int[Tensor, "B K"], generator: torch.Generator
    ) -> tuple[Feedback, MdpState]:
        """Draw one item of each slate; a click moves the state, anything else ends the session."""
        appeal = self.appeal[state.current[:, None], slates]
        place = torch.multinomial(appeal, 1, generator=generator)
        clicked = torch.rand(place.shape, generator=generator) < appeal.gather(1, place)
        clicks = torch.zeros_like(appeal).scatter(1, place, clicked.float())
        drawn = slates.gather(1, place)[:, 0]
        following = torch.multinomial(self.transition[state.current, drawn], 1, generator=generator)[:, 0]
        return Feedback(clicks, torch.zeros_like(clicks), ~clicked[:, 0]), MdpState(following)

    def manifest(self, loop: str) -> Manifest:
        """What logs of this MDP mean."""
        state = Feature(name="state", kind="categorical", values=tuple(map(str, range(self.n_states))))
        return Manifest(
            loop=loop,
            source="irecgan-mdp",
            evidence=Evidence.PROPENSITIES,
            ratio_assumption=RatioAssumption.FULL_SLATE,
            responses="choice",
            slate_size=self.slate_size,
            has_purchases=False,
            context=(state,) if self.state_observed else (),
            reward=self.reward,
        )

    def states_of(self, requests: Requests) -> Int[Tensor, " B"]:
        """State of each request, from its context or else from its revealed truth.

        Raises:
            ValueError: the requests show neither.
        """
        if requests.context.shape[1] == self.n_states:
            return requests.context.argmax(1)
        if requests.truth is None:
            raise ValueError("the requests show no state: make the MDP with state_observed=True or reveal_truth=True")
        same = (requests.truth[:, None] == self.appeal[:, FIRST_ITEM:]).all(2)
        return same.to(torch.int8).argmax(1)

    def ranked_items(self) -> Int[Tensor, "S N"]:
        """Items of each state by r, best first."""
        return self.appeal[:, FIRST_ITEM:].argsort(dim=1, descending=True) + FIRST_ITEM

    def values_of(self, slates: Int[Tensor, "S K"]) -> Float64[Tensor, " S"]:
        """Exact expected clicks from each state on, where state s is always shown slates[s].

        V = b + M V with b_s = Σ_i P(draw i) r_i and M_{ss'} = Σ_i P(draw i) r_i P(s' | s, i).
        """
        appeal = self.appeal.double().gather(1, slates)
        click = appeal.square() / appeal.sum(1, keepdim=True)
        states = torch.arange(self.n_states)
        moves = torch.einsum("sk,skt->st", click, self.transition.double()[states[:, None], slates])
        values: Tensor = torch.linalg.solve(torch.eye(self.n_states, dtype=torch.float64) - moves, click.sum(1))
        return values

    def optimal_slates(self) -> Int[Tensor, "S K"]:
        """Items of the best slate of each state, by policy iteration."""
        slates = self.ranked_items()[:, : self.slate_size]
        values = self.values_of(slates)
        while True:
            improved = self._best_slates(values)
            improved_values = self.values_of(improved)
            if not bool((improved_values > values + 1e-10).any()):
                return slates
            slates, values = improved, improved_values

    def optimal_values(self) -> Float64[Tensor, " S"]:
        """Expected clicks from each state on under the best slates: the ceiling of every policy."""
        return self.values_of(self.optimal_slates())

    def _best_slates(self, values: Float64[Tensor, " S"]) -> Int[Tensor, "S K"]:
        """Slates that maximise Q(s, ·) for given values of the following states, by Dinkelbach's iteration."""
        appeal = self.appeal[:, FIRST_ITEM:].double()
        gain = appeal * (1.0 + self.transition[:, FIRST_ITEM:].double() @ values)
        ratio = torch.zeros(self.n_states, dtype=torch.float64)
        while True:
            places = (appeal * (gain - ratio[:, None])).topk(self.slate_size, dim=1).indices
            shown = appeal.gather(1, places)
            larger = (shown * gain.gather(1, places)).sum(1) / shown.sum(1)
            if not bool((larger > ratio + 1e-12).any()):
                return places + FIRST_ITEM
            ratio = larger


class StateSlatePolicy(MemorylessPolicy):
    """Shows each state its own set of items, in random order.

    Its floor is a formality: no candidate is less than exp(−CERTAIN) times as likely as another.
    """

    def __init__(self, mdp: IRecGanMdp, slates: Int[Tensor, "S X"]) -> None:
        super().__init__()
        self.mdp = mdp
        self.slate_size = mdp.slate_size
        self.utility = torch.zeros_like(mdp.appeal).scatter(1, slates, CERTAIN)

    def logits(self, state: SessionState, requests: Requests) -> Float[Tensor, "B N"]:
        """High for the state's items, 0 for the others."""
        utility = self.utility[self.mdp.states_of(requests)[:, None], requests.candidates]
        return torch.where(requests.candidates > 0, utility, -torch.inf)


def myopic_policy(mdp: IRecGanMdp) -> StateSlatePolicy:
    """The K items of largest r: the published `max`, which ignores where a click leads."""
    return StateSlatePolicy(mdp, mdp.ranked_items()[:, : mdp.slate_size])


def optimal_policy(mdp: IRecGanMdp) -> StateSlatePolicy:
    """The policy whose value is `mdp.optimal_values()`."""
    return StateSlatePolicy(mdp, mdp.optimal_slates())


class MixPolicy(MemorylessPolicy):
    """The published `mix`: at each request a fair coin chooses between max and K random items from N/5 to N/2 by rank.

    A mixture of rankings is no Plackett-Luce ranking, so it mixes probabilities: π(a₁ … a_k) = ½ Σ_c π_c(a₁ … a_k).
    """

    def __init__(self, mdp: IRecGanMdp) -> None:
        super().__init__()
        n_items = len(mdp.items)
        if n_items // 2 - n_items // 5 < mdp.slate_size:
            raise ValueError(f"{n_items} items leave fewer than {mdp.slate_size} between ranks N/5 and N/2")
        self.slate_size = mdp.slate_size
        self.best = myopic_policy(mdp)
        self.middle = StateSlatePolicy(mdp, mdp.ranked_items()[:, n_items // 5 : n_items // 2])

    def logits(self, state: SessionState, requests: Requests) -> Float[Tensor, "B N"]:
        """Log-probability of each candidate at the first position; those of later positions do not follow from it."""
        first = [policy.logits(state, requests).log_softmax(1) for policy in (self.best, self.middle)]
        return torch.logaddexp(*first) - math.log(2.0)

    @torch.no_grad()
    def act(self, state: SessionState, requests: Requests, generator: torch.Generator) -> SlateChoice:
        """Slates for B requests, with their exact log_prob under the mixture."""
        coin = torch.rand(len(requests.candidates), 1, generator=generator) < 0.5
        logits = torch.where(coin, self.best.logits(state, requests), self.middle.logits(state, requests))
        places = plackett_luce.sample(logits, self.slate_size, generator)
        slates = torch.where(places >= 0, requests.candidates.gather(1, places.clamp(min=0)), 0)
        return SlateChoice(slates, places, self.log_prob(state, requests, slates))

    def log_prob(self, state: SessionState, requests: Requests, slates: Int[Tensor, "B K"]) -> Float[Tensor, "B K"]:
        """Log-probability of each position given the positions above it: differences of the prefixes' log_probs."""
        prefixes = [policy.log_prob(state, requests, slates).cumsum(1) for policy in (self.best, self.middle)]
        mixed = torch.logaddexp(*prefixes) - math.log(2.0)
        return torch.diff(mixed, dim=1, prepend=torch.zeros_like(mixed[:, :1]))


def write_mdp_log(
    mdp: IRecGanMdp, behavior: SlatePolicy, n_sessions: int, max_steps: int, seed: int, loop: str, out: Path
) -> Log:
    """Log sessions of the MDP under a policy, each of a user of its own; the same seed gives the same log.

    Args:
        mdp: answers the slates; where its state is hidden, the log does not show it either.
        behavior: chooses the slates.
        n_sessions: sessions to log.
        max_steps: requests after which a session is censored.
        seed: of the only generator.
        loop: name of the loop that the log is for.
        out: folder of the log.
    """
    users = torch.arange(n_sessions)
    rows = log_rows(
        rollout(mdp, behavior, users, torch.Generator().manual_seed(seed), max_steps),
        manifest=mdp.manifest(loop),
        item_ids=mdp.item_ids,
        user_ids=[f"user-{number:07d}" for number in range(n_sessions)],
        started=pl.Series([FIRST_SESSION + number * SESSION_GAP for number in range(n_sessions)]),
        request_gap=REQUEST_GAP,
        feedback_delay=FEEDBACK_DELAY,
        policy="behavior",
    )
    return write_log(out, mdp.manifest(loop), [rows], pl.DataFrame({"item_id": mdp.item_ids}))
