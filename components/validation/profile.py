"""The scalar profile of a log: a handful of numbers that a person, and the log's expectations, read.

Nearly every number is a ratio of two sums, the others lie between two extremes. Both merge over parts, so the log is
never held in memory as a whole.

Logged probabilities can be held against each other. For slates that a policy with π > 0 everywhere drew from N
candidates, and u the probability (N − K)! / N! of a slate drawn at random,

    E[u / π] = 1     and     E[ln π − ln u] ≥ 0

whatever the policy: the first sums all slates, the second is a Kullback-Leibler divergence. Log_probs in another base,
of the set instead of the order, or of other candidates break one of them. For densities over the box [-1, 1]^A the
second holds too, with u = 2^-A; the first only where π > 0 on all of it, which is not asked of a policy of actions.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from scipy.special import gammaln

from components.interactions.contract import OF_REQUEST, Evidence, Feature, Manifest, request_reward
from components.validation.steadiness import quarter_sums, steadiness

#: Log_probs may have been written with two decimals.
ROUNDING = 0.01
#: Importance weights above exp of this count as this, so that sums of absurd ones stay finite.
_LARGEST_LOG_WEIGHT = 300.0


@dataclass(frozen=True)
class Ratio:
    """One number of the profile, `Σ numerator / Σ denominator` over the rows; absent where the denominator is 0."""

    name: str
    numerator: pl.Expr
    denominator: pl.Expr


@dataclass(frozen=True)
class Range:
    """One number of the profile, the largest `high` minus the smallest `low`; absent where all values are null."""

    name: str
    low: pl.Expr
    high: pl.Expr


def sum_part(part: pl.DataFrame, manifest: Manifest, quarters: tuple[float, ...]) -> pl.DataFrame:
    """The sums and extremes of one part, as one row that `profile` merges with those of the other parts.

    Args:
        part: whole sessions of accepted rows: the contract's columns, and `n_candidates` (null where unknown).
        manifest: decides which numbers exist: without slates no slate rates, without purchases no purchase rate.
        quarters: of the log, as `quarter_ends` yields them.
    """
    ratios, ranges = _ratios(manifest), _ranges(manifest)
    return part.select(
        *(ratio.numerator.cast(pl.Float64).alias(f"{ratio.name}/numerator") for ratio in ratios),
        *(ratio.denominator.cast(pl.Float64).alias(f"{ratio.name}/denominator") for ratio in ratios),
        *(each.low.cast(pl.Float64).min().alias(f"{each.name}/low") for each in ranges),
        *(each.high.cast(pl.Float64).max().alias(f"{each.name}/high") for each in ranges),
        *quarter_sums(manifest, quarters),
    )


def profile(sums: Sequence[pl.DataFrame], manifest: Manifest, quarters: tuple[float, ...]) -> dict[str, float]:
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
    for each in _ranges(manifest):
        low, high = merged[f"{each.name}/low"].min(), merged[f"{each.name}/high"].max()
        if isinstance(low, float) and isinstance(high, float):
            numbers[each.name] = high - low
    if "share_off_uniform" in numbers:
        # Where log_probs differ, they are compared with nothing: only a draw at random has the same for all slates.
        all_equal = numbers["log_prob_range"] <= ROUNDING
        numbers["equal_log_probs_off_uniform"] = numbers["share_off_uniform"] if all_equal else 0.0
    return numbers | steadiness(totals, manifest, quarters)


def item_profile(items: pl.DataFrame, manifest: Manifest) -> dict[str, float]:
    """The profile of a log's item table."""
    if items.is_empty():
        return {}
    features = {f"items.{feature.name}": (feature, pl.col(feature.name)) for feature in manifest.item_features}
    ids = items.select(pl.col("item_id").drop_nulls().unique()).to_series()
    numbers = {"item_ids_alike": float(ids.len() - ids.str.strip_chars().str.to_lowercase().n_unique())}
    for name, (feature, cell) in features.items():
        numbers[f"null_share.{name}"] = items.select(cell.is_null().mean()).item()
        if feature.kind == "numeric":
            number = items.select((cell.max() - cell.min()).cast(pl.Float64)).item()
        else:
            number = items.select(_share_unknown(feature, cell)).item()
        if number is not None and not math.isnan(number):
            numbers[f"{'range' if feature.kind == 'numeric' else 'unknown_share'}.{name}"] = number
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
    for feature in manifest.context:
        cell = pl.col("context").struct.field(feature.name)
        ratios.append(Ratio(f"null_share.context.{feature.name}", cell.is_null().sum(), pl.len()))
        if feature.values:
            ratios.append(Ratio(f"unknown_share.context.{feature.name}", _unknown(feature, cell).sum(), cell.count()))
    if manifest.action_size:
        return [*ratios, *_action_ratios(manifest)]
    return ratios if manifest.evidence is Evidence.CLICKS else [*ratios, *_slate_ratios(manifest)]


def _action_ratios(manifest: Manifest) -> list[Ratio]:
    reward, log_prob = request_reward(manifest), pl.col("action_log_prob")
    signals = [name.removeprefix(OF_REQUEST) for name in manifest.reward.weights]
    over_uniform = log_prob + manifest.action_size * math.log(2.0)
    return [
        Ratio("mean_reward", reward.sum(), reward.count()),
        Ratio("share_with_log_prob", log_prob.count(), pl.len()),
        Ratio("mean_log_prob", log_prob.sum(), log_prob.count()),
        Ratio("log_density_over_uniform", over_uniform.sum(), log_prob.count()),
        *(
            Ratio(f"mean.request_signals.{name}", cell.sum(), cell.count())
            for name in manifest.request_signals
            for cell in [pl.col("request_signals").struct.field(name)]
        ),
        *(
            Ratio(
                f"null_share.request_signals.{name}",
                pl.col("request_signals").struct.field(name).is_null().sum(),
                pl.len(),
            )
            for name in signals
        ),
    ]


def _slate_ratios(manifest: Manifest) -> list[Ratio]:
    clicked, log_prob, n_candidates = pl.col("clicked"), pl.col("slate_log_prob"), pl.col("n_candidates")
    reward = request_reward(manifest)
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
        *_propensity_ratios(),
    ]
    return [*ratios, Ratio("purchase_rate", *_rate("purchased"))] if manifest.has_purchases else ratios


def _propensity_ratios() -> list[Ratio]:
    """Logged log_probs against those of slates drawn at random, where there was a choice and chance in it."""
    uncertain = _uncertain()
    over_uniform = (pl.col("slate_log_prob") - _uniform_log_prob()).filter(uncertain)
    weight = (-over_uniform).clip(upper_bound=_LARGEST_LOG_WEIGHT).exp()
    return [
        Ratio("share_of_uncertain_slates", uncertain.sum(), pl.len()),
        Ratio("log_prob_over_uniform", over_uniform.sum(), over_uniform.len()),
        Ratio("mean_uniform_weight", weight.sum(), weight.len()),
        Ratio("mean_square_uniform_weight", (weight**2).sum(), weight.len()),
        Ratio("share_off_uniform", (over_uniform.abs() > ROUNDING).sum(), over_uniform.len()),
    ]


def _ranges(manifest: Manifest) -> list[Range]:
    reward = request_reward(manifest)
    log_prob = pl.col("slate_log_prob").filter(_uncertain())
    return [
        Range("reward_range", reward, reward),
        Range("log_prob_range", log_prob, log_prob),
        *(
            Range(f"range.context.{feature.name}", cell, cell)
            for feature in manifest.context
            if feature.kind == "numeric"
            for cell in [pl.col("context").struct.field(feature.name)]
        ),
    ]


def _uncertain() -> pl.Expr:
    """Rows whose slate was one of several, and which do not say that no other could have been shown."""
    return ((pl.col("n_candidates") > 1) & (pl.col("slate_log_prob") < 0)).fill_null(False)


def _uniform_log_prob() -> pl.Expr:
    """Log of (N − K)! / N!, the probability of an ordered slate of K drawn at random from N candidates."""
    n, k = pl.col("n_candidates"), pl.col("slate").list.len()
    return _log_factorial(n.cast(pl.Float64) - k) - _log_factorial(n.cast(pl.Float64))


def _log_factorial(number: pl.Expr) -> pl.Expr:
    def of(values: pl.Series) -> pl.Series:
        return pl.Series(values.name, np.asarray(gammaln(values.to_numpy() + 1.0)), dtype=pl.Float64)

    return number.map_batches(of, return_dtype=pl.Float64)


def _unknown(feature: Feature, cell: pl.Expr) -> pl.Expr:
    return ~cell.is_in(feature.values)


def _share_unknown(feature: Feature, cell: pl.Expr) -> pl.Expr:
    """Null where the vocabulary is not stated, or nothing is known."""
    return _unknown(feature, cell).mean() if feature.values else pl.lit(None, dtype=pl.Float64)


def _null_share(column: str) -> Ratio:
    return Ratio(f"null_share.{column}", pl.col(column).null_count(), pl.len())


def _rate(column: str) -> tuple[pl.Expr, pl.Expr]:
    """Positive positions, and positions with an answer."""
    return pl.col(column).list.sum().sum(), pl.col(column).list.drop_nulls().list.len().sum()
