"""A file system of the tests' own that can be made full, and roomy again, while something writes to it."""

import os
import subprocess
from pathlib import Path

import pytest

ROOMY = 2**30


class SmallDisk:
    """A file system in memory; a test that must not mount one is skipped."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        try:
            mount = ["mount", "-t", "tmpfs", "-o", f"size={ROOMY}", "none", str(folder)]
            mounted = subprocess.run(mount, capture_output=True, text=True)
        except FileNotFoundError:
            pytest.skip("no file system can be mounted here: no mount on the PATH")
        if mounted.returncode:
            pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")

    def fill(self) -> None:
        """Leave no byte free."""
        while True:
            state = os.statvfs(self.folder)
            # Refused where something was written meanwhile.
            if self._resize((state.f_blocks - state.f_bfree) * state.f_frsize):
                return

    def free(self) -> None:
        """Make it roomy again."""
        assert self._resize(ROOMY)

    def unmount(self) -> None:
        """Take it away, whoever still uses it."""
        subprocess.run(["umount", "--lazy", self.folder], check=True)

    def _resize(self, size: int) -> bool:
        done = subprocess.run(["mount", "-o", f"remount,size={size}", self.folder], capture_output=True)
        return done.returncode == 0
