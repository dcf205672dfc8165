"""What people see, in a real browser; `--screenshots FOLDER` keeps pictures of it for the documentation."""

from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page
from slateloop_process import Answer

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
