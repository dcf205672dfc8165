"""An interrupt stops a run wherever it lands."""

import os
import signal
import sys

import pytest

from flows.interruption import heed_interrupt, remembered_interrupts


class Interrupting:
    """Python ignores what is raised in a finaliser."""

    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGINT)


def test_an_interrupt_that_was_lost_is_raised_at_the_next_step_and_nothing_is_printed(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Python's own: pytest has put another in its place.
    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)
    with remembered_interrupts():
        heed_interrupt()
        Interrupting()
        with pytest.raises(KeyboardInterrupt):
            heed_interrupt()
    heed_interrupt()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert capfd.readouterr().err == ""


def test_an_interrupt_that_no_step_heeds_is_raised_at_the_end() -> None:
    with pytest.raises(KeyboardInterrupt), remembered_interrupts():
        Interrupting()
    heed_interrupt()


def test_an_interrupt_that_was_dealt_with_is_not_raised_again() -> None:
    with remembered_interrupts():
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


class Failing:
    def __del__(self) -> None:
        raise ValueError("of another kind")


def test_what_else_is_lost_is_told_as_ever(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)
    with remembered_interrupts():
        Failing()
    assert "of another kind" in capfd.readouterr().err


def test_an_interrupt_is_raised_where_it_lands() -> None:
    with pytest.raises(KeyboardInterrupt), remembered_interrupts():
        os.kill(os.getpid(), signal.SIGINT)
    heed_interrupt()


def test_a_process_that_ignores_interrupts_goes_on_ignoring_them() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with remembered_interrupts():
            os.kill(os.getpid(), signal.SIGINT)
            heed_interrupt()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
