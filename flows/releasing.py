"""Who may serve: the gate's word before every canary and every promotion, and none for a way back."""

from components.errors import InputError, SlateloopError
from components.experiment.gate import Decision, Outcome
from components.interactions.log import InteractionLog
from flows.ab_report import AbReport
from services.policy_store import load_gate_record, load_model
from services.releases import Release, Releases
from services.settings import ServiceSettings


class RefusedError(SlateloopError):
    """The gate does not allow what was asked; the command line exits with 1."""


def open_releases() -> Releases:
    """The releases in the endpoint's database, which is made where there is none.

    Raises:
        LogUnavailableError: the database cannot be reached.
    """
    log = InteractionLog(ServiceSettings().database)
    log.upgrade()
    return Releases(log)


def require_policy(loop: str, tag: str) -> None:
    """Make sure that a policy is there and belongs to the loop.

    Raises:
        InputError: it is not, or does not.
    """
    own = load_model(tag).description.loop
    if own != loop:
        raise InputError(f"policy {tag!r}: is of loop {own!r}; expected {loop!r}")


def canary(
    releases: Releases, loop: str, tag: str, *, share: float, planned_sessions: int, reason: str = ""
) -> Release:
    """Let a challenger serve a share of users, where its evidence allows a canary.

    Raises:
        InputError: the policy is not there, came without evidence or does not belong to the loop, or the share does not
            fit.
        RefusedError: the gate holds it.
        LogUnavailableError: the database cannot be written.
    """
    require_policy(loop, tag)
    record = load_gate_record(tag)
    if record is None:
        raise InputError(f"policy {tag!r}: came without evidence; only a policy that a run has judged can challenge")
    decision = record.decision()
    if decision.outcome is Outcome.HOLD:
        raise RefusedError(f"policy {tag!r}: the gate holds it. {against(decision)}")
    return releases.canary(loop, tag, share, planned_sessions, reason or f"the gate: {decision.outcome.value}")


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
    if releases.serving(release.loop) != release:
        raise InputError(f"loop {release.loop!r}: somebody else changed the release just now; look at it first")
    return releases.promote(release.loop, reason or "the gate: promote")


def against(decision: Decision) -> str:
    """What stands against a promotion, in sentences."""
    return " ".join(reason.text for reason in decision.reasons if not reason.passed)
