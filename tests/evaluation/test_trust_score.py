import pytest

from components.evaluation.trust_score import limited, right_or_wrong, trust_score, unknown

GAIN = right_or_wrong("gain", True, "It gains.")


@pytest.mark.parametrize(
    ("seen", "limit", "score", "passed"),
    [
        (0.0, 0.2, 1.0, True),
        (0.05, 0.2, 0.75, True),
        (0.2, 0.2, 0.0, True),
        (0.3, 0.2, 0.0, False),
        (0.0, 0.0, 1.0, True),
    ],
)
def test_a_part_scores_the_share_of_its_limit_that_is_left(
    seen: float, limit: float, score: float, passed: bool
) -> None:
    part = limited("gap", seen, limit, "A gap.")
    assert part.score == pytest.approx(score)
    assert part.passed is passed


def test_the_score_is_that_of_the_weakest_part_and_not_a_mean() -> None:
    score = trust_score((GAIN, limited("gap", 0.15, 0.2, "A gap."), limited("error", 0.0, 1.0, "No error.")))
    assert (score.score, score.weakest, score.passed) == (pytest.approx(0.25), "gap", True)


def test_one_part_that_fails_is_a_model_that_is_not_trusted() -> None:
    score = trust_score((GAIN, limited("gap", 0.3, 0.2, "A gap.")))
    assert (score.score, score.weakest, score.passed) == (0.0, "gap", False)
    assert score.reasons == ("It gains.", "Failed: A gap.")


def test_what_the_log_cannot_tell_speaks_neither_for_nor_against() -> None:
    with_it, without = trust_score((GAIN, unknown("order", "Nobody knows."))), trust_score((GAIN,))
    assert (with_it.score, with_it.passed) == (without.score, without.passed) == (1.0, True)
    assert with_it.reasons == ("It gains.", "Nobody knows.")


def test_nothing_known_is_nothing_trusted() -> None:
    score = trust_score((unknown("order", "Nobody knows."),))
    assert (score.score, score.passed) == (0.0, False)
