"""What a run's artifacts say; tests/end_to_end asks a Prefect server for them."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from test_report import AB, IDENTIFIED, LINEAGE, NOT_IDENTIFIED, decision_on

from components.errors import InputError
from flows.run_artifacts import ab_table, estimates_table, history_table, summary
from flows.run_folder import FinishedRun
from flows.run_record import Evidence, RunSummary, outcome_of

FACTS = {"import": "24,310 requests | all of them", "policy": "released"}


def finished(evidence: Evidence) -> FinishedRun:
    decision = decision_on(evidence)
    lineage = LINEAGE.model_copy(update={"stages": dict.fromkeys(FACTS, "a" * 64), "reused": ("import",)})
    run = RunSummary(
        run="shop-1",
        loop="shop",
        source=evidence.source,
        started=LINEAGE.started,
        outcome=outcome_of(decision),
        folder="/runs/shop-1",
    )
    evidence = evidence.model_copy(update={"seconds": dict.fromkeys(FACTS, 75.0)})
    return FinishedRun(run, evidence, decision, lineage, FACTS, 80.0)


@pytest.mark.parametrize("evidence", [IDENTIFIED, NOT_IDENTIFIED])
def test_the_decision_is_on_top_with_every_reason_and_what_stands_against_it_first(evidence: Evidence) -> None:
    run = finished(evidence)
    lines = summary(run, None).splitlines()
    assert run.run.outcome.upper() in lines[0]
    reasons = [line for line in lines if line.startswith("- ")]
    against = [reason for reason in run.decision.reasons if not reason.passed]
    assert [line[2] for line in reasons] == sorted((line[2] for line in reasons), key="✗▲✓".index)
    assert all(any(reason.text in line for line in reasons) for reason in against)
    assert all(reason.check in reasons[-1] for reason in run.decision.reasons if reason.passed)


def test_the_text_says_what_was_reused_how_long_the_rest_took_and_what_came_of_it() -> None:
    text = summary(finished(IDENTIFIED), None)
    assert "1 of 2 stages reused" in text
    assert "| import | reused | 24,310 requests \\| all of them |" in text
    assert (
        "| policy | 1 min 15 s | released |".replace("1 min 15 s", "1\N{NO-BREAK SPACE}min 15\N{NO-BREAK SPACE}s")
        in text
    )
    assert "`file:///runs/shop-1/report.html`" in text
    assert "all that there was" in text


def test_only_a_run_that_an_event_asked_for_says_what_woke_it() -> None:
    assert "Woken by: drift of clicks" in summary(finished(IDENTIFIED), "drift of clicks")
    assert "Woken by" not in summary(finished(IDENTIFIED), None)


def test_tables_have_a_row_for_each_estimate_and_each_metric_with_the_same_columns() -> None:
    for evidence in (IDENTIFIED, NOT_IDENTIFIED):
        rows = estimates_table(evidence)
        told = evidence.estimates or (evidence.gating,)
        assert [row["policy"] for row in rows] == [estimate.policy for estimate in told]
        assert len({tuple(row) for row in rows}) == 1
    rows = ab_table(AB)
    assert [row["metric"] for row in rows][1:] == [guard.metric.text for guard in AB.guardrails]
    assert len({tuple(row) for row in rows}) == 1
    json.dumps(rows)


def write_past_run(runs: Path, day: int, evidence: dict[str, Any], loop: str = "shop") -> None:
    folder = runs / f"{loop}-{day}"
    folder.mkdir(parents=True)
    started = datetime(2026, 4, 1, tzinfo=UTC) + timedelta(days=day)
    run = RunSummary(run=folder.name, loop=loop, source="table", started=started, outcome="hold", folder="/elsewhere")
    (folder / "run.json").write_text(run.model_dump_json())
    (folder / "evidence.json").write_text(json.dumps(evidence))
    (folder / "lineage.json").write_text(json.dumps({"policy_tag": f"shop-reinforce:{day}"}))


def test_the_history_is_of_one_loop_newest_first_and_reads_what_earlier_versions_left(tmp_path: Path) -> None:
    value = {"value": 0.45, "lower": 0.4, "upper": 0.5}
    write_past_run(tmp_path, 1, {"gating": value, "ab": {"difference": 0.2, "lower": -0.1, "upper": 0.5}})
    write_past_run(tmp_path, 3, {"gating": {"kind": "not_identified", "reason": "No slates."}, "ab": None})
    write_past_run(tmp_path, 2, {})
    write_past_run(tmp_path, 4, {}, loop="cart")
    rows = history_table(tmp_path, "shop")
    assert [(row["run"], row["policy"]) for row in rows] == [(f"shop-{n}", f"shop-reinforce:{n}") for n in (3, 2, 1)]
    assert (rows[0]["gating estimate"], rows[0]["A/B difference"]) == ("not identified", "no A/B")
    assert rows[2]["gating estimate"] == "0.4500 (0.4000 to 0.5000)"
    assert rows[2]["A/B difference"] == "+0.2000 (−0.1000 to +0.5000)"
    (tmp_path / "shop-2" / "evidence.json").write_text("{")
    with pytest.raises(InputError, match=r"shop-2/evidence\.json: is no run's evidence"):
        history_table(tmp_path, "shop")
