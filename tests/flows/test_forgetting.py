"""Forgetting, place by place, on stores of the tests' own; tests/end_to_end does it to a real run."""

import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from click.testing import Result
from typer.testing import CliRunner

from components.interactions.importers import interaction_log
from components.interactions.log import InteractionLog, Recommended
from components.interactions.log_folder import Log, open_log
from flows import forgetting
from flows.command_line import app
from flows.data_versions import add_to_cache, pin, pinned_digest
from flows.stage_store import StageStore
from services.settings import user_hash

KEY = "a key of sixteen or more"
ANN, BOB = (user_hash(KEY.encode(), name) for name in ("ann", "bob"))
SHOWN = Recommended(
    "r", "shop", ANN, None, 10**15, ("a", "b"), False, ("b",), (-0.7,), (), {}, "p:1", "champion", 1, ""
)


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def forget(*arguments: str | Path) -> dict[str, Any]:
    answer = call("forget", *arguments, "--json")
    assert answer.exit_code == 0, (answer.output, answer.exception)
    document: dict[str, Any] = json.loads(answer.stdout)
    return document


@pytest.fixture
def database(place: Path, monkeypatch: pytest.MonkeyPatch) -> InteractionLog:
    """The endpoint's log: Ann's two requests, Bob's one, and a last one of Eve's."""
    monkeypatch.setenv("SLATELOOP_USER_KEY", KEY)
    log = InteractionLog(f"sqlite:///{place / 'home' / 'interactions.db'}")
    log.upgrade()
    later = replace(SHOWN, request_id="e1", user_id="e" * 64, shown_at=2 * 10**15)
    log.write([[SHOWN, replace(SHOWN, request_id="r2"), replace(SHOWN, request_id="b1", user_id=BOB), later]])
    return log


def imported(database: InteractionLog, out: Path) -> Log:
    return interaction_log.import_database(interaction_log.Config(), str(database.engine.url), out, "shop")


def write_stage(place: Path, name: str, key: str, upstream: dict[str, str], log: InteractionLog | None = None) -> Path:
    def compute(out: Path) -> None:
        (out / "result.txt").write_text("42")
        if log is not None:
            imported(log, out / "log")

    return StageStore(place / "home" / "stages").write(name, key * 64, compute, upstream).path


def write_run(place: Path, name: str, dataset: str, started: str = "2026-01-01T00:00:00Z") -> Path:
    folder = place / "runs" / name
    folder.mkdir(parents=True)
    summary = {"run": name, "loop": "shop", "source": "log", "outcome": "hold", "folder": str(folder)}
    (folder / "run.json").write_text(json.dumps(summary | {"started": started}))
    (folder / "lineage.json").write_text(json.dumps({"run": name, "stages": {"import-data": dataset * 64}}))
    return folder


def mark(folder: Path) -> Any:
    return json.loads((folder / "lineage.json").read_text()).get("forgotten")


def test_stages_that_hold_a_user_or_came_from_them_are_dropped_and_their_runs_marked(
    place: Path, database: InteractionLog
) -> None:
    dataset = write_stage(place, "import-data", "a", {"path": "0"}, database)
    below = write_stage(place, "user-model", "b", {"split": "a" * 64})
    far_below = write_stage(place, "policy", "c", {"users": "b" * 64})
    other = write_stage(place, "import-data", "d", {"path": "1"})
    learned, elsewhere = write_run(place, "shop-1", "a"), write_run(place, "shop-2", "d")
    done = forget("ann")
    assert (done["requests"], done["stages"], done["runs"]) == (2, 3, ["shop-1"])
    assert [path.exists() for path in (dataset, below, far_below, other)] == [False, False, False, True]
    assert mark(learned)["users"] == 1
    assert mark(elsewhere) is None
    # Datasets that are gone are taken to hold whom the loop knew when their runs began.
    write_run(place, "shop-3", "f")
    assert forget("bob")["runs"] == ["shop-1", "shop-3"]
    assert mark(learned)["users"] == 2
    assert mark(elsewhere) is None


def test_a_run_that_began_before_the_user_came_is_replayable(place: Path, database: InteractionLog) -> None:
    old = write_run(place, "shop-1", "f", "2001-01-01T00:00:00Z")
    assert forget("ann")["runs"] == []
    assert mark(old) is None


def test_what_was_interrupted_is_finished_by_the_same_command(
    place: Path, database: InteractionLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = imported(database, place / "data" / "log")
    dataset = write_stage(place, "import-data", "a", {"path": "0"}, database)
    below = write_stage(place, "user-model", "b", {"split": "a" * 64})
    run = write_run(place, "shop-1", "a")
    for step in ("_affected_stages", "forget_below", "_drop_stages", "purge_cache", "erase"):
        with monkeypatch.context() as broken:
            broken.setattr(forgetting, step, lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
            answer = call("forget", "ann", "--json")
        assert answer.exit_code == 130
        assert "the same command goes on" in answer.stderr
    assert forget("ann")["left"] == []
    assert not dataset.exists() and not below.exists()
    assert mark(run) is not None
    assert open_log(log.path).scan().collect()["user_id"].to_list() == [BOB]


def test_a_stage_goes_before_the_one_that_tells_of_it(
    place: Path, database: InteractionLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_stage(place, "import-data", "a", {"path": "0"}, database)
    write_stage(place, "split", "b", {"dataset": "a" * 64})
    write_stage(place, "policy", "c", {"split": "b" * 64, "dataset": "a" * 64})
    order: list[str] = []
    monkeypatch.setattr(forgetting, "discard_folder", lambda folder: order.append(folder.parent.name))
    forget("ann")
    assert order == ["policy", "split", "import-data"]


def test_dvc_s_cache_keeps_the_rewritten_version_alone(place: Path, database: InteractionLog) -> None:
    from dvc.repo import Repo

    Repo.init(str(place), no_scm=True).close()
    log = imported(database, place / "data" / "log")
    add_to_cache(log.path)
    pinned = pin(place / "data")
    done = forget("--hash", ANN)
    assert done["pinned"] is True and done["cached"] == 3  # the rows, and two lists of files
    assert pinned_digest(place / "data") == pinned
    objects = [file for file in (place / ".dvc" / "cache").rglob("*") if file.is_file()]
    tables = [pl.read_parquet(file) for file in objects if file.read_bytes().startswith(b"PAR1")]
    assert {user for table in tables if "user_id" in table.columns for user in table["user_id"]} == {BOB}
    assert add_to_cache(log.path) in {file.parent.name + file.name for file in objects}
    assert forget("ann")["pinned"] is False


def test_a_log_elsewhere_and_one_that_holds_nobody_else(place: Path, database: InteractionLog) -> None:
    log = imported(database, place / "elsewhere" / "log")
    assert forget("ann", "bob", "--also", place / "elsewhere")["logs_removed"] == 1
    assert not log.path.exists()


def test_a_user_nobody_knows_leaves_a_tombstone_and_says_so(place: Path, database: InteractionLog) -> None:
    answer = call("forget", "nobody", "--hash", "f" * 64)
    assert (answer.exit_code, answer.stdout) == (0, "No rows were found; 2 users left a tombstone all the same.\n")


def test_what_another_process_may_still_write_is_told_and_what_nobody_does_is_removed(
    place: Path, database: InteractionLog
) -> None:
    stages = place / "home" / "stages" / "split"
    alive, dead = stages / f".key.{os.getpid()}.abcdef.tmp", stages / ".key.999999.abcdef.tmp"
    orphan = place / "data" / ".log.0123abcd.tmp"
    for folder in (alive, dead, orphan):
        folder.mkdir(parents=True)
        (folder / "rows.txt").write_text(ANN)
    for path in (orphan / "rows.txt", orphan):
        os.utime(path, (time.time() - 7_200,) * 2)
    answer = call("forget", "ann")
    assert answer.exit_code == 1
    assert f"Under way: {alive}" in answer.stdout
    assert "not everything is gone yet" in answer.stderr
    assert not dead.exists() and not orphan.exists()


def test_files_that_still_name_the_user_are_told(place: Path, database: InteractionLog) -> None:
    (place / "home" / "prefect").mkdir()
    (place / "home" / "prefect" / "notes.db").write_text(f"failed at {ANN}")
    answer = call("forget", "ann")
    assert answer.exit_code == 1
    assert "Left: " in answer.stdout and "prefect/notes.db: names a user" in answer.stdout


def test_a_damaged_lineage_is_named_before_anything_is_deleted(place: Path, database: InteractionLog) -> None:
    (write_run(place, "shop-1", "a") / "lineage.json").write_text("{")
    answer = call("forget", "ann")
    assert answer.exit_code == 2
    assert "shop-1/lineage.json: is no run's lineage" in answer.stderr
    assert forgetting.first_shown(database, [ANN])


def test_retention_deletes_what_is_old_and_leaves_no_tombstone(place: Path, database: InteractionLog) -> None:
    log = imported(database, place / "data" / "log")
    assert forget("--older-than", "2001-01-01")["requests"] == 0
    assert forget("--older-than", "2002-01-01", "--loop", "news")["requests"] == 0
    answer = call("forget", "--older-than", "9000d")
    assert answer.stdout == "Interaction log: 3 requests, 0 pieces of feedback deleted.\n"
    assert open_log(log.path).manifest.n_requests == 3
    database.write([[SHOWN]])
    assert forget("ann")["requests"] == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "expected users to forget (USER or --hash), or --older-than"),
        (["ann", "--older-than", "1d"], "expected users to forget (USER or --hash), or --older-than"),
        (["ann", "--loop", "shop"], "--loop shop: goes with --older-than"),
        (["--older-than", "1d", "--also", "x"], "--also x: goes with users"),
        (["ann", "--also", "/no/where"], "--also /no/where: no such folder"),
        (["--hash", "abc"], "--hash abc: expected the 64 hexadecimal digits"),
        (["--older-than", "0d"], "--older-than 0d: expected days, such as 180d, or a date"),
        (["--older-than", "2999-01-01"], "--older-than 2999-01-01: lies in the future"),
        (["ann"], "user.key: no such file, and SLATELOOP_USER_KEY is not set"),
        (["--hash", "a" * 64], "interactions.db: no such file"),
    ],
)
def test_a_wrong_wish_is_refused_and_nothing_is_made(place: Path, arguments: list[str], words: str) -> None:
    answer = call("forget", *arguments)
    assert answer.exit_code == 2, (answer.output, answer.exception)
    assert words in answer.stderr
    assert not (place / "home" / "user.key").exists()
    assert not (place / "home" / "interactions.db").exists()
