"""A policy of actions on disk: `policy.safetensors` (weights) and `policy.json` (what they are), and no code.

What is stored is a trained network, or one action for everybody, and where it was pulled back to a log's actions
(`pulled_back.py`) those and how far it may go from them.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from components.errors import InputError
from components.policies.constant_action import ConstantAction
from components.policies.continuous_policy import ContinuousPolicy, Scaled, TanhGaussianPolicy, layers
from components.policies.deterministic_policy import DeterministicPolicy
from components.policies.policy_folder import DESCRIPTION, WEIGHTS, read_description
from components.policies.pulled_back import ActionCloud, PulledBack

_TRAINED, _MEAN, _COVARIANCE = "trained.", "logged.mean", "logged.covariance"


class PullDescription(BaseModel):
    """To which logged actions a policy was pulled back."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    radius: float = Field(ge=0, description="How far from their mean its action may lie, in their deviations.")
    logged_radius: float = Field(ge=0, description="Distance within which 99 of 100 of them lie.")
    n: int = Field(ge=2, description="How many they are.")


class ActionPolicyDescription(BaseModel):
    """What `policy.json` says."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(description="Version of the policy: what logs and estimates call it.")
    loop: str
    kind: Literal["tanh-gaussian", "constant"] = Field(description="A network's squashed Gaussian, or one action.")
    observation_size: int
    action_size: int
    hidden: tuple[int, ...] = Field(default=(), description="Units of the network's layers, tanh between them.")
    smoothing: float | None = Field(default=None, description="σ of the Gaussian around one action.")
    pull: PullDescription | None = Field(default=None, description="None where the policy is as trained.")

    @model_validator(mode="after")
    def _one_action_is_smoothed(self) -> "ActionPolicyDescription":
        if (self.smoothing is None) == (self.kind == "constant"):
            raise ValueError(f"smoothing = {self.smoothing}: expected a number where kind is constant, and there alone")
        return self


@dataclass(frozen=True)
class StoredActionPolicy:
    """A policy of actions, as trained and as it is released."""

    description: ActionPolicyDescription
    trained: TanhGaussianPolicy | DeterministicPolicy
    cloud: ActionCloud | None = None
    """The logged actions that it is pulled back to."""

    @property
    def policy(self) -> ContinuousPolicy:
        """What is released: the trained policy, pulled back where the description says so."""
        pull = self.description.pull
        if pull is None:
            return self.trained
        assert self.cloud is not None
        return PulledBack(self.trained, self.cloud, pull.radius)


def save_action_policy(stored: StoredActionPolicy, folder: Path) -> None:
    """Write a policy into a folder that exists."""
    tensors = {f"{_TRAINED}{name}": tensor.contiguous() for name, tensor in stored.trained.state_dict().items()}
    if stored.cloud is not None:
        tensors |= {_MEAN: stored.cloud.mean.contiguous(), _COVARIANCE: stored.cloud.covariance.contiguous()}
    safetensors.torch.save_file(tensors, folder / WEIGHTS)
    (folder / DESCRIPTION).write_text(stored.description.model_dump_json() + "\n")


def load_action_policy(folder: Path) -> StoredActionPolicy:
    """The policy of actions in a folder.

    Raises:
        InputError: the folder holds none, or not one of this version.
    """
    description = read_description(folder, ActionPolicyDescription, "actions")
    try:
        tensors = safetensors.torch.load_file(folder / WEIGHTS)
        trained = _built(description)
        trained.load_state_dict(
            {name.removeprefix(_TRAINED): tensor for name, tensor in tensors.items() if name.startswith(_TRAINED)}
        )
        return StoredActionPolicy(description, trained.eval().requires_grad_(False), _cloud(description, tensors))
    except (KeyError, RuntimeError, safetensors.SafetensorError) as error:
        raise InputError(f"{folder / WEIGHTS}: does not fit {DESCRIPTION}: {str(error).splitlines()[0]}") from None


def _built(description: ActionPolicyDescription) -> TanhGaussianPolicy | DeterministicPolicy:
    if description.smoothing is not None:
        return DeterministicPolicy(ConstantAction(torch.zeros(description.action_size)), description.smoothing)
    sizes = (description.observation_size, *description.hidden, description.action_size)
    network = layers(sizes, torch.Generator(), activation=nn.Tanh)
    return TanhGaussianPolicy(Scaled(network, torch.ones(description.observation_size)), description.action_size)


def _cloud(description: ActionPolicyDescription, tensors: dict[str, Tensor]) -> ActionCloud | None:
    pull = description.pull
    if pull is None:
        return None
    return ActionCloud(tensors[_MEAN], tensors[_COVARIANCE], pull.logged_radius, pull.n)
