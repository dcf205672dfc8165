"""What a log of actions must keep."""

from pathlib import Path

import pytest
from action_log import MANIFEST, Row, row, save

from components.errors import InputError, TooManyBadRowsError
from components.interactions.log_folder import Log
from components.validation.checks import DataChecks, ValidationConfig, validate
from components.validation.rules import SESSION_OF_A_BAD_ROW, judge, look_up, row_rules


def sound(n_sessions: int = 60) -> list[Row]:
    """Rewards and hours differ, and so do users."""
    return [
        row(session, step, request_signals={"clicks": float(session % 3), "seconds": 4.0})
        | {"context": {"device": "desk", "hour": float(session % 24)}}
        for session in range(n_sessions)
        for step in range(2)
    ]


def broken(log: Log) -> dict[str, set[str]]:
    """Request id -> the rules that its row breaks, for all rows that are bad themselves."""
    lookups = look_up(log)
    rules = row_rules(log.manifest, lookups)
    found = {
        each["request_id"]: set(each["reasons"])
        for part in log.parts()
        for each in judge(part, rules, lookups).quarantined.iter_rows(named=True)
    }
    return {request: reasons for request, reasons in found.items() if reasons != {SESSION_OF_A_BAD_ROW}}


def checked(log: Log, out: Path) -> DataChecks:
    out.mkdir()
    return validate(log, ValidationConfig(), out)


def test_a_sound_log_is_accepted_whole(tmp_path: Path) -> None:
    log = save(tmp_path / "log", [sound()])

    checks = checked(log, tmp_path / "checks")

    assert checks.passed
    assert checks.n_quarantined == 0
    assert [result.metric for result in checks.expectations if not result.success] == []
    assert (tmp_path / "checks" / "data_docs" / "index.html").is_file()
    # 2 sessions of 3 have clicks: 0, 1, 2 of them, and half of 4 seconds always.
    assert checks.profile["mean_reward"] == pytest.approx(3.0)
    assert checks.profile["mean.request_signals.clicks"] == pytest.approx(1.0)
    # ln of the density -0.5, over that of a random draw from the square of area 4.
    assert checks.profile["log_density_over_uniform"] == pytest.approx(-0.5 + 1.3863, abs=1e-4)


@pytest.mark.parametrize(
    ("changes", "rules"),
    [
        ({"action": None}, {"action_is_missing"}),
        ({"action": [0.5]}, {"action_of_other_length"}),
        ({"action": [0.5, 1.01]}, {"action_outside_box"}),
        ({"action": [0.5, None]}, {"action_outside_box"}),
        ({"action": [0.5, float("nan")]}, {"action_outside_box", "number_is_not_finite"}),
        ({"action_log_prob": None}, {"action_log_prob_is_missing"}),
        ({"action_log_prob": float("inf")}, {"number_is_not_finite"}),
        ({"slate_log_prob": -1.0}, {"slate_beside_action"}),
        ({"clicked": [True]}, {"feedback_without_slate"}),
        ({"session_end": "gone"}, {"session_end_unknown"}),
    ],
)
def test_a_corruption_breaks_its_rule_and_no_other(changes: Row, rules: set[str], tmp_path: Path) -> None:
    rows = sound(4)
    rows[3] |= changes

    assert broken(save(tmp_path / "log", [rows])) == {"s1-1": rules}


def test_a_slate_in_a_log_of_actions_is_bad(tmp_path: Path) -> None:
    rows = sound(4)
    rows[3] |= {"slate": ["tea"]}

    assert "slate_too_long" in broken(save(tmp_path / "log", [rows]))["s1-1"]


def test_broken_rows_are_put_aside_or_refused(tmp_path: Path) -> None:
    rows = sound(200)
    rows[3] |= {"action": [0.5, 1.5]}
    few = checked(save(tmp_path / "few", [rows]), tmp_path / "few-checks")
    for each in rows[:20]:
        each["action"] = [0.5, 1.5]

    assert few.n_quarantined == 2
    assert few.quarantine_reasons == {"action_outside_box": 1, SESSION_OF_A_BAD_ROW: 1}
    with pytest.raises(TooManyBadRowsError, match="action_outside_box"):
        checked(save(tmp_path / "many", [rows]), tmp_path / "many-checks")


@pytest.mark.parametrize(
    ("changes", "metric"),
    [
        ({"action_log_prob": -30.0}, "log_density_over_uniform"),
        ({"request_signals": {"clicks": None, "seconds": 4.0}}, "null_share.request_signals.clicks"),
    ],
)
def test_a_log_that_cannot_be_judged_is_refused(changes: Row, metric: str, tmp_path: Path) -> None:
    log = save(tmp_path / "log", [[each | changes for each in sound()]])

    with pytest.raises(InputError, match=metric):
        checked(log, tmp_path / "checks")


def test_a_signal_that_changes_its_unit_is_refused_where_the_reward_weighs_it(tmp_path: Path) -> None:
    rows = sound(200)
    for each in rows[300:]:
        each["request_signals"] = {"clicks": 1.0, "seconds": 4000.0}

    with pytest.raises(InputError, match=r"steadiness.request_signals.seconds"):
        checked(save(tmp_path / "log", [rows]), tmp_path / "checks")


def test_rules_name_the_size_of_the_manifest(tmp_path: Path) -> None:
    log = save(tmp_path / "log", [sound(2)])

    holds = {rule.name: rule.holds for rule in row_rules(MANIFEST, look_up(log))}
    assert holds["action_of_other_length"] == "action_size = 2 numbers"
    assert "slate_is_missing" not in holds
    assert "candidates_are_missing" not in holds
