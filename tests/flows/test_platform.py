"""The supervisor with small parts; tests/end_to_end/test_operation.py starts the real ones."""

import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from bento_server import free_port
from typer.testing import CliRunner

from components.errors import InputError
from flows.command_line import app
from flows.platform import MARK, NotReadyError, Part, Platform, require_free_ports

WEB = (
    "import sys; from http.server import HTTPServer, SimpleHTTPRequestHandler as Page\n"
    "HTTPServer(('127.0.0.1', int(sys.argv[1])), Page).serve_forever()"
)
#: Variable of the platforms that these tests start.
STARTED_BY = "SLATELOOP_TESTS"
#: A part that hears no SIGTERM, and whose child, in a session of its own, hears none either.
STUBBORN = (
    "import signal, subprocess, sys, time\n"
    "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "if len(sys.argv) == 1:\n"
    "    subprocess.Popen([sys.executable, __file__, 'child'], start_new_session=True)\n"
    "time.sleep(600)\n"
)


@pytest.fixture
def heard() -> list[str]:
    return []


@pytest.fixture
def platform(tmp_path: Path, heard: list[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Platform]:
    monkeypatch.setattr("flows.platform.GRACE_SECONDS", 1.0)
    started = Platform(tmp_path / "platform", os.environ | {STARTED_BY: str(os.getpid())}, heard.append)
    yield started
    started.stop()


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """`stop` lets nothing interrupt it; the tests' process goes on after it."""
    import signal

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def web(name: str = "web") -> Part:
    port = free_port()
    return Part(name, [sys.executable, "-c", WEB, str(port)], port, "/")


def marked() -> list[int]:
    """Processes of these tests' platforms, and of nobody else's."""
    found = []
    for process in psutil.process_iter():
        try:
            variables = process.environ()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        if MARK in variables and variables.get(STARTED_BY) == str(os.getpid()):
            found.append(process.pid)
    return found


def test_parts_come_up_answer_and_are_gone_after_the_end(platform: Platform, heard: list[str]) -> None:
    parts = [web("first"), web("second")]
    for part in parts:
        platform.start(part)
    for part in parts:
        platform.wait_for(part)
        assert httpx.get(part.address).status_code == 200
    platform.stop()
    assert heard == ["stopping second", "stopping first"]
    assert not any(part.is_ready() for part in parts)
    assert marked() == []


def test_what_hears_no_sigterm_is_killed_with_its_children(platform: Platform, tmp_path: Path) -> None:
    (tmp_path / "stubborn.py").write_text(STUBBORN)
    platform.start(Part("stubborn", [sys.executable, str(tmp_path / "stubborn.py")]))
    deadline = time.monotonic() + 30
    while len(marked()) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(marked()) == 2
    platform.stop()
    assert marked() == []


def test_children_whose_part_has_died_are_ended_too(platform: Platform, tmp_path: Path, heard: list[str]) -> None:
    (tmp_path / "stubborn.py").write_text(STUBBORN)
    start_and_die = (
        f"import subprocess, sys; subprocess.Popen([sys.executable, {str(tmp_path / 'stubborn.py')!r}, 'child'])"
    )
    platform.start(Part("worker", [sys.executable, "-c", start_and_die]))
    platform.watch()
    assert heard == [f"worker ended with code 0; see {platform.log('worker')}"]
    assert len(marked()) == 1
    platform.stop()
    assert marked() == []


def test_a_part_that_ends_is_told_while_the_others_stay(platform: Platform, heard: list[str]) -> None:
    lasting = web()
    platform.start(lasting)
    platform.wait_for(lasting)
    platform.start(Part("short", [sys.executable, "-c", "raise SystemExit(7)"]))
    watching = threading.Thread(target=platform.watch, daemon=True)
    watching.start()
    deadline = time.monotonic() + 30
    while not heard and time.monotonic() < deadline:
        time.sleep(0.1)
    assert heard == [f"short ended with code 7; see {platform.log('short')}"]
    assert lasting.is_ready()
    platform.stop()
    watching.join(timeout=5)


def test_a_part_that_ends_before_it_answers_is_named_with_its_log(platform: Platform) -> None:
    part = Part("broken", [sys.executable, "-c", "print('no such table'); raise SystemExit(3)"], free_port(), "/")
    platform.start(part)
    with pytest.raises(NotReadyError, match=r"broken: ended with code 3; see .*broken\.log"):
        platform.wait_for(part)
    assert "no such table" in platform.log("broken").read_text()


def test_a_step_that_fails_is_told_in_its_own_words(platform: Platform) -> None:
    step = Part("deploy", [sys.executable, "-c", "raise SystemExit('slateloop: loop.toml: is no TOML')"])
    platform.start(step)
    with pytest.raises(NotReadyError, match=r"deploy: failed with code 1: slateloop: loop\.toml: is no TOML"):
        platform.finish(step)


def test_a_taken_port_is_named_before_anything_starts() -> None:
    part = web("endpoint")
    with socket.socket() as other:
        other.bind(("127.0.0.1", part.port))
        other.listen()
        with pytest.raises(InputError, match=f"--endpoint-port {part.port}: cannot be used: Address already in use"):
            require_free_ports([part])
    require_free_ports([part])


def test_two_parts_do_not_share_a_port() -> None:
    port = free_port()
    with pytest.raises(InputError, match=f"--worker-port {port}: is the port of prefect already"):
        require_free_ports([Part("prefect", [], port), Part("worker", [], port)])


def test_the_command_line_names_a_taken_port(monkeypatch: pytest.MonkeyPatch) -> None:
    # Other tests of this process may have packaged one.
    monkeypatch.setattr("services.packaging.newest_bento", lambda: None)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        ports = [f"--{name}-port={free_port()}" for name in ("prefect", "worker", "endpoint")]
        answer = CliRunner().invoke(app, ["up", *ports, f"--evidently-port={port}"])
    assert answer.exit_code == 2, (answer.output, answer.exception)
    assert f"slateloop: --evidently-port {port}: cannot be used" in answer.stderr
    assert "no endpoint: nothing is packaged yet" in answer.stderr
