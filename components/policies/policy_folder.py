"""A policy on disk: `policy.safetensors` (weights) and `policy.json` (shape, vocabulary); no code is ever loaded."""

from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from components.errors import InputError
from components.interactions.vocabulary import Vocabulary
from components.policies.ranking_policy import NeuralSlatePolicy, PolicyShape, RankingPolicy

WEIGHTS, DESCRIPTION = "policy.safetensors", "policy.json"

Description = TypeVar("Description", bound=BaseModel)


class PolicyDescription(BaseModel):
    """What `policy.json` says."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(description="Version of the policy: what logs and estimates call it.")
    loop: str
    shape: PolicyShape
    vocabulary: Vocabulary


@dataclass(frozen=True)
class StoredPolicy:
    """A policy with what is needed to ask it by item ids."""

    description: PolicyDescription
    policy: RankingPolicy | NeuralSlatePolicy


def shape_of(policy: RankingPolicy | NeuralSlatePolicy) -> PolicyShape:
    """The shape from which a policy like this one is built."""
    kind = "ranking" if isinstance(policy, RankingPolicy) else "neural"
    return PolicyShape(kind=kind, slate_size=policy.slate_size, encoder=policy.features.encoder.shape)


def save_policy(stored: StoredPolicy, folder: Path) -> None:
    """Write a policy into a folder that exists."""
    tensors = {name: tensor.contiguous() for name, tensor in stored.policy.state_dict().items()}
    safetensors.torch.save_file(tensors, folder / WEIGHTS)
    (folder / DESCRIPTION).write_text(stored.description.model_dump_json() + "\n")


def load_policy(folder: Path) -> StoredPolicy:
    """The policy in a folder, ready to be asked.

    Raises:
        InputError: the folder holds no policy, or not one of this version.
    """
    description = read_description(folder, PolicyDescription, "slates")
    with torch.random.fork_rng():
        policy = description.shape.build()
    try:
        policy.load_state_dict(safetensors.torch.load_file(folder / WEIGHTS))
    except (RuntimeError, safetensors.SafetensorError) as error:
        raise InputError(f"{folder / WEIGHTS}: does not fit {DESCRIPTION}: {str(error).splitlines()[0]}") from None
    return StoredPolicy(description, policy.eval())


def read_description(folder: Path, kind: type[Description], chooses: str) -> Description:
    """What `policy.json` says of the policy in a folder, which is to be one of what it `chooses`.

    Raises:
        InputError: the folder holds no policy, or not one of this kind and version.
    """
    if not (folder / DESCRIPTION).is_file() or not (folder / WEIGHTS).is_file():
        raise InputError(f"{folder}: holds no policy; expected {DESCRIPTION} and {WEIGHTS}")
    try:
        return kind.model_validate_json((folder / DESCRIPTION).read_bytes())
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"]))
        where = f"{folder / DESCRIPTION}: {field}" if field else folder / DESCRIPTION
        raise InputError(f"{where}: {first['msg']}; expected a policy of {chooses}") from None
