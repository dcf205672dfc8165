"""Stages of a loop of actions on logs written by hand."""

from pathlib import Path

import pytest
from action_log import hand_log

from components.evaluation.policy_value import PolicyValue
from components.interactions.splits import TEST, TRAIN, VALIDATION
from flows.action_stages import estimate_policies, fit_world_model, train_baseline, train_policy
from flows.config import LoopConfig
from flows.run_record import Release
from flows.stages import Estimates

CONFIG = LoopConfig.model_validate(
    {
        "source": {"name": "virtual-taobao"},
        "action_model": {"max_epochs": 3, "hidden": (32,)},
        "ppo": {"steps": 20_000, "hidden": (16,)},
        "constant_cem": {"steps": 2_000, "population": 8, "elite": 2, "sessions": 20, "mean_sessions": 20},
    }
)


def quiet(message: str, share: float) -> None:
    """Progress that nobody looks at."""


def test_a_release_keeps_as_many_of_the_requests_with_known_rewards_as_the_gate_asks_for(tmp_path: Path) -> None:
    split, world, policy, baseline, out = (
        tmp_path / name for name in ("split", "world", "policy", "baseline", "estimates")
    )
    for folder in (split, world, policy, baseline, out):
        folder.mkdir()
    for seed, name in enumerate((TRAIN, VALIDATION, TEST)):
        hand_log(split / name, 3_000, seed, known_share=0.5)
    fit_world_model.compute(CONFIG, split=split, out=world, progress=quiet)
    for stage, folder in ((train_policy, policy), (train_baseline, baseline)):
        stage.compute(CONFIG, split=split, world=world, out=folder, progress=quiet)
    estimate_policies.compute(CONFIG, split=split, policy=policy, baseline=baseline, out=out, progress=quiet)

    release = Release.model_validate_json((policy / "release.json").read_bytes())
    gating = Estimates.model_validate_json((out / "estimates.json").read_bytes()).gating

    # Half of 3,000 requests are known, of which the gate asks for 500 and the release for half as many more.
    assert release.required_ess == pytest.approx(750, rel=0.1)
    assert release.validation_ess >= release.required_ess
    assert 0 < release.strength < 1
    assert isinstance(gating, PolicyValue)
    assert gating.n_requests == pytest.approx(1_500, rel=0.1)
    assert gating.effective_sample_size > 500
