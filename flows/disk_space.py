"""A full disk, by whatever library it is met, as one sentence.

Half of what writes has errors of its own for it, with the system's words somewhere in their text; a server that cannot
write answers with a mere 500.
"""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from components.errors import SlateloopError

#: What the system, a quota and SQLite say.
_FULL = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT), "database or disk is full")
#: Free bytes below which whatever fails is taken to have failed for want of space.
SCARCE = 2**18


class DiskFullError(SlateloopError):
    """Something could not be written for want of space; the command line exits with 1: no input is wrong."""


@contextmanager
def disk_full_told(folder: Path, setting: str) -> Iterator[None]:
    """Turn whatever is raised because a disk is full into a sentence.

    Args:
        folder: where the block writes.
        setting: what names another folder.

    Raises:
        DiskFullError: the disk is full.
    """
    try:
        yield
    except DiskFullError:
        raise
    except Exception as error:
        there = next(place for place in (folder, *folder.resolve().parents) if place.exists())
        usage = shutil.disk_usage(there)
        # An error that is a sentence has another reason, unless it gives this one.
        scarce = usage.free < SCARCE and not isinstance(error, SlateloopError)
        if not scarce and not _says_so(error):
            raise
        raise DiskFullError(
            f"{folder}: no space is left on its disk of {usage.total / 2**20:,.0f} MiB; free some, or choose another "
            f"folder with {setting}; then the same command goes on where this one stopped"
        ) from error


def _says_so(error: BaseException | None) -> bool:
    """Whether a full disk is what an error, or one that led to it, is about."""
    while error is not None:
        if any(words in str(error) for words in _FULL):
            return True
        error = error.__cause__ or error.__context__
    return False
