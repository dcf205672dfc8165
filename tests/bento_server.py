"""A Bento served by a process of its own, and the library's answer to the question that was put to it."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from components.interactions.log import InteractionLog
from components.policies import plackett_luce
from components.policies.live_policy import LivePolicy, LiveSession
from components.policies.policy_folder import StoredPolicy
from services.releases import Releases


def asked_again(stored: StoredPolicy, body: dict[str, Any], slate: list[str]) -> float:
    """The log_prob of a slate as the library computes it."""
    session = LiveSession(**{name: body[name] for name in LiveSession.model_fields if name in body})
    live = LivePolicy(stored)
    places = torch.tensor([[live.candidates(session).index(item_id) for item_id in slate]])
    return float(plackett_luce.log_prob(live.logits([session]), places).double().sum())


def release(database: str, policy: str, loop: str = "shop") -> None:
    """Make a policy the loop's first champion."""
    log = InteractionLog(database)
    log.upgrade()
    Releases(log).start(loop, policy, "the first one")
    log.engine.dispose()


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def served(bento: str, bentoml_home: Path, folder: Path, variables: Mapping[str, str] | None = None) -> Iterator[str]:
    """Serve a Bento of a store; yields its address, and ends the server."""
    port = free_port()
    output = (folder / "server.txt").open("w+")
    server = subprocess.Popen(
        [sys.executable, "-m", "bentoml", "serve", bento, "--host", "127.0.0.1", "--port", str(port)],
        cwd=folder,
        env=os.environ
        | {"BENTOML_HOME": str(bentoml_home), "BENTOML_DO_NOT_TRACK": "True", "SLATELOOP_OPEN": "true"}
        | dict(variables or {}),
        stdout=output,
        stderr=subprocess.STDOUT,
    )
    try:
        deadline = time.monotonic() + 120
        while not _is_ready(f"http://127.0.0.1:{port}"):
            if server.poll() is not None or time.monotonic() > deadline:
                output.seek(0)
                pytest.fail(f"the server did not come up: {output.read()[-2000:]}")
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        try:
            server.wait(timeout=20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
        output.close()


def _is_ready(address: str) -> bool:
    try:
        return httpx.get(f"{address}/readyz", timeout=2).status_code == 200
    except httpx.TransportError:
        return False
