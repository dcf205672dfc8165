"""Deletion from the interaction log: one user's rows for good, or all rows from before a time.

A forgotten user leaves a tombstone. What was shown to them before it never counts again, however late it is committed;
what is shown after it is a new life, which nothing ties to the old one but the id that the client sends.

Finding the rows reads the whole table, so that the endpoint's writes carry no index for it; readers keep nobody from
writing. SQLite overwrites what it frees (`secure_delete`), and `erase` empties what is left of it beside the tables.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa

from components.interactions.log import (
    FEEDBACK,
    FORGOTTEN,
    RECOMMENDATIONS,
    SHADOW_CHOICES,
    InteractionLog,
    microseconds,
    user_digest,
)

#: Ids in one statement, and rows that retention deletes in one transaction: a few milliseconds each.
AT_ONCE = 500
#: Seconds between two transactions of retention, in which the endpoint gets its turn.
BREATH_SECONDS = 0.02
#: SQLite files up to this size are written anew at once: writers wait for that about as long as for each other.
VACUUM_BYTES = 50_000_000
#: How often SQLite is asked again for a moment without others, of whom each may take BUSY_MILLISECONDS.
TRIES = 5
_TOMBSTONE = sa.text(
    f"INSERT INTO {FORGOTTEN.name} (user_digest, forgotten_at) VALUES (:user_digest, :forgotten_at) "
    "ON CONFLICT (user_digest) DO UPDATE SET forgotten_at = excluded.forgotten_at"
)


@dataclass(frozen=True)
class DeletedRows:
    """What was deleted from the tables."""

    request_ids: tuple[str, ...] = ()
    n_feedback: int = 0

    def __add__(self, other: "DeletedRows") -> "DeletedRows":
        return DeletedRows(self.request_ids + other.request_ids, self.n_feedback + other.n_feedback)


def first_shown(log: InteractionLog, user_hashes: Iterable[str]) -> dict[tuple[str, str], int]:
    """When users were first shown something, in microseconds, by loop and user.

    Raises:
        InputError: there is no interaction log.
        LogUnavailableError: the database cannot be reached.
    """
    shown = RECOMMENDATIONS.c
    rows = sa.select(shown.loop, shown.user_id, sa.func.min(shown.shown_at)).where(
        shown.user_id.in_(sorted(user_hashes))
    )
    with log.reading() as connection:
        return {(loop, user): at for loop, user, at in connection.execute(rows.group_by(shown.loop, shown.user_id))}


def forget_users(log: InteractionLog, user_hashes: Iterable[str]) -> DeletedRows:
    """Leave tombstones and delete the users' recommendations and all feedback on them, in one transaction.

    Raises:
        InputError: there is no interaction log.
        LogUnavailableError: the database cannot be reached or written; then nothing has changed.
    """
    hashes = sorted(set(user_hashes))
    shown = RECOMMENDATIONS.c
    own = sa.select(shown.request_id).where(shown.user_id.in_(hashes))
    found: set[str] = set()
    # The first pass keeps nobody waiting; in the second, for which SQLite's writers wait, only new rows are read.
    newer = own
    with log.reading() as connection:
        if log.engine.dialect.name == "sqlite":
            last = connection.scalar(sa.select(sa.func.max(sa.literal_column("rowid"))).select_from(RECOMMENDATIONS))
            newer = own.where(sa.literal_column("recommendations.rowid") > (last or 0))
            found.update(connection.scalars(own))
    with log.writing() as connection:
        now = time.time_ns() // 1_000
        connection.execute(_TOMBSTONE, [{"user_digest": user_digest(user), "forgotten_at": now} for user in hashes])
        found.update(connection.scalars(newer))
        return _delete(connection, sorted(found))


def forget_late_rows(log: InteractionLog, deleted: DeletedRows = DeletedRows()) -> DeletedRows:
    """Delete what was committed after a tombstone and belongs before it.

    Args:
        log: the tables.
        deleted: what was deleted before; feedback on it may have been under way.

    Raises:
        InputError: there is no interaction log.
        LogUnavailableError: the database cannot be reached or written.
    """
    shown = RECOMMENDATIONS.c
    late = list(deleted.request_ids)
    with log.reading() as connection:
        users = forgotten_users(connection)
        for chunk in _chunks(sorted(users)):
            rows = sa.select(shown.request_id, shown.user_id, shown.shown_at).where(shown.user_id.in_(chunk))
            late += [row.request_id for row in connection.execute(rows) if row.shown_at <= users[row.user_id]]
    if not late:
        return DeletedRows()
    with log.writing() as connection:
        gone = _delete(connection, late)
    return DeletedRows(tuple(set(gone.request_ids) - set(deleted.request_ids)), gone.n_feedback)


def forgotten_users(connection: sa.Connection, loop: str | None = None) -> dict[str, int]:
    """Users of whom there are rows and a tombstone, with the tombstone's time; of one loop or of all."""
    tombstones = {row.user_digest: row.forgotten_at for row in connection.execute(sa.select(FORGOTTEN))}
    if not tombstones:
        return {}
    users = sa.select(RECOMMENDATIONS.c.user_id).distinct()
    if loop is not None:
        users = users.where(RECOMMENDATIONS.c.loop == loop)
    digests = {user: user_digest(user) for user in connection.scalars(users)}
    return {user: tombstones[digest] for user, digest in digests.items() if digest in tombstones}


def forget_older(
    log: InteractionLog,
    before: datetime,
    loop: str | None = None,
    progress: Callable[[int], None] = lambda n_requests: None,
) -> DeletedRows:
    """Delete the recommendations that were shown before a time, and their feedback, in many short transactions.

    Args:
        log: the tables.
        before: the first moment that is kept.
        loop: only this one's.
        progress: told how many requests have been deleted.

    Raises:
        InputError: there is no interaction log.
        LogUnavailableError: the database cannot be reached or written; what was deleted until then stays so.
    """
    shown = RECOMMENDATIONS.c
    with log.reading() as connection:
        loops = [loop] if loop is not None else sorted(connection.scalars(sa.select(shown.loop).distinct()))
    deleted = DeletedRows()
    for name in loops:
        old = sa.select(shown.request_id).where(shown.loop == name, shown.shown_at < microseconds(before))
        while True:
            with log.writing() as connection:
                batch = list(connection.scalars(old.order_by(shown.shown_at).limit(AT_ONCE)))
                deleted += _delete(connection, batch)
            progress(len(deleted.request_ids))
            if len(batch) < AT_ONCE:
                break
            time.sleep(BREATH_SECONDS)
    return deleted


def erase(log: InteractionLog, *, vacuum: bool = False) -> bool:
    """Get rid of what deleted rows left in the database's files; whether nothing of them can be left.

    SQLite: the file is written anew where it is small, or where `vacuum` asks for it (moves of rows between pages leave
    copies that `secure_delete` does not know of), and the write-ahead log is emptied. PostgreSQL: the space is freed
    and overwritten as new rows come; nobody is kept waiting.

    Raises:
        LogUnavailableError: the database cannot be reached.
    """
    if log.engine.dialect.name == "postgresql":
        with log.autocommit() as connection:
            connection.exec_driver_sql(f"VACUUM {RECOMMENDATIONS.name}, {SHADOW_CHOICES.name}, {FEEDBACK.name}")
        return True
    with log.autocommit() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
        size = pages * connection.exec_driver_sql("PRAGMA page_size").scalar_one()
        anew = (vacuum or size <= VACUUM_BYTES) and _tried(connection, "VACUUM")
        return _tried(connection, "PRAGMA wal_checkpoint(TRUNCATE)") and anew


def _tried(connection: sa.Connection, statement: str) -> bool:
    """Whether a statement got SQLite for itself in one of several tries."""
    for _ in range(TRIES):
        try:
            result = connection.exec_driver_sql(statement)
            # A checkpoint says in its first column whether it was kept from ending.
            if not result.returns_rows or result.one()[0] == 0:
                return True
        except sa.exc.OperationalError:
            continue
    return False


def _delete(connection: sa.Connection, request_ids: Sequence[str]) -> DeletedRows:
    n_feedback = 0
    for chunk in _chunks(request_ids):
        connection.execute(sa.delete(SHADOW_CHOICES).where(SHADOW_CHOICES.c.request_id.in_(chunk)))
        n_feedback += connection.execute(sa.delete(FEEDBACK).where(FEEDBACK.c.request_id.in_(chunk))).rowcount
        connection.execute(sa.delete(RECOMMENDATIONS).where(RECOMMENDATIONS.c.request_id.in_(chunk)))
    return DeletedRows(tuple(request_ids), n_feedback)


def _chunks(ids: Sequence[str]) -> Iterable[Sequence[str]]:
    return (ids[start : start + AT_ONCE] for start in range(0, len(ids), AT_ONCE))
