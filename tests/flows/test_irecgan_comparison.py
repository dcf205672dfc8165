"""The comparison's own arithmetic against exact values, and one log learned from with tiny sizes."""

from pathlib import Path

import pytest
import torch

from components.environments.irecgan_mdp import START, IRecGanMdp, StateSlatePolicy
from components.errors import InputError
from components.policies.slate_policy import OraclePolicy
from flows.benchmarks import Context, run
from flows.benchmarks._irecgan_comparison import DEFAULT, PUBLISHED, Sizes, _learned, judge, methods, sizes
from flows.config import LoopConfig


def context(*, quick: bool = False, full: bool = False) -> Context:
    return Context(quick=quick, full=full, seeds=None, path=None, kept=Path(), shared=Path())


@pytest.fixture
def mdp() -> IRecGanMdp:
    return IRecGanMdp(n_states=3, n_items=8, slate_size=2, seed=1, state_observed=False, reveal_truth=True)


def test_ranking_by_appeal_covers_all_and_returns_its_exact_value(mdp: IRecGanMdp) -> None:
    judged = judge("myopic", mdp, OraclePolicy(2), 20_000, ranks=(1, 2))

    exact = float(mdp.values_of(mdp.ranked_items()[:, :2])[START])
    assert judged["myopic.coverage_at_1"] == judged["myopic.coverage_at_2"] == 1.0
    assert judged["myopic.return"] == pytest.approx(exact, rel=0.05)


def test_coverage_counts_the_best_items_among_the_slates_first(mdp: IRecGanMdp) -> None:
    class SecondThenFirst(OraclePolicy):
        def act(self, state, requests, generator):  # type: ignore[no-untyped-def]
            choice = super().act(state, requests, generator)
            return choice._replace(slates=choice.slates.flip(1), places=choice.places.flip(1))

    best, middling = mdp.ranked_items()[:, :1], mdp.ranked_items()[:, 3:4]
    half = StateSlatePolicy(mdp, torch.cat([best, middling], dim=1))

    swapped = judge("swapped", mdp, SecondThenFirst(2), 500, ranks=(1, 2))
    halved = judge("halved", mdp, half, 4_000, ranks=(1, 2))

    assert swapped["swapped.coverage_at_1"] == 0.0
    assert swapped["swapped.coverage_at_2"] == 1.0
    # One of two items is right, in random order.
    assert halved["halved.coverage_at_2"] == pytest.approx(0.5)
    assert halved["halved.coverage_at_1"] == pytest.approx(0.5, abs=0.03)


def test_methods_differ_in_what_they_learn_from() -> None:
    by_name = methods(DEFAULT.config)

    generated = {name: config.reinforce.generated_weight > 0 for name, config in by_name.items()}
    assert generated == {"pg": False, "ac": False, "pgu": True, "irecgan": True}
    assert [name for name, config in by_name.items() if config.adversarial.rounds] == ["irecgan"]
    assert [name for name, config in by_name.items() if config.reinforce.critic == "td"] == ["ac"]


def test_sizes_are_valid_and_those_asked_for() -> None:
    assert sizes(context()) == DEFAULT
    assert sizes(context(full=True)) == PUBLISHED
    for chosen in (DEFAULT, PUBLISHED, sizes(context(quick=True))):
        LoopConfig.model_validate(chosen.config.model_dump())
    encoder, adversarial = PUBLISHED.config.encoder, PUBLISHED.config.adversarial
    assert (encoder.cell, encoder.hidden_width, encoder.item_width) == ("lstm", 512, 50)
    assert (adversarial.sessions, adversarial.step_sessions, adversarial.completions) == (1_000, 200, 5)
    assert DEFAULT.config.encoder.hidden_width == 128


def test_full_is_refused_where_there_are_no_larger_sizes_and_beside_quick() -> None:
    with pytest.raises(InputError, match="'storefront' has no larger sizes"):
        run("storefront", quick=False, full=True, seeds=None, path=None)
    with pytest.raises(InputError, match="exclude each other"):
        run("irecgan", quick=True, full=True, seeds=None, path=None)


@pytest.mark.slow
@pytest.mark.parametrize("log", ["random", "mix"])
def test_every_method_learns_from_a_log_of_the_mdp(log: str) -> None:
    quick = sizes(context(quick=True))

    judged = _learned(Sizes(quick.config, log_sessions=300, judged_sessions=100), log, seed=0)

    for method in ("lstm", *methods(quick.config)):
        assert 0.0 <= judged[f"{method}.coverage_at_1"] <= 1.0
        assert 0.0 < judged[f"{method}.coverage_at_10"] <= 1.0
        assert judged[f"{method}.return"] > 0.0
