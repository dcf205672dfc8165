"""What people see, in a real browser; `--screenshots FOLDER` keeps pictures of it for the documentation."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from bento_server import free_port
from playwright.sync_api import Browser, Page, expect
from slateloop_process import Answer, Place

from flows.platform import evidently_part
from flows.settings import TELEMETRY_OFF
from monitoring.workspace import PANELS

pytestmark = [pytest.mark.services, pytest.mark.timeout(900)]


@pytest.fixture(scope="session")
def screenshots(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder for pictures."""
    chosen = request.config.getoption("--screenshots")
    folder = Path(chosen).resolve() if chosen else tmp_path_factory.mktemp("screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def wide(browser: Browser, *, offline: bool = False) -> Page:
    return browser.new_context(offline=offline, viewport={"width": 1400, "height": 1000}).new_page()


def test_the_report_of_a_run_is_drawn_without_a_network(browser: Browser, first_run: Answer, screenshots: Path) -> None:
    page = wide(browser, offline=True)
    asked: list[str] = []
    complaints: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto((Path(first_run.document["run"]["folder"]) / "report.html").as_uri())
    assert first_run.document["decision"]["outcome"].upper() in page.locator("h1").first.inner_text().upper()
    assert all(url.startswith(("file:", "data:")) for url in asked), asked
    assert complaints == []
    drawings = page.locator("svg")
    assert drawings.count() >= 3
    for number in range(drawings.count()):
        box = drawings.nth(number).bounding_box()
        assert box is not None and box["width"] > 50 and box["height"] > 20
    # Nothing sticks out of a screen of ordinary width.
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    page.screenshot(path=screenshots / "report.png")


@dataclass(frozen=True)
class Running:
    """A platform that is up, with one run of its loop."""

    prefect: str
    evidently: str
    run: str
    """The run's id in Prefect."""

    def ask(self, path: str, **body: Any) -> Any:
        answer = httpx.post(f"{self.prefect}/api/{path}", json=body, timeout=30)
        answer.raise_for_status()
        return answer.json()


@pytest.fixture(scope="module")
def platform(shop: Place, first_run: Answer) -> Iterator[Running]:
    """`slateloop up`, and a second run of the small shop on its server: all stages are there already."""
    assert first_run.code == 0, first_run.errors
    assert shop.call("release", "promote", "--policy", first_run.document["lineage"]["baseline_tag"]).code == 0
    ports = {name: free_port() for name in ("prefect", "worker", "endpoint", "evidently")}
    options = [part for name, port in ports.items() for part in (f"--{name}-port", str(port))]
    up = shop.start("up", "--config", "loop.toml", *options)
    try:
        prefect, evidently = (f"http://127.0.0.1:{ports[name]}" for name in ("prefect", "evidently"))
        deadline = time.monotonic() + 400
        while "PREFECT_API_URL=" not in (line := up.stdout.readline() if up.stdout else ""):
            assert up.poll() is None and time.monotonic() < deadline, line
        ran = Place(shop.root, f"{prefect}/api").call("run", "--config", "loop.toml", "--json")
        assert ran.code == 0, ran.errors
        running = Running(prefect, evidently, "")
        (run,) = running.ask("flow_runs/filter", flows={"name": {"any_": ["retraining"]}})
        yield Running(prefect, evidently, run["id"])
    finally:
        up.terminate()
        up.wait(timeout=120)
        if up.poll() is None:
            os.killpg(up.pid, signal.SIGKILL)


def test_the_page_of_a_run_shows_the_decision_its_reasons_and_its_tables(
    browser: Browser, platform: Running, first_run: Answer, screenshots: Path
) -> None:
    page = wide(browser)
    page.goto(f"{platform.prefect}/runs/flow-run/{platform.run}")
    page.get_by_text("Artifacts", exact=True).first.click(timeout=60_000)
    outcome = first_run.document["decision"]["outcome"]
    for key in ("shop-run", "shop-estimates", "shop-ab-test", "shop-history"):
        expect(page.get_by_text(key, exact=True).first).to_be_visible(timeout=60_000)
    page.screenshot(path=screenshots / "run.png")
    (summary,) = platform.ask(
        "artifacts/filter", artifacts={"key": {"any_": ["shop-run"]}, "flow_run_id": {"any_": [platform.run]}}
    )
    page.goto(f"{platform.prefect}/artifacts/artifact/{summary['id']}")
    expect(page.get_by_role("heading", name=outcome.upper())).to_be_visible(timeout=60_000)
    expect(page.get_by_text("Who against whom")).to_be_visible()
    page.screenshot(path=screenshots / "decision.png")


def test_the_form_of_a_deployment_shows_the_configuration_with_its_help(
    browser: Browser, platform: Running, screenshots: Path
) -> None:
    page = wide(browser)
    deployments = platform.ask("deployments/filter", deployments={"name": {"any_": ["shop"]}})
    names = {deployment["entrypoint"].partition(":")[2]: deployment["id"] for deployment in deployments}
    page.goto(f"{platform.prefect}/deployments/deployment/{names['retraining']}/run")
    for words in ("Seed of everything that learns.", "Torch threads: part of the lineage"):
        expect(page.get_by_text(words).first).to_be_visible(timeout=60_000)
    page.screenshot(path=screenshots / "deployment.png", full_page=True)


@pytest.fixture(scope="module")
def evidently(shop: Place, first_run: Answer) -> Iterator[str]:
    """Evidently's pages of looks at a bad day of the small shop, whose champion the run has made."""
    home, script = shop.root / "home", Path(__file__).with_name("watched_days.py")
    own = {"PYTHONPATH": str(Path(__file__).parents[2]), "BENTOML_HOME": str(home / "bentoml")}
    environment = shop.environment | TELEMETRY_OFF | own | {"PREFECT_HOME": str(home / "prefect")}
    looked = subprocess.run(
        [sys.executable, str(script), first_run.document["lineage"]["baseline_tag"]], cwd=shop.root, env=environment,
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert looked.returncode == 0, looked.stderr
    part = evidently_part(home / "evidently", free_port())
    output = (home / "pages.txt").open("w+")
    server = subprocess.Popen(part.command, cwd=shop.root, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        address = f"http://127.0.0.1:{part.port}"
        deadline = time.monotonic() + 200
        while True:
            with suppress(httpx.TransportError):
                if httpx.get(address, timeout=5).is_success:
                    break
            if server.poll() is not None or time.monotonic() > deadline:
                output.seek(0)
                pytest.fail(f"Evidently's pages did not come up: {output.read()[-2000:]}")
            time.sleep(0.5)
        yield address
    finally:
        server.terminate()
        server.wait(timeout=60)
        output.close()


def test_evidentlys_pages_show_every_panel_of_the_loop_and_a_looks_report(
    browser: Browser, evidently: str, shop: Place, screenshots: Path
) -> None:
    n_looks = len(list((shop.root / "home" / "drift" / "shop").glob("*.json")))
    page = wide(browser)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(evidently)
    page.get_by_text("shop", exact=True).first.click(timeout=60_000)
    for title, (subtitle, figures) in PANELS.items():
        panel = page.locator(".MuiCard-root").filter(has=page.get_by_role("heading", name=title, exact=True))
        expect(panel.get_by_text(subtitle)).to_be_visible(timeout=60_000)
        lines = panel.locator("path.MuiLineElement-root")
        expect(lines).to_have_count(len(figures), timeout=60_000)
        for figure, number in zip(figures, range(len(figures)), strict=True):
            expect(panel.get_by_text(figure, exact=True)).to_be_visible()
            # A curve from look to look; the volume is compared from the third day on.
            assert (lines.nth(number).get_attribute("d") or "").count("C") >= n_looks - 2
    page.screenshot(path=screenshots / "evidently.png", full_page=True)
    page.get_by_text("Reports", exact=True).first.click()
    # Newest first.
    page.get_by_text("View", exact=True).first.click(timeout=60_000)
    expect(page.get_by_text("Drift in column 'feedback_seconds'")).to_be_visible(timeout=60_000)
    expect(page.get_by_text("Mean value of 'look.alarm': current: 1.0")).to_be_visible()
    box = page.locator(".js-plotly-plot svg.main-svg").first.bounding_box(timeout=60_000)
    assert box is not None and box["width"] > 200 and box["height"] > 100
    assert all(url.startswith((evidently, "data:", "blob:")) for url in asked), asked
