"""What is watched of a loop's traffic, and against what.

===========  =======================================================================  ==================================
panel        columns                                                                  compared with
===========  =======================================================================  ==================================
features     context, events and candidates at the first requests of sessions         the log that the champion learned
                                                                                      from
features,    the same at all requests; popularity of what is shown, category of       the first days of this champion
items        position 1
policy       log_prob of slates; entropy of the champion's choice; share of the       the first days of this champion
             requests that are effective for it
reward       reward, rates of clicks and purchases, signals, place in the session     the first days of this champion
delay        time until the first feedback; none is a value of its own                the first days of this champion
user model   nats by which the user model misses the clicks                           the first days of this champion
volume       requests, whoever served them                                            earlier windows at the same hour
===========  =======================================================================  ==================================

What a policy shows is its own doing and so is what it earns: a new champion differs from the log that it learned from,
and must. Only what users bring with them can be held against that log, and that at the first requests of sessions
alone, since how long sessions are is the policy's doing as well. All else is compared with the first days of the same
champion, of the requests that it served: users are assigned to arms at random, so a canary beside it moves nothing.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl
import torch
from jaxtyping import Shaped
from pydantic import BaseModel, ConfigDict, Field

from components.errors import InputError
from components.interactions.batching import SessionReader
from components.interactions.contract import Evidence, Manifest
from components.interactions.log_folder import Log
from components.interactions.vocabulary import Vocabulary
from components.policies import plackett_luce
from components.policies.policy_folder import StoredPolicy
from components.world_model.user_model_folder import StoredUserModel
from monitoring.alarm_budget import moved
from monitoring.drift_reference import OWNERS, REFERENCE, derived_scalars, log_popularity
from monitoring.drift_tests import Baseline, Difference, Sample, Volume, shares_against_unknown_times, volume

Panel = Literal["features", "items", "policy", "reward", "delay", "user model", "volume"]
EFFECTIVE, NATS, DELAY, VOLUME = "effective_share", "user_model_nats", "feedback_seconds", "requests"
ENTROPY, CANDIDATES = "entropy", "candidate_log_popularity"
#: Columns that users bring with them: nothing that is shown changes them.
BROUGHT = ("n_events", "event_log_popularity", "n_candidates", CANDIDATES)
#: Requests of which the models are asked at once: their candidates are held in memory together.
ASKED_AT_ONCE = 4_000


class WatchConfig(BaseModel):
    """How a loop's traffic is watched."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    window_hours: float = Field(
        default=24.0, gt=0, le=24 * 28, description="Hours of traffic that a look judges; whole days see no rush hour."
    )
    baseline_days: float = Field(
        default=7.0, gt=0, le=90, description="First days of a champion, with which later windows are compared."
    )
    weekly_false_alarms: float = Field(
        default=0.05, gt=0, lt=1, description="Share of weeks of stable traffic that may have a false alarm."
    )
    floor: float = Field(
        default=0.002, ge=0, le=1, description="PSI, or squared shift in standard deviations, too small to matter."
    )
    min_users: int = Field(default=200, ge=2, description="Users whom a side must have before it is compared.")
    settle_minutes: float = Field(
        default=60.0, ge=0, le=60 * 24, description="Sessions that began so recently may go on; they wait for the next."
    )
    asked_requests: int = Field(
        default=20_000, ge=100, le=1_000_000, description="Requests a side of which policy and user model are asked."
    )
    history_windows: int = Field(
        default=28, ge=3, le=366, description="Earlier windows that the number of requests is compared with."
    )
    seed: int = Field(default=0, ge=0, lt=2**31, description="Seed of which sessions the models are asked of.")

    @property
    def window(self) -> timedelta:
        """Length of a window."""
        return timedelta(hours=self.window_hours)


class WatchedColumn(BaseModel):
    """One column of the traffic, and whether it has moved."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    panel: Panel = Field(description="What it belongs to.")
    column: str = Field(description="Its name.")
    against: Literal["training", "first days", "earlier windows"] = Field(description="What it is compared with.")
    before: float | None = Field(description="Its mean there; None for categories.")
    now: float | None = Field(description="Its mean in the window.")
    score: float = Field(description="PSI, or squared shift in standard deviations (in logs for volume).")
    p_value: float = Field(ge=0, le=1, description="Chance of as large a move on stable traffic, for this test alone.")
    moved: bool = Field(default=False, description="Whether the look names it.")

    def sentence(self) -> str:
        """The move in words."""
        means = "" if self.before is None or self.now is None else f" from {self.before:.4g} to {self.now:.4g}"
        return f"{self.column}{means} ({self.panel}, against {self.against}; score {self.score:.3g})"


@dataclass(frozen=True)
class Models:
    """Who is asked about requests, and what turns their ids into numbers."""

    policy: StoredPolicy
    user_model: StoredUserModel | None
    items: pl.DataFrame | None
    """Item table of the log that the policy learned from; None where it is not known."""


@dataclass(frozen=True)
class Span:
    """Which sessions count: those that one policy served alone, and that began in a span of time."""

    policy: str
    since: datetime
    until: datetime
    """Not itself."""
    anchor: datetime
    """Where a window begins; the others follow before and after it."""
    window: timedelta


@dataclass(frozen=True)
class Traffic:
    """The requests of a span, as columns."""

    requests: Sample
    """Of all requests."""
    asked: Sample
    """What the models say of the requests of some sessions."""

    @property
    def n_requests(self) -> int:
        """Number of requests."""
        return len(self.requests.user)


def read_traffic(
    log: Log, models: Models, span: Span, config: WatchConfig, feedback: pl.DataFrame | None = None
) -> Traffic:
    """The traffic of a span as columns, part by part; only what the columns hold stays in memory.

    Args:
        log: of the contract, with propensities.
        models: who is asked.
        span: which sessions count.
        config: how many requests the models are asked of.
        feedback: `request_id` and `feedback_seconds` until the first feedback, where that is known better than from the
            log's `available_at`.

    Raises:
        InputError: the log has no propensities, or a slate holds what was no candidate.
    """
    if log.manifest.evidence is not Evidence.PROPENSITIES:
        raise InputError(f"{log.path}: evidence is {log.manifest.evidence.value!r}; drift is watched of 'propensities'")
    vocabulary, items = models.policy.description.vocabulary, _items(log, models)
    share = min(1.0, config.asked_requests / max(log.manifest.n_requests, 1))
    columns: list[pl.DataFrame] = []
    asked: list[pl.DataFrame] = []
    for part in log.parts():
        rows = _of_span(part, span)
        if rows.is_empty():
            continue
        rows = _with_context(rows, log.manifest, vocabulary)
        columns.append(_columns(rows, log.manifest, vocabulary, items, feedback))
        chosen = rows.filter(pl.col("session_id").hash(config.seed) < round(share * (2**64 - 1)))
        for frame in _some_sessions(chosen):
            asked.append(_ask(log, models, frame))
    return Traffic(_sample(columns), _sample(asked))


def save_traffic(traffic: Traffic, folder: Path) -> None:
    """Leave traffic in a folder, as a Parquet file of each of its samples."""
    for name, sample in (("requests", traffic.requests), ("asked", traffic.asked)):
        columns = [
            pl.Series(column, values.tolist(), pl.String) if values.dtype == object else pl.Series(column, values)
            for column, values in sample.columns.items()
        ]
        frame = pl.DataFrame([pl.Series("user", sample.user), pl.Series("window", sample.window), *columns])
        frame.write_parquet(folder / f"{name}.parquet")


def load_traffic(folder: Path) -> Traffic:
    """What `save_traffic` left in a folder."""
    return Traffic(*(_sample([pl.read_parquet(folder / f"{name}.parquet")]) for name in ("requests", "asked")))


def _items(log: Log, models: Models) -> pl.DataFrame:
    """The item table with every feature that the policy's vocabulary names."""
    items = log.items() if models.items is None else models.items
    names = [code.feature.name for code in models.policy.description.vocabulary.item_codes]
    return items.with_columns(pl.lit(None, dtype=pl.String).alias(name) for name in names if name not in items.columns)


def _of_span(part: pl.DataFrame, span: Span) -> pl.DataFrame:
    began = pl.col("timestamp").min().over("session_id")
    return part.with_columns(began=began).filter(
        pl.col("began") >= span.since,
        pl.col("began") < span.until,
        (pl.col("policy") == span.policy).all().over("session_id"),
    ).with_columns(
        user=pl.col("user_id").hash(0) // 2,
        window=(pl.col("began") - span.anchor).dt.total_microseconds() // (span.window // timedelta(microseconds=1)),
    )  # fmt: skip


def _with_context(rows: pl.DataFrame, manifest: Manifest, vocabulary: Vocabulary) -> pl.DataFrame:
    """The rows with all features that the vocabulary knows: those that nobody sent any more are unknown."""
    sent = {feature.name for feature in manifest.context}
    features = [code.feature for code in vocabulary.context_codes]
    if not features:
        return rows
    fields = [
        (pl.col("context").struct.field(feature.name) if feature.name in sent else pl.lit(None))
        .cast(feature.dtype, strict=False)
        .alias(feature.name)
        for feature in features
    ]
    return rows.with_columns(context=pl.struct(fields))


def _columns(
    rows: pl.DataFrame, manifest: Manifest, vocabulary: Vocabulary, items: pl.DataFrame, feedback: pl.DataFrame | None
) -> pl.DataFrame:
    scalars = derived_scalars(rows, manifest, vocabulary, items)
    if feedback is None:
        seconds = rows.select((pl.col("available_at") - pl.col("timestamp")).dt.total_microseconds() / 1e6)
    else:
        seconds = rows.select("request_id").join(feedback, on="request_id", how="left", maintain_order="left")
        seconds = seconds.select("feedback_seconds")
    popularity = rows.select(log_popularity(pl.col("candidates"), vocabulary))
    numbers = [name for name, dtype in scalars.schema.items() if dtype.is_numeric()]
    return scalars.with_columns(
        pl.col(numbers).cast(pl.Float32),
        rows["user"],
        rows["window"],
        seconds.to_series().cast(pl.Float32).alias(DELAY),
        popularity.to_series().cast(pl.Float32).alias(CANDIDATES),
    )


def _some_sessions(rows: pl.DataFrame) -> Iterator[pl.DataFrame]:
    """Whole sessions, so many at a time that their requests are about `ASKED_AT_ONCE`."""
    if rows.is_empty():
        return
    rows = rows.sort("session_id", "step")
    numbered = rows.with_row_index("row").with_columns(piece=pl.col("row").min().over("session_id") // ASKED_AT_ONCE)
    yield from (frame.drop("row", "piece") for frame in numbered.partition_by("piece", maintain_order=True))


@torch.inference_mode()
def _ask(log: Log, models: Models, rows: pl.DataFrame) -> pl.DataFrame:
    """What the champion and the user model say of whole sessions."""
    table = SessionReader(log, models.policy.description.vocabulary).read(rows)
    batch = table.batch(torch.arange(len(table)))
    flat = batch.mask.flatten()
    policy = models.policy.policy
    requests, slates = batch.requests().select(flat), batch.slates.flatten(0, 1)[flat]
    logits = policy.logits(policy.states(batch).select(flat), requests)
    try:
        places = plackett_luce.places_of(slates, requests.candidates)
    except ValueError as error:
        raise InputError(f"{log.path}: {error}; the champion cannot be asked about it") from None
    log_probs = plackett_luce.log_prob(logits, places).double().sum(1)
    weights = log_probs - batch.log_probs[batch.mask]
    ordered = rows.sort("session_id", "step")
    columns = {
        "user": ordered["user"],
        "window": ordered["window"],
        EFFECTIVE: pl.Series(weights.numpy()),
        ENTROPY: pl.Series(plackett_luce.entropy(logits).float().numpy()),
    }
    return pl.DataFrame(columns | _nats(log, models.user_model, ordered))


def _nats(log: Log, stored: StoredUserModel | None, rows: pl.DataFrame) -> dict[str, pl.Series]:
    """By how many nats the user model misses the clicks of each request, where there is one that fits the slates."""
    if stored is None or not 0 < log.manifest.slate_size <= stored.user_model.slate_size:
        return {}
    manifest = log.manifest.model_copy(update={"slate_size": stored.user_model.slate_size})
    table = SessionReader(replace(log, manifest=manifest), stored.vocabulary).read(rows)
    batch = table.batch(torch.arange(len(table)))
    losses, numbers = stored.user_model.click_losses(batch)
    nats = torch.where(numbers > 0, losses / numbers.clamp(min=1), torch.nan)[batch.mask]
    return {NATS: pl.Series(nats.float().numpy())}


def _sample(frames: Sequence[pl.DataFrame]) -> Sample:
    if not frames:
        nothing = np.zeros(0, dtype=np.int64)
        return Sample(nothing, nothing, {})
    frame = pl.concat(frames, how="diagonal")
    return Sample(
        frame["user"].cast(pl.Int64).to_numpy(),
        frame["window"].cast(pl.Int64).to_numpy(),
        {name: _values(frame[name]) for name in frame.columns if name not in ("user", "window")},
    )


def _values(column: pl.Series) -> Shaped[np.ndarray, " M"]:
    if column.dtype.is_numeric():
        return column.cast(pl.Float64 if column.name == EFFECTIVE else pl.Float32).fill_null(float("nan")).to_numpy()
    names = column.unique().to_numpy()
    # Equal strings are one object: a million of them take the room of their addresses.
    codes = column.replace_strict(list(names), list(range(len(names))), return_dtype=pl.Int32)
    return np.array(names, dtype=object)[codes.to_numpy()]


def read_reference(folder: Path) -> Sample:
    """The first requests of sessions in a drift reference: what users brought with them when the policy learned.

    Args:
        folder: of `drift_reference.parquet` and its owners.

    Raises:
        InputError: a file is missing or damaged.
    """
    try:
        rows = pl.read_parquet(folder / REFERENCE)
        owners = pl.read_parquet(folder / OWNERS)["owner"]
    except (OSError, pl.exceptions.PolarsError) as error:
        raise InputError(f"{folder}: holds no drift reference: {str(error).splitlines()[0]}") from None
    first = rows["step"] == 0
    rows = rows.filter(first)
    brought = [name for name in rows.columns if _is_brought(name)]
    user = (owners.filter(first).hash(0) // 2).cast(pl.Int64).to_numpy()
    return Sample(user, np.zeros_like(user), {name: _values(rows[name]) for name in brought})


def _is_brought(name: str) -> bool:
    return name in BROUGHT or name.startswith("context.")


def panel_of(name: str) -> Panel:
    """The panel that a column belongs to."""
    if _is_brought(name):
        return "features"
    if name in ("slate_log_popularity",) or name.startswith(("first_item.", "last_event.")):
        return "items"
    known: dict[str, Panel] = {
        "slate_log_prob": "policy", ENTROPY: "policy", EFFECTIVE: "policy", DELAY: "delay", NATS: "user model",
    }  # fmt: skip
    return known.get(name, "reward")


class Watch:
    """Compares windows of one champion with its first days and with the log that it learned from."""

    def __init__(self, first_days: Traffic | None, reference: Sample | None) -> None:
        self._requests = None if first_days is None else Baseline(first_days.requests)
        self._asked = None if first_days is None else Baseline(first_days.asked)
        self._reference = reference

    def compare(self, now: Traffic) -> list[WatchedColumn]:
        """Every test of a window; none is judged yet."""
        found: list[WatchedColumn] = []
        if self._reference is not None:
            first = now.requests.take(now.requests.columns["step"] == 0)
            for name in self._reference.columns:
                if name in first.columns:
                    difference = shares_against_unknown_times(self._reference, first, name)
                    found += _watched(name, "training", difference)
        for baseline, sample in ((self._requests, now.requests), (self._asked, now.asked)):
            if baseline is None:
                continue
            for name in sample.columns:
                if name in baseline.sample.columns:
                    found += _watched(name, "first days", _test(baseline, sample, name))
        return found


def _test(baseline: Baseline, sample: Sample, name: str) -> Difference | None:
    if name == EFFECTIVE:
        return baseline.effective_share(sample, name)
    if panel_of(name) in ("reward", "user model"):
        return baseline.means(sample, name)
    found = baseline.shares(sample, name)
    if found is None or sample.columns[name].dtype == object:
        return found
    before, now = (_mean(values) for values in (baseline.sample.columns[name], sample.columns[name]))
    return replace(found, before=before, now=now)


def _watched(
    name: str, against: Literal["training", "first days"], difference: Difference | None
) -> list[WatchedColumn]:
    if difference is None:
        return []
    return [_column(panel_of(name), name, against, difference)]


def _column(
    panel: Panel, name: str, against: Literal["training", "first days", "earlier windows"], found: Difference
) -> WatchedColumn:
    return WatchedColumn(
        panel=panel, column=name, against=against, before=found.before, now=found.now, score=found.score,
        p_value=found.p_value,
    )  # fmt: skip


def compare_volume(earlier: Sequence[Volume], now: Volume) -> list[WatchedColumn]:
    """The test of how many requests there were, where it can be made."""
    found = volume(earlier, now)
    return [] if found is None else [_column("volume", VOLUME, "earlier windows", found)]


def judge(columns: Sequence[WatchedColumn], level: float, floor: float) -> tuple[WatchedColumn, ...]:
    """All tests of one look, with those named that have found something; worst first."""
    differences = [Difference(column.score, column.p_value) for column in columns]
    named = moved(differences, level, floor)
    judged = [column.model_copy(update={"moved": told}) for column, told in zip(columns, named, strict=True)]
    return tuple(sorted(judged, key=lambda column: (not column.moved, column.p_value)))


def means(sample: Sample) -> dict[str, float]:
    """Mean of each numeric column, over where it is known."""
    found = {name: _mean(values) for name, values in sample.columns.items() if values.dtype != object}
    return {name: value for name, value in found.items() if value is not None}


def _mean(values: Shaped[np.ndarray, " M"]) -> float | None:
    known = values[np.isfinite(values)]
    return float(known.mean(dtype=np.float64)) if len(known) else None
