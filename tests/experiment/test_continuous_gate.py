from pathlib import Path

import pytest
import torch
from action_log import DEVIATION, hand_log

from components.environments.virtual_taobao_log import gaussian_around
from components.evaluation.action_evidence import StudiedLog, study
from components.experiment.continuous_gate import ContinuousVerdict, judge_continuous
from components.experiment.gate import Decision, GateConfig, Outcome
from components.policies.deterministic_policy import DeterministicPolicy


@pytest.fixture(scope="module")
def studied(tmp_path_factory: pytest.TempPathFactory) -> StudiedLog:
    return study(hand_log(tmp_path_factory.mktemp("hand") / "log", 6_000, seed=1))


def around(*middle: float, deviation: float = DEVIATION) -> DeterministicPolicy:
    return gaussian_around(torch.tensor(middle), deviation)


def judged(studied: StudiedLog, policy: DeterministicPolicy, *, data_passed: bool | None = True) -> ContinuousVerdict:
    return judge_continuous(studied, policy, "challenger", GateConfig(), data_passed=data_passed, data_text="Seen.")


def against(decision: Decision) -> set[str]:
    return {reason.check for reason in decision.reasons if reason.allows is Outcome.HOLD}


def test_a_better_policy_that_the_log_can_judge_may_be_a_canary(studied: StudiedLog) -> None:
    verdict = judged(studied, around(0.08, 0.0))

    assert verdict.decision.outcome is Outcome.CANARY
    assert against(verdict.decision) == set()


def test_a_worse_policy_holds_for_its_gain(studied: StudiedLog) -> None:
    assert against(judged(studied, around(-0.08, 0.0)).decision) == {"gain"}


def test_a_policy_that_lies_elsewhere_holds_with_that_reason_and_what_is_left_of_it_is_judged(
    studied: StudiedLog,
) -> None:
    verdict = judged(studied, around(0.4, 0.0, deviation=0.02))

    assert verdict.decision.outcome is Outcome.HOLD
    assert {"support", "sample size of the challenger"} <= against(verdict.decision)
    support = next(reason for reason in verdict.decision.reasons if reason.check == "support")
    assert support.text.startswith("The challenger acts outside of what the log shows: 100.0% of its actions")
    assert verdict.pulled_back_evidence.policy == "challenger, pulled back"
    assert verdict.pulled_back_decision.outcome is Outcome.CANARY


def test_a_narrow_policy_holds_for_its_sample_size_alone(studied: StudiedLog) -> None:
    against_it = against(judged(studied, around(0.0, 0.0, deviation=0.001)).decision)

    assert "sample size of the challenger" in against_it
    assert "support" not in against_it


@pytest.mark.parametrize("data_passed", [False, None])
def test_a_log_that_was_not_found_sound_holds(data_passed: bool | None, studied: StudiedLog) -> None:
    assert "data" in against(judged(studied, around(0.08, 0.0), data_passed=data_passed).decision)


@pytest.mark.parametrize("error", [0.5, -0.5])
def test_densities_that_do_not_fit_the_actions_hold(error: float, tmp_path: Path) -> None:
    studied = study(hand_log(tmp_path / "log", 2_000, seed=3, density_error=error))

    reasons = judged(studied, around(0.08, 0.0)).decision.reasons
    consistency = next(reason for reason in reasons if reason.check == "consistency of the logging probabilities")
    assert consistency.allows is Outcome.HOLD
    assert "cannot be those of" in consistency.text


def test_verdicts_are_the_same_each_time_and_stand_in_json(studied: StudiedLog) -> None:
    first, second = (judged(studied, around(0.08, 0.0)).model_dump_json() for _ in range(2))

    assert first == second
    assert ContinuousVerdict.model_validate_json(first).model_dump_json() == first
