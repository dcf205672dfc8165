"""Entries on disk: whole or not there, never replaced, and safe for runs at the same time."""

import json
import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from ledger_entries import ab_result, ledger_entry

from components.errors import InputError
from components.experiment.ledger import LedgerEntry
from flows.ledger_store import add_entry, read_ledger, record_ab, summary_around

SIMULATED = ab_result(0.3, "simulated in a world model")


def leftovers(home: Path) -> list[Path]:
    return list((home / "ledger").rglob(".*"))


def test_entries_come_back_as_they_went_in(tmp_path: Path) -> None:
    entries = [ledger_entry(0, ab=SIMULATED), ledger_entry(1), ledger_entry(2, offline=-0.1, passed=False)]
    for entry in entries:
        add_entry(tmp_path, entry)
    assert read_ledger(tmp_path) == entries
    assert leftovers(tmp_path) == []


def test_a_home_without_a_ledger_has_no_entries(tmp_path: Path) -> None:
    assert read_ledger(tmp_path) == []


def test_adding_an_entry_again_changes_nothing(tmp_path: Path) -> None:
    file = add_entry(tmp_path, ledger_entry(ab=SIMULATED))
    before = (file.stat().st_ino, file.read_bytes())
    assert add_entry(tmp_path, ledger_entry(ab=SIMULATED)) == file
    assert (file.stat().st_ino, file.read_bytes()) == before


def test_a_result_is_never_replaced_by_another_of_its_label(tmp_path: Path) -> None:
    first = ledger_entry(ab=ab_result(0.2))
    file = add_entry(tmp_path, first)
    with pytest.raises(InputError, match=r"live/entry\.json: run shop-0 has another A/B of this label already"):
        add_entry(tmp_path, ledger_entry(ab=ab_result(0.4)))
    assert read_ledger(tmp_path) == [first]
    assert leftovers(tmp_path) == []
    file.unlink()
    add_entry(tmp_path, ledger_entry(ab=ab_result(0.4)))


def test_a_run_that_stops_before_the_rename_leaves_no_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(source: Path, target: Path) -> None:
        assert LedgerEntry.model_validate_json((source / "entry.json").read_bytes()) == ledger_entry()
        assert read_ledger(tmp_path) == []
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", stop)
        with pytest.raises(KeyboardInterrupt):
            add_entry(tmp_path, ledger_entry())
    assert read_ledger(tmp_path) == []
    assert leftovers(tmp_path) == []


def test_what_a_dead_process_left_half_written_is_no_entry_and_is_cleared(tmp_path: Path) -> None:
    dead = tmp_path / "ledger" / "shop-0" / ".live.999999999.abcdef.tmp"
    dead.mkdir(parents=True)
    (dead / "entry.json").write_text('{"run": "sho')
    assert read_ledger(tmp_path) == []
    add_entry(tmp_path, ledger_entry())
    assert leftovers(tmp_path) == []


DAYS = range(40)


def race(home: Path, difference: float) -> list[int]:
    """Record a live A/B for each day's run while another process does too; the days on which this one was first."""
    (home / f"{difference}.ready").touch()
    deadline = time.monotonic() + 60
    while len(list(home.glob("*.ready"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.001)
    first = []
    for day in DAYS:
        add_entry(home, ledger_entry(day, offline=difference, ab=SIMULATED, run=f"shop-{day}-{difference}"))
        with suppress(InputError):
            add_entry(home, ledger_entry(day, ab=ab_result(difference)))
            first.append(day)
    return first


def test_of_two_processes_each_adds_its_runs_and_one_alone_adds_a_result_of_the_same_run(tmp_path: Path) -> None:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as other:
        others = other.submit(race, tmp_path, 0.3)
        won = {0.2: race(tmp_path, 0.2), 0.3: others.result()}
    assert sorted(won[0.2] + won[0.3]) == list(DAYS)
    entries = read_ledger(tmp_path)
    live = {entry.started: entry.ab.difference for entry in entries if entry.ab and entry.ab.label == "live"}
    assert [difference for _, difference in sorted(live.items())] == [0.2 if day in won[0.2] else 0.3 for day in DAYS]
    assert len(entries) == 3 * len(DAYS)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda text: text[:40], "document: Invalid JSON"),
        (lambda text: text.replace('"passed": true', '"passed": "perhaps"'), r"passed: .*\(seen: 'perhaps'\)"),
        (lambda text: text.replace('"lower"', '"lowest"', 1), "lower"),
        (lambda text: text.replace("+00:00", "").replace("00:00:00Z", "00:00:00"), "started: .*timezone"),
    ],
)
def test_a_damaged_entry_is_named(damage: Callable[[str], str], said: str, tmp_path: Path) -> None:
    file = add_entry(tmp_path, ledger_entry())
    damaged = damage(file.read_text())
    assert damaged != file.read_text()
    file.write_text(damaged)
    with pytest.raises(InputError, match=rf"shop-0/no-ab/entry\.json: .*{said}"):
        read_ledger(tmp_path)


def test_a_ledger_that_cannot_be_written_is_named_with_its_setting(tmp_path: Path) -> None:
    (tmp_path / "ledger").touch()
    with pytest.raises(InputError, match=r"ledger/shop-0/no-ab: cannot be written: .*; set SLATELOOP_HOME"):
        add_entry(tmp_path, ledger_entry())


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A live A/B's result."""
    (tmp_path / "ab.json").write_text(ab_result(0.25).model_dump_json())
    return tmp_path / "ab.json"


def test_a_later_ab_stands_beside_the_prediction_and_the_runs_own(file: Path, tmp_path: Path) -> None:
    own = ledger_entry(ab=SIMULATED)
    add_entry(tmp_path, own)
    entry = record_ab(tmp_path, "shop-0", file)
    assert entry == own.followed_by(ab_result(0.25))
    assert record_ab(tmp_path, "shop-0", file) == entry
    assert read_ledger(tmp_path) == [entry, own]
    assert [(kind.label, kind.n) for kind in summary_around(own, read_ledger(tmp_path)).labels] == [
        ("live", 1),
        ("simulated in a world model", 1),
    ]


def test_a_run_of_the_ledger_is_found_by_its_name_or_a_beginning_that_fits_no_other(file: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="run 'shop': 0 runs of the ledger begin so; they are: none yet"):
        record_ab(tmp_path, "shop", file)
    for day in (1, 12):
        add_entry(tmp_path, ledger_entry(day))
    assert record_ab(tmp_path, "shop-1", file).run == "shop-1"
    assert record_ab(tmp_path, "shop-12", file).run == "shop-12"
    with pytest.raises(InputError, match="run 'shop': 2 runs of the ledger begin so; they are: shop-1, shop-12"):
        record_ab(tmp_path, "shop", file)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"treatment": "cem-2"}, "treatment: is 'cem-2'; expected 'reinforce', the challenger of run shop-0"),
        ({"label": "dreamt"}, r"label: Input should be 'live', .* \(seen: 'dreamt'\)"),
        ({"conclusive": False}, "contradicts the interval"),
        ({"upper": None}, "upper: Input should be a valid number"),
    ],
)
def test_a_file_that_is_no_ab_of_the_challenger_is_refused_with_its_field(
    changes: dict[str, object], said: str, file: Path, tmp_path: Path
) -> None:
    add_entry(tmp_path, ledger_entry())
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(InputError, match=rf"ab\.json: .*{said}"):
        record_ab(tmp_path, "shop-0", file)
    assert [entry.ab for entry in read_ledger(tmp_path)] == [None]


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    add_entry(tmp_path, ledger_entry())
    with pytest.raises(InputError, match=r"none\.json: cannot be read: No such file"):
        record_ab(tmp_path, "shop-0", tmp_path / "none.json")


def test_a_summary_is_of_the_entrys_own_loop(tmp_path: Path) -> None:
    own, other = ledger_entry(0, ab=SIMULATED), ledger_entry(1, ab=SIMULATED, loop="other")
    summary = summary_around(own, [own, other])
    assert (summary.loop, summary.labels[0].n) == ("shop", 1)
