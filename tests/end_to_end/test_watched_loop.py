"""The flow `drift-monitoring` against a real Prefect server: its artifact, and the event that others act on."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
from flow_process import RunFlow
from prefect_events import events_named
from shop_traffic import release_since, write_traffic

from components.interactions.log import InteractionLog
from components.policies.policy_folder import StoredPolicy

RUN = """
from flows.config import load_config
from flows.drift_monitoring import drift_monitoring
from monitoring.traffic_watch import WatchConfig
drift_monitoring(load_config(None, [], "log"), watch=WatchConfig(min_users=100))
"""


def test_the_flow_leaves_its_text_and_tells_of_an_alarm(
    stored: StoredPolicy, policy_tag: str, run_flow: RunFlow, prefect_api: str, tmp_path: Path
) -> None:
    log = InteractionLog(f"sqlite:///{tmp_path / 'interactions.db'}")
    log.upgrade()
    now, day = datetime.now(UTC), timedelta(days=1)
    release_since(log, policy_tag, now - 5 * day)
    write_traffic(log, stored, policy_tag, now - 5 * day, now - day)
    write_traffic(log, stored, policy_tag, now - day, now, delay=lambda chance: 600.0, seed=1)
    run_flow(RUN, {"SLATELOOP_DATABASE": str(log.engine.url), "SLATELOOP_HOME": str(tmp_path)})
    answer = httpx.post(f"{prefect_api}/artifacts/filter", json={"limit": 200}, timeout=30)
    (text,) = [artifact["data"] for artifact in answer.json() if artifact["key"] == "drift-monitoring"]
    assert text.startswith("# shop: 1 of ") and "| **moved** | delay | feedback_seconds |" in text
    (event,) = events_named(prefect_api, "slateloop.drift.detected")
    assert event["resource"]["prefect.resource.id"] == "slateloop.loop.shop"
    assert "feedback_seconds" in event["payload"]["reason"]
    assert event["payload"]["evidence"]["moved"][0]["panel"] == "delay"
