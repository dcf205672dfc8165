"""A shop's log as somebody has it who never heard of the contract: a CSV, and a mapping that explains it."""

from pathlib import Path

import polars as pl

from components.interactions.log_folder import Log

MAPPING = """
[log]
file = "log.csv"
evidence = "propensities"
responses = "per_position"
ratio_assumption = "cascade"
[columns]
session_id = "visit"
user_id = "visitor"
step = "n"
timestamp = "shown_at"
slate = "shown"
slate_log_prob = "lp"
candidates = "pool"
clicked = "clicks"
purchased = "buys"
"""


def write_own_log(log: Log, folder: Path) -> None:
    """Write 1,200 requests as `log.csv`, the first eight of which show an item twice, beside their `mapping.toml`."""
    rows = log.scan().collect().sort("session_id", "step").head(1_200)
    lists = {"shown": "slate", "pool": "candidates", "clicks": "clicked", "buys": "purchased"}
    if rows["candidates"].null_count():
        table = log.candidate_table().rename({"candidates": "listed"})
        rows = rows.join(table, on="candidates_digest", how="left").with_columns(candidates=pl.col("listed"))
    twice = pl.concat_list(pl.col("slate").list.first(), pl.col("slate").list.head(3))
    rows = rows.with_columns(slate=pl.when(pl.int_range(pl.len()) < 8).then(twice).otherwise("slate"))
    folder.mkdir()
    rows.select(
        visit="session_id",
        visitor="user_id",
        n="step",
        shown_at=pl.col("timestamp").dt.to_string("iso:strict"),
        lp="slate_log_prob",
        **{
            name: pl.col(column).cast(pl.List(pl.Int8) if name in ("clicks", "buys") else pl.List(pl.String))
            .cast(pl.List(pl.String)).list.join("|")
            for name, column in lists.items()
        },
    ).write_csv(folder / "log.csv")  # fmt: skip
    (folder / "mapping.toml").write_text(MAPPING)
