"""The endpoint's own interaction log: slates with the exact log_prob under which they were shown, and what was heard.

A request's feedback is what arrived within the attribution window; requests whose window was still open at the log's
end (its last row, or the moment that is asked for) are left out, and their sessions end there, censored. Where no
session was named, a pause longer than `session_gap_minutes` ends one. What a forgotten user was shown before the
tombstone does not count.
"""

import json
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import polars as pl
import sqlalchemy as sa
from pydantic import BaseModel, ConfigDict, Field

from components.errors import InputError
from components.interactions.contract import (
    CANDIDATE_SCHEMA,
    EVENTS,
    TIMESTAMP,
    Evidence,
    Feature,
    Manifest,
    RatioAssumption,
    Responses,
    Reward,
)
from components.interactions.deletion import forgotten_users
from components.interactions.importers._reading import ROW, collect, complete, in_parts, scan
from components.interactions.log import (
    CANDIDATE_LISTS,
    FEEDBACK,
    RECOMMENDATIONS,
    InteractionLog,
    frames_of,
    microseconds,
)
from components.interactions.log_folder import Log, write_log

#: What is imported before a span that is looked at: sessions that had begun so long before are known to be cut by it.
EARLIER = timedelta(days=1)
_FRAMES_PER_FILE = 100
_MICROSECONDS = 60_000_000
#: Name of an A/B in logs, with the number of the release that began it for the braces.
EXPERIMENT = "release-{}"
#: Columns of the tables as they are spooled, before their JSON is read.
_SHOWN = {
    "request_id": pl.String, "user_id": pl.String, "session_id": pl.String, "shown_at": pl.Int64,
    "candidates": pl.String, "candidates_digest": pl.String, "slate": pl.String, "log_probs": pl.String,
    "events": pl.String, "context": pl.String, "policy": pl.String, "arm": pl.String,
    "experiment": pl.Int64,
}  # fmt: skip
_HEARD = {
    "request_id": pl.String, "received_at": pl.Int64, "clicked": pl.String, "purchased": pl.String,
    "signals": pl.String, "request_signals": pl.String, "left": pl.Boolean,
}  # fmt: skip


class NothingLoggedError(InputError):
    """A loop has no request yet that can be imported."""


class Config(BaseModel):
    """How the interaction log becomes a log of the contract."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["log"] = "log"
    attribution_minutes: float = Field(
        default=30.0, ge=0, le=60 * 24 * 90, description="Feedback counts that came at most so long after the slate."
    )
    session_gap_minutes: float = Field(
        default=30.0, gt=0, le=60 * 24, description="A pause that ends a session, where none was named."
    )
    history_days: float | None = Field(
        default=None,
        gt=0,
        description="Only what was shown in the last so many days of the log counts; null takes all there is.",
    )
    without_feedback: Literal["none", "unknown"] = Field(
        default="none", description="What a slate without feedback means: nothing was clicked, or nothing is known."
    )
    items: Path | None = Field(
        default=None,
        description="Parquet, CSV or TSV file with a column item_id and one of each item feature; null: no features.",
    )
    ratio_assumption: RatioAssumption = Field(
        default=RatioAssumption.FULL_SLATE,
        description="cascade where what is shown below a position makes no difference to it; else full_slate.",
    )
    responses: Responses = Field(
        default="per_position", description="Whether positions are answered each on its own, or one item is chosen."
    )
    reward: Reward = Reward()


def import_log(config: Config, path: Path, out: Path, loop: str, until: datetime | None = None) -> Log:
    """Translate the SQLite database in the file `path` into a log in `out`, as it was at `until`.

    Raises:
        InputError: as `import_database`.
    """
    return import_database(config, f"sqlite:///{path}", out, loop, until)


def import_database(
    config: Config, url: str, out: Path, loop: str, until: datetime | None = None, since: datetime | None = None
) -> Log:
    """Translate one loop's rows of an interaction log into a log in `out`.

    Args:
        config: what feedback counts, and what the rows mean.
        url: of the database.
        out: folder of the log.
        loop: name of the loop.
        until: the moment of which this is the state: what came later is as if it had not come yet. Without it that is
            when the loop's last row came.
        since: what was shown earlier is left out, as what is older than `history_days`; sessions that had begun are
            cut there.

    Raises:
        InputError: a feature has values of two kinds, the item table cannot be read, or the database holds no
            interaction log; `NothingLoggedError` where the loop has no request whose window is over.
        LogUnavailableError: the database cannot be reached.
    """
    with TemporaryDirectory() as scratch:
        spool = _Spool(Path(scratch), InteractionLog(url), loop, config.history_days, since, until)
        requests = _sessions(spool, config)
        names = _names(spool)
        catalog, item_features = _items(config, requests, spool)
        manifest = Manifest(
            loop=loop,
            source="log",
            evidence=Evidence.PROPENSITIES,
            ratio_assumption=config.ratio_assumption,
            responses=config.responses,
            slate_size=collect(requests.select(pl.col("slate").list.len().max()), spool.requests).item(),
            context=names.context,
            item_features=item_features,
            signals=names.signals,
            request_signals=names.request_signals,
            reward=config.reward,
        )
        sizes = collect(requests.group_by("session_id", maintain_order=True).agg(n_rows=pl.len()), spool.requests)
        _with_feedback(requests, spool, config, names, loop).sink_parquet(spool.rows, compression="lz4")
        rows = pl.scan_parquet(spool.rows, row_index_name=ROW)
        parts = (complete(part, manifest) for part in in_parts(rows, sizes, spool.requests))
        return write_log(out, manifest, parts, catalog, spool.candidate_lists)


class _Names(BaseModel):
    """Features and signals that the log holds."""

    context: tuple[Feature, ...]
    signals: tuple[str, ...]
    request_signals: tuple[str, ...]


class _Spool:
    """One state of a loop's rows, as Parquet files that may be larger than memory."""

    def __init__(
        self,
        folder: Path,
        log: InteractionLog,
        loop: str,
        history_days: float | None,
        since: datetime | None,
        until: datetime | None,
    ) -> None:
        self.until = until
        self.requests, self.feedback = folder / "requests", folder / "feedback"
        self.decoded, self.rows = folder / "decoded.parquet", folder / "rows.parquet"
        own = [RECOMMENDATIONS.c.loop == loop, RECOMMENDATIONS.c.shown_at <= microseconds(until)]
        if since is not None:
            own.append(RECOMMENDATIONS.c.shown_at >= microseconds(since))
        if history_days is not None:
            newest = sa.select(sa.func.max(RECOMMENDATIONS.c.shown_at)).where(RECOMMENDATIONS.c.loop == loop)
            end = newest.scalar_subquery() if until is None else sa.literal(microseconds(until))
            own.append(RECOMMENDATIONS.c.shown_at >= end - round(1_440 * _MICROSECONDS * history_days))
        shown = sa.select(*(RECOMMENDATIONS.c[name] for name in _SHOWN)).where(*own)
        heard = (
            sa.select(*(FEEDBACK.c[name] for name in _HEARD))
            .join(RECOMMENDATIONS, RECOMMENDATIONS.c.request_id == FEEDBACK.c.request_id)
            .where(*own, FEEDBACK.c.received_at <= microseconds(until))
        )
        named = CANDIDATE_LISTS.c.candidates_digest.in_(sa.select(RECOMMENDATIONS.c.candidates_digest).where(*own))
        forgotten_requests: set[str] = set()
        with log.reading() as connection:
            forgotten = forgotten_users(connection, loop)

            def kept(part: pl.DataFrame) -> pl.DataFrame:
                tombstone = pl.col("user_id").replace_strict(forgotten, default=None, return_dtype=pl.Int64)
                gone = part.select((pl.col("shown_at") <= tombstone).fill_null(False)).to_series()
                forgotten_requests.update(part.filter(gone)["request_id"])
                return part.filter(~gone)

            n_requests = _dump(connection, shown, _SHOWN, self.requests, kept if forgotten else _all)
            if n_requests == 0:
                loops = sorted(connection.scalars(sa.select(RECOMMENDATIONS.c.loop).distinct()))
                raise NothingLoggedError(f"the interaction log holds no request of loop {loop!r}; it has {loops}")
            of_others = ~pl.col("request_id").is_in(sorted(forgotten_requests))
            _dump(connection, heard, _HEARD, self.feedback, lambda part: part.filter(of_others))
            lists = connection.execute(
                sa.select(CANDIDATE_LISTS.c.candidates_digest, CANDIDATE_LISTS.c.candidates).where(named)
            )
            self.candidate_lists = pl.DataFrame(
                [(digest, json.loads(items)) for digest, items in lists], schema=CANDIDATE_SCHEMA, orient="row"
            )

    def shown(self) -> pl.LazyFrame:
        """The loop's recommendations."""
        return pl.scan_parquet(self.requests / "*.parquet")

    def heard(self) -> pl.LazyFrame:
        """All feedback on them."""
        return pl.scan_parquet(self.feedback / "*.parquet")


def _all(part: pl.DataFrame) -> pl.DataFrame:
    return part


def _dump(
    connection: sa.Connection,
    rows: sa.Select[Any],
    schema: dict[str, Any],
    folder: Path,
    kept: Callable[[pl.DataFrame], pl.DataFrame],
) -> int:
    """Write what is kept of rows into Parquet files of a new folder; their number."""
    folder.mkdir()
    pl.DataFrame(schema=schema).write_parquet(folder / "part-00000.parquet")
    frames = frames_of(connection, rows, schema)
    n_rows = n_files = 0
    while block := list(islice(frames, _FRAMES_PER_FILE)):
        part, n_files = kept(pl.concat(block)), n_files + 1
        part.write_parquet(folder / f"part-{n_files:05d}.parquet")
        n_rows += part.height
    return n_rows


def _sessions(spool: _Spool, config: Config) -> pl.LazyFrame:
    """Requests whose window is over, with their session, place in it and end; lists read from their JSON."""
    if spool.until is None:
        times = pl.concat([spool.shown().select(time="shown_at"), spool.heard().select(time="received_at")])
        log_end = collect(times.max(), spool.requests).item()
    else:
        log_end = microseconds(spool.until)
    gap, window = (
        round(_MICROSECONDS * minutes) for minutes in (config.session_gap_minutes, config.attribution_minutes)
    )
    keys = collect(spool.shown().select("request_id", "user_id", "session_id", "shown_at"), spool.requests)
    keys = keys.sort("user_id", "session_id", "shown_at", "request_id")
    # Sorted: what belongs together is numbered, and numbers are compared sooner than names.
    keys = keys.with_columns(named=pl.struct("user_id", "session_id").rle_id())
    pause = pl.col("shown_at").diff().over("named").fill_null(0) > gap
    visit = (pause & pl.col("session_id").is_null()).cum_sum().over("named")
    # A user's own name for a session may be another user's too.
    keys = keys.with_columns(
        session_id=pl.when(pl.col("session_id").is_null())
        .then(pl.format("{}/visit-{}", "user_id", visit))
        .otherwise(pl.format("{}/named-{}", "user_id", "session_id"))
    ).with_columns(session=pl.col("session_id").rle_id())
    told = spool.heard().filter("left").select("request_id", "received_at").collect()
    told = told.group_by("request_id").agg(told_left=pl.col("received_at").min())
    keys = keys.join(told, on="request_id", how="left", maintain_order="left")
    place = pl.int_range(pl.len(), dtype=pl.Int32).over("session")
    last = place == pl.len().over("session") - 1
    told_left = last & (pl.col("told_left") <= pl.col("shown_at") + window).fill_null(False)
    paused = last & ~told_left & (log_end - pl.col("shown_at") >= gap)
    keys = keys.with_columns(
        step=place,
        closed=((pl.col("shown_at") + window) <= log_end).cum_min().over("session"),
        ended=told_left | paused,
        # That a pause ended a session is known only after it.
        known_at=pl.col("shown_at") + pl.when(paused).then(max(gap, window)).otherwise(window),
    ).filter("closed")
    if keys.is_empty():
        raise NothingLoggedError(
            "the interaction log holds no request whose attribution window is over; wait, or make "
            f"source.attribution_minutes = {config.attribution_minutes:g} smaller"
        )
    is_last = pl.col("step") == pl.col("step").max().over("session")
    end = pl.when(is_last).then(pl.when("ended").then(pl.lit("left")).otherwise(pl.lit("censored")))
    keys = keys.with_columns(session_end=end).select("request_id", "session_id", "step", "known_at", "session_end")
    strings = pl.List(pl.String)
    # Read many times: their JSON is decoded once.
    (
        spool.shown()
        .drop("session_id")
        .join(keys.lazy(), on="request_id", maintain_order="left")
        .with_columns(
            pl.col("candidates").str.json_decode(strings),
            pl.col("slate").str.json_decode(strings),
            pl.col("log_probs").str.json_decode(pl.List(pl.Float64)),
            pl.col("events").str.json_decode(EVENTS),
        )
        .sink_parquet(spool.decoded, compression="lz4")
    )
    return pl.scan_parquet(spool.decoded)


def _names(spool: _Spool) -> _Names:
    """Features and signals by their names, and of which kind the features are."""
    kinds: dict[str, set[str]] = {}
    values: dict[str, set[str]] = {}
    for context in _distinct(spool.shown(), "context", spool.requests):
        for name, value in context.items():
            if value is not None:
                kind = "categorical" if isinstance(value, str) else "numeric"
                kinds.setdefault(name, set()).add(kind)
                if isinstance(value, str):
                    values.setdefault(name, set()).add(value)
    for name, seen in kinds.items():
        if len(seen) > 1:
            raise InputError(
                f"the interaction log's context feature {name!r} holds text and numbers; expected one kind"
            )
    features = (
        Feature(name=name, kind=kind, values=tuple(sorted(values.get(name, ()))))
        for name, (kind,) in sorted(kinds.items())
    )

    def signals(column: str) -> tuple[str, ...]:
        return tuple(sorted({name for names in _distinct(spool.heard(), column, spool.feedback) for name in names}))

    return _Names(context=tuple(features), signals=signals("signals"), request_signals=signals("request_signals"))


def _distinct(rows: pl.LazyFrame, column: str, path: Path) -> Iterator[dict[str, Any]]:
    """The different JSON objects of a column."""
    yield from map(json.loads, collect(rows.select(pl.col(column).unique()), path).to_series())


def _with_feedback(requests: pl.LazyFrame, spool: _Spool, config: Config, names: _Names, loop: str) -> pl.LazyFrame:
    """The contract's rows: requests with what was heard of them within their window."""
    window = round(_MICROSECONDS * config.attribution_minutes)
    numbers = {name: pl.List(pl.Float32) for name in names.signals}
    of_request = {name: pl.Float32 for name in names.request_signals}
    per_position = ("clicked", "purchased", *(f"signals.{name}" for name in names.signals))
    per_request = tuple(f"request.{name}" for name in names.request_signals)
    heard = (
        spool.heard()
        .join(requests.select("request_id", "shown_at"), on="request_id")
        .filter(pl.col("received_at") <= pl.col("shown_at") + window)
        .with_columns(
            pl.col("clicked", "purchased").str.json_decode(pl.List(pl.Boolean)),
            *([pl.col("signals").str.json_decode(pl.Struct(numbers))] if numbers else []),
            *([pl.col("request_signals").str.json_decode(pl.Struct(of_request))] if of_request else []),
        )
        .select(
            "request_id",
            "received_at",
            "clicked",
            "purchased",
            *(pl.col("signals").struct.field(name).alias(f"signals.{name}") for name in names.signals),
            *(pl.col("request_signals").struct.field(name).alias(f"request.{name}") for name in names.request_signals),
        )
    )
    # Most requests are heard of once: what was said stands, and nothing is to be put together.
    words = collect(spool.heard().group_by("request_id").len(), spool.feedback)
    often = pl.col("request_id").is_in(words.filter(pl.col("len") > 1)["request_id"].implode())
    repeated = heard.filter(often).sort("request_id", "received_at")
    merged = repeated.group_by("request_id").agg(pl.col(per_request).drop_nulls().last())
    for column in per_position:
        # What was seen once stays seen; of other signals the newest word counts.
        told = pl.col(column).max() if column in ("clicked", "purchased") else pl.col(column).drop_nulls().last()
        answers = (
            repeated.select("request_id", column)
            .drop_nulls(column)
            .with_columns(position=pl.int_ranges(pl.col(column).list.len()))
            .explode(column, "position")
            .group_by("request_id", "position")
            .agg(told)
            .sort("request_id", "position")
            .group_by("request_id", maintain_order=True)
            .agg(column)
        )
        merged = merged.join(answers, on="request_id", how="left")
    columns = ("request_id", *per_position, *per_request)
    answered = pl.concat([heard.filter(~often).select(columns), merged.select(columns)])
    joined = requests.join(answered, on="request_id", how="left", maintain_order="left")
    if of_request:
        joined = joined.with_columns(
            request_signals=pl.struct(pl.col(f"request.{name}").alias(name) for name in of_request)
        )
    silence = pl.col("slate").list.eval(pl.lit(False if config.without_feedback == "none" else None, dtype=pl.Boolean))
    context = pl.Struct({feature.name: feature.dtype for feature in names.context})
    return joined.select(
        pl.col("request_id", "session_id", "user_id", "step", "candidates", "candidates_digest", "slate"),
        pl.col("session_end", "events", "policy", "arm"),
        *(pl.col(f"signals.{name}") for name in names.signals),
        *([pl.col("request_signals")] if of_request else []),
        *([pl.col("context").str.json_decode(context)] if names.context else []),
        experiment=pl.format(EXPERIMENT, "experiment"),
        loop=pl.lit(loop),
        timestamp=pl.col("shown_at").cast(pl.Datetime("us")).cast(TIMESTAMP),
        available_at=pl.col("known_at").cast(pl.Datetime("us")).cast(TIMESTAMP),
        slate_log_prob=pl.col("log_probs").list.sum(),
        position_log_probs="log_probs",
        clicked=pl.coalesce("clicked", silence),
        purchased=pl.coalesce("purchased", silence),
    )


def _items(config: Config, requests: pl.LazyFrame, spool: _Spool) -> tuple[pl.DataFrame, tuple[Feature, ...]]:
    """The item table: every item of the log, with the features that the item file knows of it."""
    named = pl.concat(
        [
            requests.select(item_id=pl.col("candidates").explode()),
            requests.select(item_id=pl.col("slate").explode()),
            requests.select(item_id=pl.col("events").explode().struct.field("item_id")),
            spool.candidate_lists.lazy().select(item_id=pl.col("candidates").explode()),
        ]
    )
    known = collect(named.drop_nulls().unique(), spool.requests)
    if config.items is None:
        return known, ()
    table = collect(scan(config.items).drop(ROW), config.items)
    if "item_id" not in table.columns:
        raise InputError(f"{config.items}: column 'item_id' is missing; the file has {table.columns}")
    table = table.with_columns(pl.col("item_id").cast(pl.String))
    if table["item_id"].is_duplicated().any():
        twice = table.filter(pl.col("item_id").is_duplicated())["item_id"][0]
        raise InputError(f"{config.items}: column 'item_id': {twice!r} stands there twice; expected each item once")
    features = []
    for name in table.columns:
        if name == "item_id":
            continue
        column = table[name]
        if not column.dtype.is_numeric():
            number = column.cast(pl.String).cast(pl.Float64, strict=False)
            column = number if number.null_count() == column.null_count() else column.cast(pl.String)
            table = table.with_columns(column.alias(name))
        numeric = column.dtype.is_numeric()
        values = () if numeric else tuple(sorted(column.drop_nulls().unique()))
        features.append(Feature(name=name, kind="numeric" if numeric else "categorical", values=values))
    # Items that were never shown are known too: they may be candidates tomorrow.
    missing = known.join(table, on="item_id", how="anti")
    return pl.concat([table, missing], how="diagonal"), tuple(features)
