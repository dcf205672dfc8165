"""Days of a simulated shop's traffic under a stored policy, written into an interaction log as an endpoint would."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial

import numpy as np
import polars as pl
import sqlalchemy as sa
import torch

from components.environments.rollout import log_rows, rollout
from components.environments.storefront import MAX_STEPS, Config, Storefront
from components.interactions.log import RELEASES, Heard, InteractionLog, Recommended, microseconds
from components.policies.policy_folder import StoredPolicy
from services.releases import Release

#: The policy fixture's shop with many users.
MANY_USERS = Config(n_users=1_500, n_sessions=10, n_items=60, n_candidates=12, slate_size=4)


def release_since(log: InteractionLog, champion: str, since: datetime) -> None:
    """A loop's first release, made some time ago."""
    release = Release(
        loop="shop", number=1, experiment=1, released_at=microseconds(since), action="promote", reason="the first one",
        champion=champion, salt="salt",
    )  # fmt: skip
    with log.writing() as connection:
        connection.execute(sa.insert(RELEASES).values(release.model_dump()))


def write_traffic(
    log: InteractionLog, stored: StoredPolicy, champion: str, since: datetime, until: datetime, *,
    sessions_a_day: int = 400, config: Config = MANY_USERS, delay: Callable[[np.random.Generator], float] | None = None,
    seed: int = 0,
) -> None:  # fmt: skip
    """Sessions that begin evenly between two moments.

    Args:
        log: the interaction log.
        stored: who chooses the slates.
        champion: its tag.
        since: when the first session begins.
        until: when the last one begins.
        sessions_a_day: how many.
        config: of the shop.
        delay: seconds until feedback, drawn for each request; about 10 by default.
        seed: of all chance.
    """
    generator, chance = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    delay = delay or partial(np.random.Generator.exponential, scale=10.0)
    shop = Storefront(config)
    n = round(sessions_a_day * ((until - since) / timedelta(days=1)))
    users = torch.randint(config.n_users, (n,), generator=generator)
    started = [since + (until - since) * float(share) for share in np.sort(chance.random(n))]
    rows = log_rows(
        rollout(shop, stored.policy, users, generator, MAX_STEPS), manifest=shop.manifest("shop"),
        item_ids=shop.item_ids, user_ids=shop.user_ids, started=pl.Series(started, dtype=pl.Datetime("us", "UTC")),
        request_gap=timedelta(seconds=20), feedback_delay=timedelta(seconds=10), policy=champion,
    )  # fmt: skip
    calls, pieces = [], []
    for row in rows.iter_rows(named=True):
        shown_at, name = microseconds(row["timestamp"].replace(tzinfo=UTC)), f"{seed}-{row['request_id']}"
        calls.append(
            Recommended(
                name, "shop", row["user_id"], f"{seed}-{row['session_id']}", shown_at, tuple(row["candidates"]), False,
                tuple(row["slate"]), tuple(row["position_log_probs"]), (), row["context"], champion, "champion", 1, "",
            )
        )  # fmt: skip
        pieces.append(
            Heard(
                name, "f", shown_at + round(1e6 * delay(chance)), clicked=tuple(row["clicked"]),
                purchased=tuple(row["purchased"]), left=row["session_end"] == "left",
            )
        )  # fmt: skip
    for start in range(0, len(calls), 2_000):
        log.write([calls[start : start + 2_000]], pieces[start : start + 2_000])
