import re
from datetime import UTC, datetime
from pathlib import Path

import pytest
from ledger_entries import ab_result, ledger_entry
from rich.console import Console, RenderableType

from components.experiment.gate import Decision, Outcome, Reason
from components.experiment.guardrails import Metric
from components.experiment.ledger import summarize
from components.experiment.plan import AbDesign, Baseline, plan_ab
from flows.run_record import Forgotten, RunSummary
from flows.terminal import decision_panel, ledger_table, plan_tables, runs_table

DECISION = Decision(
    outcome=Outcome.HOLD,
    reasons=(
        Reason(check="data", passed=True, allows=Outcome.PROMOTE, text="The log met its data checks."),
        Reason(
            check="gain", passed=False, allows=Outcome.HOLD, text="The difference to [the champion] has no interval."
        ),
        Reason(check="A/B", passed=False, allows=Outcome.CANARY, text="There was no A/B yet."),
    ),
)


def shown(renderable: RenderableType, width: int) -> str:
    console = Console(width=width)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


@pytest.mark.parametrize("width", [40, 120])
def test_the_terminal_shows_outcome_reasons_and_report(width: int) -> None:
    text = shown(decision_panel(DECISION, Path("runs/[bold]/report.html"), {"Policy": "shop:[v1]"}), width)
    squeezed = re.sub(r"[\s│]", "", text)
    assert "■ HOLD" in text
    assert "✗gainstandsagainst:Thedifferenceto[thechampion]hasnointerval." in squeezed
    assert "▲A/Blimitstoacanary:TherewasnoA/Byet." in squeezed
    assert "✓passed:data" in squeezed
    assert "Report:runs/[bold]/report.html" in squeezed
    assert "Policy:shop:[v1]" in squeezed
    assert max(map(len, text.splitlines())) <= width


@pytest.mark.parametrize("width", [40, 120])
def test_the_table_of_runs_keeps_every_outcome_and_fits(width: int) -> None:
    started = datetime(2026, 4, 1, 12, tzinfo=UTC)
    runs = [
        RunSummary(
            run=f"run-{outcome}", loop="shop", source="storefront", started=started, outcome=outcome.value, folder="."
        )
        for outcome in Outcome
    ]
    text = shown(runs_table(runs, [None] * len(runs)), width)
    assert all(outcome.value.upper() in text for outcome in Outcome)
    assert "Not replayable" not in text
    assert max(map(len, text.splitlines())) <= width
    marks = [Forgotten(users=1, at=datetime(2026, 5, 2, tzinfo=UTC)), *[None] * (len(runs) - 1)]
    text = shown(runs_table(runs, marks), width)
    assert "2026-05-02" in text or width == 40
    assert max(map(len, text.splitlines())) <= width


@pytest.mark.parametrize("width", [60, 120])
def test_the_table_of_the_ledger_keeps_every_count_and_fits(width: int) -> None:
    entries = [ledger_entry(day, offline=0.1 * day, ab=ab_result(0.1 * day)) for day in range(6)]
    entries.append(ledger_entry(6, offline=-0.1, ab=ab_result(0.4), passed=False))
    entries.append(ledger_entry(7, ab=ab_result(0.4, sample_ratio_p_value=1e-9)))
    ((label,),) = (summary.labels for summary in summarize(entries))
    text = shown(ledger_table(label), width)
    assert "A/Bs, live: 7 sound, 2 of them undecided, 1 unsound left out" in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= width
    if width == 120:
        gate, estimator = (line for line in text.splitlines() if line.startswith(("gate", "one-request")))
        assert re.search(r"what was logged +7 +4 of 4 .* 1 of 5 ", gate)
        assert re.search(r"the A/B's control +7 +4 of 4 .* 1 of 5 .* 0\.\d+ \(", estimator)


@pytest.mark.parametrize("width", [60, 120])
def test_a_plan_shows_users_days_guardrails_and_what_each_day_finds(width: int) -> None:
    seen = {
        Metric.CLICKS: Baseline(mean=1.0, standard_deviation=1.0),
        Metric.PURCHASES: Baseline(mean=0.0, standard_deviation=0.0),
    }
    design = AbDesign(relative_effect=0.4, users_per_day=10.0)
    plan = plan_ab(Baseline(mean=2.0, standard_deviation=3.0), design, seen)
    text = shown(plan_tables(plan), width)
    for test in (plan.fixed, plan.sequential, plan.together):
        assert f"{test.users:,}" in text
    assert "never seen" in text
    assert f"{plan.curve[-1].sequential:+.1%}" in text
    assert plan.curve[0].sequential is None
    assert "no gain" in text
    assert max(map(len, text.splitlines())) <= width
