"""What can be known of prefect.yaml without a server."""

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import jsonschema
import pytest
import yaml

from components.errors import InputError
from flows.config import LoopConfig, load_config
from flows.settings import PlatformSettings

REPOSITORY = Path(__file__).parents[2]
DOCUMENT = yaml.safe_load((REPOSITORY / "prefect.yaml").read_text())
ENTRIES = [pytest.param(entry, id=entry["entrypoint"]) for entry in DOCUMENT["deployments"]]
#: Under this seed of hashes the names of events that a trigger waits for collide, and their order tells who came first.
COLLIDING = "4"
SHUFFLED = """
import json, random
from datetime import timedelta
from uuid import UUID
from flows.automations import automations_of, content_of
from prefect.events.schemas.automations import AutomationCore
ids = {f"{name}/tiny": UUID(int=1) for name in ("retraining", "ab-report")}
chance = random.Random(0)
for _ in range(50):
    for wanted in automations_of("tiny", ids, timedelta(hours=24)):
        told = json.loads(wanted.model_dump_json())
        for names in ("expect", "after"):
            chance.shuffle(told["trigger"][names])
        assert content_of(AutomationCore.model_validate(told)) == content_of(wanted), wanted.name
"""


@pytest.mark.parametrize("entry", ENTRIES)
def test_every_entry_names_a_flow_and_parameters_that_it_takes(entry: dict[str, object]) -> None:
    from prefect.client.schemas.schedules import CronSchedule
    from prefect.utilities.callables import parameter_schema

    from flows.deploying import PlannedDeployment
    from flows.platform import POOL

    plan = PlannedDeployment.model_validate(entry)
    flow = plan.flow()
    assert flow.validate_parameters(plan.parameters)
    jsonschema.validate(plan.parameters, parameter_schema(flow).model_dump_for_openapi())
    for schedule in plan.schedules:
        assert CronSchedule(cron=schedule.cron, timezone=schedule.timezone).timezone == "UTC"
        assert not schedule.active, "schedules are off until somebody wants them"
    assert plan.concurrency_limit.limit == 1
    assert plan.work_pool.name == POOL, "the platform's worker takes runs of this pool alone"


def test_no_entry_names_a_folder_of_this_machine() -> None:
    text = (REPOSITORY / "prefect.yaml").read_text()
    assert "pull:" not in text
    assert str(REPOSITORY) not in text


def test_what_is_deployed_is_what_starts_by_itself() -> None:
    found = {
        entry["entrypoint"]: [one["cron"] for one in entry.get("schedules", [])] for entry in DOCUMENT["deployments"]
    }
    assert found == {
        "flows/retraining.py:retraining": ["0 3 * * *"],
        "flows/drift_monitoring.py:drift_monitoring": ["10 * * * *"],
        "flows/ab_report.py:ab_report": ["30 2 * * *"],
        "flows/benchmarking.py:benchmark": [],
    }


def test_the_form_of_a_retraining_has_bounds_and_help() -> None:
    from prefect.utilities.callables import parameter_schema

    from flows.retraining import retraining

    schema = parameter_schema(retraining).model_dump_for_openapi()
    gamma = schema["definitions"]["ReinforceConfig"]["properties"]["gamma"]
    assert {"minimum", "maximum"} <= set(gamma) or {"exclusiveMinimum", "exclusiveMaximum"} & set(gamma)
    assert gamma["description"]
    assert "event" in schema["properties"]["woken_by"]["description"]
    assert schema["required"] == ["config"]
    as_of = schema["definitions"]["LoopConfig"]["properties"]["as_of"]
    assert {"type": "string"} in as_of["anyOf"], "the form's calendar would cut off what is less than a second"


def test_without_a_server_deploying_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from flows.deploying import deploy

    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    with pytest.raises(InputError, match="PREFECT_API_URL is not set"):
        deploy(None, [])


def test_drift_of_one_loop_wakes_that_loop_and_no_other() -> None:
    from flows.automations import automations_of
    from flows.events import LoopEvent, loop_resource

    retraining = uuid4()
    first, *_ = automations_of("shop", {"retraining/shop": retraining}, timedelta(hours=24))
    trigger = first.trigger.model_dump()
    assert trigger["expect"] == {LoopEvent.DRIFTED}
    assert first.trigger.match.root == {"prefect.resource.id": loop_resource("shop")}
    assert trigger["within"] == timedelta(hours=24)
    assert first.actions[0].deployment_id == retraining


@pytest.mark.parametrize(
    ("name", "value"), [("COOLDOWN_HOURS", "a day"), ("COOLDOWN_HOURS", "-1"), ("RUN_HOURS", "0"), ("RUN_HOURS", "nan")]
)
def test_a_wrong_setting_is_named_with_what_was_seen(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"SLATELOOP_{name}", value)
    with pytest.raises(InputError, match=f"SLATELOOP_{name} = {value!r}"):
        PlatformSettings()


@pytest.fixture
def plans() -> dict[str, Any]:
    from flows.deploying import planned

    return {plan.entrypoint.rpartition(":")[2]: plan for plan in planned()}


def test_a_loop_gets_deployments_of_its_own_with_whole_paths(
    plans: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from flows.deploying import of_loop

    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop.toml").write_text('loop = "clicks"\n[source]\nname = "table"\nmapping = "mapping.toml"\n')
    plan = of_loop(plans["retraining"], Path("loop.toml"), ["seed=3"], Path("log.csv"))
    assert plan.name == "clicks"
    assert plan.tags == ("slateloop", "loop:clicks")
    assert plan.parameters["path"] == str(tmp_path / "log.csv")
    config = LoopConfig.model_validate(plan.parameters["config"])
    assert config.seed == 3
    assert config.source.mapping == tmp_path / "mapping.toml"  # type: ignore[attr-defined]
    assert config == load_config(Path("loop.toml"), ["seed=3"]), "the command line's"


def test_the_ab_report_reads_the_log_whatever_the_loop_reads(plans: dict[str, Any], tmp_path: Path) -> None:
    from flows.deploying import of_loop

    (tmp_path / "loop.toml").write_text('loop = "clicks"\nseed = 4\n')
    settings = ["source.n_users=300", "gate.ab_level=0.02"]
    plan = of_loop(plans["ab_report"], tmp_path / "loop.toml", settings, tmp_path / "log.csv")
    assert plan.parameters == {
        "config": {"loop": "clicks", "seed": 4, "source": {"name": "log"}, "gate": {"ab_level": 0.02}},
        "guard": True,
    }


def test_what_belongs_to_no_loop_is_deployed_as_it_stands(plans: dict[str, Any]) -> None:
    from flows.deploying import of_loop

    assert of_loop(plans["benchmark"], None, ["loop=clicks"], None) == plans["benchmark"]


def test_an_automation_is_the_same_in_whatever_order_the_server_tells_of_its_events() -> None:
    environment = os.environ | {"PYTHONHASHSEED": COLLIDING, "PYTHONPATH": str(REPOSITORY)}
    subprocess.run([sys.executable, "-c", SHUFFLED], env=environment, check=True)
