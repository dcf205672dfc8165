from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
from pydantic import ValidationError

from components.errors import InputError
from components.interactions.batching import SessionReader
from components.interactions.log_folder import Log, open_log, write_log
from components.interactions.splits import HOLDOUT, TEST, TRAIN, VALIDATION, SplitConfig, salted_share, split_log
from components.interactions.vocabulary import Vocabulary


@pytest.fixture
def splits(storefront_log: Log, tmp_path: Path) -> dict[str, Log]:
    return split_log(storefront_log, SplitConfig(), tmp_path / "splits", with_holdout=True)


def column(log: Log, name: str) -> set[str]:
    return set(log.scan().select(name).collect().to_series())


def starts(log: Log) -> pl.Series:
    return log.scan().group_by("session_id").agg(pl.col("timestamp").min()).collect()["timestamp"]


def test_every_request_goes_to_exactly_one_split(splits: dict[str, Log], storefront_log: Log) -> None:
    assert list(splits) == [TRAIN, VALIDATION, TEST, HOLDOUT]
    requests = [column(log, "request_id") for log in splits.values()]
    assert sum(len(names) for names in requests) == storefront_log.manifest.n_requests
    assert set().union(*requests) == column(storefront_log, "request_id")


def test_sessions_are_never_cut(splits: dict[str, Log], storefront_log: Log) -> None:
    whole = storefront_log.scan().group_by("session_id").len().collect()

    for log in splits.values():
        part = log.scan().group_by("session_id").len().collect()
        assert part.join(whole, on=["session_id", "len"]).height == part.height


def test_splits_follow_each_other_in_time(splits: dict[str, Log]) -> None:
    assert starts(splits[TRAIN]).max() <= starts(splits[VALIDATION]).min()
    assert starts(splits[VALIDATION]).max() <= starts(splits[TEST]).min()


def test_users_of_the_holdout_are_in_no_other_split(splits: dict[str, Log]) -> None:
    held_out = column(splits[HOLDOUT], "user_id")

    assert held_out
    for name in (TRAIN, VALIDATION, TEST):
        assert not held_out & column(splits[name], "user_id")


def test_split_sizes_are_about_the_shares_asked_for(splits: dict[str, Log]) -> None:
    sizes = {name: len(column(log, "session_id")) for name, log in splits.items()}

    kept = sizes[TRAIN] + sizes[VALIDATION] + sizes[TEST]
    assert sizes[HOLDOUT] / 400 == pytest.approx(0.2, abs=0.1)
    assert sizes[VALIDATION] / kept == pytest.approx(0.15, abs=0.05)
    assert sizes[TEST] / kept == pytest.approx(0.25, abs=0.05)


def test_without_a_holdout_all_users_are_split_by_time(storefront_log: Log, tmp_path: Path) -> None:
    splits = split_log(storefront_log, SplitConfig(), tmp_path / "splits", with_holdout=False)

    assert [len(column(log, "session_id")) for log in splits.values()] == [240, 60, 100]


def test_splits_are_logs_with_the_items_and_meaning_of_the_whole(splits: dict[str, Log], storefront_log: Log) -> None:
    for log in splits.values():
        opened = open_log(log.path)
        assert opened.manifest.reward == storefront_log.manifest.reward
        assert opened.items().equals(storefront_log.items())
        assert opened.manifest.n_requests == opened.scan().select(pl.len()).collect().item()


def test_the_same_log_and_salt_give_the_same_splits(
    splits: dict[str, Log], storefront_log: Log, tmp_path: Path
) -> None:
    again = split_log(storefront_log, SplitConfig(), tmp_path / "again", with_holdout=True)
    salted = split_log(storefront_log, SplitConfig(salt="other"), tmp_path / "salted", with_holdout=True)

    assert [log.manifest for log in again.values()] == [log.manifest for log in splits.values()]
    assert column(salted[HOLDOUT], "user_id") != column(splits[HOLDOUT], "user_id")


def test_how_a_log_is_cut_into_parts_does_not_change_its_splits(
    splits: dict[str, Log], storefront_log: Log, tmp_path: Path
) -> None:
    rows = storefront_log.scan().collect()
    late = pl.col("session_id") >= "session-0000200"
    cut = write_log(
        tmp_path / "cut", storefront_log.manifest, [rows.filter(late), rows.filter(~late)], storefront_log.items()
    )

    again = split_log(cut, SplitConfig(), tmp_path / "again", with_holdout=True)

    assert [log.manifest.content_digest for log in again.values()] == [
        log.manifest.content_digest for log in splits.values()
    ]


def test_splits_of_a_log_whose_parts_follow_each_other_in_time_hold_no_empty_part(
    storefront_log: Log, tmp_path: Path
) -> None:
    rows = storefront_log.scan().sort("timestamp").collect()
    order = rows["session_id"].unique(maintain_order=True)
    parts = [
        rows.filter(pl.col("session_id").is_in(order[start : start + 40].implode())) for start in range(0, 400, 40)
    ]
    whole = write_log(tmp_path / "whole", storefront_log.manifest, parts, storefront_log.items())
    splits = split_log(whole, SplitConfig(), tmp_path / "splits", with_holdout=False)
    assert len(splits[TEST].part_paths) < len(whole.part_paths) == 10
    for log in splits.values():
        assert all(part.height for part in log.parts())
        assert sum(batch.mask.sum() for batch in SessionReader(log, Vocabulary.fit(log)).batches(50)) > 0


def test_a_log_without_times_is_split_by_its_sessions_names(storefront_log: Log, tmp_path: Path) -> None:
    manifest = storefront_log.manifest.model_copy(update={"has_times": False})
    rows = storefront_log.scan().collect().with_columns(timestamp=None, available_at=None)
    untimed = write_log(tmp_path / "untimed", manifest, [rows], storefront_log.items())

    splits = split_log(untimed, SplitConfig(), tmp_path / "splits", with_holdout=False)

    sessions = {name: column(log, "session_id") for name, log in splits.items()}
    assert sum(len(names) for names in sessions.values()) == 400
    assert len(sessions[TRAIN]) / 400 == pytest.approx(0.6, abs=0.08)
    assert max(sessions[TRAIN]) > min(sessions[TEST]), "the split follows the sessions' order"


def test_the_candidate_table_goes_with_every_split(
    write_corner: Callable[..., Log], corner_rows: pl.DataFrame, corner_candidates: pl.DataFrame, tmp_path: Path
) -> None:
    config = SplitConfig(validation_share=0.3, test_share=0.3)

    splits = split_log(write_corner(corner_rows), config, tmp_path / "splits", with_holdout=False)

    assert {name: column(log, "session_id") for name, log in splits.items()} == {
        TRAIN: {"s2"},
        VALIDATION: {"s1"},
        TEST: {"s3"},
    }
    for log in splits.values():
        assert log.candidate_table().equals(corner_candidates)


def test_a_log_too_small_to_split_is_refused_with_the_split(
    write_corner: Callable[..., Log], corner_rows: pl.DataFrame, tmp_path: Path
) -> None:
    log = write_corner(corner_rows.filter(pl.col("session_id") == "s1"))

    with pytest.raises(InputError, match=r"corner: the \w+ split holds no session; the log has 1 sessions"):
        split_log(log, SplitConfig(), tmp_path / "splits", with_holdout=False)


@pytest.mark.parametrize("changes", [{"test_share": 0.0}, {"holdout_share": 0.6}, {"share": 0.1}])
def test_shares_out_of_bounds_and_unknown_keys_are_refused(changes: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match=next(iter(changes))):
        SplitConfig(**changes)


def test_salted_shares_are_even_stable_and_depend_on_the_salt() -> None:
    names = pl.Series([f"user-{number}" for number in range(4_000)])

    shares = salted_share(names, "a")

    assert shares.min() >= 0.0
    assert shares.max() < 1.0
    assert (shares < 0.2).mean() == pytest.approx(0.2, abs=0.03)
    assert salted_share(names.reverse(), "a").reverse().to_list() == shares.to_list()
    assert salted_share(names, "b").to_list() != shares.to_list()
    # blake2b("a:user-0"), its first 8 bytes as a fraction: other machines and versions must agree on it.
    assert shares[0] == 0.21394813869132456
