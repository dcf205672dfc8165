"""Simulated shoppers at a real Bento, at the endpoint in this process, and at one that shows whatever a test wants."""

import json
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import polars as pl
import pytest
import torch
import uvicorn
from bento_server import free_port, release, served
from typer.testing import CliRunner

from components.environments.rollout import rollout
from components.environments.storefront import MAX_STEPS, Config, Storefront
from components.errors import InputError, SlateloopError
from components.interactions.contract import reward_per_position
from components.interactions.importers.interaction_log import Config as LogConfig
from components.interactions.importers.interaction_log import import_log
from components.interactions.log import InteractionLog
from components.interactions.log_folder import Log
from components.policies.policy_folder import StoredPolicy, load_policy
from flows.benchmarks.speed import save_untrained_policy
from flows.command_line import app
from flows.endpoint_client import Endpoint, EndpointClient
from flows.simulation import OPEN_SESSIONS, Visits, simulate, true_reward, visit_endpoint
from services.access import Scope, TokenFile
from services.api import build_api
from services.packaging import build_bento
from services.policy_store import save_model
from services.recommender import Recommender
from services.releases import Releases
from services.settings import ServiceSettings

ADDRESS = "http://endpoint"
Handler = Callable[[httpx.Request], httpx.Response]


@pytest.fixture(scope="module")
def policy_folder(storefront_log: Log, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("untrained") / "policy"
    save_untrained_policy(storefront_log, folder)
    return folder


@pytest.fixture(scope="module")
def stored(policy_folder: Path) -> StoredPolicy:
    return load_policy(policy_folder)


@contextmanager
def endpoint_here(stored: StoredPolicy, home: Path) -> Iterator[httpx.ASGITransport]:
    """The endpoint in this process, whose challenger serves a third of the users."""
    settings = ServiceSettings(home=home, database="", open=True)
    release(settings.database, "champion:v1")
    Releases(InteractionLog(settings.database)).canary("shop", "challenger:v1", 1 / 3, 1_000, "test")
    recommender = Recommender.inner(settings=settings, seed=0, load=lambda tag: stored)
    try:
        yield httpx.ASGITransport(build_api(lambda: recommender))
    finally:
        recommender.close()


class Around(httpx.AsyncBaseTransport):
    """Carries calls to another transport, and may meddle with each."""

    def __init__(self, inner: httpx.AsyncBaseTransport, meddle: Callable[..., Any]) -> None:
        self.inner, self.meddle = inner, meddle

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        response: httpx.Response = await self.meddle(request, self.inner.handle_async_request)
        return response


def visits(
    shop: Storefront,
    transport: httpx.AsyncBaseTransport | None,
    n: int,
    url: str = ADDRESS,
    seed: int = 0,
    token: str | None = None,
) -> Visits:
    with EndpointClient(Endpoint(url, token=token, transport=transport)) as client:
        generator = torch.Generator().manual_seed(seed)
        return visit_endpoint(shop, client, torch.arange(n), "visit", generator)


def imported(database: Path, out: Path) -> Log:
    """The log as it is read an hour later, when somebody else has come by."""
    with sqlite3.connect(database) as opened:
        for table, column in (("recommendations", "shown_at"), ("feedback", "received_at")):
            opened.execute(f"UPDATE {table} SET {column} = {column} - 3600000000")
        columns = [row[1] for row in opened.execute("PRAGMA table_info(recommendations)")]
        later = {"request_id": "'later'", "user_id": "'later'", "idempotency_key": "NULL"}
        later["shown_at"] = "shown_at + 2 * 3600000000"
        values = ", ".join(later.get(column, column) for column in columns)
        opened.execute(f"INSERT INTO recommendations SELECT {values} FROM recommendations LIMIT 1")
    return import_log(LogConfig(), database, out, "shop")


def hold_against(log: Log, seen: Visits, shop: Storefront) -> None:
    """What the shoppers saw and did is what the log says."""
    rows = {row["request_id"]: row for row in log.scan().collect().iter_rows(named=True)}
    batch = seen.batch
    assert len(rows) == int(batch.mask.sum()) == sum(map(len, seen.answers))
    names = ("", "", *shop.item_ids)
    for number, answers in enumerate(seen.answers):
        sessions = {rows[answer.request_id]["session_id"] for answer in answers}
        assert len(sessions) == 1
        assert len(answers) == int(batch.mask[number].sum())
        for step, answer in enumerate(answers):
            row = rows[answer.request_id]
            assert row["step"] == step
            assert row["slate"] == [names[index] for index in batch.slates[number, step].tolist()]
            assert row["candidates"] == [names[index] for index in batch.candidates[number, step].tolist()]
            assert row["slate_log_prob"] == pytest.approx(float(batch.log_probs[number, step]), abs=1e-12)
            assert row["clicked"] == batch.clicks[number, step].bool().tolist()
            assert row["purchased"] == batch.purchases[number, step].bool().tolist()
            assert (row["session_end"] == "left") == bool(batch.left[number, step])


@contextmanager
def endpoint_at_a_port(stored: StoredPolicy, home: Path) -> Iterator[str]:
    """The endpoint in this process, heard at an address."""
    recommender = Recommender.inner(
        settings=ServiceSettings(home=home, database="", open=False), seed=0, load=lambda tag: stored
    )
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(build_api(lambda: recommender), port=port, log_level="warning"))
    thread = Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()
        recommender.close()


def visited(address: str, token: str, tag: str, home: Path, shop: Storefront, tmp_path: Path) -> None:
    """Shoppers and the command line come to an address; what they saw is held against the log."""
    seen = visits(shop, None, 120, address, token=token)
    hold_against(imported(home / "interactions.db", tmp_path / "log"), seen, shop)

    config = tmp_path / "loop.toml"
    config.write_text(f"[source]\nn_users = {shop.n_users}\nn_items = {len(shop.item_ids)}\n")
    arguments = ["simulate", "--users", "40", "--sessions", "2", "--url", address, "--config", str(config)]
    refused = CliRunner().invoke(app, arguments)
    assert refused.exit_code == 2
    assert "there is no token" in refused.stderr and "--token or SLATELOOP_TOKEN" in refused.stderr
    arguments += ["--token", token]
    answer = CliRunner().invoke(app, [*arguments, "--json"])
    assert answer.exit_code == 0, (answer.output, answer.exception)
    told = json.loads(answer.stdout)
    assert (told["total"]["users"], told["total"]["sessions"]) == (40, 80)
    assert told["policies"] == {tag: told["total"]} == {tag: told["arms"]["champion"]}
    shown = CliRunner().invoke(app, arguments).stdout
    assert tag in shown and "mean reward" in shown

    wrong = CliRunner().invoke(app, [*arguments, "--loop", "films"])
    assert wrong.exit_code == 2
    assert "requests.0.loop: nothing is released of this loop; the loops with a release are ['shop']" in wrong.stderr


def test_shoppers_at_an_address_and_its_log_tell_the_same(
    stored: StoredPolicy, storefront: Storefront, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    release(f"sqlite:///{home / 'interactions.db'}", "untrained:v1")
    token = TokenFile(home / "tokens.json").create("shoppers", [Scope.RECOMMEND, Scope.FEEDBACK])
    with endpoint_at_a_port(stored, home) as address:
        visited(address, token, "untrained:v1", home, storefront, tmp_path)


@pytest.mark.slow
def test_shoppers_at_a_real_bento_and_its_log_tell_the_same(
    policy_folder: Path, storefront: Storefront, tmp_path: Path
) -> None:
    from bentoml._internal.configuration.containers import BentoMLContainer

    tag = save_model(policy_folder, name="shop-untrained", lineage={"seed": 3}, decision={})
    home = tmp_path / "home"
    release(f"sqlite:///{home / 'interactions.db'}", tag)
    token = TokenFile(home / "tokens.json").create("shoppers", [Scope.RECOMMEND, Scope.FEEDBACK])
    variables = {"SLATELOOP_HOME": str(home), "SLATELOOP_DATABASE": "", "SLATELOOP_OPEN": "false"}
    with served(build_bento(), Path(BentoMLContainer.bentoml_home.get()), tmp_path, variables) as address:
        visited(address, token, tag, home, storefront, tmp_path)


def test_each_arm_s_mean_is_that_of_its_sessions_in_the_log(
    stored: StoredPolicy, storefront_config: Config, tmp_path: Path
) -> None:
    with endpoint_here(stored, tmp_path / "home") as here:
        endpoint = Endpoint(ADDRESS, transport=here)
        summary = simulate(storefront_config, endpoint, n_users=90, n_sessions=2, seed=4)

    log = imported(tmp_path / "home" / "interactions.db", tmp_path / "log")
    sessions = (
        log.scan()
        .with_columns(reward_per_position(log.manifest).list.sum().alias("reward"))
        .group_by("session_id")
        .agg(pl.col("reward").sum(), pl.col("arm", "user_id").first(), n=pl.len())
        .collect()
    )
    assert set(summary.arms) == {"champion", "challenger"}
    for arm, told in summary.arms.items():
        own = sessions.filter(pl.col("arm") == arm)
        assert (told.sessions, told.users, told.requests) == (own.height, own["user_id"].n_unique(), own["n"].sum())
        assert told.mean_reward == pytest.approx(own["reward"].mean())
        # Both visits of a user stand together: the mean over users has the same error.
        of_users = own.group_by("user_id").agg(pl.col("reward").mean())["reward"]
        assert told.standard_error == pytest.approx(of_users.std() / len(of_users) ** 0.5)
        assert told == summary.policies[f"{arm}:v1"]
    assert summary.total.sessions == sessions.height == 180


def test_calls_that_are_refused_for_now_or_lost_are_made_again_and_count_once(
    stored: StoredPolicy, storefront: Storefront, tmp_path: Path
) -> None:
    n_calls: Counter[str] = Counter()

    async def spoil(request: httpx.Request, go_on: Any) -> httpx.Response:
        n_calls[request.url.path] += 1
        fault = n_calls[request.url.path] % 5
        if fault == 2:
            return httpx.Response(503, json={"error": "not now"}, headers={"Retry-After": "0"})
        response: httpx.Response = await go_on(request)
        await response.aread()
        if fault == 3:
            return httpx.Response(503, json={"error": "too late"}, headers={"Retry-After": "0"})
        if fault == 0:
            raise httpx.ReadError("")
        return response

    with endpoint_here(stored, tmp_path / "home") as here:
        seen = visits(storefront, Around(here, spoil), 130)

    assert min(n_calls.values()) > 10
    database = tmp_path / "home" / "interactions.db"
    with sqlite3.connect(database) as opened:
        assert opened.execute("SELECT count(*) FROM feedback").fetchone() == (int(seen.batch.mask.sum()),)
    hold_against(imported(database, tmp_path / "log"), seen, storefront)


class FirstOnes:
    """An endpoint that shows the first candidates, and remembers what it was asked and told."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.told: list[dict[str, Any]] = []
        self.heard: dict[str, dict[str, Any]] = {}

    def __call__(self, request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        if request.url.path == "/feedback/batch":
            self.told += body["feedback"]
            self.heard |= {piece["request_id"]: piece for piece in body["feedback"]}
            return httpx.Response(200, json={"accepted": len(body["feedback"]), "refused": []})
        return httpx.Response(200, json={"responses": [self.answer(question) for question in body["requests"]]})

    def answer(self, question: dict[str, Any]) -> dict[str, Any]:
        past = question["past_requests"]
        visit = f"{question['user_id']}/{question['session_id']}"
        if past:
            before = self.heard[f"{visit}/{len(past) - 1}"]
            assert (past[-1]["clicked"], past[-1]["purchased"]) == (before["clicked"], before["purchased"])
            assert not before["left"], "a user who left is back"
        self.asked.append(question)
        size = question["slate_size"]
        return {
            "request_id": f"{visit}/{len(past)}",
            "arm": "champion",
            "policy": "first:v1",
            "slate": question["candidates"][:size],
            "log_prob": 0.0,
            "log_probs": [0.0] * size,
            "logged": True,
        }


def test_the_same_seed_brings_the_same_shoppers(storefront_config: Config) -> None:
    first, again, other = FirstOnes(), FirstOnes(), FirstOnes()
    summaries = [
        simulate(storefront_config, Endpoint(ADDRESS, transport=httpx.MockTransport(shown)), n_users=60, seed=seed)
        for shown, seed in ((first, 1), (again, 1), (other, 2))
    ]

    def without_names(shown: FirstOnes) -> list[dict[str, Any]]:
        names = ("session_id", "idempotency_key")
        return [{name: value for name, value in question.items() if name not in names} for question in shown.asked]

    assert without_names(first) == without_names(again) != without_names(other)
    assert summaries[0].total == summaries[1].total != summaries[2].total
    assert {question["session_id"] for question in first.asked}.isdisjoint(
        question["session_id"] for question in again.asked
    )


def test_users_are_the_shop_s_own_and_each_is_somebody_else(storefront_config: Config, storefront: Storefront) -> None:
    shown = FirstOnes()
    simulate(storefront_config, Endpoint(ADDRESS, transport=httpx.MockTransport(shown)), n_users=150, n_sessions=2)

    visits_of = Counter(question["user_id"] for question in shown.asked if not question["past_requests"])
    assert visits_of == dict.fromkeys(storefront.user_ids, 2)
    contexts = {question["user_id"]: question["context"]["segment"] for question in shown.asked}
    segments = storefront.manifest("shop").context[1].values
    assert contexts == {
        user_id: segments[code] for user_id, code in zip(storefront.user_ids, storefront.segment.tolist(), strict=True)
    }
    with pytest.raises(InputError, match="151 users: the shop has 150"):
        simulate(storefront_config, Endpoint(ADDRESS), n_users=151)


def test_more_users_than_may_be_in_the_shop_come_in_groups(storefront_config: Config) -> None:
    shown = FirstOnes()
    config = storefront_config.model_copy(update={"n_users": OPEN_SESSIONS + 200})
    summary = simulate(config, Endpoint(ADDRESS, transport=httpx.MockTransport(shown)), n_users=OPEN_SESSIONS + 100)

    assert summary.total.users == summary.total.sessions == OPEN_SESSIONS + 100
    keys = {question["idempotency_key"] for question in shown.asked}
    assert len(keys) == len(shown.asked) == summary.total.requests
    firsts = [place for place, question in enumerate(shown.asked) if not question["past_requests"]]
    # The second group enters when the first has left.
    assert firsts[OPEN_SESSIONS - 1] == OPEN_SESSIONS - 1
    assert firsts[OPEN_SESSIONS] > 2 * OPEN_SESSIONS


def test_a_step_s_feedback_is_in_before_the_next_one_is_asked(storefront: Storefront) -> None:
    shown = FirstOnes()

    seen = visits(storefront, httpx.MockTransport(shown), 150)

    # `FirstOnes.answer` looks up what it was told of the step before.
    assert len(shown.told) == len(shown.asked) == int(seen.batch.mask.sum())
    assert sum(piece["left"] for piece in shown.told) == int(seen.batch.left.sum())


def refusal(handler: Handler, **about: Any) -> SlateloopError:
    endpoint = Endpoint(ADDRESS, transport=httpx.MockTransport(handler), **about)
    with pytest.raises(SlateloopError) as caught:
        simulate(Config(), endpoint, n_users=200)
    return caught.value


@pytest.mark.parametrize(
    ("status", "body", "kind", "sentence"),
    [
        (401, {"error": "no token"}, InputError, "no token (401); give a token with --token or SLATELOOP_TOKEN"),
        (403, {}, InputError, "no token was given (403); give a token with --token or SLATELOOP_TOKEN"),
        (422, {"error": "requests.0.arm: 'x' is not served"}, InputError, "refuses with 422: requests.0.arm: 'x' is"),
        (404, {}, InputError, "answers 404 to POST /recommend/batch; expected an endpoint of Slateloop"),
        (200, {"slates": []}, InputError, "answers what an endpoint of this version does not: responses: "),
        (500, {}, SlateloopError, "refuses with 500: Internal Server Error"),
    ],
)
def test_a_refusal_ends_in_a_sentence(status: int, body: dict[str, Any], kind: type[Exception], sentence: str) -> None:
    error = refusal(lambda request: httpx.Response(status, json=body))

    assert type(error) is kind
    assert str(error).startswith(f"{ADDRESS}: ")
    assert sentence in str(error)


def test_an_endpoint_that_is_never_ready_is_given_up() -> None:
    busy = httpx.Response(429, json={"error": "too many"}, headers={"Retry-After": "0"})

    assert str(refusal(lambda request: busy)) == f"{ADDRESS}: refuses with 429: too many"


def test_feedback_that_is_refused_and_slates_of_other_items_are_told(storefront: Storefront) -> None:
    class Deaf(FirstOnes):
        def __call__(self, request: httpx.Request) -> httpx.Response:
            if request.url.path == "/feedback/batch":
                return httpx.Response(200, json={"accepted": 0, "refused": [{"place": 0, "error": "unknown"}]})
            return super().__call__(request)

    class Elsewhere(FirstOnes):
        def answer(self, question: dict[str, Any]) -> dict[str, Any]:
            return super().answer(question) | {"slate": ["a", "b", "c", "d"]}

    assert "refuses 1 of 200 pieces of feedback: unknown" in str(refusal(Deaf()))
    assert "shows what was no candidate" in str(refusal(Elsewhere()))


def test_a_token_is_sent_and_never_said() -> None:
    seen = []

    def handler(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers.get("Authorization"))
        return httpx.Response(403, json={})

    error = refusal(handler, token="a-secret-of-mine")

    assert set(seen) == {"Bearer a-secret-of-mine"}
    assert "the token is not accepted (403)" in str(error)
    assert "secret" not in str(error)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--url", f"http://127.0.0.1:{free_port()}"), "no endpoint answers there"),
        (("--url", "127.0.0.1:3000"), "no endpoint answers there"),
        (("--url", "http://a:b"), "is no URL"),
        (("--source", "sessions"), "--source sessions: has no shoppers who answer slates; expected storefront"),
        (("--set", "source.taste_shift=2"), "source.taste_shift = 2"),
    ],
)
def test_a_wrong_argument_is_a_sentence_and_exit_code_2(arguments: tuple[str, ...], sentence: str) -> None:
    answer = CliRunner().invoke(app, ["simulate", "--users", "3", *arguments])

    assert answer.exit_code == 2, (answer.output, answer.exception)
    assert answer.stdout == ""
    assert answer.stderr.startswith("slateloop: ")
    assert sentence in answer.stderr


def test_the_true_reward_of_a_stored_policy_is_what_it_earns_in_the_shop(
    stored: StoredPolicy, storefront_config: Config, storefront: Storefront
) -> None:
    truth = true_reward(storefront_config, stored, n_sessions=2_000, seed=1)

    users = torch.arange(2_000) % storefront.n_users
    earned = rollout(storefront, stored.policy, users, torch.Generator().manual_seed(7), MAX_STEPS).rewards.sum((1, 2))
    assert abs(truth.value - float(earned.mean())) < 4 * (truth.standard_error**2 + float(earned.var()) / 2_000) ** 0.5
    with pytest.raises(InputError, match="knows 60 items; expected the shop's 61"):
        true_reward(storefront_config.model_copy(update={"n_items": 61}), stored)
