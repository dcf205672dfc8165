"""A run that is stopped, in whatever way and wherever, goes on with the same command and comes to the same result."""

import os
import signal
import time
from pathlib import Path

import pytest
from slateloop_process import LEARN_LITTLE, SMALL_SHOP, STAGES, Answer, Place

COMMAND = ("run", "--config", "loop.toml", "--json")
INTERRUPTED = "slateloop: interrupted; the same command goes on where this one stopped"


def stop_in(place: Place, stage: str, how: signal.Signals) -> Answer:
    """Start the loop and stop it as soon as a stage writes into its temporary folder."""
    folder = place.root / "home" / "stages" / stage
    already = set(folder.glob(".*.tmp"))
    process = place.start(*COMMAND)
    deadline = time.monotonic() + 240
    while set(folder.glob(".*.tmp")) <= already:
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail(f"{stage} never began: {process.communicate()[1]}")
        time.sleep(0.02)
    os.killpg(process.pid, how)
    output, errors = process.communicate(timeout=120)
    stopped = Answer(process.returncode, output, errors)
    assert (*stopped.stages("reused"), *stopped.stages("done")) == STAGES[: STAGES.index(stage)]
    assert not list((place.root / "runs").glob("[!.]*"))
    return stopped


def goes_on(place: Place, stopped_in: str, whole: Answer) -> None:
    resumed = place.call(*COMMAND)
    n_finished = STAGES.index(stopped_in)
    assert resumed.stages("reused") == list(STAGES[:n_finished])
    assert resumed.stages("done") == list(STAGES[n_finished:])
    lineage = resumed.document["lineage"]
    assert lineage["reused"] == list(STAGES[:n_finished])
    assert lineage["stages"] == whole.document["lineage"]["stages"]
    assert lineage["policy_digest"] == whole.document["lineage"]["policy_digest"]
    assert resumed.document["decision"] == whole.document["decision"]
    assert place.half_written() == []


@pytest.fixture
def place(prefect_api: str, tmp_path: Path) -> Place:
    """Where nothing has been computed yet."""
    place = Place(tmp_path / "stopped", prefect_api)
    place.write("loop.toml", SMALL_SHOP + LEARN_LITTLE)
    return place


def test_an_interrupted_run_says_so_and_goes_on_and_so_does_a_killed_one(first_run: Answer, place: Place) -> None:
    interrupted = stop_in(place, "validate", signal.SIGINT)
    assert interrupted.code == 130, interrupted.errors
    assert interrupted.errors.splitlines()[-1] == INTERRUPTED
    assert "Traceback" not in interrupted.errors
    assert place.half_written() == []
    assert stop_in(place, "package", signal.SIGKILL).code == -signal.SIGKILL
    goes_on(place, "package", first_run)


@pytest.mark.slow
@pytest.mark.timeout(1_800)
def test_a_loop_killed_in_each_stage_goes_on(first_run: Answer, place: Place) -> None:
    for stage in STAGES:
        assert stop_in(place, stage, signal.SIGKILL).code == -signal.SIGKILL
    goes_on(place, STAGES[-1], first_run)
