"""The endpoint as its clients know it: batches over kept connections, several calls at once, until all are answered."""

import asyncio
import json
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from components.errors import InputError, SlateloopError
from services.messages import (
    MAX_FEEDBACK,
    MAX_RECOMMENDATIONS,
    FeedbackBatchResponse,
    Problem,
    RecommendBatchResponse,
    RecommendResponse,
)

#: One worker computes one answer at a time: a few calls keep it busy while this side encodes and decodes.
CALLS_AT_ONCE = 4
#: How often a call is made before its refusal counts: over half a minute, in which a server may be started again.
ATTEMPTS = 8
#: Seconds until the second call, doubled each time, where the endpoint does not say; and what it may say at most.
FIRST_WAIT, LONGEST_WAIT = 0.25, 60.0
ANSWER_SECONDS = 60.0
Answer = TypeVar("Answer", bound=BaseModel)


@dataclass(frozen=True)
class Endpoint:
    """Where slates are asked for.

    Args:
        url: of the service.
        loop: the recommender that is asked.
        token: sent as a bearer token.
        transport: carries the calls; the network without it.
    """

    url: str
    loop: str = "shop"
    token: str | None = field(default=None, repr=False)
    transport: httpx.AsyncBaseTransport | None = None


class EndpointClient:
    """Open connections to an endpoint; close them by leaving the `with` block.

    A call that is refused for now (429, 503), or that is lost once the endpoint has answered before, is made again: so
    what is asked needs an idempotency key.

    Args:
        endpoint: who is asked.
        on_answers: told after each call for slates how many it answered.
    """

    def __init__(self, endpoint: Endpoint, on_answers: Callable[[int], None] = lambda n_answers: None) -> None:
        self.endpoint = endpoint
        self._on_answers = on_answers
        self._has_answered = False

    def __enter__(self) -> Self:
        token = self.endpoint.token
        try:
            self._http = httpx.AsyncClient(
                base_url=self.endpoint.url,
                headers={"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {}),
                timeout=ANSWER_SECONDS,
                transport=self.endpoint.transport,
            )
        except httpx.InvalidURL as error:
            raise InputError(
                f"{self.endpoint.url}: is no URL: {error}; expected one like http://127.0.0.1:3000"
            ) from None
        # Connections belong to an event loop, so all calls share this one.
        self._runner = asyncio.Runner()
        self._at_once = asyncio.Semaphore(CALLS_AT_ONCE)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._runner.run(self._http.aclose())
        self._runner.close()

    def recommend(self, questions: Sequence[dict[str, Any]]) -> list[RecommendResponse]:
        """A slate for each question, in their order.

        Raises:
            InputError: nobody answers at the URL, or the endpoint refuses the client, the loop or a question.
            SlateloopError: the endpoint fails, or is not ready for longer than `ATTEMPTS` calls.
        """

        async def ask(some: Sequence[dict[str, Any]]) -> RecommendBatchResponse:
            answer = await self._post("/recommend/batch", {"requests": some}, RecommendBatchResponse)
            self._on_answers(len(answer.responses))
            return answer

        answers = self._all(ask(some) for some in _parts(questions, MAX_RECOMMENDATIONS))
        return [response for answer in answers for response in answer.responses]

    def tell(self, pieces: Sequence[dict[str, Any]]) -> None:
        """Hand in feedback.

        Raises:
            InputError: as `recommend`.
            SlateloopError: as `recommend`, or a piece is refused.
        """

        async def hand_in(some: Sequence[dict[str, Any]]) -> FeedbackBatchResponse:
            return await self._post("/feedback/batch", {"feedback": some}, FeedbackBatchResponse)

        answers = self._all(hand_in(some) for some in _parts(pieces, MAX_FEEDBACK))
        refused = [refusal for answer in answers for refusal in answer.refused]
        if refused:
            raise SlateloopError(
                f"{self.endpoint.url}: refuses {len(refused)} of {len(pieces)} pieces of feedback: {refused[0].error}"
            )

    def _all(self, calls: Iterable[Coroutine[Any, Any, Answer]]) -> list[Answer]:
        answers: list[Answer] = []

        # Nothing is returned: while it restores its signal handler the runner formats the task with its result, and for
        # a thousand slates that took a fifth of the client's time.
        async def make() -> None:
            try:
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(call) for call in calls]
            except BaseExceptionGroup as failures:
                raise failures.exceptions[0] from None
            answers.extend(task.result() for task in tasks)

        self._runner.run(make())
        return answers

    async def _post(self, path: str, body: dict[str, Any], answer: type[Answer]) -> Answer:
        async with self._at_once:
            content = json.dumps(body, separators=(",", ":")).encode()
            for attempt in range(1, ATTEMPTS + 1):
                wait = FIRST_WAIT * 2 ** (attempt - 1)
                try:
                    response = await self._http.post(path, content=content)
                except httpx.TransportError as error:
                    if attempt == ATTEMPTS or not self._has_answered:
                        raise self._silence(error) from None
                else:
                    self._has_answered = True
                    if response.status_code == 200:
                        return self._read(response, answer)
                    if attempt == ATTEMPTS or response.status_code not in (429, 503):
                        raise self._refusal(path, response)
                    wait = _retry_after(response, wait)
                await asyncio.sleep(wait)
        raise AssertionError("the last attempt returns or raises")

    def _silence(self, error: httpx.TransportError) -> SlateloopError:
        why = str(error) or type(error).__name__
        if self._has_answered:
            return SlateloopError(f"{self.endpoint.url}: the endpoint answers no longer: {why}")
        return InputError(f"{self.endpoint.url}: no endpoint answers there: {why}; `bentoml serve` starts one")

    def _read(self, response: httpx.Response, answer: type[Answer]) -> Answer:
        try:
            return answer.model_validate_json(response.content)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"])) or "body"
            raise InputError(
                f"{self.endpoint.url}: answers what an endpoint of this version does not: {where}: {first['msg']}"
            ) from None

    def _refusal(self, path: str, response: httpx.Response) -> SlateloopError:
        status = response.status_code
        try:
            sentence = Problem.model_validate_json(response.content).error
        except ValidationError:
            sentence = ""
        if status in (401, 403):
            given = "no token was given" if self.endpoint.token is None else "the token is not accepted"
            return InputError(
                f"{self.endpoint.url}: {sentence or given} ({status}); give a token with --token or SLATELOOP_TOKEN"
            )
        if not sentence and status < 500:
            return InputError(
                f"{self.endpoint.url}: answers {status} to POST {path}; expected an endpoint of Slateloop"
            )
        kind = SlateloopError if status >= 500 or status == 429 else InputError
        return kind(f"{self.endpoint.url}: refuses with {status}: {sentence or response.reason_phrase}")


def _parts(whole: Sequence[dict[str, Any]], size: int) -> list[Sequence[dict[str, Any]]]:
    return [whole[start : start + size] for start in range(0, len(whole), size)]


def _retry_after(response: httpx.Response, usual: float) -> float:
    """Seconds after which the endpoint wants to be asked again."""
    told = response.headers.get("Retry-After", "")
    return min(int(told), LONGEST_WAIT) if told.isdecimal() else usual
