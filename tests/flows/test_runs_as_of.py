"""A run as of a moment sees what a run at that moment would have seen."""

import gzip
import random
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import polars as pl
import pytest

from components.environments import storefront
from components.errors import InputError
from components.interactions.importers import interaction_log
from components.interactions.log import Heard, InteractionLog, Recommended
from components.interactions.log_folder import Log, open_log
from flows.as_of import pinned, read_as_of, require_past
from flows.config import LoopConfig, load_config
from flows.stages import write_source_log

START = datetime(2026, 4, 1, tzinfo=UTC)
MINUTE = 60_000_000


def at(minute: float) -> int:
    return round(START.timestamp() * 1e6) + round(MINUTE * minute)


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("2026-05-01", datetime(2026, 5, 1, 23, 59, 59, 999_999, tzinfo=UTC)),
        ("2026-05-01T12:00:00Z", datetime(2026, 5, 1, 12, tzinfo=UTC)),
        ("2026-05-01T12:00:00+02:00", datetime(2026, 5, 1, 10, tzinfo=UTC)),
        ("2026-05-01 12:00:00.000001Z", datetime(2026, 5, 1, 12, 0, 0, 1, tzinfo=UTC)),
    ],
)
def test_a_date_is_its_end_in_utc_and_a_time_is_itself(text: str, moment: datetime) -> None:
    assert read_as_of(text) == moment


@pytest.mark.parametrize("text", ["yesterday", "2026-05-01T12:00:00", "2026-13-01", "1777000000", "", "20260501"])
def test_what_is_no_moment_or_has_no_zone_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="expected a date, which means its end in UTC, or a time with its zone"):
        read_as_of(text)


def test_what_lies_ahead_is_refused() -> None:
    today = datetime.now(UTC)
    for moment in (f"{today:%Y-%m-%d}", (today + timedelta(minutes=1)).isoformat()):
        with pytest.raises(InputError, match="lies ahead"):
            read_as_of(moment)
    with pytest.raises(InputError, match="lies ahead"):
        pinned(LoopConfig(as_of=today + timedelta(days=1)), None)
    require_past(None)


def shop_rows(seed: int) -> tuple[list[Recommended], list[Heard]]:
    """Visits of ten users within eight hours, whose feedback comes at once, late, or too late to count."""
    chance = random.Random(seed)
    shown, heard = [], []
    for number in range(150):
        minute = chance.uniform(0, 480)
        one = Recommended(
            f"r{number}", "shop", f"u{chance.randrange(10)}", chance.choice([None, "morning"]), at(minute),
            ("a", "b", "c"), False, ("b", "a"), (-0.5, -0.25), (), {"device": chance.choice(["phone", "tv"])}, "p:1",
            "champion", 1, question="",
        )  # fmt: skip
        shown.append(one)
        for piece in range(chance.randrange(3)):
            later = minute + chance.choice([0.1, 5, 25, 45]) * chance.random()
            clicked = (chance.random() < 0.5, chance.random() < 0.5)
            heard.append(Heard(one.request_id, f"f{piece}", at(later), clicked=clicked, left=chance.random() < 0.2))
    return shown, heard


def database(path: Path, shown: list[Recommended], heard: list[Heard]) -> Path:
    log = InteractionLog(f"sqlite:///{path}")
    log.upgrade()
    log.write([shown], heard)
    log.engine.dispose()
    return path


def imported(config: LoopConfig, path: Path | None, out: Path) -> Log:
    return open_log(write_source_log(config, path, out).path)


def log_config(minute: float | None = None) -> LoopConfig:
    as_of = None if minute is None else START + timedelta(minutes=minute)
    return LoopConfig(source=interaction_log.Config(), as_of=as_of)


@pytest.mark.parametrize("seed", range(3))
def test_an_interaction_log_as_of_a_moment_is_the_one_that_ended_there(seed: int, tmp_path: Path) -> None:
    from flows.retraining import source_ref

    shown, heard = shop_rows(seed)
    whole = database(tmp_path / "whole.db", shown, heard)
    for minute in random.Random(seed).sample(range(60, 480), 3):
        by_then = [one for one in shown if one.shown_at <= at(minute)]
        known = {one.request_id for one in by_then}
        heard_by_then = [one for one in heard if one.received_at <= at(minute) and one.request_id in known]
        assert len(heard_by_then) < len(heard)
        short = database(tmp_path / f"{minute}.db", by_then, heard_by_then)
        config = log_config(minute)
        assert source_ref(config, whole).digest == source_ref(config, short).digest
        then = imported(config, short, tmp_path / f"{minute}-short")
        now = imported(config, whole, tmp_path / f"{minute}-whole")
        assert now.manifest == then.manifest
        # As of its own end, a log is what it is without saying so.
        ended = imported(pinned(log_config(), short), short, tmp_path / f"{minute}-pinned")
        assert ended.manifest == imported(log_config(), short, tmp_path / f"{minute}-live").manifest


def test_a_request_that_is_in_and_whose_feedback_may_still_come_is_left_out(tmp_path: Path) -> None:
    shown, heard = shop_rows(1)
    log = imported(log_config(240), database(tmp_path / "log.db", shown, heard), tmp_path / "log")
    times = log.scan().select(pl.col("timestamp", "available_at").max()).collect().row(0)
    assert times[0] <= START + timedelta(minutes=210)
    assert times[1] <= START + timedelta(minutes=240)
    assert any(at(210) < one.shown_at <= at(240) for one in shown)


def test_a_run_on_a_growing_log_pins_its_end_and_rows_that_come_later_change_nothing(tmp_path: Path) -> None:
    from flows.retraining import source_ref

    shown, heard = shop_rows(2)
    file = database(tmp_path / "log.db", shown, heard)
    config = pinned(log_config(), file)
    assert config.as_of == max(
        START + timedelta(microseconds=time - at(0))
        for time in (*(one.shown_at for one in shown), *(one.received_at for one in heard))
    )
    before = imported(config, file, tmp_path / "before").manifest.content_digest
    key = source_ref(config, file).digest
    later = [
        replace(one, request_id=f"{one.request_id}-later", shown_at=one.shown_at + at(600) - at(0)) for one in shown
    ]
    database(file, later, [Heard(shown[0].request_id, "late", at(700), clicked=(True, True))])
    assert source_ref(config, file).digest == key
    assert imported(config, file, tmp_path / "after").manifest.content_digest == before
    assert pinned(log_config(), file).as_of != config.as_of


def test_a_loop_without_rows_has_no_end_to_pin(tmp_path: Path) -> None:
    assert pinned(log_config(), database(tmp_path / "log.db", [], [])).as_of is None


def table(folder: Path, rows: pl.DataFrame, ended: bool) -> Path:
    folder.mkdir()
    columns = 'timestamp = "at"\navailable_at = "known"\n' + 'session_end = "end"\n' * ended
    (folder / "mapping.toml").write_text(
        '[log]\nfile = "log.csv"\nevidence = "slates"\nresponses = "per_position"\n[columns]\nsession_id = "visit"\n'
        'slate = "shown"\nclicked = "hit"\n' + columns + '[context.device]\ncolumn = "device"\nkind = "categorical"\n'
    )
    rows.drop("time").write_csv(folder / "log.csv")
    return folder


def table_rows(seed: int) -> pl.DataFrame:
    chance = random.Random(seed)
    rows = []
    for visit in range(40):
        minute = chance.uniform(0, 400)
        length = chance.randrange(1, 5)
        for step in range(length):
            minute += chance.uniform(0.1, 20)
            time = START + timedelta(minutes=minute)
            rows.append(
                {
                    "visit": f"v{visit}",
                    "shown": "a|b",
                    "hit": chance.choice(["0|1", "1|0", "0|0"]),
                    "device": chance.choice(["phone", "tv", f"new-{round(minute) // 100}"]),
                    "at": time.isoformat(),
                    "known": (time + timedelta(minutes=chance.choice([0, 30, 200]))).isoformat(),
                    "end": "left" if step == length - 1 else None,
                    "time": time,
                }
            )
    return pl.DataFrame(rows).sort("time")


def of_table(folder: Path, rows: pl.DataFrame) -> Path:
    return table(folder, rows, ended=False)


def of_table_with_ends(folder: Path, rows: pl.DataFrame) -> Path:
    return table(folder, rows, ended=True)


def of_yoochoose(folder: Path, rows: pl.DataFrame) -> Path:
    folder.mkdir()
    times = zip(rows["visit"].to_list(), rows["time"].to_list(), strict=True)
    clicks = "".join(f"{visit[1:]}\t{1 + time.minute % 7}\t{time.timestamp()}\n" for visit, time in times)
    for name, text in (("train", clicks), ("test", "")):
        content = ("SessionId\tItemId\tTime\n" + text).encode()
        (folder / f"clicks_{name}.tsv.gz").write_bytes(gzip.compress(content))
    return folder


def of_trivago(folder: Path, rows: pl.DataFrame) -> Path:
    folder.mkdir()
    seconds = pl.col("time").dt.epoch("s")
    price = (20 + seconds % 50).cast(pl.String)
    rows.select(
        user_id=pl.lit("u"),
        session_id="visit",
        timestamp=seconds,
        step=pl.int_range(pl.len()).over("visit").cast(pl.Int64) + 1,
        action_type=pl.lit("clickout item"),
        reference=pl.lit("1"),
        platform="device",
        city=pl.lit("Bonn, Germany"),
        device=pl.lit("mobile"),
        current_filters=pl.lit(None, dtype=pl.String),
        impressions=pl.lit("1|2"),
        prices=pl.format("{}|30", price),
    ).write_parquet(folder / "sessions.parquet")
    return folder


def of_movielens(folder: Path, rows: pl.DataFrame) -> Path:
    folder.mkdir()
    (folder / "users.dat").write_text("".join(f"{user}::F::25::10::1\n" for user in range(40)))
    (folder / "movies.dat").write_text("".join(f"{film}::Film {film} (1995)::Drama\n" for film in range(60)))
    times = zip(rows["visit"].to_list(), rows["time"].to_list(), strict=True)
    (folder / "ratings.dat").write_text(
        "".join(f"{visit[1:]}::{time.minute}::5::{int(time.timestamp())}\n" for visit, time in times)
    )
    return folder


@pytest.mark.parametrize(
    ("source", "write"),
    [
        ("table", of_table),
        ("table", of_table_with_ends),
        ("sessions", of_yoochoose),
        ("trivago", of_trivago),
        ("movielens", of_movielens),
    ],
)
def test_a_file_as_of_a_moment_is_the_file_that_ended_there(
    source: str, write: Callable[[Path, pl.DataFrame], Path], tmp_path: Path
) -> None:
    rows = table_rows(len(source))
    whole = write(tmp_path / "whole", rows)
    everything = imported(load_config(None, [], source), whole, tmp_path / "everything")
    for minute in (90, 200, 333):
        as_of = START + timedelta(minutes=minute, seconds=0.5)
        short = write(tmp_path / f"short-{minute}", rows.filter(pl.col("time") <= as_of))
        config = load_config(None, [f"as_of={as_of.isoformat()}"], source)
        now = imported(config, whole, tmp_path / f"now-{minute}")
        assert now.manifest == imported(config, short, tmp_path / f"then-{minute}").manifest
        assert now.manifest.n_requests < everything.manifest.n_requests
        assert now.scan().select(pl.max_horizontal("timestamp", "available_at").max()).collect().item() <= as_of


def test_the_simulated_shops_times_count_too(tmp_path: Path) -> None:
    source = storefront.Config(n_users=60, n_sessions=120, n_items=40, n_candidates=8, slate_size=3)
    as_of = storefront.FIRST_DAY + timedelta(days=10)
    everything = imported(LoopConfig(source=source), None, tmp_path / "everything").scan().collect()
    known = imported(LoopConfig(source=source, as_of=as_of), None, tmp_path / "known").scan().collect()
    expected = everything.filter(pl.max_horizontal("timestamp", "available_at") <= as_of)
    assert 0 < known.height < everything.height
    assert known["request_id"].sort().equals(expected["request_id"].sort())


def test_a_source_without_times_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "clicks"
    folder.mkdir()
    frame = pl.DataFrame({"session_idx": [1], "items": [[1, 2]]})
    frame.write_parquet(folder / "sessions_remapped.parquet")
    config = load_config(None, ["as_of=2026-04-01T00:00:00Z"], "sessions")
    with pytest.raises(InputError, match="source 'sessions' has no times here, so what was known then cannot be told"):
        write_source_log(config, folder, tmp_path / "log")
    assert not (tmp_path / "log").exists()


def test_before_a_files_first_row_nothing_was_known(tmp_path: Path) -> None:
    config = load_config(None, ["as_of=2020-01-01T00:00:00Z"], "table")
    with pytest.raises(InputError, match=r"log\.csv: holds nothing that was logged by 2020-01-01"):
        write_source_log(config, of_table(tmp_path / "table", table_rows(0)), tmp_path / "log")
