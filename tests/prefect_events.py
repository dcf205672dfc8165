"""Events as a real Prefect server tells them, which stores them a few seconds after it was told."""

import time
from typing import Any

import httpx


def events_named(api: str, name: str, count: int = 1, seconds: float = 60) -> list[dict[str, Any]]:
    """Wait until the server at `api` tells at least `count` events of this name, or for so many seconds."""
    until = time.monotonic() + seconds
    while True:
        answer = httpx.post(f"{api}/events/filter", json={"filter": {"event": {"name": [name]}}}, timeout=30)
        found: list[dict[str, Any]] = answer.raise_for_status().json()["events"]
        if len(found) >= count or time.monotonic() > until:
            return found
        time.sleep(0.5)
