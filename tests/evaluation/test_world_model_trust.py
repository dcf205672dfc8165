import pytest
import torch

from components.evaluation.trust_score import trust_score
from components.evaluation.two_sample import TwoSampleTest
from components.evaluation.world_model_trust import (
    GeneratedAgainstReal,
    TrustConfig,
    WorldModelTrust,
    calibration,
    compare_sessions,
    judge_trust,
)
from components.interactions.batching import SessionReader
from components.interactions.log_folder import Log
from components.interactions.vocabulary import Vocabulary

SAME = GeneratedAgainstReal(quantity="requests of a session", real=4.0, generated=4.0, gap=0.0, standard_error=0.01)

ALIKE = TwoSampleTest(auc=0.51, lower=0.49, upper=0.53, p_value=0.2, n_pairs=900, n_users=700, strongest="length")


def passed(trust: WorldModelTrust) -> bool:
    return trust_score(trust.parts).passed


def test_calibration_error_is_that_done_by_hand() -> None:
    predicted = torch.tensor([0.9, 0.1, 0.7, 0.3])
    happened = torch.tensor([1.0, 0.0, 0.0, 0.0])

    judged = calibration("clicks", predicted, happened, n_bins=2)

    # Low bin: predicted 0.2, observed 0. High bin: predicted 0.8, observed 0.5. Error (0.2 + 0.3) / 2.
    assert judged.predicted == pytest.approx((0.2, 0.8))
    assert judged.observed == pytest.approx((0.0, 0.5))
    assert judged.error == pytest.approx(0.25)
    assert judged.n == 4


def test_predictions_at_the_true_rate_are_calibrated() -> None:
    generator = torch.Generator().manual_seed(0)
    predicted = torch.rand(20_000, generator=generator)
    happened = (torch.rand(20_000, generator=generator) < predicted).float()

    assert calibration("leaving", predicted, happened).error < 0.015
    assert calibration("leaving", predicted / 2, happened).error == pytest.approx(0.25, abs=0.015)


def test_trust_names_every_check_that_fails() -> None:
    good = calibration("clicks", torch.tensor([0.5, 0.5]), torch.tensor([1.0, 0.0]), n_bins=1)
    bad = calibration("leaving", torch.tensor([0.9, 0.9]), torch.tensor([0.0, 0.0]), n_bins=1)

    trust = judge_trust(
        click_nats=0.3,
        baseline=("click rate of each position", 0.4),
        calibrations=(good, bad),
        sessions=(SAME,),
        two_sample=ALIKE,
        with_reward=False,
        discriminator_accuracy=0.5,
        config=TrustConfig(),
    )

    assert [part.name for part in trust.parts if not part.passed] == ["calibration of leaving"]


def test_a_world_model_that_is_no_better_than_a_constant_is_not_trusted() -> None:
    for nats, gains in ((0.39, True), (0.4, False), (0.41, False)):
        trust = judge_trust(
            click_nats=nats,
            baseline=("popularity", 0.4),
            calibrations=(),
            sessions=(SAME,),
            two_sample=ALIKE,
            with_reward=False,
            discriminator_accuracy=None,
            config=TrustConfig(),
        )
        assert passed(trust) is gains


@pytest.mark.parametrize(("gap", "error", "within"), [(0.1, 0.001, True), (0.1, 0.05, False), (0.2, 0.001, False)])
def test_a_gap_must_lie_within_the_limit_and_be_known_to(gap: float, error: float, within: bool) -> None:
    compared = GeneratedAgainstReal(
        quantity="requests of a session", real=1.0, generated=1.0 + gap, gap=gap, standard_error=error
    )
    trust = judge_trust(
        click_nats=0.3,
        baseline=("popularity", 0.4),
        calibrations=(),
        sessions=(compared,),
        two_sample=ALIKE,
        with_reward=False,
        discriminator_accuracy=None,
        config=TrustConfig(),
    )
    assert passed(trust) is within


def test_a_single_session_is_nothing_to_compare_with_and_no_reason_to_trust(storefront_log: Log) -> None:
    sessions = next(SessionReader(storefront_log, Vocabulary.fit(storefront_log)).batches(400))
    one = sessions.select(torch.nonzero(sessions.left.any(1))[:1, 0])
    assert compare_sessions([one], sessions, with_reward=True) == ()
    assert [part.gap for part in compare_sessions([sessions], sessions, with_reward=True)] == [0.0, 0.0]

    trust = judge_trust(
        click_nats=0.3,
        baseline=("popularity", 0.4),
        calibrations=(),
        sessions=(),
        two_sample=ALIKE,
        with_reward=False,
        discriminator_accuracy=None,
        config=TrustConfig(),
    )

    assert {part.name: part.passed for part in trust.parts}["requests of a session"] is False


@pytest.mark.parametrize(
    ("test", "looks_real"),
    [
        (ALIKE, True),
        (ALIKE.model_copy(update={"p_value": 0.001}), True),
        (ALIKE.model_copy(update={"auc": 0.59, "lower": 0.57, "upper": 0.61}), False),
        (ALIKE.model_copy(update={"auc": 0.52, "lower": 0.4, "upper": 0.64}), False),
        (None, False),
    ],
)
def test_generated_sessions_must_be_known_to_look_real_whatever_the_p_value(
    test: TwoSampleTest | None, looks_real: bool
) -> None:
    trust = judge_trust(
        click_nats=0.3,
        baseline=("popularity", 0.4),
        calibrations=(),
        sessions=(SAME,),
        two_sample=test,
        with_reward=False,
        discriminator_accuracy=None,
        config=TrustConfig(),
    )
    assert passed(trust) is looks_real


@pytest.mark.parametrize(
    ("largest", "upper", "told"), [(0.55, 0.53, None), (0.6, 0.53, None), (0.61, 0.53, True), (0.55, 0.65, False)]
)
def test_a_test_that_no_classifier_could_make_fail_does_not_pass(
    largest: float, upper: float, told: bool | None
) -> None:
    trust = judge_trust(
        click_nats=0.3,
        baseline=("popularity", 0.4),
        calibrations=(),
        sessions=(SAME,),
        two_sample=ALIKE.model_copy(update={"largest": largest, "upper": upper}),
        with_reward=False,
        discriminator_accuracy=None,
        config=TrustConfig(),
    )
    assert {part.name: part.passed for part in trust.parts}["two-sample test"] is told


HEARD = GeneratedAgainstReal(quantity="reward of a request", real=0.4, generated=0.4, gap=0.0, standard_error=0.01)


@pytest.mark.parametrize(
    ("heard", "test", "trusted"),
    [
        (HEARD, ALIKE, True),
        (HEARD.model_copy(update={"gap": 0.1, "standard_error": 0.03}), ALIKE, False),
        (HEARD.model_copy(update={"gap": -0.2}), ALIKE, False),
        (None, ALIKE, False),
        (HEARD, None, False),
    ],
)
def test_where_no_end_is_known_requests_are_judged_and_sessions_count_neither_way(
    heard: GeneratedAgainstReal | None, test: TwoSampleTest | None, trusted: bool
) -> None:
    trust = judge_trust(
        click_nats=0.3,
        baseline=("click rate of each position", 0.4),
        calibrations=(),
        sessions=(),
        two_sample=test,
        with_reward=True,
        discriminator_accuracy=None,
        config=TrustConfig(),
        requests={"reward of a request": heard},
    )
    assert passed(trust) is trusted
    unknown = [part for part in trust.parts if part.passed is None]
    assert [part.name for part in unknown] == ["requests of a session", "reward of a session"]
    assert "never tells whether a user went on" in unknown[0].text
    assert trust.sessions == (() if heard is None else (heard,))
