"""Deletion of a user's rows from logs, tables and records on disk."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_disk import SmallDisk

from components.interactions.log_folder import Log, content_digest, open_log
from components.interactions.stored_copies import forget_below, forget_in_log, names_any, users_below, write_whole


def test_a_log_is_written_anew_with_a_manifest_that_fits(corner_log: Log, corner_rows: pl.DataFrame) -> None:
    assert forget_in_log(corner_log, ["bob"]) == 1
    log = open_log(corner_log.path)
    assert log.scan().collect()["user_id"].unique().to_list() == ["ann"]
    assert log.manifest.n_requests == 4
    assert log.manifest.content_digest == content_digest(log) != corner_log.manifest.content_digest
    assert log.candidate_table()["candidates_digest"].to_list() == ["fruit"]
    assert log.items().height == 4


def test_lists_of_candidates_that_nobody_else_was_offered_go_too(
    write_corner: Callable[..., Log], corner_rows: pl.DataFrame
) -> None:
    log = write_corner(corner_rows)
    forget_in_log(log, ["ann"])
    assert open_log(log.path).candidate_table().is_empty()


def test_a_log_of_nobody_else_is_removed(corner_log: Log) -> None:
    assert forget_in_log(corner_log, ["ann", "bob"]) == 5
    assert not corner_log.path.exists()
    assert list(corner_log.path.parent.iterdir()) == []


def test_another_name_of_the_same_file_does_not_change(corner_log: Log, tmp_path: Path) -> None:
    (part,) = corner_log.part_paths
    os.link(part, tmp_path / "linked.parquet")
    before = (tmp_path / "linked.parquet").read_bytes()
    forget_in_log(corner_log, ["bob"])
    assert (tmp_path / "linked.parquet").read_bytes() == before
    assert part.stat().st_ino != (tmp_path / "linked.parquet").stat().st_ino


def test_below_a_folder_logs_quarantines_and_what_records_quote_are_freed_of_a_user(
    corner_log: Log, corner_rows: pl.DataFrame
) -> None:
    folder = corner_log.path.parent
    (folder / "quarantine").mkdir()
    corner_rows.with_columns(reasons=pl.lit("bad")).write_parquet(folder / "quarantine" / "rows.parquet")
    quoted = [
        {"rule": "gap", "request_id": "s2-0", "seen": "step = 0"},
        {"rule": "gap", "request_id": "s1-0", "seen": "session_id = 's1'"},
        {"rule": "gap", "request_id": "other", "seen": "user_id = 'bob'"},
    ]
    (folder / "checks.json").write_text(json.dumps({"examples": quoted, "n": 3, "note": "bob came"}))
    (folder / "page.html").write_text("<p>bob</p>")
    (folder / "weights.bin").write_bytes(b"bob")
    assert users_below(folder, ["ann", "bob", "eve"]) == {"ann", "bob"}
    changed = forget_below(folder, ["bob"], [])
    assert (changed.logs, changed.n_removed, changed.n_rows, changed.n_files) == ((corner_log.path,), 0, 2, 3)
    assert json.loads((folder / "checks.json").read_text()) == {
        "examples": quoted[1:2], "n": 3, "note": "forgotten came"
    }  # fmt: skip
    assert (folder / "page.html").read_text() == "<p>forgotten</p>"
    assert pl.read_parquet(folder / "quarantine" / "rows.parquet")["user_id"].unique().to_list() == ["ann"]
    assert users_below(folder, ["bob"]) == frozenset()
    assert names_any(folder / "weights.bin", ["bob"])
    assert not [path for path in folder.rglob(".*")]
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}
    assert forget_below(folder, ["bob"], []) == type(changed)()
    assert before == {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}


def test_a_text_that_there_is_no_space_for_leaves_the_one_before_it_and_no_half_of_itself(tmp_path: Path) -> None:
    disk = SmallDisk(tmp_path / "disk")
    try:
        file = disk.folder / "record.json"
        write_whole(file, "before")
        disk.fill()
        with pytest.raises(OSError, match="No space left"):
            write_whole(file, 100_000 * "x")
        assert [(path, path.read_text()) for path in disk.folder.iterdir()] == [(file, "before")]
        disk.free()
        write_whole(file, "after")
        assert file.read_text() == "after"
    finally:
        disk.unmount()


def test_sessions_that_carry_a_user_s_hash_are_theirs(tmp_path: Path) -> None:
    rows = {
        "session_id": ["u1/visit-0", "u2/named-u1", "u1"],
        "user_id": [None, "u2", "u3"],
        "request_id": ["a", "b", "c"],
    }
    pl.DataFrame(rows).write_parquet(tmp_path / "rows.parquet")
    assert forget_below(tmp_path, ["u1"], []).n_rows == 2
    assert pl.read_parquet(tmp_path / "rows.parquet")["request_id"].to_list() == ["b"]


def test_rows_of_a_damaged_log_go_and_what_cannot_be_read_is_named(corner_log: Log, tmp_path: Path) -> None:
    (corner_log.path / "items.parquet").write_text("no table")
    changed = forget_below(tmp_path, ["bob"], [])
    assert (changed.n_rows, changed.logs) == (1, ())
    assert len(changed.left) == 1 and "items.parquet: not readable as Parquet" in changed.left[0]
    assert pl.read_parquet(corner_log.part_paths)["user_id"].unique().to_list() == ["ann"]


@pytest.mark.parametrize("place", [0, (1 << 20) - 3, 5_000_000])
def test_a_name_is_found_wherever_it_stands_in_a_file(tmp_path: Path, place: int) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x" * place + b"name of a user" + b"x" * 10)
    assert names_any(file, ["other", "name of a user"])
    assert not names_any(file, ["name of another"])


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    owners=st.lists(st.sampled_from(["ann", "bob", "eve"]), min_size=1, max_size=8),
    forgotten=st.sets(st.sampled_from(["ann", "bob", "eve"]), min_size=1),
)
def test_exactly_the_users_rows_go(
    write_corner: Callable[..., Log], corner_rows: pl.DataFrame, owners: list[str], forgotten: set[str]
) -> None:
    one = corner_rows.filter(pl.col("session_id") == "s2")
    rows = [one.with_columns(session_id=pl.lit(f"v{n}"), user_id=pl.lit(who)) for n, who in enumerate(owners)]
    log = write_corner(pl.concat(rows))
    n_rows = forget_in_log(log, forgotten)
    kept = [who for who in owners if who not in forgotten]
    assert n_rows == len(owners) - len(kept)
    assert log.path.exists() == bool(kept)
    if kept:
        assert open_log(log.path).scan().collect().sort("session_id")["user_id"].to_list() == kept
