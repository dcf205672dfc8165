import gzip
import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from pydantic import ValidationError

from components.errors import InputError
from components.interactions.contract import Evidence, RatioAssumption
from components.interactions.importers import _reading, obd
from components.interactions.log_folder import Log, open_log
from components.validation.checks import ValidationConfig, validate

DATA = Path(__file__).parents[3] / "../shared/data"
ITEMS = """,item_id,item_feature_0,item_feature_1,item_feature_2,item_feature_3
0,0,-0.5,{salt}a,{salt}k,{salt}x
1,1,0.25,{salt}b,{salt}k,{salt}y
2,10,1.5,{salt}a,{salt}l,{salt}y
"""
HEADER = (
    ",timestamp,item_id,position,click,propensity_score,user_feature_0,user_feature_1,user_feature_2,user_feature_3,"
    "user-item_affinity_0,user-item_affinity_1,user-item_affinity_10\n"
)
ROWS = (
    "0,2019-11-24 00:00:17.004101+00:00,10,2,0,0.125,u,v,w,x,0.0,0.0,0.0\n"
    "1,2019-11-24 00:00:19+00:00,0,1,1,0.5,u,q,,x,0.0,2.0,1.0\n"
    "2,2019-11-24 09:01:04.5+09:00,0,3,0,1.0,t,v,w,x,0.0,0.0,0.0\n"
)


def data_set(folder: Path, rows: str = ROWS, items: str = ITEMS, header: str = HEADER, policy: str = "bts") -> Path:
    (folder / policy).mkdir(parents=True)
    (folder / policy / "men.csv").write_text(header + rows)
    (folder / policy / "men_item_context.csv").write_text(items.replace("{salt}", policy))
    return folder


def imported(path: Path, out: Path, campaign: str = "men", policy: str = "bts") -> Log:
    config = obd.Config.model_validate({"campaign": campaign, "policy": policy})
    return open_log(obd.import_log(config, path, out, "fashion").path)


def rows(log: Log, *columns: str) -> list[tuple[Any, ...]]:
    return log.scan().select(columns).collect().rows()


@pytest.fixture
def log(tmp_path: Path) -> Log:
    return imported(data_set(tmp_path / "source"), tmp_path / "log")


def test_a_row_is_a_request_of_its_own_with_one_item_and_its_log_prob(log: Log) -> None:
    columns = ("request_id", "session_id", "user_id", "step", "slate", "slate_log_prob", "clicked", "session_end")
    assert rows(log, *columns, "policy", "events") == [
        ("bts-1:0", "bts-1", "bts-1", 0, ["10"], math.log(0.125), [False], "censored", "bts", []),
        ("bts-2:0", "bts-2", "bts-2", 0, ["0"], math.log(0.5), [True], "censored", "bts", []),
        ("bts-3:0", "bts-3", "bts-3", 0, ["0"], 0.0, [False], "censored", "bts", []),
    ]
    assert rows(log, "position_log_probs") == [([math.log(0.125)],), ([math.log(0.5)],), ([0.0],)]
    times = [
        datetime(2019, 11, 24, 0, 0, 17, 4101, UTC),
        datetime(2019, 11, 24, 0, 0, 19, 0, UTC),
        datetime(2019, 11, 24, 0, 1, 4, 500_000, UTC),
    ]
    assert rows(log, "timestamp", "available_at") == [(at, at) for at in times]


def test_every_row_names_all_arms_of_the_campaign_by_one_digest(log: Log) -> None:
    table = log.candidate_table()
    assert table["candidates"].to_list() == [["0", "1", "10"]]
    named = rows(log, "candidates", "candidates_digest")
    assert named == [(None, table["candidates_digest"][0])] * 3


def test_place_user_features_and_the_number_of_past_clicks_are_the_context(log: Log) -> None:
    assert [context for (context,) in rows(log, "context")] == [
        _context("center", "u", "v", "w", 0.0),
        _context("left", "u", "q", None, pytest.approx(math.log(4.0))),
        _context("right", "t", "v", "w", 0.0),
    ]
    vocabularies = {feature.name: feature.values for feature in log.manifest.context}
    assert vocabularies["position"] == ("left", "center", "right")
    assert vocabularies["user_feature_0"] == ("t", "u")
    assert vocabularies["user_feature_2"] == ("w",)


def _context(position: str, first: str, second: str, third: str | None, past_clicks: Any) -> dict[str, Any]:
    features = {f"user_feature_{number}": value for number, value in enumerate((first, second, third, "x"))}
    return {"position": position, **features, "log_past_clicks": past_clicks}


def test_the_policies_logs_have_the_same_items_although_their_hashes_differ(tmp_path: Path) -> None:
    path = data_set(data_set(tmp_path / "source"), policy="random")
    logs = [imported(path, tmp_path / policy, policy=policy) for policy in ("bts", "random")]
    assert logs[0].items().rows() == [
        ("0", -0.5, "0", "0", "0"),
        ("1", 0.25, "1", "0", "1"),
        ("10", 1.5, "0", "10", "1"),
    ]
    assert logs[0].items().equals(logs[1].items())
    assert logs[0].manifest.item_features == logs[1].manifest.item_features
    assert [rows(log, "session_id", "policy")[0] for log in logs] == [("bts-1", "bts"), ("random-1", "random")]


def test_the_order_of_the_item_file_does_not_matter(tmp_path: Path, log: Log) -> None:
    header, *items = ITEMS.splitlines(keepends=True)
    turned = imported(data_set(tmp_path / "turned", items="".join([header, *reversed(items)])), tmp_path / "other")
    assert turned.manifest.content_digest == log.manifest.content_digest


def test_the_manifest_says_what_single_requests_can_and_cannot_tell(log: Log) -> None:
    manifest = log.manifest
    assert (manifest.evidence, manifest.slate_size) == (Evidence.PROPENSITIES, 1)
    assert (manifest.responses, manifest.ratio_assumption) == ("per_position", RatioAssumption.FULL_SLATE)
    assert (manifest.has_users, manifest.has_times, manifest.has_purchases) == (False, True, False)
    assert manifest.reward.weights == {"clicked": 1.0}
    for words in ("stand in for users", "ends censored", "three places", "affinities", "no purchases"):
        assert any(words in sentence.lower() for sentence in manifest.limits), words
    # 1 / 3 · (8 + 2 + 1) / 3
    assert any("averages 1.22" in sentence for sentence in manifest.limits)
    assert rows(log, "exposed", "purchased") == [(None, None)] * 3


def test_the_log_passes_validation(log: Log, tmp_path: Path) -> None:
    (tmp_path / "checks").mkdir()
    checks = validate(log, ValidationConfig(min_requests=1), tmp_path / "checks", None)
    assert checks.passed
    assert checks.n_quarantined == 0


def test_gzipped_and_plain_files_give_the_same_log(tmp_path: Path, log: Log) -> None:
    path = data_set(tmp_path / "zipped")
    for file in list((path / "bts").iterdir()):
        file.with_name(file.name + ".gz").write_bytes(gzip.compress(file.read_bytes()))
        file.unlink()
    assert imported(path, tmp_path / "other").manifest.content_digest == log.manifest.content_digest


def test_a_long_log_is_written_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_reading, "ROWS_PER_PART", 2)
    log = imported(data_set(tmp_path / "source", ROWS * 3), tmp_path / "log")
    assert len(log.part_paths) > 1
    assert log.manifest.n_requests == 9
    assert sorted(rows(log, "session_id")) == [(f"bts-{number}",) for number in range(1, 10)]


def test_campaign_and_policy_have_no_default_and_only_known_values() -> None:
    for wrong in ({}, {"campaign": "men"}, {"policy": "bts"}, {"campaign": "kids", "policy": "bts"}):
        with pytest.raises(ValidationError):
            obd.Config.model_validate(wrong)


GOOD = "0,2019-11-24 00:00:17+00:00,10,2,0,0.125,u,v,w,x,0.0,0.0,0.0\n"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("0.125", "0.0", "'propensity_score': '0.0'; expected a probability above 0 and at most 1"),
        ("0.125", "1.5", "'propensity_score': '1.5'; expected a probability above 0 and at most 1"),
        ("0.125", "nan", "'propensity_score': 'nan'; expected a probability above 0 and at most 1"),
        ("0.125", "", "'propensity_score': None; expected a probability above 0 and at most 1"),
        ("0.125", "likely", "'propensity_score': 'likely'; expected a probability"),
        (",10,2,", ",7,2,", "'item_id': '7'; expected one of the 3 items of the campaign's item context"),
        (",10,2,", ",10,0,", r"'position': '0'; expected one of \['1', '2', '3'\]"),
        (",10,2,", ",10,4,", r"'position': '4'; expected one of \['1', '2', '3'\]"),
        (",0,0.125", ",2,0.125", "'click': '2'; expected 0 or 1"),
        ("2019-11-24 00:00:17+00:00", "yesterday", "'timestamp': 'yesterday'; expected an ISO 8601 time"),
        (",0.0\n", ",-1.0\n", "'user-item_affinity_10': '-1.0'; expected a number of past clicks"),
        (",0.0\n", ",inf\n", "'user-item_affinity_10': 'inf'; expected a number of past clicks"),
    ],
)
def test_a_wrong_cell_is_named_with_file_row_value_and_what_was_expected(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    assert old in GOOD
    path = data_set(tmp_path / "source", GOOD + GOOD.replace(old, new))
    with pytest.raises(InputError, match=rf"men\.csv: row 2, column {message}"):
        imported(path, tmp_path / "log")
    assert not (tmp_path / "log").exists()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("2,10,", "2,1,", "row 2, column 'item_id': '1'; expected an item of its own"),
        ("2,10,", "2,ten,", "row 3, column 'item_id': 'ten'; expected a whole number"),
        ("1.5", "high", "row 3, column 'item_feature_0': 'high'; expected a finite number"),
        ("{salt}l", "", "row 3, column 'item_feature_2': None; expected a value in every row"),
        ("item_feature_3", "item_feature_4", "column 'item_feature_3' is missing; the file has"),
    ],
)
def test_a_wrong_item_is_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = data_set(tmp_path / "source", items=ITEMS.replace(old, new))
    with pytest.raises(InputError, match=rf"men_item_context\.csv: {message}"):
        imported(path, tmp_path / "log")


def test_a_missing_file_or_column_is_named(tmp_path: Path) -> None:
    path = data_set(tmp_path / "renamed", header=HEADER.replace("click", "clicks"))
    with pytest.raises(InputError, match=r"men\.csv: column 'click' is missing; the file has \['', 'timestamp', "):
        imported(path, tmp_path / "log")
    path = data_set(tmp_path / "source")
    with pytest.raises(InputError, match=r"women\.csv: no such file, nor women\.csv\.gz"):
        imported(path, tmp_path / "log", campaign="women")
    with pytest.raises(InputError, match=r"random/men\.csv: no such file"):
        imported(path, tmp_path / "log", policy="random")
    (path / "bts" / "men_item_context.csv").unlink()
    with pytest.raises(InputError, match=r"men_item_context\.csv: no such file"):
        imported(path, tmp_path / "log")


def test_a_file_that_is_cut_off_or_empty_is_refused_and_leaves_nothing_behind(tmp_path: Path) -> None:
    path = data_set(tmp_path / "source", ROWS * 2_000)
    whole = gzip.compress((path / "bts" / "men.csv").read_bytes())
    (path / "bts" / "men.csv").unlink()
    (path / "bts" / "men.csv.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"men\.csv\.gz: cannot be read"):
        imported(path, tmp_path / "log")
    with pytest.raises(InputError, match=r"men\.csv: holds no row"):
        imported(data_set(tmp_path / "empty", rows=""), tmp_path / "log")
    with pytest.raises(InputError, match=r"men_item_context\.csv: holds no item"):
        imported(data_set(tmp_path / "bare", items=ITEMS.splitlines()[0] + "\n"), tmp_path / "log")
    assert not (tmp_path / "log").exists()


@pytest.mark.parametrize(
    ("policy", "campaign", "n_items", "n_clicks", "mean_weight"),
    [
        ("random", "all", 80, 32, 1.0),
        ("random", "men", 34, 35, 1.0),
        ("random", "women", 46, 35, 1.0),
        ("bts", "all", 80, 37, 0.95),
        ("bts", "men", 34, 57, 0.91),
        ("bts", "women", 46, 28, 0.99),
    ],
)
def test_the_real_logs_have_known_counts_and_weights_that_average_about_one(
    tmp_path: Path, policy: str, campaign: str, n_items: int, n_clicks: int, mean_weight: float
) -> None:
    path = DATA / "obd"
    if not path.is_dir():
        pytest.skip("the real data are not on this machine: ../shared/data/obd is missing")
    log = imported(path, tmp_path / "log", campaign, policy)
    assert log.items().height == n_items
    uniform = -math.log(n_items)
    facts = log.scan().select(
        requests=pl.len(),
        clicks=pl.col("clicked").list.sum().sum(),
        weight=(uniform - pl.col("slate_log_prob")).exp().mean(),
    )
    n_requests, clicks, weight = facts.collect().row(0)
    assert (n_requests, clicks) == (8_000, n_clicks)
    assert weight == pytest.approx(mean_weight, abs=0.005)


def test_of_a_moment_it_holds_what_was_logged_by_then(tmp_path: Path) -> None:
    data_set(tmp_path)
    until = datetime(2019, 11, 24, 0, 0, 18, tzinfo=UTC)
    log = obd.import_log(obd.Config(campaign="men", policy="bts"), tmp_path, tmp_path / "log", "fashion", until)
    assert rows(log, "session_id") == [("bts-1",)]
