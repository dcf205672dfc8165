"""What the importers share: reading a source with errors that say what to mend, and cutting it into whole sessions."""

from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from pathlib import Path

import polars as pl

from components.errors import InputError
from components.interactions.contract import TIMESTAMP, Manifest

ROW = "source_row"
"""Number of a row in its source file, from 1 and without the header: what messages name, and the last tie-break."""
ROWS_PER_PART = 100_000

_SEPARATORS = {".csv": ",", ".csv.gz": ",", ".tsv": "\t", ".tsv.gz": "\t"}
_KINDS: Mapping[str, Callable[[pl.DataType], bool]] = {
    "text": lambda dtype: dtype == pl.String,
    "whole numbers": lambda dtype: dtype.is_integer(),
    "lists of whole numbers": lambda dtype: isinstance(dtype, pl.List) and dtype.inner.is_integer(),
}


def scan(path: Path) -> pl.LazyFrame:
    """Rows of a Parquet, CSV or TSV file (the last two also gzipped) with their number in `ROW`; CSV cells stay text.

    Raises:
        InputError: the file is missing, of another kind or unreadable.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected the source's data")
    separator = next((mark for suffix, mark in _SEPARATORS.items() if path.name.endswith(suffix)), None)
    if separator is None and path.suffix != ".parquet":
        raise InputError(f"{path}: unknown kind of file; expected one of {['.parquet', *_SEPARATORS]}")
    try:
        rows = (
            pl.scan_parquet(path) if separator is None else pl.scan_csv(path, separator=separator, infer_schema=False)
        )
        # Asked of another frame: one that has its schema numbers rows by reading all of them, slices or not.
        columns = rows.select(pl.all()).collect_schema().names()
    except (pl.exceptions.PolarsError, OSError) as error:
        raise _unreadable(path, error) from None
    if ROW in columns:
        raise InputError(f"{path}: column {ROW!r}: this name is taken by the importer; rename the column")
    return rows.with_row_index(ROW, offset=1)


def plain_or_gzipped(path: Path) -> Path | None:
    """The file, or else the same with `.gz` after its name; None where there is neither."""
    return next((file for file in (path, path.with_name(f"{path.name}.gz")) if file.is_file()), None)


def collect(rows: pl.LazyFrame, path: Path) -> pl.DataFrame:
    """The rows in memory; `path` is the file that they come from.

    Raises:
        InputError: the file turns out to be damaged.
    """
    try:
        return rows.collect()
    except (pl.exceptions.PolarsError, OSError) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> InputError:
    expected = "a whole Parquet file" if path.suffix == ".parquet" else "whole UTF-8 delimited text with a header"
    return InputError(f"{path}: cannot be read: {(str(error).splitlines() or ['?'])[0]}; expected {expected}")


def require_columns(rows: pl.LazyFrame, kinds: Mapping[str, str], path: Path) -> None:
    """Check that columns are there and hold the stated kind: a key of `_KINDS`.

    Raises:
        InputError: a column is missing or of another type.
    """
    schema = rows.collect_schema()
    for column, kind in kinds.items():
        if column not in schema:
            seen = [name for name in schema.names() if name != ROW]
            raise InputError(f"{path}: column {column!r} is missing; the file has {seen}")
        if not _KINDS[kind](schema[column]):
            raise InputError(f"{path}: column {column!r} has type {schema[column]}; expected {kind}")


def refuse(rows: pl.LazyFrame, wrong: pl.Expr, column: str, expected: str, path: Path, key: str = "") -> None:
    """Refuse a source in which a row is wrong, naming the first such row and what stands there.

    Args:
        rows: rows with `ROW`.
        wrong: true where a row is wrong.
        column: where the value stands.
        expected: what should stand there.
        path: the source's file.
        key: key of a mapping that names the column, if one does.

    Raises:
        InputError: a row is wrong.
    """
    found = collect(rows.filter(wrong).select(ROW, pl.col(column).alias("seen")).head(1), path)
    if found.height:
        row, seen = found.row(0)
        mapped = f" (mapped by {key})" if key else ""
        raise InputError(f"{path}: row {row}, column {column!r}{mapped}: {seen!r:.120}; expected {expected}")


def in_parts(rows: pl.LazyFrame, sizes: pl.DataFrame, path: Path) -> Iterator[pl.DataFrame]:
    """Rows in frames of whole sessions, about `ROWS_PER_PART` rows of the log each.

    Args:
        rows: rows with a `session_id`; with `ROW` only where they are in the same order each time they are collected.
        sizes: `session_id` and `n_rows`, the rows that it will have in the log; other sessions are left out.
        path: the source's file.
    """
    sessions = sizes.select("session_id", part=(pl.col("n_rows").cum_sum() - pl.col("n_rows")) // ROWS_PER_PART)
    in_file_order = ROW in rows.collect_schema()
    if in_file_order:
        # Most files keep the rows of a session, and sessions of one time, together: a part reads its own stretch.
        places = rows.select("session_id").with_row_index("place").group_by("session_id")
        stretches = collect(places.agg(first=pl.col("place").min(), last=pl.col("place").max()), path)
        sessions = sessions.join(stretches, on="session_id", maintain_order="left")
    for chosen in sessions.partition_by("part", maintain_order=True):
        stretch = rows
        if in_file_order:
            first, last = chosen.select(pl.col("first").min(), pl.col("last").max()).row(0)
            stretch = rows.slice(first, last - first + 1)
        yield collect(stretch.filter(pl.col("session_id").is_in(chosen["session_id"].implode())), path)


def in_batches(rows: pl.LazyFrame, path: Path) -> Iterator[pl.DataFrame]:
    """Rows in frames of about `ROWS_PER_PART`, read once and never all in memory, where a row is a session of its own.

    Raises:
        InputError: the file turns out to be damaged.
    """
    batches = rows.collect_batches(chunk_size=ROWS_PER_PART, maintain_order=True)
    try:
        yield from batches
    except (pl.exceptions.PolarsError, OSError) as error:
        raise _unreadable(path, error) from None


def complete(rows: pl.DataFrame, manifest: Manifest) -> pl.DataFrame:
    """The rows with a null column for each of the contract's that the source does not have."""
    absent = {column: dtype for column, dtype in manifest.schema().items() if column not in rows.columns}
    return rows.with_columns(pl.lit(None, dtype=dtype).alias(column) for column, dtype in absent.items())


def end_of_session(is_last: pl.Expr, still_going: pl.Expr, otherwise: str = "left") -> pl.Expr:
    """`session_end`: null before the last row, `censored` where the log stopped first, else as stated."""
    end = pl.when(still_going.fill_null(False)).then(pl.lit("censored")).otherwise(pl.lit(otherwise))
    return pl.when(is_last).then(end).alias("session_end")


def logged_by(rows: pl.LazyFrame, time: pl.Expr, until: datetime | None, path: Path) -> pl.LazyFrame:
    """Rows that are not later than a time, as if the file ended there; those without one stay, for validation to judge.

    Raises:
        InputError: there are none.
    """
    if until is None:
        return rows
    logged = rows.filter((time <= until).fill_null(True))
    if collect(logged.select(ROW).head(1), path).is_empty():
        raise InputError(f"{path}: holds nothing that was logged by {until.isoformat()}; expected at least one row")
    return logged


def from_unix(seconds: pl.Expr, per_second: int = 1) -> pl.Expr:
    """A contract timestamp from Unix time counted in `per_second`ths of a second; fractions are kept to 1 µs."""
    microseconds = (seconds * (1_000_000 // per_second)).round()
    return microseconds.cast(pl.Int64, strict=False).cast(pl.Datetime("us")).cast(TIMESTAMP)


def from_iso(text: pl.Expr) -> pl.Expr:
    """Times from ISO 8601: a date alone or with a time, `T` or a space between them, UTC where no offset is given."""
    with_time = pl.when(text.str.contains(r"^\d{4}-\d\d-\d\d$")).then(text + "T00:00:00").otherwise(text)
    with_t = with_time.str.replace(r"^(\d{4}-\d\d-\d\d) ", "${1}T")
    has_offset = with_t.str.contains(r"([Zz]|[+-]\d\d:?\d\d)$")
    return pl.when(has_offset).then(with_t).otherwise(with_t + "Z").str.to_datetime("%+", time_unit="us", strict=False)
