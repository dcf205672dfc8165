import pytest
import torch

from components.agents.replay import Replay
from components.environments.continuous import Transitions


def numbered(*numbers: float) -> Transitions:
    """Steps whose every part tells which one it is."""
    number = torch.tensor(numbers)[:, None]
    return Transitions(
        observations=number + torch.tensor([0.1, 0.2]),
        actions=number + 0.3,
        rewards=number[:, 0] + 0.4,
        next_observations=number + torch.tensor([0.5, 0.6]),
        ended=number[:, 0] % 2 == 1,
    )


def kept(replay: Replay) -> list[int]:
    return sorted({int(number) for number in replay.sample(500, torch.Generator().manual_seed(0)).observations[:, 0]})


def test_a_sample_holds_whole_steps_as_they_were_kept():
    replay = Replay(8, 2, 1)
    replay.add(numbered(0, 1, 2))
    sample = replay.sample(50, torch.Generator().manual_seed(0))
    expected = numbered(*sample.observations[:, 0].floor().tolist())
    for name, value in vars(sample).items():
        torch.testing.assert_close(value, getattr(expected, name))
    assert kept(replay) == [0, 1, 2]


def test_a_full_ring_forgets_the_oldest_steps():
    replay = Replay(5, 2, 1)
    for first in (0, 3, 6):
        replay.add(numbered(first, first + 1, first + 2))
    assert len(replay) == 5
    assert kept(replay) == [4, 5, 6, 7, 8]


def test_as_many_steps_at_once_as_there_are_rows_take_all_of_them():
    replay = Replay(3, 2, 1)
    replay.add(numbered(0))
    replay.add(numbered(1, 2, 3))
    assert kept(replay) == [1, 2, 3]


def test_every_step_is_drawn_alike():
    replay = Replay(4, 2, 1)
    replay.add(numbered(0, 1, 2, 3))
    drawn = replay.sample(40_000, torch.Generator().manual_seed(1)).observations[:, 0].long().bincount()
    # Six standard errors.
    assert (drawn / 40_000).tolist() == pytest.approx([0.25] * 4, abs=0.013)
