"""The loop's stages in a benchmark: without Prefect, in a folder, each computed once."""

from dataclasses import dataclass
from pathlib import Path

from components.environments.irecgan_mdp import IRecGanMdp, write_mdp_log
from components.policies.slate_policy import SlatePolicy
from components.world_model.training import Progress
from flows import stages
from flows.config import LoopConfig
from flows.stage_store import Stage, StageRef, StageStore, stage, stage_key


def silent(message: str, share: float) -> None:
    """Progress of a part: the benchmark's own is enough."""


@dataclass(frozen=True)
class Learned:
    """What the loop learns from a split log."""

    users: StageRef
    behavior: StageRef
    world: StageRef
    policy: StageRef


class StageRunner:
    """Stages in a folder, computed where it does not hold them yet for the same settings and upstream.

    Keys say nothing of the code: a folder that outlives it has the code's digest in its name.
    """

    def __init__(self, root: Path) -> None:
        self.store = StageStore(root)

    def __call__(self, config: LoopConfig, stage: Stage, **upstream: StageRef) -> StageRef:
        """The stage's result, from the results of others by their role."""
        key = stage_key(stage.name, config.model_dump(mode="json", include=set(stage.settings)), upstream)
        if self.store.is_complete(stage.name, key):
            return StageRef(path=self.store.folder(stage.name, key), digest=key)
        folders = {role: ref.path for role, ref in upstream.items()}

        def compute(out: Path) -> None:
            stage.compute(config, **folders, out=out, progress=silent)

        return self.store.write(stage.name, key, compute, {role: ref.digest for role, ref in upstream.items()})

    def shop_log(self, config: LoopConfig) -> StageRef:
        """The log of the configuration's storefront, as the checks accept it."""
        dataset = self(config, stages.import_source, path=StageRef(path=Path(), digest="simulated"))
        return self(config, stages.validate_log, dataset=dataset)

    def learn(self, config: LoopConfig, split: StageRef) -> Learned:
        """Everything from a split log to the trained policy."""
        users = self(config, stages.fit_user_model, split=split)
        behavior = self(config, stages.fit_behavior, split=split, users=users)
        world = self(config, stages.fit_world_model, split=split, users=users, behavior=behavior)
        policy = self(config, stages.train_policy, split=split, world=world, behavior=behavior)
        return Learned(users, behavior, world, policy)


def mdp_log(mdp: IRecGanMdp, behavior: SlatePolicy, n_sessions: int, max_steps: int) -> Stage:
    """The stage that logs sessions of the MDP under a policy, with the configuration's seed.

    Its key says nothing of the four arguments: a runner's folder is for one choice of them.
    """

    @stage("mdp-log")
    def write(config: LoopConfig, out: Path, progress: Progress) -> None:
        write_mdp_log(mdp, behavior, n_sessions, max_steps, config.seed, config.loop, out / "log")

    return write
