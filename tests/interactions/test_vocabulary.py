import math
from collections.abc import Callable

import polars as pl
import pytest
import torch
from pydantic import ValidationError

from components.interactions.contract import Feature
from components.interactions.log_folder import Log
from components.interactions.vocabulary import FIRST_ITEM, PADDING, UNKNOWN, FeatureCode, Vocabulary, codes_of


@pytest.fixture
def vocabulary(corner_log: Log) -> Vocabulary:
    return Vocabulary.fit(corner_log)


def test_items_follow_padding_and_unknown_in_the_order_of_their_ids(vocabulary: Vocabulary) -> None:
    assert (PADDING, UNKNOWN, FIRST_ITEM) == (0, 1, 2)
    assert vocabulary.item_ids == ("apple", "cherry", "lemon", "plum")
    assert vocabulary.size == 6
    assert vocabulary.indices(pl.Series(["plum", "apple"])).tolist() == [5, 2]


def test_ids_that_it_does_not_know_share_the_unknown_index(vocabulary: Vocabulary) -> None:
    assert vocabulary.indices(pl.Series(["dragonfruit", None, "cherry"])).tolist() == [UNKNOWN, UNKNOWN, 3]
    assert vocabulary.indices(pl.Series([], dtype=pl.String)).tolist() == []


def test_indices_name_their_ids(vocabulary: Vocabulary) -> None:
    assert vocabulary.ids(torch.tensor([4, 2])) == ["lemon", "apple"]


def test_counts_are_of_items_shown_or_seen(vocabulary: Vocabulary) -> None:
    # apple: three slates and an event; cherry: two slates; lemon: an event; plum: two slates and an event.
    assert vocabulary.item_counts == (4, 2, 1, 3)
    assert vocabulary.counts().tolist() == [0.0, 0.0, 4.0, 2.0, 1.0, 3.0]


def test_an_item_that_training_never_saw_is_cold(write_corner: Callable[..., Log], corner_rows: pl.DataFrame) -> None:
    vocabulary = Vocabulary.fit(write_corner(corner_rows.filter(pl.col("session_id") == "s2")))

    assert dict(zip(vocabulary.item_ids, vocabulary.item_counts, strict=True)) == {
        "apple": 0,
        "cherry": 0,
        "lemon": 0,
        "plum": 1,
    }


def test_item_features_are_standardised_or_one_hot(vocabulary: Vocabulary, corner_items: pl.DataFrame) -> None:
    features = vocabulary.item_features(corner_items)

    # Prices 1, 3 and 4: mean 8/3, deviation √(7/3); colors blue, red, yellow.
    scale = math.sqrt(7 / 3)
    assert features.shape == (6, 4)
    assert features[:2].tolist() == [[0.0] * 4] * 2
    assert features[:, 0].tolist() == pytest.approx(
        [0, 0, (1 - 8 / 3) / scale, (3 - 8 / 3) / scale, 0, (4 - 8 / 3) / scale], abs=1e-6
    )
    assert features[2:, 1:].tolist() == [[0, 1, 0], [0, 1, 0], [0, 0, 1], [1, 0, 0]]


def test_items_that_a_table_leaves_out_have_no_features(vocabulary: Vocabulary, corner_items: pl.DataFrame) -> None:
    features = vocabulary.item_features(corner_items.filter(pl.col("item_id") == "plum"))

    assert not bool(features[:5].any())
    assert bool(features[5].any())


def test_context_features_that_are_absent_become_zeros(vocabulary: Vocabulary) -> None:
    encoded = vocabulary.encode_context(pl.DataFrame({"device": ["tablet", "watch"]}))

    assert vocabulary.context_width == 3
    assert encoded.tolist() == [[0, 0, 1], [0, 0, 0]]


def test_missing_numbers_become_the_mean() -> None:
    code = FeatureCode.fit(Feature(name="price", kind="numeric"), pl.Series([1.0, 3.0, None, math.nan]))

    assert code.mean == 2.0
    assert code.scale == pytest.approx(math.sqrt(2))
    assert code.encode(pl.Series([None, math.nan, 2.0, 3.0]))[:, 0].tolist() == pytest.approx(
        [0.0, 0.0, 0.0, 1 / math.sqrt(2)]
    )


@pytest.mark.parametrize("values", [[], [5.0], [5.0, 5.0]])
def test_a_feature_that_does_not_vary_is_left_in_its_own_unit(values: list[float]) -> None:
    code = FeatureCode.fit(Feature(name="price", kind="numeric"), pl.Series(values, dtype=pl.Float64))

    assert code.scale == 1.0


def test_the_most_frequent_values_of_a_category_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("components.interactions.vocabulary.MAX_CATEGORIES", 2)

    code = FeatureCode.fit(Feature(name="color", kind="categorical"), pl.Series(["z", "b", "a", "z", "b", None]))

    assert code.feature.values == ("b", "z")
    assert code.encode(pl.Series(["z", "a", None])).tolist() == [[0, 1], [0, 0], [0, 0]]


def test_of_too_many_named_values_the_most_frequent_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("components.interactions.vocabulary.MAX_CATEGORIES", 2)
    brands = Feature(name="brand", kind="categorical", values=("a", "b", "c", "d"))

    code = FeatureCode.fit(brands, pl.Series(["d", "b", "d", "c", "c", None]))

    assert code.feature.values == ("c", "d")


def test_values_that_the_manifest_names_are_kept_as_they_are(vocabulary: Vocabulary) -> None:
    assert vocabulary.context_codes[1].feature.values == ("phone", "tablet")


def test_codes_are_places_among_the_names() -> None:
    assert codes_of(pl.Series(["b", None, "q", "a"]), ("a", "b")).tolist() == [1, -1, -1, 0]
    assert codes_of(pl.Series(["b"]), ()).tolist() == [-1]


def test_a_vocabulary_read_back_from_json_is_the_same(vocabulary: Vocabulary) -> None:
    assert Vocabulary.model_validate_json(vocabulary.model_dump_json()) == vocabulary


def test_unknown_keys_are_refused() -> None:
    with pytest.raises(ValidationError, match="items"):
        Vocabulary.model_validate({"item_ids": (), "item_counts": (), "items": ()})


def test_the_storefront_s_indices_are_those_of_its_vocabulary(storefront_log: Log) -> None:
    vocabulary = Vocabulary.fit(storefront_log)

    assert vocabulary.indices(pl.Series(["item-0000", "item-0059"])).tolist() == [2, 61]
    assert sum(vocabulary.item_counts) == storefront_log.manifest.n_requests * 4
