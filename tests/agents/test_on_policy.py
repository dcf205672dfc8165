"""Agents that learn from their own steps: each solves two toys, and the same seed learns the same bytes."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from toy_environments import ArmState, LinearQuadratic, TwoArms, on_each_device

from components.agents.a2c import A2cConfig, train_a2c
from components.agents.continuous_reinforce import ContinuousReinforceConfig, train_continuous_reinforce, whole_sessions
from components.agents.on_policy import actor_and_critic, collect, entropy
from components.agents.ppo import PUBLISHED, PpoConfig, train_ppo
from components.agents.two_stream_ppo import TwoStreamPpoConfig, train_two_stream_ppo
from components.environments.continuous import RunningSessions, run_sessions
from components.errors import InputError
from components.policies import tanh_gaussian

#: Mean reward of a session under the best gain; without any action it is −6.7.
BEST_COST = -0.231


class TwoArmsTwoNumbers(TwoArms):
    """TwoArms with a second number to see, so that each stream has one."""

    observation_size = 2
    observation_scale = torch.ones(2)

    def observe(self, state: ArmState) -> torch.Tensor:
        return state.bias.expand(-1, 2)


ARMS = {"steps": 20_000, "gamma": 0.0, "hidden": (16,), "seeking": 0.0, "log_deviation": -0.5}
QUADRATIC = {"gamma": 0.95, "hidden": (32, 32), "seeking": 0.0, "log_deviation": -1.0}
PPO = {
    "sessions": 64, "session_steps": 10, "minibatch": 320, "epochs": 4, "learning_rate": 2e-3, "critic_rate": 2e-3
}  # fmt: skip
AGENTS = [
    pytest.param(train_ppo, PpoConfig, PPO, 40_000, id="ppo"),
    pytest.param(
        train_two_stream_ppo, TwoStreamPpoConfig, {**PPO, "static_size": 1, "static_every": 2}, 40_000, id="two-stream"
    ),
    pytest.param(train_a2c, A2cConfig, {"sessions": 64, "session_steps": 5}, 100_000, id="a2c"),
    pytest.param(train_continuous_reinforce, ContinuousReinforceConfig, {"sessions": 32}, 80_000, id="reinforce"),
]


@pytest.mark.parametrize(("train", "config", "settings", "steps"), AGENTS)
def test_an_agent_learns_to_pull_the_better_of_two_arms_within_20_000_steps(train, config, settings, steps):
    arms = TwoArmsTwoNumbers()
    policy = train(arms, config(**{**settings, **ARMS}), 0)
    generator = torch.Generator().manual_seed(1)
    assert (policy.mode(torch.ones(1, 2)) > 0).all()
    drawn = run_sessions(arms, lambda seen: policy.act(seen, generator).actions, 2000, generator).mean_reward
    assert drawn > 0.77


@on_each_device
@pytest.mark.parametrize(("train", "config", "settings", "steps"), AGENTS)
def test_an_agent_steers_nearly_as_well_as_the_best_gain(train, config, settings, steps, device):
    policy = train(LinearQuadratic(device), config(**{**settings, **QUADRATIC, "steps": steps}), 0).cpu()
    plant, generator = LinearQuadratic(), torch.Generator().manual_seed(1)
    learned = float(run_sessions(plant, policy.mode, 2000, generator).rewards.mean())
    assert learned > BEST_COST - 0.06


@on_each_device
@pytest.mark.parametrize(("train", "config", "settings", "steps"), AGENTS)
def test_the_same_seed_learns_the_same_bytes_and_another_others(train, config, settings, steps, device):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    settings = config(**{**settings, **QUADRATIC, "steps": 2_000, "entropy": 0.01})
    first, again, other = (train(LinearQuadratic(device), settings, seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["log_deviation"], other["log_deviation"])
    assert torch.equal(torch.get_rng_state(), before), "global chance is left alone"


@pytest.mark.parametrize(("train", "config", "settings", "steps"), AGENTS)
def test_whoever_watches_sees_steps_grow_and_the_policy_change(train, config, settings, steps):
    seen = []
    policy = train(
        LinearQuadratic(),
        config(**{**settings, "steps": 2_000}),
        0,
        lambda policy, steps: seen.append((steps, policy.log_deviation.detach().clone())),
    )
    counts = [steps for steps, _ in seen]
    assert counts == sorted(set(counts))
    assert counts[-2] < 2_000 <= counts[-1]
    assert not torch.equal(seen[0][1], seen[-1][1])
    assert torch.equal(seen[-1][1], policy.log_deviation)


def test_the_published_settings_take_2048_steps_an_iteration_and_no_addition_of_ours():
    assert (PUBLISHED.sessions * PUBLISHED.session_steps, PUBLISHED.seeking) == (2048, 0.0)
    small = PUBLISHED.model_copy(update={"steps": 128, "session_steps": 4})
    assert train_ppo(LinearQuadratic(), small, 0).mode(torch.zeros(1, 2)).shape == (1, 2)


def test_a_target_divergence_ends_the_passes_over_an_iteration():
    settings = PpoConfig(steps=640, sessions=64, session_steps=10, minibatch=64, hidden=(8,), learning_rate=0.05)
    moved = [
        train_ppo(LinearQuadratic(), settings.model_copy(update=update), 0).state_dict()
        for update in ({"epochs": 1}, {"epochs": 5, "target_divergence": 1e-6}, {"epochs": 5})
    ]
    assert torch.equal(moved[0]["log_deviation"], moved[1]["log_deviation"])
    assert not torch.equal(moved[0]["log_deviation"], moved[2]["log_deviation"])


def test_the_static_streams_stay_as_they_are_between_their_updates():
    settings = TwoStreamPpoConfig(
        steps=7 * 64, sessions=64, session_steps=1, minibatch=64, epochs=1, hidden=(8,), static_size=1, static_every=3
    )
    seen = []

    def watch(policy, steps):
        network = policy.network.network
        seen.append(tuple(stream[0][0].weight.detach().clone() for stream in (network.static, network.dynamic)))

    policy = train_two_stream_ppo(LinearQuadratic(), settings, 0, watch)
    changes = [[not torch.equal(a, b) for a, b in zip(*pair, strict=True)] for pair in pairwise(seen)]
    # One update an iteration: the third and the sixth are the static stream's.
    assert [static for static, _ in changes] == [False, True, False, False, True, False]
    assert all(dynamic for _, dynamic in changes)
    assert all(parameter.requires_grad for parameter in policy.parameters())


def test_streams_without_a_dynamic_number_are_refused_with_what_fits():
    with pytest.raises(InputError, match=r"static_size = 2: expected 1 to 1.*2 numbers"):
        train_two_stream_ppo(LinearQuadratic(), TwoStreamPpoConfig(static_size=2), 0)


def test_what_is_collected_has_the_density_of_its_actions_and_values_as_targets():
    plant, generator = LinearQuadratic(), torch.Generator().manual_seed(0)
    policy, critic = actor_and_critic(plant, (8,), -1.0, 0)
    seen = collect(RunningSessions(plant, 3, generator), policy, critic, 12, 0.9, 0.95, generator)
    assert seen.observations.shape == (36, 2)
    assert torch.allclose(policy.log_prob(seen.observations, seen.latents.tanh()), seen.log_probs, atol=1e-4)
    assert torch.allclose(seen.returns - seen.advantages, critic(seen.observations)[:, 0], atol=1e-5)


def test_returns_of_whole_sessions_are_those_of_each_session_alone():
    class TwoLengths(LinearQuadratic):
        """Users stay where they are: three steps right of the middle, else two; a step earns 1, then 10, then 100."""

        def step(self, state, actions, generator):
            outcome, after = super().step(state, actions, generator)
            length = torch.where(state.position[:, 0] > 0, 3, 2)
            return replace(outcome, rewards=10.0**state.step, ended=after.step >= length), replace(
                after, position=state.position
            )

    plant = TwoLengths()
    policy, _ = actor_and_critic(plant, (8,), -1.0, 0)
    observations, latents, returns = whole_sessions(plant, policy, 8, 0.5, torch.Generator().manual_seed(1))
    long = observations[:, 0] > 0
    assert len(returns) == len(latents) == 2 * 8 + int(long[:8].sum())
    assert sorted(set(returns[long].tolist())) == [31.0, 60.0, 100.0]
    assert sorted(set(returns[~long].tolist())) == [6.0, 10.0]


def test_the_entropy_is_that_of_the_squashed_actions():
    mean, log_deviation = torch.tensor([[0.3, -0.2]]).expand(200_000, 2), torch.tensor([-1.0, 0.5])
    drawn = entropy(mean, log_deviation.expand(200_000, 2), torch.Generator().manual_seed(0))
    # ∫ −π log π on a grid of u, where log π(a) du = log N(u) − log(1 − a²).
    grid = torch.linspace(-20, 20, 400_001, dtype=torch.float64)[:, None]
    closed = 0.0
    for i in range(2):
        density = torch.distributions.Normal(float(mean[0, i]), float(log_deviation[i].exp())).log_prob(grid)[:, 0]
        log_pi = tanh_gaussian.log_density(
            grid, mean[:1, i : i + 1].double().expand_as(grid), log_deviation[i].double().expand_as(grid)
        )
        closed -= float((density.exp() * log_pi).sum() * 1e-4)
    assert float(drawn) == pytest.approx(closed, abs=0.01)
