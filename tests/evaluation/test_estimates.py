"""Estimates of a log that is judged part by part are those of the log as a whole."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from components.evaluation.cap_sensitivity import cap_sensitivity
from components.evaluation.direct_method import SampledSlates
from components.evaluation.doubly_robust import ModelRewards, doubly_robust
from components.evaluation.estimates import ESTIMATORS, PolicyEstimates, estimate
from components.evaluation.importance_sampling import (
    importance_sampling,
    per_decision_importance_sampling,
    session_importance_sampling,
)
from components.evaluation.literature_ncis import literature_ncis
from components.evaluation.logged_policy import JudgedRequests, judged_parts, known_rewards
from components.evaluation.ncis import fixed_cap_ncis, one_request_ncis
from components.evaluation.point_ncis import point_ncis
from components.evaluation.policy_value import About, PolicyValue
from components.evaluation.session_ncis import session_ncis
from components.interactions.batching import SessionReader, Sessions
from components.interactions.contract import RatioAssumption
from components.interactions.log_folder import Log, write_log
from components.interactions.vocabulary import Vocabulary
from components.policies.slate_policy import PopularityPolicy, SlatePolicy

WHOLE_SLATES = About(policy="popular", ratio=RatioAssumption.FULL_SLATE)
CASCADE = About(policy="popular", ratio=RatioAssumption.CASCADE)
either = pytest.mark.parametrize("about", [WHOLE_SLATES, CASCADE], ids=["whole slates", "cascade"])


def expectations(sessions: Sessions) -> SampledSlates:
    """Some numbers that depend on the request alone."""
    logged, ratios = [], []
    for batch in sessions.batches(1_024):
        logged.append(batch.slates[batch.mask].double() / 100)
        ratios.append(torch.stack([batch.log_probs[batch.mask] + 4.0, batch.log_probs[batch.mask] + 2.0], dim=1))
    positions = torch.cat(logged).numpy()
    known = positions.sum(1)
    return SampledSlates(ModelRewards(known, known + 0.1, positions), torch.cat(ratios).numpy())


@pytest.fixture
def frames(storefront_log: Log) -> list[pl.DataFrame]:
    """The shop's sessions in five parts, whose users are in several of them.

    All feedback of the second part is unknown, and the third holds the first request of each session unknown. No
    session of the fourth is known to have ended.
    """
    rows = storefront_log.scan().collect().sort("session_id", "step")
    part = pl.col("session_id").rank("dense") % 5
    unknown = (part == 1) | ((part == 2) & (pl.col("step") == 0))
    rows = rows.with_columns(pl.when(~unknown).then(pl.col(name)).alias(name) for name in ("clicked", "purchased"))
    rows = rows.with_columns(
        session_end=pl.when((part == 3) & pl.col("session_end").is_not_null())
        .then(pl.lit("censored"))
        .otherwise("session_end")
    )
    return [rows.filter(part == number) for number in range(5)]


def read(log: Log, frames: list[pl.DataFrame], out: Path) -> SessionReader:
    return SessionReader(write_log(out, log.manifest, frames, log.items()), Vocabulary.fit(log))


def judge(reader: SessionReader, policy: SlatePolicy, about: About) -> PolicyEstimates:
    parts = judged_parts(reader, policy, about["ratio"], expectations)
    return estimate(parts, known_rewards(reader), about, with_caps=True)


def assert_same(one: PolicyValue, other: PolicyValue) -> None:
    for field, expected in other.model_dump().items():
        if isinstance(expected, float):
            assert getattr(one, field) == pytest.approx(expected, rel=1e-12, abs=1e-12), (other.estimator, field)
        else:
            assert getattr(one, field) == expected, (other.estimator, field)


@either
def test_a_log_in_parts_has_the_estimates_of_the_same_log_in_one(
    about: About, storefront_log: Log, frames: list[pl.DataFrame], tmp_path: Path
) -> None:
    whole = read(storefront_log, [pl.concat(frames)], tmp_path / "whole")
    parts = read(storefront_log, frames, tmp_path / "parts")
    policy = PopularityPolicy(4, whole.vocabulary.counts())

    users = pl.concat(frame.select("user_id").unique() for frame in frames)
    assert users.is_duplicated().any()
    assert known_rewards(parts) == known_rewards(whole)
    one, other = judge(parts, policy, about), judge(whole, policy, about)

    assert len(one.values) == len(ESTIMATORS)
    for value, expected in zip(one.values, other.values, strict=True):
        assert 0 < expected.unknown_share < 1
        assert_same(value, expected)
    assert one.effective.of_positions == pytest.approx(other.effective.of_positions, rel=1e-12)
    assert one.cap_sensitivity is not None and other.cap_sensitivity is not None
    for point, same in zip(one.cap_sensitivity.points, other.cap_sensitivity.points, strict=True):
        assert point.model_dump() == pytest.approx(same.model_dump(), rel=1e-12, abs=1e-12)


@either
def test_they_are_what_each_estimator_says_by_itself(
    about: About, storefront_log: Log, frames: list[pl.DataFrame], tmp_path: Path
) -> None:
    reader = read(storefront_log, [pl.concat(frames)], tmp_path / "whole")
    policy = PopularityPolicy(4, reader.vocabulary.counts())
    (judged,) = judged_parts(reader, policy, about["ratio"], expectations)
    assert judged.slates is not None and judged.slates.log_ratios is not None
    requests, sessions = judged.requests, judged.whole_sessions
    expected = [
        one_request_ncis(requests, **about),
        doubly_robust(requests, judged.slates.model, **about),
        point_ncis(requests, judged.slates.log_ratios, **WHOLE_SLATES),
        importance_sampling(requests, **about),
        fixed_cap_ncis(requests, **about),
        session_ncis(sessions, **WHOLE_SLATES),
        per_decision_importance_sampling(sessions, **WHOLE_SLATES),
        session_importance_sampling(sessions, **WHOLE_SLATES),
        literature_ncis(sessions, **WHOLE_SLATES),
    ]

    made = judge(reader, policy, about)

    for value, by_itself in zip(made.values, expected, strict=True):
        share = 1 - by_itself.n_requests / storefront_log.manifest.n_requests
        assert_same(value, by_itself.model_copy(update={"unknown_share": share}))
    assert made.cap_sensitivity == cap_sensitivity(requests, **about)


def test_parts_without_a_known_reward_are_left_out(
    storefront_log: Log, frames: list[pl.DataFrame], tmp_path: Path
) -> None:
    reader = read(storefront_log, frames, tmp_path / "parts")
    sizes = [len(part.known) for part in judged_parts(reader, PopularityPolicy(4, reader.vocabulary.counts()))]
    assert sizes == [frame.height for number, frame in enumerate(frames) if number != 1]


@pytest.mark.parametrize(("whole", "ends_known"), [(False, True), (True, False)])
def test_without_whole_sessions_that_may_have_ended_there_are_no_estimates_of_sessions(
    whole: bool, ends_known: bool, random_log
) -> None:
    known = np.ones(len(random_log.rewards), dtype=bool)
    judged = JudgedRequests(random_log, known & whole, known, ends_known)
    made = estimate([judged], judged.rewards, WHOLE_SLATES)
    assert [value.estimator for value in made.values] == ["one-request NCIS", "IS", "NCIS with cap 10"]
    assert made.cap_sensitivity is None
