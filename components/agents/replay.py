"""The last steps that an agent took, from which it learns again and again.

Shape letters: N rows kept, B steps, S numbers of an observation, A of an action.
"""

import torch
from torch import Tensor

from components.environments.continuous import Transitions


class Replay:
    """A ring of steps: once it is full, new ones take the place of the oldest.

    A step is one row of one tensor, (observation, action, next observation, reward, ended), so that a sample is a
    single gather; its parts are views.

    Args:
        capacity: steps N that are kept at most; 4 (2 S + A + 2) bytes each.
        observation_size: S.
        action_size: A.
        device: where they lie.
    """

    def __init__(
        self, capacity: int, observation_size: int, action_size: int, device: torch.device | str = "cpu"
    ) -> None:
        self._widths = (observation_size, action_size, observation_size, 1, 1)
        self._rows = torch.empty(capacity, sum(self._widths), device=device)
        self._next = 0
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def add(self, steps: Transitions) -> None:
        """Keep steps, at most as many at once as there are rows; the last of them is the newest."""
        rows = torch.cat(
            [
                steps.observations,
                steps.actions,
                steps.next_observations,
                steps.rewards[:, None],
                steps.ended[:, None].to(steps.rewards.dtype),
            ],
            dim=1,
        )
        capacity, before_end = len(self._rows), len(self._rows) - self._next
        self._rows[self._next : self._next + len(rows)] = rows[:before_end]
        self._rows[: max(0, len(rows) - before_end)] = rows[before_end:]
        self._next = (self._next + len(rows)) % capacity
        self._length = min(self._length + len(rows), capacity)

    def sample(self, n_steps: int, generator: torch.Generator) -> Transitions:
        """Steps drawn uniformly, with replacement."""
        index = torch.randint(self._length, (n_steps,), generator=generator, device=self._rows.device)
        return self._unpacked(self._rows.index_select(0, index))

    def _unpacked(self, rows: Tensor) -> Transitions:
        observations, actions, next_observations, rewards, ended = rows.split(self._widths, dim=1)
        return Transitions(observations, actions, rewards[:, 0], next_observations, ended[:, 0] > 0)
