"""The command line in processes and folders of the tests' own, and a loop that takes seconds."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

#: The stages in the order in which they run.
STAGES = (
    "import-data",
    "data-version",
    "validate",
    "split",
    "user-model",
    "behavior",
    "world-model",
    "policy",
    "baseline",
    "estimates",
    "probes",
    "ab-test",
    "gate",
    "package",
    "drift-reference",
)

#: Budgets of whatever takes longest, so small that it takes seconds.
FEW_SESSIONS = """
[encoder]
item_width = 8
hidden_width = 16
[behavior]
epochs = 1
[trust]
sessions = 100
[reinforce]
iterations = 2
sessions = 50
[ab]
sessions = 400
"""
#: A shop and budgets so small that the loop takes seconds; what it learns is worth nothing.
LEARN_LITTLE = f"""
{FEW_SESSIONS}
[adversarial]
sessions = 100
discriminator_epochs = 1
user_steps = 1
step_sessions = 50
completions = 1
[user_model]
max_epochs = 1
[cem]
iterations = 1
population = 4
elite = 2
sessions = 50
"""
SMALL_SHOP = """
[source]
name = "storefront"
n_sessions = 800
n_users = 300
n_items = 80
n_candidates = 20
"""
FOREIGN = ("PREFECT_", "BENTOML_", "SLATELOOP_", "DVC_")


@dataclass(frozen=True)
class Place:
    """A working folder with a home, a store and runs of its own."""

    root: Path
    api: str | None = None
    """The Prefect server to use; without one each run starts its own."""
    environment: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        self.root.mkdir(exist_ok=True)
        kept = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
        own = {f"SLATELOOP_{name.upper()}": str(self.root / name) for name in ("home", "runs", "data")}
        server = {} if self.api is None else {"PREFECT_API_URL": self.api}
        object.__setattr__(self, "environment", kept | own | server)

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Start the command line as the head of a process group."""
        return subprocess.Popen(
            [sys.executable, "-m", "flows.command_line", *arguments],
            cwd=self.root,
            env=self.environment | {"PYTHONPATH": str(Path(__file__).parents[2])},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def call(self, *arguments: str, timeout: float = 300) -> "Answer":
        """Run the command line to its end."""
        process = self.start(*arguments)
        try:
            output, errors = process.communicate(timeout=timeout)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        return Answer(process.returncode, output, errors)

    def write(self, name: str, text: str) -> str:
        """Write a file; returns its path."""
        (self.root / name).write_text(text)
        return str(self.root / name)

    def half_written(self) -> list[Path]:
        """Everything that is temporary by its name."""
        folders = [self.root / name for name in ("home/stages", "runs", "data")]
        return [path for folder in folders for pattern in (".*.tmp", ".*.old") for path in folder.rglob(pattern)]


@dataclass(frozen=True)
class Answer:
    """What a process left."""

    code: int
    output: str
    errors: str

    @property
    def document(self) -> dict[str, Any]:
        """The one JSON document on stdout."""
        assert self.code == 0, self.errors
        document: dict[str, Any] = json.loads(self.output)
        return document

    def stages(self, word: str) -> list[str]:
        """Stages that stderr names with a word such as `reused`."""
        lines = [line.split() for line in self.errors.splitlines()]
        return [line[0] for line in lines if line[1:2] == [word]]


#: Tells of drift of the loop `tiny`, as often as its argument says.
TELL_OF_DRIFT = """
import sys
from flows.events import LoopEvent, emit
for number in range(int(sys.argv[1])):
    emit(LoopEvent.DRIFTED, "tiny", f"psi of the slates' entropy is 0.{number + 10}", {"psi": 0.1})
"""
#: Deploys `loop.toml` with waits that a test can sit out.
DEPLOY_HURRIED = """
from datetime import timedelta
from pathlib import Path
from flows.deploying import deploy
deploy(Path("loop.toml"), [], silence=timedelta(seconds=75), too_late=timedelta(seconds=20))
"""


def python(place: Place, code: str, *arguments: str) -> None:
    """Run some code with the place's environment."""
    environment = place.environment | {"PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", code, *arguments], cwd=place.root, env=environment, check=True)


@contextmanager
def worker(place: Place) -> Iterator[subprocess.Popen[str]]:
    """A worker with the place's folders; it and all that it started are gone afterwards."""
    process = place.start("worker")
    try:
        yield process
    finally:
        kill(process)


def kill(process: subprocess.Popen[str]) -> None:
    """Kill a process and all that it started, as a machine that fails does."""
    if process.poll() is None:
        for one in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
            one.send_signal(signal.SIGKILL)
    process.communicate()


def lineages(place: Place) -> list[dict[str, Any]]:
    """Lineages of the place's runs, oldest first."""
    return [json.loads(file.read_text()) for file in sorted((place.root / "runs").glob("*/lineage.json"))]
