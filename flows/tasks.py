"""Stages as Prefect tasks: each takes and returns `StageRef`s, and is computed where no finished one can be reused."""

import os
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast
from uuid import UUID

from prefect import get_run_logger, task
from prefect.artifacts import create_markdown_artifact, create_progress_artifact, update_progress_artifact
from prefect.cache_policies import CacheKeyFnPolicy

from components.world_model.training import Progress
from flows.config import LoopConfig
from flows.interruption import heed_interrupt
from flows.lineage import code_digest, digest_of, lock_digest
from flows.numbers import duration
from flows.settings import require_writable
from flows.stage_facts import stage_fact
from flows.stage_store import Stage, StageRef, StageStore, clear_abandoned, progress_sink, stage_key

#: Seconds between two updates of a progress artifact.
ARTIFACT_INTERVAL = 2.0


@dataclass
class Run:
    """One pass of the loop: its configuration, where its stages lie, and which of them were reused."""

    config: LoopConfig
    store: StageStore
    folder: Path
    fresh: bool
    started: datetime
    stages: dict[str, StageRef]
    reused: list[str]
    path: Path | None = None
    """What the source reads."""

    @classmethod
    def open(cls, config: LoopConfig, home: Path, runs: Path, *, fresh: bool, path: Path | None = None) -> "Run":
        """A new run.

        Raises:
            InputError: the folder of runs, or the one of stages, cannot be written.
        """
        require_writable(runs, "--out")
        require_writable(home, "SLATELOOP_HOME")
        started = datetime.now(UTC)
        name = f"{config.loop}-{started:%Y%m%d-%H%M%S}-{os.getpid()}"
        return cls(config, StageStore(home.resolve() / "stages"), runs.resolve() / name, fresh, started, {}, [], path)

    def __call__(self, stage: Stage, **upstream: StageRef) -> StageRef:
        """Reuse or compute a stage; `upstream` are the stages that it reads, by role."""
        heed_interrupt()
        settings = self.config.model_dump(mode="json", include=set(stage.settings))
        key = stage_key(stage.name, settings, upstream, code_digest(stage.code), lock_digest())
        finished = self.store.is_complete(stage.name, key) and stage.still_there(self.store.folder(stage.name, key))
        reuse = finished and not self.fresh
        if reuse:
            self.reused.append(stage.name)
            # A run that computed it anew may have been killed at it.
            clear_abandoned(self.store.folder(stage.name, key).parent)
            progress_sink.get()(stage.name, "reused", 1.0)
        ref = run_stage.with_options(name=stage.name, task_run_name=stage.name, refresh_cache=not reuse)(
            key, upstream, _Work(stage, self.config, self.store, reuse)
        )
        self.stages[stage.name] = ref
        return ref


@dataclass(frozen=True)
class _Work:
    """What a task needs to compute its stage; of it only the store's place is part of the cache's key."""

    stage: Stage
    config: LoopConfig
    store: StageStore
    reuse: bool


def _cache_key(context: object, parameters: dict[str, Any]) -> str:
    # A reference holds a path: one store's must not be answered for another's, or for the same store at its old place.
    return digest_of(parameters["key"], str(parameters["work"].store.root))


@task(persist_result=True, result_serializer="json", cache_policy=CacheKeyFnPolicy(cache_key_fn=_cache_key))
def run_stage(key: str, upstream: dict[str, StageRef], work: _Work) -> StageRef:
    """The manifest on disk decides what is reused; Prefect's cache, with the same key, mirrors it."""
    stage, log = work.stage, get_run_logger()
    if work.reuse:
        folder = work.store.folder(stage.name, key)
        log.info("%s: reused, %s", stage.name, stage_fact(stage.name, folder))
        return StageRef(path=folder, digest=key)
    log.info("%s: begins", stage.name)
    started = time.monotonic()
    folders = {role: ref.path for role, ref in upstream.items()}

    def compute(out: Path) -> None:
        stage.compute(work.config, **folders, out=out, progress=_progress(stage.name))

    ref = work.store.write(stage.name, key, compute, {role: item.digest for role, item in upstream.items()})
    took = time.monotonic() - started
    log.info("%s: done in %s, %s", stage.name, duration(took), stage_fact(stage.name, ref.path))
    progress_sink.get()(stage.name, f"done in {took:.0f} s", 1.0)
    return ref


def _progress(name: str) -> Progress:
    """Progress of a stage: to the terminal each time, to Prefect's artifact every other second."""
    sink = progress_sink.get()
    artifact = cast(UUID, create_progress_artifact(progress=0.0, key=f"{name}-progress"))
    last = time.monotonic()

    def progress(message: str, share: float) -> None:
        nonlocal last
        heed_interrupt()
        sink(name, message, share)
        if share >= 1.0 or time.monotonic() - last > ARTIFACT_INTERVAL:
            update_progress_artifact(artifact, progress=100.0 * share)
            last = time.monotonic()

    return progress


def publish(name: str, markdown: str) -> None:
    """A text for whoever looks at the run in Prefect."""
    create_markdown_artifact(markdown, key=name)
