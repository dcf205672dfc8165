"""Estimates and support of policies on logs of actions whose truth is known by hand."""

import math
from pathlib import Path

import polars as pl
import pytest
import torch
from action_log import BEST, DEVIATION, hand_log, row, save
from jaxtyping import Float
from scipy import stats
from torch import Tensor
from virtual_taobao_weights import published_weights

from components.environments.virtual_taobao import VirtualTaobao
from components.environments.virtual_taobao_log import gaussian_around, roll_out_pages
from components.evaluation.action_evidence import (
    ActionEvidence,
    StudiedLog,
    action_evidence,
    choose_radius,
    effective_share,
    study,
)
from components.evaluation.action_support import action_cloud
from components.evaluation.logged_requests import LoggedRequests
from components.evaluation.ncis import one_request_ncis
from components.evaluation.policy_value import NotIdentified, PolicyValue
from components.interactions.contract import RatioAssumption
from components.interactions.log_folder import Log
from components.policies import truncated_gaussian
from components.policies.continuous_policy import ActionChoice, UniformActions
from components.policies.deterministic_policy import DeterministicPolicy
from components.policies.pulled_back import PulledBack, radius_for

N = 12_000


def around(*middle: float, deviation: float = DEVIATION) -> DeterministicPolicy:
    return gaussian_around(torch.tensor(middle), deviation)


def earned(*middle: float) -> float:
    """Expected reward of a Gaussian around a point, as wide as the logged one."""
    return 1.0 - (middle[0] - BEST[0]) ** 2 - (middle[1] - BEST[1]) ** 2 - 2 * DEVIATION**2


@pytest.fixture(scope="module")
def studied(tmp_path_factory: pytest.TempPathFactory) -> StudiedLog:
    return study(hand_log(tmp_path_factory.mktemp("hand") / "log", N, seed=1))


def value_of(evidence: ActionEvidence) -> PolicyValue:
    assert isinstance(evidence.value, PolicyValue)
    return evidence.value


def test_the_logging_policy_is_worth_the_mean_reward(studied: StudiedLog) -> None:
    evidence = action_evidence(studied, around(0.0, 0.0), "logging")

    value = value_of(evidence)
    assert value.value == pytest.approx(value.behavior_value, abs=1e-9)
    assert value.value == pytest.approx(earned(0.0, 0.0), abs=0.005)
    assert value.effective_sample_size == pytest.approx(N, rel=1e-6)
    assert evidence.support.outside_share == pytest.approx(0.01, abs=0.003)


@pytest.mark.parametrize("apart", [0.5, 1.0])
def test_a_nearby_policy_is_worth_what_it_is_by_both_estimates(apart: float, studied: StudiedLog) -> None:
    evidence = action_evidence(studied, around(apart * DEVIATION, 0.0), "near")

    truth, check = earned(apart * DEVIATION, 0.0), evidence.cross_check
    value = value_of(evidence)
    assert value.lower is not None
    assert value.upper is not None
    assert check is not None
    assert value.lower - 0.003 < truth < value.upper + 0.003
    assert check.value == pytest.approx(truth, abs=0.01)
    assert value.effective_sample_size / N == pytest.approx(math.exp(-(apart**2)), rel=0.15)
    assert value.mean_weight == pytest.approx(1.0, abs=0.05)


def test_a_far_policy_has_next_to_no_requests_and_is_outside(studied: StudiedLog) -> None:
    evidence = action_evidence(studied, around(0.9, 0.9, deviation=0.02), "far")

    assert value_of(evidence).effective_sample_size < 3
    assert evidence.support.outside_share == 1.0
    assert evidence.distance is not None
    assert evidence.distance.text.endswith("100.0% of its actions lie farther out than 99 of 100 logged ones")


def test_a_narrow_policy_is_inside_and_yet_has_few_requests(studied: StudiedLog) -> None:
    evidence = action_evidence(studied, around(0.0, 0.0, deviation=0.002), "narrow")

    assert evidence.support.outside_share == 0.0
    assert value_of(evidence).effective_sample_size < 0.01 * N


@pytest.mark.parametrize("apart", [0.0, 2.0, 4.0])
def test_the_outside_share_is_that_of_the_closed_form(apart: float, studied: StudiedLog) -> None:
    evidence = action_evidence(studied, around(0.0, apart * DEVIATION), "moved")

    # Squared distances of a Gaussian of two numbers are χ² with 2 degrees of freedom.
    radius = math.sqrt(-2 * math.log(0.01))
    expected = stats.ncx2.sf(radius**2, 2, apart**2) if apart else 0.01
    assert studied.cloud.radius == pytest.approx(radius, abs=0.1)
    assert evidence.support.outside_share == pytest.approx(expected, abs=0.03)


def test_what_never_varied_is_outside_wherever_else_it_lies(tmp_path: Path) -> None:
    log = hand_log(tmp_path / "log", 500, seed=2)
    for path, part in zip(log.part_paths, log.parts(), strict=True):
        flat = pl.Series([[first, 0.25] for first, _ in part["action"].to_list()], dtype=part.schema["action"])
        part.with_columns(action=flat).write_parquet(path)

    cloud = action_cloud(log)

    assert cloud.distances(torch.tensor([[0.0, 0.26]])).item() > 100 * cloud.radius
    assert cloud.distances(torch.tensor([[0.0, 0.25]])).item() < cloud.radius


def test_a_policy_is_pulled_back_along_the_straight_line_to_what_the_log_can_judge(studied: StudiedLog) -> None:
    observations = torch.zeros(3, 3)
    floor = N / 100
    pulled = studied.pulled_back(around(0.6, 0.6), floor)
    evidence = action_evidence(studied, pulled, "pulled back")

    middle = pulled.mode(observations)[0]
    assert studied.cloud.distances(middle[None]).item() == pytest.approx(pulled.radius, rel=1e-6)
    assert middle[0].item() == pytest.approx(middle[1].item(), abs=0.01)
    assert pulled.radius == pytest.approx(math.sqrt(math.log(100 / 1.5)))
    value = value_of(evidence)
    assert value.value == pytest.approx(earned(*middle.tolist()), abs=0.02)
    # Weights this far apart have rare giants that a log mostly lacks, so the effective size looks larger than it is.
    assert floor < value.effective_sample_size < 10 * floor


def test_what_lies_within_stays_as_it_is(studied: StudiedLog) -> None:
    pulled = studied.pulled_back(around(0.05, -0.05), N / 100)

    torch.testing.assert_close(
        pulled.mode(torch.zeros(1, 3)), torch.tensor([[0.05, -0.05]], dtype=torch.float64), rtol=1e-6, atol=1e-6
    )


def test_draws_of_a_pulled_back_policy_have_the_density_it_states(studied: StudiedLog) -> None:
    pulled = PulledBack(around(0.9, 0.9), studied.cloud, radius=2.0)
    observations = torch.zeros(40_000, 3)
    choice = pulled.act(observations, torch.Generator().manual_seed(0))

    torch.testing.assert_close(choice.log_probs, pulled.log_prob(observations, choice.actions))
    # ∫ u = 1 of any other density u, here the uniform one on a square within the box.
    inside = ((choice.actions - pulled.mode(observations[:1])).abs() < 0.1).all(1)
    assert float((inside / choice.log_probs.exp()).mean()) / 0.2**2 == pytest.approx(1.0, abs=0.03)


def test_a_log_that_is_too_short_leaves_no_other_policy() -> None:
    assert radius_for(700, floor=500.0) == 0.0
    assert radius_for(round(1.5 * 500 * math.e), floor=500.0) == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("required", [0.1, 0.5])
def test_a_release_goes_as_far_as_enough_requests_speak_of_it(required: float, studied: StudiedLog) -> None:
    far = around(0.6, 0.6)
    choice = choose_radius(far, studied.cloud, studied.log, required)

    assert choice.ess_share >= required
    # ESS / n = exp(-d²) of Gaussians as wide, of which a sample sees somewhat more.
    assert choice.radius == pytest.approx(math.sqrt(-math.log(required)), rel=0.25)
    assert choice.kept == pytest.approx(choice.radius / float(studied.cloud.distances(far.mode(torch.zeros(1, 3)))))
    further = PulledBack(far, studied.cloud, 1.3 * choice.radius + 0.2)
    assert effective_share(studied.log, studied.rewards.n_known, further) < choice.ess_share


def test_a_release_of_which_all_must_speak_is_the_gaussian_of_the_log(studied: StudiedLog) -> None:
    choice = choose_radius(around(0.6, 0.6), studied.cloud, studied.log, 1.0)

    assert (choice.radius, choice.kept) == (0.0, 0.0)
    assert choice.ess_share > 0.99


@pytest.mark.parametrize("n_users", [400, 4_000])
def test_densities_that_fit_are_not_refused_on_few_users(n_users: int, tmp_path: Path) -> None:
    check = study(hand_log(tmp_path / "log", n_users, seed=6)).densities

    assert check is not None
    assert check.worst.p_value > 0.01
    assert check.worst.observed == pytest.approx(1.0, abs=0.02)


def knowing_log(path: Path, seed: int, *, density_error: float = 0.0) -> Log:
    """Of a policy that sends phones and desks to opposite sides: truncated Gaussians whose middles lie 0.6 apart."""
    generator = torch.Generator().manual_seed(seed)
    n, deviation = 3_000, torch.full((2,), 0.1, dtype=torch.float64)
    desk = torch.rand(n, generator=generator) < 0.5
    middle = torch.where(desk[:, None], 0.3, -0.3).double().expand(-1, 2)
    actions = truncated_gaussian.draw(middle, deviation, generator).float()
    log_probs = truncated_gaussian.log_density(actions.double(), middle, deviation) + density_error
    rows = [
        row(number, 0, action=action, action_log_prob=log_prob, session_end="left", user_id=f"u{number}")
        | {"context": {"device": "desk" if at_desk else "phone", "hour": number % 24.0}}
        for number, (action, log_prob, at_desk) in enumerate(
            zip(actions.tolist(), log_probs.tolist(), desk.tolist(), strict=True)
        )
    ]
    return save(path, [rows])


@pytest.mark.parametrize("seed", range(3))
def test_densities_of_a_policy_that_looks_at_the_observation_are_not_refused(seed: int, tmp_path: Path) -> None:
    check = study(knowing_log(tmp_path / "log", seed)).densities

    assert check is not None
    assert check.worst.p_value > 0.01
    assert check.worst.observed == pytest.approx(1.0, abs=0.03)


def test_wrong_densities_of_such_a_policy_are_found(tmp_path: Path) -> None:
    check = study(knowing_log(tmp_path / "log", 0, density_error=0.3)).densities

    assert check is not None
    assert check.worst.p_value < 1e-6
    assert check.worst.observed == pytest.approx(math.exp(-0.3), abs=0.03)


def test_where_nobody_is_in_one_half_of_the_users_nothing_tests_the_densities(tmp_path: Path) -> None:
    log = save(tmp_path / "log", [[row(0, 0), row(0, 1)]])

    assert study(log).densities is None


def test_parts_and_unknown_rewards_make_no_difference_to_what_is_known(tmp_path: Path) -> None:
    policy = around(0.05, 0.0)
    one, three = (
        action_evidence(study(hand_log(tmp_path / str(parts), 3_000, 4, parts=parts, known_share=0.9)), policy, "near")
        for parts in (1, 3)
    )

    first, second = value_of(one), value_of(three)
    assert first.value == pytest.approx(second.value, rel=1e-9)
    assert first.lower == pytest.approx(second.lower, rel=1e-6)
    assert first.effective_sample_size == pytest.approx(second.effective_sample_size, rel=1e-9)
    assert first.unknown_share == pytest.approx(0.1, abs=0.03)
    assert first.n_requests + round(first.unknown_share * 3_000) == 3_000


def test_a_constant_reward_tells_no_value(tmp_path: Path) -> None:
    log = hand_log(tmp_path / "log", 500, seed=2)
    for path, part in zip(log.part_paths, log.parts(), strict=True):
        same = pl.Series([{"clicks": 1.0, "seconds": 0.0}] * part.height, dtype=part.schema["request_signals"])
        part.with_columns(request_signals=same).write_parquet(path)

    studied = study(log)
    evidence = action_evidence(studied, UniformActions(2), "uniform")

    assert isinstance(evidence.value, NotIdentified)
    assert evidence.distance is None
    assert evidence.support.outside_share > 0.8


class Deterministic:
    """Has no density anywhere but at its own actions."""

    def act(self, observations: Float[Tensor, "B S"], generator: torch.Generator) -> ActionChoice:
        return ActionChoice(self.mode(observations), torch.zeros(len(observations)))

    def log_prob(self, observations: Float[Tensor, "B S"], actions: Float[Tensor, "B A"]) -> Float[Tensor, " B"]:
        return torch.full((len(actions),), -torch.inf)

    def mode(self, observations: Float[Tensor, "B S"]) -> Float[Tensor, "B A"]:
        return torch.zeros(len(observations), 2)


def test_a_policy_without_density_has_weights_of_nothing(studied: StudiedLog) -> None:
    value = value_of(action_evidence(studied, Deterministic(), "deterministic"))

    assert value.mean_weight == 0.0
    assert value.max_weight == 0.0


def test_intervals_of_a_nearby_policy_hold_the_simulators_truth_as_often_as_they_say() -> None:
    environment = VirtualTaobao(published_weights())
    middle = torch.tensor([0.1 * (-1) ** number for number in range(27)])
    logging, near = gaussian_around(middle, 0.2), gaussian_around(0.85 * middle, 0.2)
    truth = roll_out_pages(environment, near, 10_000, torch.Generator().manual_seed(1)).clicks.double().mean().item()
    held, n_logs, n_sessions = 0, 60, 250
    pages = roll_out_pages(environment, logging, n_logs * n_sessions, torch.Generator().manual_seed(2))
    for number in range(n_logs):
        own = pages.select(pages.sessions // n_sessions == number)
        requests = LoggedRequests(
            rewards=own.clicks.double().numpy(),
            behavior_log_probs=own.log_probs.numpy(),
            target_log_probs=near.log_prob(own.observations.double(), own.actions.double()).numpy(),
            user=own.sessions.numpy(),
            session=own.sessions.numpy(),
            step=own.steps.numpy(),
        )
        value = one_request_ncis(requests, policy="near", ratio=RatioAssumption.FULL_SLATE)
        assert value.lower is not None
        assert value.upper is not None
        held += value.lower <= truth <= value.upper

    # Of 60 intervals of 95 %, 52 or fewer hold it once in a hundred times.
    assert held >= 52
