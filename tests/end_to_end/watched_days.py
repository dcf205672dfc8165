"""Looks at a small shop's last two days, the second of them a bad one; run as `watched_days.py CHAMPION` in its place.

Tastes turn, feedback comes later and a quarter of the visits stays away. Looks are eight hours apart.
"""

import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).parents[1]))

from shop_traffic import release_since, write_traffic

from components.environments.storefront import Config
from components.interactions.log import InteractionLog
from flows.config import load_config
from flows.drift_monitoring import look_and_keep
from monitoring.traffic_watch import WatchConfig
from services.policy_store import load_model


def late(chance: np.random.Generator) -> float:
    return 15.0 + float(chance.exponential(30.0))


def main(champion: str) -> None:
    tables, now, day = Path("watched.db").resolve(), datetime.now(UTC), timedelta(days=1)
    shop = load_config(Path("loop.toml"), []).source
    assert isinstance(shop, Config)
    log, stored = InteractionLog(f"sqlite:///{tables}"), load_model(champion)
    log.upgrade()
    release_since(log, champion, now - 6 * day)
    write_traffic(log, stored, champion, now - 6 * day, now - day, config=shop)
    bad = shop.model_copy(update={"taste_shift": 0.8})
    write_traffic(log, stored, champion, now - day, now, config=bad, sessions_a_day=300, delay=late, seed=1)
    config = load_config(None, [], "log")
    for hours_ago in range(48, -1, -8):
        look_and_keep(config, tables, WatchConfig(min_users=100, baseline_days=2), now - timedelta(hours=hours_ago))


if __name__ == "__main__":
    main(sys.argv[1])
