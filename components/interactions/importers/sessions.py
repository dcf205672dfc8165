"""Click sequences: what users viewed, one item after another, with no record of what else they were shown.

A row is a view. The item viewed at step t stands in that row's `events`, so a state built up to row t knows it, and the
next-item target of row t is the event of row t + 1. There are no slates, so the evidence level is `clicks`.

Two sets are recognized by the files in the folder:

- Diginetica (CIKM Cup 2016, as prepared for SR-GNN): `sessions_remapped.parquet`, neither users nor times.
- yoochoose (RecSys Challenge 2015): `clicks_train.tsv.gz` and `clicks_test.tsv.gz`, times but no users.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl
from pydantic import BaseModel, ConfigDict, Field

from components.errors import InputError
from components.interactions.contract import TIMESTAMP, Evidence, Manifest, RatioAssumption, Reward
from components.interactions.importers._click_sequences import NO_SLATES, sequence_rows
from components.interactions.importers._reading import (
    ROW,
    collect,
    complete,
    from_unix,
    in_parts,
    logged_by,
    refuse,
    require_columns,
    scan,
)
from components.interactions.log_folder import Log, write_log


class Config(BaseModel):
    """How click sequences become a log."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["sessions"] = "sessions"
    max_sessions: int | None = Field(
        default=None, ge=1, description="Keep this many sessions, those with the smallest salted hash; null keeps all."
    )
    min_length: int = Field(default=2, ge=1, description="Sessions with fewer views are left out.")
    max_steps: int = Field(
        default=40, ge=2, description="Views kept of a session; a longer one is cut and its end marked as censored."
    )
    idle_minutes: int = Field(
        default=30, ge=0, description="A session seen this shortly before the log's end is censored, not left."
    )


@dataclass(frozen=True)
class _ClickSet:
    """One of the sets: its name, the files it is recognized by, and how its sessions are read.

    `read` yields one row a session: `session_id` (int64), `items` (list[string]) and, with times, `times`.
    """

    name: str
    files: tuple[str, ...]
    read: Callable[[Path], pl.LazyFrame]
    has_times: bool
    limits: tuple[str, ...]


def import_log(config: Config, path: Path, out: Path, loop: str, until: datetime | None = None) -> Log:
    """Translate the click sequences in the folder `path` into a log in `out`.

    `until` leaves out what was logged later, as if the file ended there.

    Raises:
        InputError: no known set lies there, or one of its files is damaged or holds something unexpected.
    """
    click_set = _recognize(path)
    source = path / click_set.files[0]
    sessions = click_set.read(path)
    if click_set.has_times and until is not None:
        sessions = _viewed_by(sessions, until, source)
    lengths = collect(sessions.select("session_id", n_views=pl.col("items").list.len()), source)
    long_enough = lengths.filter(pl.col("n_views") >= config.min_length)
    chosen = _sample(long_enough, config.max_sessions)
    manifest = Manifest(
        loop=loop,
        source="sessions",
        evidence=Evidence.CLICKS,
        ratio_assumption=RatioAssumption.FULL_SLATE,
        responses="choice",
        slate_size=0,
        has_users=False,
        has_times=click_set.has_times,
        has_purchases=False,
        reward=Reward(weights={"clicked": 1.0}),
        limits=_limits(click_set, config, lengths.height, long_enough.height, chosen),
    )
    sizes = chosen.select("session_id", n_rows=pl.col("n_views").clip(upper_bound=config.max_steps))
    kept = pl.col("items").list.head(config.max_steps)
    items = collect(
        sessions.filter(pl.col("session_id").is_in(chosen["session_id"].implode()))
        .select(item_id=kept.list.explode())
        .unique(),
        source,
    )
    log_end = collect(sessions.select(pl.col("times").list.max().max()), source).item() if click_set.has_times else None
    since_last_seen = pl.lit(log_end, dtype=TIMESTAMP) - pl.col("times").list.max()
    still_going = since_last_seen < pl.duration(minutes=config.idle_minutes)
    parts = (
        complete(sequence_rows(_with_times(part), "view", config.max_steps, still_going, loop), manifest)
        for part in in_parts(sessions, sizes, source)
    )
    return write_log(out, manifest, parts, items)


def _viewed_by(sessions: pl.LazyFrame, until: datetime, source: Path) -> pl.LazyFrame:
    """The sessions as far as they had come; those that had not begun are not among them."""
    views = logged_by(sessions.explode("items", "times").with_row_index(ROW), pl.col("times"), until, source)
    return views.group_by("session_id", maintain_order=True).agg("items", "times")


def _with_times(sessions: pl.DataFrame) -> pl.DataFrame:
    session_id = pl.col("session_id").cast(pl.String)
    no_times = pl.lit(None, dtype=TIMESTAMP).repeat_by(pl.col("items").list.len())
    return sessions.with_columns(
        session_id=session_id, user_id=session_id, times="times" if "times" in sessions.columns else no_times
    )


def _read_diginetica(path: Path) -> pl.LazyFrame:
    source = path / "sessions_remapped.parquet"
    rows = scan(source)
    require_columns(rows, {"session_idx": "whole numbers", "items": "lists of whole numbers"}, source)
    items = pl.col("items")
    refuse(rows, items.is_null() | items.list.eval(pl.element().is_null()).list.any(), "items", "item ids", source)
    session = pl.col("session_idx")
    refuse(rows, session.is_null() | session.is_duplicated(), "session_idx", "a number of its own", source)
    return rows.select(session_id=session.cast(pl.Int64), items=items.cast(pl.List(pl.String)))


def _read_yoochoose(path: Path) -> pl.LazyFrame:
    clicks = pl.concat([_read_yoochoose_file(path / name) for name in ("clicks_train.tsv.gz", "clicks_test.tsv.gz")])
    # A stable sort, since clicks of the same millisecond keep the file's order.
    return (
        clicks.sort("session_id", "times", maintain_order=True)
        .group_by("session_id", maintain_order=True)
        .agg("items", "times")
        .lazy()
    )


def _read_yoochoose_file(source: Path) -> pl.DataFrame:
    rows = scan(source)
    require_columns(rows, {"SessionId": "text", "ItemId": "text", "Time": "text"}, source)
    session, item, time = (
        pl.col("SessionId").cast(pl.Int64, strict=False),
        pl.col("ItemId").cast(pl.Int64, strict=False),
        from_unix(pl.col("Time").cast(pl.Float64, strict=False)),
    )
    refuse(rows, session.is_null(), "SessionId", "a whole number", source)
    refuse(rows, item.is_null(), "ItemId", "a whole number", source)
    refuse(rows, time.is_null(), "Time", "Unix seconds", source)
    return collect(rows.select(session_id=session, items=item.cast(pl.String), times=time), source)


_NO_USERS = "Sessions stand in for users: two visits of one person cannot be told from visits of two."
_NO_ENDS = "Why a session ended was not recorded: its last view counts as leaving unless the record was cut there."
_CLICK_SETS = (
    _ClickSet(
        name="Diginetica",
        files=("sessions_remapped.parquet",),
        read=_read_diginetica,
        has_times=False,
        limits=(
            NO_SLATES,
            _NO_USERS,
            "There are no times: sessions cannot be ordered, so splits are random and change over time cannot be seen.",
            "There are no purchases: item ids were renumbered, so the set's purchase file cannot be joined.",
            _NO_ENDS,
            "Its preparation removed sessions of one view, items viewed fewer than 5 times and the last week: short "
            "visits and rare items are missing.",
        ),
    ),
    _ClickSet(
        name="yoochoose",
        files=("clicks_train.tsv.gz", "clicks_test.tsv.gz"),
        read=_read_yoochoose,
        has_times=True,
        limits=(
            NO_SLATES,
            _NO_USERS,
            "There are no purchases: this copy holds clicks only.",
            _NO_ENDS,
            "Its preparation removed sessions of one click and items clicked fewer than 5 times: short visits and rare "
            "items are missing.",
        ),
    ),
)


def _recognize(path: Path) -> _ClickSet:
    expected = "; or ".join(f"{' and '.join(each.files)} ({each.name})" for each in _CLICK_SETS)
    if not path.is_dir():
        raise InputError(f"{path}: no such folder; expected one with {expected}")
    found = [each for each in _CLICK_SETS if all((path / name).is_file() for name in each.files)]
    if len(found) != 1:
        seen = sorted(entry.name for entry in path.iterdir())[:20]
        raise InputError(f"{path}: holds {seen}; expected exactly one set: {expected}")
    return found[0]


def _limits(
    click_set: _ClickSet, config: Config, n_all: int, n_long_enough: int, chosen: pl.DataFrame
) -> tuple[str, ...]:
    limits = list(click_set.limits)
    if n_long_enough < n_all:
        limits.append(
            f"{n_all - n_long_enough} of {n_all} sessions had fewer than {config.min_length} views and were left out."
        )
    if chosen.height < n_long_enough:
        limits.append(f"The log is a sample: {chosen.height} of {n_long_enough} sessions.")
    if n_cut := chosen.filter(pl.col("n_views") > config.max_steps).height:
        limits.append(f"{n_cut} sessions were cut after {config.max_steps} views and count as censored there.")
    return tuple(limits)


def _sample(sessions: pl.DataFrame, max_sessions: int | None) -> pl.DataFrame:
    if max_sessions is None or max_sessions >= sessions.height:
        return sessions
    hashes = pl.Series(_splitmix64(sessions["session_id"].to_numpy()))
    return sessions[hashes.arg_sort().head(max_sessions).sort()]


def _splitmix64(numbers: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014) on salted numbers.

    Written out because polars' own hash may change between versions, and a sample must not. It is a bijection, so
    hashes never tie.
    """
    salt = np.uint64(0x9E3779B97F4A7C15)
    z = numbers.astype(np.int64).view(np.uint64) + salt
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
