"""Deletion from the interaction log, in SQLite and PostgreSQL."""

import hashlib
import sqlite3
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st

from components.errors import InputError
from components.interactions import deletion
from components.interactions.deletion import (
    erase,
    first_shown,
    forget_late_rows,
    forget_older,
    forget_users,
    forgotten_users,
)
from components.interactions.log import (
    FEEDBACK,
    FORGOTTEN,
    RECOMMENDATIONS,
    SHADOW_CHOICES,
    Heard,
    InteractionLog,
    Recommended,
    ShadowChoice,
    UnknownRequestError,
    user_digest,
)

ANN, BOB = "a" * 64, "b" * 64
SHOWN = Recommended(
    request_id="r1",
    loop="shop",
    user_id=ANN,
    session_id=None,
    shown_at=1_000_000,
    candidates=("a", "b"),
    catalog=False,
    slate=("b", "a"),
    log_probs=(-0.5, -0.25),
    events=(),
    context={},
    policy="p:1",
    arm="champion",
    experiment=1,
    question="q1",
    shadow=ShadowChoice("p:2", ("a",), (-0.1,)),
)


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.services)])
def log(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[InteractionLog]:
    url = f"sqlite:///{tmp_path / 'interactions.db'}"
    if request.param == "postgresql":
        url = request.getfixturevalue("postgresql").new_database()
    log = InteractionLog(url)
    log.upgrade()
    yield log
    log.engine.dispose()


def new_sqlite_log(folder: Path) -> InteractionLog:
    log = InteractionLog(f"sqlite:///{folder / 'interactions.db'}")
    log.upgrade()
    return log


def show(log: InteractionLog, user: str, *request_ids: str, at: int = 1_000_000, loop: str = "shop") -> None:
    rows = [replace(SHOWN, request_id=name, user_id=user, shown_at=at, loop=loop) for name in request_ids]
    log.write([rows], [Heard(name, "f", at + 1, clicked=(True, False)) for name in request_ids])


def ids(log: InteractionLog, table: sa.Table) -> set[str]:
    with log.reading() as connection:
        return set(connection.scalars(sa.select(table.c.request_id)))


def tombstones(log: InteractionLog) -> dict[str, int]:
    with log.reading() as connection:
        return {row.user_digest: row.forgotten_at for row in connection.execute(sa.select(FORGOTTEN))}


def test_a_forgotten_user_s_rows_are_gone_and_others_stay(log: InteractionLog) -> None:
    show(log, ANN, "r1", "r2")
    show(log, BOB, "r3")
    assert first_shown(log, [ANN]) == {("shop", ANN): 1_000_000}
    deleted = forget_users(log, [ANN])
    assert (set(deleted.request_ids), deleted.n_feedback) == ({"r1", "r2"}, 2)
    assert ids(log, RECOMMENDATIONS) == ids(log, SHADOW_CHOICES) == ids(log, FEEDBACK) == {"r3"}
    assert set(tombstones(log)) == {user_digest(ANN)}
    assert first_shown(log, [ANN]) == {}


def test_feedback_on_what_was_deleted_is_unknown_and_its_key_is_free_again(log: InteractionLog) -> None:
    log.write([[replace(SHOWN, idempotency_key="k")]])
    forget_users(log, [ANN])
    _, (error,) = log.write([], [Heard("r1", "f1", 2, left=True)])
    assert isinstance(error, UnknownRequestError)
    again = replace(SHOWN, request_id="r2", idempotency_key="k", question="another")
    assert log.write([[again]])[0] == [[again]]


def test_whoever_was_never_here_leaves_a_tombstone_all_the_same(log: InteractionLog) -> None:
    assert forget_users(log, [ANN, BOB, ANN]).request_ids == ()
    assert set(tombstones(log)) == {user_digest(ANN), user_digest(BOB)}
    first = tombstones(log)[user_digest(ANN)]
    forget_users(log, [ANN])
    assert tombstones(log)[user_digest(ANN)] > first


def test_rows_from_before_the_tombstone_that_come_late_are_deleted_and_a_new_life_is_kept(log: InteractionLog) -> None:
    show(log, BOB, "r0")
    deleted = forget_users(log, [ANN])
    show(log, ANN, "late")
    show(log, ANN, "new", at=tombstones(log)[user_digest(ANN)] + 1)
    with log.reading() as connection:
        assert set(forgotten_users(connection)) == {ANN}
        assert forgotten_users(connection, "news") == {}
    assert forget_late_rows(log, deleted).request_ids == ("late",)
    assert ids(log, RECOMMENDATIONS) == ids(log, FEEDBACK) == {"r0", "new"}
    assert forget_late_rows(log).request_ids == ()


def test_retention_deletes_in_batches_what_was_shown_before_a_time(
    log: InteractionLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deletion, "AT_ONCE", 2)
    show(log, ANN, "old1", "old2", "old3", "old4", "old5")
    show(log, BOB, "edge", at=2_000_000)
    show(log, BOB, "other-loop", loop="news")
    told: list[int] = []
    before = datetime.fromtimestamp(2, UTC)
    deleted = forget_older(log, before, "shop", told.append)
    assert (len(deleted.request_ids), deleted.n_feedback, told) == (5, 5, [2, 4, 5])
    assert ids(log, RECOMMENDATIONS) == ids(log, FEEDBACK) == {"edge", "other-loop"}
    assert forget_older(log, before).request_ids == ("other-loop",)
    assert tombstones(log) == {}


def test_what_was_deleted_is_in_none_of_the_database_s_files(log: InteractionLog, tmp_path: Path) -> None:
    if log.engine.dialect.name != "sqlite":
        assert erase(log)
        return
    # Enough rows that pages of indices were split, which leaves copies that the deletion does not know of.
    for number in range(0, 3_000, 100):
        names = (hashlib.sha256(str(number + place).encode()).hexdigest()[:32] for place in range(100))
        show(log, ANN if number % 300 else BOB, *names)
    files = sorted(tmp_path.glob("interactions.db*"))
    assert any(ANN.encode() in file.read_bytes() for file in files)
    gone = forget_users(log, [ANN]).request_ids
    assert erase(log)
    content = b"".join(file.read_bytes() for file in sorted(tmp_path.glob("interactions.db*")))
    assert ANN.encode() not in content
    assert not [name for name in gone if name.encode() in content]
    assert BOB.encode() in content
    assert (tmp_path / "interactions.db-wal").stat().st_size == 0


def test_a_large_file_is_written_anew_only_where_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = new_sqlite_log(tmp_path)
    show(log, ANN, *(f"r{number}" for number in range(500)))
    forget_users(log, [ANN])
    monkeypatch.setattr(deletion, "VACUUM_BYTES", 1)
    assert not erase(log)
    size = (tmp_path / "interactions.db").stat().st_size
    # What `secure_delete` knows of is overwritten even so.
    assert ANN.encode() not in (tmp_path / "interactions.db").read_bytes()
    assert erase(log, vacuum=True)
    assert (tmp_path / "interactions.db").stat().st_size < size


def test_while_somebody_reads_the_old_state_it_cannot_be_erased_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deletion, "TRIES", 1)
    log = new_sqlite_log(tmp_path)
    show(log, ANN, "r1")
    with sqlite3.connect(tmp_path / "interactions.db", isolation_level=None) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM recommendations").fetchall()
        forget_users(log, [ANN])
        assert not erase(log)
        reader.execute("COMMIT")
    assert erase(log)


def test_the_endpoint_goes_on_writing_while_users_are_forgotten(log: InteractionLog) -> None:
    endpoint = InteractionLog(log.engine.url.render_as_string(hide_password=False))
    written: list[str] = []
    done = threading.Event()

    def serve() -> None:
        while not done.is_set():
            name = f"bob-{len(written)}"
            show(endpoint, BOB, name, at=5_000_000)
            written.append(name)
            # SQLite's lock is taken by who asks at the right moment: a writer without a pause would starve the other.
            time.sleep(0.005)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        for turn in range(5):
            show(log, ANN, *(f"{turn}-{number}" for number in range(50)))
            assert len(forget_users(log, [ANN]).request_ids) == 50
            forget_older(log, datetime.fromtimestamp(3, UTC))
            erase(log)
            time.sleep(0.05)
    finally:
        done.set()
        thread.join(timeout=30)
    endpoint.engine.dispose()
    assert written
    assert ids(log, RECOMMENDATIONS) == ids(log, FEEDBACK) == set(written)


def test_a_deletion_happens_whole_or_not_at_all(tmp_path: Path) -> None:
    log = new_sqlite_log(tmp_path)
    show(log, ANN, "r1")
    with log.writing() as connection:
        connection.exec_driver_sql(
            "CREATE TRIGGER no BEFORE DELETE ON recommendations BEGIN SELECT RAISE(ABORT, 'no'); END"
        )
    with pytest.raises(sa.exc.IntegrityError):
        forget_users(log, [ANN])
    assert ids(log, RECOMMENDATIONS) == ids(log, FEEDBACK) == {"r1"}
    assert tombstones(log) == {}


def test_where_there_is_no_log_nothing_is_forgotten(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        forget_users(InteractionLog(f"sqlite:///{tmp_path / 'missing.db'}"), [ANN])
    assert not (tmp_path / "missing.db").exists()


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([ANN, BOB]), st.booleans()), max_size=12), st.integers(0, 12))
def test_of_a_forgotten_user_exactly_what_was_shown_after_the_tombstone_is_kept(
    tmp_path_factory: pytest.TempPathFactory, shown: list[tuple[str, bool]], first: int
) -> None:
    log = new_sqlite_log(tmp_path_factory.mktemp("log"))
    future = time.time_ns() // 1_000 + 10**12
    rows = [(f"r{number}", user, future if later else 1) for number, (user, later) in enumerate(shown)]
    for name, user, _ in rows[:first]:
        show(log, user, name, at=1)
    forget_users(log, [ANN])
    for name, user, at in rows[first:]:
        show(log, user, name, at=at)
    forget_late_rows(log)
    expected = {name for place, (name, user, at) in enumerate(rows) if user == BOB or (place >= first and at == future)}
    assert ids(log, RECOMMENDATIONS) == ids(log, FEEDBACK) == expected
    log.engine.dispose()
