"""What the world model of a log of actions promises, against logs whose truth is known by hand."""

from pathlib import Path

import pytest
import torch
from action_log import BEST, DEVIATION, hand_log

from components.environments.virtual_taobao_log import gaussian_around
from components.errors import InputError
from components.evaluation.action_evidence import StudiedLog, action_evidence, study
from components.evaluation.action_trust import judge_action_model, probe_action_policy, promised
from components.evaluation.exploit_probes import judge_exploit
from components.evaluation.world_model_trust import TrustConfig
from components.policies.deterministic_policy import DeterministicPolicy
from components.world_model.action_model import ActionModel, ActionModelConfig, fit_action_model

N = 6_000


def around(*middle: float, deviation: float = DEVIATION) -> DeterministicPolicy:
    return gaussian_around(torch.tensor(middle), deviation)


@pytest.fixture(scope="module")
def studied(tmp_path_factory: pytest.TempPathFactory) -> StudiedLog:
    return study(hand_log(tmp_path_factory.mktemp("hand") / "log", N, seed=1))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ActionModel:
    folder = tmp_path_factory.mktemp("model")
    train, validation = (hand_log(folder / str(seed), N, seed=seed) for seed in (11, 12))
    config = ActionModelConfig(hidden=(32,), max_epochs=20, batch=128, learning_rate=5e-3)
    return fit_action_model(train, validation, config, 0, lambda message, share: None).model


def test_a_model_of_the_same_users_may_be_trusted(model: ActionModel, studied: StudiedLog) -> None:
    trust = judge_action_model(model, studied.log, TrustConfig())

    assert [part.name for part in trust.parts if part.passed is False] == []
    assert trust.click_nats < trust.baseline_nats
    (gap,) = trust.sessions
    assert abs(gap.gap) < 3 * gap.standard_error


def test_a_model_that_expects_too_much_may_not(model: ActionModel, studied: StudiedLog) -> None:
    worth = model.rewards.clone()
    try:
        model.rewards.mul_(1.3)
        trust = judge_action_model(model, studied.log, TrustConfig())
    finally:
        model.rewards.copy_(worth)

    assert "reward of a request" in {part.name for part in trust.parts if part.passed is False}
    assert trust.sessions[0].gap == pytest.approx(0.3, abs=0.02)


def test_a_nearby_policy_is_promised_what_it_is_worth(model: ActionModel, studied: StudiedLog) -> None:
    value = promised(model, studied, around(0.05, 0.0))

    truth = 1 - (0.05 - BEST[0]) ** 2 - 2 * DEVIATION**2
    assert value.value == pytest.approx(truth, abs=0.02)
    assert value.half_width is not None
    assert value.half_width < 0.01


def test_what_the_log_supports_is_no_exploit(model: ActionModel, studied: StudiedLog) -> None:
    policy = around(0.05, 0.0)
    probe = probe_action_policy(model, studied, policy, action_evidence(studied, policy, "near"), needed_ess=500.0)

    assert probe.weighed
    assert judge_exploit(probe, TrustConfig()).supported


def test_promises_beyond_the_logged_actions_are_an_exploit(model: ActionModel, studied: StudiedLog) -> None:
    policy = around(0.9, -0.9, deviation=0.05)
    probe = probe_action_policy(model, studied, policy, action_evidence(studied, policy, "far"), needed_ess=500.0)

    verdict = judge_exploit(probe, TrustConfig())

    assert not probe.weighed
    assert not verdict.supported
    assert "100.0% of its actions lie farther out than 99 of 100 logged ones" in verdict.text


def test_an_overrated_policy_that_the_log_can_check_is_an_exploit(model: ActionModel, studied: StudiedLog) -> None:
    worth, policy = model.rewards.clone(), around(0.05, 0.0)
    try:
        model.rewards.mul_(1.4)
        probe = probe_action_policy(model, studied, policy, action_evidence(studied, policy, "near"), needed_ess=500.0)
    finally:
        model.rewards.copy_(worth)

    assert probe.weighed
    assert "it lives off an error of the world model" in judge_exploit(probe, TrustConfig()).text


def test_a_log_without_rewards_cannot_judge_a_model(model: ActionModel, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no known reward"):
        judge_action_model(model, hand_log(tmp_path / "log", 50, seed=1, known_share=0.0), TrustConfig())
