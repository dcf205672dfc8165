"""The loop run by Prefect: a real server, a real worker process, a small shop."""

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import httpx
import psutil
import pytest
from bento_server import free_port
from prefect_events import events_named
from prefect_server import Server, until
from slateloop_process import (
    DEPLOY_HURRIED,
    LEARN_LITTLE,
    SMALL_SHOP,
    TELL_OF_DRIFT,
    Place,
    kill,
    lineages,
    python,
    worker,
)

from flows.platform import MARK
from flows.turns import turn

pytestmark = [pytest.mark.services, pytest.mark.timeout(1_800)]

LOOP = 'loop = "tiny"\n'
SINK = """
import sys
from prefect.blocks.notifications import CustomWebhookNotificationBlock
text = {"text": "{{subject}}: {{body}}"}
CustomWebhookNotificationBlock(name="sink", url=sys.argv[1], json_data=text).save("sink", overwrite=True)
"""


@pytest.fixture(scope="module")
def server(prefect_api: str) -> Server:
    return Server(prefect_api)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, prefect_api: str) -> Place:
    """A working folder whose loop is deployed."""
    place = Place(tmp_path_factory.mktemp("operation"), prefect_api)
    place.write("loop.toml", LOOP + SMALL_SHOP + LEARN_LITTLE)
    assert place.call("deploy", "--config", "loop.toml").code == 0
    return place


def nobody(message: str, share: float) -> None:
    pytest.fail(f"it waited: {message}")


def test_deploying_again_changes_nothing_and_keeps_what_somebody_switched(server: Server, place: Place) -> None:
    first = place.call("deploy", "--config", "loop.toml", "--schedules", "--json").document
    automations = server.ask("automations/filter")
    second = place.call("deploy", "--config", "loop.toml", "--json").document
    assert second == first
    assert server.ask("automations/filter") == automations
    assert [schedule["active"] for schedule in server.deployment()["schedules"]] == [True]
    off = place.call("deploy", "--config", "loop.toml", "--no-schedules", "--json").document
    assert off == first
    assert [schedule["active"] for schedule in server.deployment()["schedules"]] == [False]
    names = [automation["name"] for automation in automations]
    assert sorted(names) == sorted(set(names)) == sorted(first["automations"])


def test_the_deployments_form_has_bounds_and_help_and_refuses_what_is_wrong(server: Server, place: Place) -> None:
    deployment = server.deployment()
    assert deployment["parameters"]["config"]["loop"] == "tiny"
    seed = deployment["parameter_openapi_schema"]["definitions"]["LoopConfig"]["properties"]["seed"]
    assert seed["minimum"] == 0
    assert seed["description"] == "Seed of everything that learns."
    identity = deployment["id"]
    refused = httpx.post(
        f"{server.api}/deployments/{identity}/create_flow_run", json={"parameters": {"config": {"seed": -1}}}
    )
    assert refused.status_code == 409
    assert "-1 is less than the minimum of 0" in refused.text


def test_another_loop_has_its_own_deployments(server: Server, place: Place) -> None:
    place.write("other.toml", 'loop = "other"\n')
    assert place.call("deploy", "--config", "other.toml").code == 0
    assert server.deployment("retraining/other")["parameters"]["config"]["loop"] == "other"
    assert server.deployment()["parameters"]["config"]["loop"] == "tiny"


def test_a_block_that_is_not_there_is_named(place: Place) -> None:
    asking = replace(place)
    asking.environment["SLATELOOP_NOTIFY"] = "custom-webhook/nobody"
    answer = asking.call("deploy", "--config", "loop.toml")
    assert answer.code == 2
    assert "SLATELOOP_NOTIFY = 'custom-webhook/nobody': the server has no such block" in answer.errors


def test_a_storm_of_events_wakes_one_run_which_decides_and_says_what_woke_it(server: Server, place: Place) -> None:
    before = {run["id"] for run in server.runs()}
    with worker(place):
        python(place, TELL_OF_DRIFT, "50")
        until(lambda: len(server.runs()) > len(before), 120)
        [woken] = [run for run in server.runs() if run["id"] not in before]
        finished = server.wait(woken["id"], "Completed", "Failed", "Crashed")
        assert finished["state"]["name"] == "Completed", finished["state"]
        assert woken["parameters"]["woken_by"].startswith("psi of the slates' entropy is 0.1")
        assert "(event " in woken["parameters"]["woken_by"]
        again = server.wait(server.start(woken_by="another storm"), "Skipped", "Completed", "Failed", "Crashed")
        assert again["state"]["name"] == "Skipped"
        assert again["state"]["type"] == "CANCELLED"
        assert "every 24 hours at most" in again["state"]["message"]
    assert len([run for run in server.runs() if run["id"] not in before]) == 2
    [lineage] = lineages(place)
    assert "woken" not in json.dumps(lineage)
    outcome = json.loads((place.root / "runs" / lineage["run"] / "run.json").read_text())["outcome"]
    held = outcome == "hold"
    assert len(events_named(server.api, "slateloop.policy.held", held, seconds=60 if held else 10)) == held


def test_a_run_of_the_command_line_waits_while_another_retrains_the_loop(place: Place) -> None:
    before = len(lineages(place))
    with turn("tiny", place.root / "home", nobody):
        process = place.start("run", "--config", "loop.toml")
        assert process.stderr is not None
        line = process.stderr.readline()
        while "waits for" not in line:
            assert line, "it did not wait"
            line = process.stderr.readline()
        assert f"waits for the retraining of loop 'tiny' that process {os.getpid()} is at" in line
        assert len(lineages(place)) == before
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert len(lineages(place)) == before + 1


def test_a_late_run_that_no_worker_takes_is_given_up(server: Server, place: Place) -> None:
    python(place, DEPLOY_HURRIED)
    late = server.start()
    server.wait(late, "Late", seconds=90)
    given_up = server.wait(late, "Cancelled", seconds=120)
    assert given_up["state"]["message"] == "No worker took the run in time."
    assert given_up["run_count"] == 0


def test_a_run_that_is_stuck_times_out(server: Server, place: Place) -> None:
    hurried = replace(place)
    hurried.environment["SLATELOOP_RUN_HOURS"] = str(3 / 3_600)
    with turn("tiny", place.root / "home", nobody):
        timed_out = hurried.call("run", "--config", "loop.toml")
    assert timed_out.code == 1
    assert timed_out.errors.splitlines()[-1].startswith(
        "slateloop: the run was ended after SLATELOOP_RUN_HOURS = 0.000"
    )
    assert "Traceback" not in timed_out.errors
    assert server.runs()[-1]["state"]["name"] == "TimedOut"


def test_a_failed_check_and_a_failed_run_are_told(server: Server, place: Place) -> None:
    heard: list[dict[str, Any]] = []
    telling = replace(place)
    telling.environment["SLATELOOP_NOTIFY"] = "custom-webhook/sink"
    with listener(heard) as address:
        python(place, SINK, address)
        names = telling.call("deploy", "--config", "loop.toml", "--json").document["automations"]
        refused = place.call("run", "--config", "loop.toml", "--set", "validation.min_requests=1_000_000")
        assert refused.code == 2, refused.errors
        # A file for a source that reads none: the run fails at once.
        with worker(place):
            failed = server.wait(server.start(path="/nothing"), "Failed")
        # It may have been late before a worker took it, which is told as well.
        until(lambda: any(": retraining Failed: " in message["text"] for message in heard), 60, lambda: heard)
    texts = sorted(message["text"] for message in heard)
    assert any(": retraining Failed: " in text and failed["name"] in text for text in texts), texts
    assert any(
        text.startswith("tiny: slateloop.validation.failed: ") and "Enough requests are accepted" in text
        for text in texts
    ), texts
    fewer = place.call("deploy", "--config", "loop.toml", "--json").document["automations"]
    left = [automation["name"] for automation in server.ask("automations/filter")]
    assert len(names) == len(fewer) + 2
    assert not {"tiny: failures are told", "tiny: events are told"} & set(left)


@contextmanager
def listener(heard: list[dict[str, Any]]) -> Iterator[str]:
    """Address at which messages are heard."""

    class Ear(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            heard.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

    ears = ThreadingHTTPServer(("127.0.0.1", 0), Ear)
    Thread(target=ears.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{ears.server_port}"
    ears.shutdown()
    ears.server_close()


def test_two_deployed_runs_of_a_loop_take_turns(server: Server, place: Place) -> None:
    with worker(place):
        both = [server.start(), server.start()]
        for identity in both:
            assert server.wait(identity, "Completed", "Failed", "Crashed")["state"]["name"] == "Completed"
    first, second = sorted((server.run(identity) for identity in both), key=lambda run: run["start_time"])
    assert first["end_time"] <= second["start_time"]


def test_a_killed_workers_run_is_reported_as_crashed_and_the_next_one_resumes(server: Server, place: Place) -> None:
    python(place, DEPLOY_HURRIED)
    other_seed = {"config": server.deployment()["parameters"]["config"] | {"seed": 5}}
    with worker(place) as process:
        killed = server.start(**other_seed)
        until(lambda: server.finished_stage(killed, "user-model"), 300, lambda: server.run(killed)["state"])
        kill(process)
    assert server.run(killed)["state"]["name"] == "Running"
    assert server.wait(killed, "Crashed", seconds=240)["state"]["message"].startswith("No heartbeat")
    with worker(place):
        resumed = server.wait(server.start(**other_seed), "Completed", "Failed", "Crashed")
    assert resumed["state"]["name"] == "Completed", resumed["state"]
    assert {"import-data", "split", "user-model"} <= set(lineages(place)[-1]["reused"])


def test_the_platform_comes_up_answers_everywhere_and_leaves_no_process(place: Place) -> None:
    alone = replace(place, api=None)
    tag = lineages(place)[-1]["policy_tag"]
    assert alone.call("release", "promote", "--loop", "tiny", "--policy", tag).code == 0
    names = ("prefect", "worker", "endpoint", "evidently")
    ports = {name: free_port() for name in names}
    options = [f"--{name}-port={port}" for name, port in ports.items()]
    process = alone.start("up", "--config", "loop.toml", *options)
    try:
        assert process.stdout is not None
        shown = ""
        while "Ctrl-C ends them all." not in shown:
            line = process.stdout.readline()
            assert line, process.communicate()[1]
            shown += line
        for name, path in zip(names, ("/api/health", "/health", "/readyz", "/"), strict=True):
            assert f"http://127.0.0.1:{ports[name]}" in shown
            assert httpx.get(f"http://127.0.0.1:{ports[name]}{path}", timeout=10).status_code == 200
        assert f"PREFECT_API_URL=http://127.0.0.1:{ports['prefect']}/api" in shown
        own = Server(f"http://127.0.0.1:{ports['prefect']}/api")
        assert own.deployment()["parameters"]["config"]["loop"] == "tiny"
        # A run of its worker knows the platform's folders, and is ended with it.
        run = own.start()
        own.wait(run, "Running", "Completed")
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=120)
    finally:
        kill(process)
    assert process.returncode == 0, errors
    stopped = [line.removeprefix("stopping ") for line in errors.splitlines() if line.startswith("stopping ")]
    assert stopped == ["worker", "evidently", "endpoint", "prefect"]
    assert [process for process in psutil.process_iter() if MARK in environment_of(process)] == []


def environment_of(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return {}
