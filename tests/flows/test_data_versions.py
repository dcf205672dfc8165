import shutil
import subprocess
import threading
from pathlib import Path

import pytest

from components.errors import InputError
from flows.data_versions import add_to_cache, pin, pinned_digest


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=Test", "-c", "user.email=test@example.org", "-c", "protocol.file.allow=always"]
    return subprocess.run(
        ["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True
    ).stdout.strip()


def write_data(repository: Path, text: str = "rows") -> Path:
    folder = repository / "data" / "storefront"
    (folder / "requests").mkdir(parents=True, exist_ok=True)
    (folder / "requests" / "part-00000.parquet").write_text(text)
    (folder / "manifest.json").write_text("{}")
    return folder


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A git repository with DVC in it, one commit old; data/ is no business of git's."""
    from dvc.repo import Repo

    folder = tmp_path / "repository"
    folder.mkdir()
    git(folder, "init", "--quiet", "--initial-branch=main")
    Repo.init(str(folder)).close()
    (folder / ".gitignore").write_text("/data\n")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message=Begin")
    return folder


def clone(repository: Path, name: str = "clone") -> Path:
    git(repository, "add", "--all")
    git(repository, "commit", "--quiet", "--message=Pin")
    git(repository.parent, "clone", "--quiet", str(repository), name)
    return repository.parent / name


def test_a_run_puts_data_into_the_cache_and_leaves_git_clean(repository: Path) -> None:
    digest = add_to_cache(write_data(repository))
    assert digest is not None
    assert digest.endswith(".dir")
    assert git(repository, "status", "--porcelain", "--untracked-files=all") == ""
    assert len([path for path in (repository / ".dvc" / "cache").rglob("*") if path.is_file()]) == 3


def test_the_digest_is_of_the_content(repository: Path) -> None:
    digest = add_to_cache(write_data(repository))
    assert add_to_cache(write_data(repository)) == digest
    assert add_to_cache(write_data(repository, "other rows")) != digest


def test_a_run_after_the_pin_leaves_the_pin_alone(repository: Path) -> None:
    data = write_data(repository).parent
    pinned = pin(data)
    clone(repository)
    add_to_cache(write_data(repository, "newer rows"))
    assert pinned_digest(data) == pinned
    assert git(repository, "status", "--porcelain", "--untracked-files=all") == ""


def test_outside_a_dvc_repository_there_is_no_digest(tmp_path: Path) -> None:
    assert add_to_cache(write_data(tmp_path)) is None


def test_only_the_pin_writes_data_dvc(repository: Path) -> None:
    folder = write_data(repository)
    add_to_cache(folder)
    assert pinned_digest(folder.parent) is None
    digest = pin(folder.parent)
    assert pinned_digest(folder.parent) == digest
    assert git(repository, "status", "--porcelain", "--untracked-files=all") == "?? data.dvc"
    assert pin(folder.parent) == digest
    write_data(repository, "other rows")
    assert pin(folder.parent) != digest


def test_there_must_be_data_and_a_repository_to_pin(repository: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="data: holds no data to pin"):
        pin(repository / "data")
    with pytest.raises(InputError, match="is in no DVC repository; `dvc init` makes one"):
        pin(write_data(tmp_path).parent)


def test_on_a_clone_without_a_remote_regenerated_data_is_the_pinned_version(repository: Path) -> None:
    pinned = pin(write_data(repository).parent)
    fresh = clone(repository)
    assert not (fresh / "data").exists()
    assert pinned_digest(fresh / "data") == pinned
    digest = add_to_cache(write_data(fresh))
    assert digest == add_to_cache(repository / "data" / "storefront")
    assert pin(fresh / "data") == pinned
    assert git(fresh, "status", "--porcelain", "--untracked-files=all") == ""


def test_with_a_remote_the_pinned_version_is_pushed_and_pulled(repository: Path, tmp_path: Path) -> None:
    from dvc.repo import Repo

    pin(write_data(repository).parent)
    with Repo(str(repository)) as repo, repo.config.edit("repo") as config:
        config["remote"] = {"shared": {"url": str(tmp_path / "remote")}}
        config["core"]["remote"] = "shared"
    with Repo(str(repository)) as repo:
        repo.push()
    fresh = clone(repository)
    with Repo(str(fresh)) as repo:
        repo.pull()
    assert (fresh / "data" / "storefront" / "requests" / "part-00000.parquet").read_text() == "rows"
    shutil.rmtree(repository / "data")
    shutil.rmtree(repository / ".dvc" / "cache")
    with Repo(str(repository)) as repo:
        repo.pull()
    assert (repository / "data" / "storefront" / "manifest.json").read_text() == "{}"


def test_two_runs_that_meet_take_turns(repository: Path) -> None:
    from dvc.repo import Repo

    folder = write_data(repository)
    digests: list[str | None] = []
    run = threading.Thread(target=lambda: digests.append(add_to_cache(folder)))
    with Repo(str(repository)) as other, other.lock:
        run.start()
        run.join(timeout=1)
        assert digests == []
    run.join(timeout=60)
    assert digests == [add_to_cache(folder)]
