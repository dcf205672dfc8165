"""Versions of `data/` with DVC: a run adds to the cache alone, `slateloop data pin` writes `data.dvc`."""

from pathlib import Path

import yaml

from components.errors import InputError


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
