import os
import sys
from pathlib import Path

import pytest

from components.errors import InputError
from flows.settings import TELEMETRY_OFF, PlatformSettings, prepare_environment, require_writable


def test_folders_come_from_the_environment(tmp_path: Path) -> None:
    assert PlatformSettings().home == tmp_path / "home"
    del os.environ["SLATELOOP_HOME"]
    assert PlatformSettings().home == Path(".slateloop")


def test_the_tools_keep_their_state_in_the_home_and_send_nothing(tmp_path: Path) -> None:
    for name in ("PREFECT_HOME", "BENTOML_HOME", *TELEMETRY_OFF):
        os.environ.pop(name, None)
    prepare_environment(PlatformSettings())
    assert os.environ["PREFECT_HOME"] == str(tmp_path / "home" / "prefect")
    assert os.environ["BENTOML_HOME"] == str(tmp_path / "home" / "bentoml")
    assert TELEMETRY_OFF.items() <= os.environ.items()


def test_what_the_user_has_set_stays() -> None:
    os.environ["PREFECT_HOME"] = "/elsewhere"
    prepare_environment(PlatformSettings())
    assert os.environ["PREFECT_HOME"] == "/elsewhere"


def test_the_path_is_extended_once() -> None:
    os.environ["PATH"] = "/usr/bin"
    prepare_environment(PlatformSettings())
    prepare_environment(PlatformSettings())
    assert os.environ["PATH"].split(os.pathsep) == [str(Path(sys.executable).parent), "/usr/bin"]


def test_a_folder_below_a_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file/runs: cannot be made: .*; choose another folder with --out"):
        require_writable(tmp_path / "file" / "runs", "--out")
    with pytest.raises(InputError, match="File exists"):
        require_writable(tmp_path / "file", "--out")
    require_writable(tmp_path / "new" / "runs", "--out")
    assert (tmp_path / "new" / "runs").is_dir()
