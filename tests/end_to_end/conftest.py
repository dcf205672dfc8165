"""One Prefect server, and one run of the loop, for all tests of this folder."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import httpx
import pytest
from playwright.sync_api import Browser, sync_playwright
from slateloop_process import FOREIGN, LEARN_LITTLE, SMALL_SHOP, Answer, Place

from flows.settings import TELEMETRY_OFF


@pytest.fixture(scope="session")
def prefect_api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a real Prefect server."""
    home = tmp_path_factory.mktemp("prefect-server")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
    own = {
        "PREFECT_HOME": str(home),
        "PREFECT_SERVER_API_HOST": "127.0.0.1",
        "PREFECT_SERVER_API_PORT": str(port),
        "PREFECT_LOGGING_LEVEL": "WARNING",
    }
    output = (home / "server.txt").open("w+")
    server = subprocess.Popen(
        [sys.executable, "-m", "prefect", "server", "start", "--no-ui"],
        cwd=home,
        env=kept | TELEMETRY_OFF | own,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 240
        while not _is_healthy(f"http://127.0.0.1:{port}/api"):
            if server.poll() is not None or time.monotonic() > deadline:
                output.seek(0)
                pytest.fail(f"Prefect's server did not come up: {output.read()[-2000:]}")
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/api"
    finally:
        server.terminate()
        try:
            server.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()
        output.close()


def _is_healthy(api: str) -> bool:
    try:
        return httpx.get(f"{api}/health", timeout=2).status_code == 200
    except httpx.TransportError:
        return False


@pytest.fixture(scope="session")
def shop(tmp_path_factory: pytest.TempPathFactory, prefect_api: str) -> Place:
    """Where the small shop's first run takes place."""
    place = Place(tmp_path_factory.mktemp("shop"), prefect_api)
    place.write("loop.toml", SMALL_SHOP + LEARN_LITTLE)
    return place


@pytest.fixture(scope="session")
def first_run(shop: Place) -> Answer:
    """The small shop's loop, run once."""
    return shop.call("run", "--config", "loop.toml", "--json")


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """A headless Chromium."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no browser is installed: no chromium on the PATH")
    quiet = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=chromium, args=[*quiet, "--disable-sync"])
        yield launched
        launched.close()
