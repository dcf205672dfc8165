import warnings

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode
from virtual_taobao_weights import published_weights, write_random_weights

from components.environments.continuous import RunningSessions
from components.environments.gymnasium_adapter import GymnasiumEnvironment, GymnasiumVectorEnvironment
from components.environments.virtual_taobao import Repetition, VirtualTaobao
from components.errors import InputError


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> VirtualTaobao:
    return VirtualTaobao(write_random_weights(tmp_path_factory.mktemp("weights")))


@pytest.fixture
def single(environment: VirtualTaobao) -> GymnasiumEnvironment:
    return GymnasiumEnvironment(environment)


def actions(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (n, 27)).astype(np.float32)


@pytest.mark.parametrize("repetition", [None, Repetition()])
def test_gymnasiums_own_checker_has_no_complaint(environment: VirtualTaobao, repetition: Repetition | None) -> None:
    env = GymnasiumEnvironment(VirtualTaobao(published_weights(), repetition) if repetition else environment)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(env, skip_render_check=True)


def test_spaces_are_the_true_bounds_in_float32(single: GymnasiumEnvironment) -> None:
    seen, _ = single.reset(seed=0)
    steps = 0
    while steps < 300:
        assert seen.dtype == np.float32
        assert seen in single.observation_space
        seen, _, terminated, _, _ = single.step(single.action_space.sample())
        steps += 1
        if terminated:
            assert seen in single.observation_space
            seen, _ = single.reset()
    assert single.observation_space.high[[0, 87, 88, 89, 90]].tolist() == [1, 1, 10, 9, 100]
    assert (single.observation_space.low == 0).all()
    assert single.action_space == gymnasium.spaces.Box(-1, 1, (27,), np.float32)


def test_a_single_session_is_the_environments_own(environment: VirtualTaobao, single: GymnasiumEnvironment) -> None:
    seen, _ = single.reset(seed=7)
    # The adapter's chance follows Gymnasium's generator of that seed.
    generator = torch.Generator().manual_seed(int(gymnasium.utils.seeding.np_random(7)[0].integers(2**63)))
    state = environment.reset(1, generator)
    for number in range(100):
        np.testing.assert_array_equal(seen, environment.observe(state)[0])
        action = actions(1, number)
        outcome, state = environment.step(state, torch.from_numpy(action), generator)
        seen, reward, terminated, truncated, _ = single.step(action[0])
        assert (reward, terminated, truncated) == (float(outcome.rewards), bool(outcome.ended), False)
        if terminated:
            break
    assert terminated
    np.testing.assert_array_equal(seen, environment.observe(state)[0])


def test_a_seed_decides_all_that_follows(single: GymnasiumEnvironment) -> None:
    def sessions(seed: int) -> list[np.ndarray]:
        seen = [single.reset(seed=seed)[0]]
        for number in range(40):
            observation, _, terminated, _, _ = single.step(actions(1, number)[0])
            seen.append(observation)
            if terminated:
                seen.append(single.reset()[0])
        return seen

    before = torch.random.get_rng_state()
    np.testing.assert_array_equal(sessions(3), sessions(3))
    first, other = sessions(3)[0], sessions(4)[0]
    assert not np.array_equal(first, other)
    # Without a seed there are other users, not the same ones again.
    assert not np.array_equal(single.reset()[0], single.reset()[0])
    assert torch.equal(torch.random.get_rng_state(), before)


def test_steps_without_an_open_session_are_refused(environment: VirtualTaobao) -> None:
    single, vector = GymnasiumEnvironment(environment), GymnasiumVectorEnvironment(environment, 3)
    with pytest.raises(gymnasium.error.ResetNeeded, match="no session is open"):
        single.step(actions(1, 0)[0])
    with pytest.raises(gymnasium.error.ResetNeeded, match="no session is open"):
        vector.step(actions(3, 0))

    single.reset(seed=0)
    while not single.step(actions(1, 0)[0])[2]:
        pass
    with pytest.raises(gymnasium.error.ResetNeeded, match="after each that terminated"):
        single.step(actions(1, 0)[0])


def test_actions_of_another_shape_are_refused(environment: VirtualTaobao, single: GymnasiumEnvironment) -> None:
    single.reset(seed=0)
    with pytest.raises(InputError, match=r"actions: an array of shape \(26,\); expected \(27,\)"):
        single.step(np.zeros(26, dtype=np.float32))
    vector = GymnasiumVectorEnvironment(environment, 3)
    vector.reset(seed=0)
    with pytest.raises(InputError, match=r"actions: an array of shape \(2, 27\); expected \(3, 27\)"):
        vector.step(actions(2, 0))


def test_vector_steps_are_those_of_running_sessions_with_their_final_observations(environment: VirtualTaobao) -> None:
    n = 16
    vector = GymnasiumVectorEnvironment(environment, n)
    assert vector.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    seen, infos = vector.reset(seed=7)
    assert infos == {}
    generator = torch.Generator().manual_seed(int(gymnasium.utils.seeding.np_random(7)[0].integers(2**63)))
    sessions = RunningSessions(environment, n, generator)

    ended = 0
    for number in range(30):
        np.testing.assert_array_equal(seen, sessions.observations)
        assert seen in vector.observation_space
        chosen = actions(n, number)
        transitions = sessions.step(torch.from_numpy(chosen))
        seen, rewards, terminations, truncations, infos = vector.step(chosen)
        np.testing.assert_array_equal(rewards, transitions.rewards)
        np.testing.assert_array_equal(terminations, transitions.ended)
        assert not truncations.any()
        ended += terminations.sum()
        if not terminations.any():
            assert infos == {}
            continue
        np.testing.assert_array_equal(infos["_final_obs"], terminations)
        for row in range(n):
            final = infos["final_obs"][row]
            if terminations[row]:
                np.testing.assert_array_equal(final, transitions.next_observations[row])
                assert (seen[row, 88:] == 0).all()
            else:
                assert final is None
    assert ended > 20


def test_gymnasiums_vector_wrappers_take_it(environment: VirtualTaobao) -> None:
    vector = gymnasium.wrappers.vector.RecordEpisodeStatistics(GymnasiumVectorEnvironment(environment, 8))
    vector.reset(seed=0)
    lengths = []
    for number in range(60):
        *_, infos = vector.step(actions(8, number))
        if "episode" in infos:
            lengths += infos["episode"]["l"][infos["_episode"]].tolist()
    assert len(lengths) > 20
    assert all(1 <= length <= 100 for length in lengths)


def test_what_is_handed_out_is_the_callers_own(environment: VirtualTaobao, single: GymnasiumEnvironment) -> None:
    vector = GymnasiumVectorEnvironment(environment, 4)
    for env, chosen in ((single, actions(1, 0)[0]), (vector, actions(4, 0))):
        outcomes = []
        for spoil in (False, True):
            seen, _ = env.reset(seed=1)
            if spoil:
                seen[:] = 9.0
            outcomes.append(env.step(chosen))
        np.testing.assert_array_equal(outcomes[0][0], outcomes[1][0])
        np.testing.assert_array_equal(outcomes[0][1], outcomes[1][1])
