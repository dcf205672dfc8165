import polars as pl
import pytest
from pydantic import ValidationError

from components.interactions.contract import (
    CONTRACT_VERSION,
    Evidence,
    Feature,
    Manifest,
    RatioAssumption,
    Reward,
    reward_per_position,
)


def manifest(**changes) -> Manifest:
    return Manifest.model_validate(
        {
            "loop": "shop",
            "source": "test",
            "evidence": Evidence.SLATES,
            "ratio_assumption": RatioAssumption.FULL_SLATE,
            "responses": "per_position",
            "slate_size": 3,
        }
        | changes
    )


def test_a_manifest_read_back_from_json_is_the_same(corner_manifest: Manifest) -> None:
    assert Manifest.model_validate_json(corner_manifest.model_dump_json()) == corner_manifest
    assert corner_manifest.contract_version == CONTRACT_VERSION


def test_columns_follow_what_the_manifest_names(corner_manifest: Manifest) -> None:
    schema = corner_manifest.schema()

    assert schema["signals.watch_time"] == pl.List(pl.Float32)
    assert schema["request_signals"] == pl.Struct({"scrolled": pl.Float32})
    assert schema["context"] == pl.Struct({"hour": pl.Float32, "device": pl.String})
    assert corner_manifest.item_schema() == {"item_id": pl.String, "price": pl.Float32, "color": pl.String}
    assert not {"context", "request_signals"} & set(manifest().schema())


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"slatesize": 3}, "slatesize"),
        ({"loop": "my shop"}, "loop"),
        ({"evidence": "hope"}, "evidence"),
        ({"slate_size": -1}, "slate_size"),
        ({"slate_size": 0}, "slate_size: 0 does not fit evidence 'slates'"),
        ({"evidence": "clicks"}, "slate_size: 3 does not fit evidence 'clicks'"),
        ({"reward": {"weights": {"liked": 1.0}}}, r"reward.weights: \['liked'\] are no signals"),
    ],
)
def test_a_manifest_that_cannot_be_true_is_refused_with_the_key(changes: dict, named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        manifest(**changes)


def test_a_log_of_clicks_has_no_slates() -> None:
    assert manifest(evidence="clicks", slate_size=0).slate_size == 0


def test_a_manifest_does_not_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        manifest().loop = "other"


def rewards(weights: dict[str, float], **columns) -> list[list[float] | None]:
    schema = {"clicked": pl.List(pl.Boolean), "purchased": pl.List(pl.Boolean), "signals.like": pl.List(pl.Float32)}
    height = max(len(values) for values in columns.values())
    names = {"clicked": "clicked", "purchased": "purchased", "like": "signals.like"}
    frame = pl.DataFrame(
        {names[name]: columns.get(name, [None] * height) for name in names},
        schema=schema,
    )
    meaning = manifest(signals=("like",), reward=Reward(weights=weights))
    return frame.select(reward_per_position(meaning))["reward"].to_list()


def test_rewards_weigh_each_position_s_feedback() -> None:
    weights = {"clicked": 1.0, "purchased": 3.0, "like": 0.5}

    assert rewards(
        weights, clicked=[[True, False, True]], purchased=[[True, False, False]], like=[[0.0, 0.0, 2.0]]
    ) == [[4.0, 0.0, 2.0]]


def test_an_unknown_position_counts_as_no_feedback() -> None:
    assert rewards({"clicked": 1.0, "purchased": 3.0}, clicked=[[None, True]], purchased=[[True, None]]) == [[3.0, 1.0]]


def test_clicks_count_where_purchases_are_wholly_unknown() -> None:
    weights = {"purchased": 3.0, "clicked": 1.0}

    assert rewards(weights, clicked=[[True, False], None], purchased=[None, [False, True]]) == [[1.0, 0.0], [0.0, 3.0]]


def test_a_request_without_any_known_feedback_has_no_reward() -> None:
    assert rewards({"clicked": 1.0, "purchased": 3.0}, clicked=[None], purchased=[None]) == [None]


def test_numeric_features_are_floats_and_categorical_ones_are_strings() -> None:
    assert Feature(name="hour", kind="numeric").dtype == pl.Float32
    assert Feature(name="device", kind="categorical", values=("phone",)).dtype == pl.String
