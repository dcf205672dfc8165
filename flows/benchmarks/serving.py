"""What does the endpoint cost beside the policy? Against a minimal Bento service and a bare ASGI app with that policy.

All three run at once, each with one worker, and are asked in turns by one client process on the same machine: one
request after the other, then by as many clients as find its limit, then at a pace that all of them hold. The endpoint
alone asks for a token, counts, and logs what it shows, into SQLite, before it answers.
"""

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from components.environments import storefront
from flows.benchmarks import Budget, Context, Figure
from flows.benchmarks.speed import save_untrained_policy
from flows.load_test import Address, ask
from flows.settings import REPOSITORY
from services.access import Scope, TokenFile

BUDGET = Budget(full=10, quick=3)
CLIENTS = 8
#: Share of the slowest server's limit that is the pace which all hold.
HELD = 0.5
_BUILD = """
import sys
from pathlib import Path
from components.interactions.log import InteractionLog
from services.packaging import build_bento
from services.policy_store import save_model
from services.releases import Releases
from services.settings import ServiceSettings
log = InteractionLog(ServiceSettings().database)
log.upgrade()
Releases(log).start("shop", save_model(Path(sys.argv[1]), name="untrained", lineage={}, decision={}), "to be measured")
print(build_bento())
"""


def measure(context: Context) -> dict[str, Figure]:
    """Latencies, limits and stalls of the three."""
    return _figures(context.keep("serving", partial(_measured, context.quick)))


def _measured(quick: bool) -> dict[str, float]:
    n_rounds, n_alone, n_together = (2, 50, 100) if quick else (5, 200, 300)
    with TemporaryDirectory() as scratch, ExitStack() as running:
        root = Path(scratch)
        log = storefront.write_storefront_log(storefront.Config(n_sessions=2_000), "shop", root / "log")
        save_untrained_policy(log, root / "policy")
        environment = os.environ | {
            "BENTOML_HOME": str(root / "bentoml"),
            "SLATELOOP_HOME": str(root / "home"),
            "SLATELOOP_DATABASE": "",
            "SLATELOOP_TOKENS": str(root / "tokens.json"),
            "SLATELOOP_OPEN": "false",
            "SLATELOOP_PEER": str(root / "policy"),
            "PYTHONPATH": str(REPOSITORY),
        }
        built = subprocess.run(
            [sys.executable, "-c", _BUILD, str(root / "policy")], env=environment, stdout=subprocess.PIPE, text=True,
            check=True,
        )  # fmt: skip
        serve = ("bentoml", "serve")
        commands = {
            "endpoint": (*serve, built.stdout.split()[-1]),
            "minimal_bento": (*serve, "services.peers:Minimal"),
            "bare_asgi": ("uvicorn", "services.peers:bare", "--log-level", "warning", "--no-access-log"),
        }
        servers = {
            name: running.enter_context(_serving(command, environment, root)) for name, command in commands.items()
        }
        token = TokenFile(root / "tokens.json").create("benchmark", [Scope.RECOMMEND])
        question = {
            "candidates": list(log.items()["item_id"][:12]),
            "context": {"device": "phone", "segment": "family"},
            "past_requests": [{"slate": list(log.items()["item_id"][:4]), "clicked": [False, True, False, False]}] * 3,
        }
        asked = {name: question for name in servers} | {"endpoint": question | {"loop": "shop", "user_id": "user-1"}}
        ask = {name: partial(_seconds, port, json.dumps(asked[name]).encode(), token) for name, port in servers.items()}
        for one in ask.values():
            asyncio.run(one(n_clients=1, n_requests=50))  # warm
        alone: dict[str, list[np.ndarray]] = {name: [] for name in servers}
        limit: dict[str, list[float]] = {name: [] for name in servers}
        held: dict[str, list[np.ndarray]] = {name: [] for name in servers}
        for _ in range(n_rounds):
            for name, one in ask.items():
                alone[name].append(asyncio.run(one(n_clients=1, n_requests=n_alone)))
                started = time.perf_counter()
                asyncio.run(one(n_clients=CLIENTS, n_requests=n_together))
                limit[name].append(n_together / (time.perf_counter() - started))
        pace = HELD * min(float(np.median(rates)) for rates in limit.values())
        for _ in range(n_rounds):
            for name, one in ask.items():
                held[name].append(asyncio.run(one(n_clients=CLIENTS, n_requests=n_together, pace=pace)))
    measured = {"pace": pace, "n_held": float(n_rounds * n_together)}
    for name in servers:
        rounds = [1e3 * np.percentile(latencies, [50, 99]) for latencies in alone[name]]
        paced = [1e3 * np.percentile(latencies, [50, 99]) for latencies in held[name]]
        measured |= {
            f"{name}.p50": float(np.median([p50 for p50, _ in rounds])),
            f"{name}.p99": float(np.median([p99 for _, p99 in rounds])),
            f"{name}.limit": float(np.median(limit[name])),
            f"{name}.held_p50": float(np.median([p50 for p50, _ in paced])),
            f"{name}.held_p99": float(np.median([p99 for _, p99 in paced])),
            f"{name}.longest": 1e3 * float(np.concatenate(held[name]).max()),
        }
    for peer in ("minimal_bento", "bare_asgi"):
        p50s = [
            np.median(ours) / np.median(theirs) for ours, theirs in zip(alone["endpoint"], alone[peer], strict=True)
        ]
        limits = [ours / theirs for ours, theirs in zip(limit["endpoint"], limit[peer], strict=True)]
        measured |= {f"{peer}.p50_ratio": float(np.median(p50s)), f"{peer}.limit_ratio": float(np.median(limits))}
    return measured


def _figures(measured: dict[str, float]) -> dict[str, Figure]:
    figures = {}
    for peer in ("minimal_bento", "bare_asgi"):
        p50, limit = measured[f"{peer}.p50_ratio"], measured[f"{peer}.limit_ratio"]
        counts = peer == "minimal_bento"
        figures[f"p50.endpoint_over_{peer}"] = Figure(
            value=p50,
            unit="times, one client",
            target="at most 1.3" if counts else None,
            holds=p50 <= 1.3 if counts else None,
        )
        figures[f"throughput.endpoint_over_{peer}"] = Figure(
            value=limit,
            unit=f"share, {CLIENTS} clients",
            target="at least 0.8" if counts else None,
            holds=limit >= 0.8 if counts else None,
        )
    longest = measured["endpoint.longest"]
    figures["endpoint.longest_stall"] = Figure(
        value=longest,
        unit=f"ms, of {measured['n_held']:.0f} requests at {measured['pace']:.0f} a second",
        target="at most 100",
        holds=longest <= 100.0,
    )
    for name in ("endpoint", "minimal_bento", "bare_asgi"):
        figures |= {
            f"{name}.p50": Figure(value=measured[f"{name}.p50"], unit="ms, one client"),
            f"{name}.p99": Figure(value=measured[f"{name}.p99"], unit="ms, one client"),
            f"{name}.throughput": Figure(value=measured[f"{name}.limit"], unit=f"requests a second, {CLIENTS} clients"),
            f"{name}.held_p50": Figure(value=measured[f"{name}.held_p50"], unit="ms, at the pace that all hold"),
            f"{name}.held_p99": Figure(value=measured[f"{name}.held_p99"], unit="ms, at the pace that all hold"),
        }
    return figures


@contextmanager
def _serving(command: tuple[str, ...], environment: dict[str, str], root: Path) -> Iterator[int]:
    """A server in a process of its own; its port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    module, *arguments = command
    with (root / f"{port}.txt").open("w+") as output:
        server = subprocess.Popen(
            [sys.executable, "-m", module, *arguments, "--host", "127.0.0.1", "--port", str(port)],
            env=environment, stdout=output, stderr=subprocess.STDOUT, cwd=root,
        )  # fmt: skip
        try:
            deadline = time.monotonic() + 120
            while not _listens(port):
                if server.poll() is not None or time.monotonic() > deadline:
                    output.seek(0)
                    raise RuntimeError(f"{' '.join(command)}: did not start: {output.read()[-2_000:]}")
                time.sleep(0.2)
            yield port
        finally:
            server.terminate()
            server.wait(timeout=60)


def _listens(port: int) -> bool:
    (reply,) = asyncio.run(ask(Address("127.0.0.1", port), "/readyz", b"", n_clients=1, n_requests=1))
    return reply.status == 200


async def _seconds(
    port: int, body: bytes, token: str, *, n_clients: int, n_requests: int, pace: float | None = None
) -> np.ndarray:
    """Seconds of every request, as `ask` has them.

    Raises:
        RuntimeError: one was not answered.
    """
    address = Address("127.0.0.1", port)
    replies = await ask(address, "/recommend", body, n_clients=n_clients, n_requests=n_requests, pace=pace, token=token)
    if refused := [reply.status for reply in replies if reply.status != 200]:
        raise RuntimeError(
            f"{len(refused)} of {n_requests} requests were not answered: {sorted(set(map(str, refused)))}"
        )
    return np.array([reply.seconds for reply in replies])
