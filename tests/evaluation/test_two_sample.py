import numpy as np
import pytest
import torch
from scipy import stats

from components.evaluation.two_sample import TwoSampleTest, _area, session_features, tell_apart, two_sample_test
from components.interactions.batching import SessionReader
from components.interactions.log_folder import Log
from components.interactions.vocabulary import Vocabulary

N = 4_000


def told_apart(
    real: np.ndarray, generated: np.ndarray, users: np.ndarray | None = None, seed: int = 0
) -> TwoSampleTest:
    users = np.arange(len(real)) if users is None else users
    names = [f"feature {number}" for number in range(real.shape[1])]
    test = tell_apart(real, generated, users, names, np.random.default_rng(seed))
    assert test is not None
    return test


def test_the_area_is_that_of_two_normals_a_known_distance_apart() -> None:
    generator = np.random.default_rng(1)
    real, generated = generator.normal(size=(2, N, 3))
    generated[:, 1] += 0.5

    test = told_apart(real, generated)

    # P(one normal exceeds another whose mean is d lower) = Φ(d / √2).
    assert test.lower < stats.norm.cdf(0.5 / np.sqrt(2)) < test.upper
    assert test.upper - test.lower < 0.06
    assert test.strongest == "feature 1"
    assert test.p_value == 0.001


def test_sessions_of_the_same_distribution_are_not_told_apart_more_often_than_chance() -> None:
    generator = np.random.default_rng(2)
    tests = [told_apart(*generator.normal(size=(2, 300, 4)), seed=seed) for seed in range(60)]

    assert np.mean([test.p_value <= 0.1 for test in tests]) == pytest.approx(0.1, abs=0.09)
    assert np.mean([test.lower <= 0.5 <= test.upper for test in tests]) >= 0.88


def test_the_area_counts_pairs_and_ties_by_half() -> None:
    scores = np.array([1.0, 2.0, 3.0, 2.0, 4.0, 0.0])
    real, generated = scores[:3], scores[3:]
    expected = np.mean([(made > true) + 0.5 * (made == true) for made in generated for true in real])

    area, _, _ = _area(scores, np.arange(3), np.random.default_rng(0))

    assert area == pytest.approx(expected)


def test_a_user_who_comes_ten_times_and_is_always_alike_tells_no_more_than_once() -> None:
    generator = np.random.default_rng(3)
    real, generated = generator.normal(size=(2, 600, 1))
    generated += 0.3
    once = told_apart(real, generated)
    often = told_apart(
        np.repeat(real, 10, axis=0), np.repeat(generated, 10, axis=0), np.repeat(np.arange(600), 10), seed=0
    )

    assert often.n_pairs == 10 * once.n_pairs
    assert often.upper - often.lower == pytest.approx(once.upper - once.lower, rel=0.05)
    assert often.auc == pytest.approx(once.auc, abs=1e-3)


def test_too_few_users_are_no_test() -> None:
    few = np.zeros((3, 1))
    assert tell_apart(few, few, np.arange(3), ["length"], np.random.default_rng(0)) is None


def test_what_never_varies_is_no_test() -> None:
    alike = np.ones((50, 2))
    assert tell_apart(alike, alike, np.arange(50), ["length", "clicks"], np.random.default_rng(0)) is None


def test_no_classifier_tells_more_apart_than_sessions_differ() -> None:
    """One click in fifty against one in five: with 0.98 and 0.8 without any, at most 1 − 0.98 · 0.8 / 2."""
    real, generated = np.zeros((2, 1_000, 1))
    real[::50], generated[::5] = 1.0, 1.0
    test = told_apart(real, generated)
    assert test.largest == pytest.approx(1 - 0.98 * 0.8 / 2, abs=0.02)
    assert test.auc == pytest.approx(0.5 + (0.2 - 0.02) / 2, abs=0.02)
    varied = np.random.default_rng(0).normal(size=(2, 400, 1))
    assert told_apart(*varied).largest == pytest.approx(1.0, abs=1e-4)


def test_where_no_end_is_known_what_was_answered_is_compared(storefront_log: Log) -> None:
    (sessions,) = SessionReader(storefront_log, Vocabulary.fit(storefront_log)).batches(400)
    endless = type(sessions)(**sessions.columns() | {"left": torch.zeros_like(sessions.left)})
    assert two_sample_test(endless, sessions, np.random.default_rng(0)) is None
    test = two_sample_test(endless, sessions, np.random.default_rng(0), ends_known=False)
    assert test is not None
    assert test.auc == 0.5


def test_a_log_is_not_told_apart_from_itself_and_its_features_need_no_model(storefront_log: Log) -> None:
    (sessions,) = SessionReader(storefront_log, Vocabulary.fit(storefront_log)).batches(400)

    test = two_sample_test(sessions, sessions, np.random.default_rng(0))

    assert test is not None
    assert (test.auc, test.p_value) == (0.5, 1.0)
    features = session_features(sessions)
    clicks, lengths = sessions.clicks.sum((1, 2)), sessions.lengths
    assert features["clicks a request"].tolist() == pytest.approx((clicks / lengths).tolist())
    assert features["length"].exp().tolist() == pytest.approx(lengths.tolist(), rel=1e-5)
    assert features["clicks of request 1"].tolist() == sessions.clicks[:, 0].sum(1).tolist()


def test_a_session_whose_end_or_response_is_unknown_is_not_compared(storefront_log: Log) -> None:
    (sessions,) = SessionReader(storefront_log, Vocabulary.fit(storefront_log)).batches(400)
    ended = sessions.select(sessions.left.any(1))
    all_of_them = two_sample_test(ended, ended, np.random.default_rng(0))
    assert all_of_them is not None
    for column in ("left", "observed"):
        columns = ended.columns() | {column: getattr(ended, column).clone()}
        columns[column][: len(ended.users) // 2] = False
        half = two_sample_test(type(ended)(**columns), ended, np.random.default_rng(0))
        assert half is not None
        assert half.n_pairs < 0.7 * all_of_them.n_pairs
