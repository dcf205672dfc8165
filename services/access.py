"""Who may ask: bearer tokens with scopes, kept as digests in a file that is read again when it changes, and rates."""

import fcntl
import hashlib
import hmac
import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from components.errors import InputError, SlateloopError

#: How every token begins, so that scanners for leaked secrets can find one.
PREFIX = "slateloop_"
TOKEN_BYTES = 32
#: Seconds for which the file of tokens is taken to be as it was.
LOOK_AGAIN = 1.0


class Scope(StrEnum):
    """What a token may ask for."""

    RECOMMEND = "recommend"
    FEEDBACK = "feedback"
    RELEASE = "release"


class UnauthorizedError(SlateloopError):
    """The request carries no token that is known."""


class ForbiddenError(SlateloopError):
    """The request's token lacks the scope."""


class RateExceededError(SlateloopError):
    """The request's token has asked too often."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"rate: was exceeded; try again in {seconds:.2f} seconds")
        self.seconds = seconds
        """Until it may ask again."""


class Token(BaseModel):
    """A token as it is kept: who has it can ask, who reads this cannot."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=64, description="Whose it is; it stands in the request log."
    )
    digest: str = Field(pattern=r"^[0-9a-f]{64}$", description="SHA-256 of the token, in hexadecimal.")
    scopes: tuple[Scope, ...] = Field(min_length=1, description="What it may ask for.")
    created_at: datetime = Field(description="When it was made.")


class Tokens(BaseModel):
    """The file's content."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tokens: tuple[Token, ...] = ()


class TokenFile:
    """The tokens of a file; a file that is not there holds none."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> tuple[Token, ...]:
        """The tokens, in the order in which they were made.

        Raises:
            InputError: the file cannot be read, or holds something else.
        """
        try:
            return Tokens.model_validate_json(self._path.read_bytes()).tokens
        except FileNotFoundError:
            return ()
        except OSError as error:
            raise InputError(f"{self._path}: the tokens cannot be read: {error.strerror}") from None
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(map(str, first["loc"])) or "the whole file"
            raise InputError(f"{self._path}: {where}: {first['msg']}; expected what `slateloop token` writes") from None

    def version(self) -> tuple[int, int] | None:
        """Another value whenever the file, or who may read it, was changed; None where there is none."""
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_ino, found.st_ctime_ns

    def create(self, name: str, scopes: Sequence[str]) -> str:
        """A new token, of which only the digest is kept.

        Raises:
            InputError: there is one of that name, a name or scope is wrong, or the file cannot be read or written.
        """
        secret = PREFIX + secrets.token_urlsafe(TOKEN_BYTES)
        try:
            token = Token(
                name=name,
                digest=digest(secret),
                scopes=tuple(dict.fromkeys(scopes)),
                created_at=datetime.now(UTC).replace(microsecond=0),
            )
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise InputError(f"token {first['loc'][0]} {first['input']!r}: {first['msg']}") from None
        with self._changing() as tokens:
            if name in [known.name for known in tokens]:
                raise InputError(f"token {name!r}: is there already; revoke it first, or choose another name")
            tokens.append(token)
        return secret

    def revoke(self, name: str) -> None:
        """Forget a token.

        Raises:
            InputError: there is none of that name, or the file cannot be read or written.
        """
        with self._changing() as tokens:
            left = [token for token in tokens if token.name != name]
            if len(left) == len(tokens):
                raise InputError(f"token {name!r}: is unknown; the tokens are {[token.name for token in tokens]}")
            tokens[:] = left

    @contextmanager
    def _changing(self) -> Iterator[list[Token]]:
        """The tokens, to be changed by one process at a time; the file is replaced as a whole."""
        staging = self._path.with_name(f".{self._path.name}.{secrets.token_hex(4)}.tmp")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            # The file itself is replaced, so a lock on it would not hold the next one off.
            lock = os.open(self._path.with_name(f".{self._path.name}.lock"), os.O_RDWR | os.O_CREAT, 0o600)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
                tokens = list(self.read())
                yield tokens
                with os.fdopen(os.open(staging, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as out:
                    out.write(Tokens(tokens=tuple(tokens)).model_dump_json(indent=2))
                    out.flush()
                    os.fsync(out.fileno())
                staging.replace(self._path)
            finally:
                os.close(lock)
                staging.unlink(missing_ok=True)
        except OSError as error:
            raise InputError(f"{self._path}: the tokens cannot be written: {error.strerror}") from None


def digest(secret: str) -> str:
    """What is kept of a token: 256 random bits need neither salt nor a slow hash."""
    return hashlib.sha256(secret.encode(errors="replace")).hexdigest()


class RateBound:
    """A bucket for each name: it fills at a rate, a request takes one, and an empty one refuses."""

    def __init__(self, rate: float, burst: int) -> None:
        self._rate = rate
        self._burst = float(burst)
        self._buckets: dict[str, tuple[float, float]] = {}

    def take(self, name: str, now: float) -> float:
        """Seconds until the name may ask again; 0 where it may now, which is then counted.

        Args:
            name: whose bucket.
            now: seconds of a clock that never goes back.
        """
        level, at = self._buckets.get(name, (self._burst, now))
        level = min(self._burst, level + (now - at) * self._rate)
        enough = level >= 1.0
        self._buckets[name] = (level - 1.0 if enough else level), now
        return 0.0 if enough else (1.0 - level) / self._rate


class Access:
    """Lets a request in, or says why not."""

    def __init__(
        self,
        tokens: TokenFile,
        bound: RateBound | None = None,
        *,
        open: bool = False,
        warn: Callable[[str], None] = lambda message: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._file = tokens
        self._bound = bound
        self._open = open
        self._warn = warn
        self._clock = clock
        self._looked_at = -LOOK_AGAIN
        self._version: tuple[int, int] | None = None
        self._unread = ""
        self._tokens: list[tuple[bytes, Token]] = []

    def admit(self, authorization: str | None, scope: Scope) -> str | None:
        """The name of the token that asks; None where anyone may ask.

        Args:
            authorization: the header.
            scope: what is asked for.

        Raises:
            UnauthorizedError: the header holds no token that is known.
            ForbiddenError: the token lacks the scope.
            RateExceededError: it has asked too often.
        """
        now = self._clock()
        name = None if self._open else self._token(authorization, scope, now).name
        if self._bound is not None and (seconds := self._bound.take(name or "", now)):
            raise RateExceededError(seconds)
        return name

    def _token(self, authorization: str | None, scope: Scope, now: float) -> Token:
        self._look(now)
        kind, _, secret = (authorization or "").partition(" ")
        if kind.lower() != "bearer" or not secret:
            raise UnauthorizedError("authorization: there is no token; expected the header Authorization: Bearer TOKEN")
        asked = digest(secret.strip()).encode()
        found: Token | None = None
        for kept, token in self._tokens:
            # All of them, so that how long it takes tells nothing of which one fits.
            if hmac.compare_digest(kept, asked):
                found = token
        if found is None:
            raise UnauthorizedError("authorization: the token is unknown, or was revoked")
        if scope not in found.scopes:
            own = ", ".join(found.scopes)
            raise ForbiddenError(f"authorization: token {found.name!r} has the scopes {own}; expected {scope}")
        return found

    def _look(self, now: float) -> None:
        """Read the file again where it has changed; one that cannot be read lets nobody in."""
        if now - self._looked_at < LOOK_AGAIN:
            return
        self._looked_at = now
        version = self._file.version()
        if version == self._version:
            return
        try:
            self._tokens = [(token.digest.encode(), token) for token in self._file.read()]
        except InputError as error:
            # Without a version it is read again at the next look: the trouble may pass.
            self._tokens, self._version = [], None
            if str(error) != self._unread:
                self._warn(str(error))
            self._unread = str(error)
        else:
            self._version, self._unread = version, ""
