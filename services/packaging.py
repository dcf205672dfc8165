"""A Bento: one version of the service's code, and the policies that travel with it."""

import hashlib
import json
from collections.abc import Collection
from importlib.metadata import version
from pathlib import Path
from uuid import uuid4

from components.errors import InputError
from services.policy_store import load_model

BENTO_NAME = "recommender"
SERVICE = "services.recommender:Recommender"
REPOSITORY = Path(__file__).parents[1]
#: What the service imports beside BentoML, for machines that install the Bento by itself.
PACKAGES = (
    "alembic", "jaxtyping", "numpy", "polars", "prometheus-client", "psycopg", "psycopg-binary", "pyarrow", "pydantic",
    "pydantic-settings", "safetensors", "scipy", "sqlalchemy", "starlette", "torch",
)  # fmt: skip


def build_bento(policies: Collection[str] = (), out: Path | None = None) -> str:
    """Build the Bento; returns its exact tag, to be served by `bentoml serve TAG`.

    Which policies serve is said by releases, not by the Bento. The version is a digest of policies, code and packages:
    the same ones give the Bento that is there already.

    Args:
        policies: exact tags of policies that are to be there wherever the Bento is.
        out: file for a copy that other machines can import (`bentoml import`); None keeps it in the store alone.

    Raises:
        InputError: a tag is not exact or not in the store, or `out` cannot be written.
    """
    import bentoml

    for policy in policies:
        load_model(policy)
    packages = [f"{name}=={version(name).partition('+')[0]}" for name in PACKAGES]
    tag = f"{BENTO_NAME}:{_content_digest(policies, packages)}"
    try:
        bento = bentoml.get(tag)
    except bentoml.exceptions.NotFound:
        bento = bentoml.build(
            SERVICE,
            name=BENTO_NAME,
            version=tag.partition(":")[2],
            include=["services/*.py", "components/**/*.py"],
            models=[*sorted(set(policies))],
            # Locking would resolve over the network.
            python={"packages": packages, "lock_packages": False},
            build_ctx=str(REPOSITORY),
        )
    if out is not None:
        staging = out.parent / f".{out.name}.{uuid4().hex[:8]}.bento"
        try:
            bento.export(str(staging))
            staging.replace(out)
        except OSError as error:
            raise InputError(f"{out}: cannot be written: {error.strerror}") from None
    return str(bento.tag)


def newest_bento() -> str | None:
    """Exact tag of the Bento that was built last; None where there is none."""
    import bentoml

    bentos = [bento for bento in bentoml.list() if bento.tag.name == BENTO_NAME]
    return str(max(bentos, key=lambda bento: bento.creation_time).tag) if bentos else None


def _content_digest(policies: Collection[str], packages: list[str]) -> str:
    digest = hashlib.sha256(json.dumps([sorted(set(policies)), packages]).encode())
    for folder in ("services", "components"):
        for path in sorted((REPOSITORY / folder).rglob("*.py")):
            digest.update(str(path.relative_to(REPOSITORY)).encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]
