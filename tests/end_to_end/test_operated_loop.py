"""The loop runs itself: drift wakes retraining, the gate lets a canary out, its live A/B makes it the champion.

Nobody releases anything. `slateloop up` runs Prefect's server, a worker, the endpoint and Evidently; the rest are
shoppers, and clocks: runs that a schedule would start in a night or an hour are asked for when their time has come.
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from bento_server import free_port
from living_shop import DAY_ONE, LATER, Shop, make_tokens, world
from postgresql_server import PostgreSql
from prefect_server import Server, until
from slateloop_process import Place
from timeline import Timeline

#: The gate's word is enough, for half of the users and then for all.
BY_ITSELF = """
[release]
canary_share = 0.5
planned_sessions = 12000
promote = true
"""
#: Shoppers of the calm days and of all others: a retraining learns mostly from these.
FEW, MANY = 1_500, 4_000
SHIFT = "source.taste_shift=0.5"
ENDED = ("Completed", "Failed", "Crashed", "TimedOut", "Cancelled", "Skipped")


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.services)])
def databases(request: pytest.FixtureRequest) -> dict[str, str]:
    """Variables by which Prefect and the interaction log find their databases; none for SQLite files in the home."""
    if request.param == "sqlite":
        return {}
    server: PostgreSql = request.getfixturevalue("postgresql")
    prefect = server.new_database().replace("+psycopg:", "+asyncpg:")
    return {"PREFECT_SERVER_DATABASE_CONNECTION_URL": prefect, "SLATELOOP_DATABASE": server.new_database()}


@pytest.fixture
def timeline(request: pytest.FixtureRequest, databases: dict[str, str]) -> Iterator[Timeline]:
    """What happened, left where `make timeline` wants it."""
    recorded = Timeline()
    yield recorded
    out = request.config.getoption("--timeline")
    if out is not None and not databases:
        recorded.write(Path(out))


@contextmanager
def platform(place: Place) -> Iterator[dict[str, str]]:
    """`slateloop up`; yields its addresses, and ends it."""
    ports = {name: free_port() for name in ("prefect", "worker", "endpoint", "evidently")}
    up = place.start("up", "--config", "later.toml", *[f"--{name}-port={port}" for name, port in ports.items()])
    try:
        assert up.stdout is not None
        while "Ctrl-C ends them all." not in (line := up.stdout.readline()):
            assert line, up.communicate()[1]
        yield {name: f"http://127.0.0.1:{port}" for name, port in ports.items()}
    finally:
        up.terminate()
        _, errors = up.communicate(timeout=240)
    assert up.returncode == 0, errors


@pytest.mark.slow
@pytest.mark.timeout(7_200)
def test_drift_ends_in_a_new_champion_and_nobody_was_asked(
    databases: dict[str, str], timeline: Timeline, tmp_path: Path
) -> None:
    place = Place(tmp_path / "shop")
    place.environment.update(databases)
    place.write("day-one.toml", DAY_ONE)
    place.write("later.toml", LATER + BY_ITSELF)
    first = place.call("run", "--config", "day-one.toml", "--json", timeout=1_500).document
    world(first).items().write_parquet(place.root / "items.parquet")
    tokens = make_tokens(place)
    champion = first["lineage"]["baseline_tag"]
    assert place.call("release", "promote", "--policy", champion).code == 0
    with platform(place) as at:
        server = Server(f"{at['prefect']}/api")
        shop = Shop(place, at["endpoint"], *tokens, n_users=FEW)
        # The run of day one is in the same database.
        [day_one] = server.runs()
        timeline.begins(f"`slateloop up` answers everywhere; {champion} serves all")

        calm = timeline.visit(shop, 2)
        middle = datetime.now(UTC)
        timeline.visit(shop, 1)
        options = [f"--{name.replace('_', '-')}={value}" for name, value in watching(place, middle).items()]
        calmly = shop.call("drift", "--config", "later.toml", *options)
        assert calmly["n_before"] > 0
        # How long feedback takes is this machine's doing.
        assert moved(calmly) <= {"delay"}, calmly
        timeline.add(f"`slateloop drift`: nothing that shoppers do moved in {len(calmly['columns'])} tests")

        timeline.add("tastes turn by a quarter of a circle, and more shoppers come")
        shop.n_users = MANY
        shifted_at = datetime.now(UTC)
        # Enough of it that the calm days, which the run learns from too, do not make its world model too hopeful.
        broken = timeline.visit(shop, 12, SHIFT)
        # A run takes the log to end with its last request: these few are cut, and not a seventh of all sessions.
        shop.n_users = 50
        shop.visit(1, SHIFT)
        shop.n_users = MANY
        assert broken["total"]["mean_reward"] < calm["total"]["mean_reward"]
        looked = ran(server, "drift-monitoring/shop", watch=watching(place, shifted_at))
        assert looked["state"]["name"] == "Completed", looked["state"]
        assert {"reward", "user model"} & moved(looks(place)[-1]), looks(place)[-1]

        # The event woke the retraining, and the gate let its policy out.
        woken = wait_for_run(server, after=day_one)
        assert woken["parameters"]["woken_by"].partition(" tests found a move")[1]
        assert server.wait(woken["id"], *ENDED, seconds=2_400)["state"]["name"] == "Completed"
        [canary] = [release for release in history(place) if release["action"] == "canary"]
        assert (canary["champion"], canary["challenger_share"]) == (champion, 0.5)
        challenger = canary["challenger"]

        both = timeline.visit(shop, 3, SHIFT)
        assert set(both["policies"]) == {champion, challenger}
        assert ran(server, "ab-report/shop")["state"]["name"] == "Completed"
        assert [release["action"] for release in history(place)] == ["promote", "canary", "promote"]
        assert history(place)[-1]["champion"] == challenger

        time.sleep(5)
        after = timeline.visit(shop, 1, SHIFT)
        assert set(after["policies"]) == {challenger}
        gain = after["total"]["mean_reward"] - broken["total"]["mean_reward"]
        assert gain > 3 * (after["total"]["standard_error"] + broken["total"]["standard_error"])
        assert [run["id"] for run in server.runs()] == [day_one["id"], woken["id"]]
        timeline.read(server, history(place))
    assert timeline.names("slateloop.") == [
        "slateloop.drift.detected", "slateloop.release.canary", "slateloop.release.promoted"
    ]  # fmt: skip


def watching(place: Place, since: datetime) -> dict[str, float]:
    """A look at what was shown since a moment, against all that the champion showed before it."""
    released = datetime.fromtimestamp(history(place)[-1]["released_at"] / 1e6, UTC)
    hours = (datetime.now(UTC) - since) / timedelta(hours=1)
    return {"window_hours": hours, "baseline_days": (since - released) / timedelta(days=1), "settle_minutes": 0.0}


def looks(place: Place) -> list[dict[str, Any]]:
    """What monitoring saw, oldest first."""
    return [json.loads(file.read_bytes()) for file in sorted((place.root / "home" / "drift" / "shop").glob("*.json"))]


def moved(look: dict[str, Any]) -> set[str]:
    """Panels in which a look found something."""
    return {column["panel"] for column in look["columns"] if column["moved"]}


def ran(server: Server, deployment: str, **parameters: Any) -> dict[str, Any]:
    """A run of a deployment, when it has ended."""
    return server.wait(server.start(deployment, **parameters), *ENDED, seconds=900)


def wait_for_run(server: Server, after: dict[str, Any]) -> dict[str, Any]:
    """The one retraining after another, as soon as there is one."""
    until(lambda: len(server.runs()) > 1, 120, lambda: "no event woke the retraining")
    [run] = [run for run in server.runs() if run["id"] != after["id"]]
    return run


def history(place: Place) -> list[dict[str, Any]]:
    """All releases, oldest first."""
    answer = place.call("release", "status", "--history", "--json")
    assert answer.code == 0, answer.errors
    releases: list[dict[str, Any]] = json.loads(answer.output)
    return releases
