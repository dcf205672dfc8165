"""Estimate with which probability a log's slates were shown, where the log does not say: cross-fitted and calibrated.

Users are put into F folds by a salted hash. The log_prob of a slate of a user in fold f is that of a logging policy
which was fitted on users of the other folds, at a temperature that was chosen on yet others of them:

    log b(slate) = log PL(slate; u_f / τ_f),    τ_f = argmin_τ −Σ log PL(slate; u_f / τ)

so neither utilities nor temperature ever saw the user (cross-fitting: Chernozhukov et al. 2018, "Double/debiased
machine learning"; temperature: Guo et al. 2017, "On calibration of modern neural networks"). What all folds share is
the frozen session encoder: it learned from the responses of the sessions that it was trained on, not from their slates'
probabilities. On later sessions than those the estimate is out of sample in time as well.
"""

import copy
import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import polars as pl
import torch
from jaxtyping import Bool, Float, Int
from pydantic import BaseModel, ConfigDict, Field
from scipy.optimize import minimize_scalar
from torch import Tensor

from components.agents.behavior import BehaviorConfig, train_behavior
from components.interactions.batching import SessionBatch, SessionReader, SessionTable
from components.interactions.log_folder import Log
from components.interactions.vocabulary import Vocabulary
from components.policies import plackett_luce
from components.policies.policy_folder import PolicyDescription, StoredPolicy, load_policy, save_policy, shape_of
from components.policies.ranking_policy import NeuralSlatePolicy
from components.world_model.training import Progress

BATCH_SESSIONS = 1_024
#: Salts of the hashes that choose a user's fold, and who of the other folds calibrates.
FOLD_SALT, CALIBRATION_SALT = 1, 2
#: One in so many users of the other folds calibrates; the rest fits.
CALIBRATING_USERS = 5
#: One scalar needs no more.
CALIBRATING_REQUESTS = 20_000
LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 1 / 20, 20.0
RECORD = "cross_fit.json"


class CrossFitRecord(BaseModel):
    """What `cross_fit.json` says: how many folds there are, and what calibration changed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    temperatures: tuple[float, ...] = Field(description="By fold; 1 where the fit was calibrated as it was.")
    nats_before: tuple[float, ...] = Field(description="Cost of a slate to held-out users at temperature 1, by fold.")
    nats: tuple[float, ...] = Field(description="The same at the fold's temperature.")


@dataclass(frozen=True)
class CrossFittedBehavior:
    """The logging policy as users see it who had no part in fitting it: one estimate for each fold of users."""

    policies: tuple[NeuralSlatePolicy, ...]
    """Fitted without the users of the fold at their place."""
    record: CrossFitRecord

    def folds(self, users: Int[Tensor, " B"]) -> Int[Tensor, " B"]:
        """The fold of each user, by code."""
        return _hash(users, FOLD_SALT) % len(self.policies)

    @torch.no_grad()
    def logits(self, batch: SessionBatch) -> Float[Tensor, "M N"]:
        """Calibrated utilities of the candidates of a batch's M requests, in the order of its mask."""
        folds = self.folds(batch.users)
        logits = torch.full(batch.candidates.shape, -torch.inf)
        for fold, (policy, temperature) in enumerate(zip(self.policies, self.record.temperatures, strict=True)):
            rows = torch.nonzero(folds == fold)[:, 0]
            if len(rows) == 0:
                continue
            own = batch.select(rows)
            flat = own.mask.flatten()
            utilities = policy.behavior_logits(policy.states(own).select(flat), own.requests().select(flat))
            places = rows[:, None].expand(own.mask.shape)[own.mask], torch.nonzero(own.mask)[:, 1]
            logits[places] = utilities / temperature
        return logits[batch.mask]

    def fill(self, table: SessionTable) -> SessionTable:
        """The same sessions with the estimated log_probs of their slates in place of the log's."""
        position_log_probs = torch.full(table.rows.slates.shape, torch.nan, dtype=torch.float64)
        for chosen in table.lengths.argsort(stable=True).split(BATCH_SESSIONS):
            batch = table.batch(chosen)
            slates, candidates = batch.slates[batch.mask], batch.candidates[batch.mask]
            per_position = plackett_luce.log_prob(self.logits(batch), plackett_luce.places_of(slates, candidates))
            rows = table.starts[chosen][:, None] + torch.arange(batch.mask.shape[1])
            position_log_probs[rows[batch.mask], 0] = per_position.double()
        filled = replace(table.rows, log_probs=position_log_probs.sum(2), position_log_probs=position_log_probs)
        return replace(table, rows=filled)


class EstimatedReader(SessionReader):
    """A reader of a log whose slates' log_probs are a cross-fitted estimate. Whatever is made from it says so."""

    propensities_estimated = True
    knows_position_log_probs = True

    def __init__(self, log: Log, vocabulary: Vocabulary, behavior: CrossFittedBehavior) -> None:
        super().__init__(log, vocabulary)
        self.behavior = behavior

    def read(self, frame: pl.DataFrame) -> SessionTable:
        """Rows as sessions, their log_probs estimated."""
        return self.behavior.fill(super().read(frame))


def cross_fit(
    untrained: NeuralSlatePolicy, train: SessionReader, config: BehaviorConfig, seed: int, progress: Progress
) -> CrossFittedBehavior | None:
    """Fit one logging policy for each fold of users, on users of the other folds; None where the users are too few.

    Some have to fit each fold's policy, others to calibrate it.

    Args:
        untrained: copied for each fold; its features are fitted, its behavior part is not.
        train: sessions with slates.
        config: how each is fitted, and the number of folds.
        seed: of the order of training.
        progress: told after each pass.
    """
    users = torch.cat([batch.users for batch in train.batches(BATCH_SESSIONS)])
    roles = [(fold, calibrates) for fold in range(config.folds) for calibrates in (False, True)]
    if not all(_has_role(users, fold, config.folds, calibrates).any() for fold, calibrates in roles):
        return None
    policies, calibrations = [], []
    for fold in range(config.folds):
        policy = copy.deepcopy(untrained)
        policy.strength.fill_(0.0)
        generator = torch.Generator().manual_seed(seed + fold)
        fitting, calibrating = (
            partial(_has_role, fold=fold, n_folds=config.folds, calibrates=calibrates) for calibrates in (False, True)
        )
        train_behavior(policy, train, config, generator, _part_of(progress, fold, config.folds), fitting)
        calibrations.append(_calibrate(policy, train, generator, calibrating))
        policies.append(policy.eval())
    temperatures, before, after = zip(*calibrations, strict=True)
    return CrossFittedBehavior(
        tuple(policies), CrossFitRecord(temperatures=temperatures, nats_before=before, nats=after)
    )


def _hash(users: Int[Tensor, " B"], salt: int) -> Int[Tensor, " B"]:
    return torch.from_numpy((pl.Series(users.numpy()).hash(salt) // 2).cast(pl.Int64).to_numpy(writable=True))


def _has_role(users: Int[Tensor, " B"], fold: int, n_folds: int, calibrates: bool) -> Bool[Tensor, " B"]:
    """Users outside the fold who calibrate, or those who fit."""
    chosen = (_hash(users, CALIBRATION_SALT) % CALIBRATING_USERS == 0) == calibrates
    return chosen & (_hash(users, FOLD_SALT) % n_folds != fold)


def _part_of(progress: Progress, part: int, n_parts: int) -> Progress:
    return lambda message, share: progress(f"fold {part + 1} of {n_parts}, {message}", (part + share) / n_parts)


@torch.no_grad()
def _calibrate(
    policy: NeuralSlatePolicy, train: SessionReader, generator: torch.Generator, calibrating: "partial[Tensor]"
) -> tuple[float, float, float]:
    """Temperature of a policy on users that it was not fitted on, and nats of a slate at temperature 1 and at it.

    The negative log-likelihood is convex in 1/τ, so the search meets no other minimum.
    """
    held_out: list[tuple[Tensor, Tensor]] = []
    n_requests = 0
    for (batch,) in train.samples(BATCH_SESSIONS, generator):
        own = batch.select(calibrating(batch.users))
        flat = own.mask.flatten()
        if not flat.any():
            continue
        requests = own.requests().select(flat)
        places = plackett_luce.places_of(own.slates.flatten(0, 1)[flat], requests.candidates)
        held_out.append((policy.behavior_logits(policy.states(own).select(flat), requests), places))
        n_requests += len(places)
        if n_requests >= CALIBRATING_REQUESTS:
            break

    def nats(log_temperature: float) -> float:
        inverse = math.exp(-log_temperature)
        return (
            -sum(float(plackett_luce.log_prob(logits * inverse, places).double().sum()) for logits, places in held_out)
            / n_requests
        )

    bounds = math.log(LOWEST_TEMPERATURE), math.log(HIGHEST_TEMPERATURE)
    best = minimize_scalar(nats, bounds=bounds, method="bounded", options={"xatol": 1e-3})
    return math.exp(float(best.x)), nats(0.0), float(best.fun)


def save_cross_fitted(behavior: CrossFittedBehavior, loop: str, vocabulary: Vocabulary, folder: Path) -> None:
    """Write the folds' policies into a folder that is made, `cross_fit.json` last."""
    for fold, policy in enumerate(behavior.policies):
        own = folder / f"fold-{fold}"
        own.mkdir(parents=True)
        description = PolicyDescription(
            name=f"behavior-without-fold-{fold}", loop=loop, shape=shape_of(policy), vocabulary=vocabulary
        )
        save_policy(StoredPolicy(description, policy), own)
    (folder / RECORD).write_text(behavior.record.model_dump_json(indent=2) + "\n")


def load_cross_fitted(folder: Path) -> CrossFittedBehavior | None:
    """The estimate in a folder; None where there is none."""
    if not (folder / RECORD).is_file():
        return None
    record = CrossFitRecord.model_validate_json((folder / RECORD).read_bytes())
    stored = (load_policy(folder / f"fold-{fold}").policy for fold in range(len(record.temperatures)))
    return CrossFittedBehavior(tuple(policy for policy in stored if isinstance(policy, NeuralSlatePolicy)), record)
