"""What a result depends on: data digest, code, lock, configuration, seed and threads."""

import hashlib
import subprocess
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from flows.settings import REPOSITORY

#: What every stage's result depends on.
LIBRARY = ("components", "flows/stages.py", "flows/action_stages.py")


def digest_of(*parts: str | bytes) -> str:
    """SHA-256 of parts, each told apart from its neighbours."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


@cache
def code_digest(sources: tuple[str, ...] = LIBRARY) -> str:
    """Digest of source files and of folders of them, named from the repository's root."""
    paths = [REPOSITORY / source for source in sources]
    files = sorted(file for path in paths for file in (path.rglob("*.py") if path.is_dir() else [path]))
    return digest_of(*(part for file in files for part in (str(file.relative_to(REPOSITORY)), file.read_bytes())))


@cache
def lock_digest() -> str:
    """Digest of the dependency lock."""
    return digest_of((REPOSITORY / "constraints.txt").read_bytes())


@cache
def git_commit() -> str | None:
    """The checked-out commit, with `+changes` where the tree differs from it; None outside git."""
    try:
        commit = _git("rev-parse", "HEAD")
        return commit + ("+changes" if _git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def files_changed_since(commit: str) -> list[str]:
    """Files of the library that differ from a commit; none where git cannot tell."""
    try:
        return _git("diff", "--name-only", commit, "--", *LIBRARY).split() if commit else []
    except (OSError, subprocess.CalledProcessError):
        return []


def folder_digest(folder: Path, names: Iterable[str] | None = None) -> str:
    """Digest of a folder's files by name and content; of a single file where the path is one."""
    if folder.is_file():
        return _file_digest(folder)
    files = [folder / name for name in names] if names else [path for path in folder.rglob("*") if path.is_file()]
    return digest_of(*(part for path in sorted(files) for part in (str(path.relative_to(folder)), _file_digest(path))))


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _git(*arguments: str) -> str:
    answer = subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return answer.stdout.strip()
