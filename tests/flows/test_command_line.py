"""The command line in this process; tests/end_to_end starts it in processes of its own."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from click.testing import Result
from ledger_entries import ab_result, ledger_entry
from typer.testing import CliRunner
from virtual_taobao_weights import PUBLISHED, published_weights

from components.interactions.log import InteractionLog, Recommended
from components.interactions.log_folder import Log, open_log
from flows.command_line import app
from flows.config import LoopConfig
from flows.ledger_store import add_entry
from flows.run_folder import mark_forgotten
from flows.run_record import RunSummary
from flows.serving_commands import serving_app

HEAVY = ("torch", "prefect", "great_expectations", "evidently", "bentoml", "polars", "dvc", "scipy", "matplotlib")


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(*arguments: str | Path) -> str:
    """What stderr says where a user's input is wrong."""
    answer = call(*arguments)
    assert answer.exit_code == 2, (answer.output, answer.exception)
    assert "Traceback" not in answer.stderr
    assert answer.stdout == ""
    assert answer.stderr.startswith("slateloop: ")
    return answer.stderr


def test_importing_the_command_line_imports_none_of_the_heavy_libraries() -> None:
    code = f"import sys, flows.command_line; print([name for name in {HEAVY} if name in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert answer.stdout.strip() == "[]"


def test_help_names_every_command_with_an_example() -> None:
    help_text = call("--help").output
    for command in [*app.registered_commands, *serving_app.registered_commands]:
        assert command.name is not None
        assert command.name in help_text
        assert f"Example: slateloop {command.name}" in " ".join(call(command.name, "--help").output.split())


def test_the_schema_describes_the_configuration_and_its_defaults_fit() -> None:
    answer = call("schema")
    assert answer.exit_code == 0
    schema = json.loads(answer.stdout)
    assert set(schema["properties"]) == set(LoopConfig.model_fields)
    assert set(schema["properties"]["source"]["discriminator"]["mapping"]) == {
        "storefront",
        "log",
        "movielens",
        "obd",
        "sessions",
        "table",
        "trivago",
        "virtual-taobao",
    }
    check_schema(LoopConfig().model_dump(mode="json"), schema, schema)


def check_schema(value: Any, schema: dict[str, Any], root: dict[str, Any]) -> None:
    """Keys, and types of plain values, as the schema says; enough of JSON Schema for what pydantic writes of ours."""
    if "$ref" in schema:
        schema = root["$defs"][schema["$ref"].rpartition("/")[2]]
    for choices in (schema.get("anyOf"), schema.get("oneOf")):
        if choices:
            kinds = [root["$defs"][part["$ref"].rpartition("/")[2]] if "$ref" in part else part for part in choices]
            fitting = [kind for kind in kinds if fits(value, kind)]
            assert fitting, (value, kinds)
            schema = fitting[0]
    assert fits(value, schema), (value, schema)
    if schema.get("type") == "object" and "properties" in schema:
        for key, part in value.items():
            check_schema(part, schema["properties"][key], root)


def fits(value: Any, schema: dict[str, Any]) -> bool:
    if "const" in schema:
        return bool(value == schema["const"])
    types = {"object": dict, "integer": int, "number": (int, float), "string": str, "null": type(None), "boolean": bool}
    if not isinstance(value, types.get(schema.get("type", ""), object)):  # type: ignore[arg-type]
        return False
    if schema.get("type") == "object" and "properties" in schema:
        properties = schema["properties"]
        same_name = "const" not in properties.get("name", {}) or properties["name"]["const"] == value.get("name")
        return same_name and set(value) <= set(properties)
    return bool(schema.get("minimum", value) <= value <= schema.get("maximum", value)) if value is not None else True


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "--set", "reinforce.gama=1"], ["unknown key 'reinforce.gama'", "gamma"]),
        (["run", "--as-of", "yesterday"], ["--as-of yesterday: expected a date", "2026-05-01T12:00:00Z"]),
        (["run", "--as-of", "2999-01-01"], ["as_of = 2999-01-01T23:59:59.999999+00:00: lies ahead"]),
        (["run", "--set", "as_of=2999-01-01T00:00:00Z"], ["as_of = 2999-01-01T00:00:00+00:00: lies ahead"]),
        (["import", "--source", "log", "--out", "x", "--set", "as_of=2999-01-01T00:00:00Z"], ["lies ahead"]),
        (["replay", "nothing"], ["run 'nothing': 0 runs in"]),
        (["run", "--set", "ab.sessions=1"], ["ab.sessions = 1", "greater than or equal to 100"]),
        (
            ["run", "--source", "shop"],
            ["unknown source", "'shop'", "storefront, log, movielens, obd, sessions, table, trivago"],
        ),
        (["run", "--source", "sessions"], ["'sessions' reads a file or folder", "--path"]),
        (["run", "--source", "trivago", "--path", "/no/where"], ["/no/where: no such file or folder"]),
        (["run", "--config", "/no/loop.toml"], ["/no/loop.toml: cannot be read: No such file"]),
        (["import", "--source", "table", "--out", "x"], ["'table' reads a file or folder", "--path"]),
        (["validate", "/no/where"], ["/no/where: no such folder; expected a log"]),
        (["evaluate", "--policy", "shop:1", "--log", "/no/where"], ["/no/where: no such folder; expected a log"]),
        (["show", "shop-1"], ["run 'shop-1'", "the runs are: none yet"]),
        (["data", "pin"], ["data: holds no data to pin", "slateloop run"]),
    ],
)
def test_wrong_input_ends_in_one_sentence_and_exit_code_2(arguments: list[str], words: list[str]) -> None:
    said = refused(*arguments)
    for word in words:
        assert word in said


@pytest.mark.parametrize("arguments", [["run", "--bogus"], ["dance"], ["import", "--out", "x"], ["show"]])
def test_a_wrong_call_is_wrong_input_too(arguments: list[str]) -> None:
    assert call(*arguments).exit_code == 2


@pytest.mark.parametrize(
    ("setting", "name"), [("--out", "RUNS"), ("SLATELOOP_HOME", "HOME"), ("SLATELOOP_DATA", "DATA")]
)
def test_an_output_that_cannot_be_written_is_named_with_its_setting(
    setting: str, name: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "file").touch()
    monkeypatch.setenv(f"SLATELOOP_{name}", str(place / "file" / "below"))
    said = refused("run")
    assert f"{place}/file/below: cannot be made" in said
    assert setting in said


def write_run(folder: Path, name: str, started: str) -> None:
    (folder / name).mkdir(parents=True)
    summary = {"run": name, "loop": "shop", "source": "table", "outcome": "hold", "folder": "/moved/away"}
    record = RunSummary.model_validate(summary | {"started": started})
    (folder / name / "run.json").write_text(record.model_dump_json())
    decision = {"outcome": "hold", "reasons": [{"check": "gain", "passed": False, "allows": "hold", "text": "None."}]}
    (folder / name / "decision.json").write_text(json.dumps(decision))
    for record_name in ("evidence", "lineage"):
        (folder / name / f"{record_name}.json").write_text("{}")


def test_runs_are_listed_oldest_first_without_those_that_are_not_whole(place: Path) -> None:
    write_run(place / "runs", "shop-2", "2026-01-02T00:00:00Z")
    write_run(place / "runs", "shop-10", "2026-01-01T00:00:00Z")
    write_run(place / "runs", ".shop-3.17.abcdef.tmp", "2026-01-03T00:00:00Z")
    (place / "runs" / "notes").mkdir()
    answer = call("runs", "--json")
    assert [run["run"] for run in json.loads(answer.stdout)] == ["shop-10", "shop-2"]
    assert "shop-10" in call("runs").stdout


def test_a_run_is_shown_by_its_name_or_a_beginning_that_fits_no_other(place: Path) -> None:
    write_run(place / "runs", "shop-1", "2026-01-01T00:00:00Z")
    write_run(place / "runs", "shop-12", "2026-01-02T00:00:00Z")
    assert json.loads(call("show", "shop-1", "--json").stdout)["run"]["run"] == "shop-1"
    assert json.loads(call("show", "shop-12", "--json").stdout)["run"]["run"] == "shop-12"
    assert "HOLD" in call("show", "shop-1").stdout
    assert "2 runs in" in refused("show", "shop")
    assert "the runs are: shop-1, shop-12" in refused("show", "other")


def test_a_run_that_can_be_replayed_no_more_is_marked_wherever_it_is_shown(place: Path) -> None:
    write_run(place / "runs", "shop-1", "2026-01-01T00:00:00Z")
    write_run(place / "runs", "shop-2", "2026-01-02T00:00:00Z")
    assert "Not replayable" not in call("show", "shop-1").stdout + call("runs").stdout
    mark_forgotten(place / "runs" / "shop-1", 2, datetime(2026, 5, 1, tzinfo=UTC))
    mark_forgotten(place / "runs" / "shop-1", 1, datetime(2026, 5, 2, tzinfo=UTC))
    assert (
        "Not replayable: rows of 3 users were deleted from its data, last on 2026-05-02"
        in call("show", "shop-1").stdout
    )
    assert "Not replayable" not in call("show", "shop-2").stdout
    marks = [run["forgotten"] for run in json.loads(call("runs", "--json").stdout)]
    assert marks == [{"users": 3, "at": "2026-05-02T00:00:00Z"}, None]
    assert "Not replayable" in " ".join(call("runs").stdout.split())
    assert json.loads(call("show", "shop-1", "--json").stdout)["lineage"]["forgotten"] == marks[0]


def test_a_damaged_summary_is_named(place: Path) -> None:
    write_run(place / "runs", "shop-1", "2026-01-01T00:00:00Z")
    (place / "runs" / "shop-1" / "run.json").write_text('{"run": 1')
    assert "shop-1/run.json: is no run's summary" in refused("runs")


def test_the_ledger_is_shown_and_a_later_ab_recorded_in_it(place: Path) -> None:
    assert call("ledger").stdout == "The ledger is empty: each run makes an entry.\n"
    for day in (0, 1):
        add_entry(place / "home", ledger_entry(day))
    assert "No A/B has followed 2 of the predictions yet." in call("ledger").stdout
    (place / "ab.json").write_text(ab_result(0.3).model_dump_json())
    assert call("record-ab", "shop-0", place / "ab.json").stdout == "shop-0: live A/B recorded, improvement\n"
    text = call("ledger").stdout
    assert "shop, storefront, clicks version 1" in text
    assert "A/Bs, live: 1 sound" in text
    assert "No A/B has followed 1 of the predictions yet." in text
    document = json.loads(call("ledger", "--json").stdout)
    assert [entry["run"] for entry in document["entries"]] == ["shop-0", "shop-0", "shop-1"]
    assert [label["n"] for label in document["summaries"][0]["labels"]] == [1]


def test_an_ab_that_does_not_fit_and_a_damaged_ledger_are_refused(place: Path) -> None:
    file = add_entry(place / "home", ledger_entry())
    (place / "ab.json").write_text(ab_result(0.3, treatment="cem").model_dump_json())
    assert "ab.json: treatment: is 'cem'; expected 'reinforce'" in refused("record-ab", "shop-0", place / "ab.json")
    assert "run 'other': 0 runs of the ledger begin so" in refused("record-ab", "other", place / "ab.json")
    file.write_text("{")
    assert "shop-0/no-ab/entry.json: document: Invalid JSON" in refused("ledger")


@pytest.fixture
def log(storefront_log: Log, tmp_path: Path) -> Path:
    """A log of one's own, to be damaged."""
    return shutil.copytree(storefront_log.path, tmp_path / "log")


def part(log: Path) -> Path:
    return sorted((log / "requests").glob("*.parquet"))[0]


def rewrite(log: Path, change: Callable[[pl.DataFrame], pl.DataFrame]) -> None:
    change(pl.read_parquet(part(log))).write_parquet(part(log))


def bad_rows(rows: pl.DataFrame) -> pl.DataFrame:
    """Six first requests of sessions are made bad, each in a way of its own."""
    place = pl.int_range(pl.len()).over("session_id") + pl.lit(0)
    first = pl.col("session_id").rle_id()

    def at(session: int) -> pl.Expr:
        return (first == session) & (place == 0)

    slate, item = pl.col("slate"), pl.col("slate").list.first()
    return rows.with_columns(
        slate=pl.when(at(0))
        .then(pl.concat_list(pl.lit("no-such-item"), slate.list.tail(3)))
        .when(at(1))
        .then(pl.concat_list(item, slate.list.head(3)))
        .otherwise(slate),
        slate_log_prob=pl.when(at(2)).then(float("nan")).when(at(3)).then(0.5).otherwise("slate_log_prob"),
        clicked=pl.when(at(4)).then(pl.concat_list("clicked", pl.lit(True))).otherwise("clicked"),
        step=pl.when(at(5)).then(pl.lit(7, pl.Int32)).otherwise("step"),
    )


REASONS = {
    "slate_item_unknown",
    "slate_repeats_an_item",
    "slate_log_prob_invalid",
    "feedback_off_slate",
    "step_gap",
}


def test_few_bad_rows_go_into_the_quarantine_each_with_its_reason(log: Path, tmp_path: Path) -> None:
    rewrite(log, bad_rows)
    answer = call(
        "validate", log, "--out", tmp_path / "checks", "--set", "validation.max_quarantined_share=0.02", "--json"
    )
    assert answer.exit_code == 0, answer.output
    checks = json.loads(answer.stdout)
    assert REASONS <= set(checks["quarantine_reasons"])
    assert checks["quarantine_reasons"]["slate_log_prob_invalid"] == 2
    quarantined = pl.read_parquet(tmp_path / "checks" / "quarantine" / "rows.parquet")
    assert quarantined.height == checks["n_quarantined"]
    assert set(quarantined["reasons"].explode()) >= REASONS
    assert open_log(tmp_path / "checks" / "log").manifest.n_requests == checks["n_requests"] - quarantined.height


def test_too_many_bad_rows_stop_with_examples_and_leave_what_was_found(log: Path, tmp_path: Path) -> None:
    rewrite(log, bad_rows)
    said = refused("validate", log, "--out", tmp_path / "checks", "--set", "validation.max_quarantined_share=0")
    assert re.search(r"log: \d+ of \d+ rows .* are bad; max_quarantined_share allows 0\.00%", said)
    assert "slate_log_prob_invalid: 2 rows, such as request" in said
    assert f"What was found is in {tmp_path / 'checks'}" in said
    assert (tmp_path / "checks" / "data_docs" / "index.html").is_file()
    assert "is not empty; choose another --out" in refused("validate", log, "--out", tmp_path / "checks")


def test_a_whole_log_passes_and_the_page_is_named(log: Path) -> None:
    answer = call("validate", log)
    assert answer.exit_code == 0, answer.output
    assert "0 put aside" in answer.stdout
    assert (log.parent / "log-checks" / "data_docs" / "index.html").is_file()


def test_the_storefronts_log_is_imported_and_told_of(tmp_path: Path) -> None:
    sizes = ["--set", "source.n_sessions=150", "--set", "source.n_users=60"]
    answer = call("import", "--source", "storefront", "--out", tmp_path / "log", *sizes)
    assert answer.exit_code == 0, answer.output
    assert f"{open_log(tmp_path / 'log').manifest.n_requests:,} requests, evidence: propensities" in answer.stdout
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "precious.txt").touch()
    assert "is not empty and holds no log" in refused("import", "--source", "storefront", "--out", tmp_path / "notes")
    below = tmp_path / "notes" / "precious.txt" / "log"
    assert "cannot be written" in refused("import", "--source", "storefront", "--out", below, *sizes)


def test_json_is_the_only_thing_on_stdout(tmp_path: Path) -> None:
    answer = call(
        "import", "--source", "storefront", "--out", tmp_path / "log", "--set", "source.n_sessions=150", "--json"
    )
    assert json.loads(answer.stdout)["source"] == "storefront"


PLAN = ["plan-ab", "--effect", "0.1", "--mean", "2", "--sd", "3", "--users-per-day", "100"]


def test_an_ab_is_planned_from_numbers() -> None:
    plan = json.loads(call(*PLAN, "--json").stdout)
    # (1.8808 + 0.8416)² · 9 · 2 · (1.1² + 1) / 0.2² = 7,370.8 users; 1.96 times as many where one may look every day.
    assert plan["fixed"] == {"users": 7_372, "treatment_users": 3_686, "control_users": 3_686, "days": 74}
    assert plan["inflation"] == pytest.approx(1.96, abs=0.01)
    shown = call(*PLAN).stdout
    for words in ("7,372", "looked at any day", "1.96 times the users"):
        assert words in shown
    assert "together" not in shown


def test_an_ab_is_planned_from_a_log_and_options_come_before_it(storefront_log: Log) -> None:
    log = ("plan-ab", "--effect", "0.1", "--log", storefront_log.path, "--json")
    plan = json.loads(call(*log).stdout)
    assert [part["metric"] for part in plan["guardrails"]] == [
        "session_length", "clicks", "purchases", "first_request_exits"
    ]  # fmt: skip
    assert plan["together"]["users"] >= max(part["test"]["users"] for part in plan["guardrails"])
    busier = json.loads(call(*log, "--users-per-day", "1000", "--mean", "9").stdout)
    assert (busier["design"]["users_per_day"], busier["baseline"]["mean"]) == (1_000, 9)
    assert busier["baseline"]["standard_deviation"] == plan["baseline"]["standard_deviation"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], ["--mean, --sd, --users-per-day: expected a value"]),
        (["--mean", "2", "--sd", "3", "--users-per-day", "0"], ["--users-per-day 0.0: input should be greater than 0"]),
        (["--mean", "2", "--sd", "3", "--users-per-day", "9", "--share", "1"], ["--share 1.0", "less than 1"]),
        (["--mean", "-2", "--sd", "3", "--users-per-day", "9"], ["mean: -2; expected a mean reward above 0"]),
        (["--mean", "nan", "--sd", "3", "--users-per-day", "9"], ["--mean nan: input should be a finite number"]),
        (["--log", "/no/where"], ["/no/where: no such folder; expected a log"]),
    ],
)
def test_a_plan_that_cannot_be_made_says_what_is_missing_or_wrong(options: list[str], words: list[str]) -> None:
    said = refused("plan-ab", "--effect", "0.1", *options)
    for word in words:
        assert word in said


def test_the_interaction_log_is_imported_from_the_endpoint_s_database(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = f"sqlite:///{place / 'elsewhere.db'}"
    log = InteractionLog(database)
    log.upgrade()
    shown = Recommended(
        "r1", "shop", "u1", None, 0, ("a", "b"), False, ("b",), (-0.7,), (), {}, "p:1", "champion", 1, question=""
    )
    log.write([[shown, replace(shown, request_id="r2", user_id="u2", shown_at=10**12)]])
    monkeypatch.setenv("SLATELOOP_DATABASE", database)
    answer = call("import", "--source", "log", "--out", str(place / "log"))
    assert answer.exit_code == 0, answer.output
    assert "1 requests, evidence: propensities" in answer.output
    monkeypatch.delenv("SLATELOOP_DATABASE")
    again = call("import", "--source", "log", "--path", str(place / "elsewhere.db"), "--out", str(place / "again"))
    assert again.exit_code == 0, again.output
    assert open_log(place / "again").manifest == open_log(place / "log").manifest


def test_without_an_interaction_log_there_is_nothing_to_import(place: Path) -> None:
    (place / "empty.db").touch()
    said = refused("import", "--source", "log", "--path", str(place / "empty.db"), "--out", str(place / "log"))
    assert "holds no interaction log; serve a policy first" in said


def test_a_token_is_printed_once_and_listed_without_it(place: Path) -> None:
    made = call("token", "create", "shop", "--scope", "recommend", "--scope", "feedback")
    assert made.exit_code == 0, made.output
    secret = made.stdout.strip()
    assert secret.startswith("slateloop_")
    assert "not shown again" in made.stderr
    listed = call("token", "list")
    assert "shop" in listed.stdout and "recommend, feedback" in listed.stdout
    (token,) = json.loads(call("token", "list", "--json").stdout)
    assert (token["name"], token["scopes"]) == ("shop", ["recommend", "feedback"])
    for output in (listed.stdout, json.dumps(token), (place / "home" / "tokens.json").read_text()):
        assert secret not in output
    assert "is there already" in refused("token", "create", "shop", "--scope", "release")
    assert call("token", "revoke", "shop").stdout == "shop: revoked\n"
    assert "'shop': is unknown; the tokens are []" in refused("token", "revoke", "shop")


def test_tokens_are_kept_where_the_setting_says(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLATELOOP_TOKENS", str(place / "elsewhere" / "t.json"))
    call("token", "create", "shop", "--scope", "release")
    assert (place / "elsewhere" / "t.json").exists()
    assert "Input should be 'recommend', 'feedback' or 'release'" in refused("token", "create", "x", "--scope", "all")


def test_a_load_test_tells_what_it_found() -> None:
    arguments = ("load-test", "--url", "http://127.0.0.1:9", "--rate", "50", "--seconds", "0.1")
    table = call(*arguments)
    assert table.exit_code == 0 and "no answer" in table.stdout
    assert json.loads(call(*arguments, "--json").stdout)["statuses"] == {"no answer": 5}
    assert "expected http://HOST:PORT" in refused("load-test", "--url", "nowhere")


TAOBAO = ("--source", "virtual-taobao", "--path", PUBLISHED)


def test_a_log_of_actions_is_imported_and_validated(tmp_path: Path) -> None:
    published_weights()
    settings = ("--set", "source.policy=uniform", "--set", "source.n_sessions=200")

    made = call("import", *TAOBAO, *settings, "--out", tmp_path / "log")
    checked = call("validate", tmp_path / "log")

    assert "requests, evidence: propensities" in made.stdout
    assert "draws each of the 27 numbers from [-1, 1]" in made.stdout
    assert checked.exit_code == 0, checked.output
    assert ", 0 put aside" in checked.stdout
    assert "warning" not in checked.stderr
    assert call("plan-ab", "--log", tmp_path / "log", "--effect", "0.05").exit_code == 0
    assert "expected a log of slates" in refused("evaluate", "--policy", tmp_path, "--log", tmp_path / "log")


@pytest.mark.parametrize("command", ["up", "deploy"])
def test_what_needs_the_endpoint_refuses_a_loop_of_actions(command: str, tmp_path: Path) -> None:
    config = tmp_path / "loop.toml"
    config.write_text('[source]\nname = "virtual-taobao"\n')

    told = refused(command, "--config", config)

    assert told.startswith("slateloop: source 'virtual-taobao' logs actions of continuous numbers")
    assert "`slateloop run` learns and judges a policy of actions, and nothing serves it" in told


def test_a_device_on_which_nothing_can_learn_is_refused(tmp_path: Path) -> None:
    assert "device = 'cuda': a loop of slates learns on the CPU" in refused("run", "--set", "device=cuda")
    absent = next((name for name in ("cuda", "mps") if not getattr(torch, name).is_available()), None)
    if absent is not None:
        told = refused("run", *TAOBAO[:2], "--path", tmp_path, "--set", f"device={absent}")
        assert f"device = '{absent}': torch finds no such device on this machine" in told


def test_weights_that_are_not_there_are_named(tmp_path: Path) -> None:
    told = refused("import", *TAOBAO[:2], "--path", tmp_path, "--out", tmp_path / "log")

    assert f"{tmp_path}/generator_model.pt: no such file" in told
    assert not (tmp_path / "log").exists()
