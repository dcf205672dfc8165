"""A log of the contract as the endpoint would have written it into its own tables."""

from typing import Any

from components.interactions.log import Heard, InteractionLog, Recommended
from components.interactions.log_folder import Log
from services.settings import user_hash

KEY = "a key of sixteen or more"


def write_interactions(source: Log, url: str, later: int = 0) -> None:
    """The shop's log as the endpoint would have written it, or its like so many seconds later."""
    again = f"-{later}" if later else ""
    table = dict(source.candidate_table().iter_rows())
    shown, heard = [], []
    for row in source.scan().sort("timestamp").collect().iter_rows(named=True):
        at = round(row["timestamp"].timestamp() * 1e6) + later * 1_000_000
        shown.append(
            Recommended(
                request_id=row["request_id"] + again,
                loop="shop",
                user_id=user_hash(KEY.encode(), row["user_id"]),
                session_id=None,
                shown_at=at,
                candidates=tuple(row["candidates"] or table[row["candidates_digest"]]),
                catalog=False,
                slate=tuple(row["slate"]),
                log_probs=tuple(row["position_log_probs"]),
                events=(),
                context=row["context"],
                policy="shop:1",
                arm="champion",
                experiment=1,
                question="",
            )
        )
        told: dict[str, Any] = {"clicked": tuple(row["clicked"]), "purchased": tuple(row["purchased"])}
        heard.append(Heard(row["request_id"] + again, "f", at + 1, **told))
    log = InteractionLog(url)
    log.upgrade()
    log.write([shown], heard)
    log.engine.dispose()
