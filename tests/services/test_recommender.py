import asyncio
import hashlib
import io
import json
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import bentoml
import httpx
import pytest
import torch
from bento_server import asked_again, release
from starlette.testclient import TestClient

from components.errors import InputError
from components.evaluation.estimates import estimate
from components.evaluation.logged_policy import judged_parts, known_rewards
from components.evaluation.policy_value import About, Estimand
from components.experiment.ab import Assignment
from components.interactions.batching import SessionReader
from components.interactions.contract import RatioAssumption
from components.interactions.importers import interaction_log
from components.interactions.log import InteractionLog
from components.policies.live_policy import LivePolicy
from components.policies.policy_folder import StoredPolicy
from services.api import build_api
from services.messages import RecommendRequest
from services.packaging import build_bento
from services.recommender import Recommender
from services.releases import Releases, arm_of
from services.request_log import RequestLog
from services.settings import ServiceSettings

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


def settings(home: Path, **changes: Any) -> ServiceSettings:
    return ServiceSettings(home=home, **{"open": True} | changes)


def service(stored: StoredPolicy, settings: ServiceSettings) -> Any:
    """The endpoint in this process; its database's first service releases the policy."""
    with suppress(InputError):
        release(settings.database, TAG)
    return Recommender.inner(settings=settings, seed=0, load=lambda tag: stored)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def client(stored: StoredPolicy, home: Path) -> Iterator[TestClient]:
    """The endpoint in this process, with one policy and a seed."""
    recommender = service(stored, settings(home, log_seconds=4.0))
    with TestClient(build_api(lambda: recommender), raise_server_exceptions=False) as client:
        yield client
    recommender.close()


def logged(home: Path, table: str) -> list[dict[str, Any]]:
    with sqlite3.connect(home / "interactions.db") as database:
        database.row_factory = sqlite3.Row
        return [dict(row) for row in database.execute(f"SELECT * FROM {table}")]


def test_the_answer_carries_a_slate_of_the_candidates_and_its_log_prob(
    client: TestClient, stored: StoredPolicy
) -> None:
    answer = client.post("/recommend", json=BODY)
    assert answer.status_code == 200
    told = answer.json()
    assert (told["policy"], told["arm"], told["logged"]) == (TAG, "champion", True)
    assert len(set(told["slate"])) == 4
    assert set(told["slate"]) <= set(BODY["candidates"])
    assert told["log_prob"] == pytest.approx(sum(told["log_probs"]), abs=1e-9)
    assert told["log_prob"] == pytest.approx(asked_again(stored, BODY, told["slate"]), abs=1e-5)


def test_what_was_answered_is_in_the_log_with_its_candidates_and_a_hash_for_a_user(
    client: TestClient, home: Path
) -> None:
    told = client.post("/recommend", json=BODY).json()
    (row,) = logged(home, "recommendations")
    assert row["request_id"] == told["request_id"]
    assert json.loads(row["slate"]) == told["slate"]
    assert json.loads(row["log_probs"]) == told["log_probs"]
    assert json.loads(row["candidates"]) == BODY["candidates"]
    assert json.loads(row["context"]) == BODY["context"]
    assert len(row["user_id"]) == 64
    for file in home.iterdir():
        assert b"user-1" not in file.read_bytes()


def test_a_user_has_one_hash_in_every_process_and_another_under_another_key(
    stored: StoredPolicy, tmp_path: Path
) -> None:
    hashes = []
    for name, key in (("one", None), ("one", None), ("two", None), ("three", "0123456789abcdef")):
        recommender = service(stored, settings(tmp_path / name, user_key=key))
        with TestClient(build_api(lambda recommender=recommender: recommender)) as client:
            client.post("/recommend", json=BODY)
        recommender.close()
        hashes.append(logged(tmp_path / name, "recommendations")[-1]["user_id"])
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 3
    assert (tmp_path / "one" / "user.key").stat().st_mode & 0o777 == 0o600
    assert not (tmp_path / "three" / "user.key").exists()


def test_what_a_key_was_asked_is_kept_as_a_keyed_digest_alone(stored: StoredPolicy, tmp_path: Path) -> None:
    digests = []
    for name in ("one", "two"):
        recommender = service(stored, settings(tmp_path / name, user_key=name * 8))
        body = BODY | {"idempotency_key": "try-1"}
        assert ask(recommender, **body).status_code == 200
        recommender.close()
        digests.append(logged(tmp_path / name, "recommendations")[0]["question"])
    # Who has the database and guesses the question cannot find out without the key.
    plain = hashlib.sha256(RecommendRequest(**body).model_dump_json().encode()).hexdigest()
    assert len({*digests, plain}) == 3 and {len(digest) for digest in digests} == {64}


def test_without_candidates_every_known_item_may_be_shown_and_a_slate_may_have_another_length(
    client: TestClient, home: Path, stored: StoredPolicy
) -> None:
    body = {"loop": "shop", "user_id": "u", "slate_size": 7}
    told = client.post("/recommend", json=body).json()
    known = stored.description.vocabulary.item_ids
    assert len(set(told["slate"])) == 7 and set(told["slate"]) <= set(known)
    assert told["log_prob"] == pytest.approx(asked_again(stored, body, told["slate"]), abs=1e-4)
    (row,) = logged(home, "recommendations")
    (shared,) = logged(home, "candidate_lists")
    assert row["candidates"] is None and row["candidates_digest"] == shared["candidates_digest"]
    assert json.loads(shared["candidates"]) == list(known)


def test_feedback_joins_its_recommendation_and_counts_once(client: TestClient, home: Path) -> None:
    request_id = client.post("/recommend", json=BODY).json()["request_id"]
    clicked = {"request_id": request_id, "clicked": [False, True, False, None]}
    bought = {"request_id": request_id, "feedback_id": "order-7", "purchased": [False, True, False, False]}
    for piece in (bought, clicked, clicked, bought):
        answer = client.post("/feedback", json=piece)
        assert (answer.status_code, answer.json()) == (200, {"request_id": request_id})
    assert len(logged(home, "feedback")) == 2


def test_the_same_key_gets_the_same_answer(client: TestClient, home: Path) -> None:
    body = BODY | {"idempotency_key": "try-1"}
    first, second = (client.post("/recommend", json=body).json() for _ in range(2))
    assert first == second
    assert len(logged(home, "recommendations")) == 1
    other = client.post("/recommend", json=body | {"user_id": "user-2"})
    assert other.status_code == 409
    assert "idempotency_key: 'try-1' was used for another question" in other.json()["error"]


def test_a_batch_is_answered_in_order_and_logged_whole(client: TestClient, home: Path, stored: StoredPolicy) -> None:
    bodies = [BODY, {"loop": "shop", "user_id": "u", "candidates": ["item-0005"]}, BODY | {"past_requests": []}]
    answer = client.post("/recommend/batch", json={"requests": bodies})
    assert answer.status_code == 200, answer.text
    told = answer.json()["responses"]
    assert [len(one["slate"]) for one in told] == [4, 1, 4]
    for body, one in zip(bodies, told, strict=True):
        assert one["log_prob"] == pytest.approx(asked_again(stored, body, one["slate"]), abs=1e-4)
    assert {row["request_id"] for row in logged(home, "recommendations")} == {one["request_id"] for one in told}


def test_one_bad_request_refuses_its_batch_by_its_place(client: TestClient, home: Path) -> None:
    answer = client.post("/recommend/batch", json={"requests": [BODY, BODY | {"context": {"colour": "red"}}]})
    assert answer.status_code == 422
    assert answer.json()["error"].startswith("requests.1.context: 'colour' is unknown")
    assert logged(home, "recommendations") == []


def test_a_key_that_was_used_refuses_its_batch_by_its_place(client: TestClient, home: Path) -> None:
    client.post("/recommend", json=BODY | {"idempotency_key": "k"})
    again = BODY | {"idempotency_key": "k", "user_id": "user-2"}
    answer = client.post("/recommend/batch", json={"requests": [BODY, again]})
    assert answer.status_code == 409
    assert answer.json()["error"].startswith("requests.1.idempotency_key: 'k' was used for another question")
    assert len(logged(home, "recommendations")) == 1


def test_pieces_of_a_feedback_batch_are_kept_or_refused_by_themselves(client: TestClient, home: Path) -> None:
    request_id = client.post("/recommend", json=BODY).json()["request_id"]
    pieces = [
        {"request_id": "nobody", "left": True},
        {"request_id": request_id, "left": True},
        {"request_id": request_id, "clicked": [True]},
    ]
    told = client.post("/feedback/batch", json={"feedback": pieces}).json()
    assert told["accepted"] == 1
    assert [refusal["place"] for refusal in told["refused"]] == [0, 2]
    assert len(logged(home, "feedback")) == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"candidates": ["a", "b", "a"]}, "candidates name 'a' twice; expected distinct items"),
        ({"candidates": []}, "candidates: Tuple should have at least 1 item"),
        (
            {"candidates": [str(number) for number in range(10_001)]},
            "candidates: Tuple should have at most 10000 items",
        ),
        ({"candidates": ["a", ""]}, "candidates.1: String should have at least 1 character"),
        ({"surprise": 1}, "surprise: Extra inputs are not permitted"),
        ({"loop": "another"}, "loop: nothing is released of this loop; the loops with a release are ['shop']"),
        ({"context": {"colour": "red"}}, "context: 'colour' is unknown"),
        ({"past_requests": [{"slate": ["a"], "context": {"device": 1}}]}, "past_requests.0.context: 'device' is 1.0"),
        ({"past_requests": [{"slate": ["a"], "clicked": []}]}, "clicked has 0 values; expected 1"),
        ({"user_id": "a\x00b"}, "user_id: String should match pattern"),
        ({"context": {"device": 1e16}}, "context.device.constrained-float: Input should be less than or equal"),
        ({"slate_size": 0}, "slate_size: Input should be greater than or equal to 1"),
    ],
)
def test_a_bad_request_is_refused_with_its_field_and_nothing_is_logged(
    client: TestClient, home: Path, change: dict[str, Any], words: str
) -> None:
    answer = client.post("/recommend", json=BODY | change)
    assert answer.status_code == 422
    assert words in answer.json()["error"]
    assert logged(home, "recommendations") == []


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"loop": NaN}'])
def test_what_is_no_request_is_refused_without_a_trace(client: TestClient, body: bytes) -> None:
    answer = client.post("/recommend", content=body)
    assert answer.status_code == 422
    assert set(answer.json()) == {"error"}


def test_a_body_that_is_too_large_is_refused_before_it_is_read(client: TestClient) -> None:
    answer = client.post("/recommend", content=b" " * 2_000_001)
    assert (answer.status_code, answer.json()["error"]) == (413, "body: is larger than 2000000 bytes")
    chunks = (b" " * 500_000 for _ in range(200))
    assert client.post("/feedback", content=chunks).status_code == 413


def test_feedback_on_nothing_and_feedback_that_says_nothing_are_refused(client: TestClient) -> None:
    unknown = client.post("/feedback", json={"request_id": "nobody", "left": True})
    assert unknown.status_code == 404 and "'nobody' was never answered here" in unknown.json()["error"]
    silent = client.post("/feedback", json={"request_id": "nobody"})
    assert silent.status_code == 422 and "says nothing; expected clicked" in silent.json()["error"]


def test_while_the_log_cannot_be_written_nothing_is_answered_and_afterwards_it_is(
    client: TestClient, home: Path
) -> None:
    request_id = client.post("/recommend", json=BODY).json()["request_id"]
    with sqlite3.connect(home / "interactions.db", isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        refused = client.post("/recommend", json=BODY)
        late = client.post("/feedback", json={"request_id": request_id, "left": True})
        other.execute("ROLLBACK")
    assert (refused.status_code, late.status_code) == (503, 503)
    assert "the interaction log" in refused.json()["error"]
    assert refused.headers["Retry-After"] == "1"
    assert client.post("/recommend", json=BODY).status_code == 200
    assert client.post("/feedback", json={"request_id": request_id, "left": True}).status_code == 200


def test_what_was_refused_while_the_log_was_stuck_does_not_turn_up_later(stored: StoredPolicy, home: Path) -> None:
    recommender = service(stored, settings(home, log_seconds=0.3, log_queue=5))
    with TestClient(build_api(lambda: recommender)) as client:
        with sqlite3.connect(home / "interactions.db", isolation_level=None) as other:
            other.execute("BEGIN IMMEDIATE")
            answers = [client.post("/recommend", json=BODY) for _ in range(7)]
            other.execute("ROLLBACK")
        assert {answer.status_code for answer in answers} == {503}
        assert "5 rows behind" in answers[-1].json()["error"]
        deadline = time.monotonic() + 20
        while (answer := client.post("/recommend", json=BODY)).status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    recommender.close()
    names = [row["request_id"] for row in logged(home, "recommendations")]
    # The one that was being written when its client gave up may be there: nobody can take it back.
    assert answer.json()["request_id"] in names and len(names) <= 2


def test_it_may_be_told_to_answer_without_the_log_and_says_so(stored: StoredPolicy, home: Path) -> None:
    recommender = service(stored, settings(home, serve_without_log=True, log_seconds=0.5))
    with TestClient(build_api(lambda: recommender)) as client:
        with sqlite3.connect(home / "interactions.db", isolation_level=None) as other:
            other.execute("BEGIN IMMEDIATE")
            told = client.post("/recommend", json=BODY).json()
            other.execute("ROLLBACK")
        assert told["logged"] is False and len(told["slate"]) == 4
        assert client.post("/recommend", json=BODY).json()["logged"] is True
    recommender.close()


def test_those_who_ask_at_once_are_answered_by_one_pass_and_each_as_alone(
    stored: StoredPolicy, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recommender = service(stored, settings(home))
    together: list[int] = []
    choose = LivePolicy.recommend

    def counted(self: LivePolicy, sessions: Sequence[Any], generator: torch.Generator) -> Any:
        together.append(len(sessions))
        return choose(self, sessions, generator)

    monkeypatch.setattr(LivePolicy, "recommend", counted)
    many = [f"item-{number:04d}" for number in range(1, 41)]
    bodies = [
        BODY | {"user_id": f"user-{number}", "candidates": many[: 5 + 5 * number], "slate_size": 1 + number}
        for number in range(8)
    ]
    bodies[3] = bodies[3] | {"context": {"nobody": "knows"}}

    async def ask_all() -> list[httpx.Response]:
        transport = httpx.ASGITransport(build_api(lambda: recommender))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await asyncio.gather(*(client.post("/recommend", json=body) for body in bodies))

    answers = asyncio.run(ask_all())
    recommender.close()
    assert [answer.status_code for answer in answers] == [200] * 3 + [422] + [200] * 4
    assert together == [7]
    for body, answer in zip(bodies, answers, strict=True):
        if answer.status_code == 200:
            told = answer.json()
            assert len(told["slate"]) == body["slate_size"] and set(told["slate"]) <= set(body["candidates"])
            assert told["log_prob"] == pytest.approx(asked_again(stored, body, told["slate"]), abs=1e-5)
    rows = {row["request_id"]: row for row in logged(home, "recommendations")}
    assert {name: json.loads(row["slate"]) for name, row in rows.items()} == {
        answer.json()["request_id"]: answer.json()["slate"] for answer in answers if answer.status_code == 200
    }


def ask(recommender: Any, **changes: Any) -> Any:
    with TestClient(build_api(lambda: recommender)) as client:
        return client.post("/recommend", json=BODY | changes)


def test_users_are_served_by_their_arm_and_a_release_is_taken_up_without_a_restart(
    stored: StoredPolicy, home: Path
) -> None:
    recommender = service(stored, settings(home, release_seconds=0.05))
    releases = Releases(InteractionLog(settings(home).database))
    changed = releases.canary("shop", "shop-policy:v2", 0.5, 1_000, "test")
    users = {arm_of(changed, Assignment(changed.salt), f"user-{n}"): f"user-{n}" for n in range(20)}
    deadline = time.monotonic() + 10
    while ask(recommender, user_id=users["challenger"]).json()["arm"] != "challenger":
        assert time.monotonic() < deadline
        time.sleep(0.02)
    for arm, policy in (("champion", TAG), ("challenger", "shop-policy:v2")):
        told = ask(recommender, user_id=users[arm]).json()
        assert (told["arm"], told["policy"]) == (arm, policy)
    assert logged(home, "recommendations")[-1]["experiment"] == changed.experiment == 2
    recommender.close()


def test_a_shadow_s_choice_among_the_same_candidates_is_logged_beside_what_is_shown(
    stored: StoredPolicy, home: Path
) -> None:
    release(settings(home).database, TAG)
    Releases(InteractionLog(settings(home).database)).set_shadow("shop", "shop-policy:v2", "test")
    recommender = service(stored, settings(home))
    told = [ask(recommender, user_id=f"user-{n}").json() for n in range(3)]
    ask(recommender, candidates=None)
    recommender.close()
    assert {answer["policy"] for answer in told} == {TAG}
    rows = {row["request_id"]: row for row in logged(home, "shadow_choices")}
    assert len(rows) == 4
    for answer in told:
        row = rows[answer["request_id"]]
        assert row["policy"] == "shop-policy:v2" and set(json.loads(row["slate"])) <= set(BODY["candidates"])
        own = asked_again(stored, BODY, json.loads(row["slate"]))
        assert sum(json.loads(row["log_probs"])) == pytest.approx(own, abs=1e-5)


def test_a_release_whose_policy_is_missing_leaves_the_one_before_in_place_until_it_comes(
    stored: StoredPolicy, home: Path
) -> None:
    there, said = {TAG}, io.StringIO()

    def load(tag: str) -> StoredPolicy:
        if tag not in there:
            raise InputError(f"policy tag {tag!r}: not in the store")
        return stored

    release(settings(home).database, TAG)
    recommender = Recommender.inner(
        settings=settings(home, release_seconds=0.05), seed=0, load=load, request_log=RequestLog(said)
    )
    Releases(InteractionLog(settings(home).database)).canary("shop", "late:1", 0.5, 1_000, "test")
    deadline = time.monotonic() + 10
    while "release 2 of loop shop cannot be served yet: policy tag 'late:1'" not in said.getvalue():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert {ask(recommender, user_id=f"user-{n}").json()["policy"] for n in range(9)} == {TAG}
    there.add("late:1")
    while {ask(recommender, user_id=f"user-{n}").json()["policy"] for n in range(9)} != {TAG, "late:1"}:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    recommender.close()


def test_a_row_that_is_no_release_stops_nothing_for_good(stored: StoredPolicy, home: Path) -> None:
    said = io.StringIO()
    release(settings(home).database, TAG)
    recommender = Recommender.inner(
        settings=settings(home, release_seconds=0.05), seed=0, load=lambda tag: stored, request_log=RequestLog(said)
    )
    releases = Releases(InteractionLog(settings(home).database))
    releases.set_shadow("shop", "shop-policy:v2", "test")
    with sqlite3.connect(home / "interactions.db") as database:
        database.execute("UPDATE releases SET challenger_share = 7 WHERE number = 2")
    deadline = time.monotonic() + 10
    while "releases cannot be read" not in said.getvalue():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert ask(recommender).json()["policy"] == TAG
    with sqlite3.connect(home / "interactions.db") as database:
        database.execute("UPDATE releases SET challenger_share = 0 WHERE number = 2")
    with TestClient(build_api(lambda: recommender)) as client:
        while client.get("/release").json()["releases"][0]["shadow"] != "shop-policy:v2":
            assert time.monotonic() < deadline
            time.sleep(0.02)
    recommender.close()


def test_who_serves_is_told_and_rolled_back_over_http(stored: StoredPolicy, home: Path) -> None:
    recommender = service(stored, settings(home, release_seconds=0.05))
    Releases(InteractionLog(settings(home).database)).canary("shop", "shop-policy:v2", 0.5, 1_000, "test")
    with TestClient(build_api(lambda: recommender)) as client:

        def serving() -> Any:
            (only,) = client.get("/release").json()["releases"]
            return only

        deadline = time.monotonic() + 10
        while serving()["challenger"] != "shop-policy:v2":
            assert time.monotonic() < deadline
        answer = client.post("/release/rollback", json={"loop": "shop", "reason": "carts are down"})
        told = answer.json()
        assert (told["number"], told["action"], told["challenger"], told["reason"]) == (
            3,
            "rollback",
            None,
            "carts are down",
        )
        while serving() != told:
            assert time.monotonic() < deadline
        twice = client.post("/release/rollback", json={"loop": "shop", "reason": "again", "left": 2})
        assert twice.status_code == 409 and "somebody else changed what release 3 says" in twice.json()["error"]
        refused = client.post("/release/rollback", json={"loop": "shop", "reason": "again"})
        assert refused.status_code == 422 and "no earlier champion to go back to" in refused.json()["error"]
    recommender.close()


def test_the_schema_names_every_body_and_every_answer(client: TestClient) -> None:
    schema = client.get("/openapi.json").json()
    posts = {path: methods["post"] for path, methods in schema["paths"].items() if "post" in methods}
    assert sorted(posts) == ["/feedback", "/feedback/batch", "/recommend", "/recommend/batch", "/release/rollback"]
    for post in posts.values():
        for content in (post["requestBody"], post["responses"]["200"], post["responses"]["422"]):
            reference = content["content"]["application/json"]["schema"]["$ref"]
            assert reference.removeprefix("#/components/schemas/") in schema["components"]["schemas"]
    question = schema["components"]["schemas"]["RecommendRequest"]
    assert question["example"]["loop"] == "shop"
    assert client.post("/recommend", json=question["example"] | {"candidates": ["item-0001"]}).status_code == 200


def test_the_imported_log_gives_the_policy_its_own_log_probs_back(
    client: TestClient, home: Path, stored: StoredPolicy, tmp_path: Path
) -> None:
    """Sessions of three requests, each told of the ones before: what was logged is what the policy says of the log."""
    for user in range(20):
        past: list[dict[str, Any]] = []
        for step in range(3):
            body = BODY | {"user_id": f"user-{user}", "past_requests": past, "events": BODY["events"][: step % 2]}
            told = client.post("/recommend", json=body).json()
            clicked = [(user + step + place) % 3 == 0 for place in range(4)]
            piece = {"request_id": told["request_id"], "clicked": clicked, "left": step == 2}
            assert client.post("/feedback", json=piece).status_code == 200
            past = [*past, {"slate": told["slate"], "clicked": clicked} | {k: body[k] for k in ("context", "events")}]
    _let_two_hours_pass(home)
    log = interaction_log.import_log(interaction_log.Config(), home / "interactions.db", tmp_path / "log", "shop")
    batch = SessionReader(log, stored.description.vocabulary)
    whole = next(batch.batches(100))
    with torch.no_grad():
        asked = stored.policy.log_prob(stored.policy.states(whole), whole.requests(), whole.slates.flatten(0, 1)).sum(1)
    torch.testing.assert_close(asked.double()[whole.mask.flatten()], whole.log_probs[whole.mask], atol=1e-4, rtol=0)
    assert log.manifest.n_requests == 60

    about = About(policy=stored.description.name, ratio=RatioAssumption.FULL_SLATE, propensities_estimated=False)
    made = estimate(judged_parts(batch, stored.policy, about["ratio"]), known_rewards(batch), about)
    mean_reward = float(whole.rewards.sum() / whole.mask.sum())
    own = [value for value in made.values if value.estimand is Estimand.ONE_REQUEST]
    assert "one-request NCIS" in {value.estimator for value in own}
    for value in own:
        assert value.value == pytest.approx(mean_reward, rel=1e-3), value.estimator
        assert value.mean_weight == pytest.approx(1.0, abs=1e-3)


def _let_two_hours_pass(home: Path) -> None:
    """One late request of another user closes the windows of all others."""
    changes = {"request_id": "'later'", "user_id": "'later'", "shown_at": "shown_at + 2 * 3600000000"}
    with sqlite3.connect(home / "interactions.db") as database:
        columns = [row[1] for row in database.execute("PRAGMA table_info(recommendations)")]
        values = ", ".join(changes.get(name, name) for name in columns)
        database.execute(f"INSERT INTO recommendations SELECT {values} FROM recommendations LIMIT 1")


def test_the_same_policies_and_code_are_the_same_bento(policy_tag: str) -> None:
    first = build_bento([policy_tag])
    created = bentoml.get(first).info.creation_time
    assert build_bento([policy_tag]) == first
    assert bentoml.get(first).info.creation_time == created
