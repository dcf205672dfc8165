import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from flows.turns import note_waking, too_soon, turn

NOW = datetime(2026, 11, 27, 3, 0, tzinfo=UTC)
REPOSITORY = Path(__file__).parents[2]
HOLD = """
import sys, time
from pathlib import Path
from flows.turns import turn
with turn(sys.argv[1], Path(sys.argv[2]), lambda message, share: print(message, flush=True)):
    print("holds", flush=True)
    time.sleep(60)
"""


def holder(loop: str, home: Path) -> subprocess.Popen[str]:
    """A process that takes a loop's turn and keeps it."""
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, loop, str(home)],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        text=True,
    )


def says(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def nobody(message: str, share: float) -> None:
    pytest.fail(f"it waited: {message}")


def test_a_second_run_waits_until_the_first_is_killed(tmp_path: Path) -> None:
    first = holder("shop", tmp_path)
    second = None
    try:
        assert says(first) == "holds"
        second = holder("shop", tmp_path)
        assert says(second) == f"waits for the retraining of loop 'shop' that process {first.pid} is at"
        os.kill(first.pid, signal.SIGKILL)
        assert says(second) == "done waiting"
        assert says(second) == "holds"
    finally:
        for process in filter(None, (first, second)):
            process.kill()
            process.communicate()


def test_another_loop_and_another_home_wait_for_nobody(tmp_path: Path) -> None:
    with turn("shop", tmp_path / "one", nobody):
        with turn("news", tmp_path / "one", nobody), turn("shop", tmp_path / "two", nobody):
            pass


def test_a_turn_is_free_again_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), turn("shop", tmp_path, nobody):
        raise ZeroDivisionError
    began = time.monotonic()
    with turn("shop", tmp_path, nobody):
        assert time.monotonic() - began < 1


def test_the_first_event_wakes_and_the_next_one_within_the_cooldown_does_not(tmp_path: Path) -> None:
    assert too_soon("shop", tmp_path, 24, NOW) is None
    note_waking("shop", tmp_path, "drift of 0.4", NOW)
    reason = too_soon("shop", tmp_path, 24, NOW + timedelta(hours=23, minutes=59))
    assert reason is not None
    assert "drift of 0.4" in reason
    assert "every 24 hours" in reason
    assert too_soon("shop", tmp_path, 24, NOW + timedelta(hours=24)) is None
    assert too_soon("news", tmp_path, 24, NOW + timedelta(hours=1)) is None
    assert too_soon("shop", tmp_path, 0, NOW) is None
