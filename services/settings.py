"""What the endpoint reads from its environment, once, when a worker starts."""

import hashlib
import hmac
import os
import secrets
from pathlib import Path
from typing import Self

from pydantic import Field, SecretStr, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from components.errors import InputError

USER_KEY_BYTES = 32


class ServiceSettings(BaseSettings):
    """Settings of the endpoint; each can be set as an environment variable SLATELOOP_NAME."""

    model_config = SettingsConfigDict(env_prefix="SLATELOOP_", frozen=True, extra="ignore")

    home: Path = Field(default=Path(".slateloop"), description="Folder of the interaction log and of the users' key.")
    database: str = Field(
        default="", description="URL of the interaction log; empty: interactions.db, an SQLite file in `home`."
    )
    user_key: SecretStr | None = Field(
        default=None,
        min_length=16,
        description="Key of the hash under which user ids are stored; without it one is made in `home` and kept there.",
    )
    serve_without_log: bool = Field(
        default=False, description="Answer, with logged: false, while the interaction log cannot be written; else 503."
    )
    log_seconds: float = Field(
        default=5.0, gt=0, le=60, description="Longest wait for the interaction log before a request is refused."
    )
    log_queue: int = Field(
        default=2_000, ge=1, le=1_000_000, description="Rows that may wait for the log before requests are refused."
    )
    release_seconds: float = Field(
        default=1.0, gt=0, le=60, description="Time between two looks of a worker for a changed release."
    )
    max_body: int = Field(
        default=2_000_000, ge=1_000, le=100_000_000, description="Largest body of a request in bytes."
    )

    tokens: Path = Field(default=Path(), description="File of the tokens that may ask; unset: tokens.json in `home`.")
    open: bool = Field(default=False, description="Let anyone ask, without a token: for development.")
    rate: float = Field(
        default=0.0, ge=0, description="Requests a second that each token may ask of each worker; 0: no bound."
    )
    burst: int = Field(
        default=100, ge=1, description="Requests that a token may ask at once, where it has been quiet before."
    )

    @model_validator(mode="after")
    def _files_in_home(self) -> Self:
        # Workers have another working folder than the command that starts them.
        if not self.database:
            object.__setattr__(self, "database", f"sqlite:///{self.home.resolve() / 'interactions.db'}")
        if self.tokens == Path():
            object.__setattr__(self, "tokens", self.home.resolve() / "tokens.json")
        return self

    def existing_user_hash_key(self) -> bytes:
        """The key of users' hashes, which must be there already: a new one fits no hash that was ever stored.

        Raises:
            InputError: there is no key.
        """
        file = self.home / "user.key"
        if self.user_key is None and not file.is_file():
            raise InputError(
                f"{file}: no such file, and SLATELOOP_USER_KEY is not set; expected the key of the users' hashes"
            )
        return self.user_hash_key()

    def user_hash_key(self) -> bytes:
        """The key of users' hashes: the one that is set, or the one in `home`, which is made where there is none.

        Raises:
            InputError: the key in `home` cannot be made or read.
        """
        if self.user_key is not None:
            return self.user_key.get_secret_value().encode()
        file = self.home / "user.key"
        try:
            self.home.mkdir(parents=True, exist_ok=True)
            staging = file.with_suffix(f".{secrets.token_hex(4)}.tmp")
            try:
                with os.fdopen(os.open(staging, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as out:
                    out.write(secrets.token_hex(USER_KEY_BYTES))
                # Unlike a rename, a link leaves the key alone that another worker made first.
                os.link(staging, file)
            except FileExistsError:
                pass
            finally:
                staging.unlink(missing_ok=True)
            return file.read_text().encode()
        except OSError as error:
            raise InputError(f"{file}: the key of users' hashes cannot be kept: {error.strerror}") from None


def user_hash(key: bytes, user_id: str) -> str:
    """The keyed hash under which a user's rows are stored."""
    return hmac.new(key, user_id.encode(), hashlib.sha256).hexdigest()
