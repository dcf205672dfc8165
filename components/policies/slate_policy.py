"""A policy is a distribution over ordered slates: it acts, and it can be asked for the log_prob of any slate."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from components.interactions.batching import Requests, SessionBatch
from components.interactions.tensor_record import TensorRecord
from components.policies import plackett_luce

#: Factor on scores that makes the highest all but certain to come first.
SHARP = 1e4


@dataclass(frozen=True)
class SessionState(TensorRecord):
    """What an encoder keeps of each of B sessions up to and with the current request."""

    hidden: Float[Tensor, "B H"]
    recent: Int[Tensor, "B R"]
    """Items that the user turned to, latest first; 0 is padding."""
    memory: Float[Tensor, "B H"] | None = None
    """What only `advance` reads on: an LSTM's cell. None without one, and in the states of whole sessions."""


class SlateChoice(NamedTuple):
    """Slates that a policy chose for B requests."""

    slates: Int[Tensor, "B K"]
    places: Int[Tensor, "B K"]
    """Places of the slate's items among the candidates; -1 is padding."""
    log_probs: Float[Tensor, "B K"]
    """Per position, given the positions above; the sum is the slate's log_prob."""


@runtime_checkable
class SlateChooser(Protocol):
    """What a rollout asks of whoever chooses the slates: a `SlatePolicy`, or one that can be asked and no more."""

    def start(self, requests: Requests) -> SessionState:
        """State of B sessions at their first request."""
        ...

    def advance(
        self,
        state: SessionState,
        slates: Int[Tensor, "B K"],
        clicks: Float[Tensor, "B K"],
        purchases: Float[Tensor, "B K"],
        requests: Requests,
    ) -> SessionState:
        """State at the next request, after a slate was shown and answered."""
        ...

    def act(self, state: SessionState, requests: Requests, generator: torch.Generator) -> SlateChoice:
        """Slates for B requests, with the log_prob under which they were chosen."""
        ...


class SlatePolicy(nn.Module, ABC):
    """Ranks candidates by Plackett-Luce: a subclass says how sessions are followed and what each candidate is worth."""

    slate_size: int

    @abstractmethod
    def start(self, requests: Requests) -> SessionState:
        """State of B sessions at their first request."""

    @abstractmethod
    def advance(
        self,
        state: SessionState,
        slates: Int[Tensor, "B K"],
        clicks: Float[Tensor, "B K"],
        purchases: Float[Tensor, "B K"],
        requests: Requests,
    ) -> SessionState:
        """State at the next request, after a slate was shown and answered."""

    @abstractmethod
    def states(self, batch: SessionBatch) -> SessionState:
        """State at every request of whole sessions, as B·T rows: what `start` and `advance` would have given.

        They are to be read, not advanced from.
        """

    @abstractmethod
    def logits(self, state: SessionState, requests: Requests) -> Float[Tensor, "B N"]:
        """Utility of each candidate in nats; -inf for padding."""

    @torch.no_grad()  # not inference_mode: what is chosen may be learned from
    def act(self, state: SessionState, requests: Requests, generator: torch.Generator) -> SlateChoice:
        """Slates for B requests, with their exact log_prob."""
        logits = self.logits(state, requests)
        places = plackett_luce.sample(logits, self.slate_size, generator)
        slates = torch.where(places >= 0, requests.candidates.gather(1, places.clamp(min=0)), 0)
        return SlateChoice(slates, places, plackett_luce.log_prob(logits, places))

    def log_prob(self, state: SessionState, requests: Requests, slates: Int[Tensor, "B K"]) -> Float[Tensor, "B K"]:
        """Log-probability of each position of given slates; the sum over K is the slate's.

        Raises:
            ValueError: a slate holds an item that is no candidate.
        """
        return plackett_luce.log_prob(
            self.logits(state, requests), plackett_luce.places_of(slates, requests.candidates)
        )


class MemorylessPolicy(SlatePolicy):
    """Base of policies that look at the request alone: they follow no session."""

    def start(self, requests: Requests) -> SessionState:
        """An empty state."""
        n = requests.candidates.shape[0]
        return SessionState(requests.context.new_zeros(n, 0), requests.candidates.new_zeros(n, 0))

    def advance(
        self,
        state: SessionState,
        slates: Int[Tensor, "B K"],
        clicks: Float[Tensor, "B K"],
        purchases: Float[Tensor, "B K"],
        requests: Requests,
    ) -> SessionState:
        """The same empty state."""
        return state

    def states(self, batch: SessionBatch) -> SessionState:
        """An empty state for each request."""
        return self.start(batch.requests())


class UniformPolicy(MemorylessPolicy):
    """Every slate is as likely as any other."""

    def __init__(self, slate_size: int) -> None:
        super().__init__()
        self.slate_size = slate_size

    def logits(self, state: SessionState, requests: Requests) -> Float[Tensor, "B N"]:
        """Zero for every candidate."""
        return torch.where(requests.candidates > 0, 0.0, -torch.inf)


class PopularityPolicy(MemorylessPolicy):
    """Ranks by how often items were seen in training: utility = sharpness · log(1 + count)."""

    log_counts: Tensor

    def __init__(self, slate_size: int, counts: Float[Tensor, " V"], sharpness: float = 1.0) -> None:
        super().__init__()
        self.slate_size = slate_size
        self.sharpness = sharpness
        self.register_buffer("log_counts", torch.log1p(counts))

    def logits(self, state: SessionState, requests: Requests) -> Float[Tensor, "B N"]:
        """Sharpened log counts."""
        utility = self.sharpness * self.log_counts[requests.candidates]
        return torch.where(requests.candidates > 0, utility, -torch.inf)


class OraclePolicy(MemorylessPolicy):
    """Greedy on the truth that a simulator reveals; the ceiling for policies that cannot see it."""

    def __init__(self, slate_size: int) -> None:
        super().__init__()
        self.slate_size = slate_size

    def logits(self, state: SessionState, requests: Requests) -> Float[Tensor, "B N"]:
        """Expected reward of each candidate, so sharp that ranking by it is all but certain."""
        if requests.truth is None:
            raise ValueError("the environment reveals no truth: make it with reveal_truth=True")
        return torch.where(requests.candidates > 0, SHARP * requests.truth, -torch.inf)
