import itertools
from collections import Counter
from pathlib import Path

import polars as pl
import pytest
import torch

from components.environments.irecgan_mdp import IRecGanMdp, write_mdp_log
from components.interactions.contract import Manifest
from components.interactions.covisitation import N_NEIGHBORS, Covisitation, count_covisitation, touched_items
from components.interactions.log_folder import Log
from components.interactions.vocabulary import PADDING, Vocabulary
from components.policies.slate_policy import UniformPolicy

APPLE, CHERRY, LEMON, PLUM, UNKNOWN = 2, 3, 4, 5, 1


@pytest.fixture
def covisitation(corner_log: Log) -> Covisitation:
    return count_covisitation(corner_log, Vocabulary.fit(corner_log))


def test_users_touch_the_items_of_their_events_and_then_those_that_they_click(
    corner_rows: pl.DataFrame, corner_manifest: Manifest
) -> None:
    touched = touched_items(corner_rows.lazy(), corner_manifest).collect()

    order = touched.sort("session_id", "step", "place", maintain_order=True)
    assert order["item_id"].to_list() == ["plum", "apple", "plum", "cherry", "lemon", "apple", "apple"]
    assert set(order["session_id"]) == {"s1"}


def test_neighbors_are_the_items_that_follow_within_a_session(covisitation: Covisitation) -> None:
    # plum → apple → plum → cherry → lemon → apple → apple
    def followers(item: int) -> list[int]:
        return [neighbor for neighbor in covisitation.neighbors[item].tolist() if neighbor != PADDING]

    assert followers(APPLE) == [APPLE, PLUM]
    assert sorted(followers(PLUM)) == [APPLE, CHERRY]
    assert followers(CHERRY) == [LEMON]
    assert followers(LEMON) == [APPLE]
    assert followers(UNKNOWN) == followers(PADDING) == []


def test_touches_are_views_and_clicks_and_not_displays(covisitation: Covisitation) -> None:
    touched = {APPLE: 3, PLUM: 2, CHERRY: 1, LEMON: 1}
    assert covisitation.touches.tolist() == [float(touched.get(item, 0)) for item in range(len(covisitation.touches))]


def test_weights_are_shares_shrunk_by_ten_pseudo_visits(covisitation: Covisitation) -> None:
    assert covisitation.weights[PLUM, :3].tolist() == pytest.approx([1 / 12, 1 / 12, 0.0])
    assert float(covisitation.weights[LEMON, 0]) == pytest.approx(1 / 11)
    assert not bool(covisitation.weights[covisitation.neighbors == PADDING].any())


def test_the_last_item_of_a_session_is_not_followed_by_the_next_session(
    storefront_log: Log, corner_log: Log, covisitation: Covisitation
) -> None:
    # Bob's plum and Ann's second visit touch nothing, so all seven touches of the corner shop give six pairs.
    visits = (covisitation.weights / (1 - covisitation.weights.sum(1, keepdim=True))).sum(1) * 10
    assert float(visits.sum()) == pytest.approx(6.0, abs=1e-4)


def test_the_most_frequent_followers_come_first(storefront_log: Log) -> None:
    vocabulary = Vocabulary.fit(storefront_log)

    covisitation = count_covisitation(storefront_log, vocabulary)

    assert covisitation.neighbors.shape == covisitation.weights.shape == (vocabulary.size, N_NEIGHBORS)
    assert bool((covisitation.weights.diff(dim=1) <= 0).all())
    assert bool((covisitation.weights.sum(1) < 1).all())


def test_listed_followers_are_those_more_frequent_than_any_that_is_not_listed(tmp_path: Path) -> None:
    mdp = IRecGanMdp(n_items=40, slate_size=10, seed=1, state_observed=False)
    log = write_mdp_log(mdp, UniformPolicy(10), n_sessions=800, max_steps=20, seed=0, loop="shop", out=tmp_path / "log")
    vocabulary = Vocabulary.fit(log)
    touched = touched_items(log.scan(), log.manifest).collect()
    order = touched.sort("session_id", "step", "place", maintain_order=True)
    followers: dict[str, Counter[str]] = {}
    for (_,), session in order.group_by("session_id", maintain_order=True):
        for item, following in set(itertools.pairwise(session["item_id"])):
            followers.setdefault(item, Counter())[following] += 1

    covisitation = count_covisitation(log, vocabulary)

    assert any(len(counts) > N_NEIGHBORS for counts in followers.values())
    for item, counts in followers.items():
        row = int(vocabulary.indices(pl.Series([item]))[0])
        unlisted = sorted(counts.values(), reverse=True)[N_NEIGHBORS:][:1] or [0]
        listed = [neighbor for neighbor in covisitation.neighbors[row].tolist() if neighbor != PADDING]
        assert set(vocabulary.ids(torch.tensor(listed))) == {name for name in counts if counts[name] > unlisted[0]}
        assert float(covisitation.unlisted[row]) == pytest.approx(unlisted[0] / (counts.total() + 10), rel=1e-5)


def test_counting_twice_gives_the_same_neighbors(storefront_log: Log) -> None:
    vocabulary = Vocabulary.fit(storefront_log)

    first, second = (count_covisitation(storefront_log, vocabulary) for _ in range(2))

    assert torch.equal(first.neighbors, second.neighbors)
    assert torch.equal(first.weights, second.weights)
