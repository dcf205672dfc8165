"""The loop on logs of Virtual Taobao: from actions to a decision, by the command line and a real Prefect server."""

import json
from pathlib import Path

import pytest
from slateloop_process import Answer, Place
from virtual_taobao_weights import published_weights, write_random_weights

STAGES = [
    "import-data",
    "data-version",
    "validate",
    "split",
    "world-model",
    "policy",
    "baseline",
    "estimates",
    "probes",
    "ab-test",
    "gate",
]
#: Budgets so small that the loop takes seconds; what it learns is worth nothing.
LITTLE = """
[source]
name = "virtual-taobao"
action = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
n_sessions = 1_500
[action_model]
max_epochs = 2
hidden = [32]
[ppo]
steps = 4_096
sessions = 256
hidden = [16]
[constant_cem]
steps = 2_000
population = 8
elite = 2
sessions = 20
mean_sessions = 20
users = 40
[ab]
sessions = 400
"""


@pytest.fixture(scope="module")
def taobao(tmp_path_factory: pytest.TempPathFactory, prefect_api: str) -> Place:
    place = Place(tmp_path_factory.mktemp("taobao"), prefect_api)
    place.write("loop.toml", LITTLE)
    write_random_weights(place.root / "weights")
    return place


@pytest.fixture(scope="module")
def run(taobao: Place) -> Answer:
    return taobao.call("run", "--config", "loop.toml", "--path", "weights", "--json")


def test_a_log_of_actions_ends_in_a_decision_with_its_evidence(run: Answer, taobao: Place) -> None:
    assert run.code == 0, run.errors
    assert run.stages("done") == STAGES
    assert run.document["decision"]["outcome"] in ("hold", "canary", "promote")
    evidence, lineage = run.document["evidence"], run.document["lineage"]
    assert [estimate["policy"] for estimate in evidence["estimates"]] == ["ppo", "ppo", "constant", "constant"]
    assert {probe["policy"] for probe in evidence["probes"]["probes"]} == {
        *("ppo", "ppo as trained", "ppo at 0.25", "ppo at 0.5", "constant", "constant as trained"),
        *("logged actions", "random"),
    }
    assert evidence["ab"]["label"] == "true simulator"
    assert (lineage["policy_tag"], lineage["bento_tag"]) == (None, None)
    folder = Path(run.document["run"]["folder"])
    assert sorted(path.name for path in (folder / "policies").iterdir()) == ["constant", "ppo"]
    page = (folder / "report.html").read_text()
    assert "this policy of actions was not packaged" in page
    assert "its actions lie farther out than 99 of 100 logged ones" in page
    assert "bentoml serve" not in page
    assert taobao.half_written() == []


@pytest.mark.slow
def test_the_same_command_reuses_every_stage_and_a_replay_comes_to_the_same(run: Answer, taobao: Place) -> None:
    again = taobao.call("run", "--config", "loop.toml", "--path", "weights", "--json")

    assert again.stages("reused") == STAGES
    assert again.document["decision"] == run.document["decision"]
    assert again.document["lineage"]["policy_digest"] == run.document["lineage"]["policy_digest"]

    answer = taobao.call("replay", run.document["run"]["run"], "--json")

    assert answer.code == 0, answer.errors
    compared = {part["what"]: part["equal"] for part in json.loads(answer.output)["compared"]}
    results = ["data", "policy ppo", "policy constant", "gating estimate", "estimates", "A/B", "decision"]
    assert compared == dict.fromkeys(results, True)


def test_a_run_of_actions_is_shown_again(run: Answer, taobao: Place) -> None:
    shown = taobao.call("show", run.document["run"]["run"])

    assert shown.code == 0, shown.errors
    assert run.document["decision"]["outcome"].upper() in shown.output
    assert "Bento" not in shown.output


@pytest.mark.slow
@pytest.mark.timeout(1_800)
def test_what_exploits_the_world_model_is_held_with_that_reason_and_what_the_log_supports_is_not(
    prefect_api: str, tmp_path: Path
) -> None:
    place = Place(tmp_path / "taobao", prefect_api)
    command = ("run", "--source", "virtual-taobao", "--path", str(published_weights()), "--json")

    pulled = place.call(*command, timeout=900)
    free = place.call(*command, "--set", "evaluation.pull=false", timeout=900)

    assert pulled.document["decision"]["outcome"] in ("canary", "promote")
    by_name = {probe["policy"]: probe for probe in pulled.document["evidence"]["probes"]["probes"]}
    # The world model promises nine clicks a page, far from any action that was logged.
    trained = by_name["ppo as trained"]
    assert trained["model_value"] > 7
    assert trained["support"]["outside_share"] > 0.99
    assert trained["log_value"]["effective_sample_size"] < 50
    assert by_name["ppo"]["log_value"]["lower"] > by_name["logged actions"]["log_value"]["upper"]
    assert free.document["decision"]["outcome"] == "hold"
    reasons = {reason["check"]: reason for reason in free.document["decision"]["reasons"]}
    assert reasons["exploit"]["allows"] == "hold"
    assert "The log cannot check what it earns in the world model" in reasons["exploit"]["text"]
