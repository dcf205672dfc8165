"""A small log of actions written by hand: two numbers an action, sessions of two requests."""

import math
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
import torch

from components.interactions.contract import Evidence, Feature, Manifest, RatioAssumption, Reward
from components.interactions.log_folder import Log, open_log, write_log

Row = dict[str, Any]
#: Of the logged actions of `hand_log`, and the action that earns most.
DEVIATION, BEST = 0.1, (0.4, 0.0)
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


def hand_log(
    path: Path, n_sessions: int, seed: int, *, parts: int = 1, density_error: float = 0.0, known_share: float = 1.0
) -> Log:
    """One request a session: actions N(0, 0.1²) of two numbers, clicks = 1 − |a − (0.4, 0)|² + N(0, 0.1²).

    So a Gaussian around m earns 1 − |m − (0.4, 0)|² − 0.02, and two of these are |m − m'| / 0.1 apart.
    """
    generator = torch.Generator().manual_seed(seed)
    actions = (DEVIATION * torch.randn(n_sessions, 2, generator=generator, dtype=torch.float64)).float()
    log_probs = -0.5 * (actions.double() / DEVIATION).square().sum(1) - 2 * math.log(DEVIATION * math.sqrt(2 * math.pi))
    noise = 0.1 * torch.randn(n_sessions, generator=generator)
    clicks: list[float | None] = (1.0 - (actions - torch.tensor(BEST)).square().sum(1) + noise).tolist()
    known = torch.rand(n_sessions, generator=generator) < known_share
    rows = [
        row(session, 0, action=action, action_log_prob=log_prob + density_error, session_end="left")
        | {"request_signals": {"clicks": clicks[session] if known[session] else None, "seconds": 0.0}}
        | {"user_id": f"u{session}", "context": {"device": ("phone", "desk")[session % 2], "hour": session % 24.0}}
        for session, (action, log_prob) in enumerate(zip(actions.tolist(), log_probs.tolist(), strict=True))
    ]
    manifest = MANIFEST.model_copy(update={"reward": Reward(name="clicks", weights={"request.clicks": 1.0})})
    size = -(-n_sessions // parts)
    return save(path, [rows[start : start + size] for start in range(0, n_sessions, size)], manifest)
