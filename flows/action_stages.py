"""What each stage of a loop of actions computes: folders in, one folder out, as in `stages`.

The world model is one of actions, PPO learns in it, and the baseline is one action for everybody that the cross-entropy
method finds there. Both are released pulled back to the logged actions, where the log can judge them; as trained they
are among the probes, since what lives off an error of the world model lies there.
"""

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from components.agents.constant_cem import train_constant_cem
from components.agents.ppo import train_ppo
from components.environments.continuous import SessionTotals, run_sessions
from components.environments.virtual_taobao import VirtualTaobao
from components.evaluation.action_evidence import action_evidence, choose_radius, gaussian_of, known_rewards, study
from components.evaluation.action_support import action_cloud
from components.evaluation.action_trust import judge_action_model, probe_action_policy
from components.evaluation.exploit_probes import Probe, exploit_probes
from components.evaluation.policy_value import Estimate, PolicyValue
from components.evaluation.world_model_trust import WorldModelTrust
from components.experiment.ab import FEWEST_USERS, analyze_ab, assign_arm
from components.experiment.guardrails import Metric
from components.interactions.log_folder import open_log
from components.interactions.splits import TEST, TRAIN, VALIDATION
from components.policies.action_policy_folder import (
    ActionPolicyDescription,
    PullDescription,
    StoredActionPolicy,
    load_action_policy,
    save_action_policy,
)
from components.policies.continuous_policy import ContinuousPolicy, UniformActions
from components.policies.pulled_back import PulledBack
from components.world_model.action_model import ActionModel, fit_action_model, load_action_model, save_action_model
from components.world_model.training import Progress
from flows import stages
from flows.config import LoopConfig, logs_actions
from flows.run_record import Curve, Release
from flows.stage_store import stage
from flows.stages import Estimates, likelihood_curves, share_to_keep, write_ab, write_curves, write_probes

POLICY, BASELINE = "ppo", "constant"
#: Looks at a policy while it learns, and sessions of one in the world model.
LOOKS, LOOK_SESSIONS = 20, 500
#: Radii, as shares of the release's own, at which milder forms of the challenger are probed.
PROBED_SHARES = (0.25, 0.5)


def names_of(config: LoopConfig) -> tuple[str, str]:
    """What a loop's challenger and baseline are called."""
    return (POLICY, BASELINE) if logs_actions(config) else (stages.POLICY, stages.BASELINE)


@stage("world-model", "action_model", "trust")
def fit_world_model(config: LoopConfig, split: Path, out: Path, progress: Progress) -> None:
    """Fit the world model of actions by likelihood, then judge it on requests that it never saw."""
    train, validation, test = (open_log(split / name) for name in (TRAIN, VALIDATION, TEST))
    fitted = fit_action_model(train, validation, config.action_model, config.seed, progress)
    save_action_model(fitted.model, out)
    progress("judging the world model", 1.0)
    trust = judge_action_model(fitted.model, test, config.trust)
    (out / "trust.json").write_text(trust.model_dump_json(indent=2))
    write_curves(out, likelihood_curves("world model", fitted.history))


@stage("policy", "ppo", "evaluation", "gate", "device")
def train_policy(config: LoopConfig, split: Path, world: Path, out: Path, progress: Progress) -> None:
    """PPO in the world model; then choose how far the release may go from the logged actions."""
    model = load_action_model(world).to(config.device)
    looks = _Looks(model, config.ppo.steps, progress, POLICY)
    trained = train_ppo(model, config.ppo, config.seed, looks).cpu()
    stored = StoredActionPolicy(
        ActionPolicyDescription(
            name=POLICY,
            loop=config.loop,
            kind="tanh-gaussian",
            observation_size=model.observation_size,
            action_size=model.action_size,
            hidden=config.ppo.hidden,
        ),
        trained,
    )
    release = _release(config, split, stored, out)
    (out / "release.json").write_text(release.model_dump_json())
    write_curves(out, [looks.curve("PPO in the world model")])


@stage("baseline", "constant_cem", "evaluation", "gate", "device")
def train_baseline(config: LoopConfig, split: Path, world: Path, out: Path, progress: Progress) -> None:
    """Search for one action for everybody by CEM, in the same world model; it is released by the same rule."""
    model = load_action_model(world).to(config.device)
    looks = _Looks(model, config.constant_cem.steps, progress, BASELINE)
    trained = train_constant_cem(model, config.constant_cem, config.seed, looks).cpu()
    stored = StoredActionPolicy(
        ActionPolicyDescription(
            name=BASELINE,
            loop=config.loop,
            kind="constant",
            observation_size=model.observation_size,
            action_size=model.action_size,
            smoothing=trained.deviation,
        ),
        trained,
    )
    _release(config, split, stored, out)
    write_curves(out, [looks.curve("CEM in the world model")])


class _Looks:
    """Watches an agent: what a request earns with its most typical action, in the world model."""

    def __init__(self, model: ActionModel, steps: int, progress: Progress, name: str) -> None:
        self._model, self._steps, self._progress, self._name = model, steps, progress, name
        self._seen: list[float] = []

    def __call__(self, policy: ContinuousPolicy, steps: int) -> None:
        self._progress(f"training {self._name}", min(steps / self._steps, 1.0))
        if steps >= self._steps * (len(self._seen) + 1) / LOOKS:
            generator = torch.Generator(self._model.observation_scale.device).manual_seed(0)
            self._seen.append(run_sessions(self._model, policy.mode, LOOK_SESSIONS, generator).mean_reward)

    def curve(self, name: str) -> Curve:
        """What was seen."""
        return Curve(name=name, x="look", y="reward of a request", values=tuple(self._seen))


def _release(config: LoopConfig, split: Path, stored: StoredActionPolicy, out: Path) -> Release:
    """Save a policy, pulled back as far as the log's judgement on it asks for; returns how far it was left to go."""
    release = Release(strength=1.0, validation_ess=None, required_ess=None)
    if config.evaluation.pull:
        validation = open_log(split / VALIDATION)
        required = share_to_keep(config, known_rewards(open_log(split / TEST)).n_known)
        cloud = action_cloud(open_log(split / TRAIN))
        choice = choose_radius(stored.trained, cloud, validation, required)
        pull = PullDescription(radius=choice.radius, logged_radius=cloud.radius, n=cloud.n)
        stored = StoredActionPolicy(stored.description.model_copy(update={"pull": pull}), stored.trained, cloud)
        release = Release(
            strength=choice.kept,
            validation_ess=choice.ess_share * choice.n_known,
            required_ess=required * choice.n_known,
        )
    save_action_policy(stored, out)
    return release


@stage("estimates")
def estimate_policies(
    config: LoopConfig, split: Path, policy: Path, baseline: Path, out: Path, progress: Progress
) -> None:
    """NCIS and DR of both policies on the held-out test log, or the reason why there can be none."""
    studied = study(open_log(split / TEST), config.seed)
    estimates: list[Estimate] = []
    support = []
    for number, folder in enumerate((policy, baseline)):
        stored = load_action_policy(folder)
        progress(f"estimating {stored.description.name}", number / 2)
        evidence = action_evidence(studied, stored.policy, stored.description.name)
        estimates += [evidence.value] if evidence.cross_check is None else [evidence.value, evidence.cross_check]
        support += [] if evidence.distance is None else [evidence.distance]
    gating, *others = (part for part in estimates if part.policy == POLICY)
    record = Estimates(
        gating=gating,
        cross_check=others[0] if others else gating,
        estimates=tuple(estimates),
        support=tuple(support),
        ranking=(),
        cap_sensitivity=None,
        propensity_check=studied.densities,
    )
    (out / "estimates.json").write_text(record.model_dump_json(indent=2))


@stage("probes", "trust", "gate")
def probe_world_model(
    config: LoopConfig, split: Path, world: Path, policy: Path, baseline: Path, out: Path, progress: Progress
) -> None:
    """Ask world model and log what policies are worth: releases, the same as trained, and who wrote the log."""
    studied, model = study(open_log(split / TEST), config.seed), load_action_model(world)
    challenger, constant = load_action_policy(policy), load_action_policy(baseline)
    needed = config.gate.ess_floor(studied.rewards.n_known)
    probes: list[Probe] = []
    asked = _probed(challenger, constant, gaussian_of(studied.cloud))
    for number, (name, judged) in enumerate(asked.items()):
        progress(f"probing the world model with {name}", number / len(asked))
        evidence = action_evidence(studied, judged, name)
        if isinstance(evidence.value, PolicyValue):
            probes.append(probe_action_policy(model, studied, judged, evidence, needed))
    trust = WorldModelTrust.model_validate_json((world / "trust.json").read_bytes())
    write_probes(trust, exploit_probes(tuple(probes), POLICY, config.trust), config.trust, out)


def _probed(
    challenger: StoredActionPolicy, constant: StoredActionPolicy, logged: PulledBack
) -> dict[str, ContinuousPolicy]:
    asked: dict[str, ContinuousPolicy] = {
        POLICY: challenger.policy,
        BASELINE: constant.policy,
        "logged actions": logged,
        "random": UniformActions(challenger.description.action_size),
    }
    for stored in (challenger, constant):
        pull, cloud = stored.description.pull, stored.cloud
        if pull is not None and cloud is not None:
            asked[f"{stored.description.name} as trained"] = stored.trained
            for share in PROBED_SHARES if stored is challenger else ():
                asked[f"{POLICY} at {share:g}"] = PulledBack(stored.trained, cloud, share * pull.radius)
    return asked


@stage("ab-test", "ab")
def run_ab(config: LoopConfig, source: Path, policy: Path, baseline: Path, out: Path, progress: Progress) -> None:
    """Policy against baseline in the simulator that wrote the log, on users of its own.

    Each session is of a new user, and sessions end as the simulator says. Nobody can act on a simulated A/B before its
    end, so its looks are shown and the planned end counts. An arm of fewer than two users gives no result.
    """
    n = config.ab.sessions
    users = [f"ab-user-{number}" for number in range(n)]
    treated = assign_arm(users, salt=config.ab.salt, share=config.ab.treatment_share)
    if min(treated.sum(), (~treated).sum()) < FEWEST_USERS:
        write_ab(out, None)
        return
    progress("A/B", 0.5)
    environment, generator = VirtualTaobao(source), torch.Generator().manual_seed(config.seed + 2)
    rewards, metrics = np.zeros(n), {metric: np.zeros(n) for metric in Metric}
    for arm, folder in ((True, policy), (False, baseline)):
        rows = treated == arm
        totals = _sessions(environment, load_action_policy(folder).policy, int(rows.sum()), generator)
        rewards[rows] = totals.rewards.double().numpy()
        for metric, values in _metrics(totals).items():
            metrics[metric][rows] = values
    result = analyze_ab(
        np.arange(n),
        rewards,
        treated,
        label="true simulator",
        treatment=POLICY,
        control=BASELINE,
        planned_share=config.ab.treatment_share,
        covariate=None,
        metrics=metrics,
        replayed=(),
        day=np.arange(n) * config.ab.days // n,
        planned_sessions=n,
    )
    write_ab(out, result)


def _sessions(
    environment: VirtualTaobao, policy: ContinuousPolicy, n: int, generator: torch.Generator
) -> SessionTotals:
    def act(observations: Float[Tensor, "B S"]) -> Float[Tensor, "B A"]:
        return policy.act(observations, generator).actions.float()

    return run_sessions(environment, act, n, generator)


def _metrics(totals: SessionTotals) -> dict[Metric, Float[np.ndarray, " B"]]:
    """The guarded metrics of each session; a reward is a page's clicks, and nothing is bought."""
    steps = totals.steps.double().numpy()
    return {
        Metric.SESSION_LENGTH: steps,
        Metric.CLICKS: totals.rewards.double().numpy(),
        Metric.PURCHASES: np.zeros(len(steps)),
        Metric.FIRST_REQUEST_EXITS: (steps == 1).astype(np.float64),
    }
