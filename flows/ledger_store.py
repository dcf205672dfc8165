"""The ledger on disk: `HOME/ledger/RUN/LABEL/entry.json`, one folder for each run and label of its A/Bs.

An entry is put in its place by one rename and never written again, so a reader sees whole entries only, and runs at the
same time do not meet.
"""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from components.errors import InputError
from components.experiment.ab import AbResult
from components.experiment.ledger import LedgerEntry, LedgerSummary, summarize
from flows.disk_space import disk_full_told
from flows.stage_store import clear_abandoned, staging_beside

ENTRY = "entry.json"
R = TypeVar("R", LedgerEntry, AbResult)


def add_entry(home: Path, entry: LedgerEntry) -> Path:
    """Write an entry; the same one again changes nothing. Returns its file.

    Raises:
        InputError: the run has another A/B of this label, or the ledger cannot be written.
        DiskFullError: there is no space for it.
    """
    label = "no-ab" if entry.ab is None else entry.ab.label.replace(" ", "-")
    place = home / "ledger" / entry.run / label
    staging = staging_beside(place)
    try:
        with disk_full_told(home / "ledger", "SLATELOOP_HOME"):
            place.parent.mkdir(parents=True, exist_ok=True)
            clear_abandoned(place.parent)
            staging.mkdir()
            (staging / ENTRY).write_text(entry.model_dump_json(indent=2) + "\n")
            _claim(place, staging)
    except OSError as error:
        raise InputError(f"{place}: cannot be written: {error.strerror}; set SLATELOOP_HOME") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    if _read(place / ENTRY, LedgerEntry).ab != entry.ab:
        raise InputError(
            f"{place / ENTRY}: run {entry.run} has another A/B of this label already. The first one counts, since "
            "results that may be replaced until they please prove nothing; to correct a mistake, remove that folder"
        )
    return place / ENTRY


def _claim(place: Path, staging: Path) -> None:
    """Rename, unless another was first: no system renames a folder onto one that holds something."""
    try:
        os.rename(staging, place)
    except OSError:
        if not place.exists():
            raise


def read_ledger(home: Path, run: str = "") -> list[LedgerEntry]:
    """The entries of all runs whose names begin so, by run and label.

    Raises:
        InputError: an entry is damaged.
    """
    # Names that begin with a dot are entries before they are whole.
    files = sorted((home / "ledger").glob(f"*/[!.]*/{ENTRY}"))
    return [_read(file, LedgerEntry) for file in files if file.parts[-3].startswith(run)]


def record_ab(home: Path, run: str, file: Path) -> LedgerEntry:
    """Put a later A/B beside what was predicted of a past run's challenger.

    Args:
        home: the platform's.
        run: name of the run, or its beginning.
        file: the A/B's result as JSON, as `AbResult` describes it.

    Raises:
        InputError: none or several runs fit, the file is no A/B's result, the A/B is of another policy, or the run has
            another one of its label.
    """
    entries = {entry.run: entry for entry in read_ledger(home, run)}
    found = [entries[run]] if run in entries else list(entries.values())
    if len(found) != 1:
        known = ", ".join(sorted({entry.run for entry in read_ledger(home)})) or "none yet"
        raise InputError(f"run {run!r}: {len(found)} runs of the ledger begin so; they are: {known}")
    result = _read(file, AbResult)
    try:
        entry = found[0].followed_by(result)
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
    add_entry(home, entry)
    return entry


def summary_around(entry: LedgerEntry, entries: Iterable[LedgerEntry]) -> LedgerSummary:
    """The summary that an entry of the ledger is part of."""
    pool = entry.loop, entry.source, entry.reward
    (summary,) = summarize(other for other in entries if (other.loop, other.source, other.reward) == pool)
    return summary


def _read(file: Path, record: type[R]) -> R:
    try:
        return record.model_validate_json(file.read_bytes())
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "document"
        raise InputError(f"{file}: {where}: {first['msg']} (seen: {first['input']!r:.120})") from None
