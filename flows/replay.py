"""Replay: a finished run once more, from what its lineage pins, and whether the same comes out.

Only what decides is computed again, up to the gate, in a place that is removed afterwards: a replay packages nothing,
tells nobody, and leaves the ledger, the data folder and the finished stages as they are.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from prefect import flow
from prefect.artifacts import create_table_artifact
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from components.errors import InputError, SlateloopError
from components.interactions.log_folder import open_log
from flows import stages
from flows.action_stages import names_of
from flows.as_of import pinned
from flows.config import LoopConfig, require_device, source_path
from flows.lineage import code_digest, files_changed_since, folder_digest, lock_digest
from flows.numbers import kept_figure
from flows.retraining import learn_and_judge, source_ref
from flows.run_folder import find_run, read_lineage, read_mark, read_record
from flows.run_record import POLICY_FILES
from flows.settings import PlatformSettings, require_writable
from flows.stage_store import StageStore, clear_abandoned, staging_beside
from flows.stages import Estimates, read_ab, read_decision
from flows.tasks import Run

LOCK = "constraints.txt"
#: How much of a digest is shown.
DIGITS = 12


class NotReplayableError(InputError):
    """What a run was made from is no longer there."""


class ReplayDiffersError(SlateloopError):
    """The same lineage came to something else; the command line exits with 1."""


class Compared(BaseModel):
    """One result of a run beside that of its replay."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    what: str
    recorded: str = Field(description="As the run's folder has it, in short.")
    replayed: str = Field(description="As it came out now, in short.")
    equal: bool = Field(description="Whether both are the same, byte for byte or figure for figure.")


class Replay(BaseModel):
    """What a replay found."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: str
    changed: tuple[str, ...] = Field(description="What was another one than then, and was gone on with all the same.")
    compared: tuple[Compared, ...]

    @property
    def equal(self) -> bool:
        """Whether everything came out as it was."""
        return all(part.equal for part in self.compared)


class Recorded(BaseModel):
    """What a run's folder says that it was made from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    folder: Path
    config: LoopConfig
    path: Path | None = Field(description="What the source reads.")
    data_digest: str
    changed: tuple[str, ...] = Field(description="What is another one now, in sentences.")


def read_recorded(run: str, runs: Path, path: Path | None = None, *, anyway: bool = False) -> Recorded:
    """What a run is to be replayed from.

    Args:
        run: its folder, its name, or the beginning of that.
        runs: folder of the runs.
        path: what the source reads, where it lies elsewhere now.
        anyway: go on although code or lock have changed.

    Raises:
        InputError: there is no such run, or its lineage is damaged or incomplete.
        NotReplayableError: rows of its data were deleted, or code, lock or the configuration's form have changed.
    """
    folder = Path(run).resolve() if (Path(run) / "lineage.json").is_file() else find_run(runs, run)
    if mark := read_mark(folder):
        raise NotReplayableError(f"run {folder.name}: {mark.text}")
    lineage = read_lineage(folder)
    needed = ("config", "code_digest", "lock_digest", "data_digest")
    if missing := [name for name in needed if name not in lineage]:
        raise InputError(f"{folder / 'lineage.json'}: {missing[0]} is missing; without it nothing can be replayed")
    changed = tuple(_changed(lineage))
    if changed and not anyway:
        said = "\n".join(f"- {sentence}" for sentence in changed)
        raise NotReplayableError(
            f"run {folder.name}: is not replayable as it was:\n{said}\nCheck that version out, or compare all the same "
            "with --anyway"
        )
    try:
        config = LoopConfig.model_validate(lineage["config"])
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise NotReplayableError(
            f"run {folder.name}: its configuration is another version's: {where}: {first['msg']}; check out commit "
            f"{lineage.get('commit') or 'of that time'}"
        ) from None
    read = path or (Path(lineage["path"]) if lineage.get("path") else None)
    try:
        require_device(config)
        source_path(config, read)
    except InputError as error:
        raise InputError(f"run {folder.name}: {error}") from None
    return Recorded(folder=folder, config=config, path=read, data_digest=lineage["data_digest"], changed=changed)


@flow(name="replay")
def replay(run: str, runs: Path | None = None, path: Path | None = None, anyway: bool = False) -> Replay:
    """Compute a past run's decision anew and compare.

    Args:
        run: its folder, its name, or the beginning of that.
        runs: folder of the runs; the platform's by default.
        path: what the source reads, where it lies elsewhere now.
        anyway: go on although code, lock or data have changed.
    """
    settings = PlatformSettings()
    recorded = read_recorded(run, runs or settings.runs, path, anyway=anyway)
    torch.set_num_threads(recorded.config.threads)
    with _scratch(settings.home) as place:
        again = _open(recorded, place)
        dataset = again(stages.import_source, path=source_ref(again.config, recorded.path))
        data = _data(recorded, dataset.path, anyway=anyway)
        learn_and_judge(again, again(stages.validate_log, dataset=dataset))
        results = {name: ref.path for name, ref in again.stages.items()}
        found = Replay(
            run=recorded.folder.name, changed=recorded.changed, compared=(data, *_compared(recorded, results))
        )
    table = [part.model_dump() for part in found.compared]
    create_table_artifact(table, key=f"{recorded.config.loop}-replay", description=f"Replay of {found.run}")
    return found


def _open(recorded: Recorded, place: Path) -> Run:
    config = pinned(recorded.config, recorded.path)
    return Run(config, StageStore(place), recorded.folder, True, datetime.now(UTC), {}, [], recorded.path)


@contextmanager
def _scratch(home: Path) -> Iterator[Path]:
    """A place for stages that is gone afterwards; among the finished ones, where forgetting users looks for rows."""
    require_writable(home, "SLATELOOP_HOME")
    place = staging_beside(home.resolve() / "stages" / "replay")
    clear_abandoned(place.parent)
    try:
        place.mkdir(parents=True)
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _changed(lineage: dict[str, Any]) -> Iterator[str]:
    """What is another one now than a run's lineage says."""
    if lineage["code_digest"] != code_digest():
        commit = str(lineage.get("commit") or "").partition("+")[0]
        files = files_changed_since(commit)
        which = (
            f"; since commit {commit[:DIGITS]}: {', '.join(files)}" if files else f", of commit {commit or 'unknown'}"
        )
        yield (
            f"code: digest {lineage['code_digest'][:DIGITS]} then, {code_digest()[:DIGITS]} now (components and "
            f"the stages of flows){which}"
        )
    if lineage["lock_digest"] != lock_digest():
        yield f"lock: digest {lineage['lock_digest'][:DIGITS]} then, {lock_digest()[:DIGITS]} now ({LOCK})"


def _data(recorded: Recorded, dataset: Path, *, anyway: bool) -> Compared:
    """The log's digest beside the recorded one.

    Raises:
        NotReplayableError: they differ, and nobody said to go on anyway.
    """
    digest = open_log(dataset / "log").manifest.content_digest
    if digest != recorded.data_digest and not anyway:
        raise NotReplayableError(
            f"run {recorded.folder.name}: its data are no longer what they were: digest "
            f"{recorded.data_digest[:DIGITS]} then, {digest[:DIGITS]} after importing "
            f"{recorded.path or 'them'} anew. Rows were changed, deleted or added since; "
            "compare all the same with --anyway"
        )
    return _digests("data", recorded.data_digest, digest)


def _compared(recorded: Recorded, results: dict[str, Path]) -> Iterator[Compared]:
    """Policies, estimates, A/B and decision of a run beside those of its replay."""
    for name, stage in zip(names_of(recorded.config), ("policy", "baseline"), strict=True):
        kept = recorded.folder / "policies" / name
        yield _digests(f"policy {name}", folder_digest(kept, POLICY_FILES), folder_digest(results[stage], POLICY_FILES))
    evidence = read_record(recorded.folder, "evidence")
    estimates = Estimates.model_validate_json((results["estimates"] / "estimates.json").read_bytes())
    gating = estimates.gating.model_dump(mode="json")
    yield _records("gating estimate", evidence.get("gating"), gating, "value")
    then, now = evidence.get("estimates", []), [part.model_dump(mode="json") for part in estimates.estimates]
    yield Compared(what="estimates", recorded=f"{len(then)}", replayed=f"{len(now)}", equal=then == now)
    ab = read_ab(results["ab-test"])
    yield _records("A/B", evidence.get("ab"), None if ab is None else ab.model_dump(mode="json"), "difference")
    decided, decision = read_record(recorded.folder, "decision"), read_decision(results["gate"])
    yield Compared(
        what="decision",
        recorded=decided["outcome"],
        replayed=decision.outcome.value,
        equal=decided == decision.model_dump(mode="json"),
    )


def _digests(what: str, then: str, now: str) -> Compared:
    return Compared(what=what, recorded=then[:DIGITS], replayed=now[:DIGITS], equal=then == now)


def _records(what: str, then: dict[str, Any] | None, now: dict[str, Any] | None, figure: str) -> Compared:
    before, after = (kept_figure(record, figure, "none") for record in (then, now))
    return Compared(what=what, recorded=before, replayed=after, equal=then == now)
