"""The flow `ab-report` against a real Prefect server: it guards, and leaves its text beside the run."""

import os
import subprocess
import sys
from pathlib import Path

import httpx
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
ab_report(load_config(None, {list(ANSWERED_AT_ONCE)}, "log"))
"""


def run_flow(variables: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", RUN], env=os.environ | variables, cwd=Path(__file__).parents[2], capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_the_flow_takes_a_harmful_challenger_away_and_says_why(
    policy_folder: Path, bentoml_home: Path, prefect_api: str, tmp_path: Path
) -> None:
    record = GateRecord(evidence=evidence(ab=None), config=GateConfig())
    tag = save_model(policy_folder, name="shop-new", lineage={}, decision={}, gate=record)
    log = InteractionLog(f"sqlite:///{tmp_path / 'interactions.db'}")
    log.upgrade()
    releases = Releases(log)
    releases.start("shop", "shop-old:1", "the first one")
    canary = releases.canary("shop", tag, 0.5, 600, "test")
    live_traffic(log, gain=-0.3)
    own = {
        "PREFECT_API_URL": prefect_api,
        "PREFECT_HOME": str(tmp_path / "prefect"),
        "BENTOML_HOME": str(bentoml_home),
        "SLATELOOP_DATABASE": str(log.engine.url),
        "SLATELOOP_HOME": str(tmp_path),
    }
    run_flow(own)
    now = releases.serving("shop")
    assert (now.action, now.challenger, now.number) == ("guard", None, canary.number + 1)
    answer = httpx.post(f"{prefect_api}/artifacts/filter", json={"limit": 200}, timeout=30)
    (text,) = [artifact["data"] for artifact in answer.json() if artifact["key"] == "ab-report"]
    assert text.startswith(f"# shop, release {canary.number}: harm is proven: a session earns")
    assert f"took the challenger away in release {now.number}" in text
    (event,) = events_named(prefect_api, "slateloop.release.rolled-back")
    assert event["resource"]["prefect.resource.id"] == "slateloop.loop.shop"
    assert event["payload"]["reason"].startswith("the guard: a session earns")
    # On a day without a canary there is nothing to compare, which is no failure.
    run_flow(own)
    assert releases.serving("shop").number == now.number
