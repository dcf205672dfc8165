import math

import polars as pl
import pytest

from components.evaluation.held_out_clicks import held_out_nats, nats_gained

SESSIONS = pl.DataFrame({"session_id": ["a", "b"], "loss": [6.0, 3.0], "n_clicks": [2.0, 1.0]})


def test_nats_are_a_mean_over_clicks_with_an_error_over_sessions() -> None:
    uneven = SESSIONS.with_columns(loss=pl.Series([2.0, 4.0]))

    judged = held_out_nats(uneven)

    # 6 nats for 3 clicks; the sessions lie 2 below and 2 above.
    assert judged.nats == pytest.approx(2.0)
    assert judged.standard_error == pytest.approx(math.sqrt(8) / 3)
    assert (judged.n_clicks, judged.n_sessions) == (3, 2)


def test_what_both_find_equally_hard_cancels() -> None:
    better = SESSIONS.with_columns(loss=pl.col("loss") - 0.5 * pl.col("n_clicks")).reverse()

    gained = nats_gained(better, SESSIONS)

    assert gained.nats == pytest.approx(0.5)
    assert gained.standard_error == pytest.approx(0.0)


def test_losses_of_other_clicks_are_refused() -> None:
    with pytest.raises(ValueError, match="2 and 1 sessions, 1 with the same clicks"):
        nats_gained(SESSIONS, SESSIONS.head(1))
