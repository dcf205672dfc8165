"""The interaction log: what an endpoint showed and what it heard, in tables that are only ever added to.

A recommendation is written before it is answered, with its candidates and its log_prob, so whatever was shown can be
learned from. Feedback comes later, in any order and more than once; the importer `log` joins the two. What is to be
forgotten is deleted by `components.interactions.deletion` alone.

Rows are written in groups, one transaction each. SQLite is in WAL mode with synchronous = NORMAL: a commit survives the
end of the process, and a power cut may take the last ones. PostgreSQL keeps what it has committed.

The schema's versions stand in `migrations/`; `upgrade` brings a database to the newest.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from components.errors import InputError, SlateloopError

metadata = sa.MetaData()
#: Times are microseconds since 1970 in UTC, lists and structs JSON: the same in every database.
RECOMMENDATIONS = sa.Table(
    "recommendations",
    metadata,
    sa.Column("request_id", sa.String(64), primary_key=True),
    sa.Column("loop", sa.String(64), nullable=False),
    sa.Column("user_id", sa.String(64), nullable=False),
    sa.Column("session_id", sa.Text),
    sa.Column("shown_at", sa.BigInteger, nullable=False),
    sa.Column("candidates", sa.Text),
    sa.Column("candidates_digest", sa.String(64)),
    sa.Column("slate", sa.Text, nullable=False),
    sa.Column("log_probs", sa.Text, nullable=False),
    sa.Column("events", sa.Text, nullable=False),
    sa.Column("context", sa.Text, nullable=False),
    sa.Column("policy", sa.Text, nullable=False),
    sa.Column("arm", sa.String(64), nullable=False),
    sa.Column("experiment", sa.Integer),
    sa.Column("idempotency_key", sa.Text),
    sa.Column("question", sa.String(64), nullable=False),
    sa.UniqueConstraint("loop", "idempotency_key", name="one_answer_per_key"),
    sa.Index("recommendations_by_time", "loop", "shown_at"),
)
CANDIDATE_LISTS = sa.Table(
    "candidate_lists",
    metadata,
    sa.Column("candidates_digest", sa.String(64), primary_key=True),
    sa.Column("candidates", sa.Text, nullable=False),
)
FEEDBACK = sa.Table(
    "feedback",
    metadata,
    sa.Column("request_id", sa.String(64), primary_key=True),
    sa.Column("feedback_id", sa.String(64), primary_key=True),
    sa.Column("received_at", sa.BigInteger, nullable=False),
    sa.Column("clicked", sa.Text),
    sa.Column("purchased", sa.Text),
    sa.Column("signals", sa.Text, nullable=False),
    sa.Column("request_signals", sa.Text, nullable=False),
    sa.Column("left", sa.Boolean, nullable=False),
)
SHADOW_CHOICES = sa.Table(
    "shadow_choices",
    metadata,
    sa.Column("request_id", sa.String(64), primary_key=True),
    sa.Column("policy", sa.Text, nullable=False),
    sa.Column("slate", sa.Text, nullable=False),
    sa.Column("log_probs", sa.Text, nullable=False),
)
RELEASES = sa.Table(
    "releases",
    metadata,
    sa.Column("loop", sa.String(64), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("experiment", sa.Integer, nullable=False),
    sa.Column("released_at", sa.BigInteger, nullable=False),
    sa.Column("action", sa.String(16), nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("champion", sa.Text, nullable=False),
    sa.Column("challenger", sa.Text),
    sa.Column("challenger_share", sa.Float, nullable=False),
    sa.Column("baseline", sa.Text),
    sa.Column("baseline_share", sa.Float, nullable=False),
    sa.Column("shadow", sa.Text),
    sa.Column("salt", sa.String(64), nullable=False),
    sa.Column("planned_sessions", sa.Integer),
)
#: Whose rows were deleted, and when; by `user_digest`, so that not even the tombstone holds the other tables' hash.
FORGOTTEN = sa.Table(
    "forgotten",
    metadata,
    sa.Column("user_digest", sa.String(64), primary_key=True),
    sa.Column("forgotten_at", sa.BigInteger, nullable=False),
)


def _insert(table: sa.Table) -> sa.TextClause:
    names = [column.name for column in table.columns]
    columns, values = ", ".join(f'"{name}"' for name in names), ", ".join(f":{name}" for name in names)
    return sa.text(f"INSERT INTO {table.name} ({columns}) VALUES ({values}) ON CONFLICT DO NOTHING")


#: Inserts that leave rows alone which are there already. As text: what SQLAlchemy would make of them it compiles anew
#: each time, which takes as long as the writing.
_INSERT = {table: _insert(table) for table in (RECOMMENDATIONS, SHADOW_CHOICES, CANDIDATE_LISTS, FEEDBACK)}
MIGRATIONS = Path(__file__).parent / "migrations"
#: Milliseconds for which SQLite waits for another writer, and seconds for which PostgreSQL may take to answer.
#: As few as Python's garbage collector does not look through while they are there: more take half as long again.
ROWS_AT_A_TIME = 500
BUSY_MILLISECONDS, CONNECT_SECONDS = 2_000, 2
#: Bytes that a disk must have free to count as one that can be written: a group of rows with their candidates.
LEAST_FREE = 2**18
#: How often a group is written anew because another process was faster with a key.
RACES = 5


class OlderLogError(InputError):
    """The interaction log is an earlier version's, and has not been brought up to date."""


class LogUnavailableError(SlateloopError):
    """The database cannot be reached or written; what was to be written is not."""

    def __init__(self, sentence: str, cause: str | None = None) -> None:
        super().__init__(sentence if cause is None else f"{sentence}: {cause}")
        self.sentence = sentence
        """What anybody may know; the cause names hosts and files."""
        self.cause = cause


class _BeatenError(Exception):
    """Another process used a key for another question while ours was written: begin again, and see it."""


class UnknownRequestError(InputError):
    """Feedback names a request that is not in the log."""


class KeyReusedError(InputError):
    """An idempotency key comes with another question than before."""

    def __init__(self, place: int, key: str | None) -> None:
        super().__init__(f"idempotency_key: {key!r} was used for another question; expected a key of its own")
        self.place = place
        """Of the request in its call."""


@dataclass(frozen=True)
class ShadowChoice:
    """What another policy would have shown at a request; the user never saw it."""

    policy: str
    slate: tuple[str, ...]
    log_probs: tuple[float, ...]
    """Per position, under that policy."""


@dataclass(frozen=True)
class Recommended:
    """One recommendation, as it is logged."""

    request_id: str
    loop: str
    user_id: str
    """Keyed hash."""
    session_id: str | None
    shown_at: int
    """Microseconds since 1970, UTC."""
    candidates: tuple[str, ...]
    catalog: bool
    """Whether the candidates are a list that many requests share, which is kept once."""
    slate: tuple[str, ...]
    log_probs: tuple[float, ...]
    events: tuple[Mapping[str, str], ...]
    context: Mapping[str, str | float | None]
    policy: str
    arm: str
    experiment: int
    """Number of the loop's release since which its arms serve as they do."""
    question: str
    """Digest of what was asked: a key that is used again must come with the same question."""
    idempotency_key: str | None = None
    shadow: ShadowChoice | None = None


@dataclass(frozen=True)
class Heard:
    """One piece of feedback, as it is logged."""

    request_id: str
    feedback_id: str
    received_at: int
    """Microseconds since 1970, UTC."""
    clicked: tuple[bool | None, ...] | None = None
    purchased: tuple[bool | None, ...] | None = None
    signals: Mapping[str, tuple[float | None, ...]] = field(default_factory=dict)
    """Per position."""
    request_signals: Mapping[str, float] = field(default_factory=dict)
    left: bool = False
    """Whether the user is known to have left after this request."""

    def lengths(self) -> dict[str, int]:
        """Positions of each list of answers."""
        answers = {"clicked": self.clicked, "purchased": self.purchased}
        lengths = {name: len(values) for name, values in answers.items() if values is not None}
        return lengths | {f"signals.{name}": len(values) for name, values in self.signals.items()}


@dataclass(frozen=True)
class Shown:
    """The recommendation that a piece of feedback is about."""

    loop: str
    shown_at: int
    """Microseconds since 1970, UTC."""
    slate_size: int


def user_digest(user_id: str) -> str:
    """What stands for a user where only "is it this one?" is ever asked: SHA-256 of the id that logs hold."""
    return hashlib.sha256(user_id.encode()).hexdigest()


def frames_of(connection: sa.Connection, rows: sa.Select[Any], schema: Mapping[str, Any]) -> Iterator[pl.DataFrame]:
    """Rows of a query, a few in each frame, with the names and types of `schema` in the query's order."""
    for chunk in connection.execution_options(yield_per=ROWS_AT_A_TIME).execute(rows).partitions():
        yield pl.DataFrame(dict(zip(schema, zip(*chunk, strict=True), strict=True)), schema=schema)


def microseconds(moment: datetime | None) -> int:
    """A moment as the tables have it; None is the end of time."""
    return 2**62 if moment is None else round(moment.timestamp() * 1e6)


class InteractionLog:
    """The tables behind a URL of SQLAlchemy's: `sqlite:///FILE` or `postgresql+psycopg://...`."""

    def __init__(self, url: str) -> None:
        try:
            parsed = sa.engine.make_url(url)
            options: dict[str, Any] = {}
            if parsed.get_backend_name() == "postgresql":
                options = {"pool_pre_ping": True, "connect_args": {"connect_timeout": CONNECT_SECONDS}}
            self.engine = sa.create_engine(parsed, **options)
        except (sa.exc.ArgumentError, sa.exc.NoSuchModuleError, ModuleNotFoundError) as error:
            raise InputError(
                f"database {_shown(url)}: {error}; expected sqlite:///FILE or postgresql+psycopg://..."
            ) from None
        if self.engine.dialect.name not in ("sqlite", "postgresql"):
            raise InputError(f"database {_shown(url)}: expected sqlite:///FILE or postgresql+psycopg://...")
        if self.engine.dialect.name == "sqlite":
            sa.event.listen(self.engine, "connect", _prepare_sqlite)
            sa.event.listen(self.engine, "begin", _begin_sqlite)

    def upgrade(self) -> None:
        """Bring the schema to its newest version; a database without tables gets them, a later version's stays.

        Raises:
            LogUnavailableError: the database cannot be reached or written.
        """
        if self.engine.dialect.name == "sqlite" and self.engine.url.database:
            Path(self.engine.url.database).parent.mkdir(parents=True, exist_ok=True)
        with self._available(), self.engine.begin() as connection:
            if self.engine.dialect.name == "postgresql":
                # Workers that start together take turns.
                connection.exec_driver_sql("SELECT pg_advisory_xact_lock(7345110)")
            config = Config()
            config.set_main_option("script_location", str(MIGRATIONS))
            config.attributes["connection"] = connection
            stands = MigrationContext.configure(connection).get_current_revision()
            known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
            # A later version's schema has all that ours has: a service must be able to go back to its last version.
            if stands is None or stands in known:
                command.upgrade(config, "head")

    def upgrade_older(self) -> None:
        """Bring a log of an earlier version to the newest one; where there is none, none is made.

        Raises:
            LogUnavailableError: the database cannot be reached or written.
        """
        try:
            with self.reading():
                return
        except OlderLogError:
            self.upgrade()
        except InputError:  # Whoever reads is told.
            return

    def write(
        self, calls: Sequence[Sequence[Recommended]], heard: Sequence[Heard] = ()
    ) -> tuple[list[list[Recommended] | KeyReusedError], list[InputError | Shown]]:
        """Write a group in one transaction: all of it is kept, or none.

        Args:
            calls: recommendations that were asked for together; a key that was used for another question refuses its
                whole call, of which nothing is written.
            heard: feedback.

        Returns:
            For each call the recommendations that stand: its own, or what an earlier request with the same idempotency
            key was answered; or why it is refused. For each feedback the recommendation that it is about, or an error
            where it fits none. Feedback that is known already is accepted again.

        Raises:
            LogUnavailableError: the database cannot be reached or written.
        """
        for _ in range(RACES):
            try:
                with self.writing() as connection:
                    if self.engine.dialect.name == "postgresql":
                        connection.exec_driver_sql(f"SET LOCAL statement_timeout = '{BUSY_MILLISECONDS}ms'")
                    standing = self._write_recommendations(connection, calls)
                    return standing, self._write_feedback(connection, heard)
            except _BeatenError:
                continue
        raise LogUnavailableError("the interaction log is too busy; try again later")

    def check(self) -> None:
        """Look whether rows could be written now.

        Raises:
            LogUnavailableError: they could not.
        """
        if self.engine.dialect.name == "sqlite":
            file = Path(self.engine.url.database or "")
            if not file.is_file():
                # A connection that is open already would not notice.
                raise LogUnavailableError("the interaction log is not available", f"{file} is gone")
            if shutil.disk_usage(file.parent).free < LEAST_FREE:
                # A transaction that writes nothing would not notice.
                raise LogUnavailableError("the interaction log is not available", f"{file}: its disk is full")
        with self.writing() as connection:
            connection.execute(sa.select(RECOMMENDATIONS.c.request_id).limit(1))

    def state(self, loop: str, until: datetime | None = None) -> str:
        """How far a loop's log has come: two logs of one database with the same state hold the same rows.

        Args:
            loop: name of the loop.
            until: what came later does not count.

        Raises:
            InputError: there is no interaction log.
            LogUnavailableError: the database cannot be reached.
        """
        end = microseconds(until)
        shown, heard = RECOMMENDATIONS.c, FEEDBACK.c
        asked = sa.select(sa.func.count(), sa.func.max(shown.shown_at)).where(shown.loop == loop, shown.shown_at <= end)
        told = (
            sa.select(sa.func.count(), sa.func.max(heard.received_at))
            .join_from(FEEDBACK, RECOMMENDATIONS, shown.request_id == heard.request_id)
            .where(shown.loop == loop, heard.received_at <= end)
        )
        with self.reading() as connection:
            return _json([list(connection.execute(rows).one()) for rows in (asked, told)])

    def end(self, loop: str) -> datetime | None:
        """When a loop's last row came, a recommendation or feedback; None where it has none.

        Raises:
            InputError: there is no interaction log.
            LogUnavailableError: the database cannot be reached.
        """
        shown, heard = RECOMMENDATIONS.c, FEEDBACK.c
        asked = sa.select(sa.func.max(shown.shown_at)).where(shown.loop == loop)
        told = (
            sa.select(sa.func.max(heard.received_at))
            .join_from(FEEDBACK, RECOMMENDATIONS, shown.request_id == heard.request_id)
            .where(shown.loop == loop)
        )
        with self.reading() as connection:
            times = [time for time in map(connection.scalar, (asked, told)) if time is not None]
        return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=max(times)) if times else None

    @contextmanager
    def writing(self) -> Iterator[sa.Connection]:
        """A transaction that waits for other writers as long as a write does; SQLite lets one in at a time.

        Raises:
            LogUnavailableError: the database cannot be reached or written.
        """
        with self._available(), self.engine.begin() as connection:
            if self.engine.dialect.name == "postgresql":
                connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{BUSY_MILLISECONDS}ms'")
            yield connection

    @contextmanager
    def autocommit(self) -> Iterator[sa.Connection]:
        """A connection without a transaction, for what a database does to its files.

        Raises:
            LogUnavailableError: the database cannot be reached.
        """
        # SQLAlchemy would leave SQLite's driver in another mode than `_prepare_sqlite` set.
        options = {"begins": False} if self.engine.dialect.name == "sqlite" else {"isolation_level": "AUTOCOMMIT"}
        with self._available(), self.engine.connect().execution_options(**options) as connection:
            yield connection

    @contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """A connection that sees one state of the log, and keeps nobody from writing.

        Raises:
            InputError: there is no interaction log.
            LogUnavailableError: the database cannot be reached.
        """
        file = self.engine.url.database
        if self.engine.dialect.name == "sqlite" and not Path(file or "").is_file():
            raise InputError(
                f"{file}: no such file; the endpoint keeps its interaction log where SLATELOOP_DATABASE says"
            )
        options = {"reads": True} if self.engine.dialect.name == "sqlite" else {"isolation_level": "REPEATABLE READ"}
        with self._available(), self.engine.connect().execution_options(**options) as connection:
            tables = sa.inspect(connection).get_table_names()
            if RECOMMENDATIONS.name not in tables:
                raise InputError(
                    f"{self.engine.url.render_as_string()}: holds no interaction log; serve a policy first"
                )
            if missing := sorted(set(metadata.tables) - set(tables)):
                raise OlderLogError(
                    f"{self.engine.url.render_as_string()}: is an older interaction log, without {', '.join(missing)}; "
                    "start the endpoint once, or look at its releases, to bring it up to date"
                )
            yield connection

    def _write_recommendations(
        self, connection: sa.Connection, calls: Sequence[Sequence[Recommended]]
    ) -> list[list[Recommended] | KeyReusedError]:
        keyed = [one for call in calls for one in call if one.idempotency_key is not None]
        first = _answered(connection, keyed)
        standing: list[list[Recommended] | KeyReusedError] = []
        new: list[Recommended] = []
        for call in calls:
            answers = [one if one.idempotency_key is None else first.get(_key(one), one) for one in call]
            reused = next(
                (place for place, answer in enumerate(answers) if answer.question != call[place].question), None
            )
            if reused is not None:
                standing.append(KeyReusedError(reused, call[reused].idempotency_key))
                continue
            for place, one in enumerate(call):
                if one.idempotency_key is not None:
                    answers[place] = first.setdefault(_key(one), one)
            new += [one for place, one in enumerate(call) if answers[place] is one]
            standing.append(answers)
        if not new:
            return standing
        # In one order in every process, so that no two wait for each other.
        lists = {_digest(one.candidates): one.candidates for one in new if one.catalog}
        if lists:
            rows = [{"candidates_digest": digest, "candidates": _json(lists[digest])} for digest in sorted(lists)]
            connection.execute(_INSERT[CANDIDATE_LISTS], rows)
        new.sort(key=lambda one: (one.loop, one.idempotency_key or "", one.request_id))
        connection.execute(_INSERT[RECOMMENDATIONS], [_row(one) for one in new])
        # Another process may have answered the same key in the meantime.
        theirs = _answered(connection, [one for one in new if one.idempotency_key is not None])
        beaten = {key for key, answer in theirs.items() if answer.request_id != first[key].request_id}
        if shadows := [
            _shadow_row(one.request_id, one.shadow) for one in new if one.shadow is not None and _key(one) not in beaten
        ]:
            connection.execute(_INSERT[SHADOW_CHOICES], shadows)
        if any(theirs[_key(one)].question != one.question for one in new if _key(one) in beaten):
            raise _BeatenError
        if not beaten:
            return standing
        return [
            call if isinstance(call, KeyReusedError) else [theirs.get(_key(one), one) for one in call]
            for call in standing
        ]

    def _write_feedback(self, connection: sa.Connection, heard: Sequence[Heard]) -> list[InputError | Shown]:
        if not heard:
            return []
        columns = RECOMMENDATIONS.c
        asked = sa.select(columns.request_id, columns.loop, columns.shown_at, columns.slate).where(
            columns.request_id.in_({one.request_id for one in heard})
        )
        shown = {
            row.request_id: Shown(row.loop, row.shown_at, len(json.loads(row.slate)))
            for row in connection.execute(asked)
        }
        joined = [_joined(one, shown.get(one.request_id)) for one in heard]
        rows: list[dict[str, Any]] = [
            {
                "request_id": one.request_id,
                "feedback_id": one.feedback_id,
                "received_at": one.received_at,
                "clicked": _json_or_null(one.clicked),
                "purchased": _json_or_null(one.purchased),
                "signals": _json(one.signals),
                "request_signals": _json(one.request_signals),
                "left": one.left,
            }
            for one, about in zip(heard, joined, strict=True)
            if isinstance(about, Shown)
        ]
        if rows:
            rows.sort(key=lambda row: (row["request_id"], row["feedback_id"]))
            connection.execute(_INSERT[FEEDBACK], rows)
        return joined

    @contextmanager
    def _available(self) -> Iterator[None]:
        try:
            yield
        except (sa.exc.OperationalError, sa.exc.InterfaceError, sa.exc.InternalError, sa.exc.TimeoutError) as error:
            cause = str(getattr(error, "orig", None) or error).strip().splitlines()
            raise LogUnavailableError(
                "the interaction log is not available", cause[0] if cause else str(error)
            ) from None


def _prepare_sqlite(connection: Any, record: object) -> None:
    # The driver's own transactions begin too late for readers to be kept out; ours begin with BEGIN IMMEDIATE.
    connection.isolation_level = None
    cursor = connection.cursor()
    waits = f"busy_timeout = {BUSY_MILLISECONDS}"
    for pragma in ("journal_mode = WAL", "synchronous = NORMAL", waits, "secure_delete = ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: sa.Connection) -> None:
    options = connection.get_execution_options()
    if options.get("begins", True):
        connection.exec_driver_sql("BEGIN" if options.get("reads", False) else "BEGIN IMMEDIATE")


def _row(one: Recommended) -> dict[str, Any]:
    return {
        "request_id": one.request_id,
        "loop": one.loop,
        "user_id": one.user_id,
        "session_id": one.session_id,
        "shown_at": one.shown_at,
        "candidates": None if one.catalog else _json(one.candidates),
        "candidates_digest": _digest(one.candidates) if one.catalog else None,
        "slate": _json(one.slate),
        "log_probs": _json(one.log_probs),
        "events": _json(one.events),
        "context": _json(one.context),
        "policy": one.policy,
        "arm": one.arm,
        "experiment": one.experiment,
        "idempotency_key": one.idempotency_key,
        "question": one.question,
    }


def _shadow_row(request_id: str, choice: ShadowChoice) -> dict[str, Any]:
    return {
        "request_id": request_id,
        "policy": choice.policy,
        "slate": _json(choice.slate),
        "log_probs": _json(choice.log_probs),
    }


def _key(one: Recommended) -> tuple[str, str | None]:
    return one.loop, one.idempotency_key


def _answered(connection: sa.Connection, keyed: Sequence[Recommended]) -> dict[tuple[str, str | None], Recommended]:
    """What was answered first under the keys of recommendations, by loop and key."""
    answered = {}
    columns = RECOMMENDATIONS.c
    # One loop after the other: SQLite looks pairs up by reading the whole table.
    for loop in sorted({one.loop for one in keyed}):
        own = {one.idempotency_key: one for one in keyed if one.loop == loop}
        for row in connection.execute(
            sa.select(RECOMMENDATIONS).where(columns.loop == loop, columns.idempotency_key.in_(list(own)))
        ):
            one = own[row.idempotency_key]
            answered[loop, row.idempotency_key] = replace(
                one,
                request_id=row.request_id,
                user_id=row.user_id,
                session_id=row.session_id,
                shown_at=row.shown_at,
                slate=tuple(json.loads(row.slate)),
                log_probs=tuple(json.loads(row.log_probs)),
                policy=row.policy,
                arm=row.arm,
                experiment=row.experiment,
                question=row.question,
            )
    return answered


def _joined(one: Heard, shown: Shown | None) -> InputError | Shown:
    if shown is None:
        return UnknownRequestError(f"request_id: {one.request_id!r} was never answered here, or was deleted")
    for name, length in one.lengths().items():
        if length != shown.slate_size:
            return InputError(f"{name}: has {length} values; expected {shown.slate_size}, one per slate position")
    return shown


def _digest(candidates: tuple[str, ...]) -> str:
    return hashlib.sha256(_json(candidates).encode()).hexdigest()


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _json_or_null(value: object) -> str | None:
    return None if value is None else _json(value)


def _shown(url: str) -> str:
    """The URL without a password."""
    try:
        return sa.engine.make_url(url).render_as_string(hide_password=True)
    except sa.exc.ArgumentError:
        return "(unreadable)"
