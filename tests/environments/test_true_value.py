"""True values against closed forms of the small MDP."""

import pytest
import torch

from components.environments.irecgan_mdp import IRecGanMdp, StateSlatePolicy, optimal_policy
from components.environments.true_value import true_one_request_value, true_session_value
from components.policies.slate_policy import UniformPolicy

USERS = torch.zeros(20_000, dtype=torch.long)


@pytest.fixture(scope="module")
def mdp() -> IRecGanMdp:
    return IRecGanMdp(n_states=3, n_items=6, slate_size=2, seed=1)


def test_the_session_value_is_the_mdps_own(mdp: IRecGanMdp) -> None:
    value = true_session_value(mdp, optimal_policy(mdp), USERS, torch.Generator().manual_seed(0), 400)
    assert value.value == pytest.approx(float(mdp.optimal_values()[0]), abs=4 * value.standard_error)


def test_the_one_request_value_keeps_the_behavior_policys_states(mdp: IRecGanMdp) -> None:
    # State s is visited d_s times a session under the behavior policy; a slate earns (r_i² + r_j²) / (r_i + r_j).
    behavior_slates, target_slates = torch.tensor([[2, 3], [4, 5], [6, 7]]), torch.tensor([[4, 7], [2, 3], [3, 5]])
    appeal = mdp.appeal.double()
    states = torch.arange(3)

    def clicks(slates: torch.Tensor) -> torch.Tensor:
        r = appeal.gather(1, slates)
        return r.square() / r.sum(1, keepdim=True)

    moves = torch.einsum(
        "sk,skt->st", clicks(behavior_slates), mdp.transition.double()[states[:, None], behavior_slates]
    )
    visits = torch.linalg.solve(torch.eye(3, dtype=torch.float64) - moves.T, torch.eye(3, dtype=torch.float64)[0])
    expected = float((visits * clicks(target_slates).sum(1)).sum() / visits.sum())
    value = true_one_request_value(
        mdp,
        StateSlatePolicy(mdp, behavior_slates),
        StateSlatePolicy(mdp, target_slates),
        USERS,
        torch.Generator().manual_seed(1),
        400,
    )
    assert value.value == pytest.approx(expected, abs=4 * value.standard_error)
    assert value.standard_error < 0.01


def test_for_the_behavior_policy_itself_it_is_the_logged_mean(mdp: IRecGanMdp) -> None:
    generator = torch.Generator().manual_seed(2)
    value = true_one_request_value(mdp, UniformPolicy(2), UniformPolicy(2), USERS, generator, 400)
    session = true_session_value(mdp, UniformPolicy(2), USERS, generator, 400)
    # A session has one request more than clicks: it ends with the first request that is not clicked.
    assert value.value == pytest.approx(session.value / (session.value + 1), abs=5 * value.standard_error)
