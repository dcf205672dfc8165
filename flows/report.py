"""The report of a run: one self-contained page that says what was decided and why, readable without knowing RL.

The page needs no script and no network, and the same records give the same bytes.
"""

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from uuid import uuid4

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from components.errors import InputError
from components.evaluation.policy_value import Estimand, NotIdentified, PolicyValue
from components.experiment.ab import AbResult
from components.experiment.gate import Decision, GateConfig, Outcome
from components.experiment.guardrails import Guardrail, GuardrailVerdict
from components.experiment.ledger import FEW, LabelSummary
from components.interactions.contract import Evidence as EvidenceLevel
from components.interactions.contract import RatioAssumption
from flows import figures
from flows.config import logs_actions
from flows.numbers import counted, duration, interval, number, share
from flows.run_record import Evidence, Lineage
from flows.terminal import CONTRASTS, OUTCOME_SYMBOLS, VERDICTS, verdict

_LEVELS = {
    EvidenceLevel.PROPENSITIES: "Slates were logged with the probability of showing them, so other policies can be "
    "judged on this log.",
    EvidenceLevel.SLATES: "Slates were logged, but not the probability of showing them: to judge other policies it has "
    "to be estimated.",
    EvidenceLevel.CLICKS: "Only what users did was logged, not what they were shown.",
}
_ACTIONS = (
    "Actions were logged with their probability densities, so other policies can be judged on this log. What a user "
    "does may depend on all of an action's numbers."
)
_RATIOS = {
    RatioAssumption.FULL_SLATE: "What a user does may depend on the whole slate.",
    RatioAssumption.CASCADE: "What a user does at a position depends on that position and those above it.",
}


@dataclass(frozen=True)
class _Panel:
    """One estimand on the page: what it means, its values drawn, and why others have none."""

    estimand: str
    title: str
    meaning: str
    values: tuple[PolicyValue, ...]
    detailed: tuple[PolicyValue, ...]
    """Those whose numbers are all printed."""
    figure: figures.Figure | None
    not_identified: dict[str, list[str]]
    """Reason -> the policies that it is about."""


#: Estimators whose numbers are all printed; of the others, which are there to be compared, the figure says enough.
_DETAILED = ("one-request NCIS", "DR", "session NCIS", "literature NCIS")


@dataclass(frozen=True)
class _GuardrailRow:
    """One guarded metric on the page."""

    guardrail: Guardrail
    margin: float
    judged: GuardrailVerdict | None


_MEANINGS = {
    Estimand.ONE_REQUEST: (
        "Reward of one request",
        "What a request of this log would have earned on average had each policy chosen the slate, with users in the "
        "situations that were logged. This is what the gate reads.",
    ),
    Estimand.SESSION: (
        "Reward of a session",
        "What a whole session would earn if each policy answered all of its requests. It needs far more data, and its "
        "intervals hold the truth less often than they say; read it as a hint. The A/B judges sessions.",
    ),
    Estimand.SESSION_AVERAGE: (
        "Literature NCIS",
        "The number that some papers print. It is no policy's value: on sessions of one request it gives every policy "
        "the logged mean. It never gates, and no interval is claimed for it.",
    ),
}


def write_report(evidence: Evidence, decision: Decision, lineage: Lineage, out: Path) -> None:
    """Write the report as one HTML page; an older page there is replaced in one rename.

    Args:
        evidence: what the decision was made from.
        decision: the gate's.
        lineage: what the run depends on.
        out: the page. It links to `data_docs/index.html` beside it.

    Raises:
        InputError: the page cannot be written.
    """
    page = _render(evidence, decision, lineage)
    staging = out.parent / f".{out.name}.{uuid4().hex[:8]}.tmp"
    try:
        staging.write_text(page, encoding="utf-8")
        os.replace(staging, out)
    except OSError as error:
        raise InputError(f"{out}: cannot be written: {error.strerror}") from None
    finally:
        staging.unlink(missing_ok=True)


def _render(evidence: Evidence, decision: Decision, lineage: Lineage) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "share": share, "duration": duration}
    environment.globals |= {"counted": counted}
    environment.globals |= {"interval": interval, "needed_ess": partial(figures.needed_ess, gate=lineage.config.gate)}
    level, acts = EvidenceLevel(evidence.evidence_level), logs_actions(lineage.config)
    order = list(VERDICTS)
    return environment.get_template("report.html.j2").render(
        evidence=evidence,
        decision=decision,
        lineage=lineage,
        outcome=decision.outcome.value,
        symbol=OUTCOME_SYMBOLS[decision.outcome.value],
        summary=_summary(evidence, decision),
        reasons=sorted(
            ((verdict(reason), reason) for reason in decision.reasons), key=lambda pair: order.index(pair[0])
        ),
        verdicts=VERDICTS,
        acts=acts,
        level=_ACTIONS if acts else _LEVELS[level],
        ratio=None if acts or level is EvidenceLevel.CLICKS else _RATIOS[RatioAssumption(evidence.ratio_assumption)],
        expectations=sorted(evidence.data.expectations, key=lambda result: result.success),
        panels=_panels(evidence, lineage),
        caps=figures.cap_sensitivity(evidence.cap_sensitivity) if evidence.cap_sensitivity else None,
        calibration=figures.calibrations(evidence.trust.calibrations) if evidence.trust.calibrations else None,
        probes=(
            figures.exploit_probes(evidence.probes.probes, challenger=evidence.probes.challenger)
            if evidence.probes.probes
            else None
        ),
        curves=figures.learning_curves(evidence.curves) if evidence.curves else None,
        ab=figures.ab_difference(evidence.ab) if evidence.ab else None,
        judged=[(label, _ledger_notes(label)) for label in evidence.ledger.labels] if evidence.ledger else [],
        contrasts=CONTRASTS,
        predictions=_predictions(evidence, lineage.run),
        looks=figures.confidence_sequence(evidence.ab, evidence.ab.sequence)
        if evidence.ab and evidence.ab.sequence
        else None,
        bounds=evidence.ab.bounds(lineage.config.gate.ab_level) if evidence.ab else None,
        guardrails=_guardrails(evidence.ab, lineage.config.gate) if evidence.ab else (),
        stages=tuple(dict.fromkeys((*lineage.stages, *evidence.seconds))),
        longest=max(evidence.seconds.values(), default=0.0),
    )


def _guardrails(ab: AbResult, gate: GateConfig) -> list[_GuardrailRow]:
    """The guarded metrics with the verdicts that the gate gave."""
    rows = []
    for guardrail in ab.guardrails:
        margin = gate.guardrails.of(guardrail.metric)
        rows.append(_GuardrailRow(guardrail, margin, ab.judge(guardrail, margin, gate.ab_level)))
    return rows


def _summary(evidence: Evidence, decision: Decision) -> str:
    """The decision in one sentence."""
    policy, n = evidence.gating.policy, len(decision.reasons)
    deciding = [reason.check for reason in decision.reasons if not reason.passed and reason.allows is decision.outcome]
    if decision.outcome is Outcome.HOLD:
        stand = "stands" if len(deciding) == 1 else "stand"
        return (
            f"The policy “{policy}” does not serve: {len(deciding)} of {n} checks {stand} against it "
            f"({', '.join(deciding)})."
        )
    if decision.outcome is Outcome.CANARY:
        return (
            f"The policy “{policy}” may serve a small share of users, compared with what serves now; what keeps it "
            f"from more is: {', '.join(deciding)}."
        )
    gain = ""
    if evidence.ab:
        relative = evidence.ab.relative_difference
        percent = "" if relative is None else f" ({share(relative, signed=True)})"
        gain = (
            f", and in the A/B each of its sessions earned {number(evidence.ab.difference, 3)} more{percent} than "
            f"those of “{evidence.ab.control}”"
        )
    return f"The policy “{policy}” may take the champion's place: all {n} checks passed{gain}."


def _panels(evidence: Evidence, lineage: Lineage) -> list[_Panel]:
    """One panel for each estimand that was asked for; the gating estimate comes first."""
    gate = lineage.config.gate
    estimates = (evidence.gating, *(part for part in evidence.estimates if part != evidence.gating))
    panels = []
    for estimand, (title, meaning) in _MEANINGS.items():
        values = tuple(part for part in estimates if isinstance(part, PolicyValue) and part.estimand is estimand)
        reasons: dict[str, list[str]] = {}
        for part in estimates:
            if isinstance(part, NotIdentified) and part.estimand is estimand:
                reasons.setdefault(part.reason, []).append(part.policy)
        if values or reasons:
            panels.append(
                _Panel(
                    estimand=estimand.value,
                    title=title,
                    meaning=meaning,
                    values=values,
                    detailed=tuple(part for part in values if part.estimator in _DETAILED),
                    figure=figures.forest(values, challenger=evidence.gating.policy, gate=gate) if values else None,
                    not_identified=reasons,
                )
            )
    return panels


def _ledger_notes(summary: LabelSummary) -> list[str]:
    """What to know before reading how right offline estimates were about A/Bs of a label, in sentences."""
    n, undecided = summary.n, summary.n_undecided
    notes = []
    if n == 0:
        notes.append("No sound A/B of this kind so far.")
    elif n < FEW:
        so_far = "one A/B" if n == 1 else f"{n} A/Bs"
        notes.append(f"Only {so_far} of this kind so far: too few to tell how right the estimates are.")
    if summary.label == "simulated in a world model":
        notes.append("The users were simulated by a learned model: weaker evidence, which counts for no other kind.")
    if undecided:
        notes.append(f"Undecided, since the interval holds 0, and in neither share: {undecided} of {n}.")
    if summary.n_unsound:
        notes.append(f"Left out, since users did not come to the arms as planned: {summary.n_unsound} more.")
    if n > summary.n_logs:
        logs = "one log" if summary.n_logs == 1 else f"{summary.n_logs} logs"
        notes.append(
            f"The estimates come from {logs}: those of one log depend on each other, so intervals are too narrow."
        )
    return notes


def _predictions(evidence: Evidence, run: str) -> figures.Figure | None:
    """What the gating estimator predicted against the A/Bs; None where it predicted nothing yet."""
    labels = evidence.ledger.labels if evidence.ledger else ()
    scores = [score for label in labels for score in label.scores]
    drawn = [score for score in scores if score.points and score.estimand is Estimand.ONE_REQUEST]
    if isinstance(evidence.gating, PolicyValue):
        drawn = [score for score in drawn if score.judge == evidence.gating.estimator]
    return figures.ledger_points(drawn, run=run) if drawn else None
