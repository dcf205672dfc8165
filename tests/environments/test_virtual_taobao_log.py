"""The log of a simulator whose weights a user gives."""

import math
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from virtual_taobao_weights import published_weights

from components.environments import virtual_taobao_log
from components.environments.constant_actions import middling_constant
from components.environments.continuous import run_sessions
from components.environments.virtual_taobao import VirtualTaobao
from components.environments.virtual_taobao_log import (
    Config,
    logging_policy,
    roll_out_pages,
    write_virtual_taobao_log,
)
from components.errors import InputError
from components.interactions.continuous_batches import read_actions
from components.interactions.log_folder import Log, open_log
from components.policies.continuous_policy import ContinuousPolicy
from components.validation.checks import ValidationConfig, validate

MIDDLE = tuple(0.1 * (-1) ** number for number in range(27))


@pytest.fixture(scope="module")
def environment() -> VirtualTaobao:
    return VirtualTaobao(published_weights())


def true_rate(environment: VirtualTaobao, policy: ContinuousPolicy, n_users: int = 1_500) -> float:
    generator = torch.Generator().manual_seed(11)
    totals = run_sessions(
        environment,
        lambda observations: policy.act(observations.double(), generator).actions.float(),
        n_users,
        generator,
    )
    return totals.mean_reward / 10


@pytest.mark.parametrize("config", [Config(policy="uniform"), Config(action=MIDDLE, deviation=0.3)])
def test_what_is_read_is_what_was_rolled_out_with_the_policys_own_density(
    config: Config, environment: VirtualTaobao, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(virtual_taobao_log, "PART_SESSIONS", 150)
    config = config.model_copy(update={"n_sessions": 400})
    policy = logging_policy(config, environment)
    log = write_virtual_taobao_log(config, published_weights(), tmp_path / "log", "shop")

    parts = list(read_actions(open_log(log.path)))

    generator = torch.Generator().manual_seed(config.log_seed)
    assert len(parts) == 3
    for part, n_sessions in zip(parts, (150, 150, 100), strict=True):
        pages = roll_out_pages(environment, policy, n_sessions, generator)
        assert torch.equal(part.observations, pages.observations)
        assert torch.equal(part.actions, pages.actions)
        assert torch.equal(part.log_probs, pages.log_probs)
        assert torch.equal(part.log_probs, policy.log_prob(part.observations.double(), part.actions.double()).double())
        assert torch.equal(part.rewards.float(), pages.clicks)
        assert torch.equal(part.steps, pages.steps)
        assert torch.equal(part.ended, pages.ended)
        assert len(part.sessions.unique()) == n_sessions


def test_densities_are_those_of_closed_forms(environment: VirtualTaobao) -> None:
    generator = torch.Generator().manual_seed(3)
    uniform = roll_out_pages(environment, logging_policy(Config(policy="uniform"), environment), 20, generator)
    gaussian = roll_out_pages(environment, logging_policy(Config(action=MIDDLE), environment), 20, generator)

    normal = torch.distributions.Normal(torch.tensor(MIDDLE, dtype=torch.float64), 0.2)
    kept = normal.cdf(torch.ones(27, dtype=torch.float64)) - normal.cdf(-torch.ones(27, dtype=torch.float64))
    expected = (normal.log_prob(gaussian.actions.double()) - kept.log()).sum(1)
    torch.testing.assert_close(uniform.log_probs, torch.full_like(uniform.log_probs, -27 * math.log(2)))
    # The middle goes through tanh and back.
    torch.testing.assert_close(gaussian.log_probs, expected, rtol=1e-6, atol=1e-6)


def test_the_same_configuration_gives_the_same_log_and_validation_accepts_it(tmp_path: Path) -> None:
    config = Config(action=MIDDLE, n_sessions=300)
    first, second = (
        write_virtual_taobao_log(config, published_weights(), tmp_path / name, "shop") for name in ("a", "b")
    )
    (tmp_path / "checks").mkdir()

    checks = validate(first, ValidationConfig(), tmp_path / "checks")

    assert first.manifest == second.manifest
    assert checks.passed
    assert checks.n_quarantined == 0
    assert [result.metric for result in checks.expectations if not result.success] == []
    assert checks.profile["mean_reward"] == checks.profile["mean.request_signals.clicks"] > 0
    assert "(0.100, -0.100, " in first.manifest.limits[0]


def test_densities_below_those_of_a_random_draw_are_refused(tmp_path: Path) -> None:
    config = Config(action=MIDDLE, n_sessions=300)
    log = write_virtual_taobao_log(config, published_weights(), tmp_path / "log", "shop")
    for path, part in zip(log.part_paths, log.parts(), strict=True):
        part.with_columns(-part["action_log_prob"].abs() - 40.0).write_parquet(path)
    (tmp_path / "checks").mkdir()

    with pytest.raises(InputError, match="log_density_over_uniform"):
        validate(Log(log.path, log.manifest), ValidationConfig(), tmp_path / "checks")


def test_the_middling_action_has_its_level(environment: VirtualTaobao) -> None:
    policy = logging_policy(Config(level=0.4), environment)

    assert true_rate(environment, policy) == pytest.approx(0.4, abs=0.05)


def test_the_middling_action_is_the_same_on_every_machine(environment: VirtualTaobao) -> None:
    found = middling_constant(environment, deviation=0.2, level=0.4, seed=0)

    # On two machines, by torch 2.11 and 2.13.
    assert found.tolist() == [
        *(-0.001, -0.007, 0.135, 0.202, -0.269, 0.137, -0.047, -0.289, -0.258),
        *(0.109, 0.245, -0.01, -0.266, 0.048, 0.191, 0.061, 0.068, -0.378),
        *(-0.106, 0.084, 0.064, -0.008, 0.23, 0.175, 0.111, -0.046, -0.114),
    ]


def test_a_climb_on_a_plateau_waits_where_it_is(environment: VirtualTaobao, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def flat(self: VirtualTaobao, state: object, actions: torch.Tensor) -> torch.Tensor:
        seen.append(actions.detach().abs().amax().item())
        return 1.0 + 0.0 * actions.sum(1)

    monkeypatch.setattr(VirtualTaobao, "expected_clicks", flat)
    with pytest.raises(InputError, match=r"the climb ended at 0\.100"):
        middling_constant(environment, deviation=0.01, level=0.4, seed=0)

    # Draws of a deviation of 0.01 around the middle of the box, all the way.
    assert max(seen) < 0.1


def test_a_level_out_of_reach_is_refused(environment: VirtualTaobao, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("components.environments.constant_actions.MOST_STEPS", 2)

    with pytest.raises(InputError, match=r"level: 0.9 is not reached"):
        logging_policy(Config(level=0.9), environment)


@pytest.mark.parametrize("action", [(0.0,) * 26, (0.0,) * 26 + (1.0,), "low"])
def test_actions_outside_of_the_box_are_refused(action: object) -> None:
    with pytest.raises(ValidationError):
        Config.model_validate({"action": action})


@pytest.mark.slow
def test_two_hundred_thousand_pages_stream_in_parts_with_exact_densities(
    environment: VirtualTaobao, tmp_path: Path
) -> None:
    config = Config(action=MIDDLE, n_sessions=28_000)
    policy = logging_policy(config, environment)
    log = write_virtual_taobao_log(config, published_weights(), tmp_path / "log", "shop")

    lengths = []
    for part in read_actions(log):
        recomputed = policy.log_prob(part.observations.double(), part.actions.double())
        assert torch.equal(part.log_probs, recomputed)
        lengths.append(len(part.steps))

    assert log.manifest.n_requests == sum(lengths) >= 200_000
    assert len(lengths) == 7
    assert max(lengths) < 50_000
