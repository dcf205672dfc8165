"""What each stage of the loop computes: folders in, one folder out. Nothing here knows of Prefect.

A stage is a function of its upstream folders and the configuration; whatever it writes into `out` is its result.
"""

import copy
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import numpy as np
import polars as pl
import torch
from jaxtyping import Bool, Float
from pydantic import BaseModel, TypeAdapter
from torch import Tensor

from components.agents.behavior import train_behavior
from components.agents.cem import train_cem
from components.agents.propensities import (
    CrossFittedBehavior,
    EstimatedReader,
    cross_fit,
    load_cross_fitted,
    save_cross_fitted,
)
from components.agents.reinforce import ReinforceConfig, train_reinforce
from components.environments import storefront, virtual_taobao_log
from components.environments.interface import Environment
from components.environments.rollout import LEARNED_FEEDBACK, rollout
from components.errors import InputError
from components.evaluation.cap_sensitivity import CapSensitivity
from components.evaluation.direct_method import sample_slates
from components.evaluation.estimates import estimate
from components.evaluation.exploit_probes import (
    ExploitProbes,
    Probe,
    exploit_probes,
    probe_parts,
    probe_policy,
)
from components.evaluation.logged_policy import (
    choose_strength,
    judged_parts,
    known_rewards,
    ranking_quality,
    ratio_of,
)
from components.evaluation.logged_requests import KnownRewards
from components.evaluation.policy_value import About, Estimand, Estimate, NotIdentified, PolicyValue, identify
from components.evaluation.propensity_check import PropensityCheck, batch_logits, check_propensities
from components.evaluation.support import SupportDistance, support_distance
from components.evaluation.trust_score import TrustScore, trust_score
from components.evaluation.two_sample import two_sample_test
from components.evaluation.weights import default_cap
from components.evaluation.world_model_trust import (
    TrustConfig,
    WorldModelTrust,
    baseline_nats,
    compare_requests,
    compare_sessions,
    judge_trust,
    response_calibrations,
    tells_of_ends,
)
from components.evaluation.world_model_value import item_rewards
from components.experiment.ab import FEWEST_USERS, AbLabel, AbResult, analyze_ab, assign_arm
from components.experiment.evidence import GateEvidence, TrustSummary
from components.experiment.gate import Decision, decide
from components.experiment.guardrails import Metric, session_metrics
from components.experiment.logged_sessions import mean_logged_rewards
from components.interactions.as_of import write_known_by
from components.interactions.batching import SessionReader, SessionTable
from components.interactions.contract import Evidence as EvidenceLevel
from components.interactions.contract import Manifest
from components.interactions.covisitation import count_covisitation
from components.interactions.importers import importers, interaction_log
from components.interactions.log_folder import Log, open_log
from components.interactions.splits import HOLDOUT, TEST, TRAIN, VALIDATION, split_log
from components.interactions.vocabulary import Vocabulary
from components.policies.policy_folder import PolicyDescription, StoredPolicy, load_policy, save_policy, shape_of
from components.policies.probe_policies import ConstantPolicy, InvertedPolicy
from components.policies.ranking_policy import EncodedPolicy, NeuralSlatePolicy, RankingPolicy
from components.policies.request_features import RequestFeatures
from components.policies.session_encoder import EncoderShape, SessionEncoder
from components.policies.slate_policy import PopularityPolicy, SlatePolicy, UniformPolicy
from components.validation.checks import DataChecks, validate
from components.world_model.adversarial import train_adversarially
from components.world_model.discriminator import Discriminator
from components.world_model.environment import POOL_SESSIONS, WorldModel
from components.world_model.training import Epoch, Progress, evaluate_likelihood, train_by_likelihood
from components.world_model.user_model import UserModel
from components.world_model.user_model_folder import StoredUserModel, load_user_model, save_user_model
from flows.config import LoopConfig, interaction_database
from flows.run_record import Curve, RankingQuality, Release
from flows.stage_store import stage

POLICY, BASELINE = "reinforce", "cem"
#: The estimators that the gate reads.
GATING, CROSS_CHECK = "one-request NCIS", "DR"
#: Test sessions, drawn at random, at whose requests the world model says what policies are worth: there its values vary
#: little, unlike those of the log.
PROBED_SESSIONS = 2_000
#: Steps from the logging policy (0) to the trained one (1) at which milder forms of the challenger are probed.
PROBED_STRENGTHS = (0.25, 0.5, 1.0)
CURVES, AB = "curves.json", "ab.json"
_AB_RESULT: TypeAdapter[AbResult | None] = TypeAdapter(AbResult | None)
#: Below the behavior stage: the cross-fitted estimate of log_probs, where a log needs one.
CROSS_FITTED = "cross-fitted"
#: Sessions on which the consistency of log_probs is tested; drawn at random where a log has more.
CHECKED_SESSIONS = 20_000
#: Training sessions on which request features are standardised.
STANDARDIZING_SESSIONS = 4_096
#: Requests of each of them: one long session must not pad all others to its length.
STANDARDIZING_STEPS = 20
P = TypeVar("P", NeuralSlatePolicy, RankingPolicy)


def write_source_log(config: LoopConfig, path: Path | None, out: Path) -> Log:
    """Translate the configuration's source, as it was known at `as_of`, into a log in `out`.

    Args:
        config: its source, loop and `as_of` count.
        path: what `source_path` gave; without one a simulator runs, or the endpoint's own database is read.
        out: folder of the log.

    Raises:
        InputError: the source cannot be read, or has no times where `as_of` asks for them.
    """
    source, as_of = config.source, config.as_of
    if isinstance(source, interaction_log.Config):
        # Of these tables the importer knows itself when their feedback was known.
        return interaction_log.import_database(source, interaction_database(path), out, config.loop, as_of)
    if as_of is None:
        return _write_whole_log(config, path, out)
    with TemporaryDirectory() as scratch:
        return write_known_by(_write_whole_log(config, path, Path(scratch) / "log"), as_of, out)


def _write_whole_log(config: LoopConfig, path: Path | None, out: Path) -> Log:
    """All that was logged by `as_of`, whether or not its feedback was known."""
    source = config.source
    if isinstance(source, storefront.Config):
        return storefront.write_storefront_log(source, config.loop, out)
    assert path is not None
    if isinstance(source, virtual_taobao_log.Config):
        return virtual_taobao_log.write_virtual_taobao_log(source, path, out, config.loop)
    importer = importers()[source.name]  # type: ignore[attr-defined]
    return importer.import_log(source, path, out, config.loop, config.as_of)


@stage("import-data", "source")
def import_source(config: LoopConfig, path: Path, out: Path, progress: Progress) -> None:
    """Write the source's log into `out/log`, as far as it was known at `as_of`."""
    progress(f"importing {config.source.name}", 0.0)  # type: ignore[attr-defined]
    write_source_log(config, None if path == Path() else path, out / "log")


@stage("validate", "validation")
def validate_log(config: LoopConfig, dataset: Path, out: Path, progress: Progress) -> None:
    """Check the log; write what is accepted, the quarantine and the Data Docs."""
    progress("checking the log", 0.0)
    validate(open_log(dataset / "log"), config.validation, out, config.as_of)


@stage("split", "split", "source")
def split_sessions(config: LoopConfig, checked: Path, out: Path, progress: Progress) -> None:
    """Cut the log into train, validation and test, and a holdout of users where no simulator can judge."""
    progress("splitting", 0.0)
    split_log(open_log(checked / "log"), config.split, out, with_holdout=not _has_simulator(config))


@stage("user-model", "encoder", "user_model")
def fit_user_model(config: LoopConfig, split: Path, out: Path, progress: Progress) -> None:
    """Fit the user model to the training sessions by likelihood.

    Raises:
        InputError: the reward weighs feedback that the user model does not learn.
    """
    weighed = open_log(split / TRAIN).manifest.reward.weights
    if unlearned := sorted(set(weighed) - set(LEARNED_FEEDBACK)):
        raise InputError(
            f"reward.weights.{unlearned[0]}: a world model of clicks and purchases cannot earn it; expected weights of "
            f"{' and '.join(LEARNED_FEEDBACK)} alone"
        )
    fitted = _fit_user_model(config, open_log(split / TRAIN), open_log(split / VALIDATION), config.seed, progress)
    save_user_model(fitted.stored, out)
    write_curves(out, likelihood_curves("user model", fitted.history))


@stage("behavior", "behavior", "candidates", "slate_size")
def fit_behavior(config: LoopConfig, split: Path, users: Path, out: Path, progress: Progress) -> None:
    """Estimate the logging policy from the slates that it showed; cross-fitted too where a log lacks log_probs."""
    stored = load_user_model(users)
    train = SessionReader(open_log(split / TRAIN), stored.vocabulary)
    policy = _new_policy(config, stored, train, NeuralSlatePolicy)
    judged = (SessionReader(open_log(split / name), stored.vocabulary) for name in (TRAIN, VALIDATION, TEST))
    if any(map(_needs_propensities, judged)):
        fitted = cross_fit(policy, train, config.behavior, config.seed, progress)
        if fitted is not None:
            save_cross_fitted(fitted, config.loop, stored.vocabulary, out / CROSS_FITTED)
    history = _fit_behavior(config, policy, train, progress)
    policy.strength.fill_(0.0)
    _save(config, policy, stored.vocabulary, "behavior", out)
    write_curves(out, [Curve(name="behavior policy", x="pass", y="nats a slate", values=history)] if history else [])


def _needs_propensities(reader: SessionReader) -> bool:
    """Whether log_probs are all that a log lacks to tell a policy's value: then it is worth while to estimate them."""
    evidence = reader.log.manifest.evidence
    return (
        evidence is EvidenceLevel.SLATES
        and identify(evidence, known_rewards(reader), propensities_estimated=True) is None
    )


def share_to_keep(config: LoopConfig, n_known: int) -> float:
    """Share of requests with known rewards that a release keeps effective, so that the gate counts its estimate.

    Args:
        config: the gate's floor, and by how much it is to be exceeded.
        n_known: requests of the test log whose reward is known: no others speak of a policy.
    """
    return min(1.0, config.evaluation.ess_margin * config.gate.ess_floor(n_known) / max(n_known, 1))


def _open_to_judge(log: Log, vocabulary: Vocabulary, behavior: CrossFittedBehavior | None) -> SessionReader:
    """A log with the log_probs that there are: its own, or the estimate."""
    return SessionReader(log, vocabulary) if behavior is None else EstimatedReader(log, vocabulary, behavior)


def read_to_judge(log: Log, stored: StoredPolicy, config: LoopConfig, progress: Progress) -> SessionReader:
    """A log as a packaged policy is judged on it: missing log_probs are estimated, cross-fitted on this very log."""
    reader = SessionReader(log, stored.description.vocabulary)
    if not _needs_propensities(reader):
        return reader
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        untrained = NeuralSlatePolicy(stored.policy.features, log.manifest.slate_size)
    behavior = cross_fit(untrained, reader, config.behavior, config.seed, progress)
    return _open_to_judge(log, stored.description.vocabulary, behavior)


@stage("world-model", "adversarial", "trust", "candidates", "slate_size", "ab")
def fit_world_model(
    config: LoopConfig, split: Path, users: Path, behavior: Path, out: Path, progress: Progress
) -> None:
    """Play the user model against a discriminator, then judge it on sessions that it never saw."""
    stored = load_user_model(users)
    train, validation, test = (
        SessionReader(open_log(split / name), stored.vocabulary) for name in (TRAIN, VALIDATION, TEST)
    )
    logging_policy = load_policy(behavior).policy
    world = _world_model(config, stored, train)
    training = train_adversarially(world, logging_policy, train, validation, config.adversarial, config.seed, progress)
    save_user_model(stored, out)
    torch.save(training.discriminator.state_dict(), out / "discriminator.pt")
    rounds = training.history
    write_curves(
        out,
        [
            Curve(
                name="discriminator",
                x="round",
                y="accuracy (0.5: cannot tell)",
                values=tuple(part.discriminator_accuracy for part in rounds),
            )
        ]
        if rounds
        else [],
    )
    progress("judging the world model", 1.0)
    trust = _judge_world_model(
        config, stored, logging_policy, test, rounds[-1].discriminator_accuracy if rounds else None
    )
    (out / "trust.json").write_text(trust.model_dump_json(indent=2))


@stage("policy", "behavior", "reinforce", "evaluation", "gate", "candidates", "slate_size")
def train_policy(config: LoopConfig, split: Path, world: Path, behavior: Path, out: Path, progress: Progress) -> None:
    """REINFORCE in the world model; then choose how far the release may go from the logging policy."""
    stored, cross_fitted = load_user_model(world), load_cross_fitted(behavior / CROSS_FITTED)
    train, validation = (
        _open_to_judge(open_log(split / name), stored.vocabulary, cross_fitted) for name in (TRAIN, VALIDATION)
    )
    manifest = train.log.manifest
    has_log_probs = manifest.evidence is EvidenceLevel.PROPENSITIES or cross_fitted is not None
    policy = _new_policy(config, stored, train, NeuralSlatePolicy)
    _fit_behavior(config, policy, train, progress)
    if config.reinforce.start > 0:
        policy.start_at(config.reinforce.start * _expected_reward_weights(policy, stored, train))
    else:
        policy.start_at_behavior()
    environment = _world_model(config, stored, train)
    discriminator = _load_discriminator(stored, world) if config.adversarial.rounds else None
    training = train_reinforce(
        policy,
        environment,
        torch.arange(environment.n_users),
        train if has_log_probs else None,
        reinforce_on(manifest, config.reinforce),
        config.seed,
        progress,
        None if discriminator is None else discriminator.relative_beliefs,
        # Without slates a click is the meeting of a drawn item and the slate, and nothing to be told beforehand.
        environment.expected_rewards if manifest.slate_size else None,
    )
    release = Release(strength=1.0, validation_ess=None, required_ess=None)
    if has_log_probs and config.evaluation.pull:
        test = _open_to_judge(open_log(split / TEST), stored.vocabulary, cross_fitted)
        required = share_to_keep(config, known_rewards(test).n_known)
        choice = choose_strength(policy, validation, required, ratio_of(validation, test))
        release = Release(
            strength=choice.strength,
            validation_ess=choice.ess_share * choice.n_known,
            required_ess=required * choice.n_known,
            propensities_estimated=validation.propensities_estimated,
        )
    _save(config, policy, stored.vocabulary, POLICY, out)
    (out / "release.json").write_text(release.model_dump_json())
    write_curves(
        out,
        [
            Curve(
                name="REINFORCE in the world model",
                x="step",
                y="reward of a session",
                values=tuple(step.mean_session_reward for step in training.history),
            ),
            Curve(
                name="distance to the logging policy",
                x="step",
                y="nats (Rényi 2)",
                values=tuple(step.divergence for step in training.history),
            ),
        ],
    )


def reinforce_on(manifest: Manifest, config: ReinforceConfig) -> ReinforceConfig:
    """REINFORCE as a log allows it: what rests on assumptions that the log does not make is left out."""
    if manifest.evidence is EvidenceLevel.CLICKS:
        # There is no logging policy to stay close to, and no log that could judge what stays close.
        return config.model_copy(update={"pull": 0.0})
    if config.credit == "positions" and not manifest.is_cascade:
        # Responses may depend on the positions below: they share the credit.
        return config.model_copy(update={"credit": "slate"})
    return config


@stage("baseline", "cem", "candidates", "slate_size")
def train_baseline(config: LoopConfig, split: Path, world: Path, out: Path, progress: Progress) -> None:
    """Tune one constant vector of ranking weights by CEM, in the same world model."""
    stored = load_user_model(world)
    train = SessionReader(open_log(split / TRAIN), stored.vocabulary)
    policy = _new_policy(config, stored, train, RankingPolicy)
    policy.weights.copy_(config.cem.start * _expected_reward_weights(policy, stored, train))
    environment = _world_model(config, stored, train)
    training = train_cem(policy, environment, torch.arange(environment.n_users), config.cem, config.seed, progress)
    _save(config, policy, stored.vocabulary, BASELINE, out)
    write_curves(
        out,
        [Curve(name="CEM in the world model", x="iteration", y="reward of a session (elite)", values=training.history)],
    )


class Estimates(BaseModel):
    """What the estimation stage leaves in `estimates.json`."""

    gating: Estimate
    cross_check: Estimate
    estimates: tuple[Estimate, ...]
    support: tuple[SupportDistance, ...]
    ranking: tuple[RankingQuality, ...]
    cap_sensitivity: CapSensitivity | None
    propensity_check: PropensityCheck | None


@stage("estimates", "candidates", "slate_size")
def estimate_policies(
    config: LoopConfig,
    split: Path,
    behavior: Path,
    world: Path,
    policy: Path,
    baseline: Path,
    out: Path,
    progress: Progress,
) -> None:
    """Off-policy estimates of every policy on the held-out test log, or the reason why there can be none."""
    log, logging = open_log(split / TEST), load_policy(behavior).policy
    cross_fitted = load_cross_fitted(behavior / CROSS_FITTED)
    judged: dict[str, SlatePolicy] = {}
    estimates: list[Estimate] = []
    support: list[SupportDistance] = []
    ranking: list[RankingQuality] = []
    users, caps = load_user_model(world).user_model, None
    for number, folder in enumerate((policy, baseline)):
        stored = load_policy(folder)
        name = stored.description.name
        progress(f"estimating {name}", number / 2)
        reader = _open_to_judge(log, stored.description.vocabulary, cross_fitted)
        judged[name] = stored.policy
        rewards = rewards_to_judge(reader)
        if (reason := not_identified(reader, rewards)) is None:
            about = about_log(reader, name)
            sample = partial(
                sample_slates,
                target=stored.policy,
                user_model=users,
                reward=log.manifest.reward,
                generator=torch.Generator().manual_seed(config.seed),
                behavior=logging,
            )
            parts = judged_parts(reader, stored.policy, about["ratio"], sample)
            made = estimate(parts, rewards, about, with_caps=folder == policy)
            estimates.extend((*made.values, *sessions_not_identified(rewards, name)))
            probed = _probed_sessions(config, reader)
            support.append(support_distance(name, made.effective, stored.policy, logging, probed))
            caps = made.cap_sensitivity or caps
        else:
            estimates.append(NotIdentified(policy=name, estimand=Estimand.ONE_REQUEST, reason=reason))
        if log.manifest.responses == "choice":
            environment = _world_model(config, load_user_model(world), reader)
            ranking.append(
                RankingQuality(policy=name, **asdict(ranking_quality(stored.policy, reader, environment, config.seed)))
            )
    gating, cross_check = (
        next(
            part
            for part in estimates
            if part.policy == POLICY
            and part.estimand is Estimand.ONE_REQUEST
            and (isinstance(part, NotIdentified) or part.estimator == estimator)
        )
        for estimator in (GATING, CROSS_CHECK)
    )
    check = None
    if isinstance(gating, PolicyValue):
        progress("testing the log's probabilities", 0.9)
        check = _check_propensities(config, reader, logging, cross_fitted, judged)
    record = Estimates(
        gating=gating,
        cross_check=cross_check,
        estimates=tuple(estimates),
        support=tuple(support),
        ranking=tuple(ranking),
        cap_sensitivity=caps,
        propensity_check=check,
    )
    (out / "estimates.json").write_text(record.model_dump_json(indent=2))


def _check_propensities(
    config: LoopConfig,
    test: SessionReader,
    behavior: SlatePolicy,
    cross_fitted: CrossFittedBehavior | None,
    judged: dict[str, SlatePolicy],
) -> PropensityCheck | None:
    """Whether the log_probs of the test log, its own or estimated, fit the slates that it shows."""
    generator = torch.Generator().manual_seed(config.seed)
    slate_size = test.log.manifest.slate_size
    targets = judged | {
        "uniform policy": UniformPolicy(slate_size),
        "popularity policy": PopularityPolicy(slate_size, test.vocabulary.counts()),
    }
    return check_propensities(
        test.sample(CHECKED_SESSIONS, generator).batches(1_024),
        batch_logits(behavior) if cross_fitted is None else cross_fitted.logits,
        targets,
        generator,
        ratio=ratio_of(test),
        estimated=test.propensities_estimated,
    )


def rewards_to_judge(reader: SessionReader) -> KnownRewards:
    """What is known of a log's rewards; a click log is not read, since its evidence alone rules estimates out."""
    return KnownRewards() if reader.log.manifest.evidence is EvidenceLevel.CLICKS else known_rewards(reader)


def not_identified(reader: SessionReader, rewards: KnownRewards) -> str | None:
    """Why the log cannot tell what a policy is worth; None where it can."""
    evidence = reader.log.manifest.evidence
    reason = identify(evidence, rewards, propensities_estimated=reader.propensities_estimated)
    if reason is not None and identify(evidence, rewards, propensities_estimated=True) is None:
        # Log_probs are all that is missing, and from more users they would have been estimated.
        return (
            "The log does not say with which probability its slates were shown, and too few users were logged to "
            "estimate it: some fit the estimate, others calibrate it, and others are left out."
        )
    return reason


def about_log(reader: SessionReader, name: str) -> About:
    """What estimates of a policy on a log are about."""
    return About(policy=name, ratio=ratio_of(reader), propensities_estimated=reader.propensities_estimated)


def sessions_not_identified(rewards: KnownRewards, name: str) -> list[NotIdentified]:
    """Why a log cannot tell what a policy's sessions are worth, where it tells what its requests are."""
    if rewards.ends_known:
        return []
    reason = "No session is known to have ended: its user may have gone on, so what a session earns cannot be known."
    return [NotIdentified(policy=name, estimand=Estimand.SESSION, reason=reason)]


@stage("probes", "trust", "gate", "candidates", "slate_size")
def probe_world_model(
    config: LoopConfig,
    split: Path,
    behavior: Path,
    world: Path,
    policy: Path,
    baseline: Path,
    estimates: Path,
    out: Path,
    progress: Progress,
) -> None:
    """Ask world model and log what policies are worth that look for the model's errors; score the trust in it."""
    log = open_log(split / TEST)
    stored, challenger = load_user_model(world), load_policy(policy)
    reader = _open_to_judge(log, stored.vocabulary, load_cross_fitted(behavior / CROSS_FITTED))
    name = challenger.description.name
    trust = WorldModelTrust.model_validate_json((world / "trust.json").read_bytes())
    probes: tuple[Probe, ...] = ()
    if isinstance(Estimates.model_validate_json((estimates / "estimates.json").read_bytes()).gating, PolicyValue):
        probes = _probe(
            config, stored, reader, load_policy(behavior).policy, challenger, load_policy(baseline), progress
        )
    write_probes(trust, exploit_probes(probes, name, config.trust), config.trust, out)


def write_probes(trust: WorldModelTrust, probes: ExploitProbes, limits: TrustConfig, out: Path) -> None:
    """Leave the probes and the score of trust in the world model that follows from its report and them."""
    parts = probe_parts(probes.probes, probes.agreement, probes.challenger, limits)
    (out / "probes.json").write_text(probes.model_dump_json(indent=2))
    (out / "trust_score.json").write_text(trust_score((*trust.parts, *parts)).model_dump_json(indent=2))


def _probe(
    config: LoopConfig,
    stored: StoredUserModel,
    reader: SessionReader,
    logging: SlatePolicy,
    challenger: StoredPolicy,
    baseline: StoredPolicy,
    progress: Progress,
) -> tuple[Probe, ...]:
    """The policies that may serve, the logging policy, and the probes."""
    slate_size, n_known = logging.slate_size, known_rewards(reader).n_known
    sessions, reward = _probed_sessions(config, reader), reader.log.manifest.reward
    if known_rewards(sessions).n_known == 0:
        return ()
    items = item_rewards(stored.user_model, reward, sessions)
    policies: dict[str, SlatePolicy] = {
        challenger.description.name: challenger.policy,
        baseline.description.name: baseline.policy,
        "logging policy": logging,
        "random": UniformPolicy(slate_size),
        "constant": ConstantPolicy(slate_size, items.mean, items.n_requests),
        "inverted logging": InvertedPolicy(logging),
    }
    if isinstance(challenger.policy, NeuralSlatePolicy):
        for strength in PROBED_STRENGTHS:
            if strength == float(challenger.policy.strength):
                continue
            tempered = copy.deepcopy(challenger.policy)
            tempered.strength.fill_(strength)
            policies[f"{challenger.description.name} at {strength:g}"] = tempered
    probes = []
    for number, (name, policy) in enumerate(policies.items()):
        progress(f"probing the world model with {name}", number / len(policies))
        probes.append(
            probe_policy(
                policy,
                name,
                user_model=stored.user_model,
                logging=logging,
                reader=reader,
                sessions=sessions,
                ratio=ratio_of(reader),
                cap=default_cap(n_known),
                needed_ess=config.gate.ess_floor(n_known),
                seed=config.seed,
            )
        )
    return tuple(probes)


def _probed_sessions(config: LoopConfig, reader: SessionReader) -> SessionTable:
    return reader.sample(PROBED_SESSIONS, torch.Generator().manual_seed(config.seed))


@stage("ab-test", "ab", "source", "candidates", "slate_size", "encoder", "user_model")
def run_ab(config: LoopConfig, split: Path, policy: Path, baseline: Path, out: Path, progress: Progress) -> None:
    """Policy against baseline on traffic that neither was trained on.

    The storefront is its own judge, and since its users wrote the log, what they earned there reduces the variance.
    For a real log the judge is a world model of users that nothing else has seen; simulated users have no past.
    Nobody can act on a simulated A/B before its end, so its looks are shown and the planned end counts. An arm of fewer
    than two users gives no result.
    """
    treatment, control = load_policy(policy), load_policy(baseline)
    label: AbLabel
    environment: Environment[Any]
    past: Float[np.ndarray, " U"] | None = None
    replayed: tuple[Metric, ...] = ()
    if isinstance(config.source, storefront.Config):
        environment = shop = storefront.Storefront(config.source)
        label = "true simulator"
        names = pl.Series("user_id", shop.user_ids)
        logged = mean_logged_rewards(open_log(split / name) for name in (TRAIN, VALIDATION, TEST))
        past = (
            names.to_frame()
            .join(logged, "user_id", "left", maintain_order="left")["reward"]
            .fill_null(np.nan)
            .to_numpy()
        )
    else:
        judge = _fit_user_model(
            config,
            open_log(split / HOLDOUT),
            open_log(split / VALIDATION),
            config.seed + 1,
            progress,
            treatment.description.vocabulary,
        ).stored
        environment = world = _world_model(config, judge, SessionReader(open_log(split / HOLDOUT), judge.vocabulary))
        label = "simulated in a world model"
        names = world.pool.user_ids
        if not judge.user_model.knows_leaving:
            replayed = (Metric.SESSION_LENGTH, Metric.FIRST_REQUEST_EXITS)
    generator = torch.Generator().manual_seed(config.seed + 2)
    users = torch.randint(len(names), (config.ab.sessions,), generator=generator)
    treated = assign_arm(names.to_list(), salt=config.ab.salt, share=config.ab.treatment_share)[users.numpy()]
    codes = names.rank("dense").to_numpy()[users.numpy()]
    if min(len(np.unique(codes[arm])) for arm in (treated, ~treated)) < FEWEST_USERS:
        write_ab(out, None)
        return
    progress("A/B", 0.5)
    rewards, metrics = _ab_sessions(
        environment, treatment.policy, control.policy, users, treated, generator, config.ab.max_steps
    )
    result = analyze_ab(
        codes,
        rewards,
        treated,
        label=label,
        treatment=treatment.description.name,
        control=control.description.name,
        planned_share=config.ab.treatment_share,
        covariate=None if past is None else past[users.numpy()],
        metrics=metrics,
        replayed=replayed,
        day=np.arange(len(users)) * config.ab.days // len(users),
        planned_sessions=config.ab.sessions,
    )
    write_ab(out, result)


def _ab_sessions(
    environment: Environment[Any],
    treatment: SlatePolicy,
    control: SlatePolicy,
    users: Tensor,
    treated: Bool[np.ndarray, " U"],
    generator: torch.Generator,
    max_steps: int,
) -> tuple[Float[np.ndarray, " U"], dict[Metric, Float[np.ndarray, " U"]]]:
    """Reward and guarded metrics of one session of each user, under the policy of the user's arm."""
    rewards = np.zeros(len(users))
    metrics = {metric: np.zeros(len(users)) for metric in Metric}
    for arm, policy in ((True, treatment), (False, control)):
        rows = treated == arm
        sessions = rollout(environment, policy, users[torch.from_numpy(rows)], generator, max_steps)
        rewards[rows] = sessions.rewards.double().sum((1, 2)).numpy()
        for metric, values in session_metrics(sessions).items():
            metrics[metric][rows] = values
    return rewards, metrics


@stage("gate", "gate")
def judge_evidence(
    config: LoopConfig,
    checked: Path,
    split: Path,
    probes: Path,
    estimates: Path,
    ab: Path,
    out: Path,
    progress: Progress,
) -> None:
    """The gate: a pure function of the records that the stages left."""
    progress("deciding", 0.0)
    data = DataChecks.model_validate_json((checked / "checks.json").read_bytes())
    trust = TrustScore.model_validate_json((probes / "trust_score.json").read_bytes())
    judged = Estimates.model_validate_json((estimates / "estimates.json").read_bytes())
    evidence = GateEvidence(
        challenger=judged.gating.policy,
        champion_policy=None,
        ab_started=True,
        ratio_assumption=open_log(split / TEST).manifest.ratio_assumption,
        data_passed=data.passed,
        data_text=f"{data.n_requests:,} requests were checked and {data.n_quarantined:,} put aside.",
        trust=TrustSummary(passed=trust.passed, score=trust.score, weakest=trust.weakest, reasons=trust.reasons),
        exploit=ExploitProbes.model_validate_json((probes / "probes.json").read_bytes()).verdict,
        offline=judged.gating,
        cross_check=judged.cross_check,
        propensities=judged.propensity_check,
        ab=read_ab(ab),
    )
    (out / "decision.json").write_text(decide(evidence, config.gate).model_dump_json(indent=2))
    (out / "evidence.json").write_text(evidence.model_dump_json(indent=2))


def read_ab(folder: Path) -> AbResult | None:
    """The result of an A/B that a stage left; None where there were too few users for one."""
    return _AB_RESULT.validate_json((folder / AB).read_bytes())


def read_decision(folder: Path) -> Decision:
    """The decision that a stage left."""
    return Decision.model_validate_json((folder / "decision.json").read_bytes())


def read_curves(folders: Iterable[Path]) -> tuple[Curve, ...]:
    """Learning curves of several stages."""
    adapter = TypeAdapter(tuple[Curve, ...])
    return tuple(curve for folder in folders for curve in adapter.validate_json((folder / CURVES).read_bytes()))


def _has_simulator(config: LoopConfig) -> bool:
    return isinstance(config.source, storefront.Config | virtual_taobao_log.Config)


@dataclass(frozen=True)
class _FittedUserModel:
    stored: StoredUserModel
    history: tuple[Epoch, ...]


def _fit_user_model(
    config: LoopConfig,
    train_log: Log,
    validation_log: Log,
    seed: int,
    progress: Progress,
    vocabulary: Vocabulary | None = None,
) -> _FittedUserModel:
    manifest = train_log.manifest
    vocabulary = Vocabulary.fit(train_log) if vocabulary is None else vocabulary
    train, validation = SessionReader(train_log, vocabulary), SessionReader(validation_log, vocabulary)
    features = vocabulary.item_features(train_log.items())
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        encoder = SessionEncoder(
            EncoderShape(
                n_indices=vocabulary.size,
                n_item_features=features.shape[1],
                n_context=vocabulary.context_width,
                reads_slates=manifest.slate_size > 0,
                config=config.encoder,
            )
        )
        model = UserModel(encoder, manifest.slate_size, manifest.responses)
    encoder.know_items(features, count_covisitation(train_log, vocabulary))
    generator = torch.Generator().manual_seed(seed)
    training = train_by_likelihood(
        model, train, validation, config.user_model, vocabulary.counts(), generator, progress
    )
    return _FittedUserModel(StoredUserModel(model, vocabulary), training.history)


def _new_policy(config: LoopConfig, stored: StoredUserModel, train: SessionReader, kind: type[P]) -> P:
    """An untrained policy over the user model's encoder, its features standardised on training requests."""
    encoder = stored.user_model.encoder
    slate_size = train.log.manifest.slate_size or config.slate_size
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        policy = kind(RequestFeatures(encoder), slate_size)
    sample = train.sample(STANDARDIZING_SESSIONS, torch.Generator().manual_seed(config.seed))
    batch = sample.batch(torch.arange(len(sample))).first_steps(STANDARDIZING_STEPS)
    state = encoder.states(batch).select(batch.mask.flatten())
    requests = batch.requests().select(batch.mask.flatten())
    if requests.candidates.shape[1] == 0:
        environment = _world_model(config, stored, train)
        opened = environment.reset(torch.arange(min(2_048, environment.n_users)), torch.Generator().manual_seed(0))
        state, requests = environment.session(opened), environment.observe(opened)
    policy.features.fit(state, requests, stored.vocabulary.counts())
    return policy


def _expected_reward_weights(policy: EncodedPolicy, stored: StoredUserModel, train: SessionReader) -> Tensor:
    users = stored.user_model
    return policy.features.expected_reward_weights(
        train.log.manifest.reward, responses=users.responses, sells=bool(users.sells)
    )


def _fit_behavior(
    config: LoopConfig, policy: NeuralSlatePolicy, train: SessionReader, progress: Progress
) -> tuple[float, ...]:
    if train.log.manifest.evidence is EvidenceLevel.CLICKS:
        return ()
    generator = torch.Generator().manual_seed(config.seed)
    return train_behavior(policy, train, config.behavior, generator, progress).history


def _world_model(config: LoopConfig, stored: StoredUserModel, reader: SessionReader) -> WorldModel:
    manifest = reader.log.manifest
    return WorldModel(
        stored.user_model,
        reader.sample(POOL_SESSIONS, torch.Generator().manual_seed(config.seed)),
        manifest.reward,
        manifest.slate_size or config.slate_size,
        config.candidates,
        stored.vocabulary.counts(),
    )


def _judge_world_model(
    config: LoopConfig,
    stored: StoredUserModel,
    logging: SlatePolicy,
    test: SessionReader,
    discriminator_accuracy: float | None,
) -> WorldModelTrust:
    """The trust report, with sessions generated over the requests of test sessions: only who answers differs.

    A model that never learned who leaves replays the length of sessions. Where the test log tells no more, requests are
    compared in place of sessions; where it does, the model lacks what could be known, and nothing stands in for it.
    """
    model, world = stored.user_model, _world_model(config, stored, test)
    generator = torch.Generator().manual_seed(config.seed)
    replayed = torch.randperm(world.n_users, generator=generator)[: config.trust.sessions]
    real = world.pool.batch(replayed).first_steps(config.ab.max_steps)
    generated = rollout(world, logging, replayed, generator, config.ab.max_steps)
    likelihood = evaluate_likelihood(model, test)
    with_reward = test.log.manifest.slate_size > 0
    ends_learned = bool(model.knows_leaving)
    by_request = not ends_learned and with_reward and not tells_of_ends(test)
    return judge_trust(
        click_nats=likelihood.per_click,
        baseline=baseline_nats(model, test, stored.vocabulary.counts()),
        calibrations=response_calibrations(model, test),
        sessions=compare_sessions(
            [batch.first_steps(config.ab.max_steps) for batch in test.batches(1_024)],
            generated,
            with_reward=with_reward,
        )
        if ends_learned
        else (),
        two_sample=two_sample_test(real, generated, np.random.default_rng(config.seed), ends_known=ends_learned)
        if ends_learned or by_request
        else None,
        with_reward=with_reward,
        discriminator_accuracy=discriminator_accuracy,
        config=config.trust,
        requests=compare_requests(model, test) if by_request else None,
    )


def _load_discriminator(stored: StoredUserModel, folder: Path) -> Discriminator:
    with torch.random.fork_rng():
        discriminator = Discriminator(stored.user_model.encoder)
    discriminator.load_state_dict(torch.load(folder / "discriminator.pt", weights_only=True))
    return discriminator.eval()


def _save(
    config: LoopConfig, policy: NeuralSlatePolicy | RankingPolicy, vocabulary: Vocabulary, name: str, out: Path
) -> None:
    description = PolicyDescription(name=name, loop=config.loop, shape=shape_of(policy), vocabulary=vocabulary)
    save_policy(StoredPolicy(description, policy), out)


def write_ab(out: Path, result: AbResult | None) -> None:
    """Leave the result of an A/B; None where there were too few users for one."""
    (out / AB).write_bytes(_AB_RESULT.dump_json(result, indent=2))


def likelihood_curves(name: str, history: Iterable[Epoch]) -> list[Curve]:
    """Losses of training and validation, pass by pass."""
    epochs = list(history)
    return [
        Curve(
            name=f"{name}, {part}",
            x="pass",
            y="nats a request",
            values=tuple(getattr(epoch, part) for epoch in epochs),
        )
        for part in ("train", "validation")
    ]


def write_curves(out: Path, curves: list[Curve]) -> None:
    """Leave a stage's learning curves."""
    (out / CURVES).write_bytes(TypeAdapter(list[Curve]).dump_json(curves, indent=2))
