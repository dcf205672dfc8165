"""The endpoint's HTTP: an ASGI app that BentoML mounts, since its own API layer costs as much as the policy does."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any, Protocol

from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel, ValidationError
from pydantic.json_schema import models_json_schema
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from components.errors import InputError
from components.interactions.log import KeyReusedError, LogUnavailableError, UnknownRequestError
from services.access import Access, ForbiddenError, RateExceededError, Scope, UnauthorizedError
from services.messages import (
    Feedback,
    FeedbackBatchRequest,
    FeedbackBatchResponse,
    FeedbackResponse,
    Problem,
    RecommendBatchRequest,
    RecommendBatchResponse,
    RecommendRequest,
    RecommendResponse,
    ReleasesResponse,
    RollbackRequest,
)
from services.metrics import Metrics
from services.releases import Release, ReleaseChangedError
from services.request_log import Asked, Observed, RequestLog

_SCHEMA = "#/components/schemas/{model}"
_PROBLEMS = {401: "there is no token, or none that is known", 403: "the token lacks the scope",
             404: "the feedback is on an unknown request",
             409: "the key was used for another question, or the release has changed",
             413: "the body is too large", 422: "a field is wrong", 429: "the token asks too often",
             500: "an unexpected error", 503: "the log cannot be written"}  # fmt: skip
_METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
#: Seconds after which a client may try again when the log cannot be written.
RETRY_AFTER = 1


class Endpoint(Protocol):
    """What answers."""

    max_body: int
    access: Access
    metrics: Metrics
    request_log: RequestLog

    async def recommend(self, request: RecommendRequest) -> RecommendResponse: ...  # noqa: D102
    async def recommend_batch(self, request: RecommendBatchRequest) -> RecommendBatchResponse: ...  # noqa: D102
    async def feedback(self, feedback: Feedback) -> FeedbackResponse: ...  # noqa: D102
    async def feedback_batch(self, request: FeedbackBatchRequest) -> FeedbackBatchResponse: ...  # noqa: D102
    async def releases(self) -> ReleasesResponse: ...  # noqa: D102
    async def roll_back(self, request: RollbackRequest) -> Release: ...  # noqa: D102


@dataclass(frozen=True)
class Operation:
    """One thing that the endpoint does."""

    method: str
    path: str
    scope: Scope
    """That a token needs."""
    body: type[BaseModel] | None
    answer: type[BaseModel]
    act: Callable[[Endpoint, Any], Awaitable[BaseModel]]
    """Takes the endpoint and the body."""


OPERATIONS = (
    Operation("POST", "/recommend", Scope.RECOMMEND, RecommendRequest, RecommendResponse,
              lambda asked, body: asked.recommend(body)),
    Operation("POST", "/recommend/batch", Scope.RECOMMEND, RecommendBatchRequest, RecommendBatchResponse,
              lambda asked, body: asked.recommend_batch(body)),
    Operation("POST", "/feedback", Scope.FEEDBACK, Feedback, FeedbackResponse,
              lambda asked, body: asked.feedback(body)),
    Operation("POST", "/feedback/batch", Scope.FEEDBACK, FeedbackBatchRequest, FeedbackBatchResponse,
              lambda asked, body: asked.feedback_batch(body)),
    Operation("GET", "/release", Scope.RELEASE, None, ReleasesResponse, lambda asked, body: asked.releases()),
    Operation("POST", "/release/rollback", Scope.RELEASE, RollbackRequest, Release,
              lambda asked, body: asked.roll_back(body)),
)  # fmt: skip


def build_api(endpoint: Callable[[], Endpoint]) -> Starlette:
    """The app.

    Args:
        endpoint: gives the one that answers, which may exist only once requests come.
    """
    schema = JSONResponse(_openapi())

    async def describe(request: Request) -> Response:
        _asked(request).path = "/openapi.json"
        return schema

    async def measure(request: Request) -> Response:
        _asked(request).path = "/metrics"
        return Response(await run_in_threadpool(endpoint().metrics.render), media_type=CONTENT_TYPE_LATEST)

    async def unknown(request: Request) -> Response:
        path = f"/{request.path_params['path']}"
        methods = ", ".join(one.method for one in OPERATIONS if one.path == path)
        if not methods:
            raise HTTPException(404, "path: is unknown; /openapi.json names all of them")
        _asked(request).path = path
        raise HTTPException(405, f"method: is not answered here; expected {methods}", {"Allow": methods})

    async def refuse(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return _problem(error.status_code, error.detail, error.headers)

    return Starlette(
        routes=[
            *(Route(one.path, _handler(one, endpoint), methods=[one.method]) for one in OPERATIONS),
            Route("/openapi.json", describe),
            Route("/metrics", measure),
            Route("/{path:path}", unknown, methods=_METHODS),
        ],
        middleware=[Middleware(Observed, endpoint)],
        exception_handlers={HTTPException: refuse},
    )


def _handler(operation: Operation, endpoint: Callable[[], Endpoint]) -> Callable[[Request], Awaitable[Response]]:
    async def handle(request: Request) -> Response:
        asked, answering = _asked(request), endpoint()
        asked.path = operation.path
        try:
            # Before the body is read: who may not ask costs a digest, whatever is sent.
            asked.token = answering.access.admit(request.headers.get("authorization"), operation.scope)
            body: BaseModel | None = None
            if operation.body is not None:
                sent = await _read(request, answering.max_body)
                body = operation.body.model_validate_json(sent, strict=True)
            answer = await operation.act(answering, body)
        except UnauthorizedError as error:
            return _problem(401, str(error), {"WWW-Authenticate": "Bearer"})
        except ForbiddenError as error:
            return _problem(403, str(error))
        except RateExceededError as error:
            return _problem(429, str(error), {"Retry-After": str(ceil(error.seconds))})
        except ValidationError as error:
            return _problem(422, "; ".join(_sentences(error)))
        except _TooLargeError as error:
            return _problem(413, str(error))
        except UnknownRequestError as error:
            return _problem(404, str(error))
        except (KeyReusedError, ReleaseChangedError) as error:
            return _problem(409, str(error))
        except InputError as error:
            return _problem(422, str(error))
        except LogUnavailableError as error:
            # Hosts and files are for those who run the service.
            asked.cause = error.cause
            return _problem(503, error.sentence, {"Retry-After": str(RETRY_AFTER)})
        _note(asked, body, answer)
        return _json(answer, 200)

    return handle


def _asked(request: Request) -> Asked:
    asked: Asked = request.scope["asked"]
    return asked


def _note(asked: Asked, body: BaseModel | None, answer: BaseModel) -> None:
    """What the log says of recommendations: which loop was asked, and who answered."""
    questions: Sequence[RecommendRequest] = ()
    answers: Sequence[RecommendResponse] = ()
    if isinstance(body, RecommendRequest) and isinstance(answer, RecommendResponse):
        questions, answers = (body,), (answer,)
    elif isinstance(body, RecommendBatchRequest) and isinstance(answer, RecommendBatchResponse):
        questions, answers = body.requests, answer.responses
    if answers:
        asked.loop = ",".join(sorted({question.loop for question in questions}))
        asked.arm = ",".join(sorted({one.arm for one in answers}))
        asked.policy = ",".join(sorted({one.policy for one in answers}))


class _TooLargeError(Exception):
    """The body is larger than the service reads."""


async def _read(request: Request, limit: int) -> bytes:
    """The body, given up as soon as it is known to be too large."""
    message = f"body: is larger than {limit} bytes"
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limit:
        raise _TooLargeError(message)
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise _TooLargeError(message)
    return bytes(body)


def _sentences(error: ValidationError) -> list[str]:
    """The first things that are wrong, each with its field; never what was sent, which may be long or private."""
    problems = error.errors(include_url=False, include_context=False, include_input=False)[:5]
    return [f"{'.'.join(map(str, problem['loc'])) or 'body'}: {problem['msg']}" for problem in problems]


def _json(answer: BaseModel, status: int) -> Response:
    return Response(answer.model_dump_json(), status, media_type="application/json")


def _problem(status: int, sentence: str, headers: Mapping[str, str] | None = None) -> Response:
    return Response(Problem(error=sentence).model_dump_json(), status, headers, media_type="application/json")


def _openapi() -> dict[str, Any]:
    """The schema of all paths, with examples."""
    models = {model for one in OPERATIONS for model in (one.body, one.answer) if model is not None} | {Problem}
    named = sorted(models, key=lambda model: model.__name__)
    _, definitions = models_json_schema([(model, "validation") for model in named], ref_template=_SCHEMA)
    paths: dict[str, dict[str, Any]] = {}
    for one in OPERATIONS:
        paths.setdefault(one.path, {})[one.method.lower()] = _described(one)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Slateloop recommender", "version": "1"},
        "paths": paths,
        "components": {
            "schemas": definitions["$defs"],
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }


def _described(operation: Operation) -> dict[str, Any]:
    body, answer = operation.body, operation.answer
    asks = {} if body is None else {"requestBody": {"required": True, "content": _content(body)}}
    return asks | {
        "operationId": operation.path.strip("/").replace("/", "_"),
        "summary": (body or answer).__doc__,
        "security": [{"token": [operation.scope]}],
        "responses": {"200": {"description": answer.__doc__, "content": _content(answer)}}
        | {
            str(status): {"description": meaning, "content": _content(Problem)} for status, meaning in _PROBLEMS.items()
        },
    }


def _content(model: type[BaseModel]) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": _SCHEMA.format(model=model.__name__)}}}
