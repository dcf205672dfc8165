"""One live session, asked for one slate: what an endpoint is told, as the tensors that a policy was trained on.

The session is written as rows of the data contract and read by the reader of logs, so a request that is served and the
same request in a log give the same state, and hence the same log_prob.
"""

from dataclasses import dataclass
from typing import Annotated, Any

import polars as pl
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from components.errors import InputError
from components.interactions.batching import Requests, read_sessions
from components.interactions.contract import CANDIDATE_SCHEMA, Evidence, Feature, Manifest, RatioAssumption
from components.policies.policy_folder import StoredPolicy
from components.policies.slate_policy import SessionState

ItemId = Annotated[str, Field(min_length=1, max_length=256)]
Context = dict[str, str | float | None]
#: Longest slate that a past request may have shown.
MAX_SLATE = 100


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

    candidates: tuple[ItemId, ...] = Field(
        min_length=1, max_length=1_000, description="Distinct items that may be shown."
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
        for item_id in self.candidates:
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

    @property
    def log_prob(self) -> float:
        """Of the ordered slate."""
        return sum(self.log_probs)


def encode_session(stored: StoredPolicy, session: LiveSession) -> tuple[SessionState, Requests]:
    """The policy's state at a session's current request, and that request, each as one row.

    Items that the policy does not know share its unknown index; unknown values of context features count as zeros.

    Raises:
        InputError: the context names a feature that the policy does not have, or gives one a value of the wrong kind.
    """
    vocabulary = stored.description.vocabulary
    features = {code.feature.name: code.feature for code in vocabulary.context_codes}
    requests: list[PastRequest | LiveSession] = [*session.past_requests, session]
    manifest = Manifest(
        loop=stored.description.loop,
        source="live",
        evidence=Evidence.SLATES,
        ratio_assumption=RatioAssumption.FULL_SLATE,
        responses="per_position",
        slate_size=max([stored.policy.slate_size, *(len(past.slate) for past in session.past_requests)]),
        context=tuple(features.values()),
    )
    rows: list[dict[str, Any]] = [
        {
            "session_id": "live",
            "user_id": "live",
            "step": step,
            "events": [event.model_dump() for event in request.events],
            "context": _checked_context(
                request.context, features, "context" if request is session else f"past_requests.{step}.context"
            ),
        }
        | (
            {"slate": request.slate, "clicked": request.clicked, "purchased": request.purchased}
            if isinstance(request, PastRequest)
            else {"candidates": request.candidates}
        )
        for step, request in enumerate(requests)
    ]
    frame = pl.DataFrame(rows, schema=manifest.schema())
    table = read_sessions(frame, manifest, vocabulary, pl.DataFrame(schema=CANDIDATE_SCHEMA))
    batch = table.batch(torch.tensor([0]))
    current = torch.tensor([len(requests) - 1])
    with torch.no_grad():
        return stored.policy.states(batch).select(current), batch.requests().select(current)


def _checked_context(context: Context, features: dict[str, Feature], where: str) -> Context:
    for name, value in context.items():
        if name not in features:
            raise InputError(f"{where}: {name!r} is unknown; the policy's features are {sorted(features)}")
        kind, expected = ("a number", float) if features[name].kind == "numeric" else ("text", str)
        if value is not None and not isinstance(value, expected):
            raise InputError(f"{where}: {name!r} is {value!r}; expected {kind}")
    return context


def recommend(stored: StoredPolicy, session: LiveSession, generator: torch.Generator) -> Recommendation:
    """A slate for a live session, with its exact log_prob; shorter than usual where there are too few candidates.

    Candidates are told apart by their place, so several that the policy does not know may still be shown together.

    Raises:
        InputError: the context does not fit the policy.
    """
    choice = stored.policy.act(*encode_session(stored, session), generator)
    chosen = [
        (session.candidates[place], log_prob)
        for place, log_prob in zip(choice.places[0].tolist(), choice.log_probs[0].tolist(), strict=True)
        if place >= 0
    ]
    return Recommendation(tuple(item_id for item_id, _ in chosen), tuple(log_prob for _, log_prob in chosen))
