"""The endpoint: what it shows is logged with its log_prob before it is answered, and what it hears is joined to it."""

import asyncio
import gc
import hashlib
import hmac
import time
from collections.abc import Callable, Mapping, Sequence
from uuid import uuid4

import bentoml
import torch

from components.errors import InputError
from components.interactions.log import (
    Heard,
    InteractionLog,
    KeyReusedError,
    LogUnavailableError,
    Recommended,
    ShadowChoice,
    Shown,
)
from components.policies.live_policy import LivePolicy, LiveSession
from components.policies.policy_folder import StoredPolicy
from services.access import Access, RateBound, TokenFile
from services.api import build_api
from services.gathering import Gathering
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
    ReleasesResponse,
    RollbackRequest,
)
from services.metrics import Metrics
from services.policy_store import load_model
from services.readiness import Readiness
from services.releases import Arm, Release, Releases
from services.request_log import RequestLog
from services.serving_release import ReleaseFollower, ServingRelease
from services.settings import ServiceSettings, user_hash

#: Seconds for which a probe of readiness is kept waiting: those of Kubernetes give up after one by default.
READY_SECONDS = 0.8


# BentoML's own metrics have whatever path is asked for as a label; ours are at /metrics in their place. Its traces cost
# a tenth of a request even where nobody collects them.
@bentoml.service(
    name="recommender",
    workers=1,
    logging={"access": {"enabled": False}},
    metrics={"enabled": False},
    tracing={"excluded_urls": ".*"},
)
@bentoml.asgi_app(build_api(lambda: bentoml.get_current_service()))
class Recommender:
    """Recommends slates by the policies that are released, and hears what became of them."""

    def __init__(
        self,
        settings: ServiceSettings | None = None,
        seed: int | None = None,
        load: Callable[[str], StoredPolicy] = load_model,
        request_log: RequestLog | None = None,
    ) -> None:
        settings = settings or ServiceSettings()
        self.max_body = settings.max_body
        self.metrics = Metrics()
        self.request_log = request_log or RequestLog()
        if settings.open:
            self.request_log.warn(
                "SLATELOOP_OPEN is true: anyone may ask, without a token; expected in development only"
            )
        self.access = Access(
            TokenFile(settings.tokens),
            RateBound(settings.rate, settings.burst) if settings.rate else None,
            open=settings.open,
            warn=self.request_log.warn,
        )
        self.generator = torch.Generator()
        if seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(seed)
        self._user_key = settings.user_hash_key()
        self._serve_without_log = settings.serve_without_log
        log = InteractionLog(settings.database)
        log.upgrade()
        self._releases = ReleaseFollower(
            Releases(log),
            load,
            settings.release_seconds,
            warn=self.request_log.warn,
            on_served=lambda release: self.metrics.released(release.loop, release.number),
        )
        self._log = LogWriter(
            log,
            longest_wait=settings.log_seconds,
            longest_queue=settings.log_queue,
            tell_waiting=self.metrics.rows_waiting.set,
        )
        self._passes = Gathering(self._choose)
        self._readiness = Readiness(log, READY_SECONDS)
        torch.set_num_threads(1)
        # Without this the collector walks the whole heap now and then, and requests wait 200 ms for it.
        gc.collect()
        gc.freeze()

    @bentoml.on_shutdown  # type: ignore[untyped-decorator]
    def close(self) -> None:
        """Write what waits for the log."""
        self._releases.close()
        self._readiness.close()
        self._log.close()

    async def __is_ready__(self) -> bool:
        """Whether requests are answered: once something is released, and while the log can be written if it must be."""
        return bool(self._releases.serving) and (self._serve_without_log or await self._readiness.look())

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
        (refusal,) = await self._hear([feedback])
        if refusal is not None:
            raise refusal
        return FeedbackResponse(request_id=feedback.request_id)

    async def feedback_batch(self, request: FeedbackBatchRequest) -> FeedbackBatchResponse:
        """Log pieces of feedback, each by itself.

        Raises:
            LogUnavailableError: the log cannot be written.
        """
        errors = await self._hear(request.feedback)
        refused = tuple(
            Refusal(place=place, error=str(error)) for place, error in enumerate(errors) if error is not None
        )
        return FeedbackBatchResponse(accepted=len(errors) - len(refused), refused=refused)

    async def releases(self) -> ReleasesResponse:
        """What this worker serves now."""
        serving = self._releases.serving
        return ReleasesResponse(releases=tuple(serving[loop].release for loop in sorted(serving)))

    async def roll_back(self, request: RollbackRequest) -> Release:
        """Go back in one step, for every worker.

        Raises:
            InputError: there is nothing to go back to; `ReleaseChangedError` where another release is served by now.
            LogUnavailableError: the database cannot be written.
        """
        return await asyncio.to_thread(
            self._releases.releases.roll_back,
            request.loop,
            request.reason,
            left=request.left,
            require=self._releases.load,
        )

    async def _hear(self, pieces: Sequence[Feedback]) -> list[InputError | None]:
        rows = [_heard(feedback) for feedback in pieces]
        joined = await self._log.heard(rows)
        for row, about in zip(rows, joined, strict=True):
            if isinstance(about, Shown):
                # Another machine's clock may have shown the slate.
                self.metrics.heard(about.loop, max(0, row.received_at - about.shown_at) / 1e6)
        return [about if isinstance(about, InputError) else None for about in joined]

    async def _recommend(self, requests: Sequence[RecommendRequest], *, batch: bool) -> list[RecommendResponse]:
        # One look: a release that changes meanwhile is for whoever asks next.
        serving = self._releases.serving
        by_arm: dict[tuple[str, Arm], list[int]] = {}
        for place, request in enumerate(requests):
            try:
                by_arm.setdefault((request.loop, _answering_arm(serving, request)), []).append(place)
            except InputError as error:
                raise InputError(f"{f'requests.{place}.' if batch else ''}{error}") from None
        answers = await asyncio.gather(
            *(
                self._passes.ask((serving[loop], arm), [requests[place] for place in places])
                for (loop, arm), places in by_arm.items()
            )
        )
        rows: dict[int, tuple[Recommended, bool]] = {}
        for places, answered in zip(by_arm.values(), answers, strict=True):
            rows |= zip(places, answered, strict=True)
        chosen = [rows[place] for place in range(len(requests))]
        in_order = [row for row, _ in chosen]
        try:
            standing = await self._log.recommended(in_order)
        except LogUnavailableError:
            if not self._serve_without_log:
                raise
            self.metrics.recommended(chosen, in_order)
            return [_response(row, logged=False) for row in in_order]
        except KeyReusedError as error:
            if batch:
                error.args = (f"requests.{error.place}.{error}",)
            raise
        self.metrics.recommended(chosen, standing)
        return [_response(one, logged=True) for one in standing]

    def _choose(
        self, answering: tuple[ServingRelease, Arm], requests: Sequence[RecommendRequest]
    ) -> list[tuple[Recommended, bool]]:
        """A slate for each request, and whether it explores."""
        serving, arm = answering
        policy, live = serving.policy_of(arm)
        now = time.time_ns() // 1_000
        return [
            (
                Recommended(
                    request_id=uuid4().hex,
                    loop=request.loop,
                    user_id=user_hash(self._user_key, request.user_id),
                    session_id=request.session_id,
                    shown_at=now,
                    candidates=live.candidates(request),
                    catalog=request.candidates is None,
                    slate=chosen.slate,
                    log_probs=chosen.log_probs,
                    events=tuple(event.model_dump() for event in request.events),
                    context=request.context,
                    policy=policy,
                    arm=arm,
                    experiment=serving.release.experiment,
                    question=self._question(request),
                    idempotency_key=request.idempotency_key,
                    shadow=shadow,
                ),
                chosen.explores,
            )
            for request, chosen, shadow in zip(
                requests,
                live.recommend(requests, self.generator),
                self._shadow_choices(requests, serving, live),
                strict=True,
            )
        ]

    def _shadow_choices(
        self, requests: Sequence[RecommendRequest], serving: ServingRelease, live: LivePolicy
    ) -> list[ShadowChoice | None]:
        """What the shadow would show; nothing where it cannot be asked what was asked of the policy that answers."""
        choices: list[ShadowChoice | None] = [None] * len(requests)
        tag = serving.release.shadow
        if tag is None:
            return choices
        shadow = serving.policies[tag]
        # The same candidates for both, whatever catalogs they know.
        asked = [request.model_copy(update={"candidates": live.candidates(request)}) for request in requests]
        places = [place for place, request in enumerate(asked) if _can_be_asked(shadow, request)]
        try:
            chosen = shadow.recommend([asked[place] for place in places], self.generator) if places else []
        except Exception as error:  # whatever it is, it is not shown to anybody
            self.request_log.warn(f"shadow {tag} cannot be asked: {type(error).__name__}")
            return choices
        for place, choice in zip(places, chosen, strict=True):
            choices[place] = ShadowChoice(tag, choice.slate, choice.log_probs)
        return choices

    def _question(self, request: RecommendRequest) -> str:
        """What is asked, where a key may ask it again; keyed too, or who asks could be found by trying."""
        if request.idempotency_key is None:
            return ""
        return hmac.new(self._user_key, request.model_dump_json().encode(), hashlib.sha256).hexdigest()


def _answering_arm(serving: Mapping[str, ServingRelease], request: RecommendRequest) -> Arm:
    """The arm that serves the user, whose policy can answer.

    Raises:
        InputError: nothing is released of the loop, or the request does not fit the policy.
    """
    if request.loop not in serving:
        raise InputError(f"loop: nothing is released of this loop; the loops with a release are {sorted(serving)}")
    arm = serving[request.loop].arm_of(request.user_id)
    _, live = serving[request.loop].policy_of(arm)
    live.check(request)
    return arm


def _can_be_asked(live: LivePolicy, session: LiveSession) -> bool:
    try:
        live.check(session)
    except InputError:
        return False
    return True


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
