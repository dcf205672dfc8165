import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.errors import InputError
from services.access import (
    LOOK_AGAIN,
    Access,
    ForbiddenError,
    RateBound,
    RateExceededError,
    Scope,
    Token,
    TokenFile,
    UnauthorizedError,
)


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def file(tmp_path: Path) -> TokenFile:
    return TokenFile(tmp_path / "home" / "tokens.json")


def test_a_token_has_256_random_bits_and_its_file_only_a_digest_that_its_owner_alone_may_read(
    file: TokenFile, tmp_path: Path
) -> None:
    first, second = file.create("shop", ["recommend", "feedback"]), file.create("ops", ["release"])
    assert first != second
    assert first.startswith("slateloop_") and len(first) == len("slateloop_") + 43  # 32 bytes, six bits a letter
    path = tmp_path / "home" / "tokens.json"
    assert path.stat().st_mode & 0o777 == 0o600
    assert first not in path.read_text() and first.removeprefix("slateloop_") not in path.read_text()
    assert [(token.name, token.scopes) for token in file.read()] == [
        ("shop", (Scope.RECOMMEND, Scope.FEEDBACK)),
        ("ops", (Scope.RELEASE,)),
    ]


def test_writers_that_come_together_lose_no_token_and_leave_no_other_file(file: TokenFile, tmp_path: Path) -> None:
    def write(writer: int) -> None:
        for number in range(5):
            file.create(f"w{writer}-{number}", ["recommend"])
        file.revoke(f"w{writer}-0")

    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {token.name for token in file.read()} == {f"w{w}-{n}" for w in range(8) for n in range(1, 5)}
    assert {path.name for path in (tmp_path / "home").iterdir()} == {"tokens.json", ".tokens.json.lock"}


@pytest.mark.parametrize(
    ("name", "scopes", "words"),
    [
        ("shop", ["recommend"], "token 'shop': is there already"),
        ("a b", ["recommend"], "token name 'a b': String should match pattern"),
        ("new", [], "token scopes (): Tuple should have at least 1 item"),
        ("new", ["read"], "token scopes 'read': Input should be 'recommend', 'feedback' or 'release'"),
    ],
)
def test_a_token_that_cannot_be_made_says_why(file: TokenFile, name: str, scopes: list[str], words: str) -> None:
    file.create("shop", ["recommend"])
    with pytest.raises(InputError) as raised:
        file.create(name, scopes)
    assert words in str(raised.value)
    assert len(file.read()) == 1


def test_a_token_that_is_not_there_cannot_be_revoked(file: TokenFile) -> None:
    file.create("shop", ["recommend"])
    with pytest.raises(InputError, match=r"token 'shopp': is unknown; the tokens are \['shop'\]"):
        file.revoke("shopp")


def test_a_known_token_is_let_in_for_its_scopes_and_named(file: TokenFile) -> None:
    secret = file.create("shop", ["recommend"])
    for number in range(20):
        file.create(f"other-{number}", ["feedback"])
    access = Access(file)
    assert access.admit(f"Bearer {secret}", Scope.RECOMMEND) == "shop"
    assert access.admit(f"bearer  {secret} ", Scope.RECOMMEND) == "shop"
    with pytest.raises(ForbiddenError, match="token 'shop' has the scopes recommend; expected release"):
        access.admit(f"Bearer {secret}", Scope.RELEASE)


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer ", "Basic x", "Bearer slateloop_x", "Bearer \udcff é"])
@pytest.mark.parametrize("has_file", [True, False])
def test_without_a_known_token_nobody_is_let_in(file: TokenFile, header: str | None, has_file: bool) -> None:
    if has_file:
        file.create("shop", list(Scope))
    for scope in Scope:
        with pytest.raises(UnauthorizedError) as raised:
            Access(file).admit(header, scope)
        assert "slateloop_" not in str(raised.value)


def test_anyone_may_ask_where_that_was_said(file: TokenFile) -> None:
    assert Access(file, open=True).admit(None, Scope.RELEASE) is None


def test_a_token_made_or_revoked_counts_within_a_second(file: TokenFile) -> None:
    clock = Clock()
    access = Access(file, clock=clock)
    with pytest.raises(UnauthorizedError):
        access.admit("Bearer x", Scope.RECOMMEND)
    header = f"Bearer {file.create('shop', ['recommend'])}"
    with pytest.raises(UnauthorizedError):
        access.admit(header, Scope.RECOMMEND)
    clock.now += LOOK_AGAIN
    assert access.admit(header, Scope.RECOMMEND) == "shop"
    file.revoke("shop")
    clock.now += LOOK_AGAIN
    with pytest.raises(UnauthorizedError, match="unknown, or was revoked"):
        access.admit(header, Scope.RECOMMEND)


def test_a_file_that_cannot_be_read_lets_nobody_in_and_says_so_once(file: TokenFile, tmp_path: Path) -> None:
    header = f"Bearer {file.create('shop', ['recommend'])}"
    path, clock, said = tmp_path / "home" / "tokens.json", Clock(), []
    access = Access(file, clock=clock, warn=said.append)
    assert access.admit(header, Scope.RECOMMEND) == "shop"
    whole = path.read_text()
    for content in ("{", '{"tokens": [{"name": "x"}]}', '{"tokens": 7}'):
        path.write_text(content)
        said.clear()
        for _ in range(3):
            clock.now += LOOK_AGAIN
            with pytest.raises(UnauthorizedError):
                access.admit(header, Scope.RECOMMEND)
        (sentence,) = said
        assert "tokens.json: " in sentence and "expected what `slateloop token` writes" in sentence
    path.write_text(whole)
    clock.now += LOOK_AGAIN
    assert access.admit(header, Scope.RECOMMEND) == "shop"


def test_a_file_that_could_not_be_read_for_a_moment_is_read_again(
    file: TokenFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    header, clock = f"Bearer {file.create('shop', ['recommend'])}", Clock()
    access, read, faults = Access(file, clock=clock), file.read, iter([True])

    def now_and_then() -> tuple[Token, ...]:
        if next(faults, False):
            raise InputError("tokens.json: the tokens cannot be read: too many open files")
        return read()

    monkeypatch.setattr(file, "read", now_and_then)
    with pytest.raises(UnauthorizedError):
        access.admit(header, Scope.RECOMMEND)
    clock.now += LOOK_AGAIN
    assert access.admit(header, Scope.RECOMMEND) == "shop"


def test_a_rate_is_kept_by_each_token_for_itself(file: TokenFile) -> None:
    clock = Clock()
    one, two = (f"Bearer {file.create(name, ['recommend'])}" for name in ("one", "two"))
    access = Access(file, RateBound(rate=2.0, burst=3), clock=clock)
    for _ in range(3):
        access.admit(one, Scope.RECOMMEND)
    with pytest.raises(RateExceededError) as raised:
        access.admit(one, Scope.RECOMMEND)
    assert raised.value.seconds == pytest.approx(0.5)
    assert access.admit(two, Scope.RECOMMEND) == "two"
    clock.now += 0.5
    access.admit(one, Scope.RECOMMEND)
    with pytest.raises(RateExceededError):
        access.admit(one, Scope.RECOMMEND)


def test_a_bucket_never_holds_more_than_its_burst() -> None:
    bound = RateBound(rate=10.0, burst=2)
    assert bound.take("a", 0.0) == 0.0
    assert [bound.take("a", 1_000.0) for _ in range(3)] == [0.0, 0.0, pytest.approx(0.1)]


@given(st.lists(st.floats(0.0, 0.4), min_size=1, max_size=200), st.integers(1, 5), st.sampled_from([0.5, 2.0, 7.0]))
def test_no_pattern_of_requests_gets_more_than_burst_and_rate_allow(
    pauses: list[float], burst: int, rate: float
) -> None:
    bound, now, n_answered = RateBound(rate, burst), 0.0, 0
    for pause in pauses:
        now += pause
        n_answered += bound.take("a", now) == 0.0
    assert n_answered <= burst + rate * now + 1e-6
