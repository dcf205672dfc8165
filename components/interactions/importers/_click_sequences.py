"""Sequences of clicks, ratings or views as rows of the contract: one row an item, and no slates."""

import polars as pl

from components.interactions.importers._reading import end_of_session

NO_SLATES = (
    "No slates were recorded, only what users turned to: what else they could have turned to, and with what "
    "probability it was shown, is unknown. The value of a policy is not identified; next-item likelihood and hit rates "
    "stand in its place."
)


def sequence_rows(sessions: pl.DataFrame, event: str, max_steps: int, still_going: pl.Expr, loop: str) -> pl.DataFrame:
    """Rows whose `events` hold one item each: a state built up to a row knows it, and the next row's is its target.

    Args:
        sessions: one row a session with `session_id`, `user_id`, `items` and `times` (lists of equal length); columns
            of the contract beside them, such as `context`, go with every row.
        event: type of the events.
        max_steps: items kept of a session; a longer one is cut and its end censored.
        still_going: where the record stopped before the user did; null counts as false.
        loop: name of the loop.
    """
    length = pl.col("items").list.len().cast(pl.Int32)
    items = (
        sessions.with_columns(
            last_step=length.clip(upper_bound=max_steps) - 1,
            stopped_early=(length > max_steps) | still_going.fill_null(False),
            step=pl.int_ranges(length, dtype=pl.Int32).list.head(max_steps),
            item_id=pl.col("items").list.head(max_steps),
            timestamp=pl.col("times").list.head(max_steps),
        )
        .drop("items", "times")
        .explode("step", "item_id", "timestamp")
    )
    return items.with_columns(
        loop=pl.lit(loop),
        request_id=pl.format("{}:{}", "session_id", "step"),
        available_at="timestamp",
        session_end=end_of_session(pl.col("step") == pl.col("last_step"), pl.col("stopped_early")),
        events=pl.concat_list(pl.struct(type=pl.lit(event), item_id="item_id")),
        policy=pl.lit("unknown"),
    )
