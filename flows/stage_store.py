"""Finished stages on disk: what a resumed run may reuse.

A stage writes into a temporary folder, its manifest last, and is renamed to its key. A folder with its key's name is
therefore whole, whatever happened to the process that wrote it.
"""

import json
import os
import re
import shutil
import time
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import psutil
from pydantic import BaseModel, ConfigDict, Field

from components.errors import InputError
from components.interactions.log_folder import replace_folder
from flows.disk_space import disk_full_told
from flows.lineage import LIBRARY, digest_of

MANIFEST = "stage.json"

#: Told a stage's message and how far it is; the command line and the flow put theirs here.
ProgressSink = Callable[[str, str, float], None]
progress_sink: ContextVar[ProgressSink] = ContextVar("progress_sink", default=lambda stage, message, share: None)


@dataclass(frozen=True)
class Stage:
    """One step of the loop: how it is computed, and which parts of the configuration its result depends on."""

    name: str
    settings: frozenset[str]
    """Names of `LoopConfig`'s parts."""
    compute: Callable[..., None]
    """Writes the result into `out`; called with the configuration, the folder of each upstream stage by its role, `out`
    and `progress`."""
    code: tuple[str, ...]
    """Source files and folders that the result depends on."""
    still_there: Callable[[Path], bool]
    """Whether what the stage left outside its folder is where it put it."""


def stage(
    name: str,
    *settings: str,
    code: tuple[str, ...] = LIBRARY,
    still_there: Callable[[Path], bool] = lambda folder: True,
) -> Callable[[Callable[..., None]], Stage]:
    """Declare a function as a stage; loop, seed, threads and `as_of` count for every stage."""

    def declare(compute: Callable[..., None]) -> Stage:
        return Stage(name, frozenset({"loop", "seed", "threads", "as_of", *settings}), compute, code, still_there)

    return declare


class StageRef(BaseModel):
    """A finished stage: where it lies and the key of what it was made from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: Path = Field(description="Folder of the stage's results.")
    digest: str = Field(description="Key: digest of everything that the results depend on.")


class StageManifest(BaseModel):
    """Written last into a stage's folder: what it is, and what it was made from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stage: str
    key: str
    upstream: dict[str, str] = Field(description="Key of each upstream stage, by role.")
    seconds: float = Field(description="Time that computing took.")


class StageStore:
    """The folder of finished stages."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def folder(self, name: str, key: str) -> Path:
        """Where a stage with this key lies, or will lie."""
        return self.root / name / key[:24]

    def is_complete(self, name: str, key: str) -> bool:
        """Whether the stage was finished: its manifest is there and is about this key."""
        manifest = self.folder(name, key) / MANIFEST
        return manifest.is_file() and StageManifest.model_validate_json(manifest.read_bytes()).key == key

    def finished(self) -> dict[str, tuple[Path, StageManifest]]:
        """Folder and manifest of every finished stage, by key."""
        manifests = {
            file.parent: StageManifest.model_validate_json(file.read_bytes())
            # A name that begins with a dot is a stage's folder before it is whole.
            for file in sorted(self.root.glob(f"*/[!.]*/{MANIFEST}"))
        }
        return {manifest.key: (folder, manifest) for folder, manifest in manifests.items()}

    def write(self, name: str, key: str, compute: Callable[[Path], None], upstream: dict[str, str]) -> StageRef:
        """Compute a stage into a temporary folder and rename it; nothing half-written carries its name.

        Raises:
            InputError: the stage refuses its input, or the store cannot be written.
            DiskFullError: there is no space for it.
        """
        with disk_full_told(self.root, "SLATELOOP_HOME"):
            return self._write(name, key, compute, upstream)

    def _write(self, name: str, key: str, compute: Callable[[Path], None], upstream: dict[str, str]) -> StageRef:
        final = self.folder(name, key)
        clear_abandoned(final.parent)
        staging = staging_beside(final)
        try:
            staging.mkdir(parents=True)
        except OSError as error:
            raise InputError(f"{self.root}: cannot be written: {error.strerror}; set SLATELOOP_HOME") from None
        started = time.monotonic()
        try:
            compute(staging)
            manifest = StageManifest(stage=name, key=key, upstream=upstream, seconds=time.monotonic() - started)
            (staging / MANIFEST).write_text(manifest.model_dump_json(indent=2))
            replace_folder(staging, final)
        except InputError as error:
            if not any(staging.iterdir()):
                raise
            rejected = self.root / "rejected" / f"{name}-{key[:12]}"
            rejected.parent.mkdir(exist_ok=True)
            replace_folder(staging, rejected)
            raise type(error)(f"{error}\nWhat was found is in {rejected}") from None
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        return StageRef(path=final, digest=key)


def staging_beside(final: Path) -> Path:
    """A temporary name in a folder's own parent, so that a rename puts it in its place; it tells whose it is."""
    return final.parent / f".{final.name}.{os.getpid()}.{uuid4().hex[:6]}.tmp"


def clear_abandoned(parent: Path) -> None:
    """Remove what dead processes left half-written, and what a finished folder replaced."""
    for leftover in parent.glob(".*"):
        staged = re.fullmatch(r"\..+\.(\d+)\.[0-9a-f]{6}\.tmp", leftover.name)
        replaced = re.fullmatch(r"\..+\.[0-9a-f]{8}\.old", leftover.name)
        if replaced or (staged and _is_abandoned(leftover, int(staged[1]))):
            if leftover.is_file():
                leftover.unlink(missing_ok=True)
            else:
                shutil.rmtree(leftover, ignore_errors=True)


def _is_abandoned(leftover: Path, pid: int) -> bool:
    try:
        # In a container each run may get the same process id.
        return psutil.Process(pid).create_time() > leftover.stat().st_mtime
    except psutil.NoSuchProcess:
        return True
    except FileNotFoundError:
        return False


def stage_key(name: str, settings: dict[str, object], upstream: dict[str, StageRef], *environment: str) -> str:
    """Key of a stage: its upstream stages, its own settings and the environment that it runs in."""
    return digest_of(
        name,
        json.dumps(settings, sort_keys=True),
        *(f"{role}={ref.digest}" for role, ref in sorted(upstream.items())),
        *environment,
    )
