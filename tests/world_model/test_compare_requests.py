"""Requests in place of sessions: what a user model expects of logged slates against what was heard."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from components.evaluation.world_model_trust import compare_requests, tells_of_ends
from components.interactions.batching import SessionReader
from components.interactions.log_folder import write_log
from components.world_model.user_model import UserModel

Changed = Callable[..., SessionReader]


@pytest.fixture
def changed(reader: SessionReader, tmp_path: Path) -> Changed:
    """The shop's log with other columns."""

    def change(rows: pl.DataFrame, **columns: pl.Expr) -> SessionReader:
        log = write_log(tmp_path / "log", reader.log.manifest, [rows.with_columns(**columns)], reader.log.items())
        return SessionReader(log, reader.vocabulary)

    return change


def test_gaps_are_those_of_means_and_vary_as_redrawn_users_do(reader: SessionReader, shop_model: UserModel) -> None:
    compared = compare_requests(shop_model, reader)
    assert list(compared) == ["reward of a request", *(f"clicks at position {place}" for place in (1, 2, 3, 4))]
    reward = compared["reward of a request"]
    assert reward is not None

    (batch,) = reader.batches(400)
    state, flat = shop_model.encoder.states(batch), batch.mask.flatten()
    clicks, purchases = shop_model.expected_responses(state, batch.slates.flatten(0, 1))
    weights = reader.log.manifest.reward.weights
    expected = (weights["clicked"] * clicks + weights["purchased"] * purchases).sum(1)[flat].double().detach().numpy()
    heard = batch.rewards.sum(2).flatten()[flat].double().numpy()
    assert (reward.real, reward.generated) == pytest.approx((heard.mean(), expected.mean()), rel=1e-5)
    assert reward.gap == pytest.approx(expected.mean() / heard.mean() - 1, rel=1e-5)

    codes = np.unique(batch.users[:, None].expand(batch.mask.shape).flatten()[flat].numpy(), return_inverse=True)[1]
    by_user = np.stack([np.bincount(codes, expected), np.bincount(codes, heard)])
    drawn = np.random.default_rng(0).integers(by_user.shape[1], size=(2_000, by_user.shape[1]))
    redrawn = by_user[:, drawn].sum(2)
    assert reward.standard_error == pytest.approx((redrawn[0] / redrawn[1]).std(), rel=0.1)


def test_what_nobody_clicked_or_one_user_saw_cannot_be_compared(
    reader: SessionReader, shop_model: UserModel, changed: Changed
) -> None:
    rows = reader.log.scan().collect()
    silent = pl.col("clicked").list.eval(pl.lit(False))
    assert set(compare_requests(shop_model, changed(rows, clicked=silent, purchased=silent)).values()) == {None}


def test_a_user_alone_has_no_standard_error(reader: SessionReader, shop_model: UserModel, changed: Changed) -> None:
    one = changed(reader.log.scan().collect(), user_id=pl.lit("the only one"))
    assert set(compare_requests(shop_model, one).values()) == {None}


def test_positions_that_no_slate_has_are_left_out(
    reader: SessionReader, shop_model: UserModel, changed: Changed
) -> None:
    shorter = {name: pl.col(name).list.head(2) for name in ("slate", "clicked", "purchased")}
    log = changed(reader.log.scan().collect(), **shorter)
    assert list(compare_requests(shop_model, log)) == [
        "reward of a request",
        "clicks at position 1",
        "clicks at position 2",
    ]


def test_a_log_tells_of_ends_where_any_request_does(reader: SessionReader, changed: Changed) -> None:
    assert tells_of_ends(reader)
    first = reader.log.scan().filter(pl.col("step") == 0).collect()
    assert not tells_of_ends(changed(first, session_end=pl.lit("censored")))
