import itertools
import math

import pytest
import torch

from components.environments.bayes_filter import BayesFilter, BayesGreedyPolicy, BayesSlatePolicy
from components.environments.irecgan_mdp import START, IRecGanMdp, myopic_policy
from components.environments.rollout import rollout
from components.policies.slate_policy import SlatePolicy, UniformPolicy

#: Slates of two of the three items, each with the item that is clicked.
ANSWERED = [(slate, item) for slate in itertools.combinations((2, 3, 4), 2) for item in slate]


@pytest.fixture(scope="module")
def tiny() -> IRecGanMdp:
    return IRecGanMdp(n_states=3, n_items=3, slate_size=2, seed=4, state_observed=False)


def joint_by_enumeration(mdp: IRecGanMdp, session: tuple[tuple[tuple[int, ...], int], ...]) -> list[float]:
    """P(these clicks, next state = s), summed over every path of hidden states that could have led there."""
    joint = [0.0] * mdp.n_states
    for path in itertools.product(range(mdp.n_states), repeat=len(session)):
        states = (START, *path)
        chance = 1.0
        for (slate, item), state, following in zip(session, states, states[1:], strict=False):
            drawn = float(mdp.appeal[state, item]) / sum(float(mdp.appeal[state, other]) for other in slate)
            chance *= drawn * float(mdp.appeal[state, item]) * float(mdp.transition[state, item, following])
        joint[states[-1]] += chance
    return joint


def clicks_on(slates: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
    return (slates == items[:, None]).float()


@pytest.mark.parametrize("n_clicks", [1, 2, 3])
def test_belief_and_evidence_are_those_of_every_path_of_hidden_states(tiny: IRecGanMdp, n_clicks: int) -> None:
    sessions = list(itertools.product(ANSWERED, repeat=n_clicks))
    bayes = BayesFilter(tiny)
    belief, evidence = bayes.start(len(sessions)), torch.ones(len(sessions))
    for step in range(n_clicks):
        slates = torch.tensor([session[step][0] for session in sessions])
        clicks = clicks_on(slates, torch.tensor([session[step][1] for session in sessions]))
        evidence = evidence * (bayes.click_probabilities(belief, slates) * clicks).sum(1)
        belief = bayes.advance(belief, slates, clicks)

    joint = torch.tensor([joint_by_enumeration(tiny, session) for session in sessions])

    torch.testing.assert_close(evidence, joint.sum(1), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(belief, joint / joint.sum(1, keepdim=True), rtol=1e-4, atol=1e-6)


def test_the_start_state_is_known_and_a_session_without_a_click_has_no_next_belief(tiny: IRecGanMdp) -> None:
    bayes = BayesFilter(tiny)

    opened = bayes.start(2)
    ended = bayes.advance(opened, torch.tensor([[2, 3], [2, 3]]), torch.tensor([[0.0, 0.0], [0.0, 1.0]]))

    assert opened.tolist() == [[1.0, 0.0, 0.0]] * 2
    assert ended[0].tolist() == [0.0] * 3
    assert float(ended[1].sum()) == pytest.approx(1.0, abs=1e-6)


def test_beliefs_of_whole_sessions_are_those_that_were_followed_step_by_step(tiny: IRecGanMdp) -> None:
    policy = BayesGreedyPolicy(tiny)
    batch = rollout(tiny, UniformPolicy(2), torch.zeros(300, dtype=torch.long), torch.Generator().manual_seed(0), 4)
    requests = batch.requests()

    beliefs = policy.states(batch).hidden.unflatten(0, batch.mask.shape)

    state = policy.start(requests.select(torch.arange(300)))
    for step in range(batch.mask.shape[1]):
        alive = batch.mask[:, step]
        torch.testing.assert_close(beliefs[alive, step], state.hidden[alive])
        assert not bool(beliefs[~alive, step].any())
        state = policy.advance(state, batch.slates[:, step], batch.clicks[:, step], batch.purchases[:, step], requests)


def test_responses_of_the_mdp_come_as_often_as_the_belief_expects(tiny: IRecGanMdp) -> None:
    batch = rollout(tiny, UniformPolicy(2), torch.zeros(20_000, dtype=torch.long), torch.Generator().manual_seed(1), 4)
    bayes = BayesFilter(tiny)
    real = batch.mask
    expected = bayes.click_probabilities(bayes.states(batch)[real], batch.slates[real])

    residual = batch.clicks[real] - expected

    error = (expected * (1 - expected)).sum(0).sqrt() / len(expected)
    assert bool((residual.mean(0).abs() < 4 * error).all())


@pytest.mark.parametrize("make", [BayesGreedyPolicy, BayesSlatePolicy])
def test_the_slate_shown_is_the_best_of_all_slates_in_any_order(make: type[BayesGreedyPolicy]) -> None:
    mdp = IRecGanMdp(n_states=4, n_items=8, slate_size=3, seed=2, state_observed=False)
    batch = rollout(mdp, make(mdp), torch.zeros(40, dtype=torch.long), torch.Generator().manual_seed(0), 5)
    belief = BayesFilter(mdp).states(batch)[batch.mask].double()
    slates = torch.tensor(list(itertools.combinations(mdp.items.tolist(), 3)))
    drawn, clicked = (
        (belief @ values.double())[:, slates].sum(2) for values in (mdp.appeal, mdp.appeal.double().square())
    )

    best = slates[(drawn if make is BayesGreedyPolicy else clicked / drawn).argmax(1)]

    assert torch.equal(batch.slates[batch.mask].sort(1).values, best.to(batch.slates.dtype))
    assert batch.log_probs[batch.mask].numpy() == pytest.approx(-math.log(6), abs=1e-4)


def test_policies_that_do_not_see_the_state_lie_between_random_slates_and_those_that_do() -> None:
    hidden, revealed = (IRecGanMdp(state_observed=False, reveal_truth=truth) for truth in (False, True))

    def clicks(mdp: IRecGanMdp, policy: SlatePolicy) -> float:
        users = torch.zeros(4_000, dtype=torch.long)
        return float(rollout(mdp, policy, users, torch.Generator().manual_seed(3), 400).rewards.sum((1, 2)).mean())

    random, greedy = clicks(hidden, UniformPolicy(10)), clicks(hidden, BayesGreedyPolicy(hidden))
    whole_slates, observed = clicks(hidden, BayesSlatePolicy(hidden)), clicks(revealed, myopic_policy(revealed))

    assert 1.4 * random < greedy < whole_slates < 0.6 * observed
