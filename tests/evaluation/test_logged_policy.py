"""What a log's requests tell of a policy: requests whose feedback is unknown tell nothing."""

from pathlib import Path

import polars as pl
import pytest

from components.errors import InputError
from components.evaluation.logged_policy import known_rewards, logged_requests, ratio_of
from components.evaluation.ncis import one_request_ncis
from components.interactions.batching import SessionReader
from components.interactions.contract import RatioAssumption
from components.interactions.log_folder import Log, write_log
from components.interactions.vocabulary import Vocabulary
from components.policies.slate_policy import UniformPolicy


@pytest.fixture
def partly_unknown(storefront_log: Log, tmp_path: Path) -> Log:
    """The shop's log without the feedback of every third session's first request."""
    forgotten = (pl.col("step") == 0) & (pl.col("session_id").rank("dense") % 3 == 0)
    rows = storefront_log.scan().collect().sort("session_id", "step")
    rows = rows.with_columns(pl.when(~forgotten).then(pl.col(name)).alias(name) for name in ("clicked", "purchased"))
    return write_log(tmp_path / "log", storefront_log.manifest, [rows], storefront_log.items())


def test_requests_with_unknown_feedback_are_left_out(storefront_log: Log, partly_unknown: Log) -> None:
    vocabulary, policy = Vocabulary.fit(storefront_log), UniformPolicy(4)
    whole = logged_requests(SessionReader(storefront_log, vocabulary), policy)
    judged = logged_requests(SessionReader(partly_unknown, vocabulary), policy)
    n_unknown = partly_unknown.scan().select(pl.col("clicked").is_null().sum()).collect().item()

    assert bool(whole.in_whole_session.all())
    assert len(judged.requests.rewards) == storefront_log.manifest.n_requests - n_unknown
    assert known_rewards(SessionReader(partly_unknown, vocabulary)) == judged.rewards
    # Each unknown request is the first of its session, which then is not whole.
    assert len(set(whole.whole_sessions.session)) - len(set(judged.whole_sessions.session)) == n_unknown


def test_an_estimate_from_known_feedback_is_that_of_the_same_requests_in_the_whole_log(
    storefront_log: Log, partly_unknown: Log
) -> None:
    vocabulary, policy = Vocabulary.fit(storefront_log), UniformPolicy(4)
    whole = logged_requests(SessionReader(storefront_log, vocabulary), policy).requests
    judged = logged_requests(SessionReader(partly_unknown, vocabulary), policy).requests
    known = set(zip(judged.session, judged.step, strict=True))
    same = pl.Series([at in known for at in zip(whole.session, whole.step, strict=True)]).to_numpy()

    values = [
        one_request_ncis(log, policy="uniform", ratio=RatioAssumption.FULL_SLATE, cap=1e3).value
        for log in (judged, whole.take(same))
    ]

    assert values[0] == pytest.approx(values[1], rel=1e-12)


@pytest.mark.parametrize(
    ("changes", "forgotten", "ratio"),
    [
        ({}, pl.lit(False), RatioAssumption.CASCADE),
        ({"ratio_assumption": RatioAssumption.FULL_SLATE}, pl.lit(False), RatioAssumption.FULL_SLATE),
        ({"responses": "choice"}, pl.lit(False), RatioAssumption.FULL_SLATE),
        ({}, pl.int_range(pl.len()) == 5, RatioAssumption.FULL_SLATE),
        ({"contract_version": 1}, pl.lit(False), RatioAssumption.FULL_SLATE),
    ],
)
def test_the_cascade_is_read_where_the_log_declares_it_and_knows_every_position(
    changes: dict[str, object], forgotten: pl.Expr, ratio: RatioAssumption, storefront_log: Log, tmp_path: Path
) -> None:
    manifest = storefront_log.manifest.model_copy(update=changes)
    rows = storefront_log.scan().collect()
    rows = rows.with_columns(position_log_probs=pl.when(~forgotten).then("position_log_probs"))
    log = write_log(tmp_path / "log", manifest, [rows], storefront_log.items())
    reader = SessionReader(log, Vocabulary.fit(log))

    assert ratio_of(reader) is ratio
    # One log of two that lacks it is enough.
    assert ratio_of(SessionReader(storefront_log, reader.vocabulary), reader) is ratio
    assert logged_requests(reader, UniformPolicy(4), ratio_of(reader)).requests.rewards.shape == (rows.height,)


def test_a_log_without_log_probs_of_positions_has_no_cascade(storefront_log: Log, tmp_path: Path) -> None:
    old = storefront_log.manifest.model_copy(update={"contract_version": 1})
    log = write_log(tmp_path / "log", old, list(storefront_log.parts()), storefront_log.items())
    with pytest.raises(InputError, match="needs the log_prob of each position"):
        logged_requests(SessionReader(log, Vocabulary.fit(log)), UniformPolicy(4), RatioAssumption.CASCADE)
