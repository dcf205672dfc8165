"""A pool of policies with the world models that they were trained in: trained once, then judged on logs drawn anew.

Members of the storefront's pool learned from one log of the shop with a seed of their own; members of the MDP's from
logs of their own. Their settings are small: what is measured is the evidence, not how good they are.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic

import torch

from components.agents.reinforce import train_reinforce
from components.environments import storefront
from components.environments.interface import Environment, State
from components.environments.irecgan_mdp import IRecGanMdp, MdpState
from components.interactions.vocabulary import FIRST_ITEM
from components.policies.policy_folder import load_policy
from components.policies.ranking_policy import NeuralSlatePolicy
from components.policies.slate_policy import SlatePolicy
from components.policies.tabular_policy import TabularSlatePolicy
from components.world_model.user_model import UserModel
from components.world_model.user_model_folder import load_user_model
from flows import stages
from flows.benchmarks._stages import StageRunner, mdp_log, silent
from flows.benchmarks.irecgan import TRAINING
from flows.config import LoopConfig

N_MEMBERS = 20


@dataclass(frozen=True)
class Member:
    """A trained policy and the user model of the world that it was trained in."""

    policy: SlatePolicy
    user_model: UserModel
    set_strength: Callable[[float], object]
    """How far the policy goes from the logging policy: 0 is the start of its training, 1 its end."""


@dataclass(frozen=True)
class Pool(Generic[State]):
    """An environment, the policy that writes its logs, and the members."""

    name: str
    environment: Environment[State]
    behavior: SlatePolicy
    n_users: int
    """Distinct users; 0 where every session has its own."""
    max_steps: int
    members: tuple[Member, ...]


def small_config(seed: int) -> LoopConfig:
    """The loop with small settings."""
    config = LoopConfig(seed=seed, source=storefront.Config(n_sessions=8_000))
    return config.model_copy(
        update={
            "user_model": config.user_model.model_copy(update={"max_epochs": 4}),
            "adversarial": config.adversarial.model_copy(update={"rounds": 1}),
            "reinforce": config.reinforce.model_copy(update={"iterations": 40, "sessions": 400}),
        }
    )


def storefront_pool(folder: Path, n_members: int = N_MEMBERS) -> Pool[storefront.StorefrontState]:
    """The shop's pool, trained where the folder does not hold it yet."""
    run, config = StageRunner(folder), small_config(0)
    split = run(config, stages.split_sessions, checked=run.shop_log(config))
    members = []
    for seed in range(n_members):
        learned = run.learn(small_config(seed), split)
        policy = load_policy(learned.policy.path).policy
        assert isinstance(policy, NeuralSlatePolicy)
        members.append(Member(policy, load_user_model(learned.world.path).user_model, policy.strength.fill_))
    shop = storefront.Storefront(config.source)  # type: ignore[arg-type]
    return Pool("storefront", shop, storefront.BehaviorPolicy(shop), shop.n_users, storefront.MAX_STEPS, tuple(members))


N_STATES, N_ITEMS, SLATE, MDP_STEPS, MDP_LOG_SESSIONS = 10, 20, 3, 200, 4_000
MDP_TRAINING = TRAINING.model_copy(update={"iterations": 60, "sessions": 500})


def mdp_pool(folder: Path, n_members: int = N_MEMBERS) -> Pool[MdpState]:
    """The 10-state MDP's pool: tabular policies, each with a user model of a log of its own."""
    mdp = IRecGanMdp(n_states=N_STATES, n_items=N_ITEMS, slate_size=SLATE, seed=7)
    behavior = _table()
    behavior.learned.weight.data.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(1))
    run, log_sessions = StageRunner(folder), mdp_log(mdp, behavior, MDP_LOG_SESSIONS, MDP_STEPS)
    members = []
    for seed in range(n_members):
        config = small_config(seed)
        split = run(config, stages.split_sessions, checked=run(config, log_sessions))
        users = load_user_model(run(config, stages.fit_user_model, split=split).path).user_model
        policy = _table()
        training = MDP_TRAINING.model_copy(update={"iterations": 20 + 5 * seed})
        train_reinforce(policy, mdp, torch.zeros(1, dtype=torch.long), None, training, seed, silent)
        members.append(Member(policy, users, _between(policy, behavior)))
    return Pool("mdp", mdp, behavior, 0, MDP_STEPS, tuple(members))


def _table() -> TabularSlatePolicy:
    return TabularSlatePolicy(N_STATES, N_ITEMS + FIRST_ITEM, SLATE, bound=8.0)


def _between(policy: TabularSlatePolicy, behavior: TabularSlatePolicy) -> Callable[[float], None]:
    learned = policy.learned.weight.detach().clone()

    def set_strength(strength: float) -> None:
        policy.learned.weight.data.copy_(behavior.learned.weight + strength * learned)

    return set_strength
