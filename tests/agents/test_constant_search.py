from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from jaxtyping import Float
from pydantic import ValidationError
from torch import Tensor
from toy_environments import LinearQuadratic, TwoArms, on_each_device

from components.agents.cma_es import CmaEsConfig, train_cma_es
from components.agents.constant_cem import ConstantCemConfig, train_constant_cem
from components.agents.constant_search import constant_policy, mean_rewards
from components.agents.watch import Watch, unwatched
from components.environments.continuous import ContinuousEnvironment, Outcome
from components.interactions.tensor_record import TensorRecord
from components.policies.continuous_policy import ContinuousPolicy
from components.policies.deterministic_policy import DeterministicPolicy

Train = Callable[[ContinuousEnvironment[TensorRecord], int, int, Watch], DeterministicPolicy]


def cem(
    environment: ContinuousEnvironment[TensorRecord], steps: int, seed: int, watch: Watch = unwatched
) -> DeterministicPolicy:
    config = ConstantCemConfig(steps=steps, population=32, elite=6, deviation=0.3, deviation_floor=0.01)
    return train_constant_cem(environment, config, seed, watch)


def cma_es(
    environment: ContinuousEnvironment[TensorRecord], steps: int, seed: int, watch: Watch = unwatched
) -> DeterministicPolicy:
    return train_cma_es(environment, CmaEsConfig(steps=steps, population=16, deviation=0.3), seed, watch)


both = pytest.mark.parametrize("train", [cem, cma_es])


@dataclass(frozen=True)
class Visit(TensorRecord):
    left: Float[Tensor, " B"]


class Hill:
    """Reward −|a − optimum|², in sessions of one to three steps."""

    observation_size, action_size = 1, 3
    observation_scale = torch.ones(1)
    optimum = torch.tensor([0.5, -0.25, 1.0])

    def reset(self, n_users: int, generator: torch.Generator) -> Visit:
        return Visit(torch.randint(1, 4, (n_users,), generator=generator).float())

    def observe(self, state: Visit) -> Float[Tensor, "B 1"]:
        return state.left[:, None]

    def step(self, state: Visit, actions: Float[Tensor, "B 3"], generator: torch.Generator) -> tuple[Outcome, Visit]:
        left = state.left - 1
        return Outcome(-(actions.clamp(-1, 1) - self.optimum).square().sum(1), left <= 0), Visit(left)


def only_action(policy: ContinuousPolicy, observation_size: int) -> Tensor:
    actions = policy.mode(torch.randn(5, observation_size, generator=torch.Generator().manual_seed(0)))
    assert (actions == actions[0]).all()
    return actions[0].detach()


@both
def test_the_better_arm_is_found(train: Train) -> None:
    policy = train(TwoArms(), 10_000, 0, unwatched)

    assert only_action(policy, 1) > 0


@both
def test_a_known_optimum_is_found_on_the_edge_too(train: Train) -> None:
    policy = train(Hill(), 40_000, 0, unwatched)

    assert only_action(policy, 1) == pytest.approx(Hill.optimum, abs=0.05)


@on_each_device
@both
def test_of_a_cost_around_the_middle_the_best_constant_is_to_do_nothing(train: Train, device: str) -> None:
    # From x ~ U(−1, 1)² a constant push only adds to |x|².
    policy = train(LinearQuadratic(device), 150_000, 0, unwatched).cpu()

    assert only_action(policy, 2) == pytest.approx(torch.zeros(2), abs=0.06)


@both
def test_the_same_seed_gives_the_same_action_and_another_seed_another(train: Train) -> None:
    before = torch.get_rng_state()
    one, again, other = (only_action(train(Hill(), 3_000, seed, unwatched), 1) for seed in (1, 1, 2))

    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before)


@both
def test_whoever_watches_sees_the_steps_grow_up_to_the_budget(train: Train) -> None:
    seen: list[int] = []
    train(Hill(), 3_000, 0, lambda policy, steps: seen.append(steps))

    assert seen == sorted(set(seen))
    assert seen[-2] < 3_000 <= seen[-1]


def test_vectors_are_judged_by_the_mean_of_all_their_steps() -> None:
    vectors = torch.stack([Hill.optimum, torch.zeros(3), torch.tensor([0.5, -0.25, 7.0])])
    sessions = Visit(torch.tensor([1.0, 3.0, 2.0, 1.0]))

    judged = mean_rewards(Hill(), sessions, vectors, torch.tensor([0, 1, 1, 2]), torch.Generator())

    # An action outside of the box is the nearest within.
    assert judged.values.tolist() == pytest.approx([0.0, -1.3125, 0.0])
    assert judged.steps == 7


def test_a_constant_policy_acts_around_its_action() -> None:
    action = torch.tensor([0.25, -1.0])
    policy = constant_policy(action)

    choice = policy.act(torch.zeros(4_000, 3), torch.Generator().manual_seed(0))

    assert only_action(policy, 3) == pytest.approx(action)
    assert choice.actions.abs().max() <= 1
    assert choice.actions[:, 0].mean() == pytest.approx(0.25, abs=0.01)
    assert choice.log_probs == pytest.approx(policy.log_prob(torch.zeros(4_000, 3), choice.actions).detach(), abs=1e-4)


def test_means_that_would_be_judged_on_more_users_than_there_are_are_refused() -> None:
    with pytest.raises(ValidationError, match="mean_sessions = 9: expected at most users = 8"):
        CmaEsConfig(users=8, mean_sessions=9)


def test_an_elite_larger_than_its_population_is_refused() -> None:
    with pytest.raises(ValidationError, match="elite = 9: expected at most population = 8"):
        ConstantCemConfig(elite=9, population=8)
