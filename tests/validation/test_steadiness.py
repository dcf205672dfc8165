from collections.abc import Callable
from typing import Any

import polars as pl
import pytest

from components.interactions.contract import Manifest
from components.interactions.log_folder import Log
from components.validation.steadiness import quarter_ends, quarter_sums, steadiness

Row = dict[str, Any]


def measured(log: Log) -> dict[str, float]:
    """Steadiness by the sums of both parts, as validation merges them."""
    ends = quarter_ends(log)
    sums = [part.select(quarter_sums(log.manifest, ends)) for part in log.parts()]
    return steadiness(pl.concat(sums).sum().row(0, named=True), log.manifest, ends)


@pytest.fixture
def rows(rows: list[Row]) -> list[Row]:
    """The sound rows in time order, 45 to a quarter, with every position clicked and watched for ten seconds."""
    return [row | {"clicked": [True] * 3, "signals.watch_time": [10.0] * 3, "purchased": None} for row in rows]


def test_what_stays_the_same_is_wholly_steady(rows: list[Row], save: Callable[..., Log]) -> None:
    found = measured(save(rows))

    assert found.pop("steadiness.context.hour") < 1
    assert found == {
        "steadiness.clicked": 1.0,
        "steadiness.signals.watch_time": 1.0,
        "steadiness.request_signals.seconds": 1.0,
        "steadiness.known.request_signals.seconds": 1.0,
        "steadiness.known.context.hour": 1.0,
        "steadiness.known.context.device": 1.0,
    }


def test_the_smallest_mean_of_a_quarter_is_held_against_the_largest(rows: list[Row], save: Callable[..., Log]) -> None:
    for row in rows[135:]:
        row |= {"signals.watch_time": [10_000.0] * 3, "clicked": [False] * 3}
    for row in rows[40:95]:
        row["context"] = {"hour": None, "device": "phone"}

    found = measured(save(rows))

    assert found["steadiness.signals.watch_time"] == pytest.approx(0.001)
    assert found["steadiness.clicked"] == 0.0
    assert found["steadiness.known.context.hour"] == 0.0
    assert found["steadiness.known.context.device"] == 1.0


def test_unknown_feedback_is_not_none(rows: list[Row], save: Callable[..., Log]) -> None:
    for row in rows[90:]:
        row["clicked"] = [True, None, None]
    for row in rows[:45]:
        row["clicked"] = None

    assert measured(save(rows))["steadiness.clicked"] == 1.0


def test_rare_feedback_is_compared_only_where_a_quarter_should_hold_enough_of_it(
    rows: list[Row], save: Callable[..., Log]
) -> None:
    def bought(n: int) -> list[Row]:
        return [row | {"purchased": [index < n, False, False]} for index, row in enumerate(rows)]

    # All of them early: 25 a quarter are too few to tell that from chance, 32 are enough.
    assert "steadiness.purchased" not in measured(save(bought(100)))
    assert measured(save(bought(130)))["steadiness.purchased"] == 0.0


def test_without_times_nothing_is_compared(rows: list[Row], manifest: Manifest, save: Callable[..., Log]) -> None:
    rows = [row | {"timestamp": None, "available_at": None} for row in rows]

    assert measured(save(rows, manifest.model_copy(update={"has_times": False}))) == {}
