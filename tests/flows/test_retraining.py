from pathlib import Path

import pytest

from components.errors import InputError
from flows.config import LoopConfig, load_config

MAPPING = '[log]\nevidence = "clicks"\nresponses = "choice"\n[columns]\nsession_id = "s"\nevents = "e"\n'


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A mapped table whose catalog lies beside it."""
    (tmp_path / "log.csv").write_text("s,e\n1,a\n")
    (tmp_path / "items.csv").write_text("sku\na\n")
    (tmp_path / "mapping.toml").write_text(MAPPING + '[items]\nfile = "items.csv"\nitem_id = "sku"\n')
    return tmp_path / "log.csv"


def source_digest(config: LoopConfig, path: Path | None) -> str:
    from flows.retraining import source_ref

    return source_ref(config, path).digest


def test_a_simulated_source_is_the_same_everywhere() -> None:
    assert source_digest(LoopConfig(), None) == source_digest(LoopConfig(), None)


@pytest.mark.parametrize("changed", ["log.csv", "items.csv", "mapping.toml"])
def test_a_tables_digest_changes_with_every_file_that_is_read(changed: str, table: Path) -> None:
    config = load_config(None, [], "table")
    before = source_digest(config, table)
    (table.parent / "unread.txt").write_text("a note")
    assert source_digest(config, table) == before
    with (table.parent / changed).open("a") as file:
        file.write("\n")
    assert source_digest(config, table) != before


def test_a_mapping_elsewhere_counts_too(table: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere" / "mapping.toml"
    elsewhere.parent.mkdir()
    elsewhere.write_text(MAPPING)
    config = load_config(None, [f"source.mapping={elsewhere}"], "table")
    before = source_digest(config, table)
    elsewhere.write_text(MAPPING + "# a note\n")
    assert source_digest(config, table) != before


def test_a_table_without_a_mapping_is_refused(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("s,e\n1,a\n")
    with pytest.raises(InputError, match=r"mapping\.toml"):
        source_digest(load_config(None, [], "table"), tmp_path / "log.csv")
