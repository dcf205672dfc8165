"""What logged sessions came to: the users' past before an A/B, and what an A/B of them is planned from."""

from collections.abc import Iterable

import polars as pl

from components.experiment.guardrails import Metric
from components.interactions.contract import request_reward
from components.interactions.log_folder import Log

REWARD = "reward"


def logged_sessions(log: Log) -> pl.DataFrame:
    """One row a session: `session_id`, `user_id`, `timestamp` of its first request, `reward` and guarded metrics.

    Unknown feedback counts as none; the reward is null where none of the session's feedback is known at all.
    """

    def count(column: str) -> pl.Expr:
        return pl.col(column).list.sum().fill_null(0).sum().cast(pl.Float64)

    return (
        log.scan()
        .with_columns(request_reward(log.manifest))
        .sort("session_id", "step")
        .group_by("session_id", maintain_order=True)
        .agg(
            pl.col("user_id").first(),
            pl.col("timestamp").min(),
            pl.when(pl.col(REWARD).is_not_null().any()).then(pl.col(REWARD).sum()).alias(REWARD),
            pl.len().cast(pl.Float64).alias(Metric.SESSION_LENGTH.value),
            count("clicked").alias(Metric.CLICKS.value),
            count("purchased").alias(Metric.PURCHASES.value),
            ((pl.len() == 1) & (pl.col("session_end").last() == "left").fill_null(False))
            .cast(pl.Float64)
            .alias(Metric.FIRST_REQUEST_EXITS.value),
        )
        .collect()
    )


def mean_logged_rewards(logs: Iterable[Log]) -> pl.DataFrame:
    """Mean reward of each user's logged sessions, in columns `user_id` and `reward`: the past before an A/B."""
    sessions = pl.concat([logged_sessions(log).select("user_id", REWARD) for log in logs])
    return sessions.drop_nulls(REWARD).group_by("user_id", maintain_order=True).agg(pl.col(REWARD).mean())
