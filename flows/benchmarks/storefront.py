"""Does the loop earn more where the truth is known, and does it keep still where there is nothing to earn?

The default storefront. The log and the shop stay; what learns is seeded anew, and every seed goes through the whole
loop to its decision. Every policy is then rolled out in the true shop, on the same users and the same chance, so
differences within a seed are paired.

Two ceilings stand beside what was learned. The oracle reads each user's mind. The exact Bayes filter knows the shop but
of its users only their sessions, as policies do: greedy it earns the most that can be learned at all, and drawn back to
the gate's floor of effective requests the most that this log can still judge.

With the dial at "one slate fits all" what users like is the same for all of them, so a policy that reads sessions has
nothing over CEM's constant weights and should not be promoted.

The ablations change one setting of the loop each, on the same log and seeds; policies are judged as released.
"""

from functools import partial

import numpy as np
import torch
from jaxtyping import Float

from components.environments import storefront
from components.environments.storefront_filter import FilterPolicy
from components.environments.true_value import true_session_value
from components.evaluation.logged_policy import judged_sums, ratio_of
from components.evaluation.policy_value import PolicyValue
from components.evaluation.weights import default_cap
from components.evaluation.world_model_value import item_rewards
from components.experiment.gate import Outcome
from components.interactions.batching import SessionReader
from components.interactions.log_folder import open_log
from components.interactions.splits import TEST, TRAIN
from components.interactions.vocabulary import Vocabulary
from components.policies.policy_folder import load_policy
from components.policies.probe_policies import ConstantPolicy
from components.policies.ranking_policy import NeuralSlatePolicy
from components.policies.slate_policy import SHARP, OraclePolicy, PopularityPolicy, SlatePolicy, UniformPolicy
from components.world_model.user_model_folder import load_user_model
from flows import stages
from flows.benchmarks import Budget, Context, Figure
from flows.benchmarks._figures import columns, mean_of_seeds, share_of_seeds
from flows.benchmarks._stages import Learned, StageRunner
from flows.config import LoopConfig, load_config
from flows.stage_store import StageRef

BUDGET = Budget(full=240, quick=10)
JUDGED_SESSIONS = 40_000
QUICK = (
    "source.n_sessions=8000", "reinforce.iterations=20", "reinforce.sessions=400", "cem.iterations=5",
    "cem.population=16", "cem.elite=4", "adversarial.rounds=1",
)  # fmt: skip
ABLATIONS = {
    "likelihood_alone": "adversarial.rounds=0",
    "generated_sessions_alone": "reinforce.logged_weight=0",
    "logged_sessions_alone": "reinforce.generated_weight=0",
    "without_pull": "reinforce.pull=0",
    "gamma_0": "reinforce.gamma=0",
    "returns_for_critic": "reinforce.critic=returns",
    "start_at_logging_policy": "reinforce.start=0",
}
ONE_SLATE_FITS_ALL = "source.personal=0"
#: Weights of expected rewards that the filter is tried at, mildest first.
FILTER_WEIGHTS = (4.0, 6.0, 8.0, 12.0, 16.0, 20.0, 24.0, 32.0, 40.0)
REWARD = "reward a session"


def measure(context: Context) -> dict[str, Figure]:
    """Decisions of whole loops, true mean session reward of every policy, and the ablations."""
    n_loops = context.seeds or (2 if context.quick else 10)
    n_ablated = min(n_loops, 5)
    quick = QUICK if context.quick else ()
    keep, run = context.keep, StageRunner(context.kept / "stages")
    loops = columns([keep(f"loop-{seed}", partial(_loop, run, seed, *quick)) for seed in range(n_loops)])
    alike = columns(
        [keep(f"one-slate-{seed}", partial(_loop, run, seed, *quick, ONE_SLATE_FITS_ALL)) for seed in range(n_loops)]
    )
    ablated = columns([keep(f"ablation-{seed}", partial(_ablations, run, seed, *quick)) for seed in range(n_ablated)])
    known = keep("known", partial(_known, run, *quick))
    return {
        **_quality({name: values[:n_ablated] for name, values in loops.items()}, known),
        "promoted": share_of_seeds(loops["promoted"], "at least 0.8", lambda share: share >= 0.8),
        "held": share_of_seeds(loops["held"]),
        "one_slate_fits_all.promoted": share_of_seeds(alike["promoted"], "at most 0.1", lambda share: share <= 0.1),
        "one_slate_fits_all.reinforce_minus_cem": mean_of_seeds(
            alike["reinforce"] - alike["cem"], f"{REWARD}, {n_loops} seeds"
        ),
        **_ablation_figures(ablated, loops["reinforce"][:n_ablated]),
    }


def _quality(values: dict[str, Float[np.ndarray, " S"]], known: dict[str, float]) -> dict[str, Figure]:
    figures = {f"{name}.true_session_reward": Figure(value=reward, unit=REWARD) for name, reward in known.items()}
    for name in ("constant", "cem", "reinforce", "reinforce_unbound"):
        figures[f"{name}.true_session_reward"] = mean_of_seeds(values[name], REWARD)

    def closed(reward: Float[np.ndarray, " S"] | float) -> Float[np.ndarray, " S"]:
        return np.asarray((reward - values["cem"]) / (known["oracle"] - values["cem"]))

    return figures | {
        "reinforce_minus_cem": mean_of_seeds(
            values["reinforce"] - values["cem"], REWARD, "interval above 0", above=0.0
        ),
        "gap_closed_from_cem_to_oracle": mean_of_seeds(closed(values["reinforce"]), "share", "at least 0.5", above=0.5),
        "gap_closed_by_the_filter_greedy": mean_of_seeds(
            closed(known["filter_greedy"]), "share; the most that sessions tell"
        ),
        "gap_closed_by_the_filter_at_the_floor": mean_of_seeds(
            closed(known["filter_at_the_floor"]), "share; the most that this log can judge"
        ),
        "share_of_the_filter_at_the_floor": mean_of_seeds(
            (values["reinforce"] - known["logging"]) / (known["filter_at_the_floor"] - known["logging"]),
            "share of its gain over the logging policy",
        ),
        "effective_requests": Figure(
            value=float(values["effective_requests"].min()),
            unit="on the test split, the smallest of the seeds",
            target=f"the gate's floor, {values['floor'][0]:.0f}",
            holds=bool((values["effective_requests"] >= values["floor"]).all()),
        ),
        "release_strength": mean_of_seeds(values["strength"], "0 logging policy, 1 as trained"),
    }


def _ablation_figures(
    values: dict[str, Float[np.ndarray, " S"]], default: Float[np.ndarray, " S"]
) -> dict[str, Figure]:
    figures = {}
    for name in ABLATIONS:
        figures[f"ablation.{name}.true_session_reward"] = mean_of_seeds(values[name], REWARD)
        figures[f"ablation.{name}.minus_default"] = mean_of_seeds(values[name] - default, f"{REWARD}, paired by seed")
    return figures


def _judge(
    run: StageRunner, config: LoopConfig, checked: StageRef, split: StageRef, learned: Learned
) -> dict[str, StageRef]:
    """From the trained policy to the decision."""
    baseline = run(config, stages.train_baseline, split=split, world=learned.world)
    policies = {"policy": learned.policy, "baseline": baseline}
    judged = {"split": split, "behavior": learned.behavior, "world": learned.world, **policies}
    estimates = run(config, stages.estimate_policies, **judged)
    probes = run(config, stages.probe_world_model, **judged, estimates=estimates)
    ab = run(config, stages.run_ab, split=split, **policies)
    gate = run(config, stages.judge_evidence, checked=checked, split=split, probes=probes, estimates=estimates, ab=ab)
    return {"baseline": baseline, "estimates": estimates, "gate": gate}


def _prepare(run: StageRunner, *settings: str) -> tuple[StageRef, StageRef]:
    """The shop's log, checked and split: the same for every seed, since shop and traffic have seeds of their own."""
    config = load_config(None, list(settings))
    checked = run.shop_log(config)
    return checked, run(config, stages.split_sessions, checked=checked)


def _loop(run: StageRunner, seed: int, *settings: str) -> dict[str, float]:
    """One whole loop: its decision, and what its policies and their neighbours truly earn."""
    config = load_config(None, [f"seed={seed}", *settings])
    checked, split = _prepare(run, *settings)
    learned = run.learn(config, split)
    judged = _judge(run, config, checked, split, learned)
    policy, baseline = load_policy(learned.policy.path), load_policy(judged["baseline"].path)
    estimates = stages.Estimates.model_validate_json((judged["estimates"].path / "estimates.json").read_bytes())
    outcome = stages.read_decision(judged["gate"].path).outcome
    assert isinstance(estimates.gating, PolicyValue)
    assert isinstance(policy.policy, NeuralSlatePolicy)
    strength = float(policy.policy.strength)
    shop, _ = _shops(config)
    vocabulary = policy.description.vocabulary
    train = SessionReader(open_log(split.path / TRAIN), vocabulary)
    items = item_rewards(load_user_model(learned.world.path).user_model, shop.reward, train)
    earned = {
        "constant": _true_reward(shop, ConstantPolicy(shop.slate_size, items.mean, items.n_requests, SHARP)),
        "cem": _true_reward(shop, baseline.policy),
        "reinforce": _true_reward(shop, policy.policy),
    }
    policy.policy.strength.fill_(1.0)
    return earned | {
        "reinforce_unbound": _true_reward(shop, policy.policy),
        "strength": strength,
        "effective_requests": estimates.gating.effective_sample_size,
        "floor": config.gate.ess_floor(open_log(split.path / TEST).manifest.n_requests),
        "promoted": float(outcome is Outcome.PROMOTE),
        "held": float(outcome is Outcome.HOLD),
    }


def _ablations(run: StageRunner, seed: int, *settings: str) -> dict[str, float]:
    """True reward of the released policy with one setting changed at a time."""
    _, split = _prepare(run, *settings)
    earned = {}
    for name, ablation in ABLATIONS.items():
        config = load_config(None, [f"seed={seed}", *settings, ablation])
        policy = load_policy(run.learn(config, split).policy.path).policy
        earned[name] = _true_reward(_shops(config)[0], policy)
    return earned


def _known(run: StageRunner, *settings: str) -> dict[str, float]:
    """What policies earn that learn nothing or know the shop; the filter also as far out as the gate's floor allows."""
    config = load_config(None, list(settings))
    shop, revealing = _shops(config)
    _, split = _prepare(run, *settings)
    vocabulary = Vocabulary.fit(open_log(split.path / TRAIN))
    reader = SessionReader(open_log(split.path / TEST), vocabulary)
    floor = config.gate.ess_floor(reader.log.manifest.n_requests)
    ratio = ratio_of(reader)

    def judgeable(weight: float) -> bool:
        cap = default_cap(reader.log.manifest.n_requests)
        return judged_sums(reader, FilterPolicy(shop, weight), ratio, cap).effective.value >= floor

    weight = max(weight for weight in FILTER_WEIGHTS if judgeable(weight))
    return {
        "random": _true_reward(shop, UniformPolicy(shop.slate_size)),
        "popularity": _true_reward(shop, PopularityPolicy(shop.slate_size, vocabulary.counts(), SHARP)),
        "logging": _true_reward(shop, storefront.BehaviorPolicy(shop)),
        "filter_greedy": _true_reward(shop, FilterPolicy(shop, SHARP)),
        "filter_at_the_floor": _true_reward(shop, FilterPolicy(shop, weight)),
        "oracle": _true_reward(revealing, OraclePolicy(shop.slate_size)),
    }


def _shops(config: LoopConfig) -> tuple[storefront.Storefront, storefront.Storefront]:
    """The shop, and the shop that reveals the truth."""
    assert isinstance(config.source, storefront.Config)
    return storefront.Storefront(config.source), storefront.Storefront(config.source, reveal_truth=True)


def _true_reward(shop: storefront.Storefront, policy: SlatePolicy) -> float:
    generator = torch.Generator().manual_seed(12_345)
    users = torch.randint(shop.n_users, (JUDGED_SESSIONS,), generator=generator)
    return true_session_value(shop, policy, users, generator, storefront.MAX_STEPS).value
