"""Estimate the logging policy: the Plackett-Luce policy under which the logged slates are most likely.

    minimise  −mean log π_b(slate | state, candidates)

It is where every policy starts, and the anchor of the pull toward the log.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from components.errors import InputError
from components.interactions.batching import SessionReader
from components.policies import plackett_luce
from components.policies.ranking_policy import NeuralSlatePolicy
from components.world_model.training import Progress


class BehaviorConfig(BaseModel):
    """Maximum likelihood of the logged slates."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    epochs: int = Field(default=3, ge=1, le=100, description="Passes over the training sessions.")
    batch_sessions: int = Field(default=256, ge=1, description="Sessions of a step.")
    learning_rate: float = Field(default=3e-3, gt=0, le=1, description="Adam's step size.")
    folds: int = Field(
        default=2,
        ge=2,
        le=10,
        description="Folds of users where log_probs have to be estimated: each fold's come from the others' users.",
    )


@dataclass(frozen=True)
class BehaviorTraining:
    """Loss of each pass in nats per slate; the policy is trained in place."""

    history: tuple[float, ...]


def train_behavior(
    policy: NeuralSlatePolicy,
    train: SessionReader,
    config: BehaviorConfig,
    generator: torch.Generator,
    progress: Progress,
    chosen: Callable[[Int[Tensor, " B"]], Bool[Tensor, " B"]] | None = None,
) -> BehaviorTraining:
    """Fit the behavior part of a policy to the logged slates.

    Args:
        policy: its behavior part is trained in place.
        train: sessions with slates.
        config: passes and step size.
        generator: of the order.
        progress: told after each pass.
        chosen: which users to learn from, by their codes; None learns from all.

    Raises:
        InputError: none of the log's users was chosen.
    """
    parameters = list(policy.behavior.parameters())
    optimizer = torch.optim.Adam(parameters, lr=config.learning_rate, fused=True)
    history = []
    for epoch in range(config.epochs):
        loss_sum, n_slates = 0.0, 0
        for (batch,) in train.samples(config.batch_sessions, generator):
            batch = batch if chosen is None else batch.select(chosen(batch.users))
            flat = batch.mask.flatten()
            if not flat.any():
                continue
            requests, slates = batch.requests().select(flat), batch.slates.flatten(0, 1)[flat]
            with torch.no_grad():
                state = policy.states(batch).select(flat)
            logits = policy.behavior_logits(state, requests)
            log_probs = plackett_luce.log_prob(logits, plackett_luce.places_of(slates, requests.candidates)).sum(1)
            loss = -log_probs.mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss_sum += float(loss.detach()) * len(slates)
            n_slates += len(slates)
        if n_slates == 0:
            raise InputError(f"{train.log.path}: has no user to fit the logging policy to; expected more users")
        history.append(loss_sum / n_slates)
        progress(f"behavior policy: pass {epoch + 1}, {history[-1]:.3f} nats a slate", (epoch + 1) / config.epochs)
    return BehaviorTraining(tuple(history))
