import csv
import gzip
import math
import random
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.errors import InputError
from components.interactions.contract import Evidence
from components.interactions.importers import _reading, table
from components.interactions.log_folder import Log, open_log

DOCS = Path(__file__).parents[3] / "docs/sources.md"

SLATES = """
[log]
file = "log.csv"
evidence = "slates"
responses = "per_position"
{log}
[columns]
session_id = "visit"
slate = "shown"
clicked = "hit"
{columns}
"""
CLICKS = """
[log]
file = "log.csv"
evidence = "clicks"
responses = "choice"
{log}
[columns]
session_id = "visit"
events = "item"
{columns}
"""


def source(folder: Path, data: str, mapping: str, log: str = "", columns: str = "") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "log.csv").write_text(data)
    (folder / "mapping.toml").write_text(mapping.format(log=log, columns=columns))
    return folder


def imported(path: Path, out: Path) -> Log:
    return open_log(table.import_log(table.Config(), path, out, "shop").path)


def rows(log: Log, *columns: str) -> list[tuple[object, ...]]:
    return log.scan().select(columns).collect().rows()


def test_the_example_of_the_docs_becomes_the_rows_that_the_docs_show(tmp_path: Path) -> None:
    blocks = re.findall(r"`([a-z]+\.(?:csv|toml))`:\n\n```\w+\n(.*?)```", DOCS.read_text(), flags=re.DOTALL)
    assert [name for name, _ in blocks] == ["log.csv", "items.csv", "mapping.toml"]
    for name, text in blocks:
        (tmp_path / name).write_text(text)
    log = imported(tmp_path, tmp_path / "log")
    pool = ["tea", "mug", "pot"]
    at = [datetime(2024, 5, 1, 10, 0, tzinfo=UTC), datetime(2024, 5, 1, 10, 2, tzinfo=UTC)]
    at.append(datetime(2024, 5, 2, 7, 0, tzinfo=UTC))
    acted = [{"type": "view", "item_id": "mug"}, {"type": "basket", "item_id": "mug"}]
    assert rows(log, "request_id", "user_id", "step", "timestamp", "available_at", "candidates", "slate") == [
        ("v1:0", "anna", 0, at[0], at[0], pool, ["tea", "mug"]),
        ("v1:1", "anna", 1, at[1], at[1], pool, ["pot", "tea"]),
        ("v2:0", "ben", 0, at[2], at[2], pool, ["mug", "pot"]),
    ]
    assert rows(log, "slate_log_prob") == [(pytest.approx(math.log(p)),) for p in (0.25, 0.125, 0.5)]
    assert rows(log, "clicked", "purchased", "signals.watch_time", "events", "session_end") == [
        ([False, True], [False, False], [0.0, 12.5], [], None),
        ([True, False], [True, False], [40.0, 0.0], acted, "left"),
        ([False, False], [False, False], [0.0, 0.0], [], "censored"),
    ]
    assert rows(log, "context", "policy", "loop") == [
        ({"device": "phone"}, "shop-2024-04", "shop"),
        ({"device": "phone"}, "shop-2024-04", "shop"),
        ({"device": None}, "shop-2024-04", "shop"),
    ]
    assert log.items().rows() == [("mug", 12.0, "ware"), ("pot", 30.0, "ware"), ("tea", 4.5, "food")]
    assert log.manifest.evidence is Evidence.PROPENSITIES
    assert log.manifest.reward.weights == {"clicked": 1.0, "purchased": 5.0}
    assert {feature.name: feature.values for feature in log.manifest.item_features} == {
        "price": (),
        "kind": ("food", "ware"),
    }


def test_the_docs_list_every_key_of_the_mapping() -> None:
    text = DOCS.read_text()
    for model in (table.TableMapping, *(_models_of(table.TableMapping))):
        for key in model.model_fields:
            assert f"`{key}`" in text or f"`[{key}]`" in text or f"`[items.{key}]`" in text or f"{{ {key}" in text, key


def _models_of(model: type) -> list[type]:
    annotations = [field.annotation for field in model.model_fields.values()]
    return [each for each in annotations if hasattr(each, "model_fields")]


def test_what_is_not_mapped_is_derived_or_null_and_the_limits_say_so(tmp_path: Path) -> None:
    log = imported(source(tmp_path / "in", "visit,shown,hit\nb,x|y,0|1\na,y,1\nb,y|z,0|0\n", SLATES), tmp_path / "log")
    assert rows(log, "request_id", "session_id", "user_id", "step", "slate", "clicked", "session_end", "policy") == [
        ("a:0", "a", "a", 0, ["y"], [True], "left", "unknown"),
        ("b:0", "b", "b", 0, ["x", "y"], [False, True], None, "unknown"),
        ("b:1", "b", "b", 1, ["y", "z"], [False, False], "left", "unknown"),
    ]
    unknown = ("timestamp", "available_at", "slate_log_prob", "exposed", "purchased", "arm", "experiment")
    assert rows(log, *unknown) == [(None,) * len(unknown)] * 3
    assert rows(log, "candidates") == rows(log, "slate")
    assert rows(log, "events") == [([],)] * 3
    manifest = log.manifest
    assert not (manifest.has_users or manifest.has_times or manifest.has_purchases)
    assert (manifest.slate_size, manifest.reward.weights) == (2, {"clicked": 1.0})
    for word in ("probability", "Candidates", "users", "times", "Purchases", "ended"):
        assert any(word in sentence for sentence in manifest.limits), word
    assert log.items()["item_id"].to_list() == ["x", "y", "z"]


def test_a_click_sequence_needs_only_a_session_and_an_item(tmp_path: Path) -> None:
    path = source(tmp_path / "in", "visit,item,at\n1,9,30\n1,7,10\n2,9,0\n", CLICKS, columns='timestamp = "at"')
    (path / "mapping.toml").write_text((path / "mapping.toml").read_text().replace("[columns]", UNIX + "[columns]"))
    log = imported(path, tmp_path / "log")
    assert rows(log, "session_id", "step", "events", "slate", "session_end") == [
        ("1", 0, [{"type": "view", "item_id": "7"}], None, None),
        ("1", 1, [{"type": "view", "item_id": "9"}], None, "left"),
        ("2", 0, [{"type": "view", "item_id": "9"}], None, "left"),
    ]
    assert (log.manifest.evidence, log.manifest.slate_size) == (Evidence.CLICKS, 0)


UNIX = 'timestamp_format = "s"\nidle_minutes = 0\n'


@pytest.mark.parametrize(
    ("timestamp_format", "cell"),
    [
        ("iso", "2024-05-01T10:00:00.25Z"),
        ("iso", "2024-05-01 10:00:00.25"),
        ("iso", "2024-05-01T12:00:00.250+02:00"),
        ("s", "1714557600.25"),
        ("ms", "1714557600250"),
        ("us", "1714557600250000"),
    ],
)
def test_a_time_is_read_as_the_mapping_says(tmp_path: Path, timestamp_format: str, cell: str) -> None:
    log_table = f'timestamp_format = "{timestamp_format}"'
    path = source(tmp_path / "in", f"visit,item,at\n1,9,{cell}\n", CLICKS, log_table, 'timestamp = "at"')
    at = datetime(2024, 5, 1, 10, 0, 0, 250_000, tzinfo=UTC)
    assert rows(imported(path, tmp_path / "log"), "timestamp") == [(at,)]


def test_a_date_alone_is_its_midnight_in_utc(tmp_path: Path) -> None:
    path = source(tmp_path / "in", "visit,item,at\n1,9,2024-05-01\n", CLICKS, columns='timestamp = "at"')
    assert rows(imported(path, tmp_path / "log"), "timestamp") == [(datetime(2024, 5, 1, tzinfo=UTC),)]


def test_steps_and_ends_that_are_mapped_are_kept(tmp_path: Path) -> None:
    data = "visit,item,n,end\n1,9,3,censored\n1,8,1,\n1,7,2,\n"
    path = source(tmp_path / "in", data, CLICKS, "first_step = 1", 'step = "n"\nsession_end = "end"')
    assert rows(imported(path, tmp_path / "log"), "step", "session_end") == [(0, None), (1, None), (2, "censored")]


def test_a_propensity_of_nothing_becomes_nan_for_validation_to_find(tmp_path: Path) -> None:
    mapping = SLATES.replace('"slates"', '"propensities"')
    path = source(
        tmp_path / "in",
        "visit,shown,hit,p\n1,a,1,0\n2,a,1,1\n3,a,1,\n4,a,1,2\n",
        mapping,
        columns='slate_propensity = "p"\ncandidates = "shown"',
    )
    values = [value for (value,) in rows(imported(path, tmp_path / "log"), "slate_log_prob")]
    assert math.isnan(values[0])
    assert values[1:] == [0.0, None, pytest.approx(math.log(2))]


def test_parquet_gives_the_same_log_as_csv_whatever_its_types(tmp_path: Path) -> None:
    columns = 'timestamp = "at"\nstep = "n"\npurchased = "buy"'
    data = "visit,shown,hit,at,n,buy\n1,5|6,0|1,2024-05-01T10:00:00Z,0,0|1\n1,7,1,2024-05-01T11:00:00Z,1,\n"
    from_csv = imported(source(tmp_path / "csv", data, SLATES, columns=columns), tmp_path / "a")
    path = source(tmp_path / "parquet", "", SLATES.replace("log.csv", "log.parquet"), columns=columns)
    pl.DataFrame(
        {
            "visit": [1, 1],
            "shown": [[5, 6], [7]],
            "hit": [[0.0, 1.0], [1.0]],
            "at": [datetime(2024, 5, 1, 10), datetime(2024, 5, 1, 11)],
            "n": [0.0, 1.0],
            "buy": [[False, True], None],
        }
    ).write_parquet(path / "log.parquet")
    from_parquet = imported(path, tmp_path / "b")
    assert from_parquet.manifest.content_digest == from_csv.manifest.content_digest
    assert from_parquet.manifest.n_requests == 2


@pytest.mark.parametrize("scattered", [False, True])
def test_sessions_stay_whole_in_small_parts_wherever_their_rows_stand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scattered: bool
) -> None:
    monkeypatch.setattr(_reading, "ROWS_PER_PART", 4)
    lines = [f"v{visit},{visit}|{n},0|1,{n}" for visit in range(9) for n in range(1 + visit % 3)]
    if scattered:
        random.Random(0).shuffle(lines)
    data = "\n".join(["visit,shown,hit,n", *lines]) + "\n"

    log = imported(source(tmp_path / "in", data, SLATES, columns='step = "n"'), tmp_path / "out")

    assert len(log.part_paths) > 2
    parts = [part["session_id"].unique().to_list() for part in log.parts()]
    assert sorted(name for part in parts for name in part) == [f"v{visit}" for visit in range(9)]
    assert sorted(rows(log, "session_id", "step", "slate")) == [
        (f"v{visit}", n, [str(visit), str(n)]) for visit in range(9) for n in range(1 + visit % 3)
    ]


def test_a_single_value_is_a_list_of_one(tmp_path: Path) -> None:
    path = source(tmp_path / "in", "", SLATES.replace("log.csv", "log.parquet"))
    pl.DataFrame({"visit": ["v"], "shown": [7], "hit": [True]}).write_parquet(path / "log.parquet")
    assert rows(imported(path, tmp_path / "log"), "slate", "clicked") == [(["7"], [True])]


def test_the_path_may_be_the_file_and_the_mapping_may_lie_elsewhere(tmp_path: Path) -> None:
    path = source(tmp_path / "in", "", CLICKS.replace('file = "log.csv"', ""))
    (path / "clicks.tsv.gz").write_bytes(gzip.compress(b"visit\titem\n1\t9\n"))
    mapping = tmp_path / "elsewhere.toml"
    (path / "mapping.toml").rename(mapping)
    config = table.Config(mapping=mapping)
    assert table.import_log(config, path / "clicks.tsv.gz", tmp_path / "log", "shop").manifest.n_requests == 1
    with pytest.raises(InputError, match=r"elsewhere\.toml: log\.file: missing"):
        table.import_log(config, path, tmp_path / "log", "shop")


@pytest.mark.parametrize(
    ("data", "columns", "message"),
    [
        (
            "visit,shown\n1,a\n",
            "",
            "column 'hit' \\(mapped by columns.clicked\\) is missing; the file has \\['visit', ",
        ),
        (
            "visit,shown,hit\n1,a,1\n,b,0\n",
            "",
            "row 2, column 'visit' \\(mapped by columns.session_id\\): None; expected",
        ),
        (
            "visit,shown,hit\n1,a,1\n1,b,maybe\n",
            "",
            "row 2, column 'hit' \\(mapped by columns.clicked\\): 'maybe'; exp",
        ),
        ("visit,shown,hit\n1,a||b,1\n", "", "row 1, column 'shown' .*'a\\|\\|b'; expected values separated by '\\|'"),
        ("visit,shown,hit,n\n1,a,1,1.5\n", 'step = "n"', "row 1, column 'n' .*'1.5'; expected a whole number"),
        ("visit,shown,hit,at\n1,a,1,noon\n", 'timestamp = "at"', "row 1, column 'at' .*'noon'; expected an ISO 8601"),
        ("visit,shown,hit,e\n1,a,1,gone\n", 'session_end = "e"', "row 1, column 'e' .*'gone'; expected one of"),
        (
            "visit,shown,hit,e,t\n1,a,1,b|c,view\n",
            'events = "e"\nevent_types = "t"',
            "row 1, column 't' .*'view'; expected .*as many as in column 'e'",
        ),
        ("visit,shown,hit\n1,,\n", "", "column 'shown' \\(mapped by columns.slate\\) is empty in every row"),
        ("visit,shown,hit\n1,a,1,9\n", "", "log.csv: cannot be read.*expected whole UTF-8 delimited text"),
        ("", "", "log.csv: cannot be read: empty CSV"),
    ],
)
def test_a_bad_cell_or_column_is_named_with_the_key_that_maps_it(
    tmp_path: Path, data: str, columns: str, message: str
) -> None:
    path = source(tmp_path / "in", data, SLATES, columns=columns)
    with pytest.raises(InputError, match=message):
        imported(path, tmp_path / "log")
    assert [entry.name for entry in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        (
            SLATES.replace("clicked", "clickd"),
            "columns.clickd: unknown key; the keys here are .*'cl",
        ),
        (SLATES + "[extra]\nx = 1\n", "extra: unknown key; the keys here are \\['columns', 'context'"),
        (SLATES + '[context]\nd = {{ column = "hit", type = "numeric" }}\n', "context.d.kind: missing"),
        (SLATES + '[context]\nd = {{ column = "hit", kind = "text" }}\n', "context.d.kind: .*seen: 'text'"),
        (
            SLATES + '[context]\nd = {{ column = "hit", kind = "numeric", x = 1 }}\n',
            "context.d.x: unknown.*'column', 'k",
        ),
        (SLATES.replace('"slates"', '"guesses"'), "log.evidence: .*seen: 'guesses'"),
        (SLATES.replace('session_id = "visit"', ""), "columns.session_id: missing"),
        (SLATES.replace('"slates"', '"propensities"'), "columns: neither mapped; evidence 'propensities' needs"),
        (
            SLATES.replace('"slates"', '"propensities"') + 'slate_log_prob = "lp"',
            "columns.candidates: missing; evidence 'propensities' needs",
        ),
        (SLATES + 'slate_log_prob = "lp"', "columns.slate_log_prob: mapped, but evidence 'slates' has none"),
        (SLATES + 'position_log_probs = "lp"', "columns.position_log_probs: mapped, but evidence 'slates' has none"),
        (SLATES.replace('clicked = "hit"', ""), "columns.clicked: missing"),
        (SLATES.replace('slate = "shown"', ""), "columns.slate: missing"),
        (CLICKS + 'clicked = "hit"', "columns.clicked: mapped, but evidence 'clicks' means that there are no slates"),
        (CLICKS.replace('events = "item"', ""), "columns.events: missing"),
        (SLATES + 'event_types = "hit"', "columns.event_types: mapped without columns.events"),
        (
            SLATES + "[reward]\nweights = {{ liked = 1.0 }}\n",
            "reward.weights: \\['liked'\\] are no signals of this log",
        ),
        (SLATES + "[columns]\n", "cannot be read as TOML: .*line"),
    ],
)
def test_a_wrong_mapping_is_refused_by_key(tmp_path: Path, mapping: str, message: str) -> None:
    path = source(tmp_path / "in", "visit,shown,hit,item\n1,a,1,a\n", mapping)
    with pytest.raises(InputError, match=f"mapping.toml: {message}"):
        imported(path, tmp_path / "log")


def test_a_missing_mapping_data_file_or_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="absent: no such file or folder"):
        imported(tmp_path / "absent", tmp_path / "log")
    path = source(tmp_path / "in", "", SLATES)
    (path / "log.csv").unlink()
    with pytest.raises(InputError, match=r"log\.csv: no such file"):
        imported(path, tmp_path / "log")
    (path / "mapping.toml").unlink()
    with pytest.raises(InputError, match=r"mapping\.toml: no such file"):
        imported(path, tmp_path / "log")


def test_an_item_listed_twice_in_the_catalog_is_named(tmp_path: Path) -> None:
    items = '[items]\nfile = "items.csv"\nitem_id = "sku"\n'
    path = source(tmp_path / "in", "visit,shown,hit\n1,a,1\n", SLATES + items)
    (path / "items.csv").write_text("sku\nb\na\na\n")
    with pytest.raises(
        InputError, match=r"items\.csv: row 2, column 'sku' \(mapped by items\.item_id\): 'a'; expected"
    ):
        imported(path, tmp_path / "log")


def test_an_item_outside_the_catalog_is_imported_for_validation_to_find(tmp_path: Path) -> None:
    items = '[items]\nfile = "items.csv"\nitem_id = "sku"\n'
    path = source(tmp_path / "in", "visit,shown,hit\n1,a,1\n", SLATES + items)
    (path / "items.csv").write_text("sku\nb\n")
    log = imported(path, tmp_path / "log")
    assert rows(log, "slate") == [(["a"],)]
    assert log.items()["item_id"].to_list() == ["b"]


START = datetime(2024, 5, 1, tzinfo=UTC)
ITEMS = ["a", "b c", "d,e", 'f"g', "é", "7"]


@st.composite
def logged_sessions(draw: st.DrawFn) -> list[dict[str, object]]:
    """Requests in row order as the contract should have them, with distinct times inside a session."""
    names = draw(st.lists(st.text('xy ,"é7', min_size=1, max_size=4), min_size=1, max_size=4, unique=True))
    requests = []
    for session_id in sorted(names):
        minute = draw(st.integers(0, 300))
        for step in range(draw(st.integers(1, 4))):
            minute += draw(st.integers(1, 40))
            candidates = draw(st.permutations(ITEMS))
            slate = candidates[: draw(st.integers(1, 4))]
            requests.append(
                {
                    "session_id": session_id,
                    "step": step,
                    "timestamp": START + timedelta(minutes=minute),
                    "candidates": candidates,
                    "slate": slate,
                    "slate_log_prob": draw(st.floats(-50, 0)),
                    "position_log_probs": draw(
                        st.none() | st.lists(st.floats(-50, 0), min_size=len(slate), max_size=len(slate))
                    ),
                    "clicked": draw(st.none() | st.lists(st.booleans(), min_size=len(slate), max_size=len(slate))),
                    "events": [{"type": "view", "item_id": item} for item in draw(st.lists(st.sampled_from(ITEMS)))],
                }
            )
    return requests


@settings(max_examples=30, deadline=None)
@given(requests=logged_sessions(), shuffle=st.randoms(use_true_random=False))
def test_any_log_written_as_csv_comes_back_as_the_same_rows(
    requests: list[dict[str, object]], shuffle: random.Random, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("round-trip")
    mapping = SLATES.replace('"slates"', '"propensities"')
    keys = (
        "session_id", "timestamp", "candidates", "slate", "slate_log_prob", "position_log_probs", "clicked", "events"
    )  # fmt: skip
    columns = "\n".join(f'{key} = "{key}"' for key in keys if key not in ("session_id", "slate", "clicked"))
    mapping = mapping.replace("visit", "session_id").replace("shown", "slate").replace('"hit"', '"clicked"')
    path = source(folder / "in", "", mapping, columns=columns)
    with (path / "log.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(keys)
        for request in shuffle.sample(requests, len(requests)):
            writer.writerow(
                [
                    request["session_id"],
                    request["timestamp"].isoformat(),
                    "|".join(request["candidates"]),
                    "|".join(request["slate"]),
                    repr(request["slate_log_prob"]),
                    "|".join(map(repr, request["position_log_probs"] or ())),
                    "" if request["clicked"] is None else "|".join(str(int(flag)) for flag in request["clicked"]),
                    "|".join(event["item_id"] for event in request["events"]),
                ]
            )
    last_seen = {request["session_id"]: request["timestamp"] for request in requests}
    steps = {request["session_id"]: request["step"] for request in requests}
    still_going = {name for name, time in last_seen.items() if max(last_seen.values()) - time < timedelta(minutes=30)}
    expected = [
        request
        | {
            "session_end": None
            if request["step"] < steps[request["session_id"]]
            else ("censored" if request["session_id"] in still_going else "left")
        }
        for request in requests
    ]
    log = imported(path, folder / "log")
    assert log.scan().select(expected[0].keys()).collect().to_dicts() == expected


def test_everything_that_an_import_reads_is_named(tmp_path: Path) -> None:
    folder = source(tmp_path / "in", "visit,shown,hit\na,y,1\n", SLATES)
    mapping = folder / "mapping.toml"
    mapping.write_text(mapping.read_text().replace("log.csv", "../elsewhere.csv"))
    assert folder.parent / "elsewhere.csv" in [file.resolve() for file in table.files_read(table.Config(), folder)]
