import os
import subprocess
import sys
from pathlib import Path

import pytest

from components.errors import ContractError, InputError
from flows.stage_store import (
    MANIFEST,
    StageManifest,
    StageRef,
    StageStore,
    clear_abandoned,
    stage_key,
    staging_beside,
)

KEY = "0123456789abcdef" * 4


@pytest.fixture
def store(tmp_path: Path) -> StageStore:
    return StageStore(tmp_path / "stages")


def compute(out: Path) -> None:
    (out / "result.txt").write_text("42")


def listing(store: StageStore) -> set[str]:
    """Every file and every temporary folder of a store."""
    paths = store.root.rglob("*")
    return {str(path.relative_to(store.root)) for path in paths if path.is_file() or path.name.startswith(".")}


def test_a_finished_stage_lies_whole_under_its_key_with_its_manifest(store: StageStore) -> None:
    assert not store.is_complete("split", KEY)
    ref = store.write("split", KEY, compute, {"checked": "abc"})
    assert ref == StageRef(path=store.folder("split", KEY), digest=KEY)
    assert store.is_complete("split", KEY)
    manifest = StageManifest.model_validate_json((ref.path / MANIFEST).read_bytes())
    assert (manifest.stage, manifest.key, manifest.upstream) == ("split", KEY, {"checked": "abc"})
    assert manifest.seconds >= 0


def test_while_a_stage_is_computed_nothing_carries_its_name(store: StageStore) -> None:
    def look_around(out: Path) -> None:
        compute(out)
        assert not store.folder("split", KEY).exists()
        assert not store.is_complete("split", KEY)

    store.write("split", KEY, look_around, {})


@pytest.mark.parametrize("error", [ValueError("a defect"), KeyboardInterrupt()])
def test_a_failed_stage_leaves_nothing(store: StageStore, error: BaseException) -> None:
    def fail(out: Path) -> None:
        compute(out)
        raise error

    with pytest.raises(type(error)):
        store.write("split", KEY, fail, {})
    assert listing(store) == set()
    assert not store.is_complete("split", KEY)


def test_a_rejected_stage_keeps_what_it_found_and_says_where(store: StageStore) -> None:
    def reject(out: Path) -> None:
        compute(out)
        raise ContractError("column 'slate' is missing")

    for _ in range(2):
        with pytest.raises(ContractError, match=r"(?s)'slate' is missing.*What was found is in .*rejected/split-"):
            store.write("split", KEY, reject, {})
    assert listing(store) == {f"rejected/split-{KEY[:12]}/result.txt"}
    assert not store.is_complete("split", KEY)


def test_a_rejection_without_findings_is_only_raised(store: StageStore) -> None:
    def reject(out: Path) -> None:
        raise InputError("no such file")

    with pytest.raises(InputError, match=r"^no such file$"):
        store.write("split", KEY, reject, {})
    assert listing(store) == set()


def test_a_stage_computed_anew_replaces_the_older_result(store: StageStore) -> None:
    store.write("split", KEY, compute, {})
    store.write("split", KEY, lambda out: (out / "other.txt").touch(), {})
    folder = f"split/{KEY[:24]}"
    assert listing(store) == {f"{folder}/other.txt", f"{folder}/{MANIFEST}"}


def test_a_folder_of_another_key_or_without_a_manifest_is_not_taken_for_the_stage(store: StageStore) -> None:
    store.write("split", KEY, compute, {})
    assert not store.is_complete("split", KEY[:24] + "f" * 40)
    (store.folder("split", KEY) / MANIFEST).unlink()
    assert not store.is_complete("split", KEY)


def test_a_store_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file/stages: cannot be written: .*; set SLATELOOP_HOME"):
        StageStore(tmp_path / "file" / "stages").write("split", KEY, compute, {})


def test_leftovers_of_dead_processes_are_cleared_and_those_of_the_living_kept(store: StageStore) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    folder = store.folder("split", KEY).parent
    dead = folder / f".{KEY[:24]}.{gone.pid}.0a1b2c.tmp"
    replaced = folder / f".{KEY[:24]}.0a1b2c3d.old"
    living = staging_beside(folder / "another-key")
    foreign = folder / ".cache"
    for path in (dead, replaced, living, foreign):
        path.mkdir(parents=True)
        (path / "half.txt").touch()
    store.write("split", KEY, compute, {})
    assert [path.exists() for path in (dead, replaced, living, foreign)] == [False, False, True, True]


def test_a_leftover_older_than_the_process_that_has_its_number_now_is_cleared(tmp_path: Path) -> None:
    leftover = staging_beside(tmp_path / "key")
    leftover.mkdir()
    os.utime(leftover, (0, 0))
    clear_abandoned(tmp_path)
    assert not leftover.exists()


def test_clearing_where_there_is_nothing_does_nothing(tmp_path: Path) -> None:
    clear_abandoned(tmp_path / "nowhere")


SETTINGS = {"seed": 0, "reinforce": {"gamma": 0.9, "iterations": 3}}
UPSTREAM = {"split": StageRef(path=Path("/a"), digest="s"), "world": StageRef(path=Path("/b"), digest="w")}


def test_a_key_does_not_depend_on_order_or_place() -> None:
    key = stage_key("policy", SETTINGS, UPSTREAM, "code", "lock")
    reordered = {"reinforce": {"iterations": 3, "gamma": 0.9}, "seed": 0}
    moved = {role: ref.model_copy(update={"path": Path("/moved")}) for role, ref in reversed(UPSTREAM.items())}
    assert stage_key("policy", reordered, moved, "code", "lock") == key


@pytest.mark.parametrize(
    "change",
    [
        {"name": "baseline"},
        {"settings": SETTINGS | {"seed": 1}},
        {"settings": SETTINGS | {"reinforce": {"gamma": 0.8, "iterations": 3}}},
        {"upstream": UPSTREAM | {"split": StageRef(path=Path("/a"), digest="t")}},
        {"upstream": {"split": UPSTREAM["world"], "world": UPSTREAM["split"]}},
        {"code": "other"},
        {"lock": "other"},
    ],
)
def test_a_key_changes_with_everything_that_matters(change: dict[str, object]) -> None:
    def key(name="policy", settings=SETTINGS, upstream=UPSTREAM, code="code", lock="lock") -> str:  # type: ignore[no-untyped-def]
        return stage_key(name, settings, upstream, code, lock)

    assert key(**change) != key()
