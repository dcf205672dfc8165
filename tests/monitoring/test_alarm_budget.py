from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from scipy import stats

from monitoring.alarm_budget import WEEK, look_level, moved
from monitoring.drift_tests import Difference

RELEASED = datetime(2026, 11, 2, 8, tzinfo=UTC)
HOUR = timedelta(hours=1)


def levels(times: list[datetime]) -> list[float]:
    return [look_level(0.05, RELEASED, previous, now) for previous, now in zip([None, *times], times, strict=False)]


def test_the_looks_of_a_week_spend_its_budget_and_no_more() -> None:
    hourly = [RELEASED + HOUR * number for number in range(1, 168)]
    assert levels(hourly) == pytest.approx([0.05 / 168] * 167)
    rng = np.random.default_rng(0)
    drawn = sorted(RELEASED + timedelta(seconds=float(second)) for second in rng.random(400) * 3 * 7 * 86_400)
    spent = np.array(levels(drawn))
    weeks = np.array([(time - RELEASED) // WEEK for time in drawn])
    for week in range(3):
        assert 0.045 < spent[weeks == week].sum() <= 0.05 + 1e-12


def test_silence_is_not_saved_for_the_next_week() -> None:
    assert look_level(0.05, RELEASED, None, RELEASED + 3 * WEEK + HOUR) == pytest.approx(0.05 / 168)
    assert look_level(0.05, RELEASED, RELEASED + HOUR, RELEASED + HOUR) == 0.0


def test_looking_again_and_again_does_not_inflate_the_error() -> None:
    """400 stable weeks, twelve tests at each of 168 looks, neighbouring looks alike as overlapping windows are."""
    rng = np.random.default_rng(1)
    budgeted = naive = 0
    for _ in range(400):
        noise = rng.normal(size=(12, 168 + 23))
        windows = np.lib.stride_tricks.sliding_window_view(noise, 24, axis=1).sum(2) / np.sqrt(24)
        p_values = 2 * stats.norm.sf(np.abs(windows))
        lowest = p_values.min()
        worst = int(np.argmin(p_values.min(0)))
        level = look_level(0.05, RELEASED, RELEASED + HOUR * 2, RELEASED + HOUR * 3)
        budgeted += any(moved([Difference(1.0, p) for p in p_values[:, worst]], level, 0.0))
        naive += lowest <= 0.05
    assert budgeted <= 0.05 * 400 + 3 * np.sqrt(400 * 0.05 * 0.95)
    assert naive > 360


def test_holm_names_what_its_rank_allows() -> None:
    found = [Difference(1.0, p) for p in (0.2, 0.01, 0.04, 0.001)]
    assert moved(found, 0.05, 0.0) == [False, True, False, True]
    assert moved(found, 0.03, 0.0) == [False, True, False, True]
    assert moved(found, 0.004, 0.0) == [False, False, False, True]
    assert moved([], 0.05, 0.0) == []


def test_a_move_too_small_to_matter_is_not_named() -> None:
    found = [Difference(0.001, 1e-9), Difference(0.5, 1e-6), Difference(0.5, 0.9)]
    assert moved(found, 0.05, 0.01) == [False, True, False]
