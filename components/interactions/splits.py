"""Split a log by time, or by a salted hash of its sessions where a source has no times."""

import hashlib
from pathlib import Path

import polars as pl
from pydantic import BaseModel, ConfigDict, Field

from components.errors import InputError
from components.interactions.log_folder import Log, write_log

TRAIN, VALIDATION, TEST, HOLDOUT = "train", "validation", "test", "holdout"


class SplitConfig(BaseModel):
    """How much of a log goes where."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    validation_share: float = Field(default=0.15, gt=0, lt=0.5, description="Share of sessions that tune and select.")
    test_share: float = Field(
        default=0.25, gt=0, lt=0.5, description="Share of sessions, the latest ones, that only judge."
    )
    holdout_share: float = Field(
        default=0.2,
        gt=0,
        lt=0.5,
        description="Share of users kept apart for the A/B's own world model, where no simulator knows the truth.",
    )
    salt: str = Field(default="slateloop", description="Salt of the hashes that choose users and untimed sessions.")


def salted_share(names: pl.Series, salt: str) -> pl.Series:
    """A number in [0, 1) for each name: the same in every process and version of every library."""
    unique = names.unique()
    shares = [
        int.from_bytes(hashlib.blake2b(f"{salt}:{name}".encode(), digest_size=8).digest()) / 2**64 for name in unique
    ]
    return names.replace_strict(unique, pl.Series(shares, dtype=pl.Float64), return_dtype=pl.Float64)


def split_log(log: Log, config: SplitConfig, out: Path, *, with_holdout: bool) -> dict[str, Log]:
    """Write `train`, `validation`, `test` and, where asked for, `holdout` as logs below a folder.

    A session goes whole to the split in which its first request lies, so users may recur but no session is cut;
    users of the holdout are in no other split.

    Raises:
        InputError: a split would hold no session.
    """
    sessions = (
        log.scan()
        .group_by("session_id")
        .agg(pl.col("user_id").first(), pl.col("timestamp").min())
        .sort("session_id")
        .collect()
    )
    if log.manifest.has_times:
        order = sessions["timestamp"].rank("ordinal") / sessions.height
    else:
        order = salted_share(sessions["session_id"], f"{config.salt}:sessions")
    train_share = 1.0 - config.validation_share - config.test_share
    split = (
        pl.when(order <= train_share)
        .then(pl.lit(TRAIN))
        .when(order <= train_share + config.validation_share)
        .then(pl.lit(VALIDATION))
        .otherwise(pl.lit(TEST))
    )
    if with_holdout:
        held_out = salted_share(sessions["user_id"], f"{config.salt}:users") < config.holdout_share
        split = pl.when(held_out).then(pl.lit(HOLDOUT)).otherwise(split)
    assigned = sessions.select("session_id", split=split)
    names = [TRAIN, VALIDATION, TEST] + [HOLDOUT] * with_holdout
    sizes = dict(assigned["split"].value_counts().iter_rows())
    for name in names:
        if not sizes.get(name):
            raise InputError(f"{log.path}: the {name} split holds no session; the log has {sessions.height} sessions")
    items = log.items()
    candidate_table = log.candidate_table()
    logs = {}
    for name in names:
        chosen = assigned.filter(pl.col("split") == name).select("session_id")
        parts = (part.join(chosen, on="session_id", how="semi", maintain_order="left") for part in log.parts())
        logs[name] = write_log(
            out / name, log.manifest, parts, items, candidate_table if candidate_table.height else None
        )
    return logs
