import math
from datetime import UTC, datetime
from pathlib import Path

import polars as pl
import pytest

from components.errors import InputError
from components.interactions.contract import Evidence
from components.interactions.importers import trivago
from components.interactions.log_folder import Log, open_log

DATA = Path(__file__).parents[3] / "../shared/data"
SCHEMA = {
    "user_id": pl.String,
    "session_id": pl.String,
    "timestamp": pl.Int64,
    "step": pl.Int64,
    "action_type": pl.String,
    "reference": pl.String,
    "platform": pl.String,
    "city": pl.String,
    "device": pl.String,
    "current_filters": pl.String,
    "impressions": pl.String,
    "prices": pl.String,
}
NOON = 1_541_592_000  # 2018-11-07 12:00:00 UTC
DAY = 86_400


def action(session: str, step: int, kind: str, reference: str, **more: object) -> dict[str, object]:
    row = {
        "user_id": f"user-{session}",
        "session_id": session,
        "timestamp": NOON + step,
        "step": step,
        "action_type": kind,
        "reference": reference,
        "platform": "DE",
        "city": "Bonn, Germany",
        "device": "mobile",
        "current_filters": None,
        "impressions": None,
        "prices": None,
    }
    return row | more


def clickout(session: str, step: int, item: str, shown: str, prices: str, **more: object) -> dict[str, object]:
    return action(session, step, "clickout item", item, impressions=shown, prices=prices, **more)


def source(folder: Path, *actions: dict[str, object]) -> Path:
    folder.mkdir(exist_ok=True)
    pl.DataFrame(list(actions), schema=SCHEMA).write_parquet(folder / "sessions.parquet")
    return folder


def imported(path: Path, out: Path, **config: int) -> Log:
    return open_log(trivago.import_log(trivago.Config(**config), path, out, "hotels").path)


def rows(log: Log, *columns: str) -> list[tuple[object, ...]]:
    return log.scan().select(columns).collect().rows()


@pytest.fixture
def log(tmp_path: Path) -> Log:
    path = source(
        tmp_path / "source",
        action("a", 1, "search for destination", "Bonn, Germany"),
        action("a", 2, "interaction item image", "30"),
        action("a", 3, "interaction item info", "unknown"),
        action("a", 4, "search for item", "20"),
        clickout("a", 5, "20", "10|20|30", "40|60|80", current_filters="Hotel|3 Star"),
        action("a", 6, "filter selection", "Hotel"),
        clickout("a", 7, "10", "10|40", "20|5"),
        action("a", 8, "interaction item deals", "50"),
        action("b", 1, "interaction item image", "10", device="desktop"),
        clickout("c", 1, "40", "40", "15", timestamp=NOON + DAY, device="desktop", platform="BR"),
    )
    return imported(path, tmp_path / "log")


def test_a_clickout_becomes_a_request_with_its_slate_and_one_click(log: Log) -> None:
    columns = ("request_id", "user_id", "step", "slate", "candidates", "clicked", "session_end", "policy")
    long, short, single = ["10", "20", "30"], ["10", "40"], ["40"]
    assert rows(log, *columns) == [
        ("a:0", "user-a", 0, long, long, [False, True, False], None, "unknown"),
        ("a:1", "user-a", 1, short, short, [True, False], "left", "unknown"),
        ("c:0", "user-c", 0, single, single, [True], "censored", "unknown"),
    ]


def test_what_the_user_did_with_items_since_the_clickout_before_stands_in_events_in_order(log: Log) -> None:
    first = [{"type": "image", "item_id": "30"}, {"type": "search", "item_id": "20"}]
    assert rows(log, "events") == [(first,), ([],), ([],)]


def test_the_context_tells_device_platform_and_number_of_filters(log: Log) -> None:
    assert rows(log, "context") == [
        ({"device": "mobile", "platform": "DE", "n_filters": 2.0},),
        ({"device": "mobile", "platform": "DE", "n_filters": 0.0},),
        ({"device": "desktop", "platform": "BR", "n_filters": 0.0},),
    ]
    assert {feature.name: feature.values for feature in log.manifest.context} == {
        "device": ("desktop", "mobile"),
        "platform": ("BR", "DE"),
        "n_filters": (),
    }


def test_an_item_has_the_log_of_its_mean_displayed_price_or_null_where_never_displayed(log: Log) -> None:
    prices = dict(log.items().rows())
    # 10 was displayed at 40 and 20, 40 at 5 and 15.
    mean = {"10": 30, "20": 60, "30": 80, "40": 10}
    assert prices == {item: pytest.approx(math.log(price)) for item, price in mean.items()} | {"50": None}


def test_times_are_those_of_the_clickouts(log: Log) -> None:
    first = datetime(2018, 11, 7, 12, 0, 5, tzinfo=UTC)
    assert rows(log, "timestamp", "available_at")[0] == (first, first)


def test_the_manifest_says_what_clickouts_cannot_tell(log: Log) -> None:
    manifest = log.manifest
    assert (manifest.evidence, manifest.responses, manifest.slate_size) == (Evidence.SLATES, "choice", 3)
    assert (manifest.has_users, manifest.has_times, manifest.has_purchases) == (True, True, False)
    assert manifest.reward.weights == {"clicked": 1.0}
    assert any("reward is constant" in sentence and "not identified" in sentence for sentence in manifest.limits)
    assert any("1 of 3 sessions had no clickout" in sentence for sentence in manifest.limits)
    unknown = ("slate_log_prob", "exposed", "purchased")
    assert rows(log, *unknown) == [(None,) * len(unknown)] * 3


def test_a_session_still_going_when_the_log_ends_is_censored_only_within_the_idle_time(tmp_path: Path) -> None:
    path = source(
        tmp_path / "source",
        clickout("a", 1, "10", "10", "5"),
        action("a", 1_000, "interaction item image", "10"),
        clickout("b", 2_000, "10", "10", "5"),
    )
    assert [end for (end,) in rows(imported(path, tmp_path / "half"), "session_end")] == ["censored", "censored"]
    ends = rows(imported(path, tmp_path / "ten", idle_minutes=10), "session_end")
    assert [end for (end,) in ends] == ["left", "censored"]


def test_a_clickout_on_an_item_outside_its_list_is_kept_with_unknown_feedback_and_counted(tmp_path: Path) -> None:
    log = imported(source(tmp_path / "source", clickout("a", 1, "99", "10|20", "5|6")), tmp_path / "log")
    assert rows(log, "slate", "clicked") == [(["10", "20"], None)]
    assert "1 clickouts named an item outside their list: their feedback is unknown." in log.manifest.limits


def test_two_visits_under_one_session_id_are_put_in_order_of_time(tmp_path: Path) -> None:
    path = source(
        tmp_path / "source",
        clickout("a", 1, "10", "10|20", "5|6", timestamp=NOON + DAY),
        action("a", 1, "interaction item image", "20", timestamp=NOON),
        clickout("a", 2, "20", "10|20", "5|6", timestamp=NOON),
    )
    assert rows(imported(path, tmp_path / "log"), "step", "clicked", "events") == [
        (0, [False, True], [{"type": "image", "item_id": "20"}]),
        (1, [True, False], []),
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (action("a", 2, "booking", "10"), "row 2, column 'action_type': 'booking'; expected one of .*'clickout item'"),
        (clickout("a", 2, "10", "10|20", "5"), "row 2, column 'prices': '5'; expected one number per item"),
        (clickout("a", 2, "10", "10", "cheap"), "row 2, column 'prices': 'cheap'; expected one number per item"),
        (action("a", 2, "search for poi", "x", session_id=None), "row 2, column 'session_id': None; expected a value"),
    ],
)
def test_a_row_unlike_the_published_data_is_named(tmp_path: Path, row: dict[str, object], message: str) -> None:
    path = source(tmp_path / "source", clickout("a", 1, "10", "10", "5"), row)
    with pytest.raises(InputError, match=message):
        imported(path, tmp_path / "log")


def test_a_missing_file_or_column_or_a_wrong_type_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"sessions\.parquet: no such file"):
        imported(tmp_path, tmp_path / "log")
    path = source(tmp_path / "source", clickout("a", 1, "10", "10", "5"))
    whole = pl.read_parquet(path / "sessions.parquet")
    whole.drop("prices").write_parquet(path / "sessions.parquet")
    with pytest.raises(InputError, match="column 'prices' is missing"):
        imported(path, tmp_path / "log")
    whole.with_columns(pl.col("timestamp").cast(pl.String)).write_parquet(path / "sessions.parquet")
    with pytest.raises(InputError, match="column 'timestamp' has type String; expected whole numbers"):
        imported(path, tmp_path / "log")


def test_a_log_without_any_clickout_is_refused(tmp_path: Path) -> None:
    path = source(tmp_path / "source", action("a", 1, "search for poi", "Cathedral"))
    with pytest.raises(InputError, match=r"sessions\.parquet: .*clickout"):
        imported(path, tmp_path / "log")


def test_real_trivago_has_the_published_counts_and_exactly_one_click_a_request(tmp_path: Path) -> None:
    path = DATA / "trivago_2019"
    if not path.is_dir():
        pytest.skip("the real data are not on this machine: ../shared/data/trivago_2019 is missing")
    log = imported(path, tmp_path / "log")
    facts = log.scan().select(
        requests=pl.len(),
        at_rank_1=pl.col("clicked").list.first().sum(),
        clicks=pl.col("clicked").list.sum().sum(),
        sessions=pl.col("session_id").n_unique(),
        ended=pl.col("session_end").is_not_null().sum(),
        longest=pl.col("slate").list.len().max(),
    )
    assert facts.collect().row(0) == (10_784, 3_384, 10_784, 5_741, 5_741, 25)
    assert log.manifest.slate_size == 25
    event_items = log.scan().select(pl.col("events").list.explode().struct.field("item_id").drop_nulls()).collect()
    assert set(event_items.to_series()) <= set(log.items()["item_id"])
