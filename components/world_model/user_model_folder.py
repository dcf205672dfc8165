"""A user model on disk: `user_model.safetensors` and `user_model.json`."""

from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict

from components.interactions.contract import Responses
from components.interactions.vocabulary import Vocabulary
from components.policies.session_encoder import EncoderShape, SessionEncoder
from components.world_model.user_model import UserModel

WEIGHTS, DESCRIPTION = "user_model.safetensors", "user_model.json"


class UserModelDescription(BaseModel):
    """What `user_model.json` says."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    encoder: EncoderShape
    slate_size: int
    responses: Responses
    vocabulary: Vocabulary


@dataclass(frozen=True)
class StoredUserModel:
    """A user model with the vocabulary that its indices come from."""

    user_model: UserModel
    vocabulary: Vocabulary


def save_user_model(stored: StoredUserModel, folder: Path) -> None:
    """Write a user model into a folder that exists."""
    model = stored.user_model
    description = UserModelDescription(
        encoder=model.encoder.shape,
        slate_size=model.slate_size,
        responses=model.responses,
        vocabulary=stored.vocabulary,
    )
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    safetensors.torch.save_file(tensors, folder / WEIGHTS)
    (folder / DESCRIPTION).write_text(description.model_dump_json() + "\n")


def load_user_model(folder: Path) -> StoredUserModel:
    """The user model in a folder."""
    description = UserModelDescription.model_validate_json((folder / DESCRIPTION).read_bytes())
    with torch.random.fork_rng():
        model = UserModel(SessionEncoder(description.encoder), description.slate_size, description.responses)
    model.load_state_dict(safetensors.torch.load_file(folder / WEIGHTS))
    return StoredUserModel(model.eval(), description.vocabulary)
