"""Nothing that was acknowledged is lost: workers are killed under load; the log is held against what clients saw."""

import json
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import psutil
import pytest
import sqlalchemy as sa
from bento_server import release, served
from postgresql_server import PostgreSql
from small_disk import SmallDisk

from components.interactions.log import FEEDBACK, RECOMMENDATIONS, InteractionLog
from services.packaging import build_bento

BODY = {"loop": "shop", "user_id": "user-1", "candidates": [f"item-{number:04d}" for number in range(1, 9)]}


@dataclass
class Clients:
    """Threads that ask and tell as fast as they are answered, and remember what was acknowledged."""

    address: str
    slates: dict[str, list[str]] = field(default_factory=dict)
    told: set[str] = field(default_factory=set)
    refused: Counter[int] = field(default_factory=Counter)
    broken: Counter[str] = field(default_factory=Counter)
    stopped: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        with httpx.Client(base_url=self.address, timeout=20) as client:
            while not self.stopped.is_set():
                try:
                    answer = client.post("/recommend", json=BODY)
                    if answer.status_code != 200:
                        self.refused[answer.status_code] += 1
                        continue
                    shown = answer.json()
                    self.slates[shown["request_id"]] = shown["slate"]
                    name = uuid4().hex
                    piece = {"request_id": shown["request_id"], "feedback_id": name, "request_signals": {"name": 1.0}}
                    for _ in range(2):  # as a client that lost the answer would
                        if client.post("/feedback", json=piece).status_code == 200:
                            self.told.add(shown["request_id"])
                except httpx.TransportError as error:
                    self.broken[str(error)] += 1
                    time.sleep(0.05)


def kill_under_load(bento: str, url: str, n_kills: int, homes: tuple[Path, Path, Path]) -> Clients:
    bentoml_home, folder, home = homes
    chance = random.Random(7)
    with served(bento, bentoml_home, folder, {"SLATELOOP_HOME": str(home), "SLATELOOP_DATABASE": url}) as address:
        clients = Clients(address)
        threads = [threading.Thread(target=clients.run) for _ in range(4)]
        for thread in threads:
            thread.start()
        for _ in range(n_kills):
            seen, deadline = len(clients.slates), time.monotonic() + 120
            while len(clients.slates) < seen + 5:  # the worker is back, and answers
                assert time.monotonic() < deadline, "the worker did not come back"
                time.sleep(0.02)
            time.sleep(chance.uniform(0.0, 0.5))
            for worker in _workers(address):
                worker.kill()
        seen = len(clients.slates)
        while len(clients.slates) < seen + 5:
            time.sleep(0.05)
        clients.stopped.set()
        for thread in threads:
            thread.join()
    return clients


def _server(address: str) -> psutil.Process:
    port = address.rpartition(":")[2]
    (server,) = (
        process
        for process in psutil.process_iter(["cmdline"])
        if "serve" in (process.info["cmdline"] or []) and port in process.info["cmdline"]
    )
    return server


def _workers(address: str) -> list[psutil.Process]:
    """The processes below the server of an address."""
    workers = []
    for child in _server(address).children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # one that was killed and is a zombie still, too
            if "resource_tracker" not in " ".join(child.cmdline()):
                workers.append(child)
    return workers


def hold_against(url: str, clients: Clients) -> None:
    log = InteractionLog(url)
    with log.reading() as connection:
        shown = {row.request_id: json.loads(row.slate) for row in connection.execute(sa.select(RECOMMENDATIONS))}
        heard = Counter(connection.scalars(sa.select(FEEDBACK.c.request_id)))
    assert len(clients.slates) > 20 and len(clients.told) > 20
    assert {name: shown.get(name) for name in clients.slates} == clients.slates
    assert {name: heard[name] for name in clients.told} == dict.fromkeys(clients.told, 1)
    assert set(heard) <= set(shown)


@pytest.fixture
def homes(bentoml_home: Path, tmp_path: Path) -> tuple[Path, Path, Path]:
    return bentoml_home, tmp_path, tmp_path / "home"


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 6))])
def test_a_server_that_is_told_to_end_answers_what_it_accepted(
    policy_tag: str, homes: tuple[Path, Path, Path], seed: int
) -> None:
    bentoml_home, folder, home = homes
    release(f"sqlite:///{home / 'interactions.db'}", policy_tag)
    with served(build_bento(), bentoml_home, folder, {"SLATELOOP_HOME": str(home)}) as address:
        # One who left in the middle of a question must not keep the server from ending.
        with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2])), timeout=10) as left:
            left.sendall(b"POST /recommend HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        clients = Clients(address)
        threads = [threading.Thread(target=clients.run) for _ in range(4)]
        for thread in threads:
            thread.start()
        while len(clients.slates) < 40:
            time.sleep(0.02)
        time.sleep(random.Random(seed).uniform(0.0, 0.3))
        server = _server(address)
        server.terminate()
        server.wait(timeout=25)
        clients.stopped.set()
        for thread in threads:
            thread.join()
    url = f"sqlite:///{home / 'interactions.db'}"
    hold_against(url, clients)
    with InteractionLog(url).reading() as connection:
        shown = set(connection.scalars(sa.select(RECOMMENDATIONS.c.request_id)))
    assert shown == set(clients.slates), "some slates were logged and never answered"
    assert not clients.refused
    assert not [reason for reason in clients.broken if "complete message body" in reason], clients.broken


@pytest.mark.parametrize("n_kills", [2, pytest.param(200, marks=[pytest.mark.slow, pytest.mark.timeout(7_200)])])
def test_a_killed_worker_loses_nothing_in_sqlite(policy_tag: str, homes: tuple[Path, Path, Path], n_kills: int) -> None:
    url = f"sqlite:///{homes[2] / 'interactions.db'}"
    release(url, policy_tag)
    hold_against(url, kill_under_load(build_bento(), url, n_kills, homes))


@pytest.mark.services
@pytest.mark.timeout(7_200)
@pytest.mark.parametrize("n_kills", [5, pytest.param(200, marks=pytest.mark.slow)])
def test_a_killed_worker_loses_nothing_in_postgresql(
    policy_tag: str, homes: tuple[Path, Path, Path], postgresql: PostgreSql, n_kills: int
) -> None:
    url = postgresql.new_database()
    release(url, policy_tag)
    hold_against(url, kill_under_load(build_bento(), url, n_kills, homes))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    disk = SmallDisk(tmp_path / "disk")
    yield disk
    disk.unmount()


@pytest.mark.parametrize("without_log", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_full_disk_refuses_clearly_and_space_needs_no_restart(
    policy_tag: str, homes: tuple[Path, Path, Path], disk: SmallDisk, without_log: bool
) -> None:
    bentoml_home, folder, _ = homes
    home = disk.folder / "home"
    url = f"sqlite:///{home / 'interactions.db'}"
    release(url, policy_tag)
    variables = {"SLATELOOP_HOME": str(home), "SLATELOOP_SERVE_WITHOUT_LOG": str(without_log).lower()}
    acknowledged: dict[str, list[str]] = {}
    with served(build_bento(), bentoml_home, folder, variables) as address:

        def ask() -> Any:
            started = time.monotonic()
            answer = httpx.post(f"{address}/recommend", json=BODY, timeout=20)
            assert time.monotonic() - started < 10
            if answer.status_code == 200 and answer.json()["logged"]:
                acknowledged[answer.json()["request_id"]] = answer.json()["slate"]
            return answer

        def status(path: str) -> int:
            return httpx.get(f"{address}{path}", timeout=5).status_code

        assert ask().json()["logged"]
        disk.fill()
        # The files may have some room left of their own.
        answers = [ask() for _ in range(50)]
        for answer in answers[-20:]:
            if without_log:
                assert answer.status_code == 200 and not answer.json()["logged"]
            else:
                assert answer.status_code == 503 and "the interaction log" in answer.json()["error"]
        assert (status("/readyz"), status("/livez")) == (200 if without_log else 503, 200)
        disk.free()
        assert all(ask().json()["logged"] for _ in range(5))
        assert (status("/readyz"), status("/livez")) == (200, 200)
    with InteractionLog(url).reading() as connection:
        shown = {row.request_id: json.loads(row.slate) for row in connection.execute(sa.select(RECOMMENDATIONS))}
    assert shown == acknowledged


@pytest.mark.services
def test_a_stopped_database_refuses_clearly_and_its_return_needs_no_restart(
    policy_tag: str, homes: tuple[Path, Path, Path], postgresql: PostgreSql
) -> None:
    bentoml_home, folder, home = homes
    url = postgresql.new_database()
    release(url, policy_tag)
    variables = {"SLATELOOP_HOME": str(home), "SLATELOOP_DATABASE": url}
    with served(build_bento(), bentoml_home, folder, variables) as address:

        def ask() -> Any:
            return httpx.post(f"{address}/recommend", json=BODY, timeout=20)

        def status(path: str) -> int:
            return httpx.get(f"{address}{path}", timeout=5).status_code

        assert ask().status_code == 200
        assert (status("/readyz"), status("/livez")) == (200, 200)
        postgresql.stop("immediate")
        assert (status("/readyz"), status("/livez")) == (503, 200)
        started = time.monotonic()
        refused = ask()
        assert refused.status_code == 503 and "the interaction log" in refused.json()["error"]
        assert time.monotonic() - started < 10
        assert (status("/readyz"), status("/livez")) == (503, 200)
        postgresql.start()
        assert ask().status_code == 200
        assert (status("/readyz"), status("/livez")) == (200, 200)
