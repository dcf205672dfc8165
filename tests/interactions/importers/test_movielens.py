import gzip
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from components.errors import InputError
from components.interactions.contract import Evidence
from components.interactions.importers import movielens
from components.interactions.log_folder import Log, open_log

DATA = Path(__file__).parents[3] / "../shared/data"
NOON = 978_350_400  # 2001-01-01 12:00:00 UTC
HOUR = 3_600
USERS_1M = "1::F::1::10::48067\n2::M::56::16::70072\n3::M::25::15::55117\n"
MOVIES_1M = (
    "10::Caf\xe9 (1995)::Animation|Children's\n20::20,000 Leagues (1954) (V)::Sci-Fi\n30::Untitled::Film-Noir|War\n"
)
#: User, film, rating, seconds after noon; not in order of time.
RATINGS = (
    (1, 20, 5, 60),
    (1, 10, 4, 0),
    (1, 30, 2, 120),
    (1, 30, 4, 60),
    (2, 10, 5, 0),
    (2, 20, 3, 1_200),
    (2, 30, 5, 2_400),
    (2, 10, 4, 3 * HOUR),
    (2, 20, 4, 3 * HOUR + 1),
    (3, 20, 5, 0),
)


def ml_1m(folder: Path, **files: str) -> Path:
    folder.mkdir()
    lines = "".join(f"{user}::{film}::{rating}::{NOON + at}\n" for user, film, rating, at in RATINGS)
    for name, text in ({"ratings": lines, "users": USERS_1M, "movies": MOVIES_1M} | files).items():
        (folder / f"{name}.dat").write_bytes(text.encode("latin-1"))
    return folder


def ml_100k(folder: Path, **files: str) -> Path:
    folder.mkdir()
    flags = {10: (3, 4), 20: (15,), 30: (10, 17)}  # Places among 19, the first of which is "unknown".
    titles = {10: "Caf\xe9 (1995)", 20: "20,000 Leagues (1954) (V)", 30: "Untitled"}
    items = "".join(
        f"{film}|{titles[film]}|01-Jan-1995||http://x|{'|'.join('1' if n in ones else '0' for n in range(19))}\n"
        for film, ones in flags.items()
    )
    ratings = "".join(f"{user}\t{film}\t{rating}\t{NOON + at}\n" for user, film, rating, at in RATINGS)
    users = "1|17|F|10|48067\n2|73|M|16|70072\n3|34|M|15|V1G4L\n"
    for name, text in ({"data": ratings, "user": users, "item": items} | files).items():
        (folder / f"u.{name}").write_bytes(text.encode("latin-1"))
    return folder


def imported(path: Path, out: Path, **config: int) -> Log:
    return open_log(movielens.import_log(movielens.Config(**config), path, out, "films").path)


def rows(log: Log, *columns: str) -> list[tuple[Any, ...]]:
    return log.scan().select(columns).collect().rows()


def rated(log: Log) -> list[tuple[str, str, str | None]]:
    return [
        (request, events[0]["item_id"], end)
        for request, events, end in rows(log, "request_id", "events", "session_end")
    ]


@pytest.fixture
def log(tmp_path: Path) -> Log:
    return imported(ml_1m(tmp_path / "source"), tmp_path / "log")


def test_good_ratings_of_a_sitting_become_rows_in_order_of_time_and_then_of_the_file(log: Log) -> None:
    # A low rating keeps user 2's first sitting together; the last sitting is still going when the log ends.
    assert rated(log) == [
        ("1-0:0", "10", None),
        ("1-0:1", "20", None),
        ("1-0:2", "30", "left"),
        ("2-0:0", "10", None),
        ("2-0:1", "30", "left"),
        ("2-1:0", "10", None),
        ("2-1:1", "20", "censored"),
    ]
    noon = datetime(2001, 1, 1, 12, tzinfo=UTC)
    assert rows(log, "session_id", "user_id", "step", "timestamp", "available_at", "policy")[1] == (
        "1-0", "1", 1, noon + timedelta(minutes=1), noon + timedelta(minutes=1), "unknown",
    )  # fmt: skip
    assert rows(log, "events")[0] == ([{"type": "rating", "item_id": "10"}],)


def test_what_a_rating_must_be_and_what_a_pause_is_can_be_set(tmp_path: Path) -> None:
    path = ml_1m(tmp_path / "source")
    all_ratings = imported(path, tmp_path / "all", min_rating=1, min_length=1)
    assert all_ratings.manifest.n_requests == len(RATINGS)
    assert not any("are below" in sentence for sentence in all_ratings.manifest.limits)
    assert rated(all_ratings)[-1] == ("3-0:0", "20", "left")
    short = imported(path, tmp_path / "short", idle_minutes=20, min_length=1)
    assert [request for request, _, _ in rated(short)] == [
        "1-0:0", "1-0:1", "1-0:2", "2-0:0", "2-2:0", "2-3:0", "2-3:1", "3-0:0",
    ]  # fmt: skip


def test_a_long_sitting_is_cut_and_censored_and_what_is_left_out_is_counted(tmp_path: Path) -> None:
    log = imported(ml_1m(tmp_path / "source"), tmp_path / "log", max_steps=2)
    assert rated(log)[:2] == [("1-0:0", "10", None), ("1-0:1", "20", "censored")]
    for sentence in (
        "2 of 10 ratings are below 4 and left out.",
        "1 of 4 sittings had fewer than 2 ratings left and are left out.",
        "1 sittings were cut after 2 ratings and count as censored there.",
    ):
        assert sentence in log.manifest.limits
    assert any("20% of the ratings share their second" in sentence for sentence in log.manifest.limits)


def test_the_user_is_the_context_with_ages_in_bands(log: Log) -> None:
    contexts = dict(rows(log, "user_id", "context"))
    assert contexts == {
        "1": {"gender": "F", "age": "under 18", "occupation": "10"},
        "2": {"gender": "M", "age": "56+", "occupation": "16"},
    }
    assert {feature.name: feature.values for feature in log.manifest.context} == {
        "gender": ("F", "M"),
        "age": ("under 18", "18-24", "25-34", "35-44", "45-49", "50-55", "56+"),
        "occupation": ("10", "15", "16"),
    }


def test_a_film_has_its_year_and_a_number_for_each_genre(log: Log) -> None:
    items = log.items()
    assert items["item_id"].to_list() == ["10", "20", "30"]
    assert items["year"].to_list() == [1995.0, 1954.0, None]
    genres = items.select(pl.col("^genre_.*$"))
    assert genres.width == 18
    found = [{name for name, value in row.items() if value} for row in genres.to_dicts()]
    assert found == [
        {"genre_animation", "genre_childrens"},
        {"genre_sci_fi"},
        {"genre_film_noir", "genre_war"},
    ]


def test_both_layouts_plain_or_gzipped_give_the_same_log(tmp_path: Path, log: Log) -> None:
    hundred = ml_100k(tmp_path / "100k")
    assert imported(hundred, tmp_path / "log-100k").manifest.content_digest == log.manifest.content_digest
    for folder in (hundred, tmp_path / "source"):
        for file in list(folder.iterdir()):
            file.with_name(file.name + ".gz").write_bytes(gzip.compress(file.read_bytes()))
            file.unlink()
        zipped = imported(folder, tmp_path / f"{folder.name}-zipped")
        assert zipped.manifest.content_digest == log.manifest.content_digest


def parquet(folder: Path, **columns: list[Any]) -> Path:
    ml_1m(folder)
    (folder / "ratings.dat").unlink()
    frame = {
        "user_id": [user for user, _, _, _ in RATINGS],
        "movie_id": [film for _, film, _, _ in RATINGS],
        "rating": [rating for _, _, rating, _ in RATINGS],
        "timestamp": [NOON + at for _, _, _, at in RATINGS],
    }
    narrow = {"user_id": pl.Int16, "movie_id": pl.Int16, "rating": pl.Int8, "timestamp": pl.Int32}
    pl.DataFrame(frame | columns, schema=narrow).write_parquet(folder / "ratings.parquet")
    return folder


def test_ratings_may_be_parquet_and_those_without_a_time_are_left_out_and_counted(tmp_path: Path, log: Log) -> None:
    whole = imported(parquet(tmp_path / "whole"), tmp_path / "log-whole")
    assert whole.manifest.content_digest == log.manifest.content_digest
    times = [NOON + at if user == 1 else None for user, _, _, at in RATINGS]
    some = imported(parquet(tmp_path / "some", timestamp=times), tmp_path / "log-some")
    assert {user for (user,) in rows(some, "user_id")} == {"1"}
    assert some.manifest.has_times
    assert any("6 of 10 ratings have no timestamp and are left out" in text for text in some.manifest.limits)
    none = parquet(tmp_path / "none", timestamp=[None] * len(RATINGS))
    with pytest.raises(InputError, match=r"ratings\.parquet: holds no rating with a timestamp"):
        imported(none, tmp_path / "log-none")
    films = [film if at else 99 for _, film, _, at in RATINGS]
    with pytest.raises(InputError, match=r"ratings\.parquet: row 2, column 'movie_id': '99'; expected an id of movies"):
        imported(parquet(tmp_path / "other", movie_id=films), tmp_path / "log-other")


def test_the_manifest_claims_users_and_times_but_neither_slates_nor_purchases(log: Log) -> None:
    manifest = log.manifest
    assert (manifest.evidence, manifest.slate_size, manifest.responses) == (Evidence.CLICKS, 0, "choice")
    assert (manifest.has_users, manifest.has_times, manifest.has_purchases) == (True, True, False)
    for words in ("not identified", "when it was entered", "no purchases", "at least 20 ratings"):
        assert any(words in sentence for sentence in manifest.limits), words
    unknown = ("slate", "candidates", "slate_log_prob", "clicked", "purchased")
    assert set(rows(log, *unknown)) == {(None,) * len(unknown)}


GOOD = f"1::10::4::{NOON}\n1::20::5::{NOON}\n"


@pytest.mark.parametrize(
    ("file", "text", "row", "column", "seen", "expected"),
    [
        ("ratings", GOOD + "1::10::4\n", 3, "line", "1::10::4", "user_id::movie_id::rating::timestamp (4 fields)"),
        ("ratings", GOOD + f"1::10::6::{NOON}\n", 3, "rating", "6", "1, 2, 3, 4 or 5"),
        ("ratings", GOOD + f"1::10::3.5::{NOON}\n", 3, "rating", "3.5", "1, 2, 3, 4 or 5"),
        ("ratings", GOOD + "1::10::4::noon\n", 3, "timestamp", "noon", "Unix seconds"),
        ("ratings", GOOD + "1::10::4::\n", 3, "timestamp", None, "Unix seconds"),
        ("ratings", GOOD + f"9::10::4::{NOON}\n", 3, "user_id", "9", "an id of users.dat"),
        ("ratings", GOOD + f"1::99::4::{NOON}\n", 3, "movie_id", "99", "an id of movies.dat"),
        ("users", USERS_1M + "2::F::1::1::0\n", 2, "user_id", "2", "an id of its own"),
        ("users", "1::X::1::10::0\n", 1, "gender", "X", "one of ('F', 'M')"),
        ("users", "1::F::old::10::0\n", 1, "age", "old", "a whole number of years"),
        ("movies", "10::A (1990)::Drama|Noir\n", 1, "genres", "Drama|Noir", "some of ['Action', "),
        ("movies", "10::A (1990)\n", 1, "line", "10::A (1990)", "movie_id::title::genres (3 fields)"),
    ],
)
def test_a_wrong_line_is_named_with_file_row_value_and_what_was_expected(
    tmp_path: Path, file: str, text: str, row: int, column: str, seen: str | None, expected: str
) -> None:
    message = f"{file}.dat: row {row}, column {column!r}: {seen!r}; expected {expected}"
    with pytest.raises(InputError, match=re.escape(message)):
        imported(ml_1m(tmp_path / "source", **{file: text}), tmp_path / "log")
    assert not (tmp_path / "log").exists()


def test_a_wrong_genre_flag_of_100k_is_named(tmp_path: Path) -> None:
    item = f"10|A (1990)|||http://x|{'|'.join(['0'] * 18)}|yes\n"
    with pytest.raises(InputError, match=r"u\.item: row 1, column 'Western': 'yes'; expected 0 or 1"):
        imported(ml_100k(tmp_path / "source", item=item), tmp_path / "log")


def test_a_folder_without_a_whole_layout_is_refused_with_what_was_expected(tmp_path: Path) -> None:
    expected = (
        r"expected exactly one of ratings\.dat or ratings\.parquet, users\.dat and movies\.dat \(1M\); or u\.data"
    )
    path = ml_1m(tmp_path / "source")
    (path / "users.dat").unlink()
    with pytest.raises(InputError, match=rf"holds \['movies\.dat', 'ratings\.dat'\]; {expected}"):
        imported(path, tmp_path / "log")
    both = ml_1m(tmp_path / "both")
    for file in ml_100k(tmp_path / "other").iterdir():
        file.rename(both / file.name)
    with pytest.raises(InputError, match=expected):
        imported(both, tmp_path / "log")
    with pytest.raises(InputError, match="no such folder"):
        imported(tmp_path / "absent", tmp_path / "log")


def test_a_file_that_is_cut_off_is_refused_and_leaves_nothing_behind(tmp_path: Path) -> None:
    path = ml_1m(tmp_path / "source")
    whole = gzip.compress((path / "ratings.dat").read_bytes())
    (path / "ratings.dat").unlink()
    (path / "ratings.dat.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"ratings\.dat\.gz: cannot be read: .*expected a whole text file"):
        imported(path, tmp_path / "log")
    assert not (tmp_path / "log").exists()


def real(folder: str) -> Path:
    if not (DATA / folder).is_dir():
        pytest.skip(f"the real data are not on this machine: ../shared/data/{folder} is missing")
    return DATA / folder


def test_the_real_100k_keeps_every_rating_film_and_user(tmp_path: Path) -> None:
    log = imported(real("movielens_100k"), tmp_path / "log", min_rating=1, min_length=1, max_steps=1_000)
    assert log.manifest.n_requests == 100_000
    assert log.items().height == 1_682
    assert log.items()["year"].null_count() == 1  # The film called "unknown".
    facts = log.scan().select(
        users=pl.col("user_id").n_unique(),
        first=pl.col("timestamp").min().dt.strftime("%Y-%m"),
        last=pl.col("timestamp").max().dt.strftime("%Y-%m"),
    )
    assert facts.collect().row(0) == (943, "1997-09", "1998-04")


def test_the_real_1m_keeps_the_ratings_whose_time_is_known(tmp_path: Path) -> None:
    path = real("movielens_1m")
    log = imported(path, tmp_path / "log", min_rating=1, min_length=1, max_steps=1_000)
    n_timed = pl.scan_parquet(path / "ratings.parquet").select(pl.col("timestamp").count()).collect().item()
    assert log.manifest.n_requests == n_timed
    assert any(f"{807_458 - n_timed} of 807458 ratings have no timestamp" in text for text in log.manifest.limits)
    assert log.items().height == 3_883
    assert log.items()["year"].null_count() == 0
