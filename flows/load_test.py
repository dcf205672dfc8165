"""How long an endpoint takes at a given rate: an open loop, in which a slow answer delays no request but its own count.

A request's time runs from when it was due. A client that waits for each answer before it asks again would count a
stall once, and leave out all those who would have come during it.
"""

import asyncio
import json
import ssl
import time
from collections import Counter
from dataclasses import dataclass
from urllib.parse import urlsplit

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from components.errors import InputError

#: Seconds after which a request counts as not answered.
PATIENCE = 30.0


@dataclass(frozen=True)
class Address:
    """Where an endpoint listens."""

    host: str
    port: int
    tls: bool = False


@dataclass(frozen=True)
class Reply:
    """What became of a request."""

    seconds: float
    """From when it was due to the end of its answer."""
    status: int | None
    """None where there was no whole answer."""


class LoadTest(BaseModel):
    """What a load test found."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: str
    rate: float = Field(description="Requests a second that were due.")
    seconds: float = Field(description="Seconds during which they were due.")
    requests: int = Field(description="How many were sent.")
    answered_per_second: float = Field(description="Requests answered with 200, a second until the last answer.")
    p50: float | None = Field(description="Milliseconds from when due to the answer 200; null where there was none.")
    p90: float | None
    p99: float | None
    longest: float | None
    statuses: dict[str, int] = Field(description="Requests by status; `no answer` where there was none.")


def load_test(url: str, body: bytes, *, rate: float, seconds: float, connections: int, token: str | None) -> LoadTest:
    """Ask an endpoint for recommendations at a rate.

    Args:
        url: of the endpoint, such as http://127.0.0.1:3000.
        body: of every request, as JSON.
        rate: requests a second.
        seconds: how long.
        connections: at most so many requests wait for an answer at once; later ones wait for their turn, which counts.
        token: bearer token.

    Raises:
        InputError: the URL is none.
    """
    address = read_url(url)
    n_requests = max(1, round(rate * seconds))
    begun = time.perf_counter()
    replies = asyncio.run(
        ask(address, "/recommend", body, n_clients=connections, n_requests=n_requests, pace=rate, token=token)
    )
    took = time.perf_counter() - begun
    good = 1e3 * np.array([reply.seconds for reply in replies if reply.status == 200])
    p50, p90, p99, longest = np.percentile(good, [50, 90, 99, 100]).tolist() if good.size else [None] * 4
    counts = Counter("no answer" if reply.status is None else str(reply.status) for reply in replies)
    return LoadTest(
        url=url,
        rate=rate,
        seconds=seconds,
        requests=n_requests,
        answered_per_second=good.size / took,
        p50=p50,
        p90=p90,
        p99=p99,
        longest=longest,
        statuses=dict(sorted(counts.items())),
    )


def small_question(loop: str) -> bytes:
    """A request of a user who came once, for a slate of twelve items."""
    question = {"loop": loop, "user_id": "load-test", "candidates": [f"item-{number:04d}" for number in range(1, 13)]}
    return json.dumps(question).encode()


def read_url(url: str) -> Address:
    """The address that a URL names.

    Raises:
        InputError: it names none.
    """
    try:
        parts = urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname and parts.path in ("", "/"):
            tls = parts.scheme == "https"
            return Address(parts.hostname, parts.port or (443 if tls else 80), tls)
    except ValueError:
        pass
    raise InputError(f"url {url!r}: expected http://HOST:PORT")


async def ask(
    address: Address,
    path: str,
    body: bytes,
    *,
    n_clients: int,
    n_requests: int,
    pace: float | None = None,
    token: str | None = None,
) -> list[Reply]:
    """Put one request again and again; what became of each.

    Args:
        address: of the endpoint.
        path: that is asked.
        body: of every request; empty for a GET.
        n_clients: connections, each with one request at a time.
        n_requests: of all clients together.
        pace: requests a second; a request's time then runs from when it was due. None: as fast as they are answered.
        token: bearer token.
    """
    authorization = f"Authorization: Bearer {token}\r\n" if token else ""
    message = (
        f"{'POST' if body else 'GET'} {path} HTTP/1.1\r\nHost: {address.host}\r\n{authorization}"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode() + body
    replies: list[Reply] = []
    due = iter(range(n_requests))
    begun = time.perf_counter()

    async def client() -> None:
        connection: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        for number in due:
            started = time.perf_counter()
            if pace is not None:
                planned = begun + number / pace
                await asyncio.sleep(max(0.0, planned - started))
                started = planned
            status: int | None = None
            try:
                async with asyncio.timeout(PATIENCE):
                    connection = connection or await _connect(address)
                    status = await _exchange(*connection, message)
            except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, ValueError):
                if connection is not None:
                    connection[1].close()
                connection = None
            replies.append(Reply(time.perf_counter() - started, status))
        if connection is not None:
            connection[1].close()

    await asyncio.gather(*(client() for _ in range(min(n_clients, n_requests))))
    return replies


async def _connect(address: Address) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    tls = ssl.create_default_context() if address.tls else None
    return await asyncio.open_connection(address.host, address.port, ssl=tls)


async def _exchange(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, message: bytes) -> int:
    writer.write(message)
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
    await reader.readexactly(int(head.partition("content-length:")[2].partition("\r\n")[0] or 0))
    return int(head.split(" ", 2)[1])
