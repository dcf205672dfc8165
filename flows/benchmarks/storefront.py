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

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from jaxtyping import Float
from scipy import stats as statistics

from components.environments import storefront
from components.environments.rollout import rollout
from components.environments.storefront_filter import FilterPolicy
from components.evaluation.logged_policy import judged_sums, ratio_of
from components.evaluation.policy_value import PolicyValue
from components.evaluation.weights import default_cap, ess_floor
from components.evaluation.world_model_value import item_rewards
from components.experiment.gate import Outcome
from components.interactions.batching import SessionReader
from components.interactions.log_folder import open_log
from components.interactions.splits import TEST, TRAIN
from components.interactions.vocabulary import Vocabulary
from components.policies.policy_folder import load_policy
from components.policies.probe_policies import ConstantPolicy
from components.policies.ranking_policy import NeuralSlatePolicy
from components.policies.slate_policy import OraclePolicy, PopularityPolicy, SlatePolicy, UniformPolicy
from components.world_model.user_model_folder import load_user_model
from flows import stages
from flows.benchmarks import Budget, Context, Figure
from flows.config import LoopConfig, load_config
from flows.stage_store import Stage, StageRef, StageStore, stage_key

BUDGET = Budget(full=90, quick=5)
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
}
ONE_SLATE_FITS_ALL = "source.personal=0"
#: Weights of expected rewards that the filter is tried at, mildest first.
FILTER_WEIGHTS = (4.0, 6.0, 8.0, 12.0, 16.0, 20.0, 24.0, 32.0, 40.0)
#: Makes the highest score all but certain to come first.
SHARP = 1e4
REWARD = "reward a session"


def measure(context: Context) -> dict[str, Figure]:
    """Decisions of whole loops, true mean session reward of every policy, and the ablations."""
    n_loops = context.seeds or (2 if context.quick else 10)
    n_ablated = min(n_loops, 5)
    quick = QUICK if context.quick else ()

    def keep(part: str, compute: Callable[[], dict[str, float]]) -> dict[str, float]:
        return context.keep(part, compute)

    loops = [keep(f"loop-{seed}", lambda seed=seed: _loop(seed, *quick)) for seed in range(n_loops)]  # type: ignore[misc]
    alike = [
        keep(f"one-slate-{seed}", lambda seed=seed: _loop(seed, *quick, ONE_SLATE_FITS_ALL))  # type: ignore[misc]
        for seed in range(n_loops)
    ]
    ablated = [keep(f"ablation-{seed}", lambda seed=seed: _ablations(seed, *quick)) for seed in range(n_ablated)]  # type: ignore[misc]
    known = keep("known", lambda: _known(*quick))
    by_loop = _columns(loops)
    return {
        **_quality({name: values[:n_ablated] for name, values in by_loop.items()}, known),
        "promoted": _share(by_loop["promoted"], "at least 0.8", lambda share: share >= 0.8),
        "held": _share(by_loop["held"]),
        "one_slate_fits_all.promoted": _share(_columns(alike)["promoted"], "at most 0.1", lambda share: share <= 0.1),
        "one_slate_fits_all.reinforce_minus_cem": _mean(
            _columns(alike)["reinforce"] - _columns(alike)["cem"], f"{REWARD}, {n_loops} seeds"
        ),
        **_ablation_figures(_columns(ablated), by_loop["reinforce"][:n_ablated]),
    }


def _quality(values: dict[str, Float[np.ndarray, " S"]], known: dict[str, float]) -> dict[str, Figure]:
    figures = {f"{name}.true_session_reward": Figure(value=reward, unit=REWARD) for name, reward in known.items()}
    for name in ("constant", "cem", "reinforce", "reinforce_unbound"):
        figures[f"{name}.true_session_reward"] = _mean(values[name], REWARD)

    def closed(reward: Float[np.ndarray, " S"] | float) -> Float[np.ndarray, " S"]:
        return np.asarray((reward - values["cem"]) / (known["oracle"] - values["cem"]))

    return figures | {
        "reinforce_minus_cem": _mean(values["reinforce"] - values["cem"], REWARD, "interval above 0", above=0.0),
        "gap_closed_from_cem_to_oracle": _mean(closed(values["reinforce"]), "share", "at least 0.5", above=0.5),
        "gap_closed_by_the_filter_greedy": _mean(closed(known["filter_greedy"]), "share; the most that sessions tell"),
        "gap_closed_by_the_filter_at_the_floor": _mean(
            closed(known["filter_at_the_floor"]), "share; the most that this log can judge"
        ),
        "share_of_the_filter_at_the_floor": _mean(
            (values["reinforce"] - known["logging"]) / (known["filter_at_the_floor"] - known["logging"]),
            "share of its gain over the logging policy",
        ),
        "effective_requests": Figure(
            value=float(values["effective_requests"].min()),
            unit="on the test split, the smallest of the seeds",
            target=f"the gate's floor, {values['floor'][0]:.0f}",
            holds=bool((values["effective_requests"] >= values["floor"]).all()),
        ),
        "release_strength": _mean(values["strength"], "0 logging policy, 1 as trained"),
    }


def _ablation_figures(
    values: dict[str, Float[np.ndarray, " S"]], default: Float[np.ndarray, " S"]
) -> dict[str, Figure]:
    figures = {}
    for name in ABLATIONS:
        figures[f"ablation.{name}.true_session_reward"] = _mean(values[name], REWARD)
        figures[f"ablation.{name}.minus_default"] = _mean(values[name] - default, f"{REWARD}, paired by seed")
    return figures


class _Run:
    """The loop's stages in a folder, computed once where settings and upstream are the same; without Prefect."""

    def __init__(self, root: Path) -> None:
        self.store = StageStore(root)

    def __call__(self, config: LoopConfig, stage: Stage, **upstream: StageRef) -> StageRef:
        key = stage_key(stage.name, config.model_dump(mode="json", include=set(stage.settings)), upstream)
        if self.store.is_complete(stage.name, key):
            return StageRef(path=self.store.folder(stage.name, key), digest=key)
        folders = {role: ref.path for role, ref in upstream.items()}

        def compute(out: Path) -> None:
            stage.compute(config, **folders, out=out, progress=lambda message, share: None)

        return self.store.write(stage.name, key, compute, {role: ref.digest for role, ref in upstream.items()})

    def learn(self, config: LoopConfig) -> dict[str, StageRef]:
        """Everything up to the trained policy."""
        dataset = self(config, stages.import_source, path=StageRef(path=Path(), digest="simulated"))
        checked = self(config, stages.validate_log, dataset=dataset)
        split = self(config, stages.split_sessions, checked=checked)
        users = self(config, stages.fit_user_model, split=split)
        behavior = self(config, stages.fit_behavior, split=split, users=users)
        world = self(config, stages.fit_world_model, split=split, users=users, behavior=behavior)
        policy = self(config, stages.train_policy, split=split, world=world, behavior=behavior)
        return {"checked": checked, "split": split, "behavior": behavior, "world": world, "policy": policy}

    def judge(self, config: LoopConfig, learned: dict[str, StageRef]) -> dict[str, StageRef]:
        """From the trained policy to the decision."""
        split, policy = learned["split"], learned["policy"]
        baseline = self(config, stages.train_baseline, split=split, world=learned["world"])
        judged = {name: learned[name] for name in ("split", "behavior", "world", "policy")} | {"baseline": baseline}
        estimates = self(config, stages.estimate_policies, **judged)
        probes = self(config, stages.probe_world_model, **judged, estimates=estimates)
        ab = self(config, stages.run_ab, split=split, policy=policy, baseline=baseline)
        checked = learned["checked"]
        gate = self(
            config, stages.judge_evidence, checked=checked, split=split, probes=probes, estimates=estimates, ab=ab
        )
        return {"baseline": baseline, "estimates": estimates, "gate": gate}


def _loop(seed: int, *settings: str) -> dict[str, float]:
    """One whole loop: its decision, and what its policies and their neighbours truly earn."""
    config = load_config(None, [f"seed={seed}", *settings])
    with TemporaryDirectory() as scratch:
        run = _Run(Path(scratch))
        learned = run.learn(config)
        judged = run.judge(config, learned)
        policy, baseline = load_policy(learned["policy"].path), load_policy(judged["baseline"].path)
        estimates = stages.Estimates.model_validate_json((judged["estimates"].path / "estimates.json").read_bytes())
        outcome = stages.read_decision(judged["gate"].path).outcome
        assert isinstance(estimates.gating, PolicyValue)
        assert isinstance(policy.policy, NeuralSlatePolicy)
        strength = float(policy.policy.strength)
        shop, _ = _shops(config)
        vocabulary = policy.description.vocabulary
        train = SessionReader(open_log(learned["split"].path / TRAIN), vocabulary)
        items = item_rewards(load_user_model(learned["world"].path).user_model, shop.reward, train)
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
            "floor": _floor(config, open_log(learned["split"].path / TEST).manifest.n_requests),
            "promoted": float(outcome is Outcome.PROMOTE),
            "held": float(outcome is Outcome.HOLD),
        }


def _ablations(seed: int, *settings: str) -> dict[str, float]:
    """True reward of the released policy with one setting changed at a time."""
    with TemporaryDirectory() as scratch:
        run = _Run(Path(scratch))
        earned = {}
        for name, ablation in ABLATIONS.items():
            config = load_config(None, [f"seed={seed}", *settings, ablation])
            policy = load_policy(run.learn(config)["policy"].path).policy
            earned[name] = _true_reward(_shops(config)[0], policy)
        return earned


def _known(*settings: str) -> dict[str, float]:
    """What policies earn that learn nothing or know the shop; the filter also as far out as the gate's floor allows."""
    config = load_config(None, list(settings))
    shop, revealing = _shops(config)
    with TemporaryDirectory() as scratch:
        run = _Run(Path(scratch))
        dataset = run(config, stages.import_source, path=StageRef(path=Path(), digest="simulated"))
        checked = run(config, stages.validate_log, dataset=dataset)
        split = run(config, stages.split_sessions, checked=checked)
        vocabulary = Vocabulary.fit(open_log(split.path / TRAIN))
        reader = SessionReader(open_log(split.path / TEST), vocabulary)
        floor = _floor(config, reader.log.manifest.n_requests)
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


def _floor(config: LoopConfig, n_requests: int) -> float:
    return ess_floor(n_requests, at_least=config.gate.ess_floor_requests, share=config.gate.ess_floor_share)


def _true_reward(shop: storefront.Storefront, policy: SlatePolicy) -> float:
    generator = torch.Generator().manual_seed(12_345)
    users = torch.randint(shop.n_users, (JUDGED_SESSIONS,), generator=generator)
    return float(rollout(shop, policy, users, generator, storefront.MAX_STEPS).rewards.sum((1, 2)).mean())


def _columns(results: list[dict[str, float]]) -> dict[str, Float[np.ndarray, " S"]]:
    return {name: np.array([result[name] for result in results]) for name in results[0]}


def _mean(values: Float[np.ndarray, " S"], unit: str, target: str | None = None, above: float | None = None) -> Figure:
    """Mean over seeds with Student's interval; the target holds where the whole interval lies above."""
    mean = float(values.mean())
    if len(values) < 2 or values.std() == 0:
        return Figure(value=mean, unit=unit, target=target, holds=None if above is None else mean > above)
    half = float(statistics.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)))
    interval = (mean - half, mean + half)
    return Figure(
        value=mean, interval=interval, unit=unit, target=target, holds=None if above is None else interval[0] > above
    )


def _share(
    happened: Float[np.ndarray, " S"], target: str | None = None, holds: Callable[[float], bool] | None = None
) -> Figure:
    """Share of seeds, with the exact binomial interval."""
    share, n = float(happened.mean()), len(happened)
    interval = statistics.binomtest(int(happened.sum()), n).proportion_ci()
    return Figure(
        value=share,
        interval=(float(interval.low), float(interval.high)),
        unit=f"share of {n} seeds",
        target=target,
        holds=None if holds is None else holds(share),
    )
