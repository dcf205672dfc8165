"""Where things live: read once from the environment, at the edge, and never part of a run's lineage."""

import os
import sys
from pathlib import Path
from typing import Self

from pydantic import Field, ModelWrapValidatorHandler, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from components.errors import InputError

#: Switches every library's telemetry off. BentoML counts only the word true.
TELEMETRY_OFF = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "BENTOML_DO_NOT_TRACK": "True",
    "GX_ANALYTICS_ENABLED": "false",
    "DVC_NO_ANALYTICS": "1",
    "ITERATIVE_DO_NOT_TRACK": "1",
}
REPOSITORY = Path(__file__).resolve().parents[1]


class PlatformSettings(BaseSettings):
    """Folders and habits of this machine; each can be set as an environment variable SLATELOOP_NAME."""

    model_config = SettingsConfigDict(env_prefix="SLATELOOP_", frozen=True, extra="ignore")

    home: Path = Field(default=Path(".slateloop"), description="Folder of stages, models and Prefect's state.")
    runs: Path = Field(default=Path("runs"), description="Folder in which each run leaves its own.")
    data: Path = Field(default=Path("data"), description="Folder of imported logs, whose version is in data.dvc.")
    cooldown_hours: float = Field(
        default=24.0, ge=0, le=8_760, description="Least time between two retrainings of a loop that events wake."
    )
    run_hours: float = Field(default=24.0, gt=0, le=8_760, description="Time after which a run is ended as timed out.")
    notify: str = Field(
        default="", description="Prefect block that is told of failures, as TYPE/NAME: slack-webhook/team; empty: none."
    )

    @model_validator(mode="wrap")
    @classmethod
    def _explained(cls, values: object, handler: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return handler(values)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            name = "_".join(str(part) for part in first["loc"]).upper()
            raise InputError(f"SLATELOOP_{name} = {first['input']!r}: {first['msg'].lower()}") from None


def require_writable(folder: Path, setting: str) -> None:
    """Make a folder, or say which setting names another one.

    Raises:
        InputError: it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be made: {error.strerror}; choose another folder with {setting}") from None
    if not os.access(folder, os.W_OK):
        raise InputError(f"{folder}: cannot be written; choose another folder with {setting}")


def prepare_environment(settings: PlatformSettings) -> None:
    """Set what the platform's tools read from the environment; call before any of them is imported.

    What the user has set stays. Without PREFECT_API_URL Prefect starts a server of its own for the run, which needs
    more than its default 20 seconds on a busy machine.
    """
    home = settings.home.resolve()
    defaults = TELEMETRY_OFF | {
        "PREFECT_HOME": str(home / "prefect"),
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",
        "PREFECT_LOGGING_LEVEL": "WARNING",
        # What a run says of itself is for the server, which shows it; the command line keeps it off the terminal.
        "PREFECT_LOGGING_LOGGERS_PREFECT_FLOW_RUNS_LEVEL": "INFO",
        "PREFECT_LOGGING_LOGGERS_PREFECT_TASK_RUNS_LEVEL": "INFO",
        "BENTOML_HOME": str(home / "bentoml"),
        "MPLBACKEND": "Agg",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    # Prefect warns while it is imported where its folder is missing.
    Path(os.environ["PREFECT_HOME"]).mkdir(parents=True, exist_ok=True)
    # `bentoml build` looks for uv on the PATH; it was installed beside this interpreter.
    scripts = str(Path(sys.executable).parent)
    if scripts not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join([scripts, os.environ.get("PATH", "")])
