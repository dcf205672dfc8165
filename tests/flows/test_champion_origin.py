"""From a champion's tag to what its run left: reference, user model, items; and a look that uses all of it."""

import json
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from shop_traffic import release_since, write_traffic
from typer.testing import CliRunner

from components.interactions.log import InteractionLog
from components.interactions.log_folder import Log
from components.interactions.splits import TRAIN
from components.policies.policy_folder import StoredPolicy
from components.world_model.user_model import UserModel
from components.world_model.user_model_folder import StoredUserModel, save_user_model
from flows.champion_origin import find_origin
from flows.command_line import app
from flows.run_record import RunSummary
from flows.settings import PlatformSettings
from flows.stage_store import StageStore
from monitoring.drift_reference import write_drift_reference


@pytest.fixture
def run(place: Path, stored: StoredPolicy, policy_tag: str, storefront_log: Log) -> Path:
    """What a run that made the policy leaves: its folder, and two of its stages."""
    vocabulary = stored.description.vocabulary
    store, stages = StageStore(place / "home" / "stages"), {"user-model": "a" * 64, "split": "b" * 64}

    def users(out: Path) -> None:
        save_user_model(StoredUserModel(UserModel(stored.policy.features.encoder, 4, "per_position"), vocabulary), out)

    store.write("user-model", stages["user-model"], users, {})
    store.write("split", stages["split"], lambda out: shutil.copytree(storefront_log.path, out / TRAIN), {})
    run = place / "runs" / "shop-1"
    write_drift_reference(storefront_log, vocabulary, run / "drift_reference" / "reference", seed=0)
    summary = RunSummary(
        run=run.name, loop="shop", source="storefront", started=datetime.now(UTC), outcome="canary", folder=str(run)
    )
    (run / "run.json").write_text(summary.model_dump_json())
    (run / "lineage.json").write_text(json.dumps({"policy_tag": policy_tag, "stages": stages}))
    return run


def test_a_champion_leads_to_its_reference_its_user_model_and_its_items(run: Path, policy_tag: str) -> None:
    origin = find_origin(policy_tag, PlatformSettings())
    assert origin.missing == () and origin.user_model is not None and origin.items is not None
    assert origin.reference is not None and {"context.device", "n_candidates"} <= set(origin.reference.columns)
    assert {"category", "price"} <= set(origin.items.columns)


def test_what_is_gone_of_a_run_is_said(run: Path, place: Path, policy_tag: str) -> None:
    shutil.rmtree(place / "home" / "stages" / "user-model")
    (run / "drift_reference" / "reference" / "drift_reference_owners.parquet").unlink()
    origin = find_origin(policy_tag, PlatformSettings())
    assert (origin.reference, origin.user_model) == (None, None)
    assert len(origin.missing) == 2 and all("is not" in sentence for sentence in origin.missing)
    assert "no run in" in find_origin("shop-other:1", PlatformSettings()).missing[0]


def test_a_look_asks_the_user_model_and_holds_users_against_the_training_log(
    run: Path, place: Path, stored: StoredPolicy, policy_tag: str
) -> None:
    log = InteractionLog(f"sqlite:///{place / 'interactions.db'}")
    log.upgrade()
    now, day = datetime.now(UTC), timedelta(days=1)
    release_since(log, policy_tag, now - 3.5 * day)
    write_traffic(log, stored, policy_tag, now - 3.5 * day, now)
    answer = CliRunner().invoke(
        app, ["drift", "--path", str(place / "interactions.db"), "--min-users", "100", "--json"]
    )
    assert answer.exit_code == 0, (answer.output, answer.exception)
    seen = json.loads(answer.stdout)
    assert seen["notes"] == ["2 earlier windows with traffic; from 3 on the number of requests is compared"]
    against = {(column["column"], column["against"]) for column in seen["columns"]}
    assert {("context.segment", "training"), ("context.segment", "first days")} <= against
    assert {("user_model_nats", "first days"), ("first_item.category", "first days")} <= against
