"""What the command line shows of runs: a decision with its reasons, and a table of past runs."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    # These import torch; the command line must answer before that is loaded.
    from components.experiment.gate import Decision, Reason
    from flows.benchmarks import Document
    from flows.run_record import RunSummary

OUTCOME_SYMBOLS = {"hold": "■", "canary": "◐", "promote": "►"}
_OUTCOME_STYLES = {"hold": "bold red", "canary": "bold yellow", "promote": "bold green"}
#: What a reason does, by its symbol, in the order in which a reader wants them.
VERDICTS = {"✗": "stands against", "▲": "limits to a canary", "✓": "passed"}
_VERDICT_STYLES = {"✗": "red", "▲": "yellow", "✓": "green"}


def verdict(reason: "Reason") -> str:
    """The symbol of what a reason does: stand against, limit, or nothing (it passed)."""
    if reason.passed:
        return "✓"
    return "✗" if reason.allows == "hold" else "▲"


def decision_panel(decision: "Decision", report_path: Path) -> Panel:
    """The outcome, what stands against it in full, what passed by name, and where the report lies."""
    reasons = Table.grid(padding=(0, 1, 0, 0))
    reasons.add_column(no_wrap=True)
    reasons.add_column(ratio=1, overflow="fold")
    for symbol in ("✗", "▲"):
        for reason in decision.reasons:
            if verdict(reason) == symbol:
                text = Text.assemble((reason.check, "bold"), f" {VERDICTS[symbol]}: {reason.text}")
                reasons.add_row(Text(symbol, _VERDICT_STYLES[symbol]), text)
    if passed := [reason.check for reason in decision.reasons if reason.passed]:
        reasons.add_row(Text("✓", _VERDICT_STYLES["✓"]), Text.assemble(("passed", "bold"), f": {', '.join(passed)}"))
    outcome = decision.outcome.value
    return Panel(
        Group(reasons, Text(), Text(f"Report: {report_path}", overflow="fold")),
        title=_outcome(outcome),
        title_align="left",
        border_style=_OUTCOME_STYLES[outcome].removeprefix("bold "),
    )


def runs_table(runs: Sequence["RunSummary"]) -> Table:
    """One line for each run, in the order given; names fold where the terminal is narrow."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("Decision", no_wrap=True)
    table.add_column("Run", overflow="fold")
    table.add_column("Loop", overflow="fold")
    table.add_column("Source", overflow="fold")
    table.add_column("Started", overflow="fold")
    for run in runs:
        table.add_row(
            _outcome(run.outcome),
            Text(run.run),
            Text(run.loop),
            Text(run.source),
            Text(f"{run.started:%Y-%m-%d %H:%M %Z}".strip()),
        )
    return table


def _outcome(outcome: str) -> Text:
    return Text(f"{OUTCOME_SYMBOLS[outcome]} {outcome.upper()}", _OUTCOME_STYLES[outcome])


def figures_table(document: "Document") -> Table:
    """The figures of a benchmark, each with its interval, target and whether it holds."""
    table = Table(title=f"{document.name}, {document.budget}", box=None, pad_edge=False)
    for heading in ("figure", "value", "unit", "target", "holds"):
        table.add_column(heading, justify="right" if heading == "value" else "left")
    for key, figure in document.figures.items():
        bounds = "" if figure.interval is None else f" ({figure.interval[0]:.4g} to {figure.interval[1]:.4g})"
        holds = "" if figure.holds is None else "yes" if figure.holds else "MISSED"
        value = f"{figure.value:.4g}{bounds}" if figure.skipped is None else f"skipped: {figure.skipped}"
        table.add_row(key, value, figure.unit, figure.target or "", holds)
    return table
