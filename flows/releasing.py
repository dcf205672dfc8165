"""Who may serve: the gate's word before every canary and every promotion, and none for a way back."""

from pathlib import Path

from components.errors import InputError, SlateloopError
from components.experiment.gate import Decision, Outcome
from components.interactions.log import InteractionLog
from components.policies.policy_folder import PolicyDescription
from flows.config import interaction_database
from flows.live_report import AbReport
from services.policy_store import load_gate_record, load_model
from services.releases import MAX_REASON, Release, ReleaseChangedError, Releases
from services.settings import ServiceSettings


class RefusedError(SlateloopError):
    """The gate does not allow what was asked; the command line exits with 1."""


def open_releases(*, writing: bool = True) -> Releases:
    """The releases in the endpoint's database.

    Args:
        writing: make the database where there is none; one that is there is brought up to date anyway.

    Raises:
        LogUnavailableError: the database cannot be reached.
    """
    log = InteractionLog(ServiceSettings().database)
    if writing:
        log.upgrade()
    else:
        log.upgrade_older()
    return Releases(log)


def require_policy(loop: str, tag: str) -> PolicyDescription:
    """A policy that is there and belongs to the loop.

    Raises:
        InputError: it is not, or does not.
    """
    description = load_model(tag).description
    if description.loop != loop:
        raise InputError(f"policy {tag!r}: is of loop {description.loop!r}; expected {loop!r}")
    return description


def canary(
    releases: Releases, loop: str, tag: str, *, share: float, planned_sessions: int, reason: str = ""
) -> Release:
    """Let a challenger serve a share of users, where its evidence allows a canary.

    Raises:
        InputError: the policy is not there, came without evidence, does not belong to the loop or cannot be asked what
            the champion is asked, or the share does not fit.
        RefusedError: the gate holds it.
        LogUnavailableError: the database cannot be written.
    """
    _require_beside(releases, loop, tag)
    record = load_gate_record(tag)
    if record is None:
        raise InputError(f"policy {tag!r}: came without evidence; only a policy that a run has judged can challenge")
    decision = record.decision()
    if decision.outcome is Outcome.HOLD:
        raise RefusedError(f"policy {tag!r}: the gate holds it. {against(decision)}")
    return releases.canary(loop, tag, share, planned_sessions, reason or f"the gate: {decision.outcome.value}")


def let_out(releases: Releases, loop: str, tag: str, *, share: float, planned_sessions: int) -> Release:
    """Begin a new policy's A/B without anybody's word.

    An A/B that runs is not cut short by the next policy, and a policy that served before does not come back by itself:
    somebody, or the guard, took it away.

    Raises:
        InputError: nothing serves the loop, or as `canary`.
        RefusedError: another A/B runs, the policy served before, or the gate holds it.
        LogUnavailableError: the database cannot be written.
    """
    last = releases.serving(loop)
    if last.challenger is not None:
        raise RefusedError(f"policy {tag!r}: release {last.number} compares {last.challenger!r}, whose A/B comes first")
    for release in releases.history(loop)[::-1]:
        if tag in (release.champion, release.challenger):
            raise RefusedError(
                f"policy {tag!r}: served already in release {release.number}; it comes back only by hand"
            )
    return canary(releases, loop, tag, share=share, planned_sessions=planned_sessions)


def set_baseline(releases: Releases, loop: str, tag: str | None, share: float, reason: str) -> Release:
    """Let a policy stay for comparison: one that was the champion, or that the gate does not hold.

    Raises:
        InputError: the policy is not there, does not belong to the loop or cannot be asked what the champion is asked,
            or the share does not fit.
        RefusedError: it was never the champion, and the gate holds it or never judged it.
        LogUnavailableError: the database cannot be written.
    """
    if tag is not None:
        _require_beside(releases, loop, tag)
        record = load_gate_record(tag)
        held = record is None or record.decision().outcome is Outcome.HOLD
        if held and tag not in {release.champion for release in releases.history(loop)}:
            raise RefusedError(f"policy {tag!r}: was never the champion of {loop!r}, and the gate does not let it out")
    return releases.set_baseline(loop, tag, share, reason)


def set_shadow(releases: Releases, loop: str, tag: str | None, reason: str) -> Release:
    """Ask a policy beside what is shown; nobody sees it, so no evidence is needed.

    Raises:
        InputError: the policy is not there, does not belong to the loop or cannot be asked what the champion is asked.
        LogUnavailableError: the database cannot be written.
    """
    if tag is not None:
        _require_beside(releases, loop, tag)
    return releases.set_shadow(loop, tag, reason)


def promote(releases: Releases, report: AbReport, reason: str = "") -> Release:
    """Make the challenger the champion, where the gate says so on its evidence and its live A/B.

    Raises:
        RefusedError: the gate does not promote it.
        InputError: somebody changed the release meanwhile.
        LogUnavailableError: the database cannot be written.
    """
    release, decision = report.release, report.decision
    if decision is None:
        raise RefusedError(f"policy {release.challenger!r}: came without evidence, so the gate cannot promote it")
    if decision.outcome is not Outcome.PROMOTE:
        raise RefusedError(
            f"policy {release.challenger!r}: the gate says {decision.outcome.value}. {against(decision)}"
        )
    return releases.promote(release, reason or "the gate: promote")


def promoted(report: AbReport, path: Path | None = None) -> AbReport:
    """Let the challenger serve all where the gate says so, unless somebody changed the release meanwhile.

    Args:
        report: the A/B so far.
        path: SQLite file of the interaction log; the endpoint's own database by default.

    Raises:
        LogUnavailableError: the database cannot be written.
    """
    if report.decision is None or report.decision.outcome is not Outcome.PROMOTE:
        return report
    releases = Releases(InteractionLog(interaction_database(path)))
    why = " ".join(reason.text for reason in report.decision.reasons if reason.check == "A/B")
    try:
        release = promote(releases, report, f"the gate: {why}"[:MAX_REASON])
    except ReleaseChangedError:
        return report
    return report.model_copy(update={"promoted": release})


def _require_beside(releases: Releases, loop: str, tag: str) -> None:
    """Whoever asks the champion must be able to ask this policy: it knows every feature that the champion knows."""
    own, champions = (
        {code.feature.name: code.feature.kind for code in require_policy(loop, one).vocabulary.context_codes}
        for one in (tag, releases.serving(loop).champion)
    )
    for name, kind in champions.items():
        if own.get(name) != kind:
            raise InputError(
                f"policy {tag!r}: context feature {name!r} is {own.get(name, 'unknown')}; expected {kind}, as the "
                "champion has it, or requests would be refused"
            )


def against(decision: Decision) -> str:
    """What stands against a promotion, in sentences."""
    return " ".join(reason.text for reason in decision.reasons if not reason.passed)
