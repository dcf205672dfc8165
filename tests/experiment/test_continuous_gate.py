from pathlib import Path

import pytest
import torch
from action_log import DEVIATION, hand_log

from components.environments.virtual_taobao_log import gaussian_around
from components.evaluation.action_evidence import study
from components.evaluation.action_trust import judge_action_model
from components.evaluation.world_model_trust import TrustConfig
from components.experiment.continuous_gate import ContinuousVerdict, Judge, judge_continuous
from components.experiment.gate import Decision, GateConfig, Outcome
from components.policies.deterministic_policy import DeterministicPolicy
from components.world_model.action_model import ActionModelConfig, fit_action_model


def judge_of(folder: Path, n: int, *, density_error: float = 0.0) -> Judge:
    """A log of 1 − |a − (0.4, 0)|², and the world model that another one taught."""
    train, validation = (hand_log(folder / str(seed), n, seed=seed) for seed in (11, 12))
    test = hand_log(folder / "test", n, seed=1, density_error=density_error)
    config = ActionModelConfig(hidden=(32,), max_epochs=20, batch=128, learning_rate=5e-3)
    model = fit_action_model(train, validation, config, 0, lambda message, share: None).model
    trust = judge_action_model(model, test, TrustConfig())
    return Judge(study(test), model, trust, GateConfig(), TrustConfig())


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Judge:
    return judge_of(tmp_path_factory.mktemp("hand"), 6_000)


def around(*middle: float, deviation: float = DEVIATION) -> DeterministicPolicy:
    return gaussian_around(torch.tensor(middle), deviation)


def judged(judge: Judge, policy: DeterministicPolicy, *, data_passed: bool | None = True) -> ContinuousVerdict:
    return judge_continuous(judge, policy, "challenger", data_passed=data_passed, data_text="Seen.")


def against(decision: Decision) -> set[str]:
    return {reason.check for reason in decision.reasons if reason.allows is Outcome.HOLD}


def test_a_better_policy_that_the_log_can_judge_may_be_a_canary(judge: Judge) -> None:
    verdict = judged(judge, around(0.08, 0.0))

    assert against(verdict.decision) == set()
    assert verdict.decision.outcome is Outcome.CANARY


def test_a_worse_policy_holds_for_its_gain(judge: Judge) -> None:
    assert against(judged(judge, around(-0.08, 0.0)).decision) == {"gain"}


def test_a_policy_that_lies_elsewhere_holds_as_an_exploit_and_what_is_left_of_it_is_judged(judge: Judge) -> None:
    verdict = judged(judge, around(0.4, 0.0, deviation=0.02))

    assert verdict.decision.outcome is Outcome.HOLD
    assert {"exploit", "sample size of the challenger"} <= against(verdict.decision)
    exploit = next(reason for reason in verdict.decision.reasons if reason.check == "exploit")
    assert "The log cannot check what it earns in the world model" in exploit.text
    assert "of its actions lie farther out than 99 of 100 logged ones; at most 10% may be." in exploit.text
    assert verdict.pulled_back_evidence.policy == "challenger, pulled back"
    assert verdict.pulled_back_decision.outcome is Outcome.CANARY


def test_a_narrow_policy_holds_though_all_its_actions_are_among_the_logged_ones(judge: Judge) -> None:
    verdict = judged(judge, around(0.0, 0.0, deviation=0.001))

    assert "sample size of the challenger" in against(verdict.decision)
    assert verdict.evidence.support.outside_share == 0


@pytest.mark.parametrize("data_passed", [False, None])
def test_a_log_that_was_not_found_sound_holds(data_passed: bool | None, judge: Judge) -> None:
    assert "data" in against(judged(judge, around(0.08, 0.0), data_passed=data_passed).decision)


@pytest.mark.parametrize("error", [0.5, -0.5])
def test_densities_that_do_not_fit_the_actions_hold(error: float, tmp_path: Path) -> None:
    reasons = judged(judge_of(tmp_path, 2_000, density_error=error), around(0.08, 0.0)).decision.reasons

    consistency = next(reason for reason in reasons if reason.check == "consistency of the logging probabilities")
    assert consistency.allows is Outcome.HOLD
    assert "cannot be those" in consistency.text


def test_verdicts_are_the_same_each_time_and_stand_in_json(judge: Judge) -> None:
    first, second = (judged(judge, around(0.08, 0.0)).model_dump_json() for _ in range(2))

    assert first == second
    assert ContinuousVerdict.model_validate_json(first).model_dump_json() == first
