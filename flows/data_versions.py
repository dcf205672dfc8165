"""Versions of `data/` with DVC: a run adds to the cache alone, `slateloop data pin` writes `data.dvc`."""

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import yaml

from components.errors import InputError
from components.interactions.stored_copies import found_in, names_any

#: The first bytes of every Parquet file.
_PARQUET = b"PAR1"


def add_to_cache(folder: Path) -> str | None:
    """Put a folder's files into DVC's cache and return their digest; None outside a DVC repository.

    Nothing that git tracks is written, so a run leaves a clean tree clean. Two runs that meet take turns.
    """
    from dvc.exceptions import NotDvcRepoError
    from dvc.repo import Repo
    from dvc_data.hashfile.build import build
    from dvc_data.hashfile.transfer import transfer
    from dvc_objects.fs.local import localfs

    try:
        repo = Repo(str(folder.resolve().parent), _wait_for_lock=True)
    except NotDvcRepoError:
        return None
    with repo, repo.lock:
        cache = repo.cache.local
        staging, _, tree = build(cache, str(folder.resolve()), localfs, "md5")
        transfer(staging, cache, {tree.hash_info}, shallow=False)
        return str(tree.hash_info.value)


def pin(data: Path) -> str:
    """Write the current version of the data folder into `data.dvc` and return its digest.

    Raises:
        InputError: there is no data, or no DVC repository around it.
    """
    from dvc.exceptions import NotDvcRepoError
    from dvc.repo import Repo

    if not data.is_dir() or not any(data.iterdir()):
        raise InputError(f"{data}: holds no data to pin; `slateloop run` or `slateloop import` writes it")
    try:
        repo = Repo(str(data.resolve().parent), _wait_for_lock=True)
    except NotDvcRepoError:
        raise InputError(f"{data.resolve().parent}: is in no DVC repository; `dvc init` makes one") from None
    with repo:
        stage = repo.add(str(data.resolve()))[0]
        return str(stage.outs[0].hash_info.value)


def pinned_digest(data: Path) -> str | None:
    """Digest in `data.dvc`; None where nothing is pinned."""
    file = data.with_name(data.name + ".dvc")
    if not file.is_file():
        return None
    return str(yaml.safe_load(file.read_text())["outs"][0]["md5"])


@dataclass(frozen=True)
class Purged:
    """What was deleted from DVC's cache."""

    n_objects: int = 0
    """Files of the cache, lists of a folder's files among them."""
    pinned: bool = False
    """Whether `data.dvc` names a version that is gone by that."""
    remotes: tuple[str, ...] = ()
    """Where versions may have been pushed to."""


def purge_cache(data: Path, user_ids: Collection[str]) -> Purged:
    """Delete from DVC's cache whatever holds rows of users, and the versions that it belonged to.

    Lists of files go last: as long as they are there, what an interrupted purge left is found by the next one.
    """
    from dvc.exceptions import NotDvcRepoError
    from dvc.repo import Repo

    try:
        repo = Repo(str(data.resolve().parent), _wait_for_lock=True)
    except NotDvcRepoError:
        return Purged()
    with repo, repo.lock:
        cache = Path(repo.cache.local.path)
        files = {file.parent.name + file.name: file for file in sorted(cache.glob("??/*")) if file.is_file()}
        versions = {name: file for name, file in files.items() if name.endswith(".dir")}
        # What is missing is taken for deleted before: then its versions are of no use either.
        gone = {name for name, file in files.items() if name not in versions and _holds(file, user_ids)}
        lost = {
            name
            for name, file in versions.items()
            if any(part["md5"] in gone or part["md5"] not in files for part in json.loads(file.read_bytes()))
        }
        for name in [*sorted(gone), *sorted(lost)]:
            files[name].unlink()
        pinned = pinned_digest(data)
        remotes = tuple(sorted(repo.config["remote"]))
    return Purged(
        n_objects=len(gone | lost),
        pinned=pinned in lost,
        remotes=remotes,
    )


def _holds(file: Path, user_ids: Collection[str]) -> bool:
    with file.open("rb") as content:
        is_parquet = content.read(len(_PARQUET)) == _PARQUET
    return not found_in(file, user_ids).is_empty() if is_parquet else names_any(file, user_ids)
