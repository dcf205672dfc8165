"""What monitoring compares: scalars of each request, a seeded sample of them as reference, and the report against it.

The drift of a column is its population stability index,

    PSI = Σ_bin (p_bin − q_bin) · ln(p_bin / q_bin),

with p the current and q the reference shares of the bins: 0 where they are equal, above 0.2 a large change by custom.
Unknown values belong to no bin. Chance alone gives about (bins − 1) · (1 / n_current + 1 / n_reference), so small
samples need a higher threshold; n counts requests, or sessions or users where their requests share the value.
"""

import json
import shutil
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Literal
from uuid import uuid4

import numpy as np
import polars as pl
from pydantic import BaseModel, ConfigDict, Field

from components.errors import InputError
from components.interactions.contract import Evidence, Manifest, reward_per_position
from components.interactions.log import user_digest
from components.interactions.log_folder import Log, replace_folder
from components.interactions.stored_copies import staging_file, write_whole
from components.interactions.vocabulary import FIRST_ITEM, FeatureCode, Vocabulary

MAX_REFERENCE_ROWS = 20_000
REFERENCE, DESCRIPTION = "drift_reference.parquet", "drift_reference.json"
#: Whose the rows of the sample are, by the digest of their user: what it takes to delete one user's.
OWNERS = "drift_reference_owners.parquet"
#: Stands for categories that the vocabulary does not know.
OTHER = "(other)"

Kind = Literal["numeric", "categorical"]


class ReferenceDescription(BaseModel):
    """What `drift_reference.json` says of the sample beside it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    columns: dict[str, Kind] = Field(description="Kind of each column.")
    n_rows: int = Field(ge=0, description="Requests in the sample.")
    n_requests: int = Field(ge=0, description="Requests of the log that was sampled.")
    seed: int = Field(ge=0, description="Seed of the sample.")
    content_digest: str = Field(description="Digest of the log that was sampled.")


class ColumnDrift(BaseModel):
    """How far one column has moved."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    column: str = Field(description="Name of the scalar.")
    kind: Kind = Field(description="How its values were binned.")
    score: float | None = Field(description="PSI; null where one side knows no value of it, which counts as drift.")
    drifted: bool = Field(description="Whether the score reaches the threshold.")


class DriftSummary(BaseModel):
    """What has moved between reference and current requests."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Literal["psi"] = "psi"
    threshold: float = Field(gt=0, description="PSI from which on a column counts as drifted.")
    n_reference: int = Field(ge=1, description="Requests in the reference.")
    n_current: int = Field(ge=1, description="Requests compared with it.")
    columns: tuple[ColumnDrift, ...] = Field(min_length=1, description="Every column that either side knows values of.")
    drifted_share: float = Field(ge=0, le=1, description="Share of the columns that drifted.")

    @property
    def drifted(self) -> tuple[str, ...]:
        """Names of the columns that drifted."""
        return tuple(column.column for column in self.columns if column.drifted)


def derived_scalars(
    rows: pl.DataFrame, manifest: Manifest, vocabulary: Vocabulary, items: pl.DataFrame
) -> pl.DataFrame:
    """Scalars of M requests, one row each: numbers as float64, categories as strings.

    Which columns there are depends on the manifest and the vocabulary alone, so reference and current data agree. A
    value that a request does not have is null. Popularity is log(1 + training count), unknown items counting 0.

    Args:
        rows: rows of the contract.
        manifest: what they mean.
        vocabulary: counts and categories of the training log, for reference and current rows alike.
        items: item table of the log.
    """
    slates = manifest.evidence is not Evidence.CLICKS
    event_items = pl.col("events").list.eval(pl.element().struct.field("item_id"))
    columns = {
        "step": pl.col("step"),
        "n_events": pl.col("events").list.len().fill_null(0),
        "event_log_popularity": log_popularity(event_items, vocabulary),
    }
    if slates:
        columns |= {
            "n_candidates": pl.col("candidates").list.len(),
            "slate_log_popularity": log_popularity(pl.col("slate"), vocabulary),
            "click_rate": _rate("clicked"),
            "reward": reward_per_position(manifest).list.sum(),
        }
        if manifest.evidence is Evidence.PROPENSITIES:
            columns["slate_log_prob"] = pl.col("slate_log_prob")
        if manifest.has_purchases:
            columns["purchase_rate"] = _rate("purchased")
        columns |= {f"signal.{name}": _rate(f"signals.{name}") for name in manifest.signals}
    columns |= {
        f"request_signal.{name}": pl.col("request_signals").struct.field(name) for name in manifest.request_signals
    }
    context = {code.feature.name: code for code in vocabulary.context_codes}
    values = {f"context.{name}": (pl.col("context").struct.field(name), code) for name, code in context.items()}
    first_category = next((code for code in vocabulary.item_codes if code.feature.kind == "categorical"), None)
    if first_category is not None:
        name = first_category.feature.name
        item, column = (
            (pl.col("slate").list.first(), f"first_item.{name}")
            if slates
            else (event_items.list.last(), f"last_event.{name}")
        )
        category = item.replace_strict(items["item_id"], items[name], default=None, return_dtype=pl.String)
        values[column] = category, first_category
    columns |= {name: value for name, (value, code) in values.items() if code.feature.kind == "numeric"}
    return rows.select(
        *(column.cast(pl.Float64).alias(name) for name, column in columns.items()),
        *(
            _known_category(value, code).alias(name)
            for name, (value, code) in values.items()
            if code.feature.kind == "categorical"
        ),
    )


def log_popularity(item_ids: pl.Expr, vocabulary: Vocabulary) -> pl.Expr:
    """Mean of log(1 + training count) over each list's items; unknown ones count 0."""
    known = pl.Series(vocabulary.item_ids, dtype=pl.String)
    log_counts = pl.Series(vocabulary.counts()[FIRST_ITEM:].log1p().double().numpy())
    return item_ids.list.eval(
        pl.element().replace_strict(known, log_counts, default=0.0, return_dtype=pl.Float64)
    ).list.mean()


def _rate(column: str) -> pl.Expr:
    """Mean over the positions where it is known."""
    return pl.col(column).list.eval(pl.element().cast(pl.Float64)).list.mean()


def _known_category(value: pl.Expr, code: FeatureCode) -> pl.Expr:
    known = pl.lit(pl.Series(code.feature.values, dtype=pl.String).implode())
    return pl.when(value.is_null() | value.is_in(known)).then(value).otherwise(pl.lit(OTHER))


def write_drift_reference(log: Log, vocabulary: Vocabulary, out: Path, seed: int) -> Path:
    """Sample a log's derived scalars into a folder: at most 20,000 rows as Parquet, described in JSON beside it.

    Returns:
        The Parquet file.
    """
    n_requests = log.manifest.n_requests
    n_rows = min(n_requests, MAX_REFERENCE_ROWS)
    chosen = np.sort(np.random.default_rng(seed).choice(n_requests, size=n_rows, replace=False))
    items = log.items()
    sampled, owners = [], []
    before = 0
    for part in log.parts():
        here = chosen[(chosen >= before) & (chosen < before + part.height)] - before
        sampled.append(derived_scalars(part[here], log.manifest, vocabulary, items))
        owners.append(part[here].select(owner=pl.col("user_id").map_elements(user_digest, return_dtype=pl.String)))
        before += part.height
    sample = pl.concat(sampled)
    description = ReferenceDescription(
        columns=_kinds(sample),
        n_rows=sample.height,
        n_requests=n_requests,
        seed=seed,
        content_digest=log.manifest.content_digest,
    )
    out.mkdir(parents=True, exist_ok=True)
    for name, table in ((OWNERS, pl.concat(owners)), (REFERENCE, sample)):
        staging = staging_file(out / name)
        table.write_parquet(staging)
        staging.replace(out / name)
    write_whole(out / DESCRIPTION, description.model_dump_json(indent=2) + "\n")
    return out / REFERENCE


def forget_in_reference(folder: Path, user_ids: Collection[str]) -> int:
    """Put a drift reference without users' rows in its folder's place; returns how many they were."""
    owners = pl.read_parquet(folder / OWNERS)
    others = ~owners["owner"].is_in([user_digest(user) for user in user_ids])
    if others.all():
        return 0
    description = ReferenceDescription.model_validate_json((folder / DESCRIPTION).read_bytes())
    description = description.model_copy(update={"n_rows": int(others.sum())})
    staging = folder.parent / f".{folder.name}.{uuid4().hex[:8]}.tmp"
    try:
        staging.mkdir()
        pl.read_parquet(folder / REFERENCE).filter(others).write_parquet(staging / REFERENCE)
        owners.filter(others).write_parquet(staging / OWNERS)
        (staging / DESCRIPTION).write_text(description.model_dump_json(indent=2) + "\n")
        replace_folder(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return int((~others).sum())


def drift_report(reference: pl.DataFrame, current: pl.DataFrame, out: Path, *, threshold: float = 0.1) -> DriftSummary:
    """Compare current with reference requests; writes `drift.html` (Evidently's page) and `drift.json` (the summary).

    Args:
        reference: derived scalars of the log that the policy was trained on.
        current: derived scalars of later requests; a sample of 20,000 is plenty, more is slow.
        out: folder of the two files.
        threshold: PSI from which on a column counts as drifted.

    Raises:
        InputError: one side has no rows, or their columns differ.
    """
    kinds = _kinds(reference)
    if _kinds(current) != kinds:
        raise InputError(f"current columns are {_kinds(current)}; expected the reference's, {kinds}")
    if not reference.height or not current.height:
        raise InputError(f"nothing to compare: {reference.height} reference and {current.height} current requests")
    known = {
        column: (reference[column].null_count() < reference.height, current[column].null_count() < current.height)
        for column in kinds
    }
    compared = [column for column, sides in known.items() if all(sides)]
    scores = _evidently_scores(reference, current, {column: kinds[column] for column in compared}, out, threshold)
    columns = tuple(
        ColumnDrift(
            column=column,
            kind=kinds[column],
            score=scores.get(column),
            drifted=scores.get(column, np.inf) >= threshold,
        )
        for column, sides in known.items()
        if any(sides)
    )
    summary = DriftSummary(
        threshold=threshold,
        n_reference=reference.height,
        n_current=current.height,
        columns=columns,
        drifted_share=sum(column.drifted for column in columns) / len(columns),
    )
    write_whole(out / "drift.json", summary.model_dump_json(indent=2) + "\n")
    return summary


def _evidently_scores(
    reference: pl.DataFrame, current: pl.DataFrame, kinds: dict[str, Kind], out: Path, threshold: float
) -> dict[str, float]:
    """PSI of each column by name; Evidently's own page is written on the way."""
    from evidently import DataDefinition, Dataset, Report  # takes seconds
    from evidently.presets import DataDriftPreset

    definition = DataDefinition(
        numerical_columns=[column for column, kind in kinds.items() if kind == "numeric"],
        categorical_columns=[column for column, kind in kinds.items() if kind == "categorical"],
    )
    columns = list(kinds)
    report = Report([DataDriftPreset(columns=columns, method="psi", threshold=threshold)])
    with warnings.catch_warnings(), np.errstate(invalid="ignore"):
        # Evidently correlates columns that do not vary, too, and numpy complains of each.
        warnings.simplefilter("ignore", RuntimeWarning)
        snapshot = report.run(
            Dataset.from_pandas(current.select(columns).to_pandas(), data_definition=definition),
            Dataset.from_pandas(reference.select(columns).to_pandas(), data_definition=definition),
        )
    out.mkdir(parents=True, exist_ok=True)
    staging = staging_file(out / "drift.html")
    snapshot.save_html(str(staging))
    staging.replace(out / "drift.html")
    metrics = json.loads(snapshot.json())["metrics"]
    scores = {
        metric["config"]["column"]: float(metric["value"])
        for metric in metrics
        if metric["config"]["type"].endswith(":ValueDrift")
    }
    return {column: scores[column] for column in columns}


def _kinds(frame: pl.DataFrame) -> dict[str, Kind]:
    return {name: "numeric" if dtype.is_numeric() else "categorical" for name, dtype in frame.schema.items()}
