"""MovieLens (GroupLens): ratings that users entered, as sequences of the films that they rated well.

A row is a rating of at least `min_rating`, and a session is a sitting: ratings of one user without a pause of
`idle_minutes`. There are no slates, so the evidence level is `clicks`.

Two layouts are recognized by the files in the folder, each plain or gzipped:

- 1M: `ratings.dat` (or `ratings.parquet`: `user_id`, `movie_id`, `rating`, `timestamp`), `users.dat`, `movies.dat`.
- 100K: `u.data`, `u.user`, `u.item`.

Harper and Konstan, "The MovieLens Datasets: History and Context", ACM TiiS 5(4), 2015.
"""

import gzip
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Literal

import polars as pl
from pydantic import BaseModel, ConfigDict, Field

from components.errors import InputError
from components.interactions.contract import TIMESTAMP, Evidence, Feature, Manifest, RatioAssumption, Reward
from components.interactions.importers._click_sequences import NO_SLATES, sequence_rows
from components.interactions.importers._reading import (
    ROW,
    collect,
    complete,
    from_unix,
    in_parts,
    logged_by,
    plain_or_gzipped,
    refuse,
    require_columns,
    scan,
)
from components.interactions.log_folder import Log, write_log

#: In the order of 100K's flags, which "unknown" precedes.
GENRES = (
    "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy", "Film-Noir",
    "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)  # fmt: skip
#: 1M's age bands, by their first year; 100K's exact ages are put into the same.
AGE_BANDS = {0: "under 18", 18: "18-24", 25: "25-34", 35: "35-44", 45: "45-49", 50: "50-55", 56: "56+"}
GENDERS = ("F", "M")


class Config(BaseModel):
    """How ratings become a log."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["movielens"] = "movielens"
    min_rating: int = Field(default=4, ge=1, le=5, description="Lower ratings are left out: 1 keeps all of them.")
    idle_minutes: int = Field(
        default=30,
        ge=1,
        description="A pause this long ends a sitting; one still going when the log ends is censored, not left.",
    )
    min_length: int = Field(default=2, ge=1, description="Sittings with fewer ratings kept are left out.")
    max_steps: int = Field(
        default=100, ge=2, description="Ratings kept of a sitting; a longer one is cut and its end marked as censored."
    )


@dataclass(frozen=True)
class _Table:
    """Rows of a file, and where they come from."""

    path: Path
    rows: pl.LazyFrame


@dataclass(frozen=True)
class _Layout:
    """A way in which GroupLens published its ratings; the readers are given the files found."""

    name: str
    ratings: tuple[str, ...]
    users: str
    movies: str
    read_ratings: Callable[[Path], pl.LazyFrame]
    read_users: Callable[[Path], pl.LazyFrame]
    read_movies: Callable[[Path], pl.LazyFrame]


def import_log(config: Config, path: Path, out: Path, loop: str, until: datetime | None = None) -> Log:
    """Translate the ratings in the folder `path` into a log in `out`.

    `until` leaves out what was logged later, as if the file ended there.

    Raises:
        InputError: no known layout lies there, one of its files is damaged or holds something unexpected, or no
            rating has a timestamp.
    """
    users, movies, ratings = _read(path)
    _check(users, movies, ratings)
    source = ratings.path
    ratings = replace(ratings, rows=logged_by(ratings.rows, pl.col("timestamp"), until, source))
    in_order = ratings.rows.drop_nulls("timestamp").sort("user_id", "timestamp", ROW)
    timed = collect(in_order.with_columns(_rating()), source)
    if timed.is_empty():
        raise InputError(f"{source}: holds no rating with a timestamp; without one there is no order")
    sittings = _sittings(timed, config)
    long_enough = sittings.filter(pl.col("items").list.len() >= config.min_length)
    attributes = collect(users.rows.select("user_id", context=pl.struct("gender", "age", "occupation")), users.path)
    occupations = collect(users.rows.select(pl.col("occupation").drop_nulls().unique().sort()), users.path)
    features = ("year", *(_feature_of(genre) for genre in GENRES))
    items = collect(movies.rows.select(*features, item_id="movie_id"), movies.path)
    manifest = Manifest(
        loop=loop,
        source="movielens",
        evidence=Evidence.CLICKS,
        ratio_assumption=RatioAssumption.FULL_SLATE,
        responses="choice",
        slate_size=0,
        has_purchases=False,
        context=(
            Feature(name="gender", kind="categorical", values=GENDERS),
            Feature(name="age", kind="categorical", values=tuple(AGE_BANDS.values())),
            Feature(name="occupation", kind="categorical", values=tuple(occupations.to_series())),
        ),
        item_features=tuple(Feature(name=name, kind="numeric") for name in features),
        reward=Reward(weights={"clicked": 1.0}),
        limits=_limits(config, ratings, timed, sittings, long_enough),
    )
    sizes = long_enough.select("session_id", n_rows=pl.col("items").list.len().clip(upper_bound=config.max_steps))
    log_end = pl.lit(timed["timestamp"].max(), dtype=TIMESTAMP)
    still_going = log_end - pl.col("last_seen") < pl.duration(minutes=config.idle_minutes)
    described = long_enough.lazy().join(attributes.lazy(), on="user_id", how="left", maintain_order="left")
    parts = (
        complete(sequence_rows(part, "rating", config.max_steps, still_going, loop), manifest)
        for part in in_parts(described, sizes, source)
    )
    return write_log(out, manifest, parts, items)


def _sittings(timed: pl.DataFrame, config: Config) -> pl.DataFrame:
    """One row a sitting, of the ratings in their order: pauses are between any two ratings, also low ones."""
    pause = pl.col("timestamp").diff().over("user_id") >= pl.duration(minutes=config.idle_minutes)
    numbered = timed.with_columns(sitting=pause.fill_null(False).cast(pl.Int32).cum_sum().over("user_id"))
    kept = pl.col("rating") >= config.min_rating
    return numbered.group_by("user_id", "sitting", maintain_order=True).agg(
        session_id=pl.format("{}-{}", pl.col("user_id").first(), pl.col("sitting").first()).first(),
        items=pl.col("movie_id").filter(kept),
        times=pl.col("timestamp").filter(kept),
        last_seen=pl.col("timestamp").max(),
    )


def _read(folder: Path) -> tuple[_Table, _Table, _Table]:
    """Users, movies and ratings of the layout that lies in a folder."""
    expected = "; or ".join(
        f"{' or '.join(each.ratings)}, {each.users} and {each.movies} ({each.name})" for each in _LAYOUTS
    )
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; expected one with {expected}, plain or gzipped")
    found = []
    for layout in _LAYOUTS:
        users, movies = plain_or_gzipped(folder / layout.users), plain_or_gzipped(folder / layout.movies)
        ratings = next((file for name in layout.ratings if (file := plain_or_gzipped(folder / name))), None)
        if users and movies and ratings:
            found.append((layout, users, movies, ratings))
    if len(found) != 1:
        seen = sorted(entry.name for entry in folder.iterdir())[:20]
        raise InputError(f"{folder}: holds {seen}; expected exactly one of {expected}, plain or gzipped")
    layout, users, movies, ratings = found[0]
    return (
        _Table(users, layout.read_users(users)),
        _Table(movies, layout.read_movies(movies)),
        _Table(ratings, layout.read_ratings(ratings)),
    )


def _rating() -> pl.Expr:
    return pl.col("rating").cast(pl.Int32, strict=False)


def _lines(source: Path, separator: str, *fields: str) -> pl.LazyFrame:
    """The fields of every line as text, latin-1 as published; empty ones are null."""
    try:
        content = gzip.decompress(source.read_bytes()) if source.suffix == ".gz" else source.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{source}: cannot be read: {error}; expected a whole text file") from None
    lines = pl.Series("line", content.decode("latin-1").split("\n"), dtype=pl.String).str.strip_chars_end("\r")
    rows = pl.LazyFrame(lines).with_row_index(ROW, offset=1).filter(pl.col("line") != "")
    parts = pl.col("line").str.split(separator)
    refuse(rows, parts.list.len() != len(fields), "line", f"{separator.join(fields)} ({len(fields)} fields)", source)
    return rows.select(
        ROW, *(parts.list.get(number).replace("", None).alias(name) for number, name in enumerate(fields))
    )


def _read_ratings(separator: str) -> Callable[[Path], pl.LazyFrame]:
    def read(source: Path) -> pl.LazyFrame:
        rows = _lines(source, separator, "user_id", "movie_id", "rating", "timestamp")
        seconds = pl.col("timestamp").cast(pl.Int64, strict=False)
        refuse(rows, seconds.is_null(), "timestamp", "Unix seconds", source)
        return rows.with_columns(timestamp=from_unix(seconds))

    return read


def _read_1m_ratings(source: Path) -> pl.LazyFrame:
    if source.suffix != ".parquet":
        return _read_ratings("::")(source)
    rows = scan(source)
    require_columns(rows, dict.fromkeys(("user_id", "movie_id", "rating", "timestamp"), "whole numbers"), source)
    ids = pl.col("user_id", "movie_id").cast(pl.String)
    # The column of seconds may be too narrow for microseconds.
    timestamp = from_unix(pl.col("timestamp").cast(pl.Int64))
    return rows.select(ROW, ids, "rating", timestamp=timestamp)


def _read_1m_users(source: Path) -> pl.LazyFrame:
    return _users(_lines(source, "::", "user_id", "gender", "age", "occupation", "zip"), source)


def _read_100k_users(source: Path) -> pl.LazyFrame:
    return _users(_lines(source, "|", "user_id", "age", "gender", "occupation", "zip"), source)


def _users(rows: pl.LazyFrame, source: Path) -> pl.LazyFrame:
    age = pl.col("age").cast(pl.Int32, strict=False)
    refuse(rows, ~(age >= 0).fill_null(False), "age", "a whole number of years", source)
    band = pl.lit(None, dtype=pl.String)
    for first_year, name in AGE_BANDS.items():
        band = pl.when(age >= first_year).then(pl.lit(name)).otherwise(band)
    return rows.with_columns(age=band)


def _read_1m_movies(source: Path) -> pl.LazyFrame:
    rows = _lines(source, "::", "movie_id", "title", "genres")
    genres = pl.col("genres").str.split("|")
    unknown = ~genres.list.eval(pl.element().is_in(list(GENRES))).list.all().fill_null(False)
    refuse(rows, unknown, "genres", f"some of {list(GENRES)}, separated by '|'", source)
    return _movies(rows, (genres.list.contains(genre).alias(genre) for genre in GENRES))


def _read_100k_movies(source: Path) -> pl.LazyFrame:
    rows = _lines(source, "|", "movie_id", "title", "released", "video_released", "url", "unknown", *GENRES)
    for genre in GENRES:
        refuse(rows, ~pl.col(genre).is_in(["0", "1"]).fill_null(False), genre, "0 or 1", source)
    return _movies(rows, (pl.col(genre) == "1" for genre in GENRES))


def _movies(rows: pl.LazyFrame, has_genre: Iterable[pl.Expr]) -> pl.LazyFrame:
    """Films with the year of release, the last one in brackets in the title, and 0 or 1 for each genre."""
    year = pl.col("title").str.extract_all(r"\((\d{4})\)").list.last().str.extract(r"(\d{4})").cast(pl.Float32)
    flags = (has.cast(pl.Float32).alias(_feature_of(genre)) for genre, has in zip(GENRES, has_genre, strict=True))
    return rows.select(ROW, "movie_id", *flags, year=year)


def _feature_of(genre: str) -> str:
    return f"genre_{genre.lower().replace(chr(39), '').replace('-', '_')}"


_LAYOUTS = (
    _Layout(
        name="1M",
        ratings=("ratings.dat", "ratings.parquet"),
        users="users.dat",
        movies="movies.dat",
        read_ratings=_read_1m_ratings,
        read_users=_read_1m_users,
        read_movies=_read_1m_movies,
    ),
    _Layout(
        name="100K",
        ratings=("u.data",),
        users="u.user",
        movies="u.item",
        read_ratings=_read_ratings("\t"),
        read_users=_read_100k_users,
        read_movies=_read_100k_movies,
    ),
)


def _check(users: _Table, movies: _Table, ratings: _Table) -> None:
    for table, column in ((users, "user_id"), (movies, "movie_id")):
        own = pl.col(column).is_not_null() & ~pl.col(column).is_duplicated()
        refuse(table.rows, ~own, column, "an id of its own", table.path)
    refuse(users.rows, ~pl.col("gender").is_in(GENDERS).fill_null(False), "gender", f"one of {GENDERS}", users.path)
    refuse(ratings.rows, ~_rating().is_between(1, 5).fill_null(False), "rating", "1, 2, 3, 4 or 5", ratings.path)
    for table, column in ((users, "user_id"), (movies, "movie_id")):
        ids = collect(table.rows.select(column), table.path).to_series()
        known = pl.col(column).is_in(ids.implode()).fill_null(False)
        refuse(ratings.rows, ~known, column, f"an id of {table.path.name}", ratings.path)


def _limits(
    config: Config, ratings: _Table, timed: pl.DataFrame, sittings: pl.DataFrame, long_enough: pl.DataFrame
) -> tuple[str, ...]:
    n_all = collect(ratings.rows.select(pl.len()), ratings.path).item()
    n_low = timed.filter(pl.col("rating") < config.min_rating).height
    tied = timed.select(pl.struct("user_id", "timestamp").is_duplicated().mean()).item()
    limits = [
        NO_SLATES,
        "A rating's time is when it was entered, not when the film was watched, and users entered many at once: "
        f"{tied:.0%} of the ratings share their second with another one of their user, and their order is the file's.",
        "There are no purchases.",
        "Why a sitting ended was not recorded: its last rating counts as leaving unless the record was cut there.",
        "The source kept users with at least 20 ratings: people who rate little are missing.",
    ]
    if timed.height < n_all:
        limits.append(
            f"{n_all - timed.height} of {n_all} ratings have no timestamp and are left out, as the file is not in "
            "order of time: pauses, and what follows what, are known among the others only."
        )
    if n_low:
        limits.append(f"{n_low} of {timed.height} ratings are below {config.min_rating} and left out.")
    if n_short := sittings.height - long_enough.height:
        limits.append(
            f"{n_short} of {sittings.height} sittings had fewer than {config.min_length} ratings left and are left out."
        )
    if n_cut := long_enough.filter(pl.col("items").list.len() > config.max_steps).height:
        limits.append(f"{n_cut} sittings were cut after {config.max_steps} ratings and count as censored there.")
    return tuple(limits)
