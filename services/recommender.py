"""The endpoint: what it shows is logged with its log_prob before it is answered, and what it hears is joined to it."""

import gc
import hashlib
import hmac
import time
from collections.abc import Mapping, Sequence
from uuid import uuid4

import bentoml
import torch
from pydantic import BaseModel, ConfigDict, Field

from components.errors import InputError
from components.interactions.log import Heard, InteractionLog, KeyReusedError, LogUnavailableError, Recommended
from components.policies.live_policy import LivePolicy
from services.api import build_api
from services.log_writer import LogWriter
from services.messages import (
    Feedback,
    FeedbackBatchRequest,
    FeedbackBatchResponse,
    FeedbackResponse,
    RecommendBatchRequest,
    RecommendBatchResponse,
    RecommendRequest,
    RecommendResponse,
    Refusal,
)
from services.policy_store import load_model
from services.settings import ServiceSettings, user_hash

#: The arm that answers where a request names none and there are several.
DEFAULT_ARM = "champion"


class ServiceArguments(BaseModel):
    """What a Bento is built with."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    arms: dict[str, str] = Field(min_length=1, description="Exact tag of each arm's policy.")


class ServedPolicy:
    """A policy and the tag that names it."""

    def __init__(self, tag: str, live: LivePolicy) -> None:
        self.tag = tag
        self.live = live


def load_served_policies() -> dict[str, ServedPolicy]:
    """The policies of the arms that this Bento was built with."""
    arms = bentoml.use_arguments(ServiceArguments).arms
    return {arm: ServedPolicy(tag, LivePolicy(load_model(tag))) for arm, tag in arms.items()}


@bentoml.service(name="recommender", workers=1, logging={"access": {"enabled": False}})
@bentoml.asgi_app(build_api(lambda: bentoml.get_current_service()))
class Recommender:
    """Recommends slates, one policy per arm, and hears what became of them."""

    def __init__(
        self,
        policies: Mapping[str, ServedPolicy] | None = None,
        settings: ServiceSettings | None = None,
        seed: int | None = None,
    ) -> None:
        settings = settings or ServiceSettings()
        self.policies = load_served_policies() if policies is None else policies
        self.max_body = settings.max_body
        self.generator = torch.Generator()
        if seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(seed)
        self._user_key = settings.user_hash_key()
        self._serve_without_log = settings.serve_without_log
        log = InteractionLog(settings.database)
        log.upgrade()
        self._log = LogWriter(log, longest_wait=settings.log_seconds, longest_queue=settings.log_queue)
        torch.set_num_threads(1)
        # Without this the collector walks the whole heap now and then, and requests wait 200 ms for it.
        gc.collect()
        gc.freeze()

    @bentoml.on_shutdown  # type: ignore[untyped-decorator]
    def close(self) -> None:
        """Write what waits for the log."""
        self._log.close()

    async def recommend(self, request: RecommendRequest) -> RecommendResponse:
        """Choose a slate among the candidates and log it.

        Raises:
            InputError: the request does not fit the loop, the arm or its policy, or its key was used before.
            LogUnavailableError: the log cannot be written, and the service is not to answer without it.
        """
        return (await self._recommend([request], batch=False))[0]

    async def recommend_batch(self, request: RecommendBatchRequest) -> RecommendBatchResponse:
        """Choose a slate for each request and log them all.

        Raises:
            InputError: as `recommend`, of any request.
            LogUnavailableError: as `recommend`.
        """
        return RecommendBatchResponse(responses=tuple(await self._recommend(request.requests, batch=True)))

    async def feedback(self, feedback: Feedback) -> FeedbackResponse:
        """Log what the user did with a slate.

        Raises:
            InputError: it does not fit the slate; `UnknownRequestError` where there is none.
            LogUnavailableError: the log cannot be written.
        """
        (error,) = await self._log.heard([_heard(feedback)])
        if error is not None:
            raise error
        return FeedbackResponse(request_id=feedback.request_id)

    async def feedback_batch(self, request: FeedbackBatchRequest) -> FeedbackBatchResponse:
        """Log pieces of feedback, each by itself.

        Raises:
            LogUnavailableError: the log cannot be written.
        """
        errors = await self._log.heard([_heard(feedback) for feedback in request.feedback])
        refused = tuple(
            Refusal(place=place, error=str(error)) for place, error in enumerate(errors) if error is not None
        )
        return FeedbackBatchResponse(accepted=len(errors) - len(refused), refused=refused)

    async def _recommend(self, requests: Sequence[RecommendRequest], *, batch: bool) -> list[RecommendResponse]:
        arms = [self._arm_of(request, f"requests.{place}." if batch else "") for place, request in enumerate(requests)]
        rows: dict[int, Recommended] = {}
        for arm in set(arms):
            places = [place for place, own in enumerate(arms) if own == arm]
            rows |= zip(places, self._choose([requests[place] for place in places], arm), strict=True)
        in_order = [rows[place] for place in range(len(requests))]
        try:
            standing = await self._log.recommended(in_order)
        except LogUnavailableError:
            if not self._serve_without_log:
                raise
            return [_response(row, logged=False) for row in in_order]
        except KeyReusedError as error:
            if batch:
                error.args = (f"requests.{error.place}.{error}",)
            raise
        return [_response(one, logged=True) for one in standing]

    def _choose(self, requests: Sequence[RecommendRequest], arm: str) -> list[Recommended]:
        served = self.policies[arm]
        now = time.time_ns() // 1_000
        return [
            Recommended(
                request_id=uuid4().hex,
                loop=request.loop,
                user_id=user_hash(self._user_key, request.user_id),
                session_id=request.session_id,
                shown_at=now,
                candidates=served.live.candidates(request),
                catalog=request.candidates is None,
                slate=chosen.slate,
                log_probs=chosen.log_probs,
                events=tuple(event.model_dump() for event in request.events),
                context=request.context,
                policy=served.tag,
                arm=arm,
                question=self._question(request),
                idempotency_key=request.idempotency_key,
            )
            for request, chosen in zip(requests, served.live.recommend(requests, self.generator), strict=True)
        ]

    def _arm_of(self, request: RecommendRequest, where: str) -> str:
        """The arm that answers, which can answer."""
        arms = sorted(self.policies)
        arm = request.arm or (arms[0] if len(arms) == 1 else DEFAULT_ARM)
        if arm not in self.policies:
            raise InputError(f"{where}arm: {arm!r} is not served; the arms are {arms}")
        live = self.policies[arm].live
        if request.loop != live.description.loop:
            raise InputError(f"{where}loop: {request.loop!r} is not served here; expected {live.description.loop!r}")
        try:
            live.check(request)
        except InputError as error:
            raise InputError(f"{where}{error}") from None
        return arm

    def _question(self, request: RecommendRequest) -> str:
        """What is asked, where a key may ask it again; keyed too, or who asks could be found by trying."""
        if request.idempotency_key is None:
            return ""
        return hmac.new(self._user_key, request.model_dump_json().encode(), hashlib.sha256).hexdigest()


def _response(row: Recommended, *, logged: bool) -> RecommendResponse:
    return RecommendResponse(
        request_id=row.request_id,
        arm=row.arm,
        policy=row.policy,
        slate=row.slate,
        log_prob=sum(row.log_probs),
        log_probs=row.log_probs,
        logged=logged,
    )


def _heard(feedback: Feedback) -> Heard:
    named = feedback.feedback_id is not None
    told = f"id:{feedback.feedback_id}" if named else feedback.model_dump_json(exclude={"feedback_id"})
    return Heard(
        request_id=feedback.request_id,
        # A digest in either case: what a client calls its feedback has no say in how long a key is.
        feedback_id=hashlib.sha256(told.encode()).hexdigest(),
        received_at=time.time_ns() // 1_000,
        clicked=feedback.clicked,
        purchased=feedback.purchased,
        signals=feedback.signals,
        request_signals=feedback.request_signals,
        left=feedback.left,
    )
