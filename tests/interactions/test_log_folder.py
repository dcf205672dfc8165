import json
import tempfile
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

from components.errors import ContractError, InputError
from components.interactions.contract import Manifest
from components.interactions.log_folder import MANIFEST, Log, content_digest, copy_log, open_log, write_log

WriteCorner = Callable[..., Log]


def test_rows_written_by_hand_come_back_as_they_were(
    corner_log: Log, corner_rows: pl.DataFrame, corner_items: pl.DataFrame, corner_candidates: pl.DataFrame
) -> None:
    assert_frame_equal(corner_log.scan().collect(), corner_rows)
    assert_frame_equal(corner_log.items(), corner_items.sort("item_id").with_columns(pl.col("price").cast(pl.Float32)))
    assert_frame_equal(corner_log.candidate_table(), corner_candidates)
    assert corner_log.manifest.n_requests == 5


def test_the_storefront_s_rows_come_back_as_they_were(storefront_log: Log, tmp_path: Path) -> None:
    rows = storefront_log.scan().collect()

    copy = write_log(tmp_path / "copy", storefront_log.manifest, [rows], storefront_log.items())

    assert_frame_equal(open_log(copy.path).scan().collect(), rows)
    assert copy.manifest == storefront_log.manifest


def test_a_log_without_a_candidate_table_has_an_empty_one(storefront_log: Log) -> None:
    assert storefront_log.candidate_table().is_empty()


def test_parts_are_read_one_by_one_in_row_order(write_corner: WriteCorner, corner_rows: pl.DataFrame) -> None:
    late = pl.col("session_id") > "s1"

    log = write_corner(corner_rows.filter(~late).reverse(), corner_rows.filter(late))

    parts = list(log.parts())
    assert [part["request_id"].to_list() for part in parts] == [["s1-0", "s1-1", "s1-2"], ["s2-0", "s3-0"]]


def test_columns_are_put_in_order_and_cast(write_corner: WriteCorner, corner_rows: pl.DataFrame) -> None:
    turned = corner_rows.select(reversed(corner_rows.columns)).with_columns(pl.col("step").cast(pl.Int64), extra=1)

    assert_frame_equal(write_corner(turned).scan().collect(), corner_rows)


# --- the content digest


def digest_of(manifest: Manifest, parts: list[pl.DataFrame], items: pl.DataFrame, candidates: pl.DataFrame) -> str:
    with tempfile.TemporaryDirectory() as folder:
        return write_log(Path(folder) / "log", manifest, parts, items, candidates).manifest.content_digest


@pytest.fixture(scope="module")
def corner_digest(
    corner_manifest: Manifest, corner_rows: pl.DataFrame, corner_items: pl.DataFrame, corner_candidates: pl.DataFrame
) -> str:
    return digest_of(corner_manifest, [corner_rows], corner_items, corner_candidates)


@settings(deadline=None, max_examples=15)
@given(data=st.data())
def test_the_digest_does_not_depend_on_the_order_of_rows_or_their_cut_into_parts(
    data: st.DataObject,
    corner_manifest: Manifest,
    corner_rows: pl.DataFrame,
    corner_items: pl.DataFrame,
    corner_candidates: pl.DataFrame,
    corner_digest: str,
) -> None:
    order = data.draw(st.permutations(range(corner_rows.height)))
    items_order = data.draw(st.permutations(range(corner_items.height)))
    part_of = data.draw(st.fixed_dictionaries({name: st.integers(0, 2) for name in ("s1", "s2", "s3")}))
    shuffled = corner_rows[order].with_columns(part=pl.col("session_id").replace_strict(part_of))
    parts = [part.drop("part") for part in shuffled.partition_by("part")]

    digest = digest_of(corner_manifest, parts, corner_items[items_order], corner_candidates)

    assert digest == corner_digest


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where in nested lists and structs the values that are not null stand."""
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(inner, (*path, key))
    elif value is not None:
        yield path


def with_leaf(value: Any, path: tuple[Any, ...], change: Callable[[Any], Any]) -> Any:
    """The value with one leaf changed."""
    if not path:
        return change(value)
    changed = value.copy()
    changed[path[0]] = with_leaf(value[path[0]], path[1:], change)
    return changed


def other_value(value: Any) -> Any:
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, datetime):
        return value + timedelta(microseconds=1)
    return value + ("x" if isinstance(value, str) else 1)


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_the_digest_changes_with_any_single_value(
    data: st.DataObject,
    corner_manifest: Manifest,
    corner_rows: pl.DataFrame,
    corner_items: pl.DataFrame,
    corner_candidates: pl.DataFrame,
    corner_digest: str,
) -> None:
    tables = [corner_rows, corner_items, corner_candidates]
    places = [
        (number, column, row, path)
        for number, table in enumerate(tables)
        for column in table.columns
        for row, value in enumerate(table[column].to_list())
        for path in leaves(value)
    ]
    number, column, row, path = data.draw(st.sampled_from(places))
    change = data.draw(st.sampled_from([other_value, lambda _: None]))
    values = tables[number][column].to_list()
    values[row] = with_leaf(values[row], path, change)
    dtype = tables[number].schema[column]
    changed = [
        table.with_columns(pl.Series(column, values, dtype)) if table is tables[number] else table for table in tables
    ]

    digest = digest_of(corner_manifest, [changed[0]], *changed[1:])

    assert digest != corner_digest


def test_strings_moved_between_elements_or_elements_between_rows_change_the_digest(
    write_corner: WriteCorner, corner_rows: pl.DataFrame
) -> None:
    def digest(*slates: list[str] | None) -> str:
        frame = corner_rows[:2].with_columns(slate=pl.Series(slates, dtype=pl.List(pl.String)))
        return write_corner(frame).manifest.content_digest

    variants = [
        digest(["ab", "c"], ["d"]),
        digest(["a", "bc"], ["d"]),
        digest(["ab"], ["c", "d"]),
        digest(["ab", "c", "d"], []),
        digest(["ab", "c", "d"], None),
    ]

    assert len(set(variants)) == len(variants)


def test_the_digest_is_that_of_the_files(corner_log: Log) -> None:
    assert content_digest(corner_log) == corner_log.manifest.content_digest
    assert len(corner_log.manifest.content_digest) == 64


# --- what is refused


def test_a_missing_folder_and_a_folder_without_a_manifest_are_named(tmp_path: Path) -> None:
    with pytest.raises(ContractError, match="nowhere: no such folder"):
        open_log(tmp_path / "nowhere")
    with pytest.raises(ContractError, match=f"holds no {MANIFEST}"):
        open_log(tmp_path)


def edit_manifest(log: Log, **changes: Any) -> None:
    path = log.path / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shop": 1}, r"manifest.json: shop: .*not permitted \(seen: 1\)"),
        ({"contract_version": 99}, "manifest.json: contract_version is 99; this program reads 1 and 2"),
        ({"evidence": "hope"}, "manifest.json: evidence: .*seen: 'hope'"),
        ({"slate_size": "many"}, "manifest.json: slate_size"),
    ],
)
def test_a_manifest_of_another_kind_is_refused_with_its_key(
    corner_log: Log, changes: dict[str, Any], message: str
) -> None:
    edit_manifest(corner_log, **changes)

    with pytest.raises(ContractError, match=message):
        open_log(corner_log.path)


def test_a_manifest_that_is_no_json_is_refused(corner_log: Log) -> None:
    (corner_log.path / MANIFEST).write_text('{"loop": ')

    with pytest.raises(ContractError, match=r"manifest\.json: document: Invalid JSON"):
        open_log(corner_log.path)


@pytest.mark.parametrize("keep", [0, 3, 200, -1])
def test_a_truncated_part_is_refused_with_its_name(corner_log: Log, keep: int) -> None:
    part = corner_log.part_paths[0]
    part.write_bytes(part.read_bytes()[:keep])

    with pytest.raises(ContractError, match=r"part-00000\.parquet: not readable as Parquet"):
        open_log(corner_log.path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows.with_columns(pl.col("step").cast(pl.Int64)), "column 'step' has type Int64; expected Int32"),
        (
            lambda rows: rows.with_columns(pl.col("slate").list.join(",")),
            r"column 'slate' has type String; expected List",
        ),
        (lambda rows: rows.drop("clicked"), "column 'clicked' is missing; expected type List"),
        (lambda rows: rows.with_columns(mood=1), "unexpected column 'mood'"),
    ],
)
def test_a_part_with_other_columns_is_refused_with_file_and_column(
    corner_log: Log, change: Callable[[pl.DataFrame], pl.DataFrame], message: str
) -> None:
    part = corner_log.part_paths[0]
    change(pl.read_parquet(part)).write_parquet(part)

    with pytest.raises(ContractError, match=rf"part-00000\.parquet: {message}"):
        open_log(corner_log.path)


def test_a_missing_or_different_item_table_is_refused(corner_log: Log) -> None:
    path = corner_log.path / "items.parquet"
    corner_log.items().drop("price").write_parquet(path)
    with pytest.raises(ContractError, match=r"items\.parquet: column 'price' is missing"):
        open_log(corner_log.path)

    path.unlink()
    with pytest.raises(ContractError, match=r"items\.parquet: missing"):
        open_log(corner_log.path)


def test_a_candidate_table_of_other_columns_is_refused(corner_log: Log) -> None:
    pl.DataFrame({"digest": ["fruit"]}).write_parquet(corner_log.path / "candidates.parquet")

    with pytest.raises(ContractError, match=r"candidates\.parquet: column 'candidates_digest' is missing"):
        open_log(corner_log.path)


def test_a_log_without_parts_is_refused(corner_log: Log) -> None:
    corner_log.part_paths[0].unlink()

    with pytest.raises(ContractError, match="requests: holds no part"):
        open_log(corner_log.path)


# --- what is not written


def test_rows_that_do_not_fit_the_manifest_are_not_written(
    write_corner: WriteCorner, corner_rows: pl.DataFrame, tmp_path: Path
) -> None:
    with pytest.raises(ContractError, match="part 0: column 'clicked' is missing"):
        write_corner(corner_rows.drop("clicked"))
    with pytest.raises(ContractError, match=r"part 0: .*conversion"):
        write_corner(corner_rows.with_columns(step=pl.lit("first")))
    with pytest.raises(ContractError, match="the source 'by-hand' holds no requests"):
        write_corner()

    assert list(tmp_path.iterdir()) == []


def test_an_older_log_is_replaced_whole(write_corner: WriteCorner, corner_rows: pl.DataFrame, tmp_path: Path) -> None:
    whole = write_corner(
        corner_rows.filter(pl.col("session_id") == "s1"), corner_rows.filter(pl.col("session_id") != "s1")
    )
    assert len(whole.part_paths) == 2

    log = write_corner(corner_rows[:3])

    assert log.manifest.n_requests == 3
    assert len(log.part_paths) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["corner"]


def test_a_copy_holds_the_log_and_nothing_that_lay_beside_it(corner_log: Log, tmp_path: Path) -> None:
    (corner_log.path / "notes.txt").write_text("mine")
    copied = copy_log(corner_log, tmp_path / "copies" / "log")
    assert open_log(copied.path).manifest == corner_log.manifest == copied.manifest
    assert content_digest(copied) == corner_log.manifest.content_digest
    assert not (copied.path / "notes.txt").exists()
    assert [path.name for path in copied.path.parent.iterdir()] == ["log"]


def test_a_failed_writing_leaves_the_older_log(
    corner_log: Log, write_corner: WriteCorner, corner_rows: pl.DataFrame, tmp_path: Path
) -> None:
    with pytest.raises(ContractError):
        write_corner(corner_rows, corner_rows.drop("slate"))

    assert open_log(corner_log.path).manifest == corner_log.manifest
    assert [path.name for path in tmp_path.iterdir()] == ["corner"]


def test_a_folder_that_holds_something_else_is_left_alone(
    write_corner: WriteCorner, corner_rows: pl.DataFrame, tmp_path: Path
) -> None:
    (tmp_path / "corner").mkdir()
    (tmp_path / "corner" / "thesis.txt").write_text("years of work")

    with pytest.raises(InputError, match="is not empty and holds no log"):
        write_corner(corner_rows)

    assert (tmp_path / "corner" / "thesis.txt").read_text() == "years of work"


def test_a_place_that_cannot_be_written_is_named(
    write_corner: WriteCorner, corner_rows: pl.DataFrame, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(InputError, match="cannot be written"):
        write_corner(corner_rows, name="file/log")
    with pytest.raises(InputError, match="file: is a file; expected a folder"):
        write_corner(corner_rows, name="file")


def test_a_log_of_version_1_is_read_and_written_on_as_it_is(storefront_log: Log, tmp_path: Path) -> None:
    old = storefront_log.manifest.model_copy(update={"contract_version": 1})
    written = write_log(tmp_path / "old", old, list(storefront_log.parts()), storefront_log.items())

    log = open_log(written.path)

    assert "position_log_probs" not in log.scan().collect_schema()
    assert log.manifest.content_digest == content_digest(log) == written.manifest.content_digest
    again = write_log(tmp_path / "again", log.manifest, list(log.parts()), log.items())
    assert again.manifest == log.manifest
