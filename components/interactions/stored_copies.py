"""Deletion of users' rows from what was copied to disk: logs, quarantines, and records that quote rows.

A user is found by the id that the log holds, which is a keyed hash where the rows came from an endpoint; sessions that
the importer `log` named begin with it.
"""

import json
import os
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any
from uuid import uuid4

import polars as pl

from components.errors import ContractError
from components.interactions.log_folder import MANIFEST, Log, discard_folder, open_log, write_log

#: Records that may quote rows.
TEXTS = (".json", ".html", ".md", ".txt")
#: What stands where a user was named.
REDACTED = "forgotten"
_READ_AT_ONCE = 1 << 20


def rows_of(user_ids: Collection[str], columns: Collection[str]) -> pl.Expr:
    """Whether a row with these columns is one of the users'."""
    return _owner(user_ids, columns).is_not_null()


def _owner(user_ids: Collection[str], columns: Collection[str]) -> pl.Expr:
    """The one of the users whose row it is; null where it is nobody's of them."""
    users = sorted(user_ids)
    named = {
        "user_id": pl.col("user_id").cast(pl.String),
        "session_id": pl.col("session_id").cast(pl.String).str.split("/").list.first(),
    }
    found = [pl.when(column.is_in(users)).then(column) for name, column in named.items() if name in columns]
    return pl.coalesce(*found, pl.lit(None, dtype=pl.String))


def found_in(file: Path, user_ids: Collection[str]) -> pl.DataFrame:
    """Columns `user` and `request_id` of the users' rows in a Parquet file; null in a table that names no requests.

    Raises:
        ContractError: the file cannot be read.
    """
    try:
        columns = pl.read_parquet_schema(file)
        request_id = pl.col("request_id") if "request_id" in columns else pl.lit(None)
        rows = pl.scan_parquet(file).select(user=_owner(user_ids, columns), request_id=request_id.cast(pl.String))
        return rows.filter(pl.col("user").is_not_null()).collect()
    except (pl.exceptions.PolarsError, OSError) as error:
        raise ContractError(f"{file}: not readable as Parquet: {str(error).splitlines()[0]}") from None


def forget_in_log(log: Log, user_ids: Collection[str]) -> int:
    """Write a log anew without the users' rows, in one rename; one that would hold none any more is removed.

    Items stay, and so does the vocabulary of features: they say what there is, not who turned to it.

    Returns:
        Rows that were deleted.

    Raises:
        ContractError: the log cannot be read.
        InputError: its folder cannot be written.
    """
    others = ~rows_of(user_ids, list(log.manifest.schema()))
    kept = log.scan().select(others.sum()).collect().item()
    n_rows = log.scan().select(pl.len()).collect().item()
    if not kept:
        discard_folder(log.path)
        return int(n_rows)
    if kept < n_rows:
        parts = (part for part in (whole.filter(others) for whole in log.parts()) if part.height)
        named = log.scan().filter(others).select("candidates_digest").unique().collect()
        candidates = log.candidate_table().join(named, on="candidates_digest", how="semi")
        write_log(log.path, log.manifest, parts, log.items(), candidates if candidates.height else None)
    return int(n_rows - kept)


def forget_in_table(file: Path, user_ids: Collection[str]) -> int:
    """Write a Parquet file anew without the users' rows, in one rename; returns how many they were."""
    rows = pl.read_parquet(file)
    others = rows.filter(~rows_of(user_ids, rows.columns))
    if others.height < rows.height:
        staging = staging_file(file)
        others.write_parquet(staging, compression="zstd")
        staging.replace(file)
    return rows.height - others.height


def forget_in_text(file: Path, user_ids: Collection[str], request_ids: Collection[str]) -> bool:
    """Take what a record quotes of the users' rows out of it; whether there was anything.

    Of JSON, members of lists that are about one of the requests or name a user go; elsewhere the name alone.
    """
    text = before = file.read_text(errors="surrogateescape")
    if file.suffix == ".json":
        try:
            document = json.loads(text)
        except json.JSONDecodeError:
            document = None
        kept = _without(document, user_ids, frozenset(request_ids))
        text = text if kept == document else json.dumps(kept, indent=2) + "\n"
    for user in user_ids:
        text = text.replace(user, REDACTED)
    if text != before:
        write_whole(file, text, errors="surrogateescape")
    return text != before


def names_any(file: Path, user_ids: Collection[str]) -> bool:
    """Whether a user's id stands in a file's bytes; what Parquet compresses is not seen."""
    wanted = [user.encode() for user in user_ids]
    overlap = max(map(len, wanted), default=1) - 1
    tail = b""
    with file.open("rb") as content:
        while chunk := content.read(_READ_AT_ONCE):
            window = tail + chunk
            if any(user in window for user in wanted):
                return True
            tail = window[-overlap:] if overlap else b""
    return False


def is_temporary(path: Path) -> bool:
    """Whether a relative path lies in what is being written, or was replaced."""
    return any(part.startswith(".") and part.endswith((".tmp", ".old")) for part in path.parts)


@dataclass(frozen=True)
class Changed:
    """What was done to the copies below a folder."""

    logs: tuple[Path, ...] = ()
    """Logs without the users' rows now."""
    n_removed: int = 0
    """Logs that held nothing else."""
    n_files: int = 0
    """Other tables and records that were rewritten."""
    n_rows: int = 0
    """Rows that were deleted from all of them."""
    left: tuple[str, ...] = ()
    """What could not be read, and may still hold rows."""

    def __add__(self, other: "Changed") -> "Changed":
        return Changed(*(getattr(self, part.name) + getattr(other, part.name) for part in fields(self)))


def forget_below(folder: Path, user_ids: Collection[str], request_ids: Collection[str]) -> Changed:
    """Delete users' rows from everything below a folder, but for what is temporary by its name.

    Args:
        folder: need not exist.
        user_ids: as the logs hold them.
        request_ids: the users' requests as far as they are known; tables below the folder tell of more.

    Raises:
        InputError: a log cannot be written.
    """
    files = [
        file for file in sorted(folder.rglob("*")) if file.is_file() and not is_temporary(file.relative_to(folder))
    ]
    held: dict[Path, pl.Series] = {}
    changed = Changed()
    for file in files:
        if file.suffix == ".parquet":
            try:
                if (found := found_in(file, user_ids)).height:
                    held[file] = found["request_id"].drop_nulls()
            except ContractError as error:
                changed += Changed(left=(str(error),))
    known = {name for found in held.values() for name in found} | set(request_ids)
    # Records first: which requests were the users' is told by the tables.
    for file in files:
        if file.suffix in TEXTS:
            changed += Changed(n_files=int(forget_in_text(file, user_ids, known)))
    for path in [file.parent for file in files if file.name == MANIFEST]:
        if any(file.is_relative_to(path / "requests") for file in held):
            with suppress(ContractError):  # The rows of a log that is damaged otherwise are deleted as tables are.
                n_rows = forget_in_log(open_log(path), user_ids)
                rewritten = (path,) if path.exists() else ()
                changed += Changed(logs=rewritten, n_removed=1 - len(rewritten), n_rows=n_rows)
    for file in held:
        if file.exists() and (n_rows := forget_in_table(file, user_ids)):
            changed += Changed(n_files=1, n_rows=n_rows)
    return changed


def users_below(folder: Path, user_ids: Collection[str]) -> frozenset[str]:
    """Which of the users have rows in a table below a folder, or are named in a record; all, if it cannot be read."""
    found: set[str] = set()
    for file in folder.rglob("*"):
        if file.suffix == ".parquet":
            try:
                found.update(found_in(file, user_ids)["user"])
            except ContractError:
                return frozenset(user_ids)
        elif file.suffix in TEXTS and file.is_file():
            found.update(user for user in user_ids if names_any(file, [user]))
    return frozenset(found)


def staging_file(file: Path) -> Path:
    """A temporary name beside a file, which a rename puts in its place."""
    return file.with_name(f".{file.name}.{os.getpid()}.{uuid4().hex[:6]}.tmp")


def write_whole(file: Path, text: str, errors: str = "strict") -> None:
    """Write a text under a temporary name and rename it: no reader sees half of it, and no half of it stays.

    Args:
        file: where it is to stand.
        text: the whole of it.
        errors: what is done with characters that are none, as `open` has it.
    """
    staging = staging_file(file)
    try:
        staging.write_text(text, errors=errors)
        staging.replace(file)
    finally:
        staging.unlink(missing_ok=True)


def _without(value: Any, user_ids: Collection[str], request_ids: frozenset[str]) -> Any:
    if isinstance(value, dict):
        return {key: _without(part, user_ids, request_ids) for key, part in value.items()}
    if isinstance(value, list):
        return [_without(part, user_ids, request_ids) for part in value if not _is_about(part, user_ids, request_ids)]
    return value


def _is_about(part: Any, user_ids: Collection[str], request_ids: frozenset[str]) -> bool:
    if not isinstance(part, dict):
        return False
    texts = [text for text in part.values() if isinstance(text, str)]
    return part.get("request_id") in request_ids or any(user in text for user in user_ids for text in texts)
