"""What a run shows in Prefect: a text with the decision on top, its figures in tables, and the decisions before it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prefect import runtime
from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact

from components.evaluation.policy_value import Estimate, NotIdentified
from components.experiment.ab import AbResult
from flows.action_stages import names_of
from flows.history import past_decisions
from flows.numbers import duration, interval, number, share
from flows.run_folder import FinishedRun
from flows.run_record import Evidence
from flows.terminal import OUTCOME_SYMBOLS, VERDICTS, verdict

#: A table's rows as Prefect has them: column by name.
Rows = list[dict[str, Any]]


def publish_run(finished: FinishedRun) -> None:
    """Leave a run's artifacts; their keys begin with the loop, so that each loop's has a history of its own."""
    loop, folder = finished.run.loop, Path(finished.run.folder)
    create_markdown_artifact(summary(finished, runtime.flow_run.parameters.get("woken_by")), key=f"{loop}-run")
    create_table_artifact(estimates_table(finished.evidence), key=f"{loop}-estimates")
    if finished.evidence.ab is not None:
        create_table_artifact(ab_table(finished.evidence.ab), key=f"{loop}-ab-test")
    create_table_artifact(history_table(folder.parent, loop), key=f"{loop}-history")
    create_link_artifact(
        (folder / "report.html").as_uri(), link_text=f"Report of {finished.run.run}", key=f"{loop}-report"
    )


def summary(finished: FinishedRun, woken_by: str | None) -> str:
    """A run in one text: what was decided and why, from what, who against whom, and what each stage did.

    Args:
        finished: the run.
        woken_by: the event that asked for it; None where nobody but a person or a schedule did.
    """
    run, evidence, lineage = finished.run, finished.evidence, finished.lineage
    config = lineage.config
    verdicts = [(verdict(reason), reason) for reason in finished.decision.reasons]
    reasons = [
        f"- {symbol} **{reason.check}** {VERDICTS[symbol]}: {reason.text}"
        for wanted in ("✗", "▲")
        for symbol, reason in verdicts
        if symbol == wanted
    ]
    if passed := [reason.check for symbol, reason in verdicts if symbol == "✓"]:
        reasons.append(f"- ✓ **passed**: {', '.join(passed)}")
    splits = ", ".join(
        f"{split.name} {split.n_requests:,} requests of {split.n_sessions:,} sessions" for split in evidence.splits
    )
    known = "all that there was" if config.as_of is None else f"what was known at {config.as_of.isoformat()}"
    woken = [] if woken_by is None else [f"Woken by: {woken_by}", ""]
    return "\n".join(
        [
            f"# {OUTCOME_SYMBOLS[run.outcome]} {run.outcome.upper()}",
            "",
            f"Run `{run.run}` of loop `{run.loop}`, begun {run.started:%Y-%m-%d %H:%M:%S %Z}, took "
            f"{duration(finished.seconds)}, {len(lineage.reused)} of {len(lineage.stages)} stages reused.",
            "",
            *woken,
            *reasons,
            "",
            "## Trained on",
            "",
            f"{evidence.data.n_requests:,} requests of source `{evidence.source}` ({known}), "
            f"{evidence.data.n_quarantined:,} put aside; {splits}. Evidence: {evidence.evidence_level}. Reward: "
            f"{evidence.reward}. Data digest `{lineage.data_digest[:12]}`.",
            "",
            "## Who against whom",
            "",
            _contest(finished),
            "",
            "## Stages",
            "",
            *_markdown_table(stages_table(finished)),
            "",
            "## Where to look",
            "",
            *_markdown_table(_places(finished)),
        ]
    )


def stages_table(finished: FinishedRun) -> Rows:
    """What each stage did: how long it took where it was computed, and what came of it."""
    return [
        {
            "stage": stage,
            "took": "reused" if stage in finished.lineage.reused else duration(finished.evidence.seconds[stage]),
            "what came of it": fact,
        }
        for stage, fact in finished.facts.items()
    ]


def estimates_table(evidence: Evidence) -> Rows:
    """One row for each estimate; where no value is identified, why."""
    return [_estimate_row(estimate) for estimate in evidence.estimates or (evidence.gating,)]


def ab_table(ab: AbResult) -> Rows:
    """One row for each metric of an A/B: the reward first, then the guardrails."""
    rows = [
        {
            "metric": "reward of a session",
            ab.treatment: number(ab.treatment_mean),
            ab.control: number(ab.control_mean),
            "difference": f"{number(ab.difference, signed=True)} ({interval(ab.lower, ab.upper, signed=True)})",
            "users": f"{ab.treatment_users:,} / {ab.control_users:,}",
            "sessions": f"{ab.treatment_sessions:,} / {ab.control_sessions:,}",
            "kind": ab.label,
        }
    ]
    for guard in ab.guardrails:
        change = guard.treatment.mean - guard.control.mean
        rows.append(
            {
                "metric": guard.metric.text,
                ab.treatment: number(guard.treatment.mean),
                ab.control: number(guard.control.mean),
                "difference": number(change, signed=True),
                "users": "",
                "sessions": "",
                "kind": "guardrail",
            }
        )
    return rows


def history_table(runs: Path, loop: str) -> Rows:
    """The loop's decisions, newest first, from the folders that its runs left: no server need have seen them."""
    return [
        {
            "run": past.run,
            "started": f"{past.started:%Y-%m-%d %H:%M %Z}",
            "source": past.source,
            "outcome": past.outcome,
            "gating estimate": past.estimate,
            "A/B difference": past.difference,
            "policy": past.policy_tag,
        }
        for past in past_decisions(runs, loop)
    ]


def _estimate_row(estimate: Estimate) -> dict[str, Any]:
    row = {"policy": estimate.policy, "estimand": estimate.estimand.value}
    if isinstance(estimate, NotIdentified):
        return row | {"estimator": "not identified", "value": estimate.reason} | dict.fromkeys(_REST, "")
    rest = (
        interval(estimate.lower, estimate.upper),
        f"{number(estimate.difference, signed=True)} "
        f"({interval(estimate.difference_lower, estimate.difference_upper, signed=True)})",
        number(estimate.effective_sample_size),
        f"{number(estimate.cap)}, reached by {share(estimate.cap_share)}",
        f"{estimate.ratio.value}{', fitted' * estimate.propensities_estimated}",
    )
    return (
        row | {"estimator": estimate.estimator, "value": number(estimate.value)} | dict(zip(_REST, rest, strict=True))
    )


_REST = ("interval", "against the log", "ESS", "cap", "ratio")


def _contest(finished: FinishedRun) -> str:
    ab, lineage = finished.evidence.ab, finished.lineage
    _, baseline = names_of(lineage.config)
    challenger = f"Challenger `{lineage.policy_tag or lineage.policy_digest[:12]}` ({finished.evidence.gating.policy})"
    against = f"{challenger} against baseline `{lineage.baseline_tag or baseline}`"
    if ab is None:
        return f"{against} and against who wrote the log; there was no A/B."
    return (
        f"{against} ({ab.control}) and against who wrote the log. In the A/B ({ab.label}) a session earned "
        f"{number(ab.treatment_mean)} with {ab.treatment} and {number(ab.control_mean)} with {ab.control}: "
        f"{number(ab.difference, signed=True)} ({interval(ab.lower, ab.upper, signed=True)})."
    )


def _places(finished: FinishedRun) -> Rows:
    folder, lineage = Path(finished.run.folder), finished.lineage
    pages = {
        "report": "report.html",
        "Data Docs": "data_docs/index.html",
        "drift page": "drift_reference/drift.html",
        "lineage": "lineage.json",
        "policies": "policies",
    }
    places = [{"what": what, "where": f"`{(folder / page).as_uri()}`"} for what, page in pages.items()]
    if lineage.policy_tag is None:
        return [place for place in places if place["what"] != "drift page"]
    return [
        *places,
        {"what": "policy", "where": f"`{lineage.policy_tag}` in BentoML's store"},
        {"what": "Bento", "where": f"`{lineage.bento_tag}`"},
    ]


def _markdown_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(row.values() for row in rows)]
    return ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines]
