"""Forgetting users wherever the platform has put their rows, and rows that are too old.

The tombstone comes first: from then on no import holds the users. All else can be done again, and finishes what was
interrupted: runs are marked before the stages go that tell of them, and a stage before those that it was made from.
"""

import json
import shutil
import time
from collections.abc import Collection, Iterator, Sequence
from datetime import UTC, datetime
from graphlib import TopologicalSorter
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from components.interactions.deletion import erase, first_shown, forget_late_rows, forget_older, forget_users
from components.interactions.log import InteractionLog, microseconds
from components.interactions.log_folder import discard_folder
from components.interactions.stored_copies import Changed, forget_below, is_temporary, names_any, users_below
from flows.data_versions import add_to_cache, purge_cache
from flows.run_folder import mark_forgotten, read_lineage
from flows.settings import PlatformSettings
from flows.stage_store import StageStore, clear_abandoned, progress_sink
from monitoring.drift_reference import OWNERS, REFERENCE, forget_in_reference

#: Temporary folders that do not tell whose they are and have not been touched for so long are nobody's any more.
ABANDONED_SECONDS = 3_600.0


class Forgetting(BaseModel):
    """What was deleted, by place."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    users: int = Field(default=0, description="Users that were to be forgotten; 0 where rows were only too old.")
    at: datetime = Field(description="When.")
    requests: int = Field(description="Recommendations deleted from the interaction log.")
    feedback: int = Field(description="Pieces of feedback deleted from it.")
    erased: bool = Field(description="Whether the database's files were freed of what deletion leaves in them.")
    stages: int = Field(default=0, description="Finished stages dropped: they held the users' rows, or came from them.")
    runs: tuple[str, ...] = Field(default=(), description="Runs marked as not replayable.")
    logs_rewritten: int = Field(default=0, description="Logs on disk written anew.")
    logs_removed: int = Field(default=0, description="Logs on disk that held nobody else.")
    files: int = Field(default=0, description="Other files rewritten: quarantines, drift references, records.")
    rows: int = Field(default=0, description="Rows deleted from logs and files on disk.")
    cached: int = Field(default=0, description="Files deleted from DVC's cache.")
    pinned: bool = Field(default=False, description="Whether data.dvc pins a version that is gone by that.")
    remotes: tuple[str, ...] = Field(default=(), description="DVC's remotes, which are not looked into.")
    under_way: tuple[str, ...] = Field(default=(), description="Temporary folders of others, who may have read rows.")
    left: tuple[str, ...] = Field(default=(), description="Files that still name a user, or cannot be read.")

    @property
    def found(self) -> bool:
        """Whether there was anything to delete."""
        return any((self.requests, self.stages, self.runs, self.rows, self.files, self.logs_removed, self.cached))

    @property
    def whole(self) -> bool:
        """Whether everything that was to go is gone."""
        return not self.left and not (self.found and self.under_way)

    def lines(self) -> Iterator[str]:
        """What a person wants to know of it, one place a line."""
        if self.users and not self.found:
            yield f"No rows were found; {_n(self.users, 'user')} left a tombstone all the same."
        else:
            yield f"Interaction log: {_n(self.requests, 'request')}, {_n(self.feedback, 'piece')} of feedback deleted."
        if self.stages:
            yield f"Stages: {self.stages:,} dropped; the next run computes them anew."
        if self.rows or self.files:
            yield (
                f"Stored copies: {_n(self.rows, 'row')} deleted; {_n(self.logs_rewritten, 'log')} and "
                f"{_n(self.files, 'other file')} rewritten, {_n(self.logs_removed, 'log')} removed."
            )
        if self.cached:
            yield f"DVC's cache: {_n(self.cached, 'file')} deleted."
        if self.runs:
            yield f"Not replayable from now on: {', '.join(self.runs)}. Policies keep what they learned; train anew."
        if self.pinned:
            yield "data.dvc pins a version that held the rows and is gone: `slateloop data pin` pins what there is now."
        if self.cached and self.remotes:
            yield f"DVC's remotes may hold pushed versions ({', '.join(self.remotes)}): `dvc gc --cloud` cleans them."
        if not self.erased:
            yield "The database's files may hold traces of deleted rows: add --vacuum when the endpoint can wait."
        for path in self.under_way if self.found else ():
            yield f"Under way: {path}. If it read the rows before, it writes them again: repeat this when it has ended."
        for what in self.left:
            yield f"Left: {what}"


def forget(
    database: str,
    user_hashes: Collection[str],
    settings: PlatformSettings,
    also: Sequence[Path] = (),
    *,
    vacuum: bool = False,
) -> Forgetting:
    """Delete users' rows from the interaction log and from all that was made of it on this machine.

    Args:
        database: URL of the interaction log.
        user_hashes: as the log stores them.
        settings: where stages, runs and data lie.
        also: other folders with logs or runs.
        vacuum: write a large SQLite file anew, which keeps the endpoint waiting.

    Raises:
        InputError: there is no interaction log, or a folder cannot be written.
        LogUnavailableError: the database cannot be reached or written.
    """
    at, log = datetime.now(UTC), InteractionLog(database)
    store = StageStore(settings.home.resolve() / "stages")
    folders = [settings.runs.resolve(), *(folder.resolve() for folder in also)]
    _say("database", "looking for the rows", 0.0)
    with log.reading():
        pass
    log.upgrade()
    first = first_shown(log, user_hashes)
    under_way = [path for folder in (store.root, settings.data, *folders) for path in _temporary(folder)]
    # What only the tables tell must be known before they forget it.
    lost = {run: users for run, stages in _lineages(folders) if (users := _of_lost_dataset(run, stages, store, first))}
    for run, users in lost.items():
        mark_forgotten(run, len(users), at)
    deleted = forget_users(log, user_hashes)
    _say("database", f"done: {_n(len(deleted.request_ids), 'request')} deleted", 1.0)

    affected = _affected_stages(store, user_hashes)
    marked = list(lost)
    changed = Changed()
    for run, lineage in _lineages(folders):
        _say("runs", run.name, 0.5)
        users = users_below(run, user_hashes).union(*(affected.get(key, ()) for key in lineage.values()))
        n_rows = sum(forget_in_reference(file.parent, user_hashes) for file in list(run.rglob(OWNERS)))
        if (users or n_rows) and run not in lost:
            mark_forgotten(run, max(len(users), 1), at)
            marked.append(run)
        changed += Changed(n_files=int(n_rows > 0), n_rows=n_rows)
    _say("runs", f"done: {_n(len(marked), 'run')} marked", 1.0)
    for folder in (*folders, settings.data.resolve()):
        _say("copies", str(folder), 0.5)
        changed += forget_below(folder, user_hashes, deleted.request_ids)
    _say("copies", f"done: {_n(changed.n_rows, 'row')} deleted", 1.0)
    n_stages = _drop_stages(store, affected, user_hashes)
    _say("stages", f"done: {n_stages:,} dropped", 1.0)
    data = settings.data.resolve()
    for folder in sorted({data / log.relative_to(data).parts[0] for log in changed.logs if data in log.parents}):
        add_to_cache(folder)
    purged = purge_cache(data, user_hashes)
    _say("dvc", f"done: {_n(purged.n_objects, 'file')} deleted", 1.0)

    deleted += forget_late_rows(log, deleted)
    erased = erase(log, vacuum=vacuum)
    # Whoever closes a file takes SQLite's locks on it away from the whole process.
    log.engine.dispose()
    looked_at = [settings.home.resolve(), data, *folders]
    if log.engine.dialect.name == "sqlite":
        tables = Path(log.engine.url.database or "").resolve()
        looked_at += tables.parent.glob(f"{tables.name}*")
    _say("traces", "looking for what is left", 0.0)
    nameless = (
        f"{file}: does not tell whose its rows are; remove it"
        for run in marked
        for file in run.rglob(REFERENCE)
        if not file.with_name(OWNERS).exists()
    )
    left = [*changed.left, *nameless, *(f"{file}: names a user" for file in _naming(looked_at, user_hashes))]
    _say("traces", "done", 1.0)
    return Forgetting(
        users=len(set(user_hashes)),
        at=at,
        requests=len(deleted.request_ids),
        feedback=deleted.n_feedback,
        erased=erased,
        stages=n_stages,
        runs=tuple(run.name for run in marked),
        logs_rewritten=len(changed.logs),
        logs_removed=changed.n_removed,
        files=changed.n_files,
        rows=changed.n_rows,
        cached=purged.n_objects,
        pinned=purged.pinned,
        remotes=purged.remotes,
        under_way=tuple(map(str, under_way)),
        left=tuple(left),
    )


def forget_before(database: str, before: datetime, loop: str | None = None, *, vacuum: bool = False) -> Forgetting:
    """Delete from the interaction log what was shown before a time; logs on disk are versions, and stay.

    Raises:
        InputError: there is no interaction log.
        LogUnavailableError: the database cannot be reached or written; what was deleted until then stays so.
    """
    at, log = datetime.now(UTC), InteractionLog(database)
    deleted = forget_older(
        log, before, loop, lambda n_requests: _say("database", f"{_n(n_requests, 'request')} deleted", 0.5)
    )
    _say("database", f"done: {_n(len(deleted.request_ids), 'request')} deleted", 1.0)
    erased = erase(log, vacuum=vacuum)
    log.engine.dispose()
    return Forgetting(at=at, requests=len(deleted.request_ids), feedback=deleted.n_feedback, erased=erased)


def _lineages(folders: Sequence[Path]) -> Iterator[tuple[Path, dict[str, str]]]:
    """Past runs' folders, each with the keys of its stages by name."""
    for folder in folders:
        # A name that begins with a dot is a run's folder before it is whole.
        for file in sorted(folder.glob("[!.]*/lineage.json")):
            yield file.parent, read_lineage(file.parent).get("stages", {})


def _of_lost_dataset(
    run: Path, stages: dict[str, str], store: StageStore, first: dict[tuple[str, str], int]
) -> frozenset[str]:
    """Users of a run whose dataset is no longer there to be looked at: those whom its loop knew when it began."""
    key = stages.get("import-data")
    summary = json.loads((run / "run.json").read_bytes()) if (run / "run.json").is_file() else {}
    if key is None or summary.get("source") != "log" or store.is_complete("import-data", key):
        return frozenset()
    started = microseconds(datetime.fromisoformat(summary["started"]))
    return frozenset(user for (loop, user), at in first.items() if loop == summary["loop"] and at <= started)


def _affected_stages(store: StageStore, user_hashes: Collection[str]) -> dict[str, frozenset[str]]:
    """The users that finished stages hold, or were computed from, by the stages' keys."""
    finished = store.finished()
    graph = {key: set(manifest.upstream.values()) & finished.keys() for key, (_, manifest) in finished.items()}
    affected: dict[str, frozenset[str]] = {}
    for number, key in enumerate(TopologicalSorter(graph).static_order()):
        folder, manifest = finished[key]
        _say("stages", f"looking into {manifest.stage}", number / len(finished))
        users = users_below(folder, user_hashes).union(*(affected.get(above, ()) for above in graph[key]))
        if users:
            affected[key] = users
    return affected


def _drop_stages(store: StageStore, affected: dict[str, frozenset[str]], user_hashes: Collection[str]) -> int:
    """Drop stages, those that others were made from last, and whatever else lies among them and holds the users."""
    finished = store.finished()
    dropped = [finished[key][0] for key in reversed(affected) if key in finished]
    whole = {folder for folder, _ in finished.values()}
    dropped += [
        folder
        for folder in sorted(store.root.glob("*/[!.]*"))
        if folder.is_dir() and folder not in whole and users_below(folder, user_hashes)
    ]
    for folder in dropped:
        discard_folder(folder)
    return len(dropped)


def _temporary(folder: Path) -> list[Path]:
    """What somebody is writing below a folder; what nobody writes any more is removed."""
    if not folder.is_dir():
        return []
    for parent in {path.parent for path in folder.rglob(".*") if is_temporary(Path(path.name))}:
        clear_abandoned(parent)
    found = []
    for path in sorted(folder.rglob(".*")):
        if not is_temporary(Path(path.name)) or is_temporary(path.parent.relative_to(folder)):
            continue
        try:
            touched = max(part.stat().st_mtime for part in [path, *path.rglob("*")])
        except FileNotFoundError:
            touched = time.time()
        if time.time() - touched < ABANDONED_SECONDS:
            found.append(path)
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    return found


def _naming(places: Sequence[Path], user_hashes: Collection[str]) -> list[Path]:
    """Files at or below places that name a user; Parquet is looked into elsewhere."""
    files = {file for place in places for file in ([place] if place.is_file() else place.rglob("*")) if file.is_file()}
    return [file for file in sorted(files) if file.suffix != ".parquet" and names_any(file, user_hashes)]


def _n(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _say(place: str, message: str, share: float) -> None:
    progress_sink.get()(place, message, share)
