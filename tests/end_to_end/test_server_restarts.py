"""Prefect's server, or the database behind it, goes away in the middle of a run and comes back."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from postgresql_server import PostgreSql
from prefect_process import ServerProcess
from prefect_server import Server, until
from slateloop_process import DEPLOY_HURRIED, LEARN_LITTLE, SMALL_SHOP, Place, kill, lineages, python, worker

pytestmark = [pytest.mark.services, pytest.mark.timeout(3_600)]

ENDED = ("Completed", "Failed", "TimedOut", "Crashed", "Cancelled")
#: Seconds for which something is away, beside what it takes to come up.
AWAY = 5


@contextmanager
def deployed(folder: Path, database: str = "") -> Iterator[tuple[ServerProcess, Server, Place]]:
    """A server with a loop's deployments, and the loop's place."""
    process = ServerProcess(folder / "prefect-server", database)
    try:
        process.start()
        place = Place(folder / "shop", process.api)
        place.write("loop.toml", 'loop = "tiny"\n' + SMALL_SHOP + LEARN_LITTLE)
        python(place, DEPLOY_HURRIED)
        yield process, Server(process.api), place
    finally:
        process.stop()


def begun(server: Server, stage: str, **parameters: object) -> str:
    """A run that has told of a stage's end."""
    run = server.start(**parameters)
    until(lambda: server.finished_stage(run, stage), 600, lambda: server.run(run)["state"])
    return run


def test_a_restarted_server_ends_no_run_and_finds_those_that_ended_meanwhile(tmp_path: Path) -> None:
    with deployed(tmp_path) as (process, server, place):
        with worker(place) as working:
            survives = begun(server, "split")
            process.kill()
            time.sleep(AWAY)
            process.start()
            assert server.wait(survives, *ENDED, seconds=900)["state"]["name"] == "Completed"
            assert [lineage["reused"] for lineage in lineages(place)] == [[]]
            # As a machine that fails takes them all.
            dies = begun(server, "split", fresh=True)
            process.kill()
            kill(working)
        time.sleep(AWAY)
        process.start()
        assert server.run(dies)["state"]["name"] == "Running"
        assert server.wait(dies, *ENDED, seconds=300)["state"]["name"] == "Crashed"
        with worker(place):
            assert server.wait(server.start(), *ENDED, seconds=900)["state"]["name"] == "Completed"
        assert place.half_written() == []
        assert [run["state"]["name"] for run in server.runs()] == ["Completed", "Crashed", "Completed"]


def test_a_database_that_is_restarted_ends_no_run(tmp_path: Path, postgresql: PostgreSql) -> None:
    url = postgresql.new_database().replace("+psycopg", "+asyncpg")
    with deployed(tmp_path, url) as (_, server, place):
        with worker(place) as working:
            survives = begun(server, "split")
            postgresql.stop("immediate")
            time.sleep(AWAY)
            postgresql.start()
            assert server.wait(survives, *ENDED, seconds=900)["state"]["name"] == "Completed"
            dies = begun(server, "split", fresh=True)
            kill(working)
        assert server.wait(dies, *ENDED, seconds=300)["state"]["name"] == "Crashed"
        assert [run["state"]["name"] for run in server.runs()] == ["Completed", "Crashed"]
