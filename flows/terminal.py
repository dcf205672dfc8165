"""What the command line shows of runs: a decision with its reasons, and a table of past runs."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Group
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from flows.numbers import counted, interval, number

if TYPE_CHECKING:
    # These import torch; the command line must answer before that is loaded.
    from components.experiment.gate import Decision, Reason
    from components.experiment.ledger import LabelSummary
    from components.experiment.plan import AbPlan
    from flows.benchmarks import Document
    from flows.drift_monitoring import DriftLook
    from flows.live_report import AbReport
    from flows.load_test import LoadTest
    from flows.replay import Replay
    from flows.run_record import Forgotten, RunSummary
    from flows.simulation import SimulationSummary
    from services.access import Token
    from services.releases import Release

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


def decision_panel(decision: "Decision", report_path: Path, tags: Mapping[str, str]) -> Panel:
    """The outcome, what stands against it in full, what passed by name, where the report lies, and what to serve."""
    outcome = decision.outcome.value
    leads = {"Report": str(report_path), **tags}
    return Panel(
        Group(_reasons(decision), Text(), *(Text(f"{name}: {lead}", overflow="fold") for name, lead in leads.items())),
        title=_outcome(outcome),
        title_align="left",
        border_style=_OUTCOME_STYLES[outcome].removeprefix("bold "),
    )


def ab_panel(report: "AbReport") -> Panel:
    """A canary's A/B: what was counted, the gate's reasons, and what the guard did."""
    release = report.release
    parts: list[Text | Table] = [Text(f"{release.challenger} against {release.champion}", overflow="fold")]
    counts = ", ".join(f"{number(count)} {arm}" for arm, count in report.sessions.items()) or "none"
    parts.append(Text(f"Sessions: {counts}; left out: {number(report.n_cut)} cut, {number(report.n_unknown)} unknown"))
    if report.decision is not None:
        parts += [Text(), _reasons(report.decision)]
    if report.harm:
        done = "" if report.rolled_back is None else f" Taken away in release {report.rolled_back.number}."
        parts.append(Text(f"Harm is proven: {'; '.join(report.harm)}.{done}", "bold red"))
    outcome = "hold" if report.decision is None else report.decision.outcome.value
    return Panel(
        Group(*parts),
        title=Text.assemble(
            (f"{release.loop}, release {release.number}: ", "bold"), report.verdict().partition(":")[0]
        ),
        title_align="left",
        border_style="red" if report.harm else _OUTCOME_STYLES[outcome].removeprefix("bold "),
    )


def drift_panel(seen: "DriftLook") -> Panel:
    """A look at a loop's traffic: what moved, the surest of the rest, and what could not be watched."""
    parts: list[Text | Table] = []
    if seen.window_began is not None and seen.window_ended is not None:
        parts.append(
            Text(
                f"{number(seen.n_requests)} requests of {number(seen.n_users)} users, "
                f"{seen.window_began:%Y-%m-%d %H:%M} to {seen.window_ended:%Y-%m-%d %H:%M} UTC; "
                f"{number(seen.n_before)} of the champion's first days"
            )
        )
        parts.append(Text(f"Champion: {seen.champion}", overflow="fold"))
    if seen.columns:
        table = Table(box=None, padding=(0, 2, 0, 0))
        for name in ("", "panel", "column", "against", "before", "now", "score", "p"):
            table.add_column(name, overflow="fold")
        for column in seen.columns:
            before, now = ("" if value is None else number(value) for value in (column.before, column.now))
            table.add_row(
                Text("✗", "red") if column.moved else Text("✓", "green"), column.panel, column.column, column.against,
                before, now, number(column.score, 3), f"{column.p_value:.2g}",
            )  # fmt: skip
        parts += [Text(), table]
    if seen.notes:
        parts += [Text(), *(Text(f"Not watched: {note}", overflow="fold") for note in seen.notes)]
    return Panel(
        Group(*parts),
        title=Text.assemble((f"{seen.loop}: ", "bold"), seen.verdict()),
        title_align="left",
        border_style="red" if seen.alarm else "green" if seen.columns else "yellow",
    )


def releases_table(releases: Sequence["Release"]) -> Table:
    """One line for each release, in the order given."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("release", "when", "what", "serves", "reason"):
        table.add_column(name, overflow="fold")
    for release in releases:
        arms = [f"{arm} {share:.4g}: {release.policies()[arm]}" for arm, share in release.shares().items()]
        if release.shadow is not None:
            arms.append(f"shadow: {release.shadow}")
        when = datetime.fromtimestamp(release.released_at / 1e6, UTC)
        table.add_row(
            f"{release.loop} {release.number}", f"{when:%Y-%m-%d %H:%M:%S}", release.action, "\n".join(arms),
            release.reason,
        )  # fmt: skip
    return table


def _reasons(decision: "Decision") -> Table:
    """What stands against a decision in full, and what passed by name."""
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
    return reasons


def runs_table(runs: Sequence["RunSummary"], marks: Sequence["Forgotten | None"]) -> Table:
    """One line for each run, in the order given, with what was deleted from its data since; names fold."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("Decision", no_wrap=True)
    table.add_column("Run", overflow="fold")
    table.add_column("Loop", overflow="fold")
    table.add_column("Source", overflow="fold")
    table.add_column("Started", overflow="fold")
    if any(marks):
        table.add_column("Not replayable since", overflow="fold")
    for run, mark in zip(runs, marks, strict=True):
        table.add_row(
            _outcome(run.outcome),
            Text(run.run),
            Text(run.loop),
            Text(run.source),
            Text(f"{run.started:%Y-%m-%d %H:%M %Z}".strip()),
            *([Text(f"{mark.at:%Y-%m-%d}" if mark else "")] if any(marks) else []),
        )
    return table


def replay_table(replay: "Replay") -> Table:
    """One line for each result of a run beside that of its replay."""
    table = _plain_table("result", "then", "now", "equal")
    for part in replay.compared:
        table.add_row(part.what, part.recorded, part.replayed, "yes" if part.equal else "NO")
    return table


def tokens_table(tokens: Sequence["Token"]) -> Table:
    """One line for each token, without anything that could be asked with."""
    table = _plain_table("token", "scopes", "made")
    for token in tokens:
        table.add_row(token.name, ", ".join(token.scopes), f"{token.created_at:%Y-%m-%d %H:%M %Z}")
    return table


def addresses_table(addresses: Mapping[str, str]) -> Table:
    """Where each part of a platform is found."""
    table = _plain_table("part", "address")
    for part, address in addresses.items():
        table.add_row(part, address)
    return table


def load_table(found: "LoadTest") -> Group:
    """How long requests took from when they were due, and what they were answered."""
    latency = _plain_table("requests", "due a second", "answered a second", "p50", "p90", "p99", "longest")
    times = ("-" if value is None else f"{value:.1f} ms" for value in (found.p50, found.p90, found.p99, found.longest))
    latency.add_row(f"{found.requests:,}", f"{found.rate:g}", f"{found.answered_per_second:.1f}", *times)
    statuses = _plain_table("status", "requests")
    for status, n_requests in found.statuses.items():
        statuses.add_row(status, f"{n_requests:,}")
    return Group(latency, Text(), statuses)


def plan_tables(plan: "AbPlan") -> Group:
    """Users and days that an A/B needs by either way of testing, its guardrails, and what it can find by which day."""
    design, base = plan.design, plan.baseline
    sizes = _plain_table("test", "users", "treatment", "control", "days")
    rows = [
        ("looked at once, at its end", plan.fixed),
        ("looked at any day", plan.sequential),
        *((f"{part.metric.text} within {part.margin:.0%}", part.test) for part in plan.guardrails),
    ]
    if plan.guardrails:
        rows.append(("gain and guardrails together, at its end", plan.together))
    for name, test in rows:
        if test is None:
            sizes.add_row(name, "never seen")
            continue
        counts = (test.users, test.treatment_users, test.control_users, test.days)
        sizes.add_row(name, *(f"{count:,}" for count in counts))
    curve = _plain_table("by day", "users", "finds, looked at once", "finds, looked at any day")
    for day in plan.curve:
        found = ("no gain" if effect is None else f"{effect:+.1%}" for effect in (day.fixed, day.sequential))
        curve.add_row(f"{day.day:,}", f"{day.users:,}", *found)
    return Group(
        Text(
            f"To find a gain of {design.relative_effect:.1%} with {design.power:.0%} probability, where equal policies "
            f"pass in {design.level:.1%}; mean {base.mean:.4g} a session, standard deviation "
            f"{base.standard_deviation:.4g} a user, {design.users_per_day:,.0f} users a day, "
            f"{design.treatment_share:.0%} of them in the treatment:"
        ),
        Padding(sizes, (1, 0)),
        Text(
            f"Looked at any day, an A/B needs {plan.inflation:.2f} times the users in the worst case; half of those "
            f"with such a gain have passed by day {plan.half_passed_by_day:,}."
        ),
        Padding(curve, (1, 0, 0, 0)),
    )


def _plain_table(*headings: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for place, heading in enumerate(headings):
        table.add_column(heading, justify="right" if place else "left", overflow="fold")
    return table


def _outcome(outcome: str) -> Text:
    return Text(f"{OUTCOME_SYMBOLS[outcome]} {outcome.upper()}", _OUTCOME_STYLES[outcome])


#: Whom a challenger was compared with offline, by the score's contrast.
CONTRASTS = {"control": "the A/B's control", "log": "what was logged", "another policy": "another policy"}


def ledger_table(summary: "LabelSummary") -> Table:
    """How right the gate and each estimator were about A/Bs of one label."""
    counts = ((summary.n, "sound"), (summary.n_undecided, "of them undecided"), (summary.n_unsound, "unsound left out"))
    title = f"A/Bs, {summary.label}: {', '.join(f'{n} {what}' for n, what in counts if n)}"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for heading in ("Judge", "Compared with", "A/Bs", "Improved of passed", "Missed of improved", "Correlation"):
        table.add_column(heading, overflow="fold")
    for score in summary.scores:
        right, missed, correlation = score.precision, score.false_negative_rate, score.correlation
        table.add_row(
            Text(score.judge),
            Text(CONTRASTS[score.contrast]),
            f"{score.n}",
            "unknown" if right is None else counted(right.count, right.total, right.lower, right.upper),
            "unknown" if missed is None else counted(missed.count, missed.total, missed.lower, missed.upper),
            "unknown"
            if correlation is None
            else f"{number(correlation.pearson, 2)} ({interval(correlation.lower, correlation.upper, 2)})",
        )
    return table


def simulation_table(summary: "SimulationSummary") -> Table:
    """What simulated shoppers earned, in all, by arm and by policy."""
    table = _plain_table("", "sessions", "users", "requests", "mean reward", "s.e.")
    labels = {"all": summary.total}
    labels |= {f"arm {name}": part for name, part in summary.arms.items()}
    labels |= {name: part for name, part in summary.policies.items()}
    for label, part in labels.items():
        error = "unknown" if part.standard_error is None else number(part.standard_error, 2)
        counts = (f"{count:,}" for count in (part.sessions, part.users, part.requests))
        table.add_row(label, *counts, number(part.mean_reward), error)
    return table


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
