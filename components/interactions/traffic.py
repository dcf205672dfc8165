"""What the interaction log tells of traffic without being imported: how much there was, and how late answers came."""

from dataclasses import dataclass
from datetime import datetime, timedelta

import polars as pl
import sqlalchemy as sa

from components.interactions.log import FEEDBACK, RECOMMENDATIONS, InteractionLog, frames_of, microseconds


@dataclass(frozen=True)
class Traffic:
    """Requests of one window of time."""

    requests: int
    squares: int
    """Σ over its users of the square of how many requests they made."""


def requests_by_window(
    log: InteractionLog, loop: str, until: datetime, window: timedelta, n_windows: int
) -> list[Traffic]:
    """A loop's requests in windows that end at `until`, oldest first; windows before the first whole one are left out.

    Raises:
        InputError: there is no interaction log.
        LogUnavailableError: the database cannot be reached.
    """
    shown, length = RECOMMENDATIONS.c, window // timedelta(microseconds=1)
    end = microseconds(until)
    begin = end - n_windows * length
    number = ((shown.shown_at - begin) // length).label("number")
    own = (shown.loop == loop, shown.shown_at >= begin, shown.shown_at < end)
    by_user = sa.select(number, shown.user_id, sa.func.count().label("n")).where(*own).group_by(number, shown.user_id)
    counted = by_user.subquery().c
    sums = sa.select(counted.number, sa.func.sum(counted.n), sa.func.sum(counted.n * counted.n)).group_by(
        counted.number
    )
    first = sa.select(sa.func.min(shown.shown_at)).where(shown.loop == loop)
    with log.reading() as connection:
        found = {int(number): Traffic(int(n), int(squares)) for number, n, squares in connection.execute(sums)}
        began = connection.execute(first).scalar_one()
    if began is None:
        return []
    # Counted down, so that a loop that began before all windows has all of them.
    whole = max(-((begin - began) // length), 0) if began > begin else 0
    return [found.get(number, Traffic(0, 0)) for number in range(whole, n_windows)]


def first_feedback(log: InteractionLog, loop: str, since: datetime, until: datetime, within: timedelta) -> pl.DataFrame:
    """`request_id` and `feedback_seconds` until the first feedback that came within a time, where any did.

    Args:
        log: the interaction log.
        loop: name of the loop.
        since: requests shown earlier are left out.
        until: as is what was shown, or came, later.
        within: feedback that came later does not count.

    Raises:
        InputError: there is no interaction log.
        LogUnavailableError: the database cannot be reached.
    """
    shown, heard = RECOMMENDATIONS.c, FEEDBACK.c
    waited = heard.received_at - shown.shown_at
    rows = (
        sa.select(heard.request_id, waited)
        .join_from(FEEDBACK, RECOMMENDATIONS, shown.request_id == heard.request_id)
        .where(
            shown.loop == loop, shown.shown_at >= microseconds(since), shown.shown_at <= microseconds(until),
            heard.received_at <= microseconds(until), waited <= within // timedelta(microseconds=1),
        )
    )  # fmt: skip
    schema = {"request_id": pl.String, "waited": pl.Int64}
    with log.reading() as connection:
        found = pl.concat([pl.DataFrame(schema=schema), *frames_of(connection, rows, schema)])
    return found.group_by("request_id", maintain_order=True).agg(feedback_seconds=pl.col("waited").min() / 1e6)
