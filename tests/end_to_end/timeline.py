"""What happened while a loop ran itself, told by Prefect's events, the releases and the shoppers."""

from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from living_shop import Shop
from prefect_server import Server

#: Of a run's states, those that a person asks about.
_STATES = ("Running", "Completed", "Failed", "Crashed", "TimedOut")


@dataclass
class Timeline:
    """Moments of one scenario."""

    began: datetime = field(default_factory=lambda: datetime.now(UTC))
    moments: list[tuple[datetime, str, str, str]] = field(default_factory=list)
    """When, who, what by name, and a sentence."""

    def begins(self, sentence: str) -> None:
        self.began = datetime.now(UTC)
        self.add(sentence)

    def add(self, sentence: str, who: str = "the test") -> None:
        self.moments.append((datetime.now(UTC), who, "", sentence))

    def visit(self, shop: Shop, n_visits: int, *settings: str) -> dict[str, Any]:
        """All shoppers come so often, which is told."""
        began = datetime.now(UTC)
        summary = shop.visit(n_visits, *settings)
        arms = "; ".join(f"{part['mean_reward']:.2f} with the {arm}" for arm, part in sorted(summary["arms"].items()))
        told = f"{summary['total']['sessions']:,} sessions, which earn {arms} on average"
        self.moments.append((began, "shoppers", "", told))
        return summary

    def read(self, server: Server, releases: list[dict[str, Any]]) -> None:
        """Everything that Prefect and the releases know."""
        wanted = ["slateloop.", "prefect.flow-run.", "prefect.automation.action."]
        page = server.ask("events/filter", filter={"event": {"prefix": wanted}}, limit=50)
        while True:
            for event in page["events"]:
                self._read_event(event)
            if not page.get("next_page"):
                break
            page = server.next(page["next_page"])
        for release in releases:
            at = datetime.fromtimestamp(release["released_at"] / 1e6, UTC)
            share = release["challenger_share"]
            beside = f", {release['challenger']} {share:.3g} of the users" if release["challenger"] else ""
            told = f"release {release['number']}, {release['action']}: {release['champion']} serves{beside or ' all'}"
            self.moments.append((at, "releases", f"release.{release['action']}", told))

    def _read_event(self, event: dict[str, Any]) -> None:
        name, at = event["event"], datetime.fromisoformat(event["occurred"])
        if name.startswith("slateloop."):
            self.moments.append((at, "event", name, f"`{name}`: {event['payload']['reason']}"))
        elif name.startswith("prefect.automation.action."):
            if name.endswith((".executed", ".failed")):
                told = event["resource"].get("prefect.resource.name", "")
                self.moments.append((at, "automation", name, f"“{told}” {name.rpartition('.')[2]}"))
        elif (state := name.removeprefix("prefect.flow-run.")) in _STATES:
            flow = next(
                related["prefect.resource.name"]
                for related in event["related"]
                if related["prefect.resource.role"] == "flow"
            )
            self.moments.append((at, "worker", name, f"`{flow}` is {state}"))

    def names(self, prefix: str) -> list[str]:
        """Names of the events with a prefix since the beginning, in their order."""
        return [name for at, _, name, _ in sorted(self.moments) if at >= self.began and name.startswith(prefix)]

    def write(self, file: Path) -> None:
        """The timeline as a Markdown table, times counted from its beginning."""
        rows = [
            f"| {_minutes(at - self.began)} | {who} | {sentence} |"
            for at, who, _, sentence in sorted(self.moments)
            if at >= self.began
        ]
        head = ["| min:s | who | what |", "| ---: | --- | --- |"]
        file.write_text("\n".join([*_TEXT.splitlines(), "", *head, *rows]) + "\n")


def _minutes(passed: Any) -> str:
    minutes, seconds = divmod(round(passed.total_seconds()), 60)
    return f"{minutes}:{seconds:02d}"


_TEXT = """# Drift to a new champion, by itself

Recorded by tests/end_to_end/test_operated_loop.py (`make timeline` records anew) on two slow cores by real processes.
The shop is simulated and its clock runs fast: what takes weeks takes minutes, so runs that a schedule starts (drift
hourly, the A/B daily) are asked for when their time has come. Nobody releases anything: `release.canary_share = 0.5`
and `release.promote = true` leave that to the gate."""
