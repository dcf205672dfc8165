"""The A/B of a running canary: analysed from the interaction log, judged by the gate, guarded."""

from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

from pydantic import BaseModel, ConfigDict, Field

from components.errors import InputError
from components.experiment.ab import AbResult
from components.experiment.gate import Decision
from components.experiment.live_ab import CHALLENGER, CHAMPION, LiveSessions, live_ab, proven_harm
from components.interactions.importers import interaction_log
from components.interactions.log import InteractionLog
from components.interactions.stored_copies import write_whole
from flows.config import LoopConfig, interaction_database
from services.policy_store import load_gate_record, load_lineage
from services.releases import MAX_REASON, Release, ReleaseChangedError, Releases


class AbReport(BaseModel):
    """What a canary's A/B shows at this moment."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    release: Release = Field(description="The release whose arms are compared.")
    seen_at: datetime = Field(description="When the log was read.")
    sessions: dict[str, int] = Field(description="Sessions of each arm that count.")
    n_cut: int = Field(description="Sessions that the release's beginning cut in two; they do not count.")
    n_unknown: int = Field(description="Sessions of which no feedback is known; they do not count.")
    result: AbResult | None = Field(description="None where an arm has fewer than two users so far.")
    decision: Decision | None = Field(
        description="The gate's, on the challenger's own evidence and this A/B; None where it came without evidence."
    )
    harm: tuple[str, ...] = Field(description="What is proven to be worse with the challenger.")
    rolled_back: Release | None = Field(default=None, description="The release by which the guard took it away.")
    promoted: Release | None = Field(default=None, description="The release by which it became the champion.")

    def markdown(self) -> str:
        """The report as text, the verdict first."""
        release = self.release
        counts = ", ".join(f"{count:,} {arm}" for arm, count in self.sessions.items()) or "none"
        lines = [
            f"# {release.loop}, release {release.number}: {self.verdict()}",
            f"{release.challenger} for {release.challenger_share:.3g} of the users against {release.champion}.",
            f"Sessions: {counts}; {self.n_cut:,} cut by the release and {self.n_unknown:,} without feedback left out.",
        ]
        if self.rolled_back is not None:
            lines.append(f"The guard took the challenger away in release {self.rolled_back.number}.")
        if self.promoted is not None:
            lines.append(f"The challenger is the champion since release {self.promoted.number}.")
        if self.decision is not None:
            lines += [f"- {'✓' if reason.passed else '✗'} {reason.text}" for reason in self.decision.reasons]
        return "\n\n".join(lines[:3]) + "\n\n" + "\n".join(lines[3:])

    def verdict(self) -> str:
        """The report in a few words."""
        if self.harm:
            return f"harm is proven: {'; '.join(self.harm)}"
        if self.result is None:
            return "too few users yet"
        return "not judged, since it came without evidence" if self.decision is None else self.decision.outcome.value


class NoCanaryError(InputError):
    """A loop has no challenger in live traffic, so there is nothing to compare."""


def analyze_release(config: LoopConfig, path: Path | None = None) -> AbReport:
    """What the A/B of the loop's release shows now.

    Where the challenger's run read the interaction log, feedback counts as it did there, whatever is configured now:
    what an A/B measures must not be chosen when its result can be seen.

    Raises:
        NoCanaryError: the loop has a release, and no challenger in it.
        InputError: the loop has no release, the source is another one than the log, or `as_of` is set.
        LogUnavailableError: the database cannot be reached.
    """
    if not isinstance(config.source, interaction_log.Config):
        raise InputError(f"source.name = {config.source.name!r}: a live A/B is read from the source 'log'")  # type: ignore[attr-defined]
    if config.as_of is not None:
        raise InputError(f"as_of = {config.as_of}: a live A/B is of this moment; leave as_of out")
    url = interaction_database(path)
    releases = Releases(InteractionLog(url))
    release = releases.serving(config.loop)
    if release.challenger is None or release.planned_sessions is None:
        raise NoCanaryError(
            f"loop {config.loop!r}: has no challenger in release {release.number}; an A/B needs a canary"
        )
    record = load_gate_record(release.challenger)
    source = _source_of(release.challenger) or config.source
    first = releases.history(config.loop)[release.experiment - 1]
    began = datetime.fromtimestamp(first.released_at / 1e6, UTC)
    shares = release.shares()
    seen_at = datetime.now(UTC)
    result: AbResult | None = None
    counted = LiveSessions({}, 0, 0)
    with TemporaryDirectory() as scratch:
        try:
            log = interaction_log.import_database(
                source.model_copy(update={"items": None, "history_days": None}),
                url,
                Path(scratch) / "log",
                config.loop,
                until=seen_at,
                since=began - interaction_log.EARLIER,
            )
        except interaction_log.NothingLoggedError:
            pass
        else:
            result, counted = live_ab(
                log,
                experiment=interaction_log.EXPERIMENT.format(release.experiment),
                treatment=release.challenger if record is None else record.evidence.challenger,
                control=release.champion,
                planned_share=shares[CHALLENGER] / (shares[CHALLENGER] + shares[CHAMPION]),
                planned_sessions=release.planned_sessions,
            )
    return AbReport(
        release=release,
        seen_at=seen_at,
        sessions=counted.by_arm,
        n_cut=counted.n_cut,
        n_unknown=counted.n_unknown,
        result=result,
        decision=None if record is None else record.live_decision(result),
        harm=() if result is None else proven_harm(result, config.gate if record is None else record.config),
    )


def guarded(report: AbReport, path: Path | None = None) -> AbReport:
    """Take the challenger away where harm is proven, unless somebody changed the release meanwhile.

    Raises:
        LogUnavailableError: the database cannot be written.
    """
    if not report.harm:
        return report
    releases = Releases(InteractionLog(interaction_database(path)))
    try:
        rolled_back = releases.roll_back(
            report.release.loop,
            f"the guard: {'; '.join(report.harm)}"[:MAX_REASON],
            action="guard",
            left=report.release.number,
        )
    except ReleaseChangedError:
        return report
    return report.model_copy(update={"rolled_back": rolled_back})


def _source_of(tag: str) -> interaction_log.Config | None:
    """How the run that packaged a policy read the interaction log; None where it read something else."""
    source = load_lineage(tag).get("config", {}).get("source", {})
    return interaction_log.Config.model_validate(source) if source.get("name") == "log" else None


def write_report(report: AbReport, file: Path) -> None:
    """Leave the A/B's result as JSON, for `record-ab`.

    Raises:
        InputError: there is no result yet, or the file cannot be written.
    """
    if report.result is None:
        raise InputError(f"{file}: there is no result to write: {report.verdict()}")
    try:
        write_whole(file, report.result.model_dump_json(indent=2) + "\n")
    except OSError as error:
        raise InputError(f"{file}: cannot be written: {error.strerror}") from None
