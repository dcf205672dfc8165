"""A shop whose endpoint is visited by simulated shoppers, and learns from what it logs."""

import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
from slateloop_process import FEW_SESSIONS, Place

from components.environments import storefront
from components.interactions.log_folder import Log
from components.policies.policy_folder import StoredPolicy, load_policy

#: Day one: a CEM that has hardly been tuned, so it explores, on a small log of the old system.
DAY_ONE = f"""
{FEW_SESSIONS}
[adversarial]
sessions = 100
[source]
name = "storefront"
n_sessions = 4000
n_users = 4000
n_items = 60
[user_model]
max_epochs = 8
[cem]
start = 2
initial_deviation = 0.2
iterations = 1
population = 8
elite = 4
sessions = 50
"""
#: Every other day: the loop as it is, on what the endpoint logged; shoppers answer within seconds.
LATER = """
[source]
name = "log"
attribution_minutes = 0.2
ratio_assumption = "cascade"
items = "items.parquet"
[ab]
sessions = 10000
"""
#: Seconds for which feedback counts.
WINDOW = 12.0


@dataclass
class Shop:
    """A place with a running endpoint, and shoppers who visit it."""

    place: Place
    address: str
    token: str
    operator: str
    n_users: int = 4_000
    n_visits: int = 0

    def call(self, *arguments: str) -> Any:
        return self.place.call(*arguments, "--json", timeout=1_500).document

    def visit(self, n_visits: int, *settings: str) -> dict[str, Any]:
        """All users come so often; returns what they earned, once all their feedback counts."""
        self.n_visits += 1
        changed = [part for setting in settings for part in ("--set", setting)]
        summary: dict[str, Any] = self.call(
            "simulate", "--config", "day-one.toml", "--users", str(self.n_users), "--sessions", str(n_visits),
            "--seed", str(self.n_visits), "--url", self.address, "--token", self.token, *changed,
        )  # fmt: skip
        assert summary["not_logged"] == 0
        time.sleep(WINDOW)
        return summary

    def learn(self, since: datetime | None = None) -> dict[str, Any]:
        """The loop on everything that is known by now, or on what was shown after a moment."""
        now = datetime.now(UTC)
        settings = ["--set", f"as_of={now.isoformat()}"]
        if since is not None:
            settings += ["--set", f"source.history_days={(now - since) / timedelta(days=1)}"]
        document: dict[str, Any] = self.call("run", "--config", "later.toml", *settings)
        return document

    def release(self, *arguments: str) -> dict[str, Any]:
        """Change who serves, and wait until the worker does."""
        release: dict[str, Any] = self.call("release", *arguments)
        deadline = time.monotonic() + 5
        headers = {"Authorization": f"Bearer {self.operator}"}
        while httpx.get(f"{self.address}/release", headers=headers, timeout=20).json()["releases"] != [release]:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return release

    def log_between(self, since: datetime, until: datetime, out: Path) -> Log:
        """The part of the log that was shown between two moments."""
        from components.interactions.importers.interaction_log import Config, import_database

        config = Config(attribution_minutes=WINDOW / 60, items=self.place.root / "items.parquet")
        url = f"sqlite:///{self.place.root / 'home' / 'interactions.db'}"
        return import_database(config, url, out, "shop", until=until, since=since)


def make_tokens(place: Place) -> tuple[str, str]:
    """Tokens of the shoppers and of who asks for releases."""
    shoppers, operator = (
        place.call("token", "create", name, *[part for scope in scopes for part in ("--scope", scope)]).output.strip()
        for name, scopes in (("shoppers", ("recommend", "feedback")), ("operator", ("release",)))
    )
    return shoppers, operator


def world(run: dict[str, Any]) -> storefront.Storefront:
    return storefront.Storefront(storefront.Config(**run["lineage"]["config"]["source"]))


def policy_of(run: dict[str, Any], name: str) -> StoredPolicy:
    return load_policy(Path(run["run"]["folder"]) / "policies" / name)
