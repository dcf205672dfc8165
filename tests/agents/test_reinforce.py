"""REINFORCE learns what can be computed, in either form of credit, and the same seed learns the same."""

import pytest
import torch

from components.agents.reinforce import ReinforceConfig, train_reinforce
from components.environments.irecgan_mdp import START, IRecGanMdp, MdpState
from components.policies.tabular_policy import TabularSlatePolicy

N_STATES, N_ITEMS, SLATE = 3, 6, 2
SMALL = ReinforceConfig(
    iterations=40,
    sessions=250,
    max_steps=20,
    gamma=0.95,
    credit="slate",
    learning_rate=0.2,
    baseline_rate=0.02,
    entropy=0.0,
    pull=0.0,
    logged_weight=0.0,
)


def trained(mdp: IRecGanMdp, config: ReinforceConfig, seed: int = 0) -> TabularSlatePolicy:
    policy = TabularSlatePolicy(N_STATES, N_ITEMS + 2, SLATE, bound=6.0)
    train_reinforce(policy, mdp, torch.zeros(1, dtype=torch.long), None, config, seed, lambda message, share: None)
    return policy


def value_of_likely_slates(mdp: IRecGanMdp, policy: TabularSlatePolicy) -> float:
    requests = mdp.observe(MdpState(torch.arange(N_STATES)))
    places = policy.logits(policy.start(requests), requests).topk(SLATE, dim=1).indices
    return float(mdp.values_of(requests.candidates.gather(1, places))[START])


def test_it_reaches_the_optimum_of_a_tiny_mdp():
    mdp = IRecGanMdp(n_states=N_STATES, n_items=N_ITEMS, slate_size=SLATE, seed=1)
    value = value_of_likely_slates(mdp, trained(mdp, SMALL))
    assert value >= 0.95 * float(mdp.optimal_values()[START])


def test_the_same_seed_learns_the_same_and_another_does_not():
    mdp = IRecGanMdp(n_states=N_STATES, n_items=N_ITEMS, slate_size=SLATE, seed=1)
    short = SMALL.model_copy(update={"iterations": 3})
    first, again, other = (trained(mdp, short, seed).learned.weight for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("credit", ["positions", "clicks"])
def test_other_forms_of_credit_learn_something_too(credit):
    mdp = IRecGanMdp(n_states=N_STATES, n_items=N_ITEMS, slate_size=SLATE, seed=1)
    untrained = TabularSlatePolicy(N_STATES, N_ITEMS + 2, SLATE, bound=6.0)
    learned = trained(mdp, SMALL.model_copy(update={"credit": credit}))
    assert value_of_likely_slates(mdp, learned) > value_of_likely_slates(mdp, untrained)


def test_a_strong_pull_keeps_the_policy_at_the_logging_policy():
    mdp = IRecGanMdp(n_states=N_STATES, n_items=N_ITEMS, slate_size=SLATE, seed=1)
    free = trained(mdp, SMALL.model_copy(update={"iterations": 15}))
    held = trained(mdp, SMALL.model_copy(update={"iterations": 15, "pull": 50.0}))
    assert held.learned.weight.abs().max() < 0.5 * free.learned.weight.abs().max()


def test_steps_of_a_cosine_shrink_and_constant_ones_do_not():
    mdp = IRecGanMdp(n_states=N_STATES, n_items=N_ITEMS, slate_size=SLATE, seed=1)

    def last_move(schedule: str) -> float:
        weights = []
        policy = TabularSlatePolicy(N_STATES, N_ITEMS + 2, SLATE, bound=6.0)
        config = SMALL.model_copy(update={"schedule": schedule})
        users = torch.zeros(1, dtype=torch.long)
        train_reinforce(
            policy, mdp, users, None, config, 0, lambda message, share: weights.append(policy.learned.weight.clone())
        )
        return float((weights[-1] - weights[-2]).abs().max())

    assert last_move("cosine") < 0.05 * last_move("constant")
