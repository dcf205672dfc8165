"""A Bento: one version of the service's code, with the policies of its arms."""

import hashlib
import json
from collections.abc import Mapping
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
    "pydantic-settings", "safetensors", "sqlalchemy", "starlette", "torch",
)  # fmt: skip


def build_bento(tags: Mapping[str, str], out: Path | None = None) -> str:
    """Build the Bento that serves one policy per arm; returns its exact tag, to be served by `bentoml serve TAG`.

    The version is a digest of arms, code and packages: the same ones give the Bento that is there already.

    Args:
        tags: exact policy tag of each arm.
        out: file for a copy that other machines can import (`bentoml import`); None keeps it in the store alone.

    Raises:
        InputError: there are no arms, a tag is not exact or not in the store, or `out` cannot be written.
    """
    import bentoml

    if not tags:
        raise InputError("arms: there are none; expected at least one arm and its policy's tag")
    for tag in tags.values():
        load_model(tag)
    packages = [f"{name}=={version(name).partition('+')[0]}" for name in PACKAGES]
    tag = f"{BENTO_NAME}:{_content_digest(tags, packages)}"
    try:
        bento = bentoml.get(tag)
    except bentoml.exceptions.NotFound:
        bento = bentoml.build(
            SERVICE,
            name=BENTO_NAME,
            version=tag.partition(":")[2],
            labels={f"arm.{arm}": policy for arm, policy in tags.items()},
            include=["services/*.py", "components/**/*.py"],
            models=[*sorted(set(tags.values()))],
            # Locking would resolve over the network.
            python={"packages": packages, "lock_packages": False},
            args={"arms": dict(tags)},
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


def _content_digest(tags: Mapping[str, str], packages: list[str]) -> str:
    digest = hashlib.sha256(json.dumps([sorted(tags.items()), packages]).encode())
    for folder in ("services", "components"):
        for path in sorted((REPOSITORY / folder).rglob("*.py")):
            digest.update(str(path.relative_to(REPOSITORY)).encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]
