"""Reading mapped columns: cells of a user's file as the contract's types, or a message that names the wrong cell."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import polars as pl

from components.errors import InputError
from components.interactions.contract import SESSION_ENDS, TIMESTAMP
from components.interactions.importers._reading import ROW, collect, from_iso, from_unix, refuse

TimestampFormat = Literal["iso", "s", "ms", "us"]

_FLAGS = {"1": True, "true": True, "1.0": True, "0": False, "false": False, "0.0": False}
_PER_SECOND = {"s": 1, "ms": 1_000, "us": 1_000_000}


@dataclass(frozen=True)
class Target:
    """Where a column goes: its name after reading, the mapping's key that named it, and its name in the file."""

    name: str
    key: str
    column: str


@dataclass(frozen=True)
class Cells:
    """A column, read: `values` typed as the contract has them, `wrong` where a cell is not what was `expected`."""

    target: Target
    values: pl.Expr
    wrong: pl.Expr
    expected: str


@dataclass(frozen=True)
class MappedFile:
    """A file whose columns are mapped.

    Every reader raises InputError where its column is missing or of another type.
    """

    path: Path
    rows: pl.LazyFrame
    list_separator: str

    def typed(self, cells: list[Cells]) -> pl.LazyFrame:
        """The rows with `ROW` and the columns read.

        Raises:
            InputError: a cell is wrong.
        """
        flags = collect(self.rows.select(each.wrong.any().alias(each.target.name) for each in cells), self.path)
        for each in cells:
            if flags[each.target.name].any():
                refuse(self.rows, each.wrong, each.target.column, each.expected, self.path, each.target.key)
        return self.rows.select(ROW, *(each.values.alias(each.target.name) for each in cells))

    def texts(self, target: Target) -> Cells:
        """Text, or whole numbers as text."""
        cell, dtype = self._cell(target), self.rows.collect_schema()[target.column]
        if dtype.is_float() or dtype.is_nested():
            raise self._wrong_type(target, "text or whole numbers")
        return Cells(target, cell.cast(pl.String), pl.lit(False), "text")

    def ids(self, target: Target) -> Cells:
        """Text, none of it missing."""
        values = self.texts(target).values
        return Cells(target, values, values.is_null(), "a value in every row")

    def session_ends(self, target: Target) -> Cells:
        """One of the contract's words for the end of a session, or nothing."""
        values = self.texts(target).values
        expected = f"one of {list(SESSION_ENDS)}, or an empty cell before the session's end"
        return Cells(target, values, ~values.is_in(SESSION_ENDS).fill_null(True), expected)

    def whole_numbers(self, target: Target) -> Cells:
        """Whole numbers, none of them missing."""
        cell, dtype = self._cell(target), self.rows.collect_schema()[target.column]
        if not (dtype == pl.String or dtype.is_numeric()):
            raise self._wrong_type(target, "whole numbers")
        values = cell.cast(pl.Int32, strict=False)
        # The cast alone would cut 1.5 to 1.
        cut = cell != values if dtype.is_numeric() else pl.lit(False)
        return Cells(target, values, values.is_null() | cut, "a whole number in every row")

    def numbers(self, target: Target) -> Cells:
        """Numbers; yes and no as 1 and 0."""
        return self._numbers(target, self._cell(target).cast(pl.Float32, strict=False))

    def probabilities(self, target: Target) -> Cells:
        """Numbers in double precision, as log_probs need it."""
        return self._numbers(target, self._cell(target).cast(pl.Float64, strict=False))

    def times(self, target: Target, timestamp_format: TimestampFormat) -> Cells:
        """Times in UTC, read from text or numbers as the format says; a file's own times need no format."""
        cell, dtype = self._cell(target), self.rows.collect_schema()[target.column]
        expected = "an ISO 8601 time" if timestamp_format == "iso" else f"a Unix time in {timestamp_format}"
        if isinstance(dtype, pl.Datetime):
            in_utc = cell.dt.convert_time_zone("UTC") if dtype.time_zone else cell.dt.replace_time_zone("UTC")
            values = in_utc.cast(TIMESTAMP)
        elif timestamp_format == "iso" and dtype == pl.String:
            values = from_iso(cell)
        elif timestamp_format != "iso" and (dtype == pl.String or dtype.is_numeric()):
            number = cell.cast(pl.Float64, strict=False) if dtype == pl.String else cell
            values = from_unix(number, _PER_SECOND[timestamp_format])
        else:
            raise self._wrong_type(target, f"{expected}, as log.timestamp_format says")
        return Cells(target, values, cell.is_not_null() & values.is_null(), f"{expected} or an empty cell")

    def text_lists(self, target: Target) -> Cells:
        """Lists of text or of whole numbers as text, such as item ids."""
        texts = self._lists(
            target,
            f"values separated by {self.list_separator!r}, none of them empty",
            lambda cell: pl.when(cell.cast(pl.String) != "").then(cell.cast(pl.String)),
        )
        floats = (pl.Float32, pl.Float64)
        if self.rows.collect_schema()[target.column] in (*floats, *(pl.List(each) for each in floats)):
            raise self._wrong_type(target, "text or whole numbers")
        return texts

    def flag_lists(self, target: Target) -> Cells:
        """Lists of yes and no."""

        def element(cell: pl.Expr) -> pl.Expr:
            text = cell.cast(pl.String).str.to_lowercase()
            return text.replace_strict(_FLAGS, default=None, return_dtype=pl.Boolean)

        expected = f"0 or 1 (or false, true) per position, separated by {self.list_separator!r}"
        return self._lists(target, expected, element)

    def number_lists(self, target: Target) -> Cells:
        """Lists of numbers."""
        return self._number_lists(target, pl.Float32())

    def probability_lists(self, target: Target) -> Cells:
        """Lists of numbers in double precision, as log_probs need it."""
        return self._number_lists(target, pl.Float64())

    def _number_lists(self, target: Target, dtype: pl.DataType) -> Cells:
        expected = f"a number per position, separated by {self.list_separator!r}"
        return self._lists(target, expected, lambda cell: cell.cast(dtype, strict=False))

    def _cell(self, target: Target) -> pl.Expr:
        """The column, its empty text as null."""
        schema = self.rows.collect_schema()
        if target.column not in schema or target.column == ROW:
            seen = [name for name in schema.names() if name != ROW]
            raise InputError(
                f"{self.path}: column {target.column!r} (mapped by {target.key}) is missing; the file has {seen}"
            )
        cell = pl.col(target.column)
        return pl.when(cell != "").then(cell) if schema[target.column] == pl.String else cell

    def _numbers(self, target: Target, values: pl.Expr) -> Cells:
        cell, dtype = self._cell(target), self.rows.collect_schema()[target.column]
        if not (dtype in (pl.String, pl.Boolean) or dtype.is_numeric()):
            raise self._wrong_type(target, "numbers")
        return Cells(target, values, cell.is_not_null() & values.is_null(), "a number or an empty cell")

    def _lists(self, target: Target, expected: str, element: Callable[[pl.Expr], pl.Expr]) -> Cells:
        """Lists, text split at the separator, one value as a list of one; `element` makes a wrong element null."""
        cell, dtype = self._cell(target), self.rows.collect_schema()[target.column]
        inner = dtype
        if isinstance(dtype, pl.List):
            lists, inner = cell, pl.Series(dtype=dtype.inner).dtype
        elif dtype == pl.String:
            lists = cell.str.split(self.list_separator)
        else:
            lists = pl.when(cell.is_not_null()).then(pl.concat_list(cell))
        if inner.is_nested() or inner.is_temporal():
            raise self._wrong_type(target, expected)
        values = lists.list.eval(element(pl.element()))
        wrong = values.list.eval(pl.element().is_null()).list.any().fill_null(False)
        return Cells(target, values, wrong, expected)

    def _wrong_type(self, target: Target, expected: str) -> InputError:
        dtype = self.rows.collect_schema()[target.column]
        return InputError(
            f"{self.path}: column {target.column!r} (mapped by {target.key}) has type {dtype}; expected {expected}"
        )
