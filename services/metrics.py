"""What the endpoint counts, for Prometheus. Labels are routes, statuses, loops and arms: never what a client sends."""

import math
import os
from collections.abc import Sequence
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from components.evaluation.support import SUPPORT_FLOOR
from components.interactions.log import Recommended

#: Names the folder through which workers share what they count; BentoML sets it.
SHARED = "PROMETHEUS_MULTIPROC_DIR"
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
ITEMS = (1, 2, 3, 4, 5, 6, 8, 10, 15, 20, 30, 50, 100)
DELAYS = (1, 5, 15, 60, 300, 900, 3_600, 6 * 3_600, 86_400, 7 * 86_400)


class Metrics:
    """The counters of a worker."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        by_loop, by_arm = ["loop"], ["loop", "arm"]
        self._request_seconds = Histogram(
            "slateloop_request_seconds",
            "Seconds from a request to its answer.",
            ["path", "status"],
            buckets=SECONDS,
            registry=self._registry,
        )
        self._requests = Counter(
            "slateloop_recommendations",
            "Recommendations answered, those among them that an idempotency key asked for again.",
            by_arm,
            registry=self._registry,
        )
        self._slate_length = Histogram(
            "slateloop_slate_length",
            "Items of a slate that was chosen; its count is that of slates, its sum that of positions.",
            by_arm,
            buckets=ITEMS,
            registry=self._registry,
        )
        self._explored = Counter(
            "slateloop_explored_slates",
            "Slates whose first item is not the policy's most likely one.",
            by_arm,
            registry=self._registry,
        )
        self._floor = Counter(
            "slateloop_floor_positions",
            f"Positions shown with less than {SUPPORT_FLOOR:g} times the probability of a draw by chance.",
            by_arm,
            registry=self._registry,
        )
        self._feedback_delay = Histogram(
            "slateloop_feedback_delay_seconds",
            "Seconds from a slate to a piece of feedback on it.",
            by_loop,
            buckets=DELAYS,
            registry=self._registry,
        )
        self._release = Gauge(
            "slateloop_release_number",
            "Release of a loop that is served; the oldest where workers differ.",
            by_loop,
            multiprocess_mode="livemin",
            registry=self._registry,
        )
        self.rows_waiting = Gauge(
            "slateloop_log_rows_waiting",
            "Rows that wait for the interaction log.",
            multiprocess_mode="livesum",
            registry=self._registry,
        )
        _forget_the_dead()

    def answered(self, path: str, status: int, seconds: float) -> None:
        """Count a request."""
        self._request_seconds.labels(path, status).observe(seconds)

    def recommended(self, chosen: Sequence[tuple[Recommended, bool]], standing: Sequence[Recommended]) -> None:
        """Count slates.

        Args:
            chosen: that were chosen for a call, and whether each explores.
            standing: what the call is answered: the same, or what an earlier request was.
        """
        for (row, explores), answer in zip(chosen, standing, strict=True):
            self._requests.labels(answer.loop, answer.arm).inc()
            if answer is not row:
                continue
            arm = row.loop, row.arm
            self._slate_length.labels(*arm).observe(len(row.slate))
            if explores:
                self._explored.labels(*arm).inc()
            if n_below := below_floor(row.log_probs, len(row.candidates)):
                self._floor.labels(*arm).inc(n_below)

    def released(self, loop: str, number: int) -> None:
        """Say which release is served from now on."""
        self._release.labels(loop).set(number)

    def heard(self, loop: str, seconds: float) -> None:
        """Count a piece of feedback."""
        self._feedback_delay.labels(loop).observe(seconds)

    def render(self) -> bytes:
        """All workers' counters as Prometheus reads them."""
        registry = self._registry
        if SHARED in os.environ:
            registry = CollectorRegistry()
            MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return generate_latest(registry)


def below_floor(log_probs: Sequence[float], n_candidates: int) -> int:
    """Positions shown with less than φ times the probability that chance gives each candidate left there.

    φ is the floor below which off-policy estimates call an item unsupported (`evaluation/support.py`).
    """
    return sum(
        log_prob < math.log(SUPPORT_FLOOR / (n_candidates - position)) for position, log_prob in enumerate(log_probs)
    )


def _forget_the_dead() -> None:
    """Leave out the gauges of workers that were killed: nothing else takes them out of the shared folder."""
    folder = os.environ.get(SHARED)
    if folder is None:
        return
    for file in Path(folder).glob("gauge_live*_*.db"):
        pid = int(file.stem.rpartition("_")[2])
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            mark_process_dead(pid, folder)  # type: ignore[no-untyped-call]
        except PermissionError:
            pass
