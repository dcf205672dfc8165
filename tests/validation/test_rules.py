from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from components.interactions.contract import Evidence, Manifest
from components.interactions.log_folder import Log
from components.validation.rules import SESSION_OF_A_BAD_ROW, judge, look_up, row_rules

Row = dict[str, Any]
ITEMS = [f"item-{number:02d}" for number in range(20)]
AS_OF = datetime(2025, 1, 1, tzinfo=UTC)
START = datetime(1990, 1, 1, tzinfo=UTC)
AN_HOUR = timedelta(hours=1)
#: Request s10-1 stands in the middle of a session that writes its candidates out, s11-1 of one that names a digest.
INLINE, LISTED = 31, 34


def broken(
    log: Log, as_of: datetime | None = AS_OF, credible: tuple[datetime, datetime] | None = None
) -> dict[str, set[str]]:
    """Request id -> the rules that its row breaks, for all rows that are bad themselves."""
    lookups = look_up(log)
    rules = row_rules(log.manifest, lookups, as_of, credible)
    found: dict[str, set[str]] = {}
    for part in log.parts():
        for row in judge(part, rules, lookups).quarantined.iter_rows(named=True):
            found[row["request_id"]] = set(row["reasons"])
    return {request: reasons for request, reasons in found.items() if reasons != {SESSION_OF_A_BAD_ROW}}


def test_a_valid_log_breaks_no_rule(rows: list[Row], save: Callable[..., Log]) -> None:
    assert broken(save(rows)) == {}


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"policy": ""}, "required_is_empty"),
        ({"policy": None}, "required_is_empty"),
        ({"loop": "another"}, "other_loop"),
        ({"session_end": "left"}, "session_end_too_early"),
        ({"timestamp": None}, "timestamp_is_missing"),
        ({"available_at": datetime(2024, 1, 1, tzinfo=UTC)}, "feedback_before_request"),
        ({"available_at": AS_OF + AN_HOUR}, "after_as_of"),
        ({"slate_log_prob": float("nan")}, "slate_log_prob_invalid"),
        ({"slate_log_prob": 0.1}, "slate_log_prob_invalid"),
        ({"slate_log_prob": float("-inf")}, "slate_log_prob_invalid"),
        ({"slate_log_prob": None}, "slate_log_prob_is_missing"),
        ({"position_log_probs": [-1.0, float("nan"), -1.0]}, "position_log_probs_invalid"),
        ({"position_log_probs": [-1.0, None, -1.0], "slate_log_prob": -2.0}, "position_log_probs_invalid"),
        ({"position_log_probs": [-1.5, 0.5, -1.0], "slate_log_prob": -2.0}, "position_log_probs_invalid"),
        ({"position_log_probs": [-1.0, -1.0], "slate_log_prob": -2.0}, "position_log_probs_invalid"),
        ({"position_log_probs": [-1.0, -1.0, -1.0], "slate_log_prob": -2.99}, "position_log_probs_off_sum"),
        ({"candidates": None, "candidates_digest": "nowhere"}, "candidates_digest_unknown"),
        ({"events": [{"type": "view", "item_id": "nowhere"}]}, "event_item_unknown"),
        ({"clicked": [True, False, False, True]}, "feedback_off_slate"),
        ({"exposed": [True]}, "feedback_off_slate"),
        ({"signals.watch_time": [1.0, 2.0]}, "feedback_off_slate"),
        ({"clicked": [False, True, False], "purchased": [True, False, False]}, "purchase_without_click"),
        ({"signals.watch_time": [1.0, float("nan"), 0.0]}, "number_is_not_finite"),
        ({"request_signals": {"seconds": float("inf")}}, "number_is_not_finite"),
        ({"context": {"hour": float("nan"), "device": None}}, "number_is_not_finite"),
        ({"action": [0.5, float("inf")]}, "number_is_not_finite"),
    ],
)
def test_a_corruption_breaks_its_rule_and_no_other(
    changes: Row, rule: str, rows: list[Row], save: Callable[..., Log]
) -> None:
    rows[INLINE] |= changes

    assert broken(save(rows)) == {"s10-1": {rule}}


def test_log_probs_of_positions_may_sum_to_the_slates_as_float32_does(
    rows: list[Row], save: Callable[..., Log]
) -> None:
    rows[INLINE] |= {"position_log_probs": [-1.0, -40.0, 0.0], "slate_log_prob": -41.00001}

    assert broken(save(rows)) == {}


@pytest.mark.parametrize("row", [INLINE, LISTED])
def test_a_slate_that_repeats_an_item_is_bad(row: int, rows: list[Row], save: Callable[..., Log]) -> None:
    first, second, _ = rows[row]["slate"]
    rows[row]["slate"] = [first, second, first]

    assert list(broken(save(rows)).values()) == [{"slate_repeats_an_item"}]


@pytest.mark.parametrize("row", [INLINE, LISTED])
def test_a_slate_with_an_item_that_was_no_candidate_is_bad(row: int, rows: list[Row], save: Callable[..., Log]) -> None:
    candidates = rows[row]["candidates"] or [f"item-{number:02d}" for number in range(3, 11)]
    outside = next(item for item in (f"item-{number:02d}" for number in range(20)) if item not in candidates)
    rows[row]["slate"][1] = outside

    assert list(broken(save(rows)).values()) == [{"slate_outside_candidates"}]


@pytest.mark.parametrize("unknown", ["nowhere", None])
def test_an_unknown_item_is_bad_in_slates_and_in_candidates(
    unknown: str | None, rows: list[Row], save: Callable[..., Log]
) -> None:
    rows[INLINE]["candidates"][-1] = unknown
    rows[INLINE]["slate"] = [unknown, *[item for item in rows[INLINE]["candidates"] if item][:2]]

    assert broken(save(rows)) == {"s10-1": {"slate_item_unknown", "candidate_item_unknown"}}


def test_an_unknown_item_in_the_candidate_table_condemns_the_rows_that_name_its_digest(
    rows: list[Row], save: Callable[..., Log]
) -> None:
    # Only list-3 reaches item-10: the items of list-1 end at item-08.
    rows = [row | {"events": []} for row in rows if row["candidates_digest"]]
    for row in rows:
        row["slate"] = ["item-03", "item-04", "item-05"]
    items = [f"item-{number:02d}" for number in range(10)]

    found = broken(save(rows, items=items))

    assert set(found) == {row["request_id"] for row in rows if row["candidates_digest"] == "list-3"}
    assert set.union(*found.values()) == {"candidate_item_unknown"}


def test_repeated_candidates_are_bad(rows: list[Row], save: Callable[..., Log]) -> None:
    rows[INLINE]["candidates"].append(rows[INLINE]["candidates"][0])

    assert broken(save(rows)) == {"s10-1": {"candidates_repeat_an_item"}}


@pytest.mark.parametrize("slate", [None, []])
def test_a_request_without_a_slate_is_bad(slate: list[str] | None, rows: list[Row], save: Callable[..., Log]) -> None:
    rows[INLINE] |= {"slate": slate, "clicked": None, "purchased": None, "signals.watch_time": None}

    assert broken(save(rows)) == {"s10-1": {"slate_is_missing"}}


def test_a_slate_longer_than_the_manifest_says_is_bad(
    rows: list[Row], manifest: Manifest, save: Callable[..., Log]
) -> None:
    rows[INLINE]["slate"] = rows[INLINE]["candidates"][:4]
    rows[INLINE] |= {"clicked": [True] * 4, "purchased": [False] * 4, "signals.watch_time": [0.0] * 4}

    assert broken(save(rows)) == {"s10-1": {"slate_too_long"}}


def test_one_gap_in_the_steps_is_one_bad_row(rows: list[Row], save: Callable[..., Log]) -> None:
    rows[INLINE]["step"], rows[INLINE + 1]["step"] = 4, 5

    assert broken(save(rows)) == {"s10-1": {"step_gap"}}


@pytest.mark.parametrize("step", [0, 2, None])
def test_a_repeated_or_missing_step_is_bad(step: int | None, rows: list[Row], save: Callable[..., Log]) -> None:
    for row in rows[INLINE - 1 : INLINE + 2]:
        row |= {"timestamp": rows[INLINE - 1]["timestamp"], "session_end": None}
    rows[INLINE]["step"] = step

    found = broken(save(rows))

    assert set(found) <= {"s10-0", "s10-1", "s10-2"}
    assert set.union(*found.values()) == {"step_gap"}


def test_every_copy_of_a_request_id_is_bad_wherever_it_stands(rows: list[Row], save: Callable[..., Log]) -> None:
    rows[INLINE]["request_id"] = "s50-1"

    assert broken(save(rows)) == {"s50-1": {"request_id_repeats"}}


def test_timestamps_that_run_backwards_in_a_session_are_bad(rows: list[Row], save: Callable[..., Log]) -> None:
    rows[INLINE]["timestamp"] -= AN_HOUR

    assert broken(save(rows)) == {"s10-1": {"timestamps_out_of_order"}}


def test_rows_are_late_only_relative_to_as_of(rows: list[Row], save: Callable[..., Log]) -> None:
    log = save(rows)
    as_of = rows[INLINE]["timestamp"]

    found = broken(log, as_of)

    assert set(found) == {row["request_id"] for row in rows[INLINE:]}
    assert set.union(*found.values()) == {"after_as_of"}
    assert broken(log, None) == {}


def test_a_session_of_two_users_is_bad(rows: list[Row], save: Callable[..., Log]) -> None:
    rows[INLINE]["user_id"] = "somebody else"

    assert broken(save(rows)) == {"s10-1": {"two_users_in_session"}}


def test_a_session_ends_only_in_the_known_ways(rows: list[Row], save: Callable[..., Log]) -> None:
    rows[INLINE + 1]["session_end"] = "closed"

    assert broken(save(rows)) == {"s10-2": {"session_end_unknown"}}


def test_a_session_cut_over_two_parts_is_bad(rows: list[Row], save: Callable[..., Log]) -> None:
    log = save(rows)
    first, second = log.part_paths
    strays = pl.read_parquet(second).filter(pl.col("session_id") == "s40").head(1)
    pl.concat([pl.read_parquet(first), strays.with_columns(request_id=pl.lit("stray"))]).write_parquet(first)

    found = broken(log)

    assert set(found) == {"stray", "s40-0", "s40-1", "s40-2"}
    assert set.union(*found.values()) == {"session_in_two_parts"}


def test_a_session_under_two_ids_is_bad_twice_whatever_its_feedback(rows: list[Row], save: Callable[..., Log]) -> None:
    copies = [
        row | {"session_id": "s99", "request_id": f"s99-{row['step']}", "clicked": [False] * 3, "purchased": None}
        for row in rows[30:33]
    ]

    found = broken(save(rows + copies))

    assert set(found) == {"s10-0", "s10-1", "s10-2", "s99-0", "s99-1", "s99-2"}
    assert set.union(*found.values()) == {"session_repeats"}


@pytest.mark.parametrize(
    ("changes", "knows"),
    [
        # Another user, and another slate: visits that only look alike.
        ({"user_id": "somebody else"}, {}),
        ({"slate": ["item-00", "item-01", "item-02"], "candidates": ITEMS}, {}),
        # What cannot be told apart is not called a copy.
        ({}, {"has_users": False}),
        ({}, {"has_times": False}),
        ({"timestamp": datetime(2024, 5, 1, tzinfo=UTC), "available_at": None}, {}),
    ],
)
def test_sessions_that_may_be_two_visits_are_not_copies(
    changes: Row, knows: dict[str, bool], rows: list[Row], manifest: Manifest, save: Callable[..., Log]
) -> None:
    copies = [row | {"session_id": "s99", "request_id": f"s99-{row['step']}"} | changes for row in rows[30:33]]
    if "timestamp" in changes:
        rows = [row | changes if row["session_id"] == "s10" else row for row in rows]

    assert broken(save(rows + copies, manifest.model_copy(update=knows))) == {}


def test_times_of_a_wrong_unit_are_not_credible(rows: list[Row], save: Callable[..., Log]) -> None:
    rows[INLINE - 1] |= {"timestamp": datetime(1970, 1, 20, tzinfo=UTC)}

    log = save(rows)

    assert broken(log, credible=(START, AS_OF)) == {"s10-0": {"time_not_credible"}}
    assert broken(log) == {}


def test_two_clicks_are_bad_only_where_one_item_is_chosen(
    rows: list[Row], manifest: Manifest, save: Callable[..., Log]
) -> None:
    for row in rows:
        row |= {"clicked": [True, False, False], "purchased": None}
    rows[INLINE]["clicked"] = [True, True, False]

    assert broken(save(rows)) == {}
    assert broken(save(rows, manifest.model_copy(update={"responses": "choice"}))) == {"s10-1": {"two_choices"}}


def test_a_click_log_needs_no_slates_but_may_have_no_feedback_on_them(
    rows: list[Row], manifest: Manifest, save: Callable[..., Log]
) -> None:
    nothing = ("candidates", "candidates_digest", "slate", "slate_log_prob", "clicked", "purchased")
    clicks = [row | dict.fromkeys((*nothing, "signals.watch_time")) for row in rows]
    clicks[INLINE]["clicked"] = [True]
    click_log = manifest.model_copy(update={"evidence": Evidence.CLICKS, "slate_size": 0})

    assert broken(save(clicks, click_log)) == {"s10-1": {"feedback_without_slate"}}


def test_a_bad_row_takes_its_session_with_it(rows: list[Row], save: Callable[..., Log]) -> None:
    rows[INLINE]["slate_log_prob"] = None
    log = save(rows)
    lookups = look_up(log)
    part = next(log.parts())

    judged = judge(part, row_rules(log.manifest, lookups), lookups)

    assert judged.quarantined.select("request_id", "reasons").rows() == [
        ("s10-0", [SESSION_OF_A_BAD_ROW]),
        ("s10-1", ["slate_log_prob_is_missing"]),
        ("s10-2", [SESSION_OF_A_BAD_ROW]),
    ]
    assert "s10" not in judged.accepted["session_id"]


_VALUES: dict[str, st.SearchStrategy[Any]] = {
    "step": st.integers(-1, 4) | st.none(),
    "session_id": st.sampled_from(["s10", "s11", "", None]),
    "user_id": st.sampled_from(["u05", "", None]),
    "request_id": st.sampled_from(["s10-0", "s10-2", "", None]),
    "slate": st.lists(st.sampled_from(["item-01", "item-02", "nowhere", None]), max_size=5) | st.none(),
    "candidates": st.lists(st.sampled_from(["item-01", "nowhere", None]), max_size=3) | st.none(),
    "candidates_digest": st.sampled_from(["list-1", "nowhere", None]),
    "clicked": st.lists(st.booleans() | st.none(), max_size=5) | st.none(),
    "purchased": st.lists(st.booleans() | st.none(), max_size=5) | st.none(),
    "slate_log_prob": st.sampled_from([0.0, -1.0, 0.5, float("nan"), None]),
    "position_log_probs": st.lists(st.sampled_from([0.0, -1.0, 0.5, float("nan"), None]), max_size=4) | st.none(),
    "session_end": st.sampled_from(["left", "censored", "closed", None]),
    "timestamp": st.sampled_from([AS_OF, AS_OF + AN_HOUR, None]),
    "context": st.sampled_from([None, {"hour": None, "device": "tablet"}]),
    "events": st.sampled_from([None, [], [{"type": "view", "item_id": "nowhere"}]]),
}


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(st.integers(0, 20), st.fixed_dictionaries({}, optional=_VALUES)),
        max_size=5,
    )
)
def test_every_row_is_accepted_or_quarantined_and_no_accepted_row_is_bad(
    rows: list[Row], save: Callable[..., Log], corruptions: list[tuple[int, Row]]
) -> None:
    changed = [dict(row) for row in rows[24:45]]
    for index, changes in corruptions:
        changed[index] |= changes
    log = save(changed)
    lookups = look_up(log)
    rules = row_rules(log.manifest, lookups, AS_OF)
    (part,) = log.parts()

    judged = judge(part, rules, lookups)
    accepted = judged.accepted.select(part.columns)

    together = pl.concat([accepted, judged.quarantined.select(part.columns)])
    assert together.sort(pl.all()).equals(part.sort(pl.all()))
    assert judged.quarantined["reasons"].list.len().gt(0).all()
    assert judge(accepted, rules, lookups).quarantined.is_empty()


def test_every_rule_is_in_the_documentation(rows: list[Row], manifest: Manifest, save: Callable[..., Log]) -> None:
    lookups = look_up(save(rows))
    rules = row_rules(manifest.model_copy(update={"responses": "choice"}), lookups, AS_OF, (START, AS_OF))
    page = (Path(__file__).parents[2] / "docs" / "validation.md").read_text()

    names = [rule.name for rule in rules]

    assert [name for name in [*names, SESSION_OF_A_BAD_ROW] if f"`{name}`" not in page] == []
    assert len(set(names)) == len(names)
