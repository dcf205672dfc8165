"""One line of JSON for each request, and what every answer has: an id, a time, and no trace of an error of ours.

A line never holds what was sent: no body, no user id, no token, no path that is none of ours. An unexpected error's
line has the places in the code that led to it, and the error's type; its message may repeat what was sent.
"""

import json
import re
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol, TextIO
from uuid import uuid4

from starlette.requests import ClientDisconnect

from services.access import PREFIX
from services.messages import Problem
from services.metrics import Metrics

#: Ids of requests that are taken from clients.
SANE = re.compile(r"[A-Za-z0-9._-]{1,64}")
#: What is logged where the client left before there was an answer.
GONE = 499
#: What stands for every path that is none of ours: a client's words are neither logged nor counted.
OTHER = "other"
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


@dataclass
class Asked:
    """What is known of a request while it is answered."""

    request_id: str
    """From the header X-Request-ID, or made."""
    path: str = OTHER
    token: str | None = None
    loop: str | None = None
    arm: str | None = None
    policy: str | None = None
    status: int = GONE
    cause: str | None = None
    """Why the database is not available."""
    error: BaseException | None = None


class RequestLog:
    """Lines of JSON on a stream; the standard error output by default."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream

    def warn(self, message: str) -> None:
        """Say what whoever runs the service should know."""
        self._write({"level": "warning", "message": message})

    def answered(self, asked: Asked, method: str, seconds: float) -> None:
        """Log a request."""
        line: dict[str, Any] = {
            "level": "info" if asked.error is None else "error",
            "request_id": asked.request_id,
            "method": method,
            "path": asked.path,
            "status": asked.status,
            "milliseconds": round(1e3 * seconds, 3),
            "token": asked.token,
            "loop": asked.loop,
            "arm": asked.arm,
            "policy": asked.policy,
            "cause": asked.cause,
        }
        if asked.error is not None:
            line["error"] = type(asked.error).__name__
            line["traceback"] = traceback.format_tb(asked.error.__traceback__)
        self._write(line)

    def _write(self, line: dict[str, Any]) -> None:
        known = {name: value for name, value in line.items() if value is not None}
        stream = self._stream or sys.stderr
        stream.write(json.dumps({"time": datetime.now(UTC).isoformat(timespec="milliseconds")} | known) + "\n")
        stream.flush()


class Observing(Protocol):
    """What observes requests."""

    request_log: RequestLog
    metrics: Metrics


class Observed:
    """An ASGI app whose requests are named, timed, counted and logged, and whose errors are a sentence."""

    def __init__(self, app: App, observing: Callable[[], Observing]) -> None:
        self._app = app
        self._observing = observing

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        asked = Asked(_request_id(scope["headers"]))
        scope["asked"] = asked

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                asked.status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", asked.request_id.encode())]
            await send(message)

        try:
            await self._app(scope, receive, answer)
        except ClientDisconnect:
            # Nobody reads it, but BentoML's server waits at its end for every request to have been answered.
            await send({"type": "http.response.start", "status": GONE, "headers": []})
            await send({"type": "http.response.body", "body": b""})
        except Exception as error:
            asked.error = error
            if asked.status == GONE:
                await _apologize(asked.request_id, answer)
        finally:
            seconds = time.perf_counter() - started
            observing = self._observing()
            observing.metrics.answered(asked.path, asked.status, seconds)
            observing.request_log.answered(asked, scope["method"], seconds)


def _request_id(headers: list[tuple[bytes, bytes]]) -> str:
    for name, value in headers:
        if name == b"x-request-id":
            told = value.decode("latin-1")
            if SANE.fullmatch(told) and PREFIX not in told:
                return told
            break
    return uuid4().hex


async def _apologize(request_id: str, send: Send) -> None:
    body = Problem(error=f"request {request_id}: failed unexpectedly; the service's log says where").model_dump_json()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 500, "headers": headers})
    await send({"type": "http.response.body", "body": body.encode()})
