"""REINFORCE and actor-critic learn what can be computed, in any form of credit; the same seed learns the same."""

import pytest
import torch

from components.agents.reinforce import ReinforceConfig, _returns, train_reinforce
from components.environments.irecgan_mdp import START, IRecGanMdp, MdpState, write_mdp_log
from components.errors import InputError
from components.interactions.batching import SessionReader
from components.interactions.vocabulary import Vocabulary
from components.policies.slate_policy import UniformPolicy
from components.policies.tabular_policy import TabularSlatePolicy

N_STATES, N_ITEMS, SLATE = 3, 6, 2
SMALL = ReinforceConfig(
    iterations=40,
    sessions=250,
    max_steps=20,
    critic="returns",
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


class Unplayed(IRecGanMdp):
    """An MDP that must not be played in: all there is to learn from is its log."""

    def step(self, state, slates, generator):
        raise AssertionError("a session was generated")


def value_of_likely_slates(mdp: IRecGanMdp, policy: TabularSlatePolicy) -> float:
    requests = mdp.observe(MdpState(torch.arange(N_STATES)))
    places = policy.logits(policy.start(requests), requests).topk(SLATE, dim=1).indices
    return float(mdp.values_of(requests.candidates.gather(1, places))[START])


def test_it_reaches_the_optimum_of_a_tiny_mdp():
    mdp = IRecGanMdp(n_states=N_STATES, n_items=N_ITEMS, slate_size=SLATE, seed=1)
    value = value_of_likely_slates(mdp, trained(mdp, SMALL))
    assert value >= 0.95 * float(mdp.optimal_values()[START])


def test_the_actor_critic_reaches_it_too():
    mdp = IRecGanMdp(n_states=N_STATES, n_items=N_ITEMS, slate_size=SLATE, seed=1)
    value = value_of_likely_slates(mdp, trained(mdp, SMALL.model_copy(update={"critic": "td"})))
    assert value >= 0.95 * float(mdp.optimal_values()[START])


@pytest.mark.parametrize(("credit", "first"), [("slate", [13.0, 13.0]), ("positions", [13.0, 12.0])])
def test_the_critics_value_of_the_next_request_stands_for_what_the_session_went_on_to_earn(credit, first):
    rewards, values = torch.tensor([[[1.0, 2.0], [4.0, 0.0]]]), torch.tensor([[7.0, 20.0]])
    config = SMALL.model_copy(update={"critic": "td", "gamma": 0.5, "credit": credit})

    returns = _returns(rewards, values, config)

    # 1 + 2 + 0.5 · 20; nothing follows the last request.
    assert returns[0, 0].tolist() == first
    assert returns[0, 1].tolist() == ([4.0, 4.0] if credit == "slate" else [4.0, 0.0])


@pytest.mark.parametrize("critic", ["returns", "td"])
def test_it_learns_from_a_log_alone_and_then_generates_nothing(critic, tmp_path):
    mdp = IRecGanMdp(n_states=N_STATES, n_items=N_ITEMS, slate_size=SLATE, seed=1)
    log = write_mdp_log(mdp, UniformPolicy(SLATE), 4_000, 20, 0, "mdp", tmp_path / "log")
    reader = SessionReader(log, Vocabulary.fit(log))
    alone = {"generated_weight": 0.0, "logged_weight": 1.0, "logged_sessions": 500, "critic": critic}
    untrained = TabularSlatePolicy(N_STATES, N_ITEMS + 2, SLATE, bound=6.0)
    policy = TabularSlatePolicy(N_STATES, N_ITEMS + 2, SLATE, bound=6.0)
    unplayed = Unplayed(n_states=N_STATES, n_items=N_ITEMS, slate_size=SLATE, seed=1)

    config = SMALL.model_copy(update=alone)
    train_reinforce(policy, unplayed, torch.zeros(1, dtype=torch.long), reader, config, 0, lambda *_: None)

    start, optimum = value_of_likely_slates(mdp, untrained), float(mdp.optimal_values()[START])
    assert value_of_likely_slates(mdp, policy) >= start + 0.8 * (optimum - start)


def test_without_generated_and_logged_sessions_there_is_nothing_to_learn_from():
    mdp = IRecGanMdp(n_states=N_STATES, n_items=N_ITEMS, slate_size=SLATE, seed=1)
    with pytest.raises(InputError, match="nothing to learn from"):
        trained(mdp, SMALL.model_copy(update={"generated_weight": 0.0}))


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
