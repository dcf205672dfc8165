"""What tests share: one torch thread, a simulated shop's log and one written by hand, and a PostgreSQL server."""

import os
import shutil
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from postgresql_server import PostgreSql
from xdist.scheduler import LoadFileScheduling

from components.environments.storefront import Config, Storefront, write_storefront_log
from components.interactions.batching import SessionReader
from components.interactions.contract import CANDIDATE_SCHEMA, Evidence, Feature, Manifest, RatioAssumption, Reward
from components.interactions.covisitation import count_covisitation
from components.interactions.log_folder import Log, open_log, write_log
from components.interactions.vocabulary import Vocabulary
from components.policies.policy_folder import PolicyDescription, StoredPolicy, load_policy, save_policy, shape_of
from components.policies.ranking_policy import RankingPolicy
from components.policies.request_features import RequestFeatures
from components.policies.session_encoder import EncoderConfig, EncoderShape, SessionEncoder

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Where `make screenshots` wants its pictures, and `make timeline` its text."""
    parser.addoption("--screenshots", metavar="FOLDER", help="keep pictures that browser tests take")
    parser.addoption("--timeline", metavar="FILE", help="keep what happened in the test of the loop that runs itself")


class ByFile(LoadFileScheduling):
    """Whole files go to one of the processes of `make test`; tests/end_to_end as one, for its server and first run."""

    def _split_scope(self, nodeid: str) -> str:
        folder = "tests/end_to_end/"
        return folder if nodeid.startswith(folder) else super()._split_scope(nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFile | None:
    return ByFile(config, log) if config.getvalue("dist") == "loadfile" else None


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


@pytest.fixture(scope="session")
def bentoml_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """BentoML's stores for this process: a folder of the tests' own, unless the process is bound to one already."""
    os.environ["BENTOML_DO_NOT_TRACK"] = "True"
    os.environ["BENTOML_HOME"] = str(tmp_path_factory.mktemp("bentoml"))
    from bentoml._internal.configuration.containers import BentoMLContainer

    return Path(BentoMLContainer.bentoml_home.get())


@pytest.fixture(scope="session")
def policy_folder(storefront_log: Log, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ranking policy over the shop's items, its weights drawn at random."""
    vocabulary = Vocabulary.fit(storefront_log)
    item_features = vocabulary.item_features(storefront_log.items())
    shape = EncoderShape(
        n_indices=vocabulary.size,
        n_item_features=item_features.shape[1],
        n_context=vocabulary.context_width,
        config=EncoderConfig(item_width=8, hidden_width=8),
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        encoder = SessionEncoder(shape)
    encoder.know_items(item_features, count_covisitation(storefront_log, vocabulary))
    features = RequestFeatures(encoder)
    batch = next(SessionReader(storefront_log, vocabulary).batches(400))
    real = batch.mask.flatten()
    with torch.no_grad():
        features.fit(encoder.states(batch).select(real), batch.requests().select(real), vocabulary.counts())
    policy = RankingPolicy(features, slate_size=4)
    policy.weights.copy_(torch.randn(features.width, generator=torch.Generator().manual_seed(5)))
    folder = tmp_path_factory.mktemp("policy")
    description = PolicyDescription(name="tiny-1", loop="shop", shape=shape_of(policy), vocabulary=vocabulary)
    save_policy(StoredPolicy(description, policy), folder)
    return folder


@pytest.fixture(scope="session")
def stored(policy_folder: Path) -> StoredPolicy:
    """The policy as read back."""
    return load_policy(policy_folder)


@pytest.fixture(scope="session")
def policy_tag(policy_folder: Path, bentoml_home: Path) -> str:
    """The policy's tag in the store."""
    from services.policy_store import save_model

    return save_model(policy_folder, name="shop-policy", lineage={"seed": 3}, decision={"verdict": "canary"})
