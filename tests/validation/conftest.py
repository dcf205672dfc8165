"""A small valid log with known propensities, and a way to write variants of it."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from components.interactions.contract import CANDIDATE_SCHEMA, Evidence, Feature, Manifest, RatioAssumption
from components.interactions.log_folder import Log, open_log, write_log

Row = dict[str, Any]

N_SESSIONS, N_STEPS, SLATE_SIZE, N_CANDIDATES = 60, 3, 3, 8
ITEMS = [f"item-{number:02d}" for number in range(20)]
START = datetime(2024, 5, 1, tzinfo=UTC)
LISTS = {f"list-{number}": ITEMS[number : number + N_CANDIDATES] for number in range(4)}


@pytest.fixture
def manifest() -> Manifest:
    return Manifest(
        loop="shop",
        source="test",
        evidence=Evidence.PROPENSITIES,
        ratio_assumption=RatioAssumption.FULL_SLATE,
        responses="per_position",
        slate_size=SLATE_SIZE,
        context=(Feature(name="hour", kind="numeric"), Feature(name="device", kind="categorical")),
        signals=("watch_time",),
        request_signals=("seconds",),
    )


@pytest.fixture
def rows(manifest: Manifest) -> list[Row]:
    """60 sessions of 3 requests, named `s07-1` and so on; odd sessions name their candidates by digest."""
    generator = np.random.default_rng(5)
    return [_row(generator, session, step) for session in range(N_SESSIONS) for step in range(N_STEPS)]


def _row(generator: np.random.Generator, session: int, step: int) -> Row:
    digest = f"list-{session % len(LISTS)}" if session % 2 else None
    candidates = LISTS[digest] if digest else [str(item) for item in generator.choice(ITEMS, N_CANDIDATES, False)]
    weights = generator.uniform(1.0, 3.0, N_CANDIDATES)
    order = generator.choice(N_CANDIDATES, SLATE_SIZE, replace=False, p=weights / weights.sum())
    taken = np.concatenate([[0.0], np.cumsum(weights[order])[:-1]])
    clicked = generator.random(SLATE_SIZE) < 0.4
    shown_at = START + timedelta(hours=session, minutes=step)
    return {
        "loop": "shop",
        "request_id": f"s{session:02d}-{step}",
        "session_id": f"s{session:02d}",
        "user_id": f"u{session // 2:02d}",
        "step": step,
        "timestamp": shown_at,
        "available_at": shown_at + timedelta(seconds=30),
        "candidates": None if digest else candidates,
        "candidates_digest": digest,
        "slate": [candidates[index] for index in order],
        "action": None,
        "slate_log_prob": float(np.log(weights[order] / (weights.sum() - taken)).sum()),
        "action_log_prob": None,
        "exposed": None,
        "clicked": clicked.tolist(),
        "purchased": (clicked & (generator.random(SLATE_SIZE) < 0.3)).tolist(),
        "signals.watch_time": (clicked * 12.5).tolist(),
        "request_signals": {"seconds": 20.0},
        "session_end": "left" if step == N_STEPS - 1 else None,
        "events": [{"type": "view", "item_id": ITEMS[session % 20]}, {"type": "search", "item_id": None}],
        "context": {"hour": float(session % 24), "device": "phone"},
        "policy": "logging-1",
        "arm": None,
        "experiment": None,
    }


@pytest.fixture
def save(tmp_path: Path, manifest: Manifest) -> Callable[..., Log]:
    """Write rows as a log in two parts, and open it."""

    def write(rows: list[Row], manifest: Manifest = manifest, items: list[str] = ITEMS) -> Log:
        frame = pl.DataFrame(rows, schema=manifest.schema())
        late = pl.col("session_id") >= "s30"
        write_log(
            tmp_path / "source",
            manifest,
            (part for part in (frame.filter(~late.fill_null(False)), frame.filter(late)) if part.height),
            pl.DataFrame({"item_id": items}),
            pl.DataFrame({"candidates_digest": list(LISTS), "candidates": list(LISTS.values())}, CANDIDATE_SCHEMA),
        )
        return open_log(tmp_path / "source")

    return write
