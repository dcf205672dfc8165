"""What tests share: one torch thread, a simulated shop's log and one written by hand, and a PostgreSQL server."""

import shutil
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from postgresql_server import PostgreSql

from components.environments.storefront import Config, Storefront, write_storefront_log
from components.interactions.contract import CANDIDATE_SCHEMA, Evidence, Feature, Manifest, RatioAssumption, Reward
from components.interactions.log_folder import Log, open_log, write_log

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def storefront_config() -> Config:
    """A shop of 60 items and 150 users whose log has 400 sessions."""
    return Config(n_users=150, n_sessions=400, n_items=60, n_candidates=12, slate_size=4)


@pytest.fixture(scope="session")
def storefront(storefront_config: Config) -> Storefront:
    return Storefront(storefront_config)


@pytest.fixture(scope="session")
def storefront_log(storefront_config: Config, tmp_path_factory: pytest.TempPathFactory) -> Log:
    """The shop's log; tests must not write into its folder."""
    return write_storefront_log(storefront_config, "shop", tmp_path_factory.mktemp("storefront") / "log")


@pytest.fixture(scope="session")
def corner_manifest() -> Manifest:
    """A corner shop that shows slates of up to 3 items and does not know how it chose them."""
    return Manifest(
        loop="corner",
        source="by-hand",
        evidence=Evidence.SLATES,
        ratio_assumption=RatioAssumption.FULL_SLATE,
        responses="per_position",
        slate_size=3,
        context=(
            Feature(name="hour", kind="numeric"),
            Feature(name="device", kind="categorical", values=("phone", "tablet")),
        ),
        item_features=(Feature(name="price", kind="numeric"), Feature(name="color", kind="categorical")),
        signals=("watch_time",),
        request_signals=("scrolled",),
        reward=Reward(weights={"clicked": 1.0, "watch_time": 0.1}),
    )


@pytest.fixture(scope="session")
def corner_rows(corner_manifest: Manifest) -> pl.DataFrame:
    """Five requests: session `s1` of three, of Ann; `s2` of one, of Bob; `s3` of one, of Ann, cut by the log's end."""
    noon = datetime(2026, 4, 1, 12, tzinfo=UTC)
    blank: dict[str, Any] = dict.fromkeys(corner_manifest.schema()) | {"loop": "corner", "policy": "by-hand-1"}

    def row(session: str, user: str, step: int, hour: int, device: str, **columns: Any) -> dict[str, Any]:
        shown_at = noon + timedelta(hours=hour, minutes=step)
        return (
            blank
            | {
                "request_id": f"{session}-{step}",
                "session_id": session,
                "user_id": user,
                "step": step,
                "timestamp": shown_at,
                "available_at": shown_at + timedelta(minutes=1),
                "context": {"hour": float(hour), "device": device},
                "request_signals": {"scrolled": 0.5},
                "events": [],
            }
            | columns
        )

    rows = [
        row(
            "s1", "ann", 0, 2, "phone",
            candidates_digest="fruit",
            slate=["apple", "cherry", "plum"],
            exposed=[True, True, False],
            clicked=[True, None, True],
            purchased=[True, False, False],
            events=[{"type": "view", "item_id": "plum"}, {"type": "search", "item_id": None}],
            **{"signals.watch_time": [20.0, None, 0.0]},
        ),
        row(
            "s1", "ann", 1, 2, "tablet",
            candidates=["cherry", "lemon", "dragonfruit"],
            slate=["dragonfruit", "cherry"],
            clicked=[False, True],
            **{"signals.watch_time": [0.0, 5.0]},
        ),
        row(
            "s1", "ann", 2, 2, "watch",
            candidates_digest="fruit",
            slate=["apple"],
            clicked=[True],
            session_end="left",
            events=[{"type": "view", "item_id": "lemon"}, {"type": "view", "item_id": "apple"}],
            **{"signals.watch_time": None},
        ),
        row("s2", "bob", 0, 0, "phone", slate=["plum"], clicked=[False], session_end="censored"),
        row("s3", "ann", 0, 4, "phone", candidates=["apple"], slate=["apple"]),
    ]  # fmt: skip
    return pl.DataFrame(rows, schema=corner_manifest.schema())


@pytest.fixture(scope="session")
def corner_items() -> pl.DataFrame:
    """Four items; `dragonfruit`, which is shown once, is not among them."""
    return pl.DataFrame(
        {
            "item_id": ["plum", "apple", "lemon", "cherry"],
            "price": [4.0, 1.0, None, 3.0],
            "color": ["blue", "red", "yellow", "red"],
        }
    )


@pytest.fixture(scope="session")
def corner_candidates() -> pl.DataFrame:
    return pl.DataFrame(
        {"candidates_digest": ["fruit"], "candidates": [["apple", "cherry", "plum", "lemon"]]}, CANDIDATE_SCHEMA
    )


@pytest.fixture
def write_corner(
    tmp_path: Path, corner_manifest: Manifest, corner_items: pl.DataFrame, corner_candidates: pl.DataFrame
) -> Callable[..., Log]:
    """Write parts of the corner shop's rows as a log, and open it."""

    def write(*parts: pl.DataFrame, name: str = "corner") -> Log:
        write_log(tmp_path / name, corner_manifest, parts, corner_items, corner_candidates)
        return open_log(tmp_path / name)

    return write


@pytest.fixture
def corner_log(write_corner: Callable[..., Log], corner_rows: pl.DataFrame) -> Log:
    return write_corner(corner_rows)


@pytest.fixture(scope="session")
def postgresql(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgreSql]:
    """A PostgreSQL server."""
    if missing := [name for name in ("initdb", "pg_ctl", "psql") if shutil.which(name) is None]:
        pytest.skip(f"PostgreSQL is not installed: no {missing[0]} on the PATH")
    server = PostgreSql(tmp_path_factory.mktemp("postgresql"))
    yield server
    server.stop("immediate")
