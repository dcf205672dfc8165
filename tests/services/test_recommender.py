import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bentoml
import httpx
import pytest
from bento_server import asked_again, served
from starlette.testclient import TestClient

from components.policies.policy_folder import StoredPolicy
from services.packaging import build_bento
from services.policy_store import load_model
from services.recommender import Recommender, RecommendRequest, ServedPolicy

TAG = "shop-policy:v1"
BODY: dict[str, Any] = {
    "loop": "shop",
    "user_id": "user-1",
    "candidates": ["item-0001", "item-0002", "item-0003", "new-a", "item-0004", "new-b"],
    "context": {"device": "phone", "segment": "nobody-knows"},
    "events": [{"type": "view", "item_id": "item-0002"}],
    "past_requests": [
        {
            "slate": ["item-0009", "item-0003", "new-a", "item-0001"],
            "clicked": [False, True, None, False],
            "purchased": [False, True, None, False],
            "context": {"device": "phone"},
        }
    ],
}


@pytest.fixture(scope="module")
def client(stored: StoredPolicy, bentoml_home: Path) -> Iterator[TestClient]:
    """The endpoint in this process, with one arm and a seed."""

    class Seeded(Recommender.inner):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__(policies={"treatment": ServedPolicy(TAG, stored)}, seed=0)

    with TestClient(bentoml.service(name="recommender")(Seeded).to_asgi()) as client:
        yield client


def test_the_answer_carries_a_slate_of_the_candidates_and_its_log_prob(
    client: TestClient, stored: StoredPolicy
) -> None:
    answer = client.post("/recommend", json=BODY)
    assert answer.status_code == 200
    told = answer.json()
    assert (told["policy"], told["arm"]) == (TAG, "treatment")
    assert len(set(told["slate"])) == 4
    assert set(told["slate"]) <= set(BODY["candidates"])
    assert told["log_prob"] == pytest.approx(sum(told["log_probs"]), abs=1e-9)
    assert told["log_prob"] == pytest.approx(asked_again(stored, BODY, told["slate"]), abs=1e-5)


def test_every_answer_has_a_request_id_of_its_own(client: TestClient) -> None:
    ids = {client.post("/recommend", json=BODY).json()["request_id"] for _ in range(3)}
    assert len(ids) == 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"candidates": ["a", "b", "a"]}, "candidates name 'a' twice; expected distinct items"),
        ({"candidates": []}, "at least 1 item"),
        ({"candidates": [str(number) for number in range(1001)]}, "at most 1000 items"),
        ({"surprise": 1}, "Extra inputs are not permitted"),
        ({"loop": "another"}, "loop: 'another' is not served here; expected 'shop'"),
        ({"arm": "control"}, "arm: 'control' is not served; the arms are ['treatment']"),
        ({"context": {"colour": "red"}}, "context: 'colour' is unknown"),
        ({"past_requests": [{"slate": ["a"], "context": {"device": 1}}]}, "past_requests.0.context: 'device' is 1.0"),
        ({"past_requests": [{"slate": ["a"], "clicked": []}]}, "clicked has 0 values; expected 1"),
    ],
)
def test_a_bad_request_is_answered_with_400_and_a_sentence(
    client: TestClient, change: dict[str, Any], words: str
) -> None:
    answer = client.post("/recommend", json=BODY | change)
    assert answer.status_code == 400
    assert words in answer.text


async def ask(service: Any, **change: Any) -> str:
    return str((await service.recommend(RecommendRequest(**(BODY | change)))).arm)


def test_without_an_arm_the_champion_answers(stored: StoredPolicy) -> None:
    policies = {arm: ServedPolicy(TAG, stored) for arm in ("challenger", "champion")}
    service = Recommender.inner(policies=policies, seed=1)
    assert asyncio.run(ask(service)) == "champion"
    assert asyncio.run(ask(service, arm="challenger")) == "challenger"


def test_the_module_is_imported_without_a_model_store(tmp_path: Path) -> None:
    home = tmp_path / "untouched"
    environment = os.environ | {"BENTOML_HOME": str(home), "BENTOML_DO_NOT_TRACK": "True"}
    subprocess.run([sys.executable, "-c", "import services.recommender"], env=environment, check=True, timeout=120)
    assert not home.exists()


@pytest.fixture
def address(policy_tag: str, bentoml_home: Path, tmp_path: Path) -> Iterator[str]:
    """A Bento with the policy, served by a process of its own."""
    with served(build_bento({"champion": policy_tag}), bentoml_home, tmp_path) as address:
        yield address


def test_the_library_reproduces_the_log_prob_of_a_slate_served_from_its_bento(address: str, policy_tag: str) -> None:
    stored = load_model(policy_tag)
    for _ in range(3):
        answer = httpx.post(f"{address}/recommend", json=BODY, timeout=20)
        assert answer.status_code == 200, answer.text
        told = answer.json()
        assert (told["policy"], told["arm"]) == (policy_tag, "champion")
        assert told["log_prob"] == pytest.approx(asked_again(stored, BODY, told["slate"]), abs=1e-5)
    refused = httpx.post(f"{address}/recommend", json=BODY | {"arm": "nobody"}, timeout=20)
    assert refused.status_code == 400
    assert "the arms are ['champion']" in refused.text


def test_the_same_arms_and_code_are_the_same_bento(policy_tag: str) -> None:
    first = build_bento({"champion": policy_tag})
    created = bentoml.get(first).info.creation_time
    assert build_bento({"champion": policy_tag}) == first
    assert bentoml.get(first).info.creation_time == created
