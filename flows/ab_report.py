"""The A/B of a running canary as a flow: it looks once a day, takes harm away, and lets proof serve all."""

from pathlib import Path

from prefect import flow
from prefect.logging import get_run_logger

from flows.config import LoopConfig
from flows.events import LoopEvent, emit
from flows.live_report import AbReport, NoCanaryError, analyze_release, guarded
from flows.releasing import promoted
from flows.settings import PlatformSettings
from flows.tasks import publish


@flow(name="ab-report", timeout_seconds=PlatformSettings().run_hours * 3600)
def ab_report(config: LoopConfig, path: Path | None = None, guard: bool = True) -> AbReport | None:
    """Analyse the loop's canary once; None where it has none, which on most days is no failure.

    Args:
        config: its loop, how its source `log` reads the interaction log, and whether the gate's word promotes.
        path: SQLite file of the log; the endpoint's own database by default.
        guard: take the challenger away where harm is proven.
    """
    try:
        report = analyze_release(config, path)
    except NoCanaryError as none:
        get_run_logger().info("%s", none)
        publish("ab-report", str(none))
        return None
    if guard:
        report = guarded(report, path)
    if config.release.promote:
        report = promoted(report, path)
    publish("ab-report", report.markdown())
    tell_of(report)
    return report


def tell_of(report: AbReport) -> None:
    """Tell whoever watches the loop that its challenger was taken away or promoted, and why."""
    for event, release in ((LoopEvent.ROLLED_BACK, report.rolled_back), (LoopEvent.PROMOTED, report.promoted)):
        if release is not None:
            evidence = {
                "from_release": report.release.number,
                "to_release": release.number,
                "policy": report.release.challenger,
                "harm": report.harm,
                "sessions": report.sessions,
            }
            emit(event, release.loop, release.reason, evidence)
