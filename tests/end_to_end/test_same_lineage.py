"""A loop started in each of the ways there are, with the same inputs, comes to the same result: nothing else counts."""

import json
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
from own_table import write_own_log
from playwright.sync_api import Browser, expect
from prefect_process import ServerProcess
from prefect_server import Server, until
from slateloop_process import LEARN_LITTLE, TELL_OF_DRIFT, Place, lineages, python, worker

from components.interactions.log_folder import Log

pytestmark = [pytest.mark.services, pytest.mark.timeout(3_600)]

#: What is easily lost on the way through a form or another folder: microseconds, exponents, whole floats, bare names.
LOOP = """
loop = "tiny"
seed = 7
as_of = "2026-11-01T12:00:00.123456+02:00"
[source]
name = "table"
mapping = "mapping.toml"
[validation]
max_quarantined_share = 2e-2
[gate]
ess_floor_requests = 600
weight_tolerance = 1e-1
"""
#: What tells runs apart, whatever they came to.
OWN = {"run", "started", "policy_tag", "baseline_tag", "bento_tag"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A Prefect server with its pages."""
    process = ServerProcess(tmp_path_factory.mktemp("prefect-server"), pages=True)
    try:
        process.start()
        yield Server(process.api)
    finally:
        process.stop()


@pytest.fixture(scope="module")
def place(storefront_log: Log, server: Server, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A loop on files, both named from the folder in which one works."""
    place = Place(tmp_path_factory.mktemp("ways"), server.api)
    write_own_log(storefront_log, place.root / "log")
    (place.root / "log" / "mapping.toml").rename(place.root / "mapping.toml")
    place.write("loop.toml", LOOP + LEARN_LITTLE)
    assert place.call("deploy", "--config", "loop.toml", "--path", "log").code == 0
    return place


def by_schedule(server: Server, place: Place, browser: Browser) -> None:
    soon = datetime.now(UTC) + timedelta(minutes=2)  # Prefect plans once a minute, and plans nothing that is past.
    schedule = {"interval": 86_400.0, "anchor_date": soon.isoformat(), "timezone": "UTC"}
    schedules = f"{server.api}/deployments/{server.deployment()['id']}/schedules"
    httpx.post(schedules, json=[{"active": True, "schedule": schedule}], timeout=30).raise_for_status()


def through_the_form(server: Server, place: Place, browser: Browser) -> None:
    page = browser.new_context(viewport={"width": 1400, "height": 1000}).new_page()
    page.goto(f"{server.api.removesuffix('/api')}/deployments/deployment/{server.deployment()['id']}/run")
    expect(page.get_by_text("Seed of everything that learns.").first).to_be_visible(timeout=120_000)
    with page.expect_response(lambda answer: "create_flow_run" in answer.url, timeout=60_000) as answered:
        page.get_by_role("button", name="Submit").click()
    assert answered.value.status == 201, answered.value.text()


def by_event(server: Server, place: Place, browser: Browser) -> None:
    python(place, TELL_OF_DRIFT, "1")


def from_the_command_line(server: Server, place: Place, browser: Browser) -> None:
    decided = place.call("run", "--config", "loop.toml", "--path", "log")
    assert decided.code == 0, decided.errors


def due(server: Server) -> list[dict[str, Any]]:
    """Runs, oldest first, without those that a schedule has planned for later days."""
    soon = (datetime.now(UTC) + timedelta(minutes=5)).isoformat()
    return [run for run in server.runs() if run["expected_start_time"] < soon]


def result(place: Place, lineage: dict[str, Any]) -> dict[str, Any]:
    """Everything that a run came to, without what only tells when and by whom it was made."""
    folder = place.root / "runs" / lineage["run"]
    evidence = json.loads((folder / "evidence.json").read_text())
    return {
        "lineage": {name: value for name, value in lineage.items() if name not in OWN},
        "decision": json.loads((folder / "decision.json").read_text()),
        "evidence": {name: value for name, value in evidence.items() if name not in {"seconds", "ledger"}},
        "policies": {str(file.parent.name): file.read_bytes() for file in (folder / "policies").rglob("*.safetensors")},
    }


def test_however_a_run_was_started_it_comes_to_the_same(server: Server, place: Place, browser: Browser) -> None:
    results: dict[str, dict[str, Any]] = {}
    started_by: dict[str, str] = {}
    with worker(place):
        for start in (by_schedule, through_the_form, by_event, from_the_command_line):
            before = len(due(server))
            start(server, place, browser)
            until(lambda before=before: len(due(server)) > before, 180)  # type: ignore[misc]
            run = due(server)[-1]
            ended = server.wait(run["id"], "Completed", "Failed", "Crashed", "Cancelled", "Skipped")
            assert ended["state"]["name"] == "Completed", ended["state"]
            started_by[start.__name__] = (run["created_by"] or {}).get("type", "")
            lineage = lineages(place)[-1]
            assert lineage["reused"] == [], "it was computed, not looked up"
            results[start.__name__] = result(place, lineage)
            shutil.rmtree(place.root / "home" / "stages")
    assert len(lineages(place)) == 4
    expected = results["from_the_command_line"]
    for name, found in results.items():
        for part, value in found.items():
            assert value == expected[part], f"{name}: {part}"
    assert (started_by["by_schedule"], started_by["by_event"]) == ("SCHEDULE", "AUTOMATION")
