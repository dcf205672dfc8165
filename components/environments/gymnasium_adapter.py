"""Environments of continuous actions as Gymnasium's, for agents that are not of this library.

One user's sessions as a `gymnasium.Env`, or many side by side as a `gymnasium.vector.VectorEnv`:

    env = GymnasiumEnvironment(VirtualTaobao(weights))
    observation, info = env.reset(seed=0)
    observation, reward, terminated, truncated, info = env.step(env.action_space.sample())

Sessions only ever terminate: nothing is truncated. Observations are the caller's own, in float32.

Shape letters: B sessions, S numbers of an observation, A of an action.
"""

from typing import Any, Generic, Protocol, runtime_checkable

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from jaxtyping import Bool, Float
from torch import Tensor

from components.environments.continuous import ContinuousEnvironment, RunningSessions, State
from components.errors import InputError


@runtime_checkable
class BoundedEnvironment(ContinuousEnvironment[State], Protocol[State]):
    """An environment that knows how far its observations reach."""

    observation_bounds: tuple[Float[Tensor, " S"], Float[Tensor, " S"]]
    """Smallest and largest value of each number of an observation."""


class GymnasiumEnvironment(gymnasium.Env[Float[np.ndarray, " S"], Float[np.ndarray, " A"]], Generic[State]):
    """One session after another, each of a new user.

    Args:
        environment: where they take place.
    """

    def __init__(self, environment: BoundedEnvironment[State]) -> None:
        self.metadata = {"render_modes": []}
        self.observation_space, self.action_space = _spaces(environment)
        self._environment = environment
        self._generator: torch.Generator | None = None
        self._state: State | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Float[np.ndarray, " S"], dict[str, Any]]:
        """Open a session; there are no options.

        Args:
            seed: of all that follows; without one, chance goes on from where it was.
            options: not read.
        """
        super().reset(seed=seed)
        if self._generator is None or seed is not None:
            self._generator = _generator(self.np_random, self._environment)
        self._state = self._environment.reset(1, self._generator)
        return _array(self._environment.observe(self._state))[0], {}

    @torch.no_grad()
    def step(
        self, action: Float[np.ndarray, " A"]
    ) -> tuple[Float[np.ndarray, " S"], float, bool, bool, dict[str, Any]]:
        """Act.

        Raises:
            gymnasium.error.ResetNeeded: no session is open.
            InputError: the action has another shape.
        """
        if self._state is None or self._generator is None:
            raise gymnasium.error.ResetNeeded("no session is open: call reset() first, and after each that terminated")
        actions = _actions(action, self.action_space, self._environment)[None]
        outcome, state = self._environment.step(self._state, actions, self._generator)
        terminated = bool(outcome.ended)
        self._state = None if terminated else state
        return _array(self._environment.observe(state))[0], float(outcome.rewards), terminated, False, {}


class GymnasiumVectorEnvironment(
    VectorEnv[Float[np.ndarray, "B S"], Float[np.ndarray, "B A"], np.ndarray], Generic[State]
):
    """Sessions side by side; whoever leaves makes room for a new user within the same step.

    The observation that a step returns is then the newcomer's; `infos["final_obs"]` holds the terminal ones, as an
    array of objects, where `infos["_final_obs"]` says so.

    Args:
        environment: where they take place.
        num_envs: sessions B at any time.
    """

    def __init__(self, environment: BoundedEnvironment[State], num_envs: int) -> None:
        self.metadata = {"render_modes": [], "autoreset_mode": AutoresetMode.SAME_STEP}
        self.num_envs = num_envs
        self.single_observation_space, self.single_action_space = _spaces(environment)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._environment = environment
        self._generator: torch.Generator | None = None
        self._sessions: RunningSessions[State] | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Float[np.ndarray, "B S"], dict[str, Any]]:
        """Open a session in every place; there are no options.

        Args:
            seed: of all that follows; without one, chance goes on from where it was.
            options: not read.
        """
        super().reset(seed=seed)
        if self._generator is None or seed is not None:
            self._generator = _generator(self.np_random, self._environment)
        self._sessions = RunningSessions(self._environment, self.num_envs, self._generator)
        return _array(self._sessions.observations), {}

    def step(
        self, actions: Float[np.ndarray, "B A"]
    ) -> tuple[
        Float[np.ndarray, "B S"],
        Float[np.ndarray, " B"],
        Bool[np.ndarray, " B"],
        Bool[np.ndarray, " B"],
        dict[str, Any],
    ]:
        """Act in every session.

        Raises:
            gymnasium.error.ResetNeeded: `reset` was never called.
            InputError: the actions have another shape.
        """
        if self._sessions is None:
            raise gymnasium.error.ResetNeeded("no session is open: call reset() first")
        transitions = self._sessions.step(_actions(actions, self.action_space, self._environment))
        ended = transitions.ended.cpu().numpy().copy()
        infos: dict[str, Any] = {}
        if ended.any():
            final = np.full(self.num_envs, None, dtype=object)
            left = np.flatnonzero(ended)
            for row, observation in zip(left, _array(transitions.next_observations[transitions.ended]), strict=True):
                final[row] = observation
            infos = {"final_obs": final, "_final_obs": ended.copy()}
        rewards = _array(transitions.rewards).astype(np.float64)
        return _array(self._sessions.observations), rewards, ended, np.zeros_like(ended), infos


def _spaces(environment: BoundedEnvironment[State]) -> tuple[Box, Box]:
    low, high = (_array(bound) for bound in environment.observation_bounds)
    return Box(low, high, dtype=np.float32), Box(-1.0, 1.0, (environment.action_size,), dtype=np.float32)


def _generator(chance: np.random.Generator, environment: BoundedEnvironment[State]) -> torch.Generator:
    generator = torch.Generator(environment.observation_scale.device)
    return generator.manual_seed(int(chance.integers(2**63)))


def _actions(
    actions: Float[np.ndarray, "*B A"], space: gymnasium.Space[Any], environment: BoundedEnvironment[State]
) -> Float[Tensor, "*B A"]:
    if np.shape(actions) != space.shape:
        raise InputError(f"actions: an array of shape {np.shape(actions)}; expected {space.shape}")
    return torch.as_tensor(np.asarray(actions, dtype=np.float32), device=environment.observation_scale.device)


def _array(tensor: Float[Tensor, "..."]) -> Float[np.ndarray, "..."]:
    """A copy, so that nobody who keeps or changes it meets the environment's own state."""
    return tensor.detach().cpu().numpy().copy()
