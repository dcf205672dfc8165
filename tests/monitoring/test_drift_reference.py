import math
from pathlib import Path

import polars as pl
import pytest

from components.errors import InputError
from components.interactions.contract import Evidence, Feature, Manifest, RatioAssumption
from components.interactions.log_folder import Log, write_log
from components.interactions.vocabulary import FeatureCode, Vocabulary
from monitoring import drift_reference
from monitoring.drift_reference import (
    DriftSummary,
    ReferenceDescription,
    derived_scalars,
    drift_report,
    forget_in_reference,
    write_drift_reference,
)

HOUR = Feature(name="hour", kind="numeric")
DEVICE = Feature(name="device", kind="categorical", values=("desktop", "phone"))
CATEGORY = Feature(name="category", kind="categorical", values=("books", "toys"))
VOCABULARY = Vocabulary(
    item_ids=("a", "b", "c"),
    item_counts=(0, 3, 8),
    item_codes=(FeatureCode(feature=CATEGORY),),
    context_codes=(FeatureCode(feature=HOUR), FeatureCode(feature=DEVICE)),
)
ITEMS = pl.DataFrame({"item_id": ["a", "b", "c"], "category": ["books", "toys", None]})


def manifest(evidence: Evidence) -> Manifest:
    return Manifest(
        loop="shop",
        source="storefront",
        evidence=evidence,
        ratio_assumption=RatioAssumption.CASCADE,
        responses="per_position",
        slate_size=0 if evidence is Evidence.CLICKS else 2,
        context=(HOUR, DEVICE),
        item_features=(CATEGORY,),
        signals=() if evidence is Evidence.CLICKS else ("watch_time",),
    )


def rows(evidence: Evidence) -> pl.DataFrame:
    request = {
        "step": 1,
        "candidates": ["a", "b", "c"],
        "slate": ["b", "unheard-of"],
        "slate_log_prob": -1.5,
        "clicked": [True, None],
        "purchased": [True, False],
        "signals.watch_time": [2.0, 4.0],
        "events": [{"type": "view", "item_id": "a"}, {"type": "view", "item_id": "b"}],
        "context": {"hour": 9.0, "device": "a-fridge"},
    }
    return pl.DataFrame([request, {"step": 2}], schema=manifest(evidence).schema())


def test_the_scalars_of_a_request_are_the_ones_done_by_hand() -> None:
    scalars = derived_scalars(rows(Evidence.PROPENSITIES), manifest(Evidence.PROPENSITIES), VOCABULARY, ITEMS)
    assert scalars.row(0, named=True) == {
        "step": 1.0,
        "n_events": 2.0,
        "event_log_popularity": pytest.approx(math.log(4) / 2),
        "n_candidates": 3.0,
        "slate_log_popularity": pytest.approx(math.log(4) / 2),
        "click_rate": 1.0,
        "reward": 4.0,
        "slate_log_prob": -1.5,
        "purchase_rate": 0.5,
        "signal.watch_time": 3.0,
        "context.hour": 9.0,
        "context.device": "(other)",
        "first_item.category": "toys",
    }


def test_what_a_request_does_not_have_is_null() -> None:
    scalars = derived_scalars(rows(Evidence.PROPENSITIES), manifest(Evidence.PROPENSITIES), VOCABULARY, ITEMS)
    known = {name: value for name, value in scalars.row(1, named=True).items() if value is not None}
    assert known == {"step": 2.0, "n_events": 0.0}


def test_a_log_without_slates_has_the_scalars_of_its_events() -> None:
    scalars = derived_scalars(rows(Evidence.CLICKS), manifest(Evidence.CLICKS), VOCABULARY, ITEMS)
    assert scalars.columns == [
        "step",
        "n_events",
        "event_log_popularity",
        "context.hour",
        "context.device",
        "last_event.category",
    ]
    assert scalars["last_event.category"].to_list() == ["toys", None]


def test_a_log_without_propensities_has_no_log_prob() -> None:
    scalars = derived_scalars(rows(Evidence.SLATES), manifest(Evidence.SLATES), VOCABULARY, ITEMS)
    assert "slate_log_prob" not in scalars.columns


def test_the_reference_is_a_sample_that_its_seed_decides(
    storefront_log: Log, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drift_reference, "MAX_REFERENCE_ROWS", 100)
    vocabulary = Vocabulary.fit(storefront_log)
    paths = [
        write_drift_reference(storefront_log, vocabulary, tmp_path / name, seed)
        for name, seed in (("first", 1), ("again", 1), ("other", 2))
    ]
    first, again, other = (pl.read_parquet(path) for path in paths)
    assert first.height == 100
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert first.equals(again)
    assert not first.equals(other)
    description = ReferenceDescription.model_validate_json((tmp_path / "first/drift_reference.json").read_bytes())
    assert list(description.columns) == first.columns
    assert description.columns["context.device"] == "categorical"
    assert (description.n_rows, description.n_requests) == (100, storefront_log.manifest.n_requests)


def test_a_user_s_rows_can_be_deleted_from_a_reference(storefront_log: Log, tmp_path: Path) -> None:
    folder = tmp_path / "reference"
    path = write_drift_reference(storefront_log, Vocabulary.fit(storefront_log), folder, seed=0)
    before, users = pl.read_parquet(path), pl.concat(storefront_log.parts())["user_id"]
    gone = users.is_in([users[0], users[-1]])
    assert forget_in_reference(folder, [users[0], users[-1], "nobody"]) == gone.sum() > 0
    assert pl.read_parquet(path).equals(before.filter(~gone))
    description = ReferenceDescription.model_validate_json((folder / "drift_reference.json").read_bytes())
    assert description.n_rows == before.height - gone.sum()
    assert forget_in_reference(folder, [users[0]]) == 0
    assert [file.name for file in tmp_path.iterdir()] == ["reference"]
    # Nobody can be found in it by the id that logs hold.
    assert not any(users[1].encode() in str(pl.read_parquet(file).rows()).encode() for file in folder.glob("*.parquet"))


def test_a_small_log_is_its_own_reference_whatever_its_parts(storefront_log: Log, tmp_path: Path) -> None:
    rows = next(storefront_log.parts())
    sessions = rows["session_id"].unique().sort()
    halves = [rows.filter(pl.col("session_id") < sessions[200]), rows.filter(pl.col("session_id") >= sessions[200])]
    in_parts = write_log(tmp_path / "parts", storefront_log.manifest, halves, storefront_log.items())
    vocabulary = Vocabulary.fit(storefront_log)
    whole, parts = (
        pl.read_parquet(write_drift_reference(log, vocabulary, tmp_path / name, seed=0))
        for name, log in (("whole", storefront_log), ("halves", in_parts))
    )
    assert whole.height == rows.height
    assert whole.equals(parts)


@pytest.fixture(autouse=True)
def no_telemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DO_NOT_TRACK", "1")


@pytest.fixture(scope="module")
def halves(storefront_log: Log) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Scalars of two halves of the shop's requests, drawn at random."""
    rows = next(storefront_log.parts())
    scalars = derived_scalars(
        rows, storefront_log.manifest, Vocabulary.fit(storefront_log), storefront_log.items()
    ).sample(fraction=1.0, shuffle=True, seed=0)
    half = scalars.height // 2
    return scalars[:half], scalars[half:]


def test_traffic_of_the_same_kind_has_not_drifted(halves: tuple[pl.DataFrame, pl.DataFrame], tmp_path: Path) -> None:
    summary = drift_report(*halves, tmp_path)
    assert summary.drifted == ()
    assert summary.drifted_share == 0
    # The shop's users do nothing on their own, so there is no popularity of it to compare.
    assert {column.column for column in summary.columns} == set(halves[0].columns) - {"event_log_popularity"}


def test_what_shifted_is_named(halves: tuple[pl.DataFrame, pl.DataFrame], tmp_path: Path) -> None:
    reference, current = halves
    summary = drift_report(
        reference,
        current.with_columns(
            pl.col("slate_log_popularity") + 1.0,
            pl.lit("(other)").alias("context.device"),
            pl.lit(None, dtype=pl.Float64).alias("purchase_rate"),
        ),
        tmp_path,
    )
    assert set(summary.drifted) == {"slate_log_popularity", "context.device", "purchase_rate"}
    scores = {column.column: column.score for column in summary.columns}
    assert scores["slate_log_popularity"] is not None and scores["slate_log_popularity"] > 0.5
    assert scores["purchase_rate"] is None
    assert summary.drifted_share == pytest.approx(3 / len(summary.columns))
    assert DriftSummary.model_validate_json((tmp_path / "drift.json").read_bytes()) == summary
    assert "<html" in (tmp_path / "drift.html").read_text()[:2000].lower()


def test_frames_that_cannot_be_compared_are_refused(halves: tuple[pl.DataFrame, pl.DataFrame], tmp_path: Path) -> None:
    reference, current = halves
    with pytest.raises(InputError, match="expected the reference's"):
        drift_report(reference, current.drop("reward"), tmp_path)
    with pytest.raises(InputError, match="0 current requests"):
        drift_report(reference, current.clear(), tmp_path)
