"""What simulators and the learned world model have in common: many users step at once, as tensors.

An environment is a set of pure functions of its state, so a rollout can drop users who have left, and the same prefix
can be completed many times.
"""

from dataclasses import dataclass
from typing import Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from components.interactions.batching import Requests
from components.interactions.contract import Reward
from components.interactions.tensor_record import TensorRecord

State = TypeVar("State", bound=TensorRecord)


@dataclass(frozen=True)
class Feedback(TensorRecord):
    """What B users did with their slates."""

    clicks: Float[Tensor, "B K"]
    purchases: Float[Tensor, "B K"]
    left: Bool[Tensor, " B"]


@runtime_checkable
class Environment(Protocol[State]):
    """B users step together; `State` has one row a user."""

    slate_size: int
    reward: Reward

    def reset(self, users: Int[Tensor, " B"], generator: torch.Generator) -> State:
        """Open a session for each of the given users (codes below the environment's number of users)."""
        ...

    def observe(self, state: State) -> Requests:
        """What a policy may see of the current requests."""
        ...

    def step(self, state: State, slates: Int[Tensor, "B K"], generator: torch.Generator) -> tuple[Feedback, State]:
        """Show slates; returns what the users did and their next requests.

        The state of users who left is that of a request which will not take place.
        """
        ...
