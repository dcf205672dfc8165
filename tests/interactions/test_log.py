import hashlib
import random
import sqlite3
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from components.errors import InputError
from components.interactions.log import (
    BUSY_MILLISECONDS,
    FEEDBACK,
    MIGRATIONS,
    RECOMMENDATIONS,
    Heard,
    InteractionLog,
    KeyReusedError,
    LogUnavailableError,
    OlderLogError,
    Recommended,
    Shown,
    UnknownRequestError,
    metadata,
)

SHOWN = Recommended(
    request_id="r1",
    loop="shop",
    user_id="u1",
    session_id=None,
    shown_at=1_000_000,
    candidates=("a", "b", "c"),
    catalog=False,
    slate=("b", "a"),
    log_probs=(-0.5, -0.25),
    events=(),
    context={"device": "phone"},
    policy="p:1",
    arm="champion",
    experiment=3,
    question="q1",
)
#: Databases that a migration made lack what is added to it later; that is a new migration's work, and a line here.
RAN_ALREADY = {
    "0001_interactions.py": "dba9dd1d2fd58c96",
    "0002_releases.py": "1228c507b0ae4521",
    "0003_forgotten.py": "a67fc13ba520947a",
}
ABOUT = Shown("shop", 1_000_000, slate_size=2)


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.services)])
def log(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[InteractionLog]:
    url = f"sqlite:///{tmp_path / 'deep' / 'interactions.db'}"
    if request.param == "postgresql":
        url = request.getfixturevalue("postgresql").new_database()
    log = InteractionLog(url)
    log.upgrade()
    yield log
    log.engine.dispose()


@pytest.fixture
def sqlite_log(tmp_path: Path) -> InteractionLog:
    log = InteractionLog(f"sqlite:///{tmp_path / 'interactions.db'}")
    log.upgrade()
    return log


def rows(log: InteractionLog, table: sa.Table) -> list[dict[str, object]]:
    with log.reading() as connection:
        return [dict(row._mapping) for row in connection.execute(sa.select(table))]


def test_the_migrations_make_the_tables_that_the_code_names(log: InteractionLog) -> None:
    log.upgrade()  # a second worker starts
    with log.reading() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []


def test_what_is_written_is_there_for_another_process(log: InteractionLog) -> None:
    assert log.write([[SHOWN]], [Heard("r1", "f1", 2_000_000, clicked=(True, None))]) == ([[SHOWN]], [ABOUT])
    again = InteractionLog(log.engine.url.render_as_string(hide_password=False))
    (shown,) = rows(again, RECOMMENDATIONS)
    assert (shown["slate"], shown["log_probs"], shown["candidates"]) == ('["b","a"]', "[-0.5,-0.25]", '["a","b","c"]')
    (heard,) = rows(again, FEEDBACK)
    assert (heard["clicked"], heard["purchased"], heard["left"]) == ("[true,null]", None, False)


def test_candidates_that_requests_share_are_kept_once(log: InteractionLog) -> None:
    shared = [replace(SHOWN, request_id=f"r{number}", catalog=True) for number in range(3)]
    log.write([shared[:2]])
    log.write([shared[2:]])
    assert {(row["candidates"], row["candidates_digest"]) for row in rows(log, RECOMMENDATIONS)} == {
        (None, rows(log, metadata.tables["candidate_lists"])[0]["candidates_digest"])
    }
    assert [row["candidates"] for row in rows(log, metadata.tables["candidate_lists"])] == ['["a","b","c"]']


@pytest.mark.parametrize("together", [True, False])
def test_a_key_that_comes_again_gets_the_first_answer(log: InteractionLog, together: bool) -> None:
    first = replace(SHOWN, idempotency_key="k")
    second = replace(first, request_id="r2", slate=("c", "a"))
    if together:
        standing, _ = log.write([[first], [second]])
    else:
        standing = log.write([[first]])[0] + log.write([[second]])[0]
    assert standing == [[first], [first]]
    assert len(rows(log, RECOMMENDATIONS)) == 1


def test_a_key_with_another_question_is_refused_and_one_of_another_loop_is_not(log: InteractionLog) -> None:
    first = replace(SHOWN, idempotency_key="k")
    other_question = replace(first, request_id="r2", question="q2")
    other_loop = replace(first, request_id="r3", loop="news")
    (one, two, three), _ = log.write([[first], [other_question], [other_loop]])
    assert (one, three) == ([first], [other_loop])
    assert isinstance(two, KeyReusedError) and "'k' was used for another question" in str(two)


def test_of_a_call_whose_key_was_used_for_another_question_nothing_is_written(log: InteractionLog) -> None:
    log.write([[replace(SHOWN, idempotency_key="k")]])
    call = [replace(SHOWN, request_id="r2"), replace(SHOWN, request_id="r3", idempotency_key="k", question="q2")]
    (refused,), _ = log.write([call])
    assert isinstance(refused, KeyReusedError) and refused.place == 1
    assert [row["request_id"] for row in rows(log, RECOMMENDATIONS)] == ["r1"]


def test_many_keys_are_looked_up_by_an_index(sqlite_log: InteractionLog) -> None:
    plans: list[str] = []

    @sa.event.listens_for(sqlite_log.engine, "before_cursor_execute")
    def explain(connection: Any, cursor: Any, statement: str, parameters: Any, *rest: Any) -> None:
        if statement.startswith("SELECT") and "idempotency_key IN" in statement:
            rows = cursor.connection.execute(f"EXPLAIN QUERY PLAN {statement}", parameters).fetchall()
            plans.extend(row[-1] for row in rows)

    sqlite_log.write([[replace(SHOWN, request_id=f"r{n}", idempotency_key=f"k{n}")] for n in range(5)])
    assert plans and all(plan.startswith("SEARCH") for plan in plans)


def test_feedback_is_kept_once_however_often_it_comes(log: InteractionLog) -> None:
    log.write([[SHOWN]])
    piece = Heard("r1", "f1", 2_000_000, clicked=(True, False))
    for _ in range(2):
        assert log.write([], [piece, piece]) == ([], [ABOUT, ABOUT])
    assert len(rows(log, FEEDBACK)) == 1


def test_feedback_that_fits_no_slate_is_refused_by_itself(log: InteractionLog) -> None:
    pieces = [
        Heard("r1", "good", 2, clicked=(True, False)),
        Heard("nobody", "x", 2, left=True),
        Heard("r1", "long", 2, purchased=(True, False, True)),
        Heard("r1", "short", 2, signals={"watch_time": (1.0,)}),
    ]
    _, (good, unknown, long, short) = log.write([[SHOWN]], pieces)
    assert good == ABOUT
    assert isinstance(unknown, UnknownRequestError) and "'nobody' was never answered here" in str(unknown)
    assert str(long) == "purchased: has 3 values; expected 2, one per slate position"
    assert str(short) == "signals.watch_time: has 1 values; expected 2, one per slate position"
    assert [row["feedback_id"] for row in rows(log, FEEDBACK)] == ["good"]


def test_ids_are_text_whatever_they_look_like(log: InteractionLog) -> None:
    nasty = "'; DROP TABLE recommendations; --"
    log.write([[replace(SHOWN, session_id=nasty, slate=(nasty, "a"))]], [Heard("r1", nasty, 2, left=True)])
    (shown,) = rows(log, RECOMMENDATIONS)
    assert shown["session_id"] == nasty
    assert rows(log, FEEDBACK)[0]["feedback_id"] == nasty


def test_while_another_writer_holds_the_database_nothing_is_written_and_afterwards_it_is(
    sqlite_log: InteractionLog,
) -> None:
    with sqlite3.connect(str(sqlite_log.engine.url.database), isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(LogUnavailableError, match="is not available: database is locked"):
            sqlite_log.write([[SHOWN]])
        other.execute("ROLLBACK")
    assert sqlite_log.write([[SHOWN]]) == ([[SHOWN]], [])
    assert len(rows(sqlite_log, RECOMMENDATIONS)) == 1


def test_a_group_is_written_whole_or_not_at_all(sqlite_log: InteractionLog) -> None:
    with sqlite_log.engine.begin() as connection:
        connection.exec_driver_sql(
            "CREATE TRIGGER full BEFORE INSERT ON feedback BEGIN SELECT RAISE(ABORT, 'the disk is full'); END"
        )
    with pytest.raises((LogUnavailableError, sa.exc.IntegrityError)):
        sqlite_log.write([[SHOWN]], [Heard("r1", "f1", 2, left=True)])
    assert rows(sqlite_log, RECOMMENDATIONS) == []


@pytest.mark.parametrize("url", ["mysql://root:secret@db/log", "nonsense", "oracle://x"])
def test_a_database_of_another_kind_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(InputError, match=r"expected sqlite:///FILE or postgresql\+psycopg") as refused:
        InteractionLog(url)
    assert "secret" not in str(refused.value)


@pytest.fixture
def postgresql_log(request: pytest.FixtureRequest) -> Iterator[InteractionLog]:
    log = InteractionLog(request.getfixturevalue("postgresql").new_database())
    log.upgrade()
    yield log
    log.engine.dispose()


@pytest.mark.services
def test_a_table_that_somebody_keeps_locked_refuses_in_time(postgresql_log: InteractionLog) -> None:
    with postgresql_log.engine.begin() as other:
        other.execute(sa.text("LOCK TABLE recommendations IN ACCESS EXCLUSIVE MODE"))
        started = time.monotonic()
        with pytest.raises(LogUnavailableError, match="timeout"):
            postgresql_log.write([[SHOWN]])
        assert time.monotonic() - started < 2 * BUSY_MILLISECONDS / 1_000 + 1
    assert postgresql_log.write([[SHOWN]])[0] == [[SHOWN]]


@pytest.mark.services
def test_workers_that_are_asked_the_same_keys_in_any_order_do_not_block_each_other(
    postgresql_log: InteractionLog,
) -> None:
    """Each key is answered once, and every worker answers with what stands."""
    n_keys = 40

    def ask(worker: int) -> dict[str | None, str]:
        keys = list(range(n_keys))
        random.Random(worker).shuffle(keys)
        rows = [replace(SHOWN, request_id=f"{worker}-{key}", idempotency_key=f"key-{key}") for key in keys]
        log = InteractionLog(postgresql_log.engine.url.render_as_string(hide_password=False))
        answers = {}
        for start in range(0, n_keys, 10):
            (standing,), _ = log.write([rows[start : start + 10]])
            assert isinstance(standing, list)
            answers |= {row.idempotency_key: one.request_id for row, one in zip(rows[start:], standing, strict=False)}
        log.engine.dispose()
        return answers

    with ThreadPoolExecutor(4) as workers:
        first, *others = workers.map(ask, range(4))
    assert all(answers == first for answers in others)
    assert {row["request_id"] for row in rows(postgresql_log, RECOMMENDATIONS)} == set(first.values())


@pytest.mark.services
def test_of_two_questions_under_one_key_at_once_one_is_answered_and_one_refused(postgresql_log: InteractionLog) -> None:
    url = postgresql_log.engine.url.render_as_string(hide_password=False)
    logs = [InteractionLog(url) for _ in range(2)]
    for number in range(20):
        key, both = f"key-{number}", threading.Barrier(2)

        def ask(worker: int, key: str = key, both: threading.Barrier = both) -> object:
            one = replace(SHOWN, request_id=f"{key}-{worker}", idempotency_key=key, question=f"q{worker}")
            other = replace(SHOWN, request_id=f"{key}-{worker}-other")
            both.wait()
            ((standing,), _) = logs[worker].write([[other, one]])
            return standing

        with ThreadPoolExecutor(2) as workers:
            answers = list(workers.map(ask, range(2)))
        refused = [answer for answer in answers if isinstance(answer, KeyReusedError)]
        assert len(refused) == 1 and refused[0].place == 1, answers
        # Nothing of the refused call is there, nor is anything of the other one missing.
        own = {row["request_id"] for row in rows(postgresql_log, RECOMMENDATIONS) if key in str(row["request_id"])}
        winner = next(worker for worker, answer in enumerate(answers) if isinstance(answer, list))
        assert own == {f"{key}-{winner}", f"{key}-{winner}-other"}
    for log in logs:
        log.engine.dispose()


def test_a_migration_that_has_run_somewhere_stays_as_it_was() -> None:
    files = sorted((MIGRATIONS / "versions").glob("0*.py"))
    assert {file.name: hashlib.sha256(file.read_bytes()).hexdigest()[:16] for file in files} == RAN_ALREADY


def test_an_earlier_version_s_log_says_so_and_is_brought_up_to_date_with_all_it_holds(log: InteractionLog) -> None:
    log.write([[SHOWN]])
    with log.writing() as connection:
        connection.execute(sa.text("DROP TABLE forgotten"))
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '0002'"))
    with pytest.raises(OlderLogError, match="older interaction log, without forgotten"), log.reading():
        pass
    log.upgrade_older()
    with log.reading() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    assert [row["request_id"] for row in rows(log, RECOMMENDATIONS)] == [SHOWN.request_id]


def test_where_there_is_no_log_none_is_made(tmp_path: Path) -> None:
    InteractionLog(f"sqlite:///{tmp_path / 'interactions.db'}").upgrade_older()
    assert list(tmp_path.iterdir()) == []


def test_a_later_version_s_schema_stays_as_it_is(log: InteractionLog) -> None:
    with log.writing() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    log.upgrade()
    assert log.write([[SHOWN]])[0] == [[SHOWN]]
    with log.reading() as connection:
        assert connection.scalar(sa.text("SELECT version_num FROM alembic_version")) == "9999"
