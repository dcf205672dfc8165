"""Against a server of a few lines, whose stalls and refusals are known."""

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field

import pytest

from components.errors import InputError
from flows.load_test import Address, load_test, read_url


@dataclass
class Server:
    """Answers 200, but for what it was told."""

    stall: float = 0.0
    """Seconds that the first request takes."""
    statuses: list[int | None] = field(default_factory=list)
    """Of the first requests; None hangs up."""
    heads: list[str] = field(default_factory=list)
    port: int = 0

    async def run(self, started: "Future[None]", ended: asyncio.Event) -> None:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        started.set_result(None)
        await ended.wait()
        server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                await reader.readexactly(int(head.lower().partition("content-length:")[2].partition("\r\n")[0]))
                self.heads.append(head)
                stall, self.stall = self.stall, 0.0
                await asyncio.sleep(stall)
                status = self.statuses.pop(0) if self.statuses else 200
                if status is None:
                    break
                writer.write(f"HTTP/1.1 {status} X\r\nContent-Length: 2\r\n\r\n{{}}".encode())
        except asyncio.IncompleteReadError:
            pass
        writer.close()


@pytest.fixture
def server() -> Iterator[Server]:
    server, started, ended = Server(), Future[None](), asyncio.Event()
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_until_complete, args=(server.run(started, ended),))
    thread.start()
    started.result(timeout=10)
    yield server
    loop.call_soon_threadsafe(ended.set)
    thread.join()
    loop.close()


def test_a_stall_counts_for_all_who_would_have_come_during_it(server: Server) -> None:
    server.stall = 0.5
    found = load_test(f"http://127.0.0.1:{server.port}", b"{}", rate=100, seconds=1, connections=1, token=None)
    assert (found.requests, found.statuses) == (100, {"200": 100})
    assert found.longest is not None and found.longest >= 500
    # Half of the requests were due while the first one stalled, the last of them at its end.
    assert found.p90 is not None and found.p90 > 300


def test_requests_carry_the_token_and_what_is_refused_is_counted_by_its_status(server: Server) -> None:
    server.statuses = [429, 503, None, 429]
    found = load_test(f"http://127.0.0.1:{server.port}/", b"{}", rate=50, seconds=0.2, connections=1, token="secret")
    assert found.statuses == {"200": 6, "429": 2, "503": 1, "no answer": 1}
    assert all("Authorization: Bearer secret\r\n" in head for head in server.heads)
    assert "secret" not in found.model_dump_json()


def test_where_nobody_listens_there_is_no_answer_and_no_time(server: Server) -> None:
    found = load_test("http://127.0.0.1:9", b"{}", rate=50, seconds=0.1, connections=2, token=None)
    assert (found.p50, found.statuses) == (None, {"no answer": 5})


def test_a_url_is_an_address() -> None:
    assert read_url("http://shop.example:3000") == Address("shop.example", 3000)
    assert read_url("https://shop.example/") == Address("shop.example", 443, tls=True)
    for url in ("shop.example:3000", "ftp://x", "http://", "http://x:y", "http://x/recommend"):
        with pytest.raises(InputError, match="expected http://HOST:PORT"):
            read_url(url)
