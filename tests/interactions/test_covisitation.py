import polars as pl
import pytest
import torch

from components.interactions.contract import Manifest
from components.interactions.covisitation import N_NEIGHBORS, Covisitation, count_covisitation, touched_items
from components.interactions.log_folder import Log
from components.interactions.vocabulary import PADDING, Vocabulary

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


def test_counting_twice_gives_the_same_neighbors(storefront_log: Log) -> None:
    vocabulary = Vocabulary.fit(storefront_log)

    first, second = (count_covisitation(storefront_log, vocabulary) for _ in range(2))

    assert torch.equal(first.neighbors, second.neighbors)
    assert torch.equal(first.weights, second.weights)
