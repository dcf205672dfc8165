"""What the endpoint is asked and what it answers."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from components.policies.live_policy import MAX_SLATE, LiveSession, Number
from services.releases import MAX_REASON, Release

#: Ids are stored as they come: anything but control characters, which some databases cannot hold.
Id = Annotated[str, Field(min_length=1, max_length=256, pattern=r"^[^\x00-\x1f\x7f]+$")]
SignalName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", max_length=64)]
Positions = Annotated[tuple[bool | None, ...], Field(min_length=1, max_length=MAX_SLATE)]
MAX_RECOMMENDATIONS, MAX_FEEDBACK = 100, 1_000

_QUESTION: dict[str, Any] = {
    "loop": "shop",
    "user_id": "user-1",
    "session_id": "visit-7",
    "candidates": ["item-0001", "item-0002", "item-0003", "item-0004", "brand-new"],
    "context": {"device": "phone", "segment": "family"},
    "past_requests": [{"slate": ["item-0007", "item-0003"], "clicked": [False, True], "context": {"device": "phone"}}],
    "events": [{"type": "view", "item_id": "item-0002"}],
}
_HEARD: dict[str, Any] = {"request_id": "e11e9d1838ab4f6597373e38f6d5df84", "clicked": [False, True, False, False]}


class RecommendRequest(LiveSession):
    """A session up to now, and the items that may be shown next."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, json_schema_extra={"example": _QUESTION}
    )

    loop: str = Field(min_length=1, max_length=64, description="The recommender that is asked.")
    user_id: Id = Field(description="Who asks; it is stored as a keyed hash, and policies see the session only.")
    session_id: Id | None = Field(
        default=None, description="The user's visit; without it a pause in the user's requests ends one."
    )
    idempotency_key: Id | None = Field(
        default=None, description="The same key with the same question gets the same answer, and is logged once."
    )


class RecommendResponse(BaseModel):
    """A slate, and what makes it worth learning from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    request_id: str = Field(description="Names this request in logs and feedback.")
    arm: str = Field(description="The arm that serves this user.")
    policy: str = Field(description="Exact tag of the policy that answered.")
    slate: tuple[str, ...] = Field(description="Items to show, in display order.")
    log_prob: float = Field(description="Of the ordered slate under the policy, in nats.")
    log_probs: tuple[float, ...] = Field(description="Per position, given the positions above; they sum to log_prob.")
    logged: bool = Field(description="False where the log could not be written: nothing is learned from this slate.")


class Feedback(BaseModel):
    """What the user did with a slate; it may come late, in pieces, in any order and more than once."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, json_schema_extra={"example": _HEARD})

    request_id: Id = Field(description="The recommendation that it is about.")
    feedback_id: Id | None = Field(
        default=None, description="Names this piece: it counts once. Without it, pieces that say the same are one."
    )
    clicked: Positions | None = Field(
        default=None,
        description="Per position whether it was clicked; null where unknown. A click is never taken back.",
    )
    purchased: Positions | None = Field(
        default=None, description="Per position whether it was purchased; null where unknown."
    )
    signals: dict[SignalName, Annotated[tuple[Number | None, ...], Field(min_length=1, max_length=MAX_SLATE)]] = Field(
        default={}, max_length=50, description="Other responses per position, such as watch_time in seconds."
    )
    request_signals: dict[SignalName, Number] = Field(
        default={}, max_length=50, description="Responses to the request as a whole; the newest value counts."
    )
    left: bool = Field(default=False, description="Whether the user is known to have left after this request.")

    @model_validator(mode="after")
    def _says_something(self) -> "Feedback":
        if not (self.clicked or self.purchased or self.signals or self.request_signals or self.left):
            raise ValueError("says nothing; expected clicked, purchased, signals, request_signals or left")
        return self


class FeedbackResponse(BaseModel):
    """The piece is in the log; so it was, if it had come before."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    request_id: str


class RecommendBatchRequest(BaseModel):
    """Several requests; one that cannot be answered refuses them all, and nothing is logged."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    requests: tuple[RecommendRequest, ...] = Field(min_length=1, max_length=MAX_RECOMMENDATIONS)


class RecommendBatchResponse(BaseModel):
    """An answer to each request, in their order."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    responses: tuple[RecommendResponse, ...]


class FeedbackBatchRequest(BaseModel):
    """Several pieces of feedback, each kept or refused by itself."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    feedback: tuple[Feedback, ...] = Field(min_length=1, max_length=MAX_FEEDBACK)


class Refusal(BaseModel):
    """A piece of a batch that fits no recommendation."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    place: int = Field(ge=0, description="Of the piece in the batch, from 0.")
    error: str


class FeedbackBatchResponse(BaseModel):
    """How many pieces are in the log now, and which were refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    accepted: int
    refused: tuple[Refusal, ...]


class ReleasesResponse(BaseModel):
    """What the worker that answers serves."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    releases: tuple[Release, ...] = Field(description="The release of each loop.")


class RollbackRequest(BaseModel):
    """Take a loop's challenger away; without one, bring back the champion before this one."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        json_schema_extra={"example": {"loop": "shop", "reason": "carts are down", "left": 3}},
    )

    loop: str = Field(min_length=1, max_length=64, description="The recommender.")
    reason: str = Field(min_length=1, max_length=MAX_REASON, description="Why; it stays with the release.")
    left: int | None = Field(
        default=None,
        ge=1,
        description="Number of the release that is to be left, so that asking twice goes back once; null: whichever.",
    )


class Problem(BaseModel):
    """Why a request was refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    error: str = Field(description="Names the field, what is wrong with it and what was expected.")
