from pathlib import Path

from flows.lineage import LIBRARY, code_digest, digest_of, folder_digest, git_commit, lock_digest
from flows.platform_stages import PLATFORM


def test_parts_are_told_apart() -> None:
    assert digest_of("ab", "c") != digest_of("a", "bc") != digest_of("abc")
    assert digest_of("a", b"b") == digest_of(b"a", "b")


def test_a_folders_digest_is_of_names_and_contents_and_not_of_its_place(tmp_path: Path) -> None:
    def folder(name: str, **files: str) -> Path:
        for file, text in files.items():
            path = tmp_path / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path / name

    one = folder_digest(folder("one", a="1", b="2"))
    assert folder_digest(folder("two", b="2", a="1")) == one
    assert folder_digest(folder("three", a="1", b="3")) != one
    assert folder_digest(folder("four", a="1", c="2")) != one
    assert folder_digest(tmp_path / "three", ["a"]) == folder_digest(tmp_path / "one", ["a"])
    assert folder_digest(tmp_path / "one" / "a") == folder_digest(tmp_path / "two" / "a")


def test_the_lineage_names_code_lock_and_commit() -> None:
    assert len(code_digest()) == len(lock_digest()) == 64
    commit = git_commit()
    assert commit is None or len(commit.removesuffix("+changes")) == 40


def test_what_is_handed_to_the_platform_depends_on_more_code_than_what_is_learned() -> None:
    assert code_digest(LIBRARY) == code_digest()
    assert set(LIBRARY) < set(PLATFORM)
    assert code_digest(PLATFORM) != code_digest()
