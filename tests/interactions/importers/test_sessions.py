import gzip
from datetime import UTC, datetime
from pathlib import Path

import polars as pl
import pytest

from components.errors import InputError
from components.interactions.contract import Evidence
from components.interactions.importers import importers, sessions
from components.interactions.log_folder import Log, open_log

DATA = Path(__file__).parents[3] / "../shared/data"


def diginetica(folder: Path, items: dict[int, list[int]]) -> Path:
    folder.mkdir()
    frame = pl.DataFrame(
        {"session_idx": list(items), "items": list(items.values())},
        schema={"session_idx": pl.Int32, "items": pl.List(pl.Int32)},
    )
    frame.write_parquet(folder / "sessions_remapped.parquet")
    return folder


def yoochoose(folder: Path, train: str, test: str) -> Path:
    folder.mkdir()
    for name, rows in (("train", train), ("test", test)):
        text = "SessionId\tItemId\tTime\n" + rows
        (folder / f"clicks_{name}.tsv.gz").write_bytes(gzip.compress(text.encode()))
    return folder


def imported(path: Path, out: Path, **config: int) -> Log:
    return open_log(sessions.import_log(sessions.Config(**config), path, out, "shop").path)


def rows(log: Log, *columns: str) -> list[tuple[object, ...]]:
    return log.scan().select(columns).collect().rows()


def test_the_folder_offers_every_importer_under_the_name_of_its_source() -> None:
    assert sorted(importers()) == ["log", "movielens", "obd", "sessions", "table", "trivago"]


def test_a_view_becomes_a_row_whose_events_hold_its_item_and_the_last_one_leaves(tmp_path: Path) -> None:
    log = imported(diginetica(tmp_path / "source", {7: [30, 10, 30], 8: [20, 10]}), tmp_path / "log")
    view = {"type": "view"}
    assert rows(log, "request_id", "session_id", "user_id", "step", "events", "session_end", "policy") == [
        ("7:0", "7", "7", 0, [view | {"item_id": "30"}], None, "unknown"),
        ("7:1", "7", "7", 1, [view | {"item_id": "10"}], None, "unknown"),
        ("7:2", "7", "7", 2, [view | {"item_id": "30"}], "left", "unknown"),
        ("8:0", "8", "8", 0, [view | {"item_id": "20"}], None, "unknown"),
        ("8:1", "8", "8", 1, [view | {"item_id": "10"}], "left", "unknown"),
    ]
    assert log.items()["item_id"].to_list() == ["10", "20", "30"]


def test_diginetica_claims_neither_slates_nor_users_nor_times_nor_purchases(tmp_path: Path) -> None:
    log = imported(diginetica(tmp_path / "source", {1: [1, 2]}), tmp_path / "log")
    manifest = log.manifest
    assert (manifest.evidence, manifest.slate_size, manifest.responses) == (Evidence.CLICKS, 0, "choice")
    assert not (manifest.has_users or manifest.has_times or manifest.has_purchases)
    assert any("not identified" in sentence for sentence in manifest.limits)
    unknown = ("timestamp", "available_at", "slate", "candidates", "slate_log_prob", "clicked", "purchased")
    assert rows(log, *unknown) == [(None,) * len(unknown)] * 2


def test_a_long_session_is_cut_and_censored_and_a_short_one_is_left_out_and_counted(tmp_path: Path) -> None:
    source = diginetica(tmp_path / "source", {1: [1], 2: [1, 2], 3: [1, 2, 9]})
    log = imported(source, tmp_path / "log", max_steps=2)
    assert rows(log, "request_id", "session_end") == [
        ("2:0", None),
        ("2:1", "left"),
        ("3:0", None),
        ("3:1", "censored"),
    ]
    assert log.items()["item_id"].to_list() == ["1", "2"]
    assert "1 of 3 sessions had fewer than 2 views and were left out." in log.manifest.limits
    assert "1 sessions were cut after 2 views and count as censored there." in log.manifest.limits


def test_a_smaller_sample_of_sessions_is_part_of_a_larger_one_whatever_their_order(tmp_path: Path) -> None:
    items = {number: [number, number + 1] for number in range(60)}
    forwards = diginetica(tmp_path / "forwards", items)
    backwards = diginetica(tmp_path / "backwards", dict(reversed(items.items())))
    small = imported(forwards, tmp_path / "small", max_sessions=10)
    same = imported(backwards, tmp_path / "same", max_sessions=10)
    large = imported(forwards, tmp_path / "large", max_sessions=30)
    chosen = {session for (session,) in rows(small, "session_id")}
    assert len(chosen) == 10
    assert chosen < {session for (session,) in rows(large, "session_id")}
    assert small.manifest.content_digest == same.manifest.content_digest
    assert "The log is a sample: 10 of 60 sessions." in small.manifest.limits


def test_sessions_stay_whole_when_the_log_has_several_parts(tmp_path: Path) -> None:
    log = imported(diginetica(tmp_path / "source", {n: [1, 2, 3] for n in range(40_000)}), tmp_path / "log")
    parts = [part.group_by("session_id").len() for part in log.parts()]
    assert len(parts) == 2
    assert sum(part.height for part in parts) == 40_000
    assert all((part["len"] == 3).all() for part in parts)


def test_yoochoose_joins_its_files_orders_views_by_time_and_keeps_milliseconds(tmp_path: Path) -> None:
    # 1396861200 is 2014-04-07 09:00:00 UTC; session 2 is still going when the log ends.
    source = yoochoose(
        tmp_path / "source",
        "1\t11\t1396861260.25\n1\t10\t1396861200.0\n",
        "2\t11\t1396868400.0\n2\t12\t1396868400.0\n",
    )
    log = imported(source, tmp_path / "log")
    at = [datetime(2014, 4, 7, 9, 0, tzinfo=UTC), datetime(2014, 4, 7, 9, 1, 0, 250_000, tzinfo=UTC)]
    end = datetime(2014, 4, 7, 11, 0, tzinfo=UTC)
    item = [{"type": "view", "item_id": item_id} for item_id in ("10", "11", "12")]
    assert rows(log, "session_id", "timestamp", "available_at", "events", "session_end") == [
        ("1", at[0], at[0], [item[0]], None),
        ("1", at[1], at[1], [item[1]], "left"),
        ("2", end, end, [item[1]], None),
        ("2", end, end, [item[2]], "censored"),
    ]
    assert log.manifest.has_times
    assert not log.manifest.has_users


def test_a_folder_without_a_known_set_is_refused_with_what_was_expected(tmp_path: Path) -> None:
    (tmp_path / "clicks.csv").touch()
    with pytest.raises(InputError, match=r"clicks\.csv.*expected.*sessions_remapped\.parquet.*clicks_train\.tsv\.gz"):
        imported(tmp_path, tmp_path / "log")
    with pytest.raises(InputError, match="no such folder"):
        imported(tmp_path / "absent", tmp_path / "log")


def test_a_cell_that_is_no_number_is_named_with_its_file_row_and_column(tmp_path: Path) -> None:
    source = yoochoose(tmp_path / "source", "1\t10\t1396861200\n1\t11\tnoon\n", "")
    with pytest.raises(InputError, match=r"clicks_train\.tsv\.gz: row 2, column 'Time': 'noon'; expected Unix seconds"):
        imported(source, tmp_path / "log")


def test_a_truncated_file_is_refused_by_name_and_leaves_nothing_behind(tmp_path: Path) -> None:
    clicks = "".join(f"{session}\t{session % 7}\t1396861200\n" for session in range(5_000))
    source = yoochoose(tmp_path / "yoochoose", clicks, "")
    whole = (source / "clicks_train.tsv.gz").read_bytes()
    (source / "clicks_train.tsv.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"clicks_train\.tsv\.gz: cannot be read.*expected whole"):
        imported(source, tmp_path / "log")
    source = diginetica(tmp_path / "diginetica", {1: [1, 2]})
    whole = (source / "sessions_remapped.parquet").read_bytes()
    (source / "sessions_remapped.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"sessions_remapped\.parquet: cannot be read.*whole Parquet"):
        imported(source, tmp_path / "log")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["diginetica", "yoochoose"]


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        ({"session_idx": [1]}, "column 'items' is missing; the file has \\['session_idx'\\]"),
        ({"session_idx": [1], "items": ["1 2"]}, "column 'items' has type String; expected lists of whole numbers"),
        ({"session_idx": [1, 1], "items": [[1, 2], [3, 4]]}, "row 1, column 'session_idx': 1; expected a number of"),
        ({"session_idx": [1, 2], "items": [[1, 2], [3, None]]}, "row 2, column 'items': \\[3, None\\]; expected item"),
    ],
)
def test_a_diginetica_file_of_another_shape_is_refused(
    tmp_path: Path, frame: dict[str, list[object]], message: str
) -> None:
    pl.DataFrame(frame).write_parquet(tmp_path / "sessions_remapped.parquet")
    with pytest.raises(InputError, match=message):
        imported(tmp_path, tmp_path / "log")


def shared(folder: str) -> Path:
    if not (DATA / folder).is_dir():
        pytest.skip(f"the real data are not on this machine: ../shared/data/{folder} is missing")
    return DATA / folder


def test_real_diginetica_gives_whole_sessions_of_known_count(tmp_path: Path) -> None:
    source = shared("diginetica")
    published = pl.scan_parquet(source / "sessions_remapped.parquet").select(
        sessions=pl.len(), views=pl.col("items").list.len().sum()
    )
    assert published.collect().row(0) == (186_670, 906_140)
    log = imported(source, tmp_path / "log", max_sessions=2_000)
    ends = log.scan().group_by("session_id").agg(pl.col("session_end").drop_nulls().len(), pl.len()).collect()
    assert ends.height == 2_000
    assert (ends["session_end"] == 1).all()
    assert ends["len"].is_between(2, 40).all()
    assert "The log is a sample: 2000 of 186670 sessions." in log.manifest.limits


def test_real_yoochoose_keeps_every_session_and_item(tmp_path: Path) -> None:
    log = imported(shared("yoochoose_100k"), tmp_path / "log", max_steps=100)
    assert log.manifest.n_requests == 70_278 + 13_568
    assert log.scan().select(pl.col("session_id").n_unique()).collect().item() == 21_210
    assert log.items().height == 2_933
    times = log.scan().select(first=pl.col("timestamp").min(), last=pl.col("timestamp").max()).collect()
    assert times["first"][0].date().isoformat() == "2014-04-01"
    assert times["last"][0].date().isoformat() == "2014-04-08"
