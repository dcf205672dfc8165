"""The whole platform on one machine: Prefect's server and a worker, the endpoint, Evidently's pages.

`Platform` starts each as a process of its own, says when one ends, and ends them all together, the worker before the
server, since a worker whose server has gone waits for it.
"""

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from uuid import uuid4

import httpx
import psutil

from components.errors import InputError, SlateloopError
from flows.settings import PlatformSettings, require_writable
from services.settings import ServiceSettings

HOST = "127.0.0.1"
POOL = "slateloop"
#: Variable by which a platform knows its processes again.
MARK = "SLATELOOP_PLATFORM_MARK"
#: Seconds that a part may take to answer; Prefect's first start migrates its database.
READY_SECONDS = 300.0
#: Seconds that a part has to end after each of two SIGTERMs; then it is killed.
GRACE_SECONDS = 15.0


class NotReadyError(SlateloopError):
    """A part of the platform ended, or did not answer in time; the command line exits with 1."""


@dataclass(frozen=True)
class Part:
    """One process of the platform."""

    name: str
    command: Sequence[str]
    port: int = 0
    """Where it listens; 0 for a step that does its work and ends."""
    health: str = ""
    """Path that answers with 200 when the part is ready."""
    page: str = ""
    """Path that a person opens; empty where there is nothing to see."""
    variables: Mapping[str, str] = field(default_factory=dict)
    """What its environment has beside the platform's."""
    children_first: bool = False
    """Whether to end what it started before itself."""

    @property
    def address(self) -> str:
        """Where a person or a client finds it."""
        return f"http://{HOST}:{self.port}{self.page}"

    def is_ready(self) -> bool:
        """Whether it answers."""
        try:
            return httpx.get(f"http://{HOST}:{self.port}{self.health}", timeout=2).status_code == 200
        except httpx.TransportError:
            return False


def whole_paths(platform: PlatformSettings) -> dict[str, str]:
    """The folders of this machine for processes that run somewhere else."""
    service = ServiceSettings()
    folders = {f"SLATELOOP_{name.upper()}": getattr(platform, name) for name in ("home", "runs", "data")}
    whole = {name: str(folder.resolve()) for name, folder in folders.items()}
    return whole | {"SLATELOOP_DATABASE": service.database, "SLATELOOP_TOKENS": str(service.tokens)}


def server_part(port: int) -> Part:
    """Prefect's server with its pages."""
    return Part(
        "prefect",
        [sys.executable, "-m", "prefect", "server", "start"],
        port,
        "/api/health",
        variables={
            # `--port` alone would leave the pages asking port 4200.
            "PREFECT_SERVER_API_HOST": HOST,
            "PREFECT_SERVER_API_PORT": str(port),
            "PREFECT_SERVER_UI_API_URL": f"http://{HOST}:{port}/api",
            # In memory, as they are by default, a restart of the server would forget them and end the runs at work.
            "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
        },
    )


def worker_command(limit: int) -> list[str]:
    """A worker of the pool.

    Args:
        limit: runs that it may be at at once.
    """
    options = ["--pool", POOL, "--type", "process", "--limit", str(limit), "--with-healthcheck"]
    return [sys.executable, "-m", "prefect", "worker", "start", *options]


def worker_part(port: int, limit: int) -> Part:
    """A worker with a page that says whether it lives."""
    return Part(
        "worker",
        worker_command(limit),
        port,
        "/health",
        "/health",
        variables={
            "PREFECT_WORKER_WEBSERVER_HOST": HOST,
            "PREFECT_WORKER_WEBSERVER_PORT": str(port),
            # A run's page in Prefect shows what the run says.
            "PREFECT_LOGGING_LEVEL": "INFO",
        },
        # A run that is asked to end while server and worker live reports that it crashed.
        children_first=True,
    )


def endpoint_part(bento: str, port: int) -> Part:
    """The endpoint, as one worker process."""
    command = [sys.executable, "-m", "bentoml", "serve", bento, "--host", HOST, "--port", str(port)]
    return Part("endpoint", command, port, "/readyz")


def evidently_part(workspace: Path, port: int) -> Part:
    """Evidently's pages of drift."""
    command = [str(Path(sys.executable).parent / "evidently"), "ui", "--workspace", str(workspace)]
    return Part("evidently", [*command, "--host", HOST, "--port", str(port)], port, "/")


def require_free_ports(parts: Iterable[Part]) -> None:
    """Refuse ports at which something listens, before anything is started.

    Raises:
        InputError: a port is taken, or two parts are to share one.
    """
    names: dict[int, str] = {}
    for part in parts:
        if other := names.get(part.port):
            raise InputError(f"--{part.name}-port {part.port}: is the port of {other} already; choose another one")
        names[part.port] = part.name
        with socket.socket() as probe:
            # As servers do: a port whose last connections linger is free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, part.port))
            except OSError as error:
                raise InputError(
                    f"--{part.name}-port {part.port}: cannot be used: {error.strerror}; choose another one"
                ) from None


class Platform:
    """Processes that were started together and end together."""

    def __init__(self, logs: Path, environment: Mapping[str, str], say: Callable[[str], None]) -> None:
        """Nothing is started yet.

        Args:
            logs: folder in which each part's output goes to NAME.log.
            environment: of all parts.
            say: tells a person what happens.

        Raises:
            InputError: the folder cannot be written.
        """
        require_writable(logs, "SLATELOOP_HOME")
        self._logs = logs
        self._environment = {**environment, MARK: uuid4().hex}
        self._say = say
        self._running: dict[str, tuple[Part, subprocess.Popen[bytes]]] = {}

    def log(self, name: str) -> Path:
        """File of a part's output."""
        return self._logs / f"{name}.log"

    def start(self, part: Part) -> None:
        """Start a part."""
        with self.log(part.name).open("wb") as output:
            process = subprocess.Popen(
                part.command,
                env={**self._environment, **part.variables},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                # Ctrl-C in the terminal reaches it through us alone, in its turn.
                start_new_session=True,
            )
        self._running[part.name] = (part, process)

    def wait_for(self, part: Part) -> None:
        """Wait until a part answers.

        Raises:
            NotReadyError: it ended, or did not answer in time.
        """
        deadline = time.monotonic() + READY_SECONDS
        _, process = self._running[part.name]
        while True:
            ready = part.is_ready()
            # Something else may have taken the port meanwhile, and answer in its place.
            if process.poll() is not None:
                raise NotReadyError(f"{part.name}: ended with code {process.returncode}; see {self.log(part.name)}")
            if ready:
                return
            if time.monotonic() > deadline:
                raise NotReadyError(
                    f"{part.name}: does not answer after {READY_SECONDS:.0f} s; see {self.log(part.name)}"
                )
            time.sleep(0.5)

    def finish(self, step: Part) -> None:
        """Wait until a part that is a mere step has done its work.

        Raises:
            NotReadyError: it failed.
        """
        _, process = self._running[step.name]
        code = process.wait()
        del self._running[step.name]
        if code != 0:
            said = self.log(step.name).read_text(errors="replace").strip().splitlines() or ["it said nothing"]
            raise NotReadyError(f"{step.name}: failed with code {code}: {said[-1]}; see {self.log(step.name)}")

    def watch(self) -> None:
        """Stay until every part has ended, and say when one does."""
        while self._running:
            for name, (_, process) in [*self._running.items()]:
                if process.poll() is not None:
                    del self._running[name]
                    self._say(f"{name} ended with code {process.returncode}; see {self.log(name)}")
            time.sleep(0.5)

    def stop(self) -> None:
        """End all parts, the last one started first, with every process that they started; nothing interrupts this."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        for part, process in reversed([*self._running.values()]):
            self._say(f"stopping {part.name}")
            _end(process.pid, children_first=part.children_first)
            process.wait()
        self._running.clear()
        for left in _marked(self._environment[MARK]):
            _send(left, signal.SIGKILL)


def _end(pid: int, *, children_first: bool) -> None:
    """Ask a process and all that it started to end, twice; then kill them."""
    try:
        head = psutil.Process(pid)
        children = head.children(recursive=True)
    except psutil.NoSuchProcess:
        return
    family = [head, *children]
    for asked in ([children] if children_first else []) + [[head], family]:
        for process in asked:
            _send(process, signal.SIGTERM)
        psutil.wait_procs(asked if asked is children else family, timeout=GRACE_SECONDS)
    for process in family:
        _send(process, signal.SIGKILL)


def _send(process: psutil.Process, number: signal.Signals) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        pass


def _marked(mark: str) -> Iterator[psutil.Process]:
    """Processes that inherited a mark in their environment, whoever is their parent by now."""
    for process in psutil.process_iter():
        try:
            # Ours inherit the mark from what is put into it, and do not have it themselves.
            if process.environ().get(MARK) == mark:
                yield process
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue


@contextmanager
def interrupted_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end us as Ctrl-C does."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
