"""A policy that is asked live: sessions as an endpoint is told of them, as the tensors that the policy was trained on.

A request that is served and the same request in a log give the same state, and hence the same log_prob: what
`interactions/batching.py` does with a log's columns is done here with Python's own lists, since a data frame for each
request would cost five times what the network does.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from components.errors import InputError
from components.interactions.batching import MAX_EVENTS, Requests, SessionBatch
from components.interactions.vocabulary import FIRST_ITEM, UNKNOWN
from components.policies import plackett_luce
from components.policies.policy_folder import StoredPolicy
from components.policies.slate_policy import SessionState

#: Longest slate that may be asked for, or that a past request may have shown.
MAX_SLATE = 100
MAX_CANDIDATES = 10_000
#: Past positions that are encoded at once, and candidates that are scored at once, padding included.
MAX_CELLS = 20_000
#: Numbers beyond this would overflow in the networks' single precision.
LARGEST = 1e15
ItemId = Annotated[str, Field(min_length=1, max_length=256)]
Number = Annotated[float, Field(ge=-LARGEST, le=LARGEST)]
Context = dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=256)] | Number | None]


class Event(BaseModel):
    """One thing that the user did on their own."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    type: str = Field(min_length=1, max_length=64, description="Kind of event, such as search, view or basket.")
    item_id: ItemId = Field(description="Item that the user turned to.")


class PastRequest(BaseModel):
    """An earlier request of the session: what was shown, and what the user did with it."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    slate: tuple[ItemId, ...] = Field(max_length=MAX_SLATE, description="Items shown, in display order.")
    clicked: tuple[bool | None, ...] | None = Field(
        default=None, description="Per position whether it was clicked; null where unknown."
    )
    purchased: tuple[bool | None, ...] | None = Field(
        default=None, description="Per position whether it was purchased; null where unknown."
    )
    events: tuple[Event, ...] = Field(
        default=(), max_length=1_000, description="What the user did on their own before this request, latest last."
    )
    context: Context = Field(default={}, description="The request's features by name; absent ones count as unknown.")

    @model_validator(mode="after")
    def _one_answer_per_position(self) -> "PastRequest":
        for name, answers in (("clicked", self.clicked), ("purchased", self.purchased)):
            if answers is not None and len(answers) != len(self.slate):
                raise ValueError(
                    f"{name} has {len(answers)} values; expected {len(self.slate)}, one per slate position"
                )
        return self


class LiveSession(BaseModel):
    """A session up to the request that asks for a slate."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    candidates: tuple[ItemId, ...] | None = Field(
        default=None,
        min_length=1,
        max_length=MAX_CANDIDATES,
        description="Distinct items that may be shown; without them every item that the policy knows.",
    )
    slate_size: int | None = Field(
        default=None, ge=1, le=MAX_SLATE, description="Items to show; without it as many as the policy was trained for."
    )
    context: Context = Field(default={}, description="The request's features by name; absent ones count as unknown.")
    events: tuple[Event, ...] = Field(
        default=(),
        max_length=1_000,
        description="What the user did on their own since the last request, latest last.",
    )
    past_requests: tuple[PastRequest, ...] = Field(
        default=(), max_length=200, description="The session's earlier requests, first one first."
    )

    @model_validator(mode="after")
    def _distinct_candidates(self) -> "LiveSession":
        seen: set[str] = set()
        for item_id in self.candidates or ():
            if item_id in seen:
                raise ValueError(f"candidates name {item_id!r} twice; expected distinct items")
            seen.add(item_id)
        return self


@dataclass(frozen=True)
class Recommendation:
    """A slate that a policy chose, with the probability of choosing it."""

    slate: tuple[str, ...]
    log_probs: tuple[float, ...]
    """Per position, given the positions above."""
    explores: bool
    """Whether its first item is less likely there than another."""

    @property
    def log_prob(self) -> float:
        """Of the ordered slate."""
        return sum(self.log_probs)


class LivePolicy:
    """A stored policy that answers live sessions.

    Items that it does not know share its unknown index; unknown values of context features count as zeros.
    """

    def __init__(self, stored: StoredPolicy) -> None:
        self.description = stored.description
        self.policy = stored.policy
        vocabulary = stored.description.vocabulary
        self._index = {item_id: number for number, item_id in enumerate(vocabulary.item_ids, FIRST_ITEM)}
        self._catalog = vocabulary.item_ids
        widths = [code.width for code in vocabulary.context_codes]
        starts = np.cumsum([0, *widths]).tolist()
        self._codes = {
            code.feature.name: (start, code) for start, code in zip(starts, vocabulary.context_codes, strict=False)
        }
        self._values = {
            code.feature.name: {value: start + place for place, value in enumerate(code.feature.values)}
            for start, code in self._codes.values()
        }

    def candidates(self, session: LiveSession) -> tuple[str, ...]:
        """The items that may be shown to a session.

        Raises:
            InputError: it names none, and the policy knows more than a request may name.
        """
        if session.candidates is not None:
            return session.candidates
        if len(self._catalog) > MAX_CANDIDATES:
            raise InputError(
                f"candidates: the policy knows {len(self._catalog)} items; name the ones that may be shown, "
                f"at most {MAX_CANDIDATES}"
            )
        return self._catalog

    def check(self, session: LiveSession) -> None:
        """Refuse what this policy cannot answer.

        Raises:
            InputError: the session names no candidates and the policy knows more items than it may name; or a context
                names a feature that the policy does not have, or gives one a value of the wrong kind.
        """
        self.candidates(session)
        told: list[PastRequest | LiveSession] = [*session.past_requests, session]
        for step, request in enumerate(told):
            where = "context" if request is session else f"past_requests.{step}.context"
            for name, value in request.context.items():
                if name not in self._codes:
                    raise InputError(f"{where}: {name!r} is unknown; the policy's features are {sorted(self._codes)}")
                numeric = self._codes[name][1].feature.kind == "numeric"
                if value is not None and isinstance(value, str) is numeric:
                    raise InputError(f"{where}: {name!r} is {value!r}; expected {'a number' if numeric else 'text'}")

    def encode(self, sessions: Sequence[LiveSession]) -> tuple[SessionState, Requests]:
        """The policy's state at each session's current request, and that request: one row a session.

        Raises:
            InputError: as `check`.
        """
        for session in sessions:
            self.check(session)
        offered = [self.candidates(session) for session in sessions]
        n_steps = 1 + max(len(session.past_requests) for session in sessions)
        n_positions = max(
            [self.policy.slate_size, *(len(past.slate) for session in sessions for past in session.past_requests)]
        )
        shape = len(sessions), n_steps
        slates = np.zeros((*shape, n_positions), dtype=np.int32)
        clicks, purchases = (np.zeros(slates.shape, dtype=np.float32) for _ in range(2))
        events = np.zeros((*shape, MAX_EVENTS), dtype=np.int32)
        context = np.zeros((*shape, self.description.vocabulary.context_width), dtype=np.float32)
        candidates = np.zeros((len(sessions), max(map(len, offered))), dtype=np.int32)
        mask = np.zeros(shape, dtype=bool)
        for row, session in enumerate(sessions):
            mask[row, : len(session.past_requests) + 1] = True
            candidates[row, : len(offered[row])] = self._indices(offered[row])
            told: list[PastRequest | LiveSession] = [*session.past_requests, session]
            for step, request in enumerate(told):
                latest = request.events[-MAX_EVENTS:]
                if latest:
                    events[row, step, -len(latest) :] = self._indices([event.item_id for event in latest])
                self._encode_context(request.context, context[row, step])
                if isinstance(request, PastRequest) and request.slate:
                    shown = slice(0, len(request.slate))
                    slates[row, step, shown] = self._indices(request.slate)
                    for target, answers in ((clicks, request.clicked), (purchases, request.purchased)):
                        if answers is not None:
                            target[row, step, shown] = [answer is True for answer in answers]
        batch = _batch(mask, slates, clicks, purchases, events, context)
        current = torch.tensor(
            [row * n_steps + len(session.past_requests) for row, session in enumerate(sessions)], dtype=torch.long
        )
        requests = Requests(
            candidates=torch.from_numpy(candidates),
            context=batch.context.flatten(0, 1)[current],
            events=batch.events.flatten(0, 1)[current],
        )
        with torch.inference_mode():
            return self.policy.states(batch).select(current), requests

    def logits(self, sessions: Sequence[LiveSession]) -> Float[Tensor, "B N"]:
        """Utility of each session's candidates, in their order; -inf for padding.

        Raises:
            InputError: as `check`.
        """
        with torch.inference_mode():
            return self.policy.logits(*self.encode(sessions))

    def recommend(self, sessions: Sequence[LiveSession], generator: torch.Generator) -> list[Recommendation]:
        """A slate for each session, with its exact log_prob; shorter than asked for where candidates are too few.

        Candidates are told apart by their place, so several that the policy does not know may be shown together.

        Raises:
            InputError: as `check`.
        """
        return [chosen for chunk in self._chunks(sessions) for chosen in self._recommend(chunk, generator)]

    def _chunks(self, sessions: Sequence[LiveSession]) -> Iterator[Sequence[LiveSession]]:
        """Sessions in their order, as many together as may be padded to the largest of them."""
        start, largest = 0, (0, 0, 0)
        for place, session in enumerate(sessions):
            own = _size(session, len(self.candidates(session)))
            grown = max(largest[0], own[0]), max(largest[1], own[1]), max(largest[2], own[2])
            n_steps, n_positions, n_candidates = grown
            if place > start and (place - start + 1) * max(n_steps * n_positions, n_candidates) > MAX_CELLS:
                yield sessions[start:place]
                start, grown = place, own
            largest = grown
        yield sessions[start:]

    def _recommend(self, sessions: Sequence[LiveSession], generator: torch.Generator) -> list[Recommendation]:
        logits = self.logits(sessions)
        sizes = [session.slate_size or self.policy.slate_size for session in sessions]
        with torch.inference_mode():
            # The first positions of a longer slate are distributed as a shorter one.
            places = plackett_luce.sample(logits, max(sizes), generator)
            log_probs = plackett_luce.log_prob(logits, places)
            explores = logits.gather(1, places[:, :1]).squeeze(1) < logits.amax(1)
        chosen = []
        for session, size, own_places, own_log_probs, own_explores in zip(
            sessions, sizes, places.tolist(), log_probs.tolist(), explores.tolist(), strict=True
        ):
            items = self.candidates(session)
            filled = [
                (items[place], log_prob)
                for place, log_prob in zip(own_places, own_log_probs, strict=True)
                if place >= 0
            ]
            slate, told = zip(*filled[:size], strict=True)
            chosen.append(Recommendation(slate, told, own_explores))
        return chosen

    def _indices(self, item_ids: Sequence[str]) -> list[int]:
        index = self._index
        return [index.get(item_id, UNKNOWN) for item_id in item_ids]

    def _encode_context(self, context: Context, row: np.ndarray) -> None:
        for name, value in context.items():
            start, code = self._codes[name]
            if code.feature.kind == "numeric":
                if value is not None:
                    # As the contract's column has it.
                    row[start] = (float(np.float32(value)) - code.mean) / code.scale
            elif value in self._values[name]:
                row[self._values[name][value]] = 1.0


def _size(session: LiveSession, n_candidates: int) -> tuple[int, int, int]:
    """Requests, positions of the longest past slate, candidates."""
    return 1 + len(session.past_requests), max([1, *(len(past.slate) for past in session.past_requests)]), n_candidates


def _batch(
    mask: np.ndarray,
    slates: np.ndarray,
    clicks: np.ndarray,
    purchases: np.ndarray,
    events: np.ndarray,
    context: np.ndarray,
) -> SessionBatch:
    """Sessions of which only that is known which an encoder reads."""
    none = torch.zeros(mask.shape, dtype=torch.bool)
    nothing = torch.zeros(slates.shape)
    return SessionBatch(
        mask=torch.from_numpy(mask),
        users=torch.zeros(len(mask), dtype=torch.long),
        candidates=torch.zeros(*mask.shape, 0, dtype=torch.int32),
        context=torch.from_numpy(context),
        events=torch.from_numpy(events),
        slates=torch.from_numpy(slates),
        log_probs=torch.full(mask.shape, torch.nan, dtype=torch.float64),
        clicks=torch.from_numpy(clicks),
        purchases=torch.from_numpy(purchases),
        observed=nothing.bool(),
        purchase_observed=nothing.bool(),
        rewards=nothing,
        reward_known=none,
        left=none,
        leave_observed=none,
    )
