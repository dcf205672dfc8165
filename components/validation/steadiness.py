"""Whether what a log holds stays what it was: one quarter of its requests, by time, against another.

A unit that changed (seconds became milliseconds), a tracker that broke, a field that its sender renamed: each row still
keeps every rule, and only the means of earlier and later rows tell. Sums over parts merge, as in the profile.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import polars as pl

from components.interactions.contract import Manifest
from components.interactions.log_folder import Log

#: Values other than zero that a quarter must lead one to expect before its mean says anything.
ENOUGH = 30.0
# Numbers, since Python's own times end with the year 9999 and those of a wrong unit do not.
_SHOWN_AT = pl.col("timestamp").dt.epoch("us")


@dataclass(frozen=True)
class Reading:
    """One thing that is read off each row: how much of it there is, of how many values, and how many are not zero."""

    name: str
    amount: pl.Expr
    values: pl.Expr
    nonzero: pl.Expr


def quarter_ends(log: Log) -> tuple[float, ...]:
    """The three times that cut the log's requests into quarters, in µs since 1970; none where it has no times.

    Raises:
        polars.exceptions.PolarsError: a file cannot be read.
    """
    ends = log.scan().select(_SHOWN_AT.quantile(share).alias(str(share)) for share in (0.25, 0.5, 0.75))
    return tuple(end for end in ends.collect(engine="streaming").row(0) if end is not None)


def quarter_sums(manifest: Manifest, ends: tuple[float, ...]) -> list[pl.Expr]:
    """The sums of one part, named for `steadiness`; none where the log has no times."""
    if not ends:
        return []
    quarter = pl.sum_horizontal((_SHOWN_AT > end).cast(pl.Int8) for end in ends)
    within = [_SHOWN_AT.is_not_null() & (quarter == number) for number in range(len(ends) + 1)]
    return [
        part.filter(rows).sum().cast(pl.Float64).alias(_sum_name(reading.name, number, kind))
        for reading in readings(manifest)
        for number, rows in enumerate(within)
        for kind, part in (("amount", reading.amount), ("values", reading.values), ("nonzero", reading.nonzero))
    ]


def steadiness(sums: Mapping[str, float | None], manifest: Manifest, ends: tuple[float, ...]) -> dict[str, float]:
    """Per reading, the smallest mean of a quarter over the largest, in [0, 1]; absent where fewer than two say enough.

    A quarter says enough where the log's own share of nonzero values lets one expect `ENOUGH` of them in it: so rare
    feedback is compared in long logs only, and a quarter that by chance or by a fault holds none of it still counts.
    """
    found = {}
    for reading in readings(manifest) if ends else []:
        amounts, values, nonzero = (
            [sums[_sum_name(reading.name, number, kind)] or 0.0 for number in range(len(ends) + 1)]
            for kind in ("amount", "values", "nonzero")
        )
        share = sum(nonzero) / max(sum(values), 1.0)
        means = [amount / n for amount, n in zip(amounts, values, strict=True) if share * n >= ENOUGH]
        if len(means) > 1 and max(means) > 0:
            found[f"steadiness.{reading.name}"] = min(means) / max(means)
    return found


def readings(manifest: Manifest) -> list[Reading]:
    """What is compared: feedback on slates, request signals, numeric context, and how often features are known."""
    found = []
    if manifest.slate_size:
        feedback = ["clicked"] + ["purchased"] * manifest.has_purchases
        found += [_of_positions(name) for name in (*feedback, *(f"signals.{name}" for name in manifest.signals))]
    fields = [("request_signals", name, "numeric") for name in manifest.request_signals]
    fields += [("context", feature.name, feature.kind) for feature in manifest.context]
    for struct, name, kind in fields:
        cell = pl.col(struct).struct.field(name)
        known = cell.is_not_null()
        if kind == "numeric":
            found.append(Reading(f"{struct}.{name}", cell.abs(), known, (cell != 0).fill_null(False)))
        found.append(Reading(f"known.{struct}.{name}", known, pl.repeat(1, pl.len()), known))
    return found


def _of_positions(name: str) -> Reading:
    cells = pl.col(name).list
    return Reading(
        name,
        cells.eval(pl.element().cast(pl.Float64).abs()).list.sum(),
        cells.drop_nulls().list.len(),
        cells.eval(pl.element() != 0).list.sum(),
    )


def _sum_name(reading: str, quarter: int, kind: str) -> str:
    return f"{reading}/{quarter}/{kind}"
