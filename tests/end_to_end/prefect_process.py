"""A Prefect server in a process of the tests' own, which can be killed and started again."""

import os
import signal
import socket
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from prefect_server import until
from slateloop_process import FOREIGN

from flows.platform import server_part
from flows.settings import TELEMETRY_OFF


@dataclass
class ServerProcess:
    """A Prefect server that keeps its state in a folder, or in a database of its own, and its address over restarts."""

    home: Path
    database: str = ""
    """URL of the database; empty for SQLite in the folder."""
    pages: bool = False
    """Whether browsers are served."""
    port: int = field(init=False)
    _process: "subprocess.Popen[bytes] | None" = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.home.mkdir(exist_ok=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]

    @property
    def api(self) -> str:
        """Address of the API."""
        return f"http://127.0.0.1:{self.port}/api"

    def start(self) -> None:
        """Start the server and wait until it answers."""
        part = server_part(self.port)
        kept = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
        own = {"PREFECT_HOME": str(self.home), "PREFECT_LOGGING_LEVEL": "WARNING", **part.variables}
        if self.database:
            own["PREFECT_SERVER_DATABASE_CONNECTION_URL"] = self.database
        with (self.home / "server.txt").open("ab") as output:
            self._process = subprocess.Popen(
                [*part.command, *([] if self.pages else ["--no-ui"])],
                cwd=self.home,
                env=kept | TELEMETRY_OFF | own,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        until(self._answers, 240, self.said)

    def _answers(self) -> bool:
        assert self._process is not None and self._process.poll() is None, self.said()
        try:
            return httpx.get(f"{self.api}/health", timeout=2).status_code == 200
        except httpx.TransportError:
            return False

    def said(self) -> str:
        """The end of its output."""
        return (self.home / "server.txt").read_text(errors="replace")[-2_000:]

    def kill(self) -> None:
        """End it as a machine that fails does."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def stop(self) -> None:
        """Ask it to end; kills it where it does not."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.kill()
