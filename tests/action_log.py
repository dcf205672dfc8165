"""A small log of actions written by hand: two numbers an action, sessions of two requests."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl

from components.interactions.contract import Evidence, Feature, Manifest, RatioAssumption, Reward
from components.interactions.log_folder import Log, open_log, write_log

Row = dict[str, Any]
START = datetime(2026, 1, 1, tzinfo=UTC)
MANIFEST = Manifest(
    loop="shop",
    source="by-hand",
    evidence=Evidence.PROPENSITIES,
    ratio_assumption=RatioAssumption.FULL_SLATE,
    responses="per_position",
    slate_size=0,
    action_size=2,
    context=(
        Feature(name="device", kind="categorical", values=("phone", "desk")),
        Feature(name="hour", kind="numeric"),
    ),
    request_signals=("clicks", "seconds"),
    reward=Reward(name="clicks-and-time", weights={"request.clicks": 1.0, "request.seconds": 0.5}),
)


def row(session: int, step: int, **changes: Any) -> Row:
    """The request `sSESSION-STEP`; two sessions share a user."""
    return {
        "loop": "shop",
        "request_id": f"s{session}-{step}",
        "session_id": f"s{session}",
        "user_id": f"u{session // 2}",
        "step": step,
        "timestamp": START + timedelta(hours=session, minutes=step),
        "action": [0.25, -1.0],
        "action_log_prob": -0.5,
        "request_signals": {"clicks": 2.0, "seconds": 4.0},
        "session_end": "left" if step == 1 else None,
        "context": {"device": "desk", "hour": 7.0},
        "policy": "v1",
    } | changes


def save(path: Path, parts: Sequence[Sequence[Row]], manifest: Manifest = MANIFEST) -> Log:
    """Write rows as a log, one list of them a part, and open it."""
    frames = [pl.DataFrame(list(rows), schema=manifest.schema()) for rows in parts]
    write_log(path, manifest, frames, pl.DataFrame(schema={"item_id": pl.String}))
    return open_log(path)
