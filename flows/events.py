"""What the platform tells Prefect of a loop: automations act on it, and people can look up what happened."""

from enum import StrEnum
from typing import Any

from prefect.events import emit_event


class LoopEvent(StrEnum):
    """What can happen to a loop."""

    DRIFTED = "slateloop.drift.detected"
    HELD = "slateloop.policy.held"
    CHECK_FAILED = "slateloop.validation.failed"
    CANARY = "slateloop.release.canary"
    PROMOTED = "slateloop.release.promoted"
    ROLLED_BACK = "slateloop.release.rolled-back"


def loop_resource(loop: str) -> str:
    """Name of a loop among Prefect's resources."""
    return f"slateloop.loop.{loop}"


def emit(event: LoopEvent, loop: str, reason: str, evidence: dict[str, Any]) -> None:
    """Tell Prefect; within a run it is related to the run by itself.

    Args:
        event: what happened.
        loop: to which loop.
        reason: a sentence for whoever is woken by it.
        evidence: the figures behind it, as JSON.
    """
    emit_event(
        event=event,
        resource={"prefect.resource.id": loop_resource(loop), "prefect.resource.name": loop},
        payload={"reason": reason, "evidence": evidence},
    )
