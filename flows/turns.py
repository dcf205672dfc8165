"""Whose turn it is: one retraining of a loop at a time, and none that an event wakes soon after another.

A turn is a lock on a file in the platform's folder. The kernel frees it with the process that holds it, however that
ends, so a killed run never stands in the way of the next; and it holds runs of a worker and of the command line apart
alike, with a Prefect server or without. Machines that share no folder are held apart by the deployment's own limit.
"""

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from components.interactions.stored_copies import write_whole
from flows.settings import require_writable

#: Seconds between two looks of a run that waits for its turn.
PATIENCE = 1.0


class Waking(BaseModel):
    """The newest retraining of a loop that an event woke."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    began: datetime = Field(description="When it began.")
    woken_by: str = Field(description="What woke it.")


@contextmanager
def turn(loop: str, home: Path, say: Callable[[str, float], None]) -> Iterator[None]:
    """Hold the loop's turn; waits while another run of the loop holds it.

    Args:
        loop: whose turn it is.
        home: the platform's folder.
        say: is told that one waits and for whom, and that this is over, with the share of waiting that is done.

    Raises:
        InputError: the folder of turns cannot be written.
    """
    with (_folder(home) / f"{loop}.lock").open("a+") as file:
        waited = False
        while not _locked(file.fileno()):
            if not waited:
                file.seek(0)
                holder = file.read().strip() or "another process"
                say(f"waits for the retraining of loop {loop!r} that {holder} is at", 0.0)
            waited = True
            time.sleep(PATIENCE)
        if waited:
            say("done waiting", 1.0)
        file.truncate(0)
        file.write(f"process {os.getpid()}")
        file.flush()
        yield


def too_soon(loop: str, home: Path, hours: float, now: datetime) -> str | None:
    """Why an event must not wake the loop yet; None where it may.

    Args:
        loop: whose turn the caller holds.
        home: the platform's folder.
        hours: least time between two retrainings that events wake.
        now: the moment of the question.
    """
    file = _waking_file(loop, home)
    if not file.is_file():
        return None
    last = Waking.model_validate_json(file.read_bytes())
    if now - last.began >= timedelta(hours=hours):
        return None
    return (
        f"loop {loop!r} was retrained on {last.began:%Y-%m-%d at %H:%M} UTC already, woken by: {last.woken_by}; events "
        f"wake it every {hours:g} hours at most (SLATELOOP_COOLDOWN_HOURS)"
    )


def note_waking(loop: str, home: Path, woken_by: str, now: datetime) -> None:
    """Remember that an event woke the loop."""
    waking = Waking(began=now, woken_by=woken_by)
    write_whole(_waking_file(loop, home), waking.model_dump_json(indent=2) + "\n")


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _folder(home: Path) -> Path:
    folder = home / "turns"
    require_writable(folder, "SLATELOOP_HOME")
    return folder


def _waking_file(loop: str, home: Path) -> Path:
    return _folder(home) / f"{loop}.woken.json"
