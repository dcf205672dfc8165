"""Does the loop's policy earn more than CEM where the truth is known? The default storefront, several seeds.

The log and the shop stay; what learns is seeded anew. Every policy is then rolled out in the true shop, on the same
users and the same chance, so differences within a seed are paired.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from jaxtyping import Float
from scipy import stats
from torch import Tensor

from components.environments import storefront
from components.environments.rollout import rollout
from components.evaluation.logged_policy import logged_requests
from components.evaluation.ncis import one_request_ncis
from components.evaluation.weights import effective_sample_size
from components.interactions.batching import Requests, SessionReader
from components.interactions.log_folder import open_log
from components.interactions.splits import TEST
from components.policies.policy_folder import load_policy
from components.policies.ranking_policy import NeuralSlatePolicy
from components.policies.slate_policy import (
    MemorylessPolicy,
    OraclePolicy,
    PopularityPolicy,
    SessionState,
    SlatePolicy,
    UniformPolicy,
)
from flows import stages
from flows.benchmarks import Budget, Context, Figure
from flows.config import LoopConfig
from flows.stage_store import Stage

BUDGET = Budget(full=90, quick=5)
JUDGED_SESSIONS = 40_000


def measure(context: Context) -> dict[str, Figure]:
    """True mean session reward of every policy, and the paired difference of REINFORCE and CEM."""
    n_seeds = context.seeds or (2 if context.quick else 5)
    config = LoopConfig()
    if context.quick:
        config = config.model_copy(
            update={
                "source": storefront.Config(n_sessions=8_000),
                "reinforce": config.reinforce.model_copy(update={"iterations": 20, "sessions": 400}),
                "cem": config.cem.model_copy(update={"iterations": 5, "population": 16, "elite": 4}),
                "adversarial": config.adversarial.model_copy(update={"rounds": 1}),
            }
        )
    by_seed = [
        context.keep(f"seed-{seed}", lambda seed=seed: _one_seed(config.model_copy(update={"seed": seed})))  # type: ignore[misc]
        for seed in range(n_seeds)
    ]
    rewards = {name: np.array([result[name] for result in by_seed]) for name in by_seed[0]}
    figures = {
        f"{name}.true_session_reward": _mean(rewards[name], "reward a session")
        for name in ("random", "popularity", "logging", "cem", "reinforce", "reinforce_unbound", "oracle")
    }
    figures["reinforce_minus_cem"] = _mean(
        rewards["reinforce"] - rewards["cem"], "reward a session", target="interval above 0", above=0.0
    )
    gap = (rewards["reinforce"] - rewards["cem"]) / (rewards["oracle"] - rewards["cem"])
    figures["gap_closed_from_cem_to_oracle"] = _mean(gap, "share")
    half_gap = context.keep("half-gap", lambda: {"ess_share": _half_gap_ess(storefront.Config())})["ess_share"]
    figures["half_gap.ess_share"] = Figure(
        value=half_gap,
        unit="share of requests",
        target="above the gate's floor (500 of the test split's requests)",
        holds=bool(half_gap * rewards["test_requests"][0] > 500),
    )
    figures["release_strength"] = _mean(rewards["strength"], "0 logging policy, 1 as trained")
    figures["ess_share_on_test"] = _mean(rewards["ess_share"], "share of requests")
    return figures


def _one_seed(config: LoopConfig) -> dict[str, float]:
    """Run the stages that learn, and roll their policies out in the true shop."""
    with TemporaryDirectory() as scratch:
        root = Path(scratch)
        folders = {name: root / name for name in ("data", "checked", "split", "users", "behavior", "world")}
        folders |= {name: root / name for name in ("policy", "baseline", "estimates")}
        for folder in folders.values():
            folder.mkdir()

        def silent(message: str, share: float) -> None:
            pass

        def run(stage: Stage, out: str, **upstream: str) -> None:
            paths = {role: folders[name] for role, name in upstream.items()}
            stage.compute(config, **paths, out=folders[out], progress=silent)

        stages.import_source.compute(config, path=Path(), out=folders["data"], progress=silent)
        run(stages.validate_log, "checked", dataset="data")
        run(stages.split_sessions, "split", checked="checked")
        run(stages.fit_user_model, "users", split="split")
        run(stages.fit_behavior, "behavior", split="split", users="users")
        run(stages.fit_world_model, "world", split="split", users="users", behavior="behavior")
        run(stages.train_policy, "policy", split="split", world="world", behavior="behavior")
        run(stages.train_baseline, "baseline", split="split", world="world")
        policy, baseline = load_policy(folders["policy"]), load_policy(folders["baseline"])
        test = open_log(folders["split"] / TEST)
        reader = SessionReader(test, policy.description.vocabulary)
        about = stages.about_log(reader, "reinforce")
        estimate = one_request_ncis(logged_requests(reader, policy.policy, about["ratio"]).requests, **about)
        assert isinstance(config.source, storefront.Config)
        shop = storefront.Storefront(config.source)
        counts = policy.description.vocabulary.counts()
        released = policy.policy
        assert isinstance(released, NeuralSlatePolicy)
        strength = float(released.strength)
        rewards = {
            "random": _true_reward(shop, UniformPolicy(shop.slate_size)),
            "popularity": _true_reward(shop, PopularityPolicy(shop.slate_size, counts)),
            "logging": _true_reward(shop, storefront.BehaviorPolicy(shop)),
            "cem": _true_reward(shop, baseline.policy),
            "reinforce": _true_reward(shop, policy.policy),
            "oracle": _true_reward(
                storefront.Storefront(config.source, reveal_truth=True), OraclePolicy(shop.slate_size)
            ),
            "strength": strength,
            "ess_share": estimate.effective_sample_size / test.manifest.n_requests,
            "test_requests": float(test.manifest.n_requests),
        }
        released.strength.fill_(1.0)
        return rewards | {"reinforce_unbound": _true_reward(shop, released)}


def _true_reward(shop: storefront.Storefront, policy: SlatePolicy) -> float:
    generator = torch.Generator().manual_seed(12_345)
    users = torch.randint(shop.n_users, (JUDGED_SESSIONS,), generator=generator)
    return float(rollout(shop, policy, users, generator, storefront.MAX_STEPS).rewards.sum((1, 2)).mean())


class _Tempered(MemorylessPolicy):
    """The logging policy's utilities plus so many times the truth: what halfway to the oracle looks like."""

    def __init__(self, logging: storefront.BehaviorPolicy, weight: float) -> None:
        super().__init__()
        self.logging, self.weight, self.slate_size = logging, weight, logging.slate_size

    def logits(self, state: SessionState, requests: Requests) -> Float[Tensor, "B N"]:
        assert requests.truth is not None
        return self.logging.logits(state, requests) + self.weight * requests.truth


def _half_gap_ess(config: storefront.Config) -> float:
    """ESS share of the log for the mildest tempered oracle that closes half the gap from the logging policy."""
    shop = storefront.Storefront(config, reveal_truth=True)
    logging = storefront.BehaviorPolicy(shop)
    low = _true_reward(shop, logging)
    high = _true_reward(shop, OraclePolicy(shop.slate_size))
    weight = next(
        weight
        for weight in np.arange(2.0, 12.0, 0.5)
        if _true_reward(shop, _Tempered(logging, float(weight))) - low >= 0.5 * (high - low)
    )
    generator = torch.Generator().manual_seed(54_321)
    users = torch.randint(shop.n_users, (JUDGED_SESSIONS,), generator=generator)
    requests = shop.observe(shop.reset(users, generator))
    state = logging.start(requests)
    choice = logging.act(state, requests, generator)
    target = _Tempered(logging, float(weight)).log_prob(state, requests, choice.slates)
    return effective_sample_size((target - choice.log_probs).double().sum(1).numpy()) / len(users)


def _mean(values: np.ndarray, unit: str, target: str | None = None, above: float | None = None) -> Figure:
    """Mean over seeds with Student's interval; the target holds where the whole interval lies above."""
    mean = float(values.mean())
    if len(values) < 2 or values.std() == 0:
        return Figure(value=mean, unit=unit, target=target, holds=None if above is None else mean > above)
    half = float(stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)))
    interval = (mean - half, mean + half)
    return Figure(
        value=mean, interval=interval, unit=unit, target=target, holds=None if above is None else interval[0] > above
    )
