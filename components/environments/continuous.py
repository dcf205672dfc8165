"""Environments whose actions are vectors: many users step at once, and agents of continuous actions learn in them.

As with slates (`interface.py`), an environment is a set of pure functions of its state. An action is a point of the box
[-1, 1]^A; what lies outside is clipped to it.

Shape letters: B users or sessions, S numbers of an observation, A of an action.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from components.interactions.tensor_record import TensorRecord

State = TypeVar("State", bound=TensorRecord)


@dataclass(frozen=True)
class Outcome(TensorRecord):
    """What B users answered to their actions."""

    rewards: Float[Tensor, " B"]
    ended: Bool[Tensor, " B"]
    """Whether the session ended with this step: nothing follows, so no value is to be expected of it."""


@runtime_checkable
class ContinuousEnvironment(Protocol[State]):
    """B users step together; `State` has one row a user."""

    observation_size: int
    action_size: int
    observation_scale: Float[Tensor, " S"]
    """Largest size of each number of an observation: what a network may divide by."""

    def reset(self, n_users: int, generator: torch.Generator) -> State:
        """Open a session of each of so many new users."""
        ...

    def observe(self, state: State) -> Float[Tensor, "B S"]:
        """What a policy may see."""
        ...

    def step(self, state: State, actions: Float[Tensor, "B A"], generator: torch.Generator) -> tuple[Outcome, State]:
        """Act; returns the outcomes and what follows.

        The state of users whose session ended is that after their last step: their terminal observation.
        """
        ...


@dataclass(frozen=True)
class Transitions(TensorRecord):
    """B steps, each of a session of its own."""

    observations: Float[Tensor, "B S"]
    actions: Float[Tensor, "B A"]
    rewards: Float[Tensor, " B"]
    next_observations: Float[Tensor, "B S"]
    """Where the session ended, its terminal observation."""
    ended: Bool[Tensor, " B"]


class RunningSessions(Generic[State]):
    """B sessions that never stop: whoever leaves makes room for a new user.

    Args:
        environment: where they take place.
        n_sessions: sessions B at any time.
        generator: the only source of chance, of the users' own and of new users.
    """

    def __init__(self, environment: ContinuousEnvironment[State], n_sessions: int, generator: torch.Generator) -> None:
        self._environment = environment
        self._generator = generator
        self._state = environment.reset(n_sessions, generator)
        self._waiting, self._n_waiting = self._state, 0
        self.observations: Float[Tensor, "B S"] = environment.observe(self._state)
        """What the policy sees now."""

    @torch.no_grad()
    def step(self, actions: Float[Tensor, "B A"]) -> Transitions:
        """Act in every session; new users follow those who left."""
        before = self.observations
        outcome, state = self._environment.step(self._state, actions, self._generator)
        after = self._environment.observe(state)
        state = self._with_new_users(state, torch.nonzero(outcome.ended)[:, 0])
        self._state, self.observations = state, self._environment.observe(state)
        return Transitions(before, actions, outcome.rewards, after, outcome.ended)

    def _with_new_users(self, state: State, left: Int[Tensor, " L"]) -> State:
        """The next of those who wait in the places of those who left.

        As many as there are sessions are opened at a time: to open a few costs almost as much.
        """
        while len(left):
            if not self._n_waiting:
                self._n_waiting = len(self.observations)
                self._waiting = self._environment.reset(self._n_waiting, self._generator)
            n = min(len(left), self._n_waiting)
            self._n_waiting -= n
            state = state.replaced(left[:n], self._waiting.select(slice(self._n_waiting, self._n_waiting + n)))
            left = left[n:]
        return state


@dataclass(frozen=True)
class SessionTotals(TensorRecord):
    """What whole sessions came to."""

    rewards: Float[Tensor, " B"]
    """Summed over each session."""
    steps: Int[Tensor, " B"]

    @property
    def mean_reward(self) -> float:
        """Mean reward of a step, all steps alike."""
        return float(self.rewards.cpu().double().sum() / self.steps.sum().cpu())


@torch.no_grad()
def run_sessions(
    environment: ContinuousEnvironment[State],
    act: Callable[[Float[Tensor, "B S"]], Float[Tensor, "B A"]],
    n_users: int,
    generator: torch.Generator,
) -> SessionTotals:
    """Whole sessions of new users, each until it ends.

    Args:
        environment: where they take place; its sessions must end.
        act: actions for observations.
        n_users: number of sessions.
        generator: of the users' chance.
    """
    state = environment.reset(n_users, generator)
    return finish_sessions(environment, state, lambda observations, _: act(observations), generator)


@torch.no_grad()
def finish_sessions(
    environment: ContinuousEnvironment[State],
    state: State,
    act: Callable[[Float[Tensor, "B S"], Int[Tensor, " B"]], Float[Tensor, "B A"]],
    generator: torch.Generator,
) -> SessionTotals:
    """Given sessions, each until it ends.

    Args:
        environment: where they take place; its sessions must end.
        state: of the sessions.
        act: actions for observations, and for the numbers (rows of `state`) of the sessions that they are of.
        generator: of the users' chance.
    """
    observations = environment.observe(state)
    rewards = observations.new_zeros(len(observations))
    alive = torch.arange(len(observations), device=observations.device)
    steps = torch.zeros_like(alive)
    while len(alive):
        outcome, state = environment.step(state, act(environment.observe(state), alive), generator)
        rewards[alive] += outcome.rewards
        steps[alive] += 1
        stay = torch.nonzero(~outcome.ended)[:, 0]
        alive, state = alive[stay], state.select(stay)
    return SessionTotals(rewards, steps)
