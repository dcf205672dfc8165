"""A user's own log: a Parquet, CSV or TSV file with one row per request, and a short TOML file that maps its columns.

`docs/sources.md` shows the mapping whole, with an example. What the file does not hold is derived where that is honest
(`step` from time order, `request_id` from session and step, the session in place of its user) and otherwise left null,
with a sentence in the manifest's limits.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Literal

import polars as pl
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from components.errors import InputError
from components.interactions.contract import EVENTS, TIMESTAMP, Evidence, Feature, Manifest, Reward
from components.interactions.importers._cells import Cells, MappedFile, Target
from components.interactions.importers._reading import (
    ROW,
    collect,
    complete,
    end_of_session,
    in_parts,
    logged_by,
    refuse,
    scan,
)
from components.interactions.importers._table_mapping import Items, MappedFeature, TableMapping, read_mapping
from components.interactions.log_folder import Log, write_log


class Config(BaseModel):
    """How a user's own table becomes a log."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["table"] = "table"
    mapping: Path | None = Field(
        default=None, description="The mapping's TOML file; null means mapping.toml beside the data."
    )


def import_log(config: Config, path: Path, out: Path, loop: str, until: datetime | None = None) -> Log:
    """Translate the table in `path`, a file or the folder that holds it, into a log in `out`.

    `until` leaves out what was logged later, as if the file ended there.

    Raises:
        InputError: a file is missing or damaged, the mapping has an unknown key or contradicts itself, a mapped column
            is missing, or a cell cannot be read as what its column is mapped to.
    """
    if not path.exists():
        raise InputError(f"{path}: no such file or folder; expected a table and its mapping")
    folder = path if path.is_dir() else path.parent
    mapping_path = config.mapping or folder / "mapping.toml"
    mapping = read_mapping(mapping_path)
    if path.is_dir() and mapping.log.file is None:
        raise InputError(f"{mapping_path}: log.file: missing; expected the name of the data file in {path}")
    source = path / mapping.log.file if path.is_dir() and mapping.log.file else path
    file = MappedFile(source, scan(source), mapping.log.list_separator)
    rows = file.typed(_log_cells(file, mapping))
    if mapping.columns.timestamp:
        rows = logged_by(rows, pl.col("timestamp"), until, source)
    items, item_features = _items_of_log(rows, source) if mapping.items is None else _catalog(mapping.items, folder)
    manifest = _manifest(mapping, mapping_path, rows, source, loop, item_features)
    sizes = collect(rows.group_by("session_id", maintain_order=True).agg(n_rows=pl.len()), source)
    log_end = collect(rows.select(pl.col("timestamp").max()), source).item() if manifest.has_times else None
    end = pl.lit(log_end, dtype=TIMESTAMP)
    parts = (complete(_requests(part, mapping, loop, end), manifest) for part in in_parts(rows, sizes, source))
    return write_log(out, manifest, parts, items)


def files_read(config: Config, path: Path) -> list[Path]:
    """What `import_log` reads: `path`, the mapping, and the files that it names, which may lie elsewhere.

    Raises:
        InputError: the mapping is missing, or is none.
    """
    folder = path if path.is_dir() else path.parent
    mapping_path = config.mapping or folder / "mapping.toml"
    mapping = read_mapping(mapping_path)
    named = [mapping.log.file if path.is_dir() else None, mapping.items.file if mapping.items else None]
    return [path, mapping_path, *(folder / file for file in named if file is not None)]


def _log_cells(file: MappedFile, mapping: TableMapping) -> list[Cells]:
    """How every mapped column of the log is read, under the contract's names; features and signals are dotted."""

    def times(target: Target) -> Cells:
        return file.times(target, mapping.log.timestamp_format)

    readers: Mapping[str, Callable[[Target], Cells]] = {
        "session_id": file.ids,
        "request_id": file.ids,
        "user_id": file.ids,
        "step": file.whole_numbers,
        "timestamp": times,
        "available_at": times,
        "candidates": file.text_lists,
        "slate": file.text_lists,
        "slate_log_prob": file.probabilities,
        "slate_propensity": file.probabilities,
        "position_log_probs": file.probability_lists,
        "exposed": file.flag_lists,
        "clicked": file.flag_lists,
        "purchased": file.flag_lists,
        "session_end": file.session_ends,
        "events": file.text_lists,
        "event_types": file.text_lists,
        "policy": file.texts,
        "arm": file.texts,
        "experiment": file.texts,
    }
    columns: dict[str, str] = mapping.columns.model_dump(exclude_none=True)
    cells = {name: readers[name](Target(name, f"columns.{name}", column)) for name, column in columns.items()}
    if "event_types" in cells:
        types, events = cells["event_types"], cells["events"]
        unpaired = types.values.list.len().fill_null(0) != events.values.list.len().fill_null(0)
        expected = f"{types.expected}, as many as in column {events.target.column!r}"
        cells["event_types"] = replace(types, wrong=types.wrong | unpaired, expected=expected)
    return [
        *cells.values(),
        *(_feature(file, "context", name, feature) for name, feature in mapping.context.items()),
        *(file.number_lists(Target(f"signals.{n}", f"signals.{n}", c)) for n, c in mapping.signals.items()),
        *(
            file.numbers(Target(f"request_signals.{n}", f"request_signals.{n}", c))
            for n, c in mapping.request_signals.items()
        ),
    ]


def _feature(file: MappedFile, table: str, name: str, feature: MappedFeature) -> Cells:
    read = file.numbers if feature.kind == "numeric" else file.texts
    return read(Target(f"{table}.{name}", f"{table}.{name}.column", feature.column))


def _features(
    table: str, features: Mapping[str, MappedFeature], rows: pl.LazyFrame, source: Path
) -> tuple[Feature, ...]:
    """The features with their vocabularies: every value that the file holds."""

    def vocabulary(name: str) -> tuple[str, ...]:
        values = pl.col(f"{table}.{name}").drop_nulls().unique().sort()
        return tuple(collect(rows.select(values), source).to_series())

    return tuple(
        Feature(name=name, kind=feature.kind, values=vocabulary(name) if feature.kind == "categorical" else ())
        for name, feature in features.items()
    )


def _items_of_log(rows: pl.LazyFrame, source: Path) -> tuple[pl.DataFrame, tuple[Feature, ...]]:
    named = [name for name in ("slate", "candidates", "events") if name in rows.collect_schema()]
    ids = pl.concat([rows.select(item_id=pl.col(name).list.explode()).drop_nulls() for name in named])
    return collect(ids.unique(), source), ()


def _catalog(items: Items, folder: Path) -> tuple[pl.DataFrame, tuple[Feature, ...]]:
    source = folder / items.file
    file = MappedFile(source, scan(source), list_separator="|")
    item_id = file.ids(Target("item_id", "items.item_id", items.item_id))
    rows = file.typed([item_id, *(_feature(file, "items.features", *named) for named in items.features.items())])
    refuse(file.rows, item_id.values.is_duplicated(), items.item_id, "each item once", source, "items.item_id")
    features = [pl.col(f"items.features.{name}").alias(name) for name in items.features]
    return collect(rows.select("item_id", *features), source), _features("items.features", items.features, rows, source)


def _manifest(
    mapping: TableMapping,
    mapping_path: Path,
    rows: pl.LazyFrame,
    source: Path,
    loop: str,
    item_features: tuple[Feature, ...],
) -> Manifest:
    columns = mapping.columns
    slate_size = 0
    if columns.slate:
        slate_size = collect(rows.select(pl.col("slate").list.len().max()), source).item()
        if not slate_size:
            raise InputError(
                f"{source}: column {columns.slate!r} (mapped by columns.slate) is empty in every row; expected items"
            )
    weights = {name: weight for name, weight in Reward().weights.items() if getattr(columns, name)}
    try:
        return Manifest(
            loop=loop,
            source="table",
            evidence=mapping.log.evidence,
            ratio_assumption=mapping.log.ratio_assumption,
            responses=mapping.log.responses,
            slate_size=slate_size,
            has_users=columns.user_id is not None,
            has_times=columns.timestamp is not None,
            has_purchases=columns.purchased is not None,
            context=_features("context", mapping.context, rows, source),
            item_features=item_features,
            signals=tuple(mapping.signals),
            request_signals=tuple(mapping.request_signals),
            reward=mapping.reward or Reward(weights=weights or {"clicked": 1.0}),
            limits=_limits(mapping),
        )
    except ValidationError as error:
        message = error.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")
        raise InputError(f"{mapping_path}: {message}") from None


def _limits(mapping: TableMapping) -> tuple[str, ...]:
    columns, log = mapping.columns, mapping.log
    sentences = (
        (
            log.evidence is Evidence.CLICKS,
            "There are no slates: what else could have been shown, and with what probability, is unknown. The value of "
            "a policy is not identified.",
        ),
        (
            log.evidence is Evidence.SLATES,
            "The probability with which a slate was shown is unknown: importance weights would rest on an estimate.",
        ),
        (
            log.evidence is Evidence.PROPENSITIES,
            "That the probabilities are those of the whole ordered slate is the mapping's word.",
        ),
        (
            log.evidence is not Evidence.CLICKS and not columns.candidates,
            "Candidates were not recorded: the slate stands in for them, so a policy can only order it anew.",
        ),
        (
            not columns.user_id,
            "Sessions stand in for users: two visits of one person cannot be told from visits of two.",
        ),
        (not columns.timestamp, "There are no times: sessions cannot be ordered, and change over time cannot be seen."),
        (
            bool(columns.timestamp) and not columns.available_at,
            "When feedback was known was not recorded: it is taken to be the time of its request.",
        ),
        (not columns.purchased, "Purchases were not recorded."),
        (
            not columns.session_end,
            f"How a session ended was not recorded: its last request counts as {log.session_end!r} unless the log "
            "ended there.",
        ),
    )
    return tuple(sentence for holds, sentence in sentences if holds)


def _requests(rows: pl.DataFrame, mapping: TableMapping, loop: str, log_end: pl.Expr) -> pl.DataFrame:
    log, has = mapping.log, set(rows.columns)
    position = pl.int_range(pl.len(), dtype=pl.Int32).over("session_id")
    order = [name for name in ("step", "timestamp", ROW) if name in has]
    requests = rows.sort("session_id", *order, nulls_last=True).with_columns(
        step=pl.col("step") - log.first_step if "step" in has else position
    )
    if "session_end" not in has:
        still_going = pl.lit(False)
        if "timestamp" in has:
            since_last_seen = log_end - pl.col("timestamp").max().over("session_id")
            still_going = since_last_seen < pl.duration(minutes=log.idle_minutes)
        is_last = position == pl.len().over("session_id") - 1
        requests = requests.with_columns(end_of_session(is_last, still_going, log.session_end))
    derived = {
        "request_id": pl.format("{}:{}", "session_id", "step"),
        "user_id": pl.col("session_id"),
        "available_at": pl.col("timestamp") if "timestamp" in has else pl.lit(None, dtype=TIMESTAMP),
        "policy": pl.lit(log.policy),
    }
    if log.evidence is Evidence.SLATES:
        derived["candidates"] = pl.col("slate")
    if "slate_propensity" in has:
        derived["slate_log_prob"] = _log_of(pl.col("slate_propensity"))
    return _with_events(requests, log.event_type).with_columns(
        *(value.alias(name) for name, value in derived.items() if name not in has),
        *([pl.col("policy").fill_null(log.policy)] if "policy" in has else []),
        *(
            pl.struct(pl.col(f"{table}.{name}").alias(name) for name in names).alias(table)
            for table, names in (("context", mapping.context), ("request_signals", mapping.request_signals))
            if names
        ),
        loop=pl.lit(loop),
    )


def _log_of(probability: pl.Expr) -> pl.Expr:
    # NaN at 0 and below, so that validation quarantines a row that claims to show what could not be shown.
    log_prob = pl.when(probability > 0).then(probability.log()).otherwise(pl.lit(float("nan")))
    return pl.when(probability.is_not_null()).then(log_prob)


def _with_events(rows: pl.DataFrame, event_type: str) -> pl.DataFrame:
    none = pl.lit([], dtype=EVENTS)
    if "events" not in rows.columns:
        return rows.with_columns(events=none)
    if "event_types" not in rows.columns:
        event = pl.struct(type=pl.lit(event_type), item_id=pl.element())
        return rows.with_columns(pl.col("events").list.eval(event).fill_null(none))
    pairs = (
        rows.select(ROW, item_id="events", type="event_types")
        .filter(pl.col("item_id").list.len() > 0)
        .explode("item_id", "type")
        .group_by(ROW, maintain_order=True)
        .agg(events=pl.struct("type", "item_id"))
    )
    paired = rows.drop("events").join(pairs, on=ROW, how="left", maintain_order="left")
    return paired.with_columns(pl.col("events").fill_null(none))
