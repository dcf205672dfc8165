"""trivago (RecSys Challenge 2019): hotel searches, where a clickout records the list that it was made on.

A row is a clickout. Its slate is the displayed list in display order; what the user did with items since the clickout
before it (images, info, deals, ratings, searches for an item) stands in `events`. Actions on places, filters and sort
orders name no item and are left out, as are sessions without a clickout: they recorded no list.
"""

from datetime import datetime
from pathlib import Path
from typing import Literal

import polars as pl
from pydantic import BaseModel, ConfigDict, Field

from components.errors import InputError
from components.interactions.contract import EVENTS, Evidence, Feature, Manifest, RatioAssumption, Reward
from components.interactions.importers._reading import (
    ROW,
    collect,
    complete,
    end_of_session,
    from_unix,
    in_parts,
    logged_by,
    refuse,
    require_columns,
    scan,
)
from components.interactions.log_folder import Log, write_log

CLICKOUT = "clickout item"
#: Actions whose reference is an item, and the type that they have in `events`.
ITEM_ACTIONS = {
    "interaction item image": "image",
    "interaction item info": "info",
    "interaction item deals": "deals",
    "interaction item rating": "rating",
    "search for item": "search",
}
OTHER_ACTIONS = ("search for destination", "search for poi", "filter selection", "change of sort order")

_COLUMNS = {
    "user_id": "text",
    "session_id": "text",
    "timestamp": "whole numbers",
    "step": "whole numbers",
    "action_type": "text",
    "reference": "text",
    "platform": "text",
    "device": "text",
    "current_filters": "text",
    "impressions": "text",
    "prices": "text",
}


class Config(BaseModel):
    """How trivago's sessions become a log."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["trivago"] = "trivago"
    idle_minutes: int = Field(
        default=30, ge=0, description="A session seen this shortly before the log's end is censored, not left."
    )


def import_log(config: Config, path: Path, out: Path, loop: str, until: datetime | None = None) -> Log:
    """Translate `sessions.parquet` in the folder `path` into a log in `out`.

    `until` leaves out what was logged later, as if the file ended there.

    Raises:
        InputError: the file is missing or damaged, or a column or value is not what the challenge published.
    """
    source = path / "sessions.parquet"
    rows = scan(source)
    require_columns(rows, _COLUMNS, source)
    _check(rows, source)
    rows = logged_by(rows, from_unix(pl.col("timestamp")), until, source)
    sessions = collect(
        rows.group_by("session_id", maintain_order=True).agg(
            n_rows=pl.len(),
            n_clickouts=(pl.col("action_type") == CLICKOUT).sum(),
            last_seen=pl.col("timestamp").max(),
        ),
        source,
    )
    kept = sessions.filter(pl.col("n_clickouts") > 0)
    slate_size = collect(rows.select(pl.col("impressions").str.split("|").list.len().max()), source).item()
    if kept.is_empty() or not slate_size:
        raise InputError(f"{source}: holds no {CLICKOUT!r} with impressions; expected at least one")
    manifest = Manifest(
        loop=loop,
        source="trivago",
        evidence=Evidence.SLATES,
        ratio_assumption=RatioAssumption.FULL_SLATE,
        responses="choice",
        slate_size=slate_size,
        has_purchases=False,
        context=(
            Feature(name="device", kind="categorical", values=_vocabulary(rows, "device", source)),
            Feature(name="platform", kind="categorical", values=_vocabulary(rows, "platform", source)),
            Feature(name="n_filters", kind="numeric"),
        ),
        item_features=(Feature(name="log_price", kind="numeric"),),
        reward=Reward(weights={"clicked": 1.0}),
        limits=_limits(rows, sessions, source),
    )
    log_end = sessions["last_seen"].max()
    still_going = log_end - pl.col("last_seen") < 60 * config.idle_minutes
    parts = (complete(_requests(part, loop, still_going), manifest) for part in in_parts(rows, kept, source))
    return write_log(out, manifest, parts, _items(rows, source))


def _requests(rows: pl.DataFrame, loop: str, still_going: pl.Expr) -> pl.DataFrame:
    is_clickout = pl.col("action_type") == CLICKOUT
    # Time first: where one id was given to two visits, the source counts `step` from 1 in each.
    actions = rows.sort("session_id", "timestamp", "step", ROW).with_columns(
        step=(is_clickout.cum_sum().over("session_id") - is_clickout.cast(pl.UInt32)).cast(pl.Int32),
        last_seen=pl.col("timestamp").max().over("session_id"),
    )
    events = (
        actions.filter(_is_item_action())
        .group_by("session_id", "step", maintain_order=True)
        .agg(events=pl.struct(type=pl.col("action_type").replace_strict(ITEM_ACTIONS), item_id="reference"))
    )
    clickouts = actions.filter(is_clickout).with_columns(slate=pl.col("impressions").str.split("|"))
    positions = clickouts.select(ROW, "reference", "slate").explode("slate")
    clicked = positions.group_by(ROW, maintain_order=True).agg(clicked=pl.col("slate") == pl.col("reference"))
    filters = pl.col("current_filters").str.split("|").list.len().fill_null(0)
    shown = from_unix(pl.col("timestamp"))
    return (
        clickouts.join(clicked, on=ROW, how="left")
        .join(events, on=["session_id", "step"], how="left")
        .select(
            "session_id",
            "user_id",
            "step",
            "slate",
            pl.col("events").fill_null(pl.lit([], dtype=EVENTS)),
            # A clickout on an item outside its list says nothing certain about the list: unknown, not "none".
            clicked=pl.when(pl.col("clicked").list.any()).then("clicked"),
            candidates="slate",
            loop=pl.lit(loop),
            request_id=pl.format("{}:{}", "session_id", "step"),
            timestamp=shown,
            available_at=shown,
            session_end=end_of_session(pl.col("step") == pl.col("step").max().over("session_id"), still_going),
            context=pl.struct("device", "platform", n_filters=filters.cast(pl.Float32)),
            policy=pl.lit("unknown"),
        )
    )


def _items(rows: pl.LazyFrame, source: Path) -> pl.DataFrame:
    """Every item displayed or acted on; `log_price` is ln of its mean displayed price, null where never displayed."""
    displayed = (
        rows.select(item_id=pl.col("impressions").str.split("|"), price=_prices())
        .drop_nulls()
        .explode("item_id", "price")
        .group_by("item_id")
        .agg(pl.col("price").mean())
    )
    acted_on = rows.filter(_is_item_action()).select(item_id="reference").unique()
    log_price = pl.when(pl.col("price") > 0).then(pl.col("price").log())
    items = displayed.join(acted_on, on="item_id", how="full", coalesce=True)
    return collect(items.select("item_id", log_price=log_price), source)


def _is_item_action() -> pl.Expr:
    # A handful of references read "unknown"; item ids are digits.
    return pl.col("action_type").is_in(list(ITEM_ACTIONS)) & pl.col("reference").str.contains(r"^\d+$")


def _prices() -> pl.Expr:
    return pl.col("prices").str.split("|").list.eval(pl.element().cast(pl.Float64, strict=False))


def _vocabulary(rows: pl.LazyFrame, column: str, source: Path) -> tuple[str, ...]:
    return tuple(collect(rows.select(pl.col(column).drop_nulls().unique().sort()), source).to_series())


def _check(rows: pl.LazyFrame, source: Path) -> None:
    for column in ("user_id", "session_id", "timestamp", "step"):
        refuse(rows, pl.col(column).is_null(), column, "a value in every row", source)
    known = [CLICKOUT, *ITEM_ACTIONS, *OTHER_ACTIONS]
    action = pl.col("action_type")
    refuse(rows, ~action.is_in(known) | action.is_null(), "action_type", f"one of {known}", source)
    prices, slate = _prices(), pl.col("impressions").str.split("|")
    unpriced = (prices.list.len() != slate.list.len()) | prices.list.eval(pl.element().is_null()).list.any()
    refuse(rows, unpriced, "prices", "one number per item of impressions, separated by |", source)


def _limits(rows: pl.LazyFrame, sessions: pl.DataFrame, source: Path) -> tuple[str, ...]:
    is_clickout = pl.col("action_type") == CLICKOUT
    clicked_item_shown = pl.col("impressions").str.split("|").list.contains(pl.col("reference"))
    n_outside = collect(rows.select((is_clickout & ~clicked_item_shown).sum()), source).item()
    n_silent = sessions.filter(pl.col("n_clickouts") == 0).height
    limits = [
        "Only clickouts record their list, so every request has exactly one click and the reward is constant: the "
        "value of a policy is not identified. The likelihood of the clicked position and rerank hit rates stand in its "
        "place.",
        "The probability with which a list was shown is unknown: importance weights would rest on a guess.",
        "Candidates are the displayed list (at most 25 items); what else the search had found is not recorded.",
        f"{n_silent} of {sessions.height} sessions had no clickout, recorded no list and are left out, as are actions "
        "after a session's last clickout: how often a list led to no click cannot be told.",
        "A timestamp is the moment of the clickout; when the list was displayed is not recorded.",
        "There are no purchases: what happened after the clickout, at the booking site, is not recorded.",
        "log_price averages the prices displayed over the whole log, later ones included; the currency is not stated.",
    ]
    if n_outside:
        limits.append(f"{n_outside} clickouts named an item outside their list: their feedback is unknown.")
    return tuple(limits)
