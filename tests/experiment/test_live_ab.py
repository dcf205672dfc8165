"""The A/B of a release, from logs whose truth is known."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from components.experiment.ab import AbResult, analyze_ab
from components.experiment.gate import GateConfig
from components.experiment.guardrails import Metric
from components.experiment.live_ab import live_ab, proven_harm
from components.interactions.importers._reading import complete
from components.interactions.log_folder import Log, write_log

PLAN = {"treatment": "new", "control": "old", "planned_share": 0.5, "planned_sessions": 400}


@pytest.fixture
def shop(storefront_log: Log, tmp_path: Path):
    """The shop's log, its users in arms of `release-2` by their number, sold as what a release showed."""

    def build(columns: list[pl.Expr]) -> Log:
        rows = storefront_log.scan().collect()
        number = pl.col("user_id").str.tail(5).cast(pl.Int32)
        arms = {
            "arm": pl.when(number % 2 == 0).then(pl.lit("challenger")).otherwise(pl.lit("champion")),
            "experiment": pl.lit("release-2"),
        }
        rows = rows.with_columns(**arms).with_columns(columns)
        manifest = storefront_log.manifest
        return write_log(tmp_path / "log", manifest, [complete(rows, manifest)], storefront_log.items())

    return build


def test_the_arms_are_compared_as_the_loop_compares_them(shop):
    log = shop([])
    result, counted = live_ab(log, experiment="release-2", **PLAN)
    assert result is not None and result.label == "live" and result.looked_early
    rows = log.scan().collect()
    gained = rows.with_columns(
        reward=pl.col("clicked").list.sum() + 3.0 * pl.col("purchased").list.sum(),
    )
    by_hand = (
        gained.group_by("session_id")
        .agg(pl.col("arm").first(), pl.col("reward").sum())
        .group_by("arm")
        .agg(pl.col("reward").mean())
    )
    means = dict(by_hand.iter_rows())
    assert result.treatment_mean == pytest.approx(means["challenger"])
    assert result.control_mean == pytest.approx(means["champion"])
    assert result.treatment_sessions + result.control_sessions == rows["session_id"].n_unique()
    assert {guardrail.metric for guardrail in result.guardrails} == set(Metric)
    assert (counted.n_cut, counted.n_unknown) == (0, 0)


def test_sessions_of_other_releases_and_those_cut_in_two_do_not_count(shop):
    session = pl.col("session_id").rank("dense")
    other = pl.when(session <= 50).then(pl.lit("release-1"))
    cut = other.when((session <= 60) & (pl.col("step") == 0)).then(pl.lit("release-1"))
    log = shop([cut.otherwise(pl.lit("release-2")).alias("experiment")])
    result, counted = live_ab(log, experiment="release-2", **PLAN)
    rows = log.scan().collect()
    releases = rows.group_by("session_id").agg(pl.col("experiment").unique())
    pure = releases.filter(pl.col("experiment") == ["release-2"])
    assert sum(counted.by_arm.values()) == pure.height
    # Of the ten that begin in release 1, those of one request lie in it as a whole.
    assert counted.n_cut == releases.filter(pl.col("experiment").list.len() == 2).height > 0
    assert result is not None and result.treatment_sessions + result.control_sessions == pure.height


def test_a_baseline_is_counted_and_not_compared(shop):
    log = shop([pl.when(pl.col("user_id") < "user-00050").then(pl.lit("baseline")).otherwise("arm").alias("arm")])
    result, counted = live_ab(log, experiment="release-2", **PLAN)
    assert result is not None and set(counted.by_arm) == {"baseline", "challenger", "champion"}
    assert (
        result.treatment_sessions + result.control_sessions == sum(counted.by_arm.values()) - counted.by_arm["baseline"]
    )


def test_with_an_empty_arm_there_is_no_result(shop):
    log = shop([pl.lit("champion").alias("arm")])
    result, counted = live_ab(log, experiment="release-2", **PLAN)
    assert result is None and set(counted.by_arm) == {"champion"}
    assert live_ab(log, experiment="release-7", **PLAN)[0] is None


def ab_of(rng: np.random.Generator, harm: float, n_days: int, per_day: int = 400) -> list[AbResult]:
    """An A/B as it stands at the end of each day; the treatment's purchases are rarer by a share."""
    n = n_days * per_day
    treated = rng.random(n) < 0.5
    purchases = rng.random(n) < np.where(treated, 0.3 * (1 - harm), 0.3)
    clicks = rng.poisson(2.0, n).astype(float)
    length = 1.0 + rng.poisson(3.0, n)
    metrics = {
        Metric.SESSION_LENGTH: length,
        Metric.CLICKS: clicks,
        Metric.PURCHASES: purchases.astype(float),
        Metric.FIRST_REQUEST_EXITS: (length == 1).astype(float),
    }
    day = np.arange(n) // per_day
    return [
        analyze_ab(
            np.arange(seen),
            (clicks + 3.0 * purchases)[:seen],
            treated[:seen],
            label="live",
            treatment="new",
            control="old",
            planned_share=0.5,
            metrics={metric: values[:seen] for metric, values in metrics.items()},
            day=day[:seen],
            planned_sessions=n,
            looked_early=True,
        )
        for seen in range(per_day, n + 1, per_day)
    ]


def test_the_guard_rarely_stops_a_challenger_that_harms_nothing_however_often_it_looks():
    rng = np.random.default_rng(5)
    stopped = sum(any(proven_harm(look, GateConfig()) for look in ab_of(rng, 0.0, 10)) for _ in range(100))
    # 3 % at most, by the union bound; 100 of them exceed 7 with a probability of about 1 %.
    assert stopped <= 7


def test_the_guard_stops_a_challenger_that_sells_much_less_and_says_why():
    rng = np.random.default_rng(6)
    looks = ab_of(rng, 0.5, 10)
    found = [proven_harm(look, GateConfig()) for look in looks]
    assert any("purchases of a session" in sentence for sentence in found[-1])
    assert any("a session earns" in sentence for sentence in found[-1])


def test_before_there_are_bounds_nothing_is_proven():
    (young,) = ab_of(np.random.default_rng(7), 0.9, 1, per_day=100)
    assert young.sequence is None and proven_harm(young, GateConfig()) == ()
