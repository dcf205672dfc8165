from pathlib import Path

import pytest
import torch
from torch import nn

from components.errors import InputError
from components.policies.action_policy_folder import (
    ActionPolicyDescription,
    PullDescription,
    StoredActionPolicy,
    load_action_policy,
    save_action_policy,
)
from components.policies.constant_action import ConstantAction
from components.policies.continuous_policy import Scaled, TanhGaussianPolicy, layers
from components.policies.deterministic_policy import DeterministicPolicy
from components.policies.policy_folder import load_policy
from components.policies.pulled_back import ActionCloud, PulledBack

CLOUD = ActionCloud(
    mean=torch.tensor([0.1, -0.2], dtype=torch.float64),
    covariance=torch.tensor([[0.04, 0.01], [0.01, 0.09]], dtype=torch.float64),
    radius=3.0,
    n=100,
)
OBSERVATIONS = torch.tensor([[1.0, 0.0, 4.0], [0.0, 2.0, -1.0]])


def stored(kind: str, *, pulled: bool) -> StoredActionPolicy:
    pull = PullDescription(radius=1.5, logged_radius=CLOUD.radius, n=CLOUD.n) if pulled else None
    about = {"name": "challenger", "loop": "shop", "observation_size": 3, "action_size": 2, "pull": pull}
    cloud = CLOUD if pulled else None
    if kind == "constant":
        description = ActionPolicyDescription(kind="constant", smoothing=0.1, **about)
        return StoredActionPolicy(description, DeterministicPolicy(ConstantAction(torch.tensor([0.3, 1.0]))), cloud)
    network = layers((3, 8, 2), torch.Generator().manual_seed(0), activation=nn.Tanh)
    trained = TanhGaussianPolicy(Scaled(network, torch.tensor([1.0, 2.0, 4.0])), 2)
    return StoredActionPolicy(ActionPolicyDescription(kind="tanh-gaussian", hidden=(8,), **about), trained, cloud)


@pytest.mark.parametrize("pulled", [True, False])
@pytest.mark.parametrize("kind", ["constant", "tanh-gaussian"])
def test_a_policy_from_disk_acts_as_the_one_that_was_saved(kind: str, pulled: bool, tmp_path: Path) -> None:
    saved = stored(kind, pulled=pulled)
    save_action_policy(saved, tmp_path)

    loaded = load_action_policy(tmp_path)

    assert loaded.description == saved.description
    assert isinstance(loaded.policy, PulledBack) is pulled
    first, second = (
        policy.act(OBSERVATIONS, torch.Generator().manual_seed(1)) for policy in (saved.policy, loaded.policy)
    )
    assert torch.equal(first.actions, second.actions)
    assert torch.equal(first.log_probs, second.log_probs)


def test_the_same_policy_is_the_same_bytes(tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        save_action_policy(stored("tanh-gaussian", pulled=True), tmp_path / name)

    for file in (tmp_path / "first").iterdir():
        assert file.read_bytes() == (tmp_path / "second" / file.name).read_bytes()


def test_what_is_no_policy_of_actions_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no policy"):
        load_action_policy(tmp_path)
    save_action_policy(stored("constant", pulled=False), tmp_path)
    (tmp_path / "policy.json").write_text('{"name": "reinforce"}')
    with pytest.raises(InputError, match=r"policy\.json: loop: Field required; expected a policy of actions"):
        load_action_policy(tmp_path)


def test_a_policy_of_actions_is_none_of_slates_and_broken_json_is_named(tmp_path: Path) -> None:
    save_action_policy(stored("constant", pulled=False), tmp_path)
    with pytest.raises(InputError, match=r"policy\.json: .*expected a policy of slates"):
        load_policy(tmp_path)
    (tmp_path / "policy.json").write_text('{"name"')
    with pytest.raises(InputError, match=r"policy\.json: Invalid JSON.*expected a policy of actions"):
        load_action_policy(tmp_path)


def test_one_action_without_its_smoothing_is_named(tmp_path: Path) -> None:
    save_action_policy(stored("constant", pulled=False), tmp_path)
    description = (tmp_path / "policy.json").read_text()
    (tmp_path / "policy.json").write_text(description.replace('"smoothing":0.1', '"smoothing":null'))

    with pytest.raises(InputError, match=r"policy\.json: .*smoothing = None"):
        load_action_policy(tmp_path)


def test_weights_of_another_size_are_named(tmp_path: Path) -> None:
    save_action_policy(stored("tanh-gaussian", pulled=True), tmp_path)
    description = (tmp_path / "policy.json").read_text()
    (tmp_path / "policy.json").write_text(description.replace('"hidden":[8]', '"hidden":[16]'))

    with pytest.raises(InputError, match=r"policy\.safetensors: does not fit policy\.json"):
        load_action_policy(tmp_path)
