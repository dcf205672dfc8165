"""A log on disk: `manifest.json`, `requests/part-*.parquet`, `items.parquet` and, where used, `candidates.parquet`.

Parts hold whole sessions, so that a log larger than memory is read part by part and no session is cut.
"""

import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from uuid import uuid4

import numpy as np
import polars as pl
from pydantic import ValidationError

from components.errors import ContractError, InputError
from components.interactions.contract import CANDIDATE_SCHEMA, READ_VERSIONS, ROW_ORDER, Manifest

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Log:
    """A whole log: its folder and what its manifest says."""

    path: Path
    manifest: Manifest

    @property
    def part_paths(self) -> list[Path]:
        """Files of the rows, in order."""
        return sorted((self.path / "requests").glob("part-*.parquet"))

    def scan(self) -> pl.LazyFrame:
        """All rows, lazily."""
        return pl.scan_parquet(self.part_paths)

    def parts(self) -> Iterator[pl.DataFrame]:
        """Rows part by part; each part holds whole sessions in row order."""
        for path in self.part_paths:
            yield pl.read_parquet(path)

    def items(self) -> pl.DataFrame:
        """The item table: `item_id` and the manifest's item features."""
        return pl.read_parquet(self.path / "items.parquet")

    def candidate_table(self) -> pl.DataFrame:
        """Candidate lists that rows name by digest; empty where rows write them out."""
        path = self.path / "candidates.parquet"
        return pl.read_parquet(path) if path.exists() else pl.DataFrame(schema=CANDIDATE_SCHEMA)


def open_log(path: Path) -> Log:
    """The log in a folder, its manifest and the columns of every file checked against the contract.

    Raises:
        ContractError: the folder is no log, its contract version is another one, a file cannot be read, or a column
            is missing, unexpected or of another type.
    """
    if not path.is_dir():
        raise ContractError(f"{path}: no such folder; expected a log (a folder with {MANIFEST})")
    manifest_path = path / MANIFEST
    if not manifest_path.is_file():
        raise ContractError(f"{path}: holds no {MANIFEST}; `slateloop import` writes a log from a source")
    try:
        manifest = Manifest.model_validate_json(manifest_path.read_bytes())
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "document"
        raise ContractError(f"{manifest_path}: {where}: {first['msg']} (seen: {first['input']!r:.120})") from None
    if manifest.contract_version not in READ_VERSIONS:
        read = " and ".join(map(str, READ_VERSIONS))
        raise ContractError(
            f"{manifest_path}: contract_version is {manifest.contract_version}; this program reads {read}"
        )
    log = Log(path, manifest)
    if not log.part_paths:
        raise ContractError(f"{path / 'requests'}: holds no part-*.parquet; expected at least one")
    for part in log.part_paths:
        _check_schema(part, manifest.schema())
    _check_schema(path / "items.parquet", manifest.item_schema())
    if (path / "candidates.parquet").exists():
        _check_schema(path / "candidates.parquet", CANDIDATE_SCHEMA)
    return log


def _check_schema(path: Path, expected: pl.Schema) -> None:
    try:
        seen = pl.read_parquet_schema(path)
    except FileNotFoundError:
        raise ContractError(f"{path}: missing; the contract asks for it") from None
    except (pl.exceptions.PolarsError, OSError) as error:
        raise ContractError(f"{path}: not readable as Parquet: {str(error).splitlines()[0]}") from None
    for column, dtype in expected.items():
        if column not in seen:
            raise ContractError(f"{path}: column {column!r} is missing; expected type {dtype}")
        if seen[column] != dtype:
            raise ContractError(f"{path}: column {column!r} has type {seen[column]}; expected {dtype}")
    if extra := [column for column in seen if column not in expected]:
        raise ContractError(f"{path}: unexpected column {extra[0]!r}; the manifest names {list(expected)}")


def write_log(
    path: Path,
    manifest: Manifest,
    parts: Iterable[pl.DataFrame],
    items: pl.DataFrame,
    candidate_table: pl.DataFrame | None = None,
) -> Log:
    """Write a log into a folder and return it as read back; an older log there is replaced in one rename.

    Args:
        path: folder of the log; it may hold nothing, or an older log.
        manifest: `n_requests` and `content_digest` are filled in here.
        parts: frames of whole sessions; no session in two of them. Columns are put in the contract's order and cast.
        items: the item table.
        candidate_table: lists that rows name in `candidates_digest`.

    Raises:
        InputError: the folder holds something else, or cannot be written.
        ContractError: the rows do not fit the manifest.
    """
    with _put_in_place(path) as staging:
        (staging / "requests").mkdir()
        schema = manifest.schema()
        n_requests = n_parts = 0
        for number, part in enumerate(parts):
            frame = _conform(part, schema, f"part {number}").sort(ROW_ORDER)
            # Some of a larger log may have nothing of a part: its beginning nothing of the latest sessions.
            if frame.is_empty():
                continue
            frame.write_parquet(staging / "requests" / f"part-{n_parts:05d}.parquet", compression="zstd")
            n_requests, n_parts = n_requests + frame.height, n_parts + 1
        if n_requests == 0:
            raise ContractError(f"{path}: the source {manifest.source!r} holds no requests; expected at least one")
        _conform(items, manifest.item_schema(), "items").sort("item_id").write_parquet(staging / "items.parquet")
        if candidate_table is not None:
            table = _conform(candidate_table, CANDIDATE_SCHEMA, "candidates").sort("candidates_digest")
            table.write_parquet(staging / "candidates.parquet")
        digest = content_digest(Log(staging, manifest))
        manifest = manifest.model_copy(update={"n_requests": n_requests, "content_digest": digest})
        (staging / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n")
    return Log(path, manifest)


def copy_log(log: Log, path: Path) -> Log:
    """Put a log as it is into another folder; an older log there is replaced in one rename.

    Raises:
        InputError: the folder holds something else, or cannot be written.
    """
    tables = [log.path / name for name in (MANIFEST, "items.parquet", "candidates.parquet")]
    with _put_in_place(path) as staging:
        (staging / "requests").mkdir()
        for file in [*log.part_paths, *filter(Path.is_file, tables)]:
            shutil.copyfile(file, staging / file.relative_to(log.path))
    return Log(path, log.manifest)


@contextmanager
def _put_in_place(path: Path) -> Iterator[Path]:
    """A new folder that takes the place of the log at `path` once it is whole, and vanishes if it never is."""
    require_log_or_nothing(path)
    staging = path.parent / f".{path.name}.{uuid4().hex[:8]}.tmp"
    try:
        staging.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None
    try:
        yield staging
        replace_folder(staging, path)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def require_log_or_nothing(path: Path) -> None:
    """Refuse to put a log where something else lies.

    Raises:
        InputError: the path is a file, or a folder that holds files and no log.
    """
    if path.exists() and not path.is_dir():
        raise InputError(f"{path}: is a file; expected a folder")
    if path.exists() and any(path.iterdir()) and not (path / MANIFEST).is_file():
        raise InputError(f"{path}: is not empty and holds no log; move what is there, or choose another folder")


def replace_folder(staging: Path, path: Path) -> None:
    """Put a finished folder in the place of an older one; both must be on the same file system."""
    retired = path.parent / f".{path.name}.{uuid4().hex[:8]}.old"
    if path.exists():
        os.rename(path, retired)
    os.rename(staging, path)
    shutil.rmtree(retired, ignore_errors=True)


def discard_folder(path: Path) -> None:
    """Remove a folder, if it is still there; from the first moment nothing half-removed carries its name.

    Raises:
        InputError: it cannot be removed.
    """
    retired = path.parent / f".{path.name}.{uuid4().hex[:8]}.old"
    try:
        os.rename(path, retired)
        shutil.rmtree(retired)
    except FileNotFoundError:
        return
    except OSError as error:
        raise InputError(f"{path}: cannot be removed: {error.strerror}") from None


def _conform(frame: pl.DataFrame, schema: pl.Schema, where: str) -> pl.DataFrame:
    if missing := [column for column in schema if column not in frame.columns]:
        raise ContractError(f"{where}: column {missing[0]!r} is missing; the manifest names {list(schema)}")
    try:
        return frame.select(pl.col(column).cast(dtype) for column, dtype in schema.items())
    except pl.exceptions.PolarsError as error:
        raise ContractError(f"{where}: {str(error).splitlines()[0]}") from None


def content_digest(log: Log) -> str:
    """SHA-256 of the log's values: the same rows give it whatever their order and however they are cut into files.

    It is made of the sessions' digests in ascending order, so that no more than two parts are held in memory.
    """
    digest = hashlib.sha256(str(sorted(log.manifest.schema().items())).encode())
    with ThreadPoolExecutor(2) as pool:
        sessions = list(pool.map(_session_digests, log.part_paths))
    digest.update(np.sort(np.concatenate(sessions)).tobytes())
    for table in (log.items().sort("item_id"), log.candidate_table().sort("candidates_digest")):
        digest.update(hashlib.sha256(_lines(table)).digest())
    return digest.hexdigest()


def _session_digests(part_path: Path) -> np.ndarray:
    part = pl.read_parquet(part_path)
    lines = _lines(part)
    ends = np.flatnonzero(np.frombuffer(lines, dtype=np.uint8) == ord("\n")) + 1
    last_rows = part["session_id"].rle().struct.field("len").cum_sum().to_numpy() - 1
    bounds = [0, *ends[last_rows].tolist()]
    return np.frombuffer(b"".join(hashlib.sha256(lines[a:b]).digest() for a, b in pairwise(bounds)), dtype="S32")


def _lines(table: pl.DataFrame) -> memoryview:
    """One line of JSON for each row, its columns in the order of their names."""
    lines = BytesIO()
    columns = sorted(table.columns)
    table.select(pl.col(column).cast(_exact(table.schema[column])) for column in columns).write_ndjson(lines)
    return lines.getbuffer()


def _exact(dtype: pl.DataType) -> pl.DataType:
    """The type in which JSON loses nothing: it would write NaN as null, and knows no times."""
    if isinstance(dtype, pl.List):
        return pl.List(_exact(dtype.inner))  # type: ignore[arg-type]
    if isinstance(dtype, pl.Struct):
        return pl.Struct({field.name: _exact(field.dtype) for field in dtype.fields})  # type: ignore[arg-type]
    if dtype.is_float():
        return pl.String()
    return pl.Int64() if dtype.is_temporal() else dtype
