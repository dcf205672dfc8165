"""The scalar profile of a log: a handful of numbers that a person, and the log's expectations, read.

Nearly every number is a ratio of two sums. Sums over parts merge, so the log is never held in memory as a whole.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import polars as pl

from components.interactions.contract import Evidence, Manifest, reward_per_position


@dataclass(frozen=True)
class Ratio:
    """One number of the profile, `Σ numerator / Σ denominator` over the rows; absent where the denominator is 0."""

    name: str
    numerator: pl.Expr
    denominator: pl.Expr


def sum_part(part: pl.DataFrame, manifest: Manifest) -> pl.DataFrame:
    """The sums of one part, as one row that `profile` merges with those of the other parts.

    Args:
        part: whole sessions of accepted rows: the contract's columns, and `n_candidates` (null where unknown).
        manifest: decides which numbers exist: without slates no slate rates, without purchases no purchase rate.
    """
    ratios = _ratios(manifest)
    reward = reward_per_position(manifest).list.sum()
    return part.select(
        *(ratio.numerator.cast(pl.Float64).alias(f"{ratio.name}/numerator") for ratio in ratios),
        *(ratio.denominator.cast(pl.Float64).alias(f"{ratio.name}/denominator") for ratio in ratios),
        reward.min().alias("reward/min"),
        reward.max().alias("reward/max"),
    )


def profile(sums: Sequence[pl.DataFrame], manifest: Manifest) -> dict[str, float]:
    """The profile of the parts whose sums are given: name -> value, shares and rates in [0, 1]."""
    if not sums:
        return {}
    merged = pl.concat(sums)
    totals = merged.sum().row(0, named=True)
    numbers = {
        ratio.name: totals[f"{ratio.name}/numerator"] / totals[f"{ratio.name}/denominator"]
        for ratio in _ratios(manifest)
        if totals[f"{ratio.name}/denominator"] > 0
    }
    lowest, highest = merged["reward/min"].min(), merged["reward/max"].max()
    if isinstance(lowest, float) and isinstance(highest, float):
        numbers["reward_range"] = highest - lowest
    return numbers


def _ratios(manifest: Manifest) -> list[Ratio]:
    n_sessions = pl.col("session_id").n_unique()
    ratios = [
        Ratio("mean_session_length", pl.len(), n_sessions),
        Ratio("mean_events_per_request", pl.col("events").list.len().sum(), pl.len()),
        Ratio("share_of_sessions_left", (pl.col("session_end") == "left").sum(), n_sessions),
        Ratio("share_of_sessions_censored", (pl.col("session_end") == "censored").sum(), n_sessions),
        *(_null_share(column) for column in ("timestamp", "available_at", "slate", "exposed", "clicked", "purchased")),
        *(_null_share(f"signals.{name}") for name in manifest.signals),
    ]
    return ratios if manifest.evidence is Evidence.CLICKS else [*ratios, *_slate_ratios(manifest)]


def _slate_ratios(manifest: Manifest) -> list[Ratio]:
    clicked, log_prob, n_candidates = pl.col("clicked"), pl.col("slate_log_prob"), pl.col("n_candidates")
    reward = reward_per_position(manifest).list.sum()
    # Where the candidates are unknown there is no sign that a slate was the only one possible.
    chosen = log_prob.is_not_null() & (n_candidates.is_null() | (n_candidates > 1))
    ratios = [
        Ratio("mean_slate_length", pl.col("slate").list.len().sum(), pl.col("slate").count()),
        Ratio("mean_candidates", n_candidates.sum(), n_candidates.count()),
        Ratio("click_rate", *_rate("clicked")),
        Ratio("share_of_requests_clicked", clicked.list.any().sum(), clicked.count()),
        Ratio("mean_reward", reward.sum(), reward.count()),
        Ratio("share_with_log_prob", log_prob.count(), pl.len()),
        Ratio("mean_log_prob", log_prob.sum(), log_prob.count()),
        Ratio("mean_propensity", log_prob.exp().sum(), log_prob.count()),
        Ratio("share_of_certain_slates", (chosen & (log_prob == 0)).sum(), chosen.sum()),
    ]
    return [*ratios, Ratio("purchase_rate", *_rate("purchased"))] if manifest.has_purchases else ratios


def _null_share(column: str) -> Ratio:
    return Ratio(f"null_share.{column}", pl.col(column).null_count(), pl.len())


def _rate(column: str) -> tuple[pl.Expr, pl.Expr]:
    """Positive positions, and positions with an answer."""
    return pl.col(column).list.sum().sum(), pl.col(column).list.drop_nulls().list.len().sum()
