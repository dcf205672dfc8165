from dataclasses import dataclass

import pytest
import torch
from jaxtyping import Float, Int
from torch import Tensor

from components.environments.continuous import Outcome, RunningSessions, SessionTotals, run_sessions
from components.interactions.tensor_record import TensorRecord


@dataclass(frozen=True)
class CountedState(TensorRecord):
    seen: Float[Tensor, "B 2"]
    length: Int[Tensor, " B"]


class Counted:
    """Users are numbered; number u stays 1 + u mod 3 steps, each worth the action. An observation is [u, steps]."""

    observation_size, action_size = 2, 1
    observation_scale = torch.ones(2)

    def __init__(self) -> None:
        self.n_opened = 0
        self.resets: list[int] = []

    def reset(self, n_users: int, generator: torch.Generator) -> CountedState:
        users = torch.arange(self.n_opened, self.n_opened + n_users)
        self.n_opened += n_users
        self.resets.append(n_users)
        return CountedState(torch.stack([users.float(), torch.zeros(n_users)], dim=1), 1 + users % 3)

    def observe(self, state: CountedState) -> Float[Tensor, "B 2"]:
        return state.seen

    def step(
        self, state: CountedState, actions: Float[Tensor, "B 1"], generator: torch.Generator
    ) -> tuple[Outcome, CountedState]:
        seen = state.seen + torch.tensor([0.0, 1.0])
        return Outcome(actions[:, 0], seen[:, 1] >= state.length), CountedState(seen, state.length)


def test_whoever_leaves_makes_room_for_a_new_user_and_nobody_comes_twice() -> None:
    environment, n = Counted(), 5
    sessions = RunningSessions(environment, n, torch.Generator())
    lengths: dict[int, int] = {}
    known: set[int] = set(sessions.observations[:, 0].long().tolist())

    for _ in range(30):
        before = sessions.observations.clone()
        transitions = sessions.step(torch.ones(n, 1))

        assert torch.equal(transitions.observations, before)
        assert torch.equal(transitions.next_observations, before + torch.tensor([0.0, 1.0]))
        after = sessions.observations
        for row, ended in enumerate(transitions.ended.tolist()):
            if ended:
                user, steps = transitions.next_observations[row].long().tolist()
                lengths[user] = steps
                newcomer = int(after[row, 0])
                assert newcomer not in known
                known.add(newcomer)
                assert after[row, 1] == 0
            else:
                assert torch.equal(after[row], transitions.next_observations[row])

    assert len(lengths) > 50
    assert lengths == {user: 1 + user % 3 for user in lengths}
    # Users wait in line: they are opened as many at once as there are sessions.
    assert set(environment.resets) == {n}


def test_running_sessions_keep_the_actions_and_rewards_they_were_given() -> None:
    sessions = RunningSessions(Counted(), 3, torch.Generator())
    actions = torch.tensor([[0.1], [0.2], [0.3]])

    transitions = sessions.step(actions)

    assert torch.equal(transitions.actions, actions)
    assert torch.equal(transitions.rewards, actions[:, 0])
    # Users 0, 1, 2 stay 1, 2 and 3 steps.
    assert transitions.ended.tolist() == [True, False, False]


def test_whole_sessions_have_each_users_own_length_and_sum() -> None:
    totals = run_sessions(Counted(), lambda seen: 1.0 + seen[:, :1], 7, torch.Generator())

    assert totals.steps.tolist() == [1, 2, 3, 1, 2, 3, 1]
    # User u earns 1 + u in each of its steps.
    assert totals.rewards.tolist() == [1.0, 4.0, 9.0, 4.0, 10.0, 18.0, 7.0]
    assert totals.mean_reward == pytest.approx(53 / 13)


def test_policies_are_asked_only_for_those_who_stay() -> None:
    asked: list[int] = []

    def act(seen: Float[Tensor, "B 2"]) -> Float[Tensor, "B 1"]:
        asked.append(len(seen))
        return torch.zeros(len(seen), 1)

    run_sessions(Counted(), act, 6, torch.Generator())

    assert asked == [6, 4, 2]


def test_the_mean_reward_counts_steps_and_not_sessions() -> None:
    totals = SessionTotals(rewards=torch.tensor([1.0, 0.0]), steps=torch.tensor([1, 3]))

    assert totals.mean_reward == 0.25
