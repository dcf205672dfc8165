"""The whole loop, its parts as they are, on a very small shop."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import polars as pl
import pytest
from bento_server import asked_again, release, served
from click.testing import Result
from slateloop_process import LEARN_LITTLE, SMALL_SHOP, STAGES, Answer, Place
from typer.testing import CliRunner

from components.interactions.log_folder import Log
from components.policies.policy_folder import load_policy

POLICY = Path("policies/reinforce/policy.safetensors")


def run_folder(answer: Answer) -> Path:
    return Path(answer.document["run"]["folder"])


def test_a_run_comes_to_a_decision_and_leaves_one_whole_folder(first_run: Answer, shop: Place) -> None:
    assert first_run.code == 0, first_run.errors
    assert first_run.document["decision"]["outcome"] in ("hold", "canary", "promote")
    assert first_run.document["decision"]["reasons"]
    assert first_run.stages("done") == list(STAGES)
    assert {path.name for path in run_folder(first_run).iterdir()} == {
        *(f"{name}.json" for name in ("run", "decision", "evidence", "lineage")),
        *("report.html", "policies", "data_docs", "quarantine", "drift_reference"),
    }
    assert run_folder(first_run).parent == shop.root / "runs"
    assert (run_folder(first_run) / POLICY).is_file()
    assert (shop.root / "data" / "storefront" / "manifest.json").is_file()
    assert shop.half_written() == []


def test_stderr_tells_the_stages_and_nothing_else(first_run: Answer) -> None:
    assert [line.split()[0] for line in first_run.errors.splitlines()] == list(STAGES)


def test_the_report_needs_nothing_but_its_folder(first_run: Answer) -> None:
    page = (run_folder(first_run) / "report.html").read_text()
    assert first_run.document["decision"]["outcome"].upper() in page.upper()
    for target in re.findall(r'(?:src|href)="([^"]*)"', page):
        if target.startswith(("#", "data:")):
            continue
        assert "//" not in target
        assert (run_folder(first_run) / target.partition("#")[0]).exists(), target


def test_the_lineage_says_what_the_policy_was_made_from(first_run: Answer) -> None:
    lineage = first_run.document["lineage"]
    assert set(lineage["stages"]) == set(STAGES)
    assert (lineage["seed"], lineage["threads"], lineage["reused"]) == (0, 1, [])
    assert lineage["config"]["source"]["n_sessions"] == 800
    for name in ("data_digest", "code_digest", "lock_digest", "policy_digest"):
        assert len(lineage[name]) == 64


def test_the_shops_ab_knows_its_users_past_and_guards_what_they_do(first_run: Answer) -> None:
    ab = first_run.document["evidence"]["ab"]
    assert ab["adjustment"]["known_share"] > 0.8
    assert ab["adjustment"]["variance_ratio"] < 1.05
    assert len(ab["guardrails"]) == 4
    last = ab["sequence"]["looks"][-1]
    assert (last["day"], last["n_sessions"], ab["sequence"]["planned_sessions"]) == (10, 400, 400)
    assert last["difference"] == pytest.approx(ab["adjustment"]["unadjusted_difference"])
    # Nobody could act on what is simulated in one go.
    assert not ab["looked_early"]


def test_the_same_command_without_a_server_reuses_every_stage_and_comes_to_the_same_result(
    first_run: Answer, shop: Place
) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    # What a run leaves that computes a finished stage anew and is killed.
    (shop.root / "home" / "stages" / "user-model" / f".a-key.{gone.pid}.0a1b2c.tmp").mkdir()
    again = replace(shop, api=None).call("run", "--config", "loop.toml", "--json")
    assert again.stages("reused") == list(STAGES)
    assert again.document["lineage"]["reused"] == list(STAGES)
    assert again.document["lineage"]["policy_digest"] == first_run.document["lineage"]["policy_digest"]
    assert again.document["decision"] == first_run.document["decision"]
    assert shop.half_written() == []
    # What is reused is observed once, however many runs show it.
    for answer in (first_run, again):
        (label,) = answer.document["evidence"]["ledger"]["labels"]
        assert (label["label"], label["n"]) == ("true simulator", 1)
        assert {point["run"] for score in label["scores"] for point in score["points"]} == {
            answer.document["run"]["run"]
        }


@pytest.mark.slow
def test_in_another_home_and_without_a_server_the_weights_are_the_same_bytes(first_run: Answer, tmp_path: Path) -> None:
    place = Place(tmp_path / "other")
    place.write("loop.toml", SMALL_SHOP + LEARN_LITTLE)
    other = place.call("run", "--config", "loop.toml", "--json")
    assert other.stages("done") == list(STAGES)
    assert other.document["lineage"]["stages"] == first_run.document["lineage"]["stages"]
    assert (run_folder(other) / POLICY).read_bytes() == (run_folder(first_run) / POLICY).read_bytes()


@pytest.fixture
def shown(first_run: Answer, prefect_api: str) -> Callable[..., list[dict[str, Any]]]:
    """What the server knows of the first run, by the kind of thing."""

    def ask(what: str, **question: Any) -> list[dict[str, Any]]:
        answer = httpx.post(f"{prefect_api}/{what}/filter", json={"limit": 200} | question, timeout=30)
        answer.raise_for_status()
        found: list[dict[str, Any]] = answer.json()
        return found

    runs = ask("flow_runs", sort="START_TIME_ASC", flows={"name": {"any_": ["retraining"]}})
    run = next(run for run in runs if run["start_time"][:16] == first_run.document["run"]["started"][:16])
    assert run["state_type"] == "COMPLETED"
    assert run["parameters"]["config"]["source"]["n_sessions"] == 800
    # Lines of the log are asked for in their own way: the server would pass over `flow_runs` and tell of every run.
    own = {"flow_runs": {"id": {"any_": [run["id"]]}}, "logs": {"flow_run_id": {"any_": [run["id"]]}}}
    return lambda what, **question: ask(what, **(own | question))


def test_the_server_shows_the_runs_stages_by_their_names(shown: Callable[..., list[dict[str, Any]]]) -> None:
    assert {task["name"]: task["state_type"] for task in shown("task_runs")} == dict.fromkeys(STAGES, "COMPLETED")
    progress = {artifact["key"] for artifact in shown("artifacts") if artifact["type"] == "progress"}
    assert progress == {f"{stage}-progress" for stage in STAGES}


def test_the_server_shows_one_text_of_the_run_with_the_decision_on_top(
    shown: Callable[..., list[dict[str, Any]]], first_run: Answer
) -> None:
    artifacts = {artifact["key"]: artifact for artifact in shown("artifacts") if artifact["type"] != "progress"}
    assert set(artifacts) == {"shop-run", "shop-estimates", "shop-ab-test", "shop-history", "shop-report"}
    document = first_run.document
    text = artifacts["shop-run"]["data"]
    assert document["decision"]["outcome"].upper() in text.splitlines()[0]
    for said in (document["run"]["run"], document["lineage"]["policy_tag"], document["lineage"]["baseline_tag"]):
        assert said in text
    for reason in document["decision"]["reasons"]:
        assert (reason["check"] if reason["passed"] else reason["text"]) in text
    for stage in STAGES:
        assert f"\n| {stage} | " in text
    for page in re.findall(r"`file://([^`]*)`", text):
        assert Path(page).exists(), page
    assert "Woken by" not in text
    estimates = json.loads(artifacts["shop-estimates"]["data"])
    assert [row["estimator"] for row in estimates] == [
        estimate["estimator"] for estimate in document["evidence"]["estimates"]
    ]
    assert json.loads(artifacts["shop-ab-test"]["data"])[0]["metric"] == "reward of a session"
    history = json.loads(artifacts["shop-history"]["data"])
    assert (history[0]["run"], history[0]["policy"]) == (document["run"]["run"], document["lineage"]["policy_tag"])
    assert f"{document['run']['folder']}/report.html" in artifacts["shop-report"]["data"]


def test_the_server_has_a_line_of_each_stages_beginning_and_of_what_came_of_it(
    shown: Callable[..., list[dict[str, Any]]],
) -> None:
    lines = [line["message"] for line in shown("logs", sort="TIMESTAMP_ASC")]
    told = [line for line in lines if line.partition(":")[0] in STAGES]
    for stage, (begins, done) in zip(STAGES, zip(told[::2], told[1::2], strict=True), strict=True):
        assert begins == f"{stage}: begins"
        assert re.match(rf"{stage}: done in [\d.]+.(s|min \d\d.s), .+", done), done
    assert any(re.match(r"validate: done in .*, [\d,]+ requests, \d+ put aside$", line) for line in told)


def test_the_library_reproduces_the_log_prob_of_a_slate_served_by_the_loops_bento(
    first_run: Answer, shop: Place, tmp_path: Path
) -> None:
    lineage = first_run.document["lineage"]
    items = pl.read_parquet(shop.root / "data" / "storefront" / "items.parquet")["item_id"].to_list()
    body: dict[str, Any] = {
        "loop": "shop",
        "user_id": "somebody",
        "candidates": [*items[:12], "an-item-of-tomorrow"],
        "past_requests": [{"slate": items[:4], "clicked": [True, False, False, False]}],
    }
    stored = load_policy((run_folder(first_run) / POLICY).parent)
    release(f"sqlite:///{tmp_path / 'interactions.db'}", lineage["policy_tag"])
    variables = {"SLATELOOP_HOME": str(tmp_path)}
    with served(lineage["bento_tag"], shop.root / "home" / "bentoml", tmp_path, variables) as address:
        answer = httpx.post(f"{address}/recommend", json=body, timeout=30)
    assert answer.status_code == 200, answer.text
    told = answer.json()
    assert (told["arm"], told["policy"]) == ("champion", lineage["policy_tag"])
    assert told["log_prob"] == pytest.approx(asked_again(stored, body, told["slate"]), abs=1e-5)


@pytest.fixture
def evaluate() -> Iterator[Callable[[Path, Path], Result]]:
    """`slateloop evaluate` in this process, whose environment is as before when the test ends."""
    from flows.command_line import app

    before = dict(os.environ)
    yield lambda policy, log: CliRunner().invoke(app, ["evaluate", "--policy", str(policy), "--log", str(log)])
    os.environ.clear()
    os.environ.update(before)


def test_the_runs_policy_is_evaluated_on_a_log(
    first_run: Answer, shop: Place, evaluate: Callable[[Path, Path], Result]
) -> None:
    answer = evaluate((run_folder(first_run) / POLICY).parent, shop.root / "data" / "storefront")
    assert answer.exit_code == 0, answer.output
    assert "reinforce, one-request NCIS, one_request, cascade: " in answer.stdout


def test_a_truncated_policy_is_refused_by_name(
    first_run: Answer, shop: Place, tmp_path: Path, evaluate: Callable[[Path, Path], Result]
) -> None:
    folder = shutil.copytree((run_folder(first_run) / POLICY).parent, tmp_path / "policy")
    (folder / POLICY.name).write_bytes((folder / POLICY.name).read_bytes()[:500])
    answer = evaluate(folder, shop.root / "data" / "storefront")
    assert answer.exit_code == 2
    assert "policy.safetensors: does not fit policy.json" in answer.stderr
    (folder / POLICY.name).unlink()
    assert (
        "holds no policy; expected policy.json and policy.safetensors"
        in evaluate(folder, shop.root / "data" / "storefront").stderr
    )


def test_on_a_log_without_probabilities_no_value_is_claimed(
    first_run: Answer, corner_log: Log, evaluate: Callable[[Path, Path], Result]
) -> None:
    answer = evaluate((run_folder(first_run) / POLICY).parent, corner_log.path)
    assert answer.exit_code == 0, answer.output
    assert answer.stdout.startswith("reinforce: not identified. ")
