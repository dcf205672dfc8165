import pytest
import torch

from components.evaluation.world_model_trust import (
    GeneratedAgainstReal,
    TrustConfig,
    calibration,
    compare_sessions,
    judge_trust,
)
from components.interactions.batching import SessionReader
from components.interactions.log_folder import Log
from components.interactions.vocabulary import Vocabulary

SAME = GeneratedAgainstReal(quantity="requests of a session", real=4.0, generated=4.0, gap=0.0, standard_error=0.01)


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
        with_reward=False,
        discriminator_accuracy=0.5,
        config=TrustConfig(),
    )

    assert not trust.passed
    failed = [reason for reason in trust.reasons if reason.startswith("Failed: ")]
    assert len(failed) == 1 and "leaving" in failed[0]


def test_a_world_model_that_is_no_better_than_a_constant_is_not_trusted() -> None:
    for nats, passed in ((0.39, True), (0.4, False), (0.41, False)):
        trust = judge_trust(
            click_nats=nats,
            baseline=("popularity", 0.4),
            calibrations=(),
            sessions=(SAME,),
            with_reward=False,
            discriminator_accuracy=None,
            config=TrustConfig(),
        )
        assert trust.passed is passed


@pytest.mark.parametrize(("gap", "error", "passed"), [(0.1, 0.001, True), (0.1, 0.05, False), (0.2, 0.001, False)])
def test_a_gap_must_lie_within_the_limit_and_be_known_to(gap: float, error: float, passed: bool) -> None:
    compared = GeneratedAgainstReal(
        quantity="requests of a session", real=1.0, generated=1.0 + gap, gap=gap, standard_error=error
    )
    trust = judge_trust(
        click_nats=0.3,
        baseline=("popularity", 0.4),
        calibrations=(),
        sessions=(compared,),
        with_reward=False,
        discriminator_accuracy=None,
        config=TrustConfig(),
    )
    assert trust.passed is passed


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
        with_reward=False,
        discriminator_accuracy=None,
        config=TrustConfig(),
    )

    assert not trust.passed
    assert "Failed: Generated sessions cannot be compared in requests of a session" in trust.reasons[-1]
