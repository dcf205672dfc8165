import math
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.parquet as pq
import pytest

from components.errors import ContractError, InputError, TooManyBadRowsError
from components.interactions.contract import Evidence, Manifest
from components.interactions.log_folder import Log, open_log
from components.validation.checks import DataChecks, ValidationConfig, validate
from components.validation.rules import SESSION_OF_A_BAD_ROW

Row = dict[str, Any]
AS_OF = datetime(2025, 1, 1, tzinfo=UTC)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def written(out: Path) -> DataChecks:
    """What validation left in the folder, whether or not it raised."""
    assert (out / "data_docs" / "index.html").is_file()
    assert "reasons" in pl.read_parquet_schema(out / "quarantine" / "rows.parquet")
    return DataChecks.model_validate_json((out / "checks.json").read_bytes())


def failures(checks: DataChecks, severity: str = "error") -> set[str]:
    return {result.metric for result in checks.expectations if not result.success and result.severity == severity}


def test_a_valid_log_passes_whole(rows: list[Row], save: Callable[..., Log], out: Path) -> None:
    log = save(rows)

    checks = validate(log, ValidationConfig(), out, AS_OF)

    assert checks.passed and checks.n_quarantined == 0
    assert (checks.n_requests, checks.n_sessions, checks.n_users, checks.n_items) == (180, 60, 30, 20)
    assert checks == written(out)
    assert open_log(out / "log").manifest.content_digest == log.manifest.content_digest
    assert pl.read_parquet(out / "quarantine" / "rows.parquet").is_empty()
    assert {path.name for path in out.iterdir()} == {"log", "quarantine", "data_docs", "checks.json"}


def test_the_data_docs_speak_in_sentences(rows: list[Row], save: Callable[..., Log], out: Path) -> None:
    validate(save(rows), ValidationConfig(), out)

    (page,) = (out / "data_docs" / "validations").rglob("*.html")
    assert "Rows keep slate_repeats_an_item: each item at most once: at most 0.01 (error)" in page.read_text()


def test_the_profile_counts_what_the_rows_hold(
    rows: list[Row], manifest: Manifest, save: Callable[..., Log], out: Path
) -> None:
    for row in rows:
        row |= {"clicked": [True, False, None], "purchased": [False, False, None]}
        row["slate_log_prob"] = -math.log(8 * 7 * 6)
    rows[0]["clicked"] = None

    numbers = validate(save(rows), ValidationConfig(), out).profile

    assert numbers["click_rate"] == 0.5
    assert numbers["purchase_rate"] == 0.0
    assert numbers["mean_slate_length"] == numbers["mean_session_length"] == 3.0
    assert numbers["mean_candidates"] == 8.0
    assert numbers["mean_propensity"] == pytest.approx(1 / 336)
    assert numbers["mean_uniform_weight"] == pytest.approx(1.0)
    assert numbers["log_prob_over_uniform"] == pytest.approx(0.0, abs=1e-12)
    assert numbers["null_share.clicked"] == pytest.approx(1 / 180)
    assert numbers["share_with_log_prob"] == 1.0
    assert numbers["share_of_sessions_left"] == 1.0


def test_below_the_limit_bad_rows_are_put_aside_and_the_run_goes_on(
    rows: list[Row], save: Callable[..., Log], out: Path
) -> None:
    rows[31]["slate_log_prob"] = float("nan")

    checks = validate(save(rows), ValidationConfig(), out)

    quarantined = pl.read_parquet(out / "quarantine" / "rows.parquet")
    assert quarantined["request_id"].to_list() == ["s10-0", "s10-1", "s10-2"]
    assert checks.passed and checks.n_bad == 1 and checks.n_quarantined == 3
    assert checks.quarantine_reasons == {SESSION_OF_A_BAD_ROW: 2, "slate_log_prob_invalid": 1}
    assert open_log(out / "log").manifest.n_requests == 177
    assert checks == written(out)


def test_above_the_limit_nothing_may_be_trained_and_the_evidence_is_there(
    rows: list[Row], save: Callable[..., Log], out: Path
) -> None:
    for row in rows[30:40]:
        row["slate"] = [row["slate"][0]] * 3
    rows[31]["slate_log_prob"] = 0.25

    with pytest.raises(TooManyBadRowsError) as error:
        validate(save(rows), ValidationConfig(), out)

    text = str(error.value)
    assert "10 of 180 rows (5.56%) are bad; max_quarantined_share allows 1.00%" in text
    assert "slate_repeats_an_item: 10 rows, such as request 's10-0': slate = ['item-" in text
    assert "request 's10-1': slate_log_prob = 0.25; expected a finite slate_log_prob, not above 0" in text
    checks = written(out)
    assert not checks.passed and failures(checks) == {"bad_share", "bad_share.slate_repeats_an_item"}
    assert not (out / "log").exists()


def test_a_log_of_bad_rows_only_is_refused(rows: list[Row], save: Callable[..., Log], out: Path) -> None:
    with pytest.raises(TooManyBadRowsError, match="after_as_of: 180 rows"):
        validate(save(rows), ValidationConfig(), out, datetime(2024, 1, 1, tzinfo=UTC))

    assert written(out).profile == {"item_ids_alike": 0.0}


def test_log_probs_that_are_all_zero_are_refused(rows: list[Row], save: Callable[..., Log], out: Path) -> None:
    for row in rows:
        row["slate_log_prob"] = 0.0

    with pytest.raises(InputError, match="slate_log_prob is not 0 wherever there was a choice"):
        validate(save(rows), ValidationConfig(), out)

    assert failures(written(out)) == {"share_of_certain_slates"}


def test_log_probs_may_be_zero_where_there_was_no_choice(rows: list[Row], save: Callable[..., Log], out: Path) -> None:
    for row in rows:
        row |= {"candidates": ["item-01"], "candidates_digest": None, "slate": ["item-01"], "slate_log_prob": 0.0}
        row |= {"clicked": [row["step"] == 0], "purchased": [False], "signals.watch_time": [0.0]}

    assert validate(save(rows), ValidationConfig(), out).passed


def test_slates_without_candidates_are_bad_rows(rows: list[Row], save: Callable[..., Log], out: Path) -> None:
    for row in rows:
        row |= {"candidates": None, "candidates_digest": None}

    with pytest.raises(TooManyBadRowsError, match="candidates_are_missing: 180 rows"):
        validate(save(rows), ValidationConfig(), out)


def test_a_constant_reward_is_a_warning(rows: list[Row], save: Callable[..., Log], out: Path) -> None:
    for row in rows:
        row |= {"clicked": [False] * 3, "purchased": [False] * 3}

    checks = validate(save(rows), ValidationConfig(), out)

    assert checks.passed and failures(checks, "warning") == {"click_rate", "reward_range"}


def test_a_click_log_is_asked_nothing_about_slates(
    rows: list[Row], manifest: Manifest, save: Callable[..., Log], out: Path
) -> None:
    columns = ("candidates", "candidates_digest", "slate", "slate_log_prob", "clicked", "purchased")
    clicks = [row | dict.fromkeys((*columns, "signals.watch_time")) for row in rows]
    log = save(clicks, manifest.model_copy(update={"evidence": Evidence.CLICKS, "slate_size": 0}))

    checks = validate(log, ValidationConfig(), out)

    assert checks.passed and "click_rate" not in checks.profile
    assert failures(checks, "warning") == set()


@pytest.mark.parametrize(
    ("break_log", "metric"),
    [
        (lambda log: log.part_paths[1].unlink(), "requests_off_manifest"),
        (
            lambda log: pl.concat([log.items(), log.items().head(1)]).write_parquet(log.path / "items.parquet"),
            "item_rows_without_own_id",
        ),
    ],
)
def test_a_log_that_does_not_hold_together_is_refused(
    break_log: Callable[[Log], None], metric: str, rows: list[Row], save: Callable[..., Log], out: Path
) -> None:
    log = save(rows)
    break_log(log)

    with pytest.raises(InputError, match=metric):
        validate(log, ValidationConfig(min_requests=50), out)

    assert failures(written(out)) == {metric}


def test_too_small_and_empty_logs_are_refused(rows: list[Row], save: Callable[..., Log], out: Path) -> None:
    log = save(rows[:30])
    for part in log.part_paths:
        pl.read_parquet(part).clear().write_parquet(part)

    with pytest.raises(InputError, match="accepted_requests is 0, expected at least 100"):
        validate(log, ValidationConfig(), out)

    assert failures(written(out)) == {"accepted_requests", "accepted_sessions", "users", "requests_off_manifest"}


def test_feedback_that_is_mostly_unknown_is_refused(rows: list[Row], save: Callable[..., Log], out: Path) -> None:
    for row in rows[10:]:
        row["clicked"] = None

    with pytest.raises(InputError, match="clicked is mostly known"):
        validate(save(rows), ValidationConfig(), out)


def test_as_of_needs_a_time_zone(rows: list[Row], save: Callable[..., Log], out: Path) -> None:
    with pytest.raises(InputError, match="has no time zone"):
        validate(save(rows), ValidationConfig(), out, datetime(2024, 1, 1))


def test_every_expectation_is_in_the_documentation(storefront_log: Log, out: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "validation.md").read_text()

    metrics = {result.metric for result in validate(storefront_log, ValidationConfig(), out).expectations}

    assert {"steadiness.clicked", "mean_uniform_weight", "unknown_share.items.category"} <= metrics
    assert [metric for metric in metrics if f"`{metric.split('.')[0]}" not in page] == []


def test_credible_times_need_some_between_them() -> None:
    with pytest.raises(ValueError, match=r"earliest = 2100-01-01T00:00:00.*expected it to be later"):
        ValidationConfig(earliest=datetime(2100, 1, 1, tzinfo=UTC))


def test_an_unreadable_later_part_leaves_nothing_behind(rows: list[Row], save: Callable[..., Log], out: Path) -> None:
    rows[31]["slate_log_prob"] = float("nan")
    log = save(rows)
    part = log.part_paths[1]
    group = pq.ParquetFile(part).metadata.row_group(0)
    # A column that no lookup reads: the first part is judged before anybody notices.
    clicked = next(chunk for chunk in map(group.column, range(group.num_columns)) if "clicked" in chunk.path_in_schema)
    whole = bytearray(part.read_bytes())
    whole[clicked.data_page_offset : clicked.data_page_offset + 8] = bytes(8)
    part.write_bytes(whole)

    with pytest.raises(ContractError, match=r"part-00001.parquet: not readable as Parquet"):
        validate(log, ValidationConfig(), out)

    assert list(out.iterdir()) == []


def test_an_unreadable_part_is_named(rows: list[Row], save: Callable[..., Log], out: Path) -> None:
    log = save(rows)
    part = log.part_paths[0]
    whole = part.read_bytes()
    part.write_bytes(whole[:4] + bytes(len(whole) // 2) + whole[4 + len(whole) // 2 :])

    with pytest.raises(ContractError, match=r"part-00000.parquet: not readable as Parquet"):
        validate(log, ValidationConfig(), out)
