"""The endpoint's HTTP: an ASGI app that BentoML mounts, since its own API layer costs as much as the policy does."""

from collections.abc import Awaitable, Callable
from typing import Any, Protocol, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic.json_schema import models_json_schema
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from components.errors import InputError
from components.interactions.log import KeyReusedError, LogUnavailableError, UnknownRequestError
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
)

_SCHEMA = "#/components/schemas/{model}"
_PROBLEMS = {404: "the feedback is on an unknown request", 409: "the key was used for another question",
             413: "the body is too large", 422: "a field is wrong", 503: "the log cannot be written"}  # fmt: skip
#: Seconds after which a client may try again when the log cannot be written.
RETRY_AFTER = 1
In = TypeVar("In", bound=BaseModel)


class Endpoint(Protocol):
    """What answers."""

    max_body: int

    async def recommend(self, request: RecommendRequest) -> RecommendResponse: ...  # noqa: D102
    async def recommend_batch(self, request: RecommendBatchRequest) -> RecommendBatchResponse: ...  # noqa: D102
    async def feedback(self, feedback: Feedback) -> FeedbackResponse: ...  # noqa: D102
    async def feedback_batch(self, request: FeedbackBatchRequest) -> FeedbackBatchResponse: ...  # noqa: D102


def build_api(endpoint: Callable[[], Endpoint]) -> Starlette:
    """The app.

    Args:
        endpoint: gives the one that answers, which may exist only once requests come.
    """
    models: dict[str, tuple[type[BaseModel], type[BaseModel]]] = {}
    routes: list[Route] = []

    def post(
        path: str, body: type[In], answer: type[BaseModel], act: Callable[[Endpoint, In], Awaitable[BaseModel]]
    ) -> None:
        models[path] = body, answer

        async def handle(request: Request) -> Response:
            asked = endpoint()
            try:
                return _json(
                    await act(asked, body.model_validate_json(await _read(request, asked.max_body), strict=True)), 200
                )
            except ValidationError as error:
                return _problem(422, "; ".join(_sentences(error)))
            except _TooLargeError as error:
                return _problem(413, str(error))
            except UnknownRequestError as error:
                return _problem(404, str(error))
            except KeyReusedError as error:
                return _problem(409, str(error))
            except InputError as error:
                return _problem(422, str(error))
            except LogUnavailableError as error:
                return _problem(503, str(error))

        routes.append(Route(path, handle, methods=["POST"]))

    post("/recommend", RecommendRequest, RecommendResponse, lambda asked, body: asked.recommend(body))
    post(
        "/recommend/batch",
        RecommendBatchRequest,
        RecommendBatchResponse,
        lambda asked, body: asked.recommend_batch(body),
    )
    post("/feedback", Feedback, FeedbackResponse, lambda asked, body: asked.feedback(body))
    post("/feedback/batch", FeedbackBatchRequest, FeedbackBatchResponse, lambda asked, body: asked.feedback_batch(body))
    schema = JSONResponse(_openapi(models))

    async def describe(request: Request) -> Response:
        return schema

    return Starlette(routes=[*routes, Route("/openapi.json", describe)])


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


def _problem(status: int, sentence: str) -> Response:
    response = _json(Problem(error=sentence), status)
    if status == 503:
        response.headers["Retry-After"] = str(RETRY_AFTER)
    return response


def _openapi(models: dict[str, tuple[type[BaseModel], type[BaseModel]]]) -> dict[str, Any]:
    """The schema of all paths, with examples."""
    named = sorted({model for pair in models.values() for model in pair} | {Problem}, key=lambda model: model.__name__)
    _, definitions = models_json_schema([(model, "validation") for model in named], ref_template=_SCHEMA)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Slateloop recommender", "version": "1"},
        "paths": {path: {"post": _operation(path, body, answer)} for path, (body, answer) in models.items()},
        "components": {"schemas": definitions["$defs"]},
    }


def _operation(path: str, body: type[BaseModel], answer: type[BaseModel]) -> dict[str, Any]:
    return {
        "operationId": path.strip("/").replace("/", "_"),
        "summary": body.__doc__,
        "requestBody": {"required": True, "content": _content(body)},
        "responses": {"200": {"description": answer.__doc__, "content": _content(answer)}}
        | {
            str(status): {"description": meaning, "content": _content(Problem)} for status, meaning in _PROBLEMS.items()
        },
    }


def _content(model: type[BaseModel]) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": _SCHEMA.format(model=model.__name__)}}}
