"""IRecGAN's own comparison on its simulated MDP: what its methods learn from logs, the state hidden.

Policies see the session so far and never the state; a log of each draw of the MDP is written by each of the published
behavior policies, who see it: random, max and mix, sessions capped at 40 clicks. From such a log learn

    lstm      the user model as a recommender: the items that are likeliest to be clicked next
    pg        REINFORCE on logged sessions alone
    ac        actor-critic on logged sessions alone
    pgu       REINFORCE on logged sessions and on ones that the user model makes up
    irecgan   the same, where user model and rewards have gone through the discriminator

all as the loop's own stages train them, on a user model of one LSTM. Each is then rolled out in the true MDP with its
most likely slates, best item first:

    return        clicks a session, in sessions of any length, those without a click included
    Coverage@r    |first r items of the slate ∩ the r items of largest r(s, ·)| / r, mean over the visited requests

Intervals are over draws of the MDP, which differ more than methods do: differences within a draw stand beside them.

Coverage is the published code's (`mdp.py`) but for one thing: that code looks for the r best items on the whole slate
of 10, so both agree at r = 10 only. It is highest for the policy that ranks by r(s, ·), which is not the optimal one.

Published sizes (`--full`): width 512, embeddings of 50, logs of 1,000 sessions, 50 epochs of likelihood in batches of
32, three rounds of 3 adversarial steps over 200 sessions with 5 completions, and policy steps for 50 epochs over the
log, each beside 200 generated sessions; Adam at the published step sizes. What differs at any size: the authors stack
two LSTMs that read clicked items alone, ours is one and reads what was shown too; their users leave by an entry of the
list, ours in a step of its own. Their policies increase the clicked item's probability by its return, uncorrected; ours
start from the estimated logging policy, take a baseline off the return and weigh logged slates by a capped importance
weight. Their test draws slates and counts only sessions with a click.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from components.agents.behavior import BehaviorConfig
from components.agents.reinforce import ReinforceConfig
from components.environments.irecgan_mdp import IRecGanMdp, MixPolicy, myopic_policy
from components.environments.rollout import Survivors, continue_sessions, open_sessions
from components.interactions.batching import Requests
from components.interactions.splits import SplitConfig
from components.policies.policy_folder import load_policy
from components.policies.ranking_policy import EncodedPolicy, NeuralSlatePolicy
from components.policies.request_features import RequestFeatures
from components.policies.session_encoder import EncoderConfig
from components.policies.slate_policy import SHARP, OraclePolicy, SessionState, SlatePolicy, UniformPolicy
from components.world_model.adversarial import AdversarialConfig
from components.world_model.training import LikelihoodConfig
from components.world_model.user_model_folder import load_user_model
from flows import stages
from flows.benchmarks import Context
from flows.benchmarks._figures import columns
from flows.benchmarks._stages import StageRunner, mdp_log
from flows.config import LoopConfig

#: The published cap of 40 clicks, and the request that ends the session.
LOGGED_STEPS = 41
JUDGED_STEPS = 400
RANKS = (1, 10)
#: Policies are judged in the true MDP, so the log's own test split may be small.
SPLIT = SplitConfig(validation_share=0.1, test_share=0.1)


@dataclass(frozen=True)
class Sizes:
    """What the comparison is run with."""

    config: LoopConfig
    log_sessions: int
    judged_sessions: int


DEFAULT = Sizes(
    config=LoopConfig(
        loop="irecgan",
        split=SPLIT,
        encoder=EncoderConfig(cell="lstm", item_width=16, hidden_width=128),
        adversarial=AdversarialConfig(sessions=500, step_sessions=100, completions=3),
        reinforce=ReinforceConfig(
            start=0.0,
            critic="returns",
            iterations=60,
            sessions=128,
            logged_sessions=128,
            learning_rate=3e-3,
            credit="clicks",
            pull=0.0,
        ),
    ),
    log_sessions=2_000,
    judged_sessions=10_000,
)
#: As far as this code can express them; see above for what differs.
PUBLISHED = Sizes(
    config=LoopConfig(
        loop="irecgan",
        split=SPLIT,
        encoder=EncoderConfig(cell="lstm", item_width=50, hidden_width=512),
        user_model=LikelihoodConfig(max_epochs=50, patience=50, batch_sessions=32, learning_rate=5e-4),
        adversarial=AdversarialConfig(
            rounds=3,
            sessions=1_000,
            discriminator_epochs=3,
            user_steps=3,
            step_sessions=200,
            completions=5,
            max_steps=LOGGED_STEPS,
            batch_sessions=32,
            discriminator_rate=1e-4,
            user_rate=5e-4,
        ),
        # 800 of the sessions teach, in batches of 32: 25 steps an epoch, 50 epochs.
        reinforce=ReinforceConfig(
            start=0.0,
            critic="returns",
            iterations=1_250,
            sessions=200,
            logged_sessions=32,
            max_steps=LOGGED_STEPS,
            gamma=0.9,
            learning_rate=1e-4,
            clip_norm=5.0,
            credit="clicks",
            pull=0.0,
        ),
    ),
    log_sessions=1_000,
    judged_sessions=20_000,
)
BEHAVIORS: dict[str, Callable[[IRecGanMdp], SlatePolicy]] = {
    "random": lambda mdp: UniformPolicy(mdp.slate_size),
    "max": myopic_policy,
    "mix": MixPolicy,
}


def sizes(context: Context) -> Sizes:
    """Published, default or quick sizes."""
    if context.full:
        return PUBLISHED
    if not context.quick:
        return DEFAULT
    brief = {
        "user_model": LikelihoodConfig(max_epochs=1),
        "behavior": BehaviorConfig(epochs=1),
        "adversarial": AdversarialConfig(rounds=1, sessions=100, step_sessions=20, completions=1, user_steps=1),
        "reinforce": DEFAULT.config.reinforce.model_copy(
            update={"iterations": 3, "sessions": 50, "logged_sessions": 50}
        ),
    }
    return Sizes(DEFAULT.config.model_copy(update=brief), log_sessions=400, judged_sessions=500)


def methods(config: LoopConfig) -> dict[str, LoopConfig]:
    """The configuration of each method that trains a policy."""

    def changed(adversarial: bool, **reinforce: object) -> LoopConfig:
        update: dict[str, object] = {"reinforce": config.reinforce.model_copy(update=reinforce)}
        if not adversarial:
            update["adversarial"] = config.adversarial.model_copy(update={"rounds": 0})
        return config.model_copy(update=update)

    logged: dict[str, object] = {"generated_weight": 0.0, "logged_weight": 1.0}
    return {
        "pg": changed(False, **logged),
        "ac": changed(False, **logged, critic="td"),
        "pgu": changed(False),
        "irecgan": changed(True),
    }


def compare(context: Context, n_seeds: int) -> dict[str, tuple[Float[np.ndarray, " D"], str]]:
    """Figures over draws of the MDP: the value on each, and its unit."""
    chosen = sizes(context)
    parts = {"": [context.keep(f"comparison-known-{seed}", partial(_known, chosen, seed)) for seed in range(n_seeds)]}
    for log in BEHAVIORS:
        parts[f"{log}_log."] = [
            context.keep(f"comparison-{log}-{seed}", partial(_learned, chosen, log, seed)) for seed in range(n_seeds)
        ]
    figures = {
        f"comparison.{place}{name}": (values, _unit(name))
        for place, results in parts.items()
        for name, values in columns(results).items()
    }
    for log in BEHAVIORS:
        own, unit = figures[f"comparison.{log}_log.irecgan.return"]
        for other in ("lstm", "pgu"):
            than, _ = figures[f"comparison.{log}_log.{other}.return"]
            figures[f"comparison.{log}_log.irecgan_minus_{other}.return"] = (own - than, unit)
    return figures


def _unit(name: str) -> str:
    if "coverage" in name:
        return "share of the state's best items"
    return "clicks a session, state " + ("seen" if name.startswith("myopic") else "hidden")


def _known(chosen: Sizes, seed: int) -> dict[str, float]:
    mdp = _mdp(seed)
    return judge("random", mdp, UniformPolicy(mdp.slate_size), chosen.judged_sessions) | judge(
        "myopic", mdp, OraclePolicy(mdp.slate_size), chosen.judged_sessions
    )


def _learned(chosen: Sizes, log: str, seed: int) -> dict[str, float]:
    """What every method learns from one log of one draw of the MDP."""
    mdp, config = _mdp(seed), chosen.config.model_copy(update={"seed": seed})
    with TemporaryDirectory() as scratch:
        run = StageRunner(Path(scratch))
        logged = run(config, mdp_log(mdp, BEHAVIORS[log](mdp), chosen.log_sessions, LOGGED_STEPS))
        split = run(config, stages.split_sessions, checked=logged)
        users = run(config, stages.fit_user_model, split=split)
        policies: dict[str, EncodedPolicy] = {"lstm": _NextClick(users.path, mdp.slate_size)}
        for name, own in methods(config).items():
            trained = load_policy(run.learn(own, split).policy.path).policy
            assert isinstance(trained, NeuralSlatePolicy)
            # As trained: what is released of it, so that the log can judge it, is the loop's concern.
            trained.strength.fill_(1.0)
            policies[name] = trained
        judged: dict[str, float] = {}
        for name, policy in policies.items():
            judged |= judge(name, mdp, _Likeliest(policy), chosen.judged_sessions)
    return judged


def judge(
    name: str, mdp: IRecGanMdp, policy: SlatePolicy, n_sessions: int, ranks: tuple[int, ...] = RANKS
) -> dict[str, float]:
    """Return and coverage of a policy, by a rollout in the true MDP."""
    generator = torch.Generator().manual_seed(99)
    opened = open_sessions(mdp, policy, torch.zeros(n_sessions, dtype=torch.long), generator)
    visits = [Survivors(torch.arange(n_sessions), opened)]
    batch = continue_sessions(mdp, policy, opened, generator, JUDGED_STEPS, visits.append)
    figures = {f"{name}.return": float(batch.rewards.sum((1, 2)).mean())}
    ranked = mdp.ranked_items()
    for r in ranks:
        found = [
            (batch.slates[rows, step, :r, None] == ranked[point.state.current, None, :r]).any(2)
            for step, (rows, point) in enumerate((visit.rows, visit.point) for visit in visits)
        ]
        figures[f"{name}.coverage_at_{r}"] = float(torch.cat(found).float().mean())
    return figures


def _mdp(seed: int) -> IRecGanMdp:
    return IRecGanMdp(seed=seed, state_observed=False, reveal_truth=True)


class _NextClick(EncodedPolicy):
    """Ranks by the user model's click logits."""

    def __init__(self, users: Path, slate_size: int) -> None:
        super().__init__(RequestFeatures(load_user_model(users).user_model.encoder), slate_size)

    def logits(self, state: SessionState, requests: Requests) -> Float[Tensor, "B N"]:
        """Click logit of each candidate."""
        return self.features.encoder.click_logits(state, requests.candidates)


class _Likeliest(EncodedPolicy):
    """Shows another policy's candidates of largest utility, the largest first."""

    def __init__(self, policy: EncodedPolicy) -> None:
        super().__init__(policy.features, policy.slate_size)
        self.policy = policy

    def logits(self, state: SessionState, requests: Requests) -> Float[Tensor, "B N"]:
        """The other policy's utilities, far apart."""
        return SHARP * self.policy.logits(state, requests)
