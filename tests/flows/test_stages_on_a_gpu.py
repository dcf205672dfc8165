"""The stages of a loop of actions that learn on a GPU, where torch finds one."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from virtual_taobao_weights import write_random_weights

from components.environments import virtual_taobao_log
from components.environments.continuous import run_sessions
from components.environments.virtual_taobao_log import write_virtual_taobao_log
from components.interactions.splits import SplitConfig, split_log
from components.policies.action_policy_folder import StoredActionPolicy, load_action_policy
from components.world_model.action_model import load_action_model
from flows.action_stages import fit_world_model, train_baseline, train_policy
from flows.config import LoopConfig
from flows.stage_store import Stage

CONFIG = LoopConfig.model_validate(
    {
        "source": {"name": "virtual-taobao", "action": (0.0,) * 27, "deviation": 0.8, "n_sessions": 3_000},
        "action_model": {"max_epochs": 20, "hidden": (64,)},
        "ppo": {"steps": 200_000, "hidden": (32,)},
        "constant_cem": {"steps": 50_000, "population": 32, "elite": 6, "sessions": 20, "mean_sessions": 20},
    }
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU on this machine")


def quiet(message: str, share: float) -> None:
    """Progress that nobody looks at."""


@pytest.fixture(scope="module")
def learned_from(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of a split log and of the world model that was learned from it, as stages name them."""
    root = tmp_path_factory.mktemp("gpu")
    folders = {"split": root / "split", "world": root / "world"}
    for folder in folders.values():
        folder.mkdir()
    assert isinstance(CONFIG.source, virtual_taobao_log.Config)
    log = write_virtual_taobao_log(CONFIG.source, write_random_weights(root / "weights"), root / "log", "taobao")
    split_log(log, SplitConfig(), folders["split"], with_holdout=False)
    fit_world_model.compute(CONFIG, split=folders["split"], out=folders["world"], progress=quiet)
    return folders


@pytest.mark.parametrize("stage", [train_policy, train_baseline], ids=lambda stage: stage.name)
def test_what_learns_on_a_gpu_is_released_like_what_learns_on_the_processor(
    stage: Stage, learned_from: dict[str, Path], tmp_path: Path
) -> None:
    world = load_action_model(learned_from["world"])
    seen = world.first[:100]

    def reward(act: Callable[[torch.Tensor], torch.Tensor]) -> float:
        return run_sessions(world, act, 2_000, torch.Generator().manual_seed(0)).mean_reward

    def learned_on(device: str, folder: Path) -> StoredActionPolicy:
        folder.mkdir()
        config = CONFIG.model_copy(update={"device": device})
        stage.compute(config, **learned_from, out=folder, progress=quiet)
        return load_action_policy(folder)

    at_first = reward(lambda observations: torch.zeros(len(observations), 27))
    there, again = (learned_on("cuda", tmp_path / name) for name in ("first", "again"))
    here = learned_on("cpu", tmp_path / "here")

    assert torch.equal(there.policy.mode(seen), again.policy.mode(seen))
    assert there.description.pull is not None
    # Chance differs between devices, so policies do; both are to have learned about as much.
    gained, expected = (reward(stored.trained.mode) - at_first for stored in (there, here))
    assert gained > 0.8 * expected > 1.0
