"""IRecGAN's MDP with its state hidden: how much of the exact Bayes filter's value does the loop learn from a log?

A log of random slates; a user model of it, by likelihood and adversarial steps; a policy trained by REINFORCE in that
world model alone, never in the MDP. Then policies are rolled out in the MDP. The stages are the loop's own, their
settings `settings`: found on the first draw of the MDP, what is credited on one that is not judged.

The log holds 50 items and tells little of a session, so networks are small. Nothing pulls the policy towards random
slates, since the MDP judges it and not the log. One item of a slate is chosen, so clicked positions alone learn, as in
the paper: credit for the whole slate is unbiased, and its noise settles the policy before it has told the items apart.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from components.environments.bayes_filter import BayesFilter, BayesGreedyPolicy, BayesSlatePolicy
from components.environments.irecgan_mdp import IRecGanMdp
from components.environments.true_value import true_session_value
from components.interactions.batching import SessionReader
from components.interactions.log_folder import open_log
from components.interactions.splits import TEST
from components.policies.policy_folder import load_policy
from components.policies.ranking_policy import NeuralSlatePolicy
from components.policies.slate_policy import SlatePolicy, UniformPolicy
from components.world_model.user_model import UserModel
from components.world_model.user_model_folder import load_user_model
from flows import stages
from flows.benchmarks._stages import StageRunner, mdp_log
from flows.config import LoopConfig

LOG_SESSIONS, QUICK_LOG_SESSIONS, LOG_STEPS = 40_000, 4_000, 40
JUDGED_SESSIONS, MAX_STEPS = 20_000, 400


def settings(seed: int, *, quick: bool) -> LoopConfig:
    """The loop with settings for this log."""
    config = LoopConfig(seed=seed)
    changes: dict[str, dict[str, float | str]] = {
        "encoder": {"item_width": 16, "hidden_width": 16, "recent_items": 1},
        "user_model": {"max_epochs": 6, "batch_sessions": 256},
        "behavior": {"epochs": 1},
        "reinforce": {
            "start": 0.0,
            "critic": "returns",
            "iterations": 5 if quick else 40,
            "sessions": 3_000,
            "max_steps": 8,
            "gamma": 0.5,
            "credit": "clicks",
            "learning_rate": 6e-3,
            "entropy": 0.02,
            "pull": 0.0,
            "logged_weight": 0.0,
        },
    }
    return config.model_copy(
        update={part: getattr(config, part).model_copy(update=update) for part, update in changes.items()}
    )


def learn_from_log(seed: int, *, quick: bool) -> dict[str, float]:
    """Clicks a session in one draw of the MDP, and the nats a request of responses on the log's test split."""
    mdp = IRecGanMdp(seed=seed, state_observed=False)
    config = settings(seed, quick=quick)
    with TemporaryDirectory() as scratch:
        run = StageRunner(Path(scratch))
        n_sessions = QUICK_LOG_SESSIONS if quick else LOG_SESSIONS
        log = run(config, mdp_log(mdp, UniformPolicy(mdp.slate_size), n_sessions, LOG_STEPS))
        split = run(config, stages.split_sessions, checked=log)
        learned = run.learn(config, split)
        policy, users = load_policy(learned.policy.path).policy, load_user_model(learned.world.path)
        test = SessionReader(open_log(split.path / TEST), users.vocabulary)
        nats = _nats(mdp, users.user_model, test)
    assert isinstance(policy, NeuralSlatePolicy)
    # The release stays where the log can judge it; here the MDP judges.
    policy.strength.fill_(1.0)
    judged: dict[str, SlatePolicy] = {
        "random": UniformPolicy(mdp.slate_size),
        "bayes_greedy": BayesGreedyPolicy(mdp),
        "bayes_slates": BayesSlatePolicy(mdp),
        "reinforce": policy,
    }
    return nats | {name: true_clicks(mdp, one) for name, one in judged.items()}


@torch.no_grad()
def _nats(mdp: IRecGanMdp, user_model: UserModel, test: SessionReader) -> dict[str, float]:
    """Mean loss a request of the user model and of the exact filter, which nothing can beat but by chance."""
    bayes = BayesFilter(mdp)
    losses, exact = [], []
    for batch in test.batches(512):
        losses.append(user_model.click_losses(batch)[0][batch.mask])
        clicks = batch.clicks[batch.mask]
        chances = bayes.click_probabilities(bayes.states(batch)[batch.mask], batch.slates[batch.mask])
        exact.append(-torch.where(clicks.any(1), (chances * clicks).sum(1), 1.0 - chances.sum(1)).log())
    return {"user_model_nats": float(torch.cat(losses).mean()), "bayes_nats": float(torch.cat(exact).mean())}


def true_clicks(mdp: IRecGanMdp, policy: SlatePolicy) -> float:
    """Clicks a session of a policy in the MDP, by a large rollout whose chance is the same for every policy."""
    users = torch.zeros(JUDGED_SESSIONS, dtype=torch.long)
    return true_session_value(mdp, policy, users, torch.Generator().manual_seed(99), MAX_STEPS).value
