"""Watch a loop: one look at its traffic, judged within a weekly budget of false alarms, kept, drawn and told."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import takewhile
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from prefect import flow
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from components.errors import InputError
from components.interactions.importers import interaction_log
from components.interactions.log import InteractionLog
from components.interactions.log_folder import discard_folder
from components.interactions.stored_copies import write_whole
from components.interactions.traffic import first_feedback, requests_by_window
from flows.champion_origin import Origin, find_origin
from flows.config import LoopConfig, interaction_database
from flows.events import LoopEvent, emit
from flows.lineage import code_digest, digest_of, lock_digest
from flows.settings import PlatformSettings, require_writable
from flows.stage_store import StageStore
from flows.tasks import publish
from monitoring.alarm_budget import WEEK, look_level
from monitoring.drift_tests import Volume
from monitoring.traffic_watch import (
    DELAY,
    EFFECTIVE,
    ENTROPY,
    NATS,
    VOLUME,
    Models,
    Span,
    Traffic,
    Watch,
    WatchConfig,
    WatchedColumn,
    compare_volume,
    judge,
    load_traffic,
    means,
    read_traffic,
    save_traffic,
)
from monitoring.workspace import KEPT_LOOKS, add_look
from services.policy_store import load_model
from services.releases import Release, Releases

#: Folders of the home: the history of looks, and Evidently's workspace.
LOOKS, WORKSPACE = "drift", "evidently"
#: What the first days' columns depend on beside the log and the lock.
READS = ("components", "monitoring", "flows/drift_monitoring.py")
#: Columns whose means Evidently's panels draw.
DRAWN = ("reward", "click_rate", "purchase_rate", ENTROPY, NATS, DELAY)


class DriftLook(BaseModel):
    """One look at a loop's traffic."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    loop: str = Field(description="The recommender.")
    seen_at: datetime = Field(description="When the log was read.")
    champion: str | None = Field(description="Tag of the policy that serves; None where nothing is released.")
    serves_since: datetime | None = Field(default=None, description="When it became the champion.")
    window_began: datetime | None = Field(default=None, description="Sessions that began from here on are judged ...")
    window_ended: datetime | None = Field(default=None, description="... and before this.")
    n_requests: int = Field(default=0, description="Requests of these sessions that the champion served.")
    n_users: int = Field(default=0, description="Users who made them.")
    n_before: int = Field(default=0, description="Requests of the champion's first days, which they are compared with.")
    level: float = Field(default=0.0, description="Chance of a false alarm that this look may use.")
    weekly_false_alarms: float = Field(description="Chance of a false alarm that a week's looks share.")
    columns: tuple[WatchedColumn, ...] = Field(default=(), description="What was tested, what moved first.")
    alarm: bool = Field(default=False, description="Whether anything moved.")
    notes: tuple[str, ...] = Field(default=(), description="What could not be watched, and why.")

    @property
    def moved(self) -> tuple[WatchedColumn, ...]:
        """What moved, surest first."""
        return tuple(column for column in self.columns if column.moved)

    def verdict(self) -> str:
        """The look in a sentence."""
        if self.alarm:
            panels = ", ".join(dict.fromkeys(column.panel for column in self.moved))
            return f"{len(self.moved)} of {len(self.columns)} tests found a move: {panels}"
        return f"nothing moved in {len(self.columns)} tests" if self.columns else "nothing could be judged"

    def markdown(self) -> str:
        """The look as text, the verdict first."""
        lines = [f"# {self.loop}: {self.verdict()}"]
        if self.window_began is not None and self.window_ended is not None:
            lines.append(
                f"{self.n_requests:,} requests of {self.n_users:,} users from {self.window_began:%Y-%m-%d %H:%M} to "
                f"{self.window_ended:%Y-%m-%d %H:%M} UTC, served by {self.champion}; {self.n_before:,} requests of its "
                f"first days. This look may err with a chance of {self.level:.2g}, all of a week together "
                f"{self.weekly_false_alarms:g}."
            )
        if self.columns:
            rows = [
                f"| {'**moved**' if column.moved else ''} | {column.panel} | {column.column} | {column.against} | "
                f"{_number(column.before)} | {_number(column.now)} | {column.score:.3g} | {column.p_value:.2g} |"
                for column in self.columns
            ]
            head = "| | panel | column | against | before | now | score | p |"
            lines.append("\n".join([head, "| --- " * 8 + "|", *rows]))
        lines += [f"- {note}" for note in self.notes]
        return "\n\n".join(lines)


@flow(name="drift-monitoring", timeout_seconds=PlatformSettings().run_hours * 3600)
def drift_monitoring(config: LoopConfig, path: Path | None = None, watch: WatchConfig | None = None) -> DriftLook:
    """Look at the loop's traffic once.

    Args:
        config: its loop, and how its source `log` reads the interaction log.
        path: SQLite file of the log; the endpoint's own database by default.
        watch: what a look compares, and how often it may err.
    """
    seen = look_and_keep(config, path, watch or WatchConfig(), datetime.now(UTC))
    publish("drift-monitoring", seen.markdown())
    if seen.alarm:
        emit(LoopEvent.DRIFTED, seen.loop, reason_of(seen), evidence_of(seen))
    return seen


def watch_config(**options: float) -> WatchConfig:
    """What a look compares, from options of the command line by name.

    Raises:
        InputError: a value is out of its bounds.
    """
    try:
        return WatchConfig.model_validate(options)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = str(first["loc"][0]).replace("_", "-")
        raise InputError(f"--{name} {first['input']}: {first['msg'][0].lower()}{first['msg'][1:]}") from None


def reason_of(seen: DriftLook) -> str:
    """Why a look rings, in a sentence."""
    return f"{seen.verdict()}; surest: {seen.moved[0].sentence()}"


def evidence_of(seen: DriftLook) -> dict[str, object]:
    """The figures behind an alarm, as JSON."""
    return seen.model_dump(mode="json", exclude={"columns"}) | {
        "moved": [column.model_dump(mode="json") for column in seen.moved]
    }


def look_and_keep(config: LoopConfig, path: Path | None, watch: WatchConfig, seen_at: datetime) -> DriftLook:
    """Look once, add the look to the loop's history and a run to its project in Evidently's workspace.

    Args:
        config: the loop.
        path: SQLite file of the log; the endpoint's own database by default.
        watch: what is compared.
        seen_at: the moment of the look: what was logged later is as if it had not come yet.

    Raises:
        InputError: the source is another one than the log, `as_of` is set, there is no interaction log, or the home
            cannot be written.
        LogUnavailableError: the database cannot be reached.
    """
    settings = PlatformSettings()
    require_writable(settings.home, "SLATELOOP_HOME")
    seen, before, now = look(config, path, watch, settings, read_looks(settings.home, config.loop), seen_at)
    keep_look(settings.home, seen)
    forget_looks(settings.home, seen)
    if now is not None:
        add_look(
            settings.home / WORKSPACE,
            seen.loop,
            at=seen.seen_at,
            before=None if before is None else before.requests,
            now=now.requests,
            figures=_figures(seen, now),
        )
    return seen


def look(
    config: LoopConfig,
    path: Path | None,
    watch: WatchConfig,
    settings: PlatformSettings,
    earlier: Iterator[DriftLook],
    seen_at: datetime,
) -> tuple[DriftLook, Traffic | None, Traffic | None]:
    """One look with both sides of it, the champion's first days and the window, where they could be read.

    Args:
        config: the loop.
        path: SQLite file of the log; the endpoint's own database by default.
        watch: what is compared.
        settings: where runs and models lie.
        earlier: the loop's looks before, newest first.
        seen_at: the moment of the look.

    Raises:
        InputError: as `look_and_keep`.
        LogUnavailableError: the database cannot be reached.
    """
    if not isinstance(config.source, interaction_log.Config):
        raise InputError(f"source.name = {config.source.name!r}: live traffic is read from the source 'log'")  # type: ignore[attr-defined]
    if config.as_of is not None:
        raise InputError(f"as_of = {config.as_of}: drift is watched of this moment; leave as_of out")
    torch.set_num_threads(config.threads)
    log = InteractionLog(interaction_database(path))
    release = _champions_first(Releases(log).history(config.loop))
    if release is None:
        note = f"loop {config.loop!r}: nothing is released, so there is no champion to watch"
        nothing = DriftLook(
            loop=config.loop,
            seen_at=seen_at,
            champion=None,
            weekly_false_alarms=watch.weekly_false_alarms,
            notes=(note,),
        )
        return nothing, None, None
    origin, store = find_origin(release.champion, settings), StageStore(settings.home.resolve() / "stages")
    reader = _Reader(config, config.source, log, watch, release, origin, seen_at, store)
    first_days, now = reader.first_days(), reader.now()
    notes = [*reader.origin.missing]
    columns: list[WatchedColumn] = []
    n_users = 0 if now is None else now.requests.n_users
    if now is None or n_users < watch.min_users:
        notes.append(
            f"{n_users:,} users in the window: too few; from {watch.min_users:,} on their requests are compared, and "
            "until then only their number"
        )
    else:
        if first_days is None or first_days.requests.n_users < watch.min_users:
            notes.append("the champion's first days are too few yet to compare what it shows and earns with them")
            first_days = None
        columns += Watch(first_days, reader.origin.reference).compare(now)
    traffic = requests_by_window(log, config.loop, seen_at, watch.window, watch.history_windows + 1)
    *history, latest = [Volume(one.requests, one.squares) for one in traffic] or [Volume(0, 0)]
    volume = compare_volume(history, latest)
    if not volume:
        notes.append(f"{len(history)} earlier windows with traffic; from 3 on the number of requests is compared")
    columns += volume
    previous = _last_judged(earlier, release.champion, reader.serves_since, seen_at)
    level = look_level(watch.weekly_false_alarms, reader.serves_since, previous, seen_at) if columns else 0.0
    tested = judge(columns, level, watch.floor)
    seen = DriftLook(
        loop=config.loop,
        seen_at=seen_at,
        champion=release.champion,
        serves_since=reader.serves_since,
        window_began=reader.window_began,
        window_ended=reader.window_ended,
        n_requests=0 if now is None else now.n_requests,
        n_users=n_users,
        n_before=0 if first_days is None else first_days.n_requests,
        level=level,
        weekly_false_alarms=watch.weekly_false_alarms,
        columns=tested,
        alarm=any(column.moved for column in tested),
        notes=tuple(notes),
    )
    return seen, first_days, now


def _last_judged(earlier: Iterator[DriftLook], champion: str, since: datetime, until: datetime) -> datetime | None:
    """When a look last spent of the champion's budget; looks are read no further back than that."""
    of_champion = takewhile(lambda one: one.seen_at >= since, earlier)
    judged = (one.seen_at for one in of_champion if one.columns and one.champion == champion and one.seen_at <= until)
    return next(judged, None)


def _champions_first(history: list[Release]) -> Release | None:
    """The release since which the champion has served without a break."""
    first = None
    for release in history[::-1]:
        if first is not None and release.champion != first.champion:
            break
        first = release
    return first


class _Reader:
    """The two sides of a look."""

    def __init__(
        self, config: LoopConfig, source: interaction_log.Config, log: InteractionLog, watch: WatchConfig,
        release: Release, origin: Origin, seen_at: datetime, store: StageStore,
    ) -> None:  # fmt: skip
        self.origin, self._store = origin, store
        self.serves_since = datetime.fromtimestamp(release.released_at / 1e6, UTC)
        self._attribution = timedelta(minutes=source.attribution_minutes)
        self._settled = self._attribution + timedelta(minutes=watch.settle_minutes)
        self.window_ended = seen_at - self._settled
        self.window_began = max(self.window_ended - watch.window, self.serves_since)
        self._source = source.model_copy(update={"items": None, "history_days": None})
        self._loop, self._log, self._watch, self._champion = config.loop, log, watch, release.champion
        self._models = Models(load_model(release.champion), origin.user_model, origin.items)

    def now(self) -> Traffic | None:
        """The window; None where nothing was logged in it."""
        return self._read(self.window_began, self.window_ended)

    def first_days(self) -> Traffic | None:
        """The champion's first days before the window; None where nothing was logged in them."""
        over = self.serves_since + timedelta(days=self._watch.baseline_days)
        if self.window_began < over:
            return self._read(self.serves_since, self.window_began)
        # All that is known of them was known when the window began: read once, they stay as they are. They lie among
        # the stages with the names of their users, so that `slateloop forget` drops them as it drops other copies.
        name = f"first-days-{self._loop}"
        key = digest_of(
            self._log.engine.url.render_as_string(), self._champion, self.serves_since.isoformat(),
            self._watch.model_dump_json(), self._source.model_dump_json(), str(self.origin.user_model is None),
            str(self.origin.items is None), code_digest(READS), lock_digest(),
        )  # fmt: skip
        folder = self._store.folder(name, key)
        if not self._store.is_complete(name, key):

            def read(out: Path) -> None:
                if self._read(self.serves_since, over, out) is None:
                    raise interaction_log.NothingLoggedError(f"{self._champion} served nobody in its first days")

            try:
                self._store.write(name, key, read, {})
            except interaction_log.NothingLoggedError:
                return None
            for other in set(folder.parent.glob("[!.]*")) - {folder}:
                discard_folder(other)
        return load_traffic(folder)

    def _read(self, since: datetime, until: datetime, out: Path | None = None) -> Traffic | None:
        """The champion's sessions that began in a span; left in a folder, too, where one is given."""
        if until <= since:
            return None
        # As much after the sessions' beginnings as a window has: both sides are cut alike.
        known = until + self._settled
        url = self._log.engine.url.render_as_string(hide_password=False)
        with TemporaryDirectory() as scratch:
            try:
                log = interaction_log.import_database(
                    self._source,
                    url,
                    Path(scratch) / "log",
                    self._loop,
                    until=known,
                    since=since - interaction_log.EARLIER,
                )
            except interaction_log.NothingLoggedError:
                return None
            feedback = first_feedback(self._log, self._loop, since, known, self._attribution)
            span = Span(self._champion, since, until, anchor=until, window=self._watch.window)
            traffic = read_traffic(log, self._models, span, self._watch, feedback)
            if out is not None and traffic.n_requests:
                save_traffic(traffic, out)
                log.scan().select("user_id").unique().collect().write_parquet(out / "users.parquet")
        return traffic if traffic.n_requests else None


def _figures(seen: DriftLook, now: Traffic) -> dict[str, float]:
    """The numbers of a look that Evidently's panels draw."""
    found = {column.column: column.now for column in seen.columns if column.now is not None}
    known = {**means(now.requests), **means(now.asked)}
    return {
        **{name: known[name] for name in DRAWN if name in known},
        # Of the champion's own log the share is 1 but for the rounding of its logits, which is nothing to draw.
        **{name: round(found[name], 6) for name in (EFFECTIVE, VOLUME) if name in found},
        "moved_share": len(seen.moved) / max(len(seen.columns), 1),
        "alarm": float(seen.alarm),
    }


def keep_look(home: Path, seen: DriftLook) -> Path:
    """Leave a look in the loop's history; returns its file.

    Raises:
        InputError: it cannot be written.
    """
    file = home / LOOKS / seen.loop / _name_of(seen.seen_at)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, seen.model_dump_json(indent=2) + "\n")
    except OSError as error:
        raise InputError(f"{file}: cannot be written: {error.strerror}; set SLATELOOP_HOME") from None
    return file


def forget_looks(home: Path, newest: DriftLook) -> None:
    """Delete looks at a loop beyond the newest 500; those of the last week stay, which the budget is reckoned from.

    Raises:
        InputError: a file cannot be deleted.
    """
    week_began = _name_of(newest.seen_at - WEEK)
    for file in _looks(home, newest.loop)[KEPT_LOOKS:]:
        if file.name < week_began:
            try:
                file.unlink(missing_ok=True)
            except OSError as error:
                raise InputError(f"{file}: cannot be deleted: {error.strerror}; set SLATELOOP_HOME") from None


def read_looks(home: Path, loop: str) -> Iterator[DriftLook]:
    """A loop's looks, newest first, each read when it is asked for.

    Raises:
        InputError: a file is no look.
    """
    for file in _looks(home, loop):
        try:
            yield DriftLook.model_validate_json(file.read_bytes())
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise InputError(f"{file}: is no look: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def _looks(home: Path, loop: str) -> list[Path]:
    """Files of a loop's looks, newest first: names grow with time."""
    return sorted((home / LOOKS / loop).glob("[!.]*.json"), reverse=True)


def _name_of(seen_at: datetime) -> str:
    return f"{seen_at:%Y%m%dT%H%M%S.%fZ}.json"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
