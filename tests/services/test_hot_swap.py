"""Releases change under load: nobody is refused, and every server takes each change up within seconds."""

import itertools
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest
from bento_server import release, served
from postgresql_server import PostgreSql

from components.experiment.ab import Assignment
from components.interactions.log import InteractionLog
from services.packaging import build_bento
from services.policy_store import save_model
from services.releases import Release, Releases, arm_of

USERS = [f"user-{number}" for number in range(200)]
CANDIDATES = [f"item-{number:04d}" for number in range(1, 9)]
LONGEST = 5.0


@pytest.fixture
def tags(policy_folder: Path, policy_tag: str) -> tuple[str, str, str]:
    """The same policy as three versions."""
    others = (save_model(policy_folder, name="shop-policy", lineage={"seed": n}, decision={}) for n in (4, 5))
    return policy_tag, *others


def ask(client: httpx.Client, user: str) -> httpx.Response:
    return client.post("/recommend", json={"loop": "shop", "user_id": user, "candidates": CANDIDATES})


@contextmanager
def under_load(addresses: list[str]) -> Iterator[Counter[int]]:
    """Clients that ask all the time; how often each status came back."""
    statuses: Counter[int] = Counter()
    stopped = threading.Event()

    def run(address: str) -> None:
        with httpx.Client(base_url=address, timeout=30) as client:
            for user in itertools.cycle(USERS):
                if stopped.is_set():
                    return
                try:
                    statuses[ask(client, user).status_code] += 1
                except httpx.TransportError:
                    statuses[0] += 1

    threads = [threading.Thread(target=run, args=(address,)) for address in addresses for _ in range(2)]
    for thread in threads:
        thread.start()
    yield statuses
    stopped.set()
    for thread in threads:
        thread.join()


def changes(releases: Releases, tags: tuple[str, str, str]) -> Iterator[Release]:
    """Releases of every kind, without end."""
    champion, *others = tags
    for other, share in itertools.cycle(itertools.product(others, (0.2, 0.5))):
        yield releases.canary("shop", other, share, 1_000, "test")
        yield releases.roll_back("shop", "test")
        yield releases.set_shadow("shop", other, "test")
        yield (canary := releases.canary("shop", other, share, 1_000, "test"))
        yield releases.promote(canary, "test")
        yield (canary := releases.canary("shop", champion, share, 1_000, "test"))
        yield releases.promote(canary, "test")
        yield releases.set_baseline("shop", other, 0.1, "test")
        yield releases.set_baseline("shop", None, 0.0, "test")


def seconds_until_served(client: httpx.Client, changed: Release) -> float:
    """Until users of every arm are answered by its policy."""
    assignment = Assignment(changed.salt)
    some = {arm_of(changed, assignment, user): user for user in USERS}
    assert set(some) == set(changed.policies())
    started = time.monotonic()
    for arm, user in some.items():
        while True:
            told = ask(client, user).json()
            if (told["arm"], told["policy"]) == (arm, changed.policies()[arm]):
                break
            assert time.monotonic() - started < 2 * LONGEST, (told, changed)
            time.sleep(0.02)
    return time.monotonic() - started


def swap_under_load(
    url: str, tags: tuple[str, str, str], n_releases: int, n_servers: int, bentoml_home: Path, home: Path
) -> None:
    release(url, tags[0])
    bento = build_bento()
    log = InteractionLog(url)
    with ExitStack() as running:
        addresses = []
        for number in range(n_servers):
            folder = home / str(number)
            folder.mkdir(parents=True)
            # One key for all: they are workers of one service.
            variables = {"SLATELOOP_HOME": str(folder), "SLATELOOP_DATABASE": url, "SLATELOOP_USER_KEY": "k" * 16}
            addresses.append(running.enter_context(served(bento, bentoml_home, folder, variables)))
        clients = [running.enter_context(httpx.Client(base_url=address, timeout=30)) for address in addresses]
        with under_load(addresses) as statuses:
            longest = [
                max(seconds_until_served(client, changed) for client in clients)
                for changed in itertools.islice(changes(Releases(log), tags), n_releases)
            ]
    assert set(statuses) == {200} and statuses[200] > 10 * n_releases
    assert max(longest) < LONGEST, longest
    assert len(Releases(log).history("shop")) == 1 + n_releases
    log.engine.dispose()


@pytest.mark.parametrize("n_releases", [6, pytest.param(50, marks=pytest.mark.slow)])
def test_releases_under_load_fail_no_request_and_are_served_within_seconds(
    tags: tuple[str, str, str], n_releases: int, bentoml_home: Path, tmp_path: Path
) -> None:
    url = f"sqlite:///{tmp_path / 'interactions.db'}"
    swap_under_load(url, tags, n_releases, 1, bentoml_home, tmp_path)


@pytest.mark.services
@pytest.mark.parametrize("n_releases", [6, pytest.param(50, marks=pytest.mark.slow)])
def test_every_worker_of_a_postgresql_service_takes_releases_up(
    tags: tuple[str, str, str], n_releases: int, bentoml_home: Path, tmp_path: Path, postgresql: PostgreSql
) -> None:
    swap_under_load(postgresql.new_database(), tags, n_releases, 2, bentoml_home, tmp_path)
