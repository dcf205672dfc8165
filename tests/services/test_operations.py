"""What an operator sees and relies on, over the HTTP of a Bento that a process of its own serves."""

import asyncio
import io
import json
import socket
import sqlite3
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
from bento_server import asked_again, release, served
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from components.evaluation.support import SUPPORT_FLOOR
from components.interactions.log import InteractionLog
from components.policies.live_policy import LivePolicy
from components.policies.policy_folder import StoredPolicy
from services.access import Scope, TokenFile
from services.api import OPERATIONS, Operation, build_api
from services.messages import RecommendRequest, RecommendResponse
from services.metrics import SHARED, Metrics, below_floor
from services.packaging import build_bento
from services.policy_store import load_model
from services.readiness import Readiness
from services.recommender import Recommender
from services.request_log import RequestLog
from services.settings import ServiceSettings

USER = "user-whom-nobody-may-find"
BODY: dict[str, Any] = {"loop": "shop", "user_id": USER, "candidates": [f"item-{number:04d}" for number in range(1, 9)]}
INJECTION = [
    "'; DROP TABLE recommendations; --",
    '{"$gt": ""}',
    "${jndi:ldap://x}",
    "<script>",
    "%s%n\\u0000",
    "名前 🙂",
]


@dataclass
class Served:
    """A Bento that asks for tokens."""

    address: str
    tokens: TokenFile
    home: Path
    output: Path

    def __post_init__(self) -> None:
        self.shop = self.tokens.create("shop", ["recommend", "feedback"])
        self.ops = self.tokens.create("ops", ["release"])

    def post(self, path: str, body: Any, token: str | None = None, **headers: str) -> httpx.Response:
        headers |= {"Authorization": f"Bearer {token or self.shop}"}
        return httpx.post(self.address + path, json=body, headers=headers, timeout=20)

    def lines(self) -> list[dict[str, Any]]:
        """Of the request log; of a line that is being written a reader may see a part."""
        whole, _, _ = self.output.read_text().rpartition("\n")
        return [json.loads(line) for line in whole.splitlines() if line.startswith("{")]

    def line(self, request_id: str) -> dict[str, Any]:
        """Of one request; it is written once the answer is on its way."""
        deadline = time.monotonic() + 10
        while not (found := [line for line in self.lines() if line.get("request_id") == request_id]):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        (line,) = found
        return line

    def metrics(self) -> dict[tuple[str, ...], float]:
        """Each sample by its name and the values of its labels."""
        text = httpx.get(f"{self.address}/metrics", timeout=20).text
        return {
            (sample.name, *(value for name, value in sorted(sample.labels.items()) if name != "pid")): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def sent(self, head: str, body: bytes = b"") -> bytes:
        """What is answered to bytes of which no more come."""
        host, _, port = self.address.removeprefix("http://").partition(":")
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(head.encode() + body)
            answer = b""
            while not answer.endswith(b"}"):
                answer += connection.recv(65_536)
            return answer


@pytest.fixture(scope="module")
def service(policy_tag: str, bentoml_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    variables = {"SLATELOOP_HOME": str(folder / "home"), "SLATELOOP_OPEN": "false"}
    release(f"sqlite:///{folder / 'home' / 'interactions.db'}", policy_tag)
    with served(build_bento(), bentoml_home, folder, variables) as address:
        endpoint = Served(address, TokenFile(folder / "home" / "tokens.json"), folder / "home", folder / "server.txt")
        while endpoint.post("/recommend", BODY).status_code == 401:  # the file is looked at once a second
            time.sleep(0.2)
        yield endpoint


def logged(home: Path, table: str) -> list[dict[str, Any]]:
    with sqlite3.connect(home / "interactions.db") as database:
        database.row_factory = sqlite3.Row
        return [dict(row) for row in database.execute(f"SELECT * FROM {table}")]


def test_a_served_bento_logs_what_it_shows_and_hears(service: Served, policy_tag: str) -> None:
    stored, tables = load_model(policy_tag), ("recommendations", "feedback")
    before = [len(logged(service.home, table)) for table in tables]
    clicked = [False, True, None, False]
    past = {"slate": ["item-0009", "item-0003", "new-a", "item-0001"], "clicked": clicked, "purchased": clicked}
    body = BODY | {
        "candidates": ["item-0001", "item-0002", "item-0003", "new-a", "item-0004", "new-b"],
        "context": {"device": "phone", "segment": "nobody-knows"},
        "events": [{"type": "view", "item_id": "item-0002"}],
        "past_requests": [past | {"context": {"device": "phone"}}],
    }
    for _ in range(3):
        answer = service.post("/recommend", body)
        assert answer.status_code == 200, answer.text
        told = answer.json()
        assert (told["policy"], told["arm"]) == (policy_tag, "champion")
        assert told["log_prob"] == pytest.approx(asked_again(stored, body, told["slate"]), abs=1e-5)
        piece = {"request_id": told["request_id"], "clicked": [True, False, False, False]}
        assert service.post("/feedback", piece).status_code == 200
    refused = service.post("/recommend", body | {"loop": "another"})
    assert refused.status_code == 422
    assert "the loops with a release are ['shop']" in refused.json()["error"]
    assert [len(logged(service.home, table)) for table in tables] == [number + 3 for number in before]
    described = httpx.get(f"{service.address}/openapi.json", timeout=20).json()
    assert described["info"]["title"] == "Slateloop recommender"


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: f"{operation.method} {operation.path}")
def test_every_operation_needs_a_token_with_its_scope(service: Served, operation: Operation) -> None:
    def ask(headers: dict[str, str]) -> httpx.Response:
        return httpx.request(
            operation.method, service.address + operation.path, headers=headers, content=b"{}", timeout=20
        )

    for headers in ({}, {"Authorization": "Bearer slateloop_nobody"}, {"Authorization": "Basic c2hvcDp4"}):
        refused = ask(headers)
        assert (refused.status_code, refused.headers["WWW-Authenticate"]) == (401, "Bearer")
        assert set(refused.json()) == {"error"}
    own, other = (service.ops, service.shop) if operation.scope is Scope.RELEASE else (service.shop, service.ops)
    assert ask({"Authorization": f"Bearer {other}"}).status_code == 403
    assert ask({"Authorization": f"Bearer {own}"}).status_code == (200 if operation.body is None else 422)


def test_who_may_not_ask_is_refused_before_the_body_is_read(service: Served) -> None:
    head = "POST /recommend HTTP/1.1\r\nHost: x\r\nContent-Length: 100000000\r\n"
    assert service.sent(f"{head}\r\n").startswith(b"HTTP/1.1 401 ")
    assert service.sent(f"{head}Authorization: Bearer {service.ops}\r\n\r\n").startswith(b"HTTP/1.1 403 ")


def test_a_body_of_100_mb_is_refused_early_whether_or_not_it_says_its_length(service: Served) -> None:
    head = f"POST /recommend HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {service.shop}\r\n"
    assert service.sent(f"{head}Content-Length: 100000000\r\n\r\n").startswith(b"HTTP/1.1 413 ")
    chunk = b"%x\r\n%s\r\n" % (500_000, b" " * 500_000)
    answer = service.sent(f"{head}Transfer-Encoding: chunked\r\n\r\n", 5 * chunk)  # of 200 that would come
    assert answer.startswith(b"HTTP/1.1 413 ") and b"body: is larger than 2000000 bytes" in answer


def test_probes_and_descriptions_are_open(service: Served) -> None:
    for path in ("/openapi.json", "/readyz", "/livez", "/healthz", "/metrics"):
        assert httpx.get(service.address + path, timeout=20).status_code == 200, path
    schema = httpx.get(f"{service.address}/openapi.json", timeout=20).json()
    assert schema["components"]["securitySchemes"] == {"token": {"type": "http", "scheme": "bearer"}}
    for path, methods in schema["paths"].items():
        for described in methods.values():
            assert described["security"] == [{"token": [path.split("/")[1]]}]
            assert {"401", "403", "429"} <= set(described["responses"])


def test_a_token_is_made_and_revoked_without_a_restart(service: Served) -> None:
    token = service.tokens.create("guest", ["recommend"])
    deadline = time.monotonic() + 5
    while (status := service.post("/recommend", BODY, token=token).status_code) != 200:
        assert status == 401 and time.monotonic() < deadline
        time.sleep(0.1)
    service.tokens.revoke("guest")
    time.sleep(1.1)
    assert service.post("/recommend", BODY, token=token).status_code == 401


def test_other_paths_and_methods_are_refused_in_json(service: Served) -> None:
    unknown = httpx.get(f"{service.address}/nothing/{USER}", timeout=20)
    assert unknown.status_code == 404 and unknown.json()["error"].startswith("path: is unknown")
    wrong = httpx.get(f"{service.address}/recommend", timeout=20)
    assert (wrong.status_code, wrong.headers["Allow"]) == (405, "POST")
    assert wrong.json()["error"] == "method: is not answered here; expected POST"


def test_what_is_counted_is_what_was_done(service: Served) -> None:
    before = service.metrics()
    bodies = [BODY | {"slate_size": size} for size in (1, 3, 3, 8)]
    slates = [service.post("/recommend", body).json() for body in bodies]
    keyed = BODY | {"idempotency_key": "again", "slate_size": 2}
    for _ in range(2):
        service.post("/recommend", keyed)
    service.post("/recommend/batch", {"requests": [BODY, BODY]})
    piece = {"request_id": slates[0]["request_id"], "clicked": [True]}
    service.post("/feedback", piece)
    service.post("/feedback/batch", {"feedback": [piece, {"request_id": "nobody", "left": True}]})
    service.post("/recommend", BODY | {"loop": "a-loop-that-a-client-made-up"})
    httpx.get(f"{service.address}/a-path-that-a-client-made-up", timeout=20)
    after = service.metrics()

    def more(*key: str) -> float:
        return after.get(key, 0.0) - before.get(key, 0.0)

    arm = "champion", "shop"
    assert more("slateloop_recommendations_total", *arm) == 8
    assert more("slateloop_slate_length_count", *arm) == 7
    assert more("slateloop_slate_length_sum", *arm) == 1 + 3 + 3 + 8 + 2 + 4 + 4
    assert 0 <= more("slateloop_explored_slates_total", *arm) <= 7
    assert more("slateloop_feedback_delay_seconds_count", "shop") == 2
    assert 0 < more("slateloop_feedback_delay_seconds_sum", "shop") < 60
    assert more("slateloop_request_seconds_count", "/recommend", "200") == 6
    assert more("slateloop_request_seconds_count", "/recommend", "422") == 1
    assert more("slateloop_request_seconds_count", "/feedback/batch", "200") == 1
    assert more("slateloop_request_seconds_count", "other", "404") == 1
    assert after["slateloop_log_rows_waiting",] == 0
    assert not any("made-up" in part or USER in part for key in after for part in key)


def test_each_request_is_a_line_and_named_by_the_client_s_id(service: Served, policy_tag: str) -> None:
    answer = service.post("/recommend", BODY, **{"X-Request-ID": "trace-7.a_b"})
    assert answer.headers["X-Request-ID"] == "trace-7.a_b"
    line = service.line("trace-7.a_b")
    assert 0 < line.pop("milliseconds") < 20_000
    assert line.pop("time").endswith("+00:00")
    assert line == {
        "level": "info",
        "request_id": "trace-7.a_b",
        "method": "POST",
        "path": "/recommend",
        "status": 200,
        "token": "shop",
        "loop": "shop",
        "arm": "champion",
        "policy": policy_tag,
    }
    refused = httpx.post(f"{service.address}/feedback", json={}, timeout=20)
    line = service.line(refused.headers["X-Request-ID"])
    assert (line["path"], line["status"]) == ("/feedback", 401) and "token" not in line


@pytest.mark.parametrize("told", ["", "a b", "x" * 65, '"},{"', "slateloop_abc"])
def test_an_id_that_is_not_sane_is_replaced(service: Served, told: str) -> None:
    answer = service.post("/recommend", BODY, **{"X-Request-ID": told})
    assert len(answer.headers["X-Request-ID"]) == 32


def test_a_client_that_leaves_before_its_answer_is_no_error(service: Served) -> None:
    host, _, port = service.address.removeprefix("http://").partition(":")
    head = (
        f"POST /recommend HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {service.shop}\r\nX-Request-ID: left-early\r\n"
    )
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
    line = service.line("left-early")
    assert (line["status"], line["level"]) == (499, "info")


def test_neither_users_nor_tokens_nor_what_was_sent_appears_in_the_log(service: Served) -> None:
    service.post("/recommend", BODY | {"session_id": "visit-of-nobody", "context": {"device": "a-device-of-nobody"}})
    service.post("/recommend", BODY | {USER: USER})
    service.post("/recommend", BODY, token=f"{service.shop}x")
    service.post(f"/recommend/{USER}?token={service.shop}", BODY)
    service.post("/recommend", BODY, **{"X-Request-ID": service.shop, "User-Agent": USER})
    output = service.output.read_text()
    for private in (USER, "visit-of-nobody", "a-device-of-nobody", service.shop, "slateloop_"):
        assert private not in output
    assert len(service.lines()) > 5


def test_ids_that_look_like_code_are_stored_as_text(service: Served) -> None:
    body = BODY | {"candidates": INJECTION, "session_id": INJECTION[0], "idempotency_key": INJECTION[1]}
    body["events"] = [{"type": INJECTION[0], "item_id": INJECTION[0]}]
    told = service.post("/recommend", body | {"slate_size": len(INJECTION)}).json()
    assert sorted(told["slate"]) == sorted(INJECTION)
    (row,) = [row for row in logged(service.home, "recommendations") if row["request_id"] == told["request_id"]]
    assert json.loads(row["candidates"]) == INJECTION
    assert (row["session_id"], row["idempotency_key"]) == (INJECTION[0], INJECTION[1])
    n_feedback = len(logged(service.home, "feedback"))
    assert service.post("/feedback", {"request_id": INJECTION[0], "left": True}).status_code == 404
    assert len(logged(service.home, "feedback")) == n_feedback


def test_readiness_follows_the_database_and_life_does_not(service: Served) -> None:
    def status(path: str) -> int:
        started = time.monotonic()
        answer = httpx.get(service.address + path, timeout=20)
        assert time.monotonic() - started < 3
        return answer.status_code

    with sqlite3.connect(service.home / "interactions.db", isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        assert [status("/readyz") for _ in range(3)] == [503] * 3
        assert status("/livez") == 200
        other.execute("ROLLBACK")
    deadline = time.monotonic() + 10
    while status("/readyz") != 200:
        assert time.monotonic() < deadline
    assert service.post("/recommend", BODY).status_code == 200


def in_process(stored: StoredPolicy, home: Path, stream: io.StringIO | None = None, **settings: Any) -> Any:
    own = ServiceSettings(home=home, **settings)
    release(own.database, "p:1")
    return Recommender.inner(
        settings=own, seed=0, load=lambda tag: stored, request_log=RequestLog(stream or io.StringIO())
    )


def test_readiness_misses_a_database_that_was_taken_away(
    stored: StoredPolicy, bentoml_home: Path, tmp_path: Path
) -> None:
    recommender = in_process(stored, tmp_path)
    assert asyncio.run(recommender.__is_ready__())
    (tmp_path / "interactions.db").rename(tmp_path / "elsewhere.db")
    assert not asyncio.run(recommender.__is_ready__())
    (tmp_path / "elsewhere.db").rename(tmp_path / "interactions.db")
    assert asyncio.run(recommender.__is_ready__())
    recommender.close()


def test_a_database_that_hangs_keeps_no_probe_waiting_and_is_asked_by_one_thread() -> None:
    class Hanging:
        n_asked = 0
        back = threading.Event()

        def check(self) -> None:
            self.n_asked += 1
            self.back.wait(timeout=30)

    log = Hanging()
    readiness = Readiness(cast(InteractionLog, log), longest_wait=0.1)
    started = time.monotonic()
    assert [asyncio.run(readiness.look()) for _ in range(3)] == [False] * 3
    assert time.monotonic() - started < 5
    assert log.n_asked == 1
    log.back.set()
    deadline = time.monotonic() + 5
    while not asyncio.run(readiness.look()):
        assert time.monotonic() < deadline
    readiness.close()


def test_rows_that_wait_for_a_log_that_is_stuck_are_counted(
    stored: StoredPolicy, bentoml_home: Path, tmp_path: Path
) -> None:
    recommender = in_process(stored, tmp_path, open=True, log_seconds=0.3)
    with TestClient(build_api(lambda: recommender)) as client:
        with sqlite3.connect(tmp_path / "interactions.db", isolation_level=None) as other:
            other.execute("BEGIN IMMEDIATE")
            assert client.post("/recommend", json=BODY).status_code == 503
            assert "slateloop_log_rows_waiting 1.0" in client.get("/metrics").text
            other.execute("ROLLBACK")
        deadline = time.monotonic() + 10
        while "slateloop_log_rows_waiting 0.0" not in client.get("/metrics").text:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    recommender.close()


def test_who_answers_without_the_log_is_ready_without_it(
    stored: StoredPolicy, bentoml_home: Path, tmp_path: Path
) -> None:
    recommender = in_process(stored, tmp_path, serve_without_log=True)
    (tmp_path / "interactions.db").unlink()
    assert asyncio.run(recommender.__is_ready__())
    recommender.close()


def test_an_unexpected_error_is_a_sentence_with_its_request_and_a_traceback_in_the_log_alone(
    stored: StoredPolicy, bentoml_home: Path, tmp_path: Path
) -> None:
    lines = io.StringIO()
    recommender = in_process(stored, tmp_path, lines, open=True)

    async def fail(request: RecommendRequest) -> RecommendResponse:
        raise RuntimeError(f"no such user: {request.user_id}")

    recommender.recommend = fail
    with TestClient(build_api(lambda: recommender), raise_server_exceptions=False) as client:
        answer = client.post("/recommend", json=BODY, headers={"X-Request-ID": "abc"})
        assert client.post("/recommend/batch", json={"requests": [BODY]}).status_code == 200
    recommender.close()
    assert (answer.status_code, answer.headers["X-Request-ID"]) == (500, "abc")
    assert answer.json() == {"error": "request abc: failed unexpectedly; the service's log says where"}
    warning, line, _ = map(json.loads, lines.getvalue().splitlines())
    assert warning["level"] == "warning" and "SLATELOOP_OPEN is true: anyone may ask" in warning["message"]
    assert (line["level"], line["status"], line["error"]) == ("error", 500, "RuntimeError")
    assert "test_operations.py" in line["traceback"][-1]
    assert USER not in lines.getvalue()


def test_a_token_that_asks_too_often_is_told_when_to_come_again(
    stored: StoredPolicy, bentoml_home: Path, tmp_path: Path
) -> None:
    recommender = in_process(stored, tmp_path, rate=0.01, burst=2)
    tokens = TokenFile(tmp_path / "tokens.json")
    one, two = ({"Authorization": f"Bearer {tokens.create(name, ['recommend'])}"} for name in ("one", "two"))
    with TestClient(build_api(lambda: recommender)) as client:
        assert [client.post("/recommend", json=BODY, headers=one).status_code for _ in range(3)] == [200, 200, 429]
        refused = client.post("/recommend", json=BODY, headers=one)
        assert 90 <= int(refused.headers["Retry-After"]) <= 100
        assert refused.json()["error"].startswith("rate: was exceeded; try again in ")
        assert client.post("/recommend", json=BODY, headers=two).status_code == 200
    recommender.close()


def test_the_share_of_slates_that_explore_is_that_of_the_policy(stored: StoredPolicy) -> None:
    """The first item is another than the most likely one as often as its probability leaves room for."""
    import torch

    live = LivePolicy(stored)
    request = RecommendRequest(**BODY)
    p_best = float(live.logits([request]).softmax(1).max())
    chosen = live.recommend([request] * 4_000, torch.Generator().manual_seed(1))
    share = sum(one.explores for one in chosen) / len(chosen)
    assert share == pytest.approx(1.0 - p_best, abs=0.03)
    best = live.candidates(request)[int(live.logits([request]).argmax())]
    assert all(one.explores == (one.slate[0] != best) for one in chosen)


def test_a_position_counts_as_below_the_floor_where_it_has_less_than_a_tenth_of_chance() -> None:
    import math

    chances = [1 / 10, 1 / 9, 1 / 8]
    assert below_floor([math.log(chance * SUPPORT_FLOOR * 1.01) for chance in chances], 10) == 0
    assert below_floor([math.log(chance * SUPPORT_FLOOR * 0.99) for chance in chances], 10) == 3
    assert below_floor([0.0], 1) == 0


def test_a_worker_that_was_killed_leaves_no_waiting_rows_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SHARED, str(tmp_path))
    dead, another = tmp_path / "gauge_livesum_4194305.db", tmp_path / "counter_4194305.db"
    for file in (dead, another):
        file.touch()
    Metrics()
    assert not dead.exists() and another.exists()
