"""Whatever is sent, the answer is a 4xx with a sentence, nothing is half written, and no error of ours shows."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from bento_server import release
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.checks import (
    content_type_conformance,
    not_a_server_error,
    response_schema_conformance,
    status_code_conformance,
)
from schemathesis.generation import GenerationMode
from sqlalchemy import func, select
from starlette.testclient import TestClient

from components.interactions.log import FEEDBACK, RECOMMENDATIONS, InteractionLog
from components.policies.policy_folder import StoredPolicy
from services.api import build_api
from services.recommender import Recommender
from services.settings import ServiceSettings

QUESTION: dict[str, Any] = {
    "loop": "shop",
    "user_id": "user-1",
    "session_id": "visit-1",
    "candidates": ["item-0001", "item-0002", "item-0003"],
    "slate_size": 2,
    "context": {"device": "phone"},
    "events": [{"type": "view", "item_id": "item-0002"}],
    "past_requests": [{"slate": ["item-0009"], "clicked": [True], "purchased": [False], "events": [], "context": {}}],
    "idempotency_key": None,
}
#: What is wrong in any place but for those that take it.
WRONG: dict[str, Any] = {
    "a number": 7.5, "a text": "x", "an object": {"x": 1}, "a list": [[]], "true": True, "null": None, "empty": "",
    "a control character": "a\x00b",
}  # fmt: skip
FITS = {
    ("loop", "a text"), ("user_id", "a text"), ("session_id", "a text"), ("session_id", "null"),
    ("idempotency_key", "a text"), ("idempotency_key", "null"), ("candidates", "null"),
    ("slate_size", "null"), ("clicked", "null"), ("purchased", "null"), ("feedback_id", "null"),
    ("feedback_id", "a text"), ("request_id", "a text"), ("left", "true"), ("request_signals", "an object"),
}  # fmt: skip


class Service:
    """The endpoint in this process, and its log."""

    def __init__(self, stored: StoredPolicy, home: Path) -> None:
        settings = ServiceSettings(home=home, open=True)
        release(settings.database, "p:1")
        self.recommender = Recommender.inner(settings=settings, seed=0, load=lambda tag: stored)
        self.client = TestClient(build_api(lambda: self.recommender), raise_server_exceptions=False)
        self.log = InteractionLog(settings.database)
        self.request_id = self.client.post("/recommend", json=QUESTION).json()["request_id"]

    def rows(self) -> tuple[int, ...]:
        """How many rows the tables have."""
        with self.log.reading() as connection:
            return tuple(
                connection.execute(select(func.count()).select_from(table)).scalar_one()
                for table in (RECOMMENDATIONS, FEEDBACK)
            )


@pytest.fixture(scope="module")
def service(stored: StoredPolicy, bentoml_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    service = Service(stored, tmp_path_factory.mktemp("home"))
    yield service
    service.recommender.close()


def feedback(service: Service) -> dict[str, Any]:
    return {
        "request_id": service.request_id,
        "feedback_id": "f",
        "clicked": [True, False],
        "purchased": [True, False],
        "signals": {"watch_time": [1.0, None]},
        "request_signals": {"rating": 5.0},
        "left": True,
    }


def cases() -> Iterator[Any]:
    """Path, field and how the body is spoiled: more than a hundred."""
    feedback_fields = ("request_id", "feedback_id", "clicked", "purchased", "signals", "request_signals", "left")
    for path, fields in (("/recommend", tuple(QUESTION)), ("/feedback", feedback_fields)):
        for field in fields:
            for kind, value in WRONG.items():
                if (field, kind) not in FITS:
                    yield pytest.param(path, field, _put(field, value), id=f"{path} {field} is {kind}")
        for field in fields[:1]:
            yield pytest.param(path, field, lambda body, name=field: body.pop(name), id=f"{path} without {field}")
    for field, value in (
        ("candidates", ["a", "a"]), ("candidates", []), ("candidates", ["a", 1]), ("candidates", ["x" * 257]),
        ("slate_size", 0), ("slate_size", 101), ("slate_size", 1.5), ("user_id", "u" * 257), ("loop", "another"),
        ("context", {"colour": "red"}), ("context", {"device": 1.0}), ("context", {"device": []}),
        ("events", [{"type": "view"}]), ("events", [{"item_id": "a"}]), ("events", [{"type": "", "item_id": "a"}]),
        ("events", [{"type": "view", "item_id": "a"}] * 1_001), ("past_requests", [{}]),
        ("past_requests", [{"slate": ["a"], "clicked": [1.5]}]), ("past_requests", [{"slate": ["a"], "clicked": []}]),
        ("past_requests", [{"slate": ["a"] * 101}]), ("past_requests", [{"slate": ["a"]}] * 201),
        ("past_requests", [{"slate": ["a"], "colour": "red"}]), ("unheard_of", 1),
    ):  # fmt: skip
        yield pytest.param("/recommend", field, _put(field, value), id=f"/recommend {field} = {str(value)[:40]}")
    for field, value in (
        ("clicked", []), ("clicked", [True]), ("clicked", [True] * 3), ("clicked", ["yes", "no"]),
        ("purchased", [True] * 101), ("signals", {"watch_time": [1.0]}), ("signals", {"a b": [1.0, 1.0]}),
        ("signals", {"x": ["y", "z"]}), ("signals", {f"s{n}": [1.0, 1.0] for n in range(51)}),
        ("request_signals", {"x": "y"}), ("request_signals", {"": 1.0}), ("unheard_of", 1), ("request_id", "nobody"),
    ):  # fmt: skip
        yield pytest.param("/feedback", field, _put(field, value), id=f"/feedback {field} = {str(value)[:40]}")


def _put(field: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda body: body.update({field: value})


def test_there_are_more_than_a_hundred_kinds_of_malformed_input() -> None:
    assert len(list(cases())) > 100


@pytest.mark.parametrize(("path", "field", "spoil"), list(cases()))
def test_malformed_input_is_refused_by_the_name_of_its_field(
    service: Service, path: str, field: str, spoil: Callable[[dict[str, Any]], None]
) -> None:
    body = json.loads(json.dumps(QUESTION if path == "/recommend" else feedback(service)))
    spoil(body)
    before = service.rows()
    answer = service.client.post(path, json=body)
    assert 400 <= answer.status_code < 500, answer.text
    assert field in answer.json()["error"]
    assert service.rows() == before


@pytest.mark.parametrize(
    "operation", ["/recommend", "/recommend/batch", "/feedback", "/feedback/batch", "/release/rollback"]
)
@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_answers_are_what_the_schema_says(service: Service, operation: str, data: st.DataObject) -> None:
    """Bodies that the schema allows and bodies that it does not: never a 5xx, never an answer that it does not name."""
    described = schemathesis.openapi.from_asgi("/openapi.json", service.client.app)[operation]["POST"]
    case = data.draw(described.as_strategy() | described.as_strategy(GenerationMode.NEGATIVE))
    case.call_and_validate(
        checks=[
            not_a_server_error,
            status_code_conformance,
            content_type_conformance,
            response_schema_conformance,
        ]
    )


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_body_makes_the_endpoint_fail(service: Service, data: st.DataObject) -> None:
    """A good body with some of its fields replaced by anything that JSON can say."""
    path = data.draw(st.sampled_from(["/recommend", "/feedback", "/recommend/batch", "/feedback/batch"]))
    body = dict(QUESTION if path.startswith("/recommend") else feedback(service))
    for field in data.draw(st.lists(st.sampled_from(sorted(body)), max_size=3)):
        body[field] = data.draw(JSON)
    whole: Any = body
    if path.endswith("/batch"):
        whole = {"requests" if path.startswith("/recommend") else "feedback": [body, data.draw(st.just(body) | JSON)]}
    answer = service.client.post(path, content=json.dumps(whole).encode())
    assert answer.status_code < 500, answer.text
    assert "Traceback" not in answer.text


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=st.binary(max_size=200))
def test_no_bytes_make_the_endpoint_fail(service: Service, body: bytes) -> None:
    answer = service.client.post("/recommend", content=body)
    assert answer.status_code == 422 and set(answer.json()) == {"error"}
