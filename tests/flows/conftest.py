"""Prefect, DVC and BentoML are given homes of the tests' own, and each test its own folders."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.settings import TELEMETRY_OFF


@pytest.fixture(scope="session", autouse=True)
def tool_homes(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Prefect and DVC are imported here: their loggers keep the stderr, and Prefect the home, that they then find."""
    os.environ.update(TELEMETRY_OFF)
    os.environ["PREFECT_HOME"] = str(tmp_path_factory.mktemp("prefect"))
    os.environ.setdefault("BENTOML_HOME", str(tmp_path_factory.mktemp("bentoml")))
    import dvc.repo  # noqa: F401
    import prefect.main  # noqa: F401


@pytest.fixture(autouse=True)
def no_complaints_of_closed_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefect's console handler keeps the stderr that it first saw; CliRunner closes its own after each call."""
    monkeypatch.setattr(logging, "raiseExceptions", False)


@pytest.fixture(autouse=True)
def place(tmp_path: Path) -> Iterator[Path]:
    """Folder with the test's `home`, `runs` and `data`; the environment is as before when the test ends."""
    before = dict(os.environ)
    for name in ("home", "runs", "data"):
        os.environ[f"SLATELOOP_{name.upper()}"] = str(tmp_path / name)
    yield tmp_path
    os.environ.clear()
    os.environ.update(before)
