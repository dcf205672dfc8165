"""One Prefect server, and one run of the loop, for all tests of this folder."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from flow_process import RunFlow, flow_process
from playwright.sync_api import Browser, sync_playwright
from prefect_process import ServerProcess
from slateloop_process import LEARN_LITTLE, SMALL_SHOP, Answer, Place


@pytest.fixture(scope="session")
def prefect_api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a real Prefect server."""
    server = ServerProcess(tmp_path_factory.mktemp("prefect-server"))
    try:
        server.start()
        yield server.api
    finally:
        server.stop()


@pytest.fixture(scope="session")
def run_flow(prefect_api: str, bentoml_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunFlow]:
    """Runs code with a flow, under some variables."""
    folder = tmp_path_factory.mktemp("flows")
    own = {"PREFECT_API_URL": prefect_api, "PREFECT_HOME": str(folder / "prefect"), "BENTOML_HOME": str(bentoml_home)}
    with flow_process(folder, own) as run:
        yield run


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
