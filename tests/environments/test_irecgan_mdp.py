import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from components.environments.irecgan_mdp import (
    START,
    IRecGanMdp,
    MixPolicy,
    myopic_policy,
    optimal_policy,
    write_mdp_log,
)
from components.environments.rollout import rollout
from components.interactions.batching import SessionBatch, SessionReader
from components.interactions.vocabulary import FIRST_ITEM, Vocabulary
from components.policies.slate_policy import OraclePolicy, SlatePolicy, UniformPolicy

UNCAPPED = 1_000


def sessions(mdp: IRecGanMdp, policy: SlatePolicy, n: int = 3_000, max_steps: int = UNCAPPED) -> SessionBatch:
    generator = torch.Generator().manual_seed(3)
    return rollout(mdp, policy, torch.zeros(n, dtype=torch.long), generator, max_steps)


def mean_clicks(batch: SessionBatch) -> tuple[float, float]:
    """Mean clicks of a session and its standard error."""
    clicks = batch.rewards.sum((1, 2))
    return float(clicks.mean()), float(clicks.std()) / math.sqrt(len(clicks))


def value_by_enumeration(mdp: IRecGanMdp, slates: tuple[tuple[int, ...], ...]) -> np.ndarray:
    """Values of the states when state s is always shown slates[s], one expectation at a time."""
    n_states = mdp.n_states
    stay, reward = np.zeros((n_states, n_states)), np.zeros(n_states)
    for state, slate in enumerate(slates):
        appeal = {item: float(mdp.appeal[state, item]) for item in slate}
        for item in slate:
            click = appeal[item] / sum(appeal.values()) * appeal[item]
            reward[state] += click
            stay[state] += click * mdp.transition[state, item].double().numpy()
    return np.linalg.solve(np.eye(n_states) - stay, reward)


@pytest.fixture(scope="module")
def tiny() -> IRecGanMdp:
    return IRecGanMdp(n_states=3, n_items=4, slate_size=2, seed=5)


def test_policy_iteration_finds_the_best_of_all_deterministic_policies() -> None:
    for seed in range(5):
        mdp = IRecGanMdp(n_states=3, n_items=4, slate_size=2, seed=seed)
        slates = list(itertools.combinations(mdp.items.tolist(), 2))
        values = [value_by_enumeration(mdp, choice) for choice in itertools.product(slates, repeat=3)]

        best = np.max(values, axis=0)

        assert mdp.optimal_values().numpy() == pytest.approx(best, rel=1e-6)


def test_values_of_slates_equal_those_summed_one_outcome_at_a_time(tiny: IRecGanMdp) -> None:
    slates = ((2, 3), (3, 5), (4, 2))

    values = tiny.values_of(torch.tensor(slates))

    assert values.numpy() == pytest.approx(value_by_enumeration(tiny, slates), rel=1e-6)


def test_one_state_and_one_item_click_a_geometric_number_of_times() -> None:
    mdp = IRecGanMdp(n_states=1, n_items=1, slate_size=1)
    r = float(mdp.appeal[0, FIRST_ITEM])

    assert float(mdp.optimal_values()[START]) == pytest.approx(r / (1 - r), rel=1e-6)


@pytest.mark.parametrize("make", [myopic_policy, optimal_policy])
def test_rollouts_agree_with_the_computed_value(make) -> None:
    mdp = IRecGanMdp(n_states=4, n_items=12, slate_size=3, seed=1)
    slates = mdp.optimal_slates() if make is optimal_policy else mdp.ranked_items()[:, :3]

    mean, error = mean_clicks(sessions(mdp, make(mdp)))

    assert abs(mean - float(mdp.values_of(slates)[START])) < 4 * error


def test_published_size_orders_its_policies_as_measured_elsewhere() -> None:
    mdp = IRecGanMdp()
    optimum = float(mdp.optimal_values()[START])
    myopic = float(mdp.values_of(mdp.ranked_items()[:, :10])[START])
    random, _ = mean_clicks(sessions(mdp, UniformPolicy(10), n=1_000))
    mix, _ = mean_clicks(sessions(mdp, MixPolicy(mdp), n=1_000))

    assert 1.2 < random < 2.6
    assert random < mix < myopic < optimum
    assert 6 < optimum < 14


def test_the_best_slates_hold_items_that_are_hardly_ever_drawn() -> None:
    mdp = IRecGanMdp()

    appeal = mdp.appeal.gather(1, mdp.optimal_slates())

    assert bool(((appeal < 0.25) | (appeal > 0.6)).all())
    assert bool((appeal < 0.25).any(1).all())


def test_optimal_values_are_a_fixed_point_that_no_slate_improves(tiny: IRecGanMdp) -> None:
    values = tiny.optimal_values()
    appeal = tiny.appeal.double()
    gain = appeal * (1 + tiny.transition.double() @ values)
    for slate in itertools.combinations(tiny.items.tolist(), 2):
        shown = list(slate)
        ratio = (appeal * gain)[:, shown].sum(1) / appeal[:, shown].sum(1)
        assert bool((ratio <= values + 1e-9).all())


def test_a_click_continues_the_session_and_anything_else_ends_it() -> None:
    mdp = IRecGanMdp()

    batch = sessions(mdp, myopic_policy(mdp), n=300)

    clicks = batch.clicks.sum(2)
    assert bool((clicks[batch.mask] == (~batch.left[batch.mask]).float()).all())
    assert bool((batch.lengths == 1 + clicks.sum(1)).all())
    assert bool((batch.purchases == 0).all())


def test_a_cap_censors_sessions_that_would_go_on() -> None:
    mdp = IRecGanMdp()

    batch = sessions(mdp, myopic_policy(mdp), n=300, max_steps=4)

    capped = batch.lengths == 4
    assert bool(capped.any())
    last = batch.left[capped, 3] | ~batch.leave_observed[capped, 3]
    assert bool(last.all())


def test_items_are_drawn_in_proportion_to_their_appeal_and_clicked_with_it(tiny: IRecGanMdp) -> None:
    n = 40_000
    generator = torch.Generator().manual_seed(0)
    state = tiny.reset(torch.zeros(n, dtype=torch.long), generator)
    slates = torch.tensor([[4, 2]]).expand(n, -1)

    feedback, following = tiny.step(state, slates, generator)

    appeal = tiny.appeal[START, [4, 2]]
    expected = appeal.square() / appeal.sum()
    errors = (expected * (1 - expected) / n).sqrt()
    assert bool(((feedback.clicks.mean(0) - expected).abs() < 4 * errors).all())
    clicked_first = feedback.clicks[:, 0] > 0
    moved = torch.bincount(following.current[clicked_first], minlength=3) / clicked_first.sum()
    assert moved.numpy() == pytest.approx(tiny.transition[START, 4].numpy(), abs=0.03)


def test_observed_and_hidden_mdps_differ_in_their_context_alone() -> None:
    observed, hidden = IRecGanMdp(), IRecGanMdp(state_observed=False)
    assert torch.equal(observed.appeal, hidden.appeal)
    assert torch.equal(observed.transition, hidden.transition)

    seen, unseen = (sessions(mdp, UniformPolicy(10), n=200) for mdp in (observed, hidden))

    assert seen.context.shape[2] == 10
    assert unseen.context.shape[2] == 0
    for name in ("mask", "candidates", "slates", "clicks", "left", "rewards"):
        assert torch.equal(getattr(seen, name), getattr(unseen, name)), name


def test_policies_that_know_the_mdp_act_alike_whether_context_or_truth_shows_them_the_state() -> None:
    by_context, by_truth = IRecGanMdp(), IRecGanMdp(state_observed=False, reveal_truth=True)

    seen, unseen = (sessions(mdp, optimal_policy(mdp), n=200) for mdp in (by_context, by_truth))

    assert torch.equal(seen.slates, unseen.slates)
    assert torch.equal(seen.rewards, unseen.rewards)


def test_a_policy_that_needs_the_state_says_how_to_show_it() -> None:
    mdp = IRecGanMdp(state_observed=False)

    with pytest.raises(ValueError, match="reveal_truth=True"):
        sessions(mdp, myopic_policy(mdp), n=2)


def test_being_greedy_on_the_revealed_truth_is_the_myopic_policy() -> None:
    mdp = IRecGanMdp(reveal_truth=True)

    oracle, myopic = (sessions(mdp, policy, n=50) for policy in (OraclePolicy(10), myopic_policy(mdp)))

    assert torch.equal(oracle.slates[:, 0].sort(1).values, myopic.slates[:, 0].sort(1).values)


def test_state_policies_show_their_items_in_any_order_with_the_probability_that_they_state() -> None:
    mdp = IRecGanMdp()

    batch = sessions(mdp, optimal_policy(mdp), n=200)

    states = batch.context.argmax(2)[batch.mask]
    shown = batch.slates[batch.mask].sort(1).values
    assert torch.equal(shown, mdp.optimal_slates().sort(1).values[states])
    assert batch.log_probs[batch.mask].numpy() == pytest.approx(-math.lgamma(11), abs=1e-4)


def test_mix_shows_the_best_items_or_those_of_middle_rank_half_of_the_time_each() -> None:
    mdp = IRecGanMdp()
    batch = sessions(mdp, MixPolicy(mdp), n=2_000, max_steps=1)
    ranks = mdp.ranked_items()[START].argsort()[batch.slates[:, 0] - FIRST_ITEM]

    best = (ranks < 10).all(1)
    middle = ((ranks >= 10) & (ranks < 25)).all(1)

    assert bool((best | middle).all())
    assert float(best.float().mean()) == pytest.approx(0.5, abs=0.05)
    # 10! orders of the best items; 15 · 14 · … · 6 ordered choices from the middle.
    expected = torch.where(best, -math.lgamma(11), -(math.lgamma(16) - math.lgamma(6))) - math.log(2)
    assert batch.log_probs[:, 0].numpy() == pytest.approx(expected.numpy(), abs=1e-4)


def test_probabilities_of_all_slates_of_a_mixture_sum_to_one() -> None:
    mdp = IRecGanMdp(n_states=2, n_items=10, slate_size=2)
    policy = MixPolicy(mdp)
    slates = torch.tensor(list(itertools.permutations(mdp.items.tolist(), 2)))
    requests = mdp.observe(mdp.reset(torch.zeros(len(slates), dtype=torch.long), torch.Generator()))

    per_position = policy.log_prob(policy.start(requests), requests, slates)
    first = policy.logits(policy.start(requests), requests).gather(1, slates[:, :1] - FIRST_ITEM)[:, 0]

    assert float(per_position.double().sum(1).exp().sum()) == pytest.approx(1.0, abs=1e-5)
    assert per_position[:, 0].numpy() == pytest.approx(first.numpy(), abs=1e-5)


def test_mix_refuses_an_mdp_with_too_few_items_of_middle_rank() -> None:
    with pytest.raises(ValueError, match="9 items leave fewer than 4"):
        MixPolicy(IRecGanMdp(n_items=9, slate_size=4))


@pytest.mark.parametrize("observed", [True, False])
def test_a_log_holds_the_sessions_that_took_place_and_the_state_only_where_it_is_observed(
    tmp_path: Path, observed: bool
) -> None:
    mdp = IRecGanMdp(n_items=12, slate_size=3, state_observed=observed)

    log = write_mdp_log(mdp, UniformPolicy(3), n_sessions=50, max_steps=3, seed=5, loop="shop", out=tmp_path / "log")

    table = next(SessionReader(log, Vocabulary.fit(log)).tables())
    batch = table.batch(torch.arange(50))
    generator = torch.Generator().manual_seed(5)
    truth = rollout(mdp, UniformPolicy(3), torch.arange(50), generator, 3)
    assert batch.context.shape[2] == (10 if observed else 0)
    for name in ("mask", "candidates", "slates", "context", "clicks", "left", "leave_observed", "rewards", "log_probs"):
        torch.testing.assert_close(getattr(batch, name), getattr(truth, name), check_dtype=False, msg=name)


def test_the_same_seed_is_the_same_mdp() -> None:
    first, second, other = IRecGanMdp(seed=2), IRecGanMdp(seed=2), IRecGanMdp(seed=3)

    assert torch.equal(first.transition, second.transition)
    assert not torch.equal(first.appeal, other.appeal)
    assert first.transition[:, FIRST_ITEM:].sum(2).numpy() == pytest.approx(1.0, abs=1e-5)
