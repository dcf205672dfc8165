"""`slateloop drift` on a real interaction log and a real model store; what it leaves behind."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from click.testing import Result
from shop_traffic import MANY_USERS, release_since, write_traffic
from typer.testing import CliRunner

from components.interactions.log import InteractionLog
from components.interactions.traffic import first_feedback, requests_by_window
from components.policies.policy_folder import StoredPolicy
from flows.command_line import app
from flows.config import load_config
from flows.drift_monitoring import DriftLook, forget_looks, keep_look, look_and_keep, read_looks
from flows.forgetting import forget
from flows.settings import PlatformSettings
from monitoring.traffic_watch import WatchConfig

DAY = timedelta(days=1)
NOW = datetime.now(UTC)
SMALL = ("--window-hours", "24", "--min-users", "100")


@pytest.fixture
def log(place: Path, monkeypatch: pytest.MonkeyPatch) -> InteractionLog:
    url = f"sqlite:///{place / 'interactions.db'}"
    monkeypatch.setenv("SLATELOOP_DATABASE", url)
    monkeypatch.setenv("COLUMNS", "200")
    log = InteractionLog(url)
    log.upgrade()
    return log


@pytest.fixture(scope="module")
def days(stored: StoredPolicy, policy_tag: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SQLite log of five stable days of a champion."""
    file = tmp_path_factory.mktemp("days") / "interactions.db"
    log = InteractionLog(f"sqlite:///{file}")
    log.upgrade()
    release_since(log, policy_tag, NOW - 5 * DAY)
    write_traffic(log, stored, policy_tag, NOW - 5 * DAY, NOW - DAY)
    log.engine.dispose()
    return file


def copy_of(days: Path, place: Path) -> InteractionLog:
    (place / "interactions.db").write_bytes(days.read_bytes())
    return InteractionLog(f"sqlite:///{place / 'interactions.db'}")


@pytest.fixture
def without_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks leave no run in Evidently's workspace, whose drawings take most of their time."""
    monkeypatch.setattr("flows.drift_monitoring.add_look", lambda *arguments, **named: None)


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["drift", *arguments])


def done(*arguments: str) -> Any:
    answer = call(*arguments, "--json")
    assert answer.exit_code == 0, (answer.output, answer.exception)
    return json.loads(answer.stdout)


def test_without_a_release_there_is_nothing_to_watch_and_no_alarm(log: InteractionLog) -> None:
    seen = done()
    assert (seen["alarm"], seen["champion"], seen["columns"]) == (False, None, [])
    assert "nothing is released" in seen["notes"][0]
    assert "nothing could be judged" in call().output


def test_too_few_rows_are_said_to_be_too_few(log: InteractionLog, policy_tag: str) -> None:
    release_since(log, policy_tag, NOW - DAY)
    seen = done()
    assert not seen["alarm"] and seen["champion"] == policy_tag
    assert any("0 users in the window: too few" in note for note in seen["notes"])
    assert any("there is no drift reference" in note for note in seen["notes"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--window-hours", "0"), "--window-hours 0"),
        (("--weekly-false-alarms", "1.5"), "--weekly-false-alarms 1.5"),
        (("--set", "as_of=2026-05-05T00:00:00Z"), "drift is watched of this moment"),
        (("--set", "source.name=storefront"), "live traffic is read from the source 'log'"),
        (("--path", "nowhere.db"), "nowhere.db: no such file"),
    ],
)
def test_what_cannot_be_looked_at_is_refused_with_a_sentence(
    log: InteractionLog, arguments: tuple[str, ...], words: str
) -> None:
    answer = call(*arguments)
    assert answer.exit_code == 2 and words in answer.stderr, (answer.output, answer.exception)


def test_stable_days_do_not_ring_and_the_next_look_has_less_to_spend(
    days: Path, place: Path, stored: StoredPolicy, policy_tag: str
) -> None:
    write_traffic(copy_of(days, place), stored, policy_tag, NOW - DAY, NOW, seed=1)
    arguments = (*SMALL, "--path", str(place / "interactions.db"))
    first, second = done(*arguments), done(*arguments)
    assert not first["alarm"] and not second["alarm"], first["columns"][0]
    assert {column["panel"] for column in first["columns"]} == {
        "features", "items", "policy", "reward", "delay", "volume",
    }  # fmt: skip
    assert first["n_before"] > 3 * first["n_requests"] > 0
    assert 0 < second["level"] < 0.01 < first["level"] <= 0.05
    history = list(read_looks(place / "home", "shop"))
    assert [look.level for look in history] == [second["level"], first["level"]]
    assert history[1] == DriftLook.model_validate(first)
    from evidently.ui.workspace import Workspace

    space = Workspace.create(str(place / "home" / "evidently"))
    (project,) = space.search_project("shop")
    assert len(space.list_runs(project.id)) == 2
    assert "Reward" in {panel.title for panel in project.dashboard.model().panels}
    shares = [column for column in first["columns"] if column["column"] == "effective_share"]
    # The champion's own log: each request counts.
    assert shares[0]["now"] == pytest.approx(1.0, abs=1e-6)


def test_a_bad_day_rings_on_every_panel_that_it_touches(
    days: Path, place: Path, stored: StoredPolicy, policy_tag: str
) -> None:
    config = MANY_USERS.model_copy(update={"taste_shift": 0.8})

    def late(chance: np.random.Generator) -> float:
        return 60.0 + float(chance.exponential(60.0))

    write_traffic(copy_of(days, place), stored, policy_tag, NOW - DAY, NOW, config=config, delay=late, seed=2)
    arguments = (*SMALL, "--path", str(place / "interactions.db"))
    seen = done(*arguments)
    moved = {column["panel"] for column in seen["columns"] if column["moved"]}
    assert seen["alarm"] and {"delay", "reward"} <= moved, seen["columns"]
    assert [column["moved"] for column in seen["columns"]] == sorted(
        (column["moved"] for column in seen["columns"]), reverse=True
    )
    assert "tests found a move" in call(*arguments).output


def test_looks_beyond_the_newest_are_deleted_but_never_those_of_the_week(tmp_path: Path) -> None:
    def look(hours_ago: float) -> DriftLook:
        return DriftLook(
            loop="shop", seen_at=NOW - timedelta(hours=hours_ago), champion=None, weekly_false_alarms=0.05
        )  # fmt: skip

    # Every two hours for 50 days, then every quarter of an hour for four.
    for number in range(600):
        keep_look(tmp_path, look(96 + 2 * number))
    for number in range(384):
        keep_look(tmp_path, look(number / 4))
    forget_looks(tmp_path, look(0))
    kept = list(read_looks(tmp_path, "shop"))
    assert len(kept) == 500 and kept[0] == look(0) and kept[-1] == look(96 + 2 * 115)
    # Every minute for half a day: all of them are the week's, and with them 500 of older ones go.
    for number in range(720):
        keep_look(tmp_path, look(number / 60 + 1 / 120))
    forget_looks(tmp_path, look(0))
    kept = list(read_looks(tmp_path, "shop"))
    assert len(kept) == 384 + 720 + 37 and kept[-1] == look(168)


@pytest.mark.usefixtures("without_pages")
def test_a_look_reads_no_further_back_than_the_last_that_judged(
    days: Path, place: Path, stored: StoredPolicy, policy_tag: str
) -> None:
    copy_of(days, place)
    arguments = (*SMALL, "--path", str(place / "interactions.db"))
    done(*arguments)
    (place / "home" / "drift" / "shop" / "20250101T000000.000000Z.json").write_text("no look at all")
    assert done(*arguments)["level"] < 0.01


@pytest.mark.usefixtures("without_pages")
def test_the_first_days_are_read_once_until_a_user_is_forgotten(
    days: Path, place: Path, stored: StoredPolicy, policy_tag: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = copy_of(days, place)
    write_traffic(log, stored, policy_tag, NOW - DAY, NOW, seed=1)
    monkeypatch.setenv("SLATELOOP_DATABASE", str(log.engine.url))
    config, watch = load_config(None, [], "log"), WatchConfig(min_users=100, baseline_days=2)
    first = look_and_keep(config, None, watch, NOW)
    (kept,) = (place / "home" / "stages" / "first-days-shop").iterdir()
    users = pl.read_parquet(kept / "users.parquet")["user_id"]
    assert first.n_before > 1_000 and users.n_unique() == len(users) > 100
    # Rows that were too old are gone from the log alone.
    half = NOW - 4 * DAY
    assert CliRunner().invoke(app, ["forget", "--older-than", half.isoformat()]).exit_code == 0
    again = look_and_keep(config, None, watch, NOW)
    assert again.n_before == first.n_before
    assert {one.column: one.p_value for one in again.columns if one.against == "first days"} == pytest.approx(
        {one.column: one.p_value for one in first.columns if one.against == "first days"}
    )
    # Another baseline takes the place of what was kept, and the log holds half of it now.
    other = look_and_keep(config, None, watch.model_copy(update={"baseline_days": 2.5}), NOW)
    (kept_now,) = (place / "home" / "stages" / "first-days-shop").iterdir()
    assert kept_now != kept and 0 < other.n_before < first.n_before
    someone = pl.read_parquet(kept_now / "users.parquet")["user_id"][0]
    forgotten = forget(str(log.engine.url), [someone], PlatformSettings())
    assert forgotten.whole and forgotten.stages == 1 and not kept_now.exists()


def test_the_log_tells_volume_and_delay_without_an_import(days: Path, policy_tag: str) -> None:
    log = InteractionLog(f"sqlite:///{days}")
    traffic = requests_by_window(log, "shop", NOW - DAY, DAY, 28)
    # The first of the four days began before the first request: it is no whole one.
    assert len(traffic) == 3 and all(one.requests > 0 and one.squares >= one.requests for one in traffic)
    assert requests_by_window(log, "another", NOW, DAY, 28) == []
    outage = requests_by_window(log, "shop", NOW + DAY, DAY, 28)
    assert outage[-1].requests == 0
    heard = first_feedback(log, "shop", NOW - 4 * DAY, NOW, timedelta(seconds=5))
    everything = first_feedback(log, "shop", NOW - 4 * DAY, NOW, timedelta(hours=1))
    assert 0 < heard.height < everything.height == sum(one.requests for one in traffic)
    assert heard["feedback_seconds"].max() <= 5
