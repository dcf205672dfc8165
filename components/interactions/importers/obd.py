"""The Open Bandit Dataset (ZOZO): single items that one of two policies showed, with the probability of each.

A row is one item at one place of a page, so a request shows a slate of one item, chosen from all arms of its campaign.
The data name neither users nor visits: each request is a session of its own, and its end is censored.

Saito, Aihara, Matsutani and Narita, "Open Bandit Dataset and Pipeline", NeurIPS 2021 (Datasets and Benchmarks),
arXiv 2008.07146.
"""

import hashlib
from datetime import datetime
from pathlib import Path
from typing import Literal

import polars as pl
from pydantic import BaseModel, ConfigDict, Field

from components.errors import InputError
from components.interactions.contract import (
    CANDIDATE_SCHEMA,
    EVENTS,
    Evidence,
    Feature,
    Manifest,
    RatioAssumption,
    Reward,
)
from components.interactions.importers._reading import (
    ROW,
    collect,
    complete,
    from_iso,
    in_batches,
    logged_by,
    plain_or_gzipped,
    refuse,
    require_columns,
    scan,
)
from components.interactions.log_folder import Log, write_log

#: Places of an item on the page, as the column `position` numbers them.
POSITIONS = {"1": "left", "2": "center", "3": "right"}
USER_FEATURES = tuple(f"user_feature_{number}" for number in range(4))
#: Hashed categories. The salt differs between the policies' files.
ITEM_CATEGORIES = tuple(f"item_feature_{number}" for number in (1, 2, 3))


class Config(BaseModel):
    """Which of the six logs is read. Neither setting has a default: they are different logs of different items."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["obd"] = "obd"
    campaign: Literal["all", "men", "women"] = Field(description="Which campaign: 'all', 'men' or 'women'.")
    policy: Literal["random", "bts"] = Field(
        description="Whose log: 'random' (uniform) or 'bts' (Bernoulli Thompson sampling)."
    )


def import_log(config: Config, path: Path, out: Path, loop: str, until: datetime | None = None) -> Log:
    """Translate `{policy}/{campaign}.csv` and `{campaign}_item_context.csv` below `path`, plain or gzipped, into a log.

    `until` leaves out what was logged later, as if the file ended there.

    Raises:
        InputError: a file is missing or damaged, or a column or value is not what the data set published.
    """
    source = _file(path / config.policy, f"{config.campaign}.csv")
    items = _read_items(_file(path / config.policy, f"{config.campaign}_item_context.csv"))
    candidates = items["item_id"].to_list()
    digest = hashlib.sha256("\n".join(candidates).encode()).hexdigest()
    rows = scan(source)
    logged = ("timestamp", "item_id", "position", "click", "propensity_score", *USER_FEATURES)
    require_columns(rows, dict.fromkeys((*logged, *_affinities(candidates)), "text"), source)
    _check(rows, candidates, source)
    rows = logged_by(rows, from_iso(pl.col("timestamp")), until, source)
    manifest = Manifest(
        loop=loop,
        source="obd",
        evidence=Evidence.PROPENSITIES,
        # A slate of one item: the cascade, the whole slate and the choice of one item or none are all the same.
        ratio_assumption=RatioAssumption.FULL_SLATE,
        responses="per_position",
        slate_size=1,
        has_users=False,
        has_purchases=False,
        context=(
            Feature(name="position", kind="categorical", values=tuple(POSITIONS.values())),
            *_user_features(rows, source),
            Feature(name="log_past_clicks", kind="numeric"),
        ),
        item_features=(
            Feature(name="item_feature_0", kind="numeric"),
            *(
                Feature(name=name, kind="categorical", values=tuple(items[name].unique(maintain_order=True)))
                for name in ITEM_CATEGORIES
            ),
        ),
        reward=Reward(weights={"clicked": 1.0}),
        limits=_limits(config, rows, len(candidates), source),
    )
    parts = (complete(part, manifest) for part in in_batches(_requests(rows, config, candidates, digest, loop), source))
    table = pl.DataFrame({"candidates_digest": [digest], "candidates": [candidates]}, CANDIDATE_SCHEMA)
    return write_log(out, manifest, parts, items, table)


def _requests(rows: pl.LazyFrame, config: Config, candidates: list[str], digest: str, loop: str) -> pl.LazyFrame:
    session_id = pl.format("{}-{}", pl.lit(config.policy), ROW)
    shown = from_iso(pl.col("timestamp"))
    past_clicks = pl.sum_horizontal(_number(name) for name in _affinities(candidates))
    return rows.select(
        loop=pl.lit(loop),
        request_id=pl.format("{}:0", session_id),
        session_id=session_id,
        user_id=session_id,
        step=pl.lit(0, dtype=pl.Int32),
        timestamp=shown,
        available_at=shown,
        candidates_digest=pl.lit(digest),
        slate=pl.concat_list("item_id"),
        slate_log_prob=_number("propensity_score").log(),
        position_log_probs=pl.concat_list(_number("propensity_score").log()),
        clicked=pl.concat_list(pl.col("click") == "1"),
        session_end=pl.lit("censored"),
        events=pl.lit([], dtype=EVENTS),
        context=pl.struct(
            pl.col("position").replace_strict(POSITIONS, return_dtype=pl.String),
            *USER_FEATURES,
            log_past_clicks=past_clicks.log1p().cast(pl.Float32),
        ),
        policy=pl.lit(config.policy),
    )


def _read_items(source: Path) -> pl.DataFrame:
    """The campaign's arms in order of their number.

    A category is named by the first arm that has it ("arm 4's"), which is the same for both policies' files although
    their hashes are salted apart.
    """
    rows = scan(source)
    require_columns(rows, dict.fromkeys(("item_id", "item_feature_0", *ITEM_CATEGORIES), "text"), source)
    number, feature = pl.col("item_id").cast(pl.Int64, strict=False), _number("item_feature_0")
    refuse(rows, number.is_null(), "item_id", "a whole number", source)
    refuse(rows, pl.col("item_id").is_duplicated(), "item_id", "an item of its own", source)
    refuse(rows, ~feature.is_finite().fill_null(False), "item_feature_0", "a finite number", source)
    for name in ITEM_CATEGORIES:
        refuse(rows, pl.col(name).is_null(), name, "a value in every row", source)
    first_arm = (pl.col("item_id").first().over(name).alias(name) for name in ITEM_CATEGORIES)
    items = collect(rows.sort(number).select("item_id", feature.cast(pl.Float32), *first_arm), source)
    if items.is_empty():
        raise InputError(f"{source}: holds no item; expected one row per arm of the campaign")
    return items


def _check(rows: pl.LazyFrame, candidates: list[str], source: Path) -> None:
    likely = _number("propensity_score").is_between(0.0, 1.0, closed="right")  # False for NaN too.
    arm = pl.col("item_id")
    checks = {
        "timestamp": (from_iso(pl.col("timestamp")).is_not_null(), "an ISO 8601 time"),
        "item_id": (arm.is_in(candidates), f"one of the {len(candidates)} items of the campaign's item context"),
        "position": (pl.col("position").is_in(list(POSITIONS)), f"one of {list(POSITIONS)}"),
        "click": (pl.col("click").is_in(["0", "1"]), "0 or 1"),
        "propensity_score": (likely, "a probability above 0 and at most 1"),
        **{
            name: ((_number(name) >= 0) & _number(name).is_finite(), "a number of past clicks")
            for name in _affinities(candidates)
        },
    }
    wrong = {column: ~right.fill_null(False) for column, (right, _) in checks.items()}
    # One pass over all of them: the published files have millions of rows.
    flags = (each.any().alias(column) for column, each in wrong.items())
    found = collect(rows.select(pl.len().alias(ROW), *flags), source)
    if not found[ROW].item():
        raise InputError(f"{source}: holds no row; expected at least one")
    for column, (_, expected) in checks.items():
        if found[column].any():
            refuse(rows, wrong[column], column, expected, source)


def _user_features(rows: pl.LazyFrame, source: Path) -> tuple[Feature, ...]:
    distinct = (pl.col(name).drop_nulls().unique().sort().implode() for name in USER_FEATURES)
    values = collect(rows.select(distinct), source)
    return tuple(Feature(name=name, kind="categorical", values=tuple(values[name][0])) for name in USER_FEATURES)


def _limits(config: Config, rows: pl.LazyFrame, n_arms: int, source: Path) -> tuple[str, ...]:
    mean_weight = collect(rows.select((1.0 / (n_arms * _number("propensity_score"))).mean()), source).item()
    limits = [
        "Sessions stand in for users: the data name none, so two requests of one person cannot be told from requests "
        "of two, and intervals take requests for independent.",
        "Every request is a session of its own and ends censored: what the user did next is unknown, so neither "
        "leaving nor the length or the reward of a session can be learned.",
        "A page has three places, which are logged apart: a click is taken to depend on the item and its place, and "
        "not on the two items beside it.",
        "Affinities belong to a user and an item, and features to a request or an item: of the past clicks only their "
        "number over all items is kept.",
        "When feedback was known was not recorded: it is taken to be the time of its request.",
        "There are no purchases, and no dwell times.",
    ]
    if config.policy == "bts":
        limits.append(
            "The logging policy learned while it ran, and its propensities are the source's estimates by simulation: "
            f"1 / (number of items · propensity), which should average 1, averages {mean_weight:.2f}."
        )
    return tuple(limits)


def _file(folder: Path, name: str) -> Path:
    if found := plain_or_gzipped(folder / name):
        return found
    raise InputError(f"{folder / name}: no such file, nor {name}.gz; expected the Open Bandit Dataset's")


def _affinities(candidates: list[str]) -> list[str]:
    return [f"user-item_affinity_{item_id}" for item_id in candidates]


def _number(column: str) -> pl.Expr:
    return pl.col(column).cast(pl.Float64, strict=False)
