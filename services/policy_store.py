"""Policies as versioned models in BentoML's model store, by exact tag.

The store is the one that `BENTOML_HOME` named when the process first used it.
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from components.errors import InputError
from components.policies.policy_folder import DESCRIPTION, WEIGHTS, StoredPolicy, load_policy


def save_model(policy_folder: Path, *, name: str, lineage: dict[str, Any], decision: dict[str, Any]) -> str:
    """Save a policy with its lineage and the gate's decision; returns its exact tag.

    The version is a digest of all of it: the same policy under another decision is another version.

    Args:
        policy_folder: holds policy.safetensors and policy.json.
        name: of the model; the part of the tag before the colon.
        lineage: plain JSON. BentoML's metadata knows no null: keys whose value is null are left out.
        decision: plain JSON, in the same way.

    Raises:
        InputError: the folder holds no policy, or the name is none that BentoML takes.
    """
    import bentoml

    description = load_policy(policy_folder).description
    metadata = {"lineage": _without_nulls(lineage), "decision": _without_nulls(decision)}
    try:
        tag = bentoml.Tag(name, _version(policy_folder, metadata))
    except ValueError as error:
        raise InputError(f"model name {name!r}: {error}") from None
    try:
        return str(bentoml.models.get(tag).tag)
    except bentoml.exceptions.NotFound:
        pass
    with bentoml.models.create(
        tag,
        labels={"loop": description.loop, "policy": description.name, "kind": description.shape.kind},
        metadata=metadata,
    ) as model:
        for file in (WEIGHTS, DESCRIPTION):
            shutil.copyfile(policy_folder / file, model.path_of(file))
    return str(tag)


def load_model(tag: str) -> StoredPolicy:
    """The policy of an exact tag, ready to be asked.

    Raises:
        InputError: the tag names no version, or `latest`, or nothing in the store.
    """
    import bentoml

    _, _, version = tag.partition(":")
    if version in ("", "latest"):
        raise InputError(f"policy tag {tag!r}: expected NAME:VERSION with an exact version; latest is never served")
    try:
        model = bentoml.models.get(tag)
    except (bentoml.exceptions.BentoMLException, ValueError) as error:
        raise InputError(f"policy tag {tag!r}: {error}") from None
    if str(model.tag) != tag:
        raise InputError(f"policy tag {tag!r}: is not exact; the store has {str(model.tag)!r}")
    return load_policy(Path(model.path))


def _version(folder: Path, metadata: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for file in (WEIGHTS, DESCRIPTION):
        digest.update(hashlib.sha256((folder / file).read_bytes()).digest())
    return digest.hexdigest()[:16]


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list | tuple):
        return [_without_nulls(inner) for inner in value]
    return value
