"""The flow `ab-report` against a real Prefect server: it guards, promotes, and leaves its text beside the run."""

from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from flow_process import RunFlow
from gate_evidence import evidence
from live_traffic import ANSWERED_AT_ONCE, live_traffic
from prefect_events import events_named

from components.experiment.gate import GateConfig, GateRecord
from components.interactions.log import InteractionLog
from services.policy_store import save_model
from services.releases import Releases

RUN = f"""
from flows.ab_report import ab_report
from flows.config import load_config
ab_report(load_config(None, [*{list(ANSWERED_AT_ONCE)}, *settings], "log"))
"""


@dataclass(frozen=True)
class Canary:
    """A canary that was let out, and the flow that looks at it."""

    log: InteractionLog
    releases: Releases
    tag: str
    number: int
    run: RunFlow
    home: Path

    def run_flow(self, *settings: str) -> None:
        variables = {"SLATELOOP_DATABASE": str(self.log.engine.url), "SLATELOOP_HOME": str(self.home)}
        self.run(f"settings = {list(settings)}{RUN}", variables)


@pytest.fixture
def canary(policy_folder: Path, run_flow: RunFlow, tmp_path: Path) -> Canary:
    record = GateRecord(evidence=evidence(ab=None), config=GateConfig())
    tag = save_model(policy_folder, name="shop-new", lineage={}, decision={}, gate=record)
    log = InteractionLog(f"sqlite:///{tmp_path / 'interactions.db'}")
    log.upgrade()
    releases = Releases(log)
    releases.start("shop", "shop-old:1", "the first one")
    return Canary(log, releases, tag, releases.canary("shop", tag, 0.5, 600, "test").number, run_flow, tmp_path)


def test_the_flow_takes_a_harmful_challenger_away_and_says_why(canary: Canary, prefect_api: str) -> None:
    live_traffic(canary.log, gain=-0.3)
    canary.run_flow("release.promote=true")
    now = canary.releases.serving("shop")
    assert (now.action, now.challenger, now.number) == ("guard", None, canary.number + 1)
    answer = httpx.post(f"{prefect_api}/artifacts/filter", json={"limit": 200}, timeout=30)
    (text,) = [artifact["data"] for artifact in answer.json() if artifact["key"] == "ab-report"]
    assert text.startswith(f"# shop, release {canary.number}: harm is proven: a session earns")
    assert f"took the challenger away in release {now.number}" in text
    (event,) = events_named(prefect_api, "slateloop.release.rolled-back")
    assert event["resource"]["prefect.resource.id"] == "slateloop.loop.shop"
    assert event["payload"]["reason"].startswith("the guard: a session earns")
    # On a day without a canary there is nothing to compare, which is no failure.
    canary.run_flow()
    assert canary.releases.serving("shop").number == now.number


def test_the_flow_promotes_a_proven_challenger_where_it_is_to(canary: Canary, prefect_api: str) -> None:
    live_traffic(canary.log, gain=0.3)
    canary.run_flow()
    assert canary.releases.serving("shop").number == canary.number
    canary.run_flow("release.promote=true")
    now = canary.releases.serving("shop")
    assert (now.action, now.champion, now.challenger) == ("promote", canary.tag, None)
    (event,) = events_named(prefect_api, "slateloop.release.promoted")
    assert event["payload"]["reason"] == now.reason
    assert now.reason.startswith("the gate: ")
    assert event["payload"]["evidence"]["to_release"] == now.number
