"""Policies as versioned models in BentoML's model store, by exact tag.

The store is the one that `BENTOML_HOME` named when the process first used it.
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pydantic import ValidationError

from components.errors import InputError
from components.experiment.gate import GateRecord
from components.policies.policy_folder import DESCRIPTION, WEIGHTS, StoredPolicy, load_policy

if TYPE_CHECKING:
    from bentoml import Model

#: File of a model that holds its `GateRecord`.
GATE = "gate.json"


def save_model(
    policy_folder: Path, *, name: str, lineage: dict[str, Any], decision: dict[str, Any], gate: GateRecord | None = None
) -> str:
    """Save a policy with its lineage and the gate's decision; returns its exact tag.

    The version is a digest of all of it: the same policy under another decision is another version.

    Args:
        policy_folder: holds policy.safetensors and policy.json.
        name: of the model; the part of the tag before the colon.
        lineage: plain JSON. BentoML's metadata knows no null: keys whose value is null are left out.
        decision: plain JSON, in the same way.
        gate: the evidence that the decision was made from; a policy without it can only be a loop's first champion.

    Raises:
        InputError: the folder holds no policy, or the name is none that BentoML takes.
    """
    import bentoml

    description = load_policy(policy_folder).description
    record = b"" if gate is None else gate.model_dump_json(indent=2).encode()
    metadata = {"lineage": _without_nulls(lineage), "decision": _without_nulls(decision)}
    try:
        tag = bentoml.Tag(name, _version(policy_folder, metadata, record))
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
        if gate is not None:
            Path(model.path_of(GATE)).write_bytes(record)
    return str(tag)


def load_model(tag: str) -> StoredPolicy:
    """The policy of an exact tag, ready to be asked.

    Raises:
        InputError: the tag names no version, or `latest`, or nothing in the store.
    """
    return load_policy(_folder(tag))


def load_gate_record(tag: str) -> GateRecord | None:
    """The evidence that a policy of an exact tag was judged by; None where it came without any.

    Raises:
        InputError: as `load_model`, or the evidence is damaged.
    """
    file = _folder(tag) / GATE
    if not file.exists():
        return None
    try:
        return GateRecord.model_validate_json(file.read_bytes())
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise InputError(f"{file}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def load_lineage(tag: str) -> dict[str, Any]:
    """The lineage that a policy of an exact tag was saved with.

    Raises:
        InputError: as `load_model`.
    """
    return cast(dict[str, Any], _model(tag).info.metadata["lineage"])


def _folder(tag: str) -> Path:
    return Path(_model(tag).path)


def _model(tag: str) -> "Model":
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
    return model


def _version(folder: Path, metadata: dict[str, Any], record: bytes) -> str:
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode() + record)
    for file in (WEIGHTS, DESCRIPTION):
        digest.update(hashlib.sha256((folder / file).read_bytes()).digest())
    return digest.hexdigest()[:16]


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list | tuple):
        return [_without_nulls(inner) for inner in value]
    return value
