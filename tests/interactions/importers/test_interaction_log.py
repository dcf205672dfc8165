import tempfile
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from components.errors import InputError
from components.interactions.contract import Evidence
from components.interactions.deletion import forget_users
from components.interactions.importers.interaction_log import (
    Config,
    NothingLoggedError,
    import_database,
    import_log,
)
from components.interactions.log import Heard, InteractionLog, Recommended
from components.interactions.log_folder import Log, open_log
from components.validation.checks import ValidationConfig, validate

MINUTE = 60_000_000
START = 1_800_000_000_000_000
SHOWN = Recommended(
    request_id="",
    loop="shop",
    user_id="u1",
    session_id=None,
    shown_at=START,
    candidates=("a", "b", "c"),
    catalog=False,
    slate=("b", "a"),
    log_probs=(-0.5, -0.25),
    events=({"type": "view", "item_id": "d"},),
    context={"device": "phone", "hour": 8.5},
    policy="p:1",
    arm="champion",
    experiment=3,
    question="",
)


def shown(request_id: str, minute: float, **changes: Any) -> Recommended:
    return replace(SHOWN, request_id=request_id, shown_at=START + round(MINUTE * minute), **changes)


def heard(request_id: str, minute: float, **told: Any) -> Heard:
    return Heard(request_id, f"{request_id}-{minute}", START + round(MINUTE * minute), **told)


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "interactions.db"


def imported(
    database: Path, recommended: list[Recommended], pieces: list[Heard], config: Config | None = None
) -> tuple[Log, dict[str, dict[str, Any]]]:
    log = InteractionLog(f"sqlite:///{database}")
    log.upgrade()
    log.write([recommended], pieces)
    import_log(config or Config(), database, database.parent / "log", "shop")
    whole = open_log(database.parent / "log")
    return whole, {row["request_id"]: row for row in whole.scan().collect().iter_rows(named=True)}


#: A request of another user, long after all others: their windows and sessions are over.
LATER = shown("later", 600, user_id="u9")


def test_a_request_becomes_a_row_of_the_contract(database: Path) -> None:
    log, rows = imported(database, [shown("r1", 0), LATER], [heard("r1", 5, clicked=(True, False))])
    manifest = log.manifest
    assert (manifest.source, manifest.evidence, manifest.slate_size) == ("log", Evidence.PROPENSITIES, 2)
    assert [(feature.name, feature.kind, feature.values) for feature in manifest.context] == [
        ("device", "categorical", ("phone",)),
        ("hour", "numeric", ()),
    ]
    assert "later" not in rows  # its own window is still open
    row = rows["r1"]
    assert (row["user_id"], row["step"], row["candidates"], row["slate"]) == ("u1", 0, ["a", "b", "c"], ["b", "a"])
    assert (row["slate_log_prob"], row["position_log_probs"]) == (-0.75, [-0.5, -0.25])
    assert (row["clicked"], row["purchased"]) == ([True, False], [False, False])
    assert (row["events"], row["context"]) == ([{"type": "view", "item_id": "d"}], {"device": "phone", "hour": 8.5})
    assert (row["policy"], row["arm"], row["experiment"]) == ("p:1", "champion", "release-3")
    assert row["session_end"] == "left"
    assert row["timestamp"] == datetime.fromtimestamp(START / 1e6, UTC)
    assert log.items()["item_id"].to_list() == ["a", "b", "c", "d"]


def test_pieces_of_feedback_are_put_together_in_any_order(database: Path) -> None:
    pieces = [
        heard("r1", 9, clicked=(False, True), signals={"watch_time": (None, 7.0)}),
        heard("r1", 3, clicked=(True, False), signals={"watch_time": (4.0, 2.0)}, request_signals={"rating": 1.0}),
        heard("r1", 5, purchased=(None, True), request_signals={"rating": 5.0}),
    ]
    log, rows = imported(database, [shown("r1", 0), LATER], pieces)
    row = rows["r1"]
    assert row["clicked"] == [True, True]  # a click is never taken back
    assert row["purchased"] == [None, True]  # what is said to be unknown stays so
    assert row["signals.watch_time"] == [4.0, 7.0]  # the newest number counts
    assert row["request_signals"] == {"rating": 5.0}
    assert (log.manifest.signals, log.manifest.request_signals) == (("watch_time",), ("rating",))


def test_feedback_counts_within_its_window_alone(database: Path) -> None:
    pieces = [heard("r1", 30, clicked=(True, False)), heard("r2", 30.5, clicked=(True, False))]
    _, rows = imported(database, [shown("r1", 0), shown("r2", 0, user_id="u2"), LATER], pieces)
    assert rows["r1"]["clicked"] == [True, False]
    assert rows["r2"]["clicked"] == [False, False]


def test_what_was_shown_before_a_time_can_be_left_out(database: Path) -> None:
    imported(database, [shown("r1", 0), shown("r2", 45), shown("r3", 60, user_id="u2"), LATER], [])
    since = datetime.fromtimestamp(START / 1e6 + 45 * 60, UTC)
    log = import_database(Config(), f"sqlite:///{database}", database.parent / "part", "shop", since=since)
    assert log.scan().collect()["request_id"].sort().to_list() == ["r2", "r3"]
    never = datetime.fromtimestamp(START / 1e6 + 700 * 60, UTC)
    with pytest.raises(NothingLoggedError, match="no request of loop 'shop'"):
        import_database(Config(), f"sqlite:///{database}", database.parent / "none", "shop", since=never)


def test_a_history_goes_back_from_the_log_s_end(database: Path) -> None:
    log, _ = imported(database, [shown("r1", 0), shown("r2", 45), shown("r3", 60, user_id="u2"), LATER], [])
    assert log.manifest.n_requests == 3
    config = Config(history_days=556 / 1_440)  # the last request came at 600 minutes
    part = import_database(config, f"sqlite:///{database}", database.parent / "part", "shop")
    assert part.scan().collect()["request_id"].sort().to_list() == ["r2", "r3"]
    until = datetime.fromtimestamp(START / 1e6 + 100 * 60, UTC)
    part = import_database(
        Config(history_days=50 / 1_440), f"sqlite:///{database}", database.parent / "until", "shop", until
    )
    assert part.scan().collect()["request_id"].to_list() == ["r3"]


def test_windows_are_over_by_the_moment_that_is_asked_for_also_where_nothing_came_after(database: Path) -> None:
    log = InteractionLog(f"sqlite:///{database}")
    log.upgrade()
    log.write([[shown("r1", 0), shown("r2", 20)]], [heard("r1", 25, clicked=(True, False))])

    def known_after(minutes: float) -> list[str]:
        until = datetime.fromtimestamp(START / 1e6 + 60 * minutes, UTC)
        with tempfile.TemporaryDirectory() as scratch:
            part = import_database(Config(), f"sqlite:///{database}", Path(scratch) / "log", "shop", until)
            return sorted(part.scan().collect()["request_id"])

    assert known_after(49) == ["r1"]
    assert known_after(50) == ["r1", "r2"]


@pytest.mark.parametrize(("default", "clicked"), [("none", [False, False]), ("unknown", [None, None])])
def test_a_slate_without_feedback_means_what_the_configuration_says(
    database: Path, default: Any, clicked: list[Any]
) -> None:
    _, rows = imported(database, [shown("r1", 0), LATER], [], Config(without_feedback=default))
    assert rows["r1"]["clicked"] == rows["r1"]["purchased"] == clicked


def test_a_pause_ends_a_session_unless_the_client_names_it(database: Path) -> None:
    recommended = [
        shown("a1", 0), shown("a2", 20), shown("a3", 51),
        shown("b1", 0, user_id="u2", session_id="v"), shown("b2", 100, user_id="u2", session_id="v"),
        shown("c1", 0, user_id="u3", session_id="v"), LATER,
    ]  # fmt: skip
    _, rows = imported(database, recommended, [])
    sessions = {name: (row["session_id"], row["step"], row["session_end"]) for name, row in rows.items()}
    assert sessions["a1"] == ("u1/visit-0", 0, None)
    assert sessions["a2"] == ("u1/visit-0", 1, "left")
    assert sessions["a3"] == ("u1/visit-1", 0, "left")
    assert sessions["b1"] == ("u2/named-v", 0, None)
    assert sessions["b2"] == ("u2/named-v", 1, "left")
    assert sessions["c1"] == ("u3/named-v", 0, "left")


def test_what_is_not_over_is_left_out_and_its_session_is_censored(database: Path) -> None:
    recommended = [shown("a1", 0), shown("a2", 25), shown("b1", 10, user_id="u2"), shown("b2", 50, user_id="u2")]
    _, rows = imported(database, recommended, [heard("b2", 60, left=True)], Config(session_gap_minutes=60))
    # The log ends at minute 60: a2 and b1 are over, b2 is not, though its user is known to have left.
    assert {name: row["session_end"] for name, row in rows.items()} == {"a1": None, "a2": "censored", "b1": "censored"}


def test_a_user_who_is_known_to_have_left_has_left_at_once(database: Path) -> None:
    _, rows = imported(
        database, [shown("a1", 0), LATER], [heard("a1", 1, left=True)], Config(session_gap_minutes=1_000)
    )
    assert rows["a1"]["session_end"] == "left"
    minutes = (rows["a1"]["available_at"] - rows["a1"]["timestamp"]).total_seconds() / 60
    assert minutes == 30


def test_that_a_user_left_counts_within_the_window_alone(database: Path) -> None:
    recommended = [shown("a1", 0), shown("b1", 500, user_id="u2")]
    _, rows = imported(database, recommended, [heard("a1", 200, left=True)], Config(session_gap_minutes=1_000))
    assert rows["a1"]["session_end"] == "censored"


def test_what_came_later_is_as_if_it_had_not_come(database: Path) -> None:
    """The log as of minute 100 is the same before and after more of it was written."""
    recommended = [shown("a1", 0), shown("b1", 90, user_id="u2")]
    imported(database, recommended, [heard("a1", 5, clicked=(True, False))])
    log = InteractionLog(f"sqlite:///{database}")
    moment = datetime.fromtimestamp((START + 100 * MINUTE) / 1e6, UTC)
    state, digests = log.state("shop", moment), set()
    for number in range(2):
        out = database.parent / f"as-of-{number}"
        digests.add(import_database(Config(), str(log.engine.url), out, "shop", moment).manifest.content_digest)
        assert log.state("shop", moment) == state
        log.write([[shown("a2", 110), shown("c1", 105, user_id="u3")]], [heard("a1", 101, clicked=(True, True))])
    assert len(digests) == 1
    assert log.state("shop") != state


def test_that_a_session_ended_is_known_only_after_its_pause(database: Path) -> None:
    _, rows = imported(database, [shown("a1", 0), shown("a2", 10), LATER], [], Config(session_gap_minutes=45))
    known_after = {name: (row["available_at"] - row["timestamp"]).total_seconds() / 60 for name, row in rows.items()}
    assert known_after == {"a1": 30, "a2": 45}


def test_candidates_that_requests_share_are_named_by_digest(database: Path) -> None:
    recommended = [shown("r1", 0, catalog=True), shown("r2", 1, catalog=True), shown("r3", 2), LATER]
    log, rows = imported(database, recommended, [])
    assert rows["r1"]["candidates"] is None and rows["r1"]["candidates_digest"] == rows["r2"]["candidates_digest"]
    assert log.candidate_table().to_dicts() == [
        {"candidates_digest": rows["r1"]["candidates_digest"], "candidates": ["a", "b", "c"]}
    ]
    assert rows["r3"]["candidates"] == ["a", "b", "c"]


def test_items_have_the_features_of_their_file(database: Path, tmp_path: Path) -> None:
    file = tmp_path / "items.csv"
    file.write_text("item_id,price,brand\na,1.5,acme\nz,2,\n")
    log, _ = imported(database, [shown("r1", 0), LATER], [], Config(items=file))
    assert [(feature.name, feature.kind, feature.values) for feature in log.manifest.item_features] == [
        ("price", "numeric", ()),
        ("brand", "categorical", ("acme",)),
    ]
    assert log.items().rows() == [
        ("a", 1.5, "acme"), ("b", None, None), ("c", None, None), ("d", None, None), ("z", 2.0, None),
    ]  # fmt: skip


def test_a_loop_is_imported_alone(database: Path) -> None:
    other = replace(shown("n1", 0), loop="news", candidates=("news-1", "b", "a"), catalog=True)
    log, rows = imported(database, [shown("r1", 0), other, LATER], [heard("n1", 1, clicked=(True, True))])
    assert set(rows) == {"r1"}
    assert "news-1" not in log.items()["item_id"].to_list() and log.candidate_table().is_empty()


def test_the_storefront_s_log_comes_back_from_the_tables(storefront_log: Log, database: Path) -> None:
    """Its users come again, but sessions are named; their ends are told as a client would tell them."""
    rows = storefront_log.scan().sort("timestamp", "request_id").collect()
    recommended, pieces = [], []
    for row in rows.iter_rows(named=True):
        moment = round(row["timestamp"].timestamp() * 1e6)
        recommended.append(
            Recommended(
                request_id=row["request_id"],
                loop="shop",
                user_id=row["user_id"],
                session_id=row["session_id"],
                shown_at=moment,
                candidates=tuple(row["candidates"]),
                catalog=False,
                slate=tuple(row["slate"]),
                log_probs=tuple(row["position_log_probs"]),
                events=(),
                context=row["context"],
                policy=row["policy"],
                arm="champion",
                experiment=1,
                question="",
            )
        )
        told = {name: tuple(row[name]) for name in ("clicked", "purchased")}
        pieces.append(Heard(row["request_id"], "f", moment + MINUTE, left=row["session_end"] == "left", **told))
    later = replace(LATER, shown_at=recommended[-1].shown_at + 600 * MINUTE, context=recommended[0].context)
    log, _ = imported(database, [*recommended, later], pieces)

    kept = [
        "loop", "request_id", "user_id", "step", "timestamp", "candidates", "slate", "clicked", "purchased",
        "session_end", "context", "policy", "position_log_probs",
    ]  # fmt: skip
    ended = rows.filter(pl.col("session_end").eq("left").any().over("session_id"))
    got = log.scan().collect().filter(pl.col("request_id").is_in(ended["request_id"].implode()))
    assert_frame_equal(got.select(kept).sort("request_id"), ended.select(kept).sort("request_id"))
    checks = validate(log, ValidationConfig(min_requests=100), Path(tempfile.mkdtemp(dir=database.parent)))
    assert checks.passed and checks.n_quarantined == 0
    assert got["session_id"].n_unique() == ended["session_id"].n_unique() > 100
    assert got["slate_log_prob"].to_list() == pytest.approx(got["position_log_probs"].list.sum().to_list())


def test_a_log_of_many_parts_is_the_same_log(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recommended = [shown(f"r{n}", n % 7, user_id=f"u{n % 13}") for n in range(60)]
    pieces = [heard(f"r{n}", 8, clicked=(n % 2 == 0, False)) for n in range(0, 60, 3)]
    whole, _ = imported(database, [*recommended, LATER], pieces)
    monkeypatch.setattr("components.interactions.importers.interaction_log._FRAMES_PER_FILE", 2)
    monkeypatch.setattr("components.interactions.log.ROWS_AT_A_TIME", 3)
    monkeypatch.setattr("components.interactions.importers._reading.ROWS_PER_PART", 10)
    parts = import_log(Config(), database, database.parent / "parts", "shop")
    assert len(parts.part_paths) > 3
    assert parts.manifest.content_digest == whole.manifest.content_digest


@pytest.mark.parametrize(
    ("recommended", "config", "words"),
    [
        ([], Config(), r"holds no request of loop 'shop'; it has \[\]"),
        ([shown("r1", 0)], Config(), "no request whose attribution window is over"),
        (
            [shown("r1", 0), replace(LATER, context={"hour": "eight"})],
            Config(),
            "feature 'hour' holds text and numbers",
        ),
        ([shown("r1", 0), LATER], Config(items=Path("nowhere.csv")), "nowhere.csv: no such file"),
    ],
)
def test_what_cannot_be_imported_is_said(
    database: Path, recommended: list[Recommended], config: Config, words: str
) -> None:
    with pytest.raises(InputError, match=words):
        imported(database, recommended, [], config)


def test_a_database_without_a_log_is_refused_and_a_missing_one_is_not_made(database: Path) -> None:
    with pytest.raises(InputError, match=r"interactions.db: no such file"):
        import_log(Config(), database, database.parent / "log", "shop")
    assert not database.exists()
    database.touch()
    with pytest.raises(InputError, match="holds no interaction log"):
        import_log(Config(), database, database.parent / "log", "shop")


def test_an_item_that_stands_twice_in_its_file_is_named(database: Path, tmp_path: Path) -> None:
    file = tmp_path / "items.csv"
    file.write_text("item_id,price\na,1\na,2\n")
    with pytest.raises(InputError, match="column 'item_id': 'a' stands there twice"):
        imported(database, [shown("r1", 0), LATER], [], Config(items=file))


def test_what_a_forgotten_user_was_shown_before_the_tombstone_does_not_count(database: Path) -> None:
    forgotten = replace(SHOWN, user_id="u2", context={"device": "watch"}, shown_at=10**15)
    late, new = replace(forgotten, request_id="late"), replace(forgotten, request_id="new", shown_at=2 * START)
    last = replace(LATER, shown_at=2 * START + 600 * MINUTE)
    imported(database, [shown("r1", 0), replace(forgotten, request_id="old"), last], [])
    log = InteractionLog(f"sqlite:///{database}")
    forget_users(log, ["u2"])
    whole, rows = imported(database, [late], [Heard("late", "f", 10**15, signals={"watch_time": (1.0, 2.0)})])
    assert set(rows) == {"r1"}
    assert whole.manifest.signals == ()
    assert [feature.values for feature in whole.manifest.context if feature.name == "device"] == [("phone",)]
    _, rows = imported(database, [new], [])
    assert set(rows) == {"r1", "new"}
