"""A Prefect server, asked as its pages ask it."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx


@dataclass(frozen=True)
class Server:
    """What a Prefect server knows."""

    api: str

    def ask(self, path: str, **body: Any) -> Any:
        answer = httpx.post(f"{self.api}/{path}", json=body, timeout=30)
        answer.raise_for_status()
        return answer.json()

    def next(self, page: str) -> Any:
        """The next page of an answer."""
        answer = httpx.get(page, timeout=30)
        answer.raise_for_status()
        return answer.json()

    def runs(self, flow: str = "retraining") -> list[dict[str, Any]]:
        """A flow's runs, oldest first."""
        found = self.ask("flow_runs/filter", flows={"name": {"any_": [flow]}}, sort="START_TIME_ASC")
        return sorted(found, key=lambda run: run["created"])

    def deployment(self, name: str = "retraining/tiny") -> dict[str, Any]:
        answer = httpx.get(f"{self.api}/deployments/name/{name}", timeout=30)
        answer.raise_for_status()
        return dict(answer.json())

    def start(self, deployment: str = "retraining/tiny", **parameters: Any) -> str:
        """Ask for a run of a deployment; returns its id."""
        identity = self.deployment(deployment)["id"]
        return str(self.ask(f"deployments/{identity}/create_flow_run", parameters=parameters)["id"])

    def run(self, identity: str) -> dict[str, Any]:
        return dict(httpx.get(f"{self.api}/flow_runs/{identity}", timeout=30).json())

    def wait(self, identity: str, *names: str, seconds: float = 600) -> dict[str, Any]:
        """Wait until a run is in one of some states."""
        until(lambda: self.run(identity)["state"]["name"] in names, seconds, lambda: self.run(identity)["state"])
        return self.run(identity)

    def finished_stage(self, identity: str, stage: str) -> bool:
        """Whether a run has told of a stage's end."""
        tasks = self.ask("task_runs/filter", flow_runs={"id": {"any_": [identity]}})
        return any(task["name"].startswith(stage) and task["state"]["type"] == "COMPLETED" for task in tasks)


def until(holds: Callable[[], bool], seconds: float, seen: Callable[[], object] = lambda: "") -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, seen()
        time.sleep(1)
