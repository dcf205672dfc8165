"""A disk that is full in a run: a sentence, nothing half-written, and the same result once there is space again."""

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from slateloop_process import LEARN_LITTLE, SMALL_SHOP, STAGES, Answer, Place
from small_disk import SmallDisk

from flows.ledger_store import read_ledger
from flows.turns import turn

COMMAND = ("run", "--config", "loop.toml", "--json")
RUN_FOLDER = "runs"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    disk = SmallDisk(tmp_path / "disk")
    yield disk
    disk.unmount()


@pytest.fixture
def place(prefect_api: str, disk: SmallDisk) -> Place:
    """A loop that keeps all it has on the disk."""
    place = Place(disk.folder / "shop", prefect_api)
    place.write("loop.toml", SMALL_SHOP + LEARN_LITTLE)
    return place


def run_out_of_space(place: Place, disk: SmallDisk, where: str) -> Answer:
    """Start the loop; the disk is full as soon as a stage, or the run's folder, is written under its temporary name."""
    folder = place.root / (where if where == RUN_FOLDER else f"home/stages/{where}")
    process = place.start(*COMMAND)
    deadline = time.monotonic() + 600
    while not list(folder.glob(".*.tmp")):
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail(f"{where} was never written: {process.communicate()[1]}")
        time.sleep(0.01)
    disk.fill()
    try:
        output, errors = process.communicate(timeout=300)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return Answer(process.returncode, output, errors)


def nobody(message: str, share: float) -> None:
    pytest.fail(f"it waited: {message}")


def stopped_cleanly(place: Place, disk: SmallDisk, where: str) -> None:
    stopped = run_out_of_space(place, disk, where)
    assert stopped.code == 1, stopped.errors
    assert "Traceback" not in stopped.errors
    last = stopped.errors.splitlines()[-1]
    assert last.startswith(f"slateloop: {place.root}/"), last
    assert "no space is left on its disk" in last
    assert "the same command goes on where this one stopped" in last
    assert place.half_written() == []
    assert not list((place.root / "runs").iterdir())
    disk.free()
    # What was finished is whole, the ledger can be read, and nobody has the turn.
    read_ledger(place.root / "home")
    with turn("shop", place.root / "home", nobody):
        pass


def goes_on(place: Place, whole: Answer, already: tuple[str, ...]) -> None:
    resumed = place.call(*COMMAND, timeout=600)
    assert resumed.code == 0, resumed.errors
    assert set(already) <= set(resumed.stages("reused"))
    lineage = resumed.document["lineage"]
    assert lineage["stages"] == whole.document["lineage"]["stages"]
    assert lineage["policy_digest"] == whole.document["lineage"]["policy_digest"]
    assert resumed.document["decision"] == whole.document["decision"]
    assert place.half_written() == []


@pytest.mark.timeout(1_800)
def test_a_run_without_space_says_so_and_goes_on_when_there_is_some(
    first_run: Answer, place: Place, disk: SmallDisk
) -> None:
    for where in ("package", RUN_FOLDER):
        stopped_cleanly(place, disk, where)
    goes_on(place, first_run, STAGES)


@pytest.mark.slow
@pytest.mark.timeout(7_200)
def test_a_loop_that_runs_out_of_space_in_each_stage_goes_on(first_run: Answer, place: Place, disk: SmallDisk) -> None:
    for stage in STAGES:
        stopped_cleanly(place, disk, stage)
    goes_on(place, first_run, STAGES[:-1])


@pytest.mark.slow
@pytest.mark.timeout(1_800)
def test_a_run_whose_own_server_has_no_space_either_says_so(first_run: Answer, place: Place, disk: SmallDisk) -> None:
    alone = replace(place, api=None)
    stopped_cleanly(alone, disk, "user-model")
    goes_on(alone, first_run, STAGES[: STAGES.index("user-model")])
