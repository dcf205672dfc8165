"""Train the user model: by likelihood, then by adversarial steps against the discriminator (IRecGAN, section 3.3)."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from components.interactions.batching import SessionReader, SessionTable
from components.world_model.user_model import Likelihood, UserModel

#: Batches of like length that a step's random sample comes in: less padding, at the price of more calls.
PIECES = 2
#: Told what is being done, and how far it is (0 to 1).
Progress = Callable[[str, float], None]


class LikelihoodConfig(BaseModel):
    """Maximum likelihood with early stopping on the validation split."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_epochs: int = Field(default=10, ge=1, le=500, description="Passes over the training sessions, at most.")
    patience: int = Field(
        default=4, ge=1, le=50, description="Passes without a better validation loss before stopping."
    )
    validation_sessions: int = Field(
        default=5_000, ge=1, description="Validation sessions that are judged after each pass, at most."
    )
    batch_sessions: int = Field(default=128, ge=1, description="Sessions of a step.")
    learning_rate: float = Field(
        default=4e-3, gt=0, le=1, description="Adam's step size at first; it falls to 0 along a cosine."
    )
    shared_rate: float = Field(
        default=10.0,
        ge=1,
        description="Step size of the few weights that all items share (positions, pair features), as a multiple.",
    )
    weight_decay: float = Field(default=1e-3, ge=0, description="Pull of all weights towards zero.")
    clip_norm: float = Field(default=5.0, gt=0, description="Largest norm of a gradient.")
    negatives: int = Field(default=1_000, ge=10, description="Sampled items of a step, for logs without slates.")


@dataclass(frozen=True)
class Epoch:
    """Losses of one pass, in nats per request."""

    train: float
    validation: float


@dataclass(frozen=True)
class LikelihoodTraining:
    """The user model at its best validation loss, and how it got there."""

    user_model: UserModel
    history: tuple[Epoch, ...]
    best_epoch: int


@dataclass(frozen=True)
class NegativeSampler:
    """Draws items in proportion to count^0.75, which stand for the catalogue in a sampled softmax."""

    probabilities: Float[Tensor, " V"]
    n_draws: int

    @classmethod
    def of(cls, counts: Float[Tensor, " V"], n_draws: int) -> "NegativeSampler":
        """The sampler over items that training saw."""
        weights = counts.pow(0.75)
        return cls(weights / weights.sum(), n_draws)

    def draw(self, generator: torch.Generator) -> tuple[Int[Tensor, " X"], Float[Tensor, " X"]]:
        """Distinct items and the log of the chance with which each is among the draws, 1 − (1 − p)^n."""
        drawn = torch.multinomial(self.probabilities, self.n_draws, replacement=True, generator=generator).unique()
        never = self.n_draws * torch.log1p(-self.probabilities[drawn])
        return drawn, (-torch.expm1(never)).log()


def evaluate_likelihood(user_model: UserModel, sessions: SessionReader | SessionTable) -> Likelihood:
    """Likelihood of logged sessions, with the exact softmax where there are no slates; the model is put into eval."""
    user_model.eval()
    # Exact soft-maxes over a catalogue need small batches.
    size = 512 if user_model.slate_size else 64
    with torch.inference_mode():
        first, *others = (user_model.log_likelihood(batch) for batch in sessions.batches(size))
    return sum(others, start=first)


def train_by_likelihood(
    user_model: UserModel,
    train: SessionReader,
    validation: SessionReader,
    config: LikelihoodConfig,
    counts: Float[Tensor, " V"],
    generator: torch.Generator,
    progress: Progress,
) -> LikelihoodTraining:
    """Fit the user model to logged sessions; the weights with the best validation loss are kept.

    Args:
        user_model: trained in place.
        train: sessions to learn from.
        validation: sessions that decide when to stop.
        config: sizes and step sizes.
        counts: training count of every item, for negatives.
        generator: shuffles sessions and draws negatives.
        progress: told after each pass.
    """
    optimizer = _optimizer(user_model, config)
    sampler = NegativeSampler.of(counts, config.negatives) if user_model.slate_size == 0 else None
    best, best_epoch = copy.deepcopy(user_model.state_dict()), -1
    history: list[Epoch] = []
    sold, ends_known = False, False
    judged = validation.sample(config.validation_sessions, generator)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.max_epochs)
    for epoch in range(config.max_epochs):
        user_model.train()
        loss_sum, n_requests = 0.0, 0.0
        for sample in train.samples(config.batch_sessions, generator, PIECES):
            optimizer.zero_grad()
            for batch in sample:
                negatives, log_q = sampler.draw(generator) if sampler else (None, None)
                likelihood = user_model.log_likelihood(batch, negatives=negatives, negative_log_q=log_q, counted=True)
                # A constant divisor: each request weighs the same, in short sessions and in long ones.
                (likelihood.total / config.batch_sessions).backward()
                loss_sum += float(likelihood.total.detach())
                n_requests += float(likelihood.n_request)
                sold = sold or bool(batch.purchases.any())
                ends_known = ends_known or bool(batch.leave_observed.any())
            for parameter in user_model.parameters():
                if parameter.grad is not None and parameter.grad.is_sparse:
                    parameter.grad = parameter.grad.to_dense()
            torch.nn.utils.clip_grad_norm_(user_model.parameters(), config.clip_norm)
            optimizer.step()
        schedule.step()
        held_out = float(evaluate_likelihood(user_model, judged).per_request)
        history.append(Epoch(loss_sum / max(n_requests, 1.0), held_out))
        progress(f"user model: pass {epoch + 1}, validation {held_out:.4f} nats", (epoch + 1) / config.max_epochs)
        if held_out <= min(past.validation for past in history):
            best, best_epoch = copy.deepcopy(user_model.state_dict()), epoch
        elif epoch - best_epoch >= config.patience:
            break
    user_model.load_state_dict(best)
    user_model.sells.fill_(sold)
    user_model.knows_leaving.fill_(ends_known)
    return LikelihoodTraining(user_model.eval(), tuple(history), best_epoch)


def _optimizer(user_model: UserModel, config: LikelihoodConfig) -> torch.optim.Optimizer:
    """Adam; weights that all items share learn faster than embeddings, which would otherwise explain by heart first."""
    shared = user_model.shared_weights
    names = {id(parameter) for parameter in shared}
    others = [parameter for parameter in user_model.parameters() if id(parameter) not in names]
    groups: list[dict[str, Any]] = [
        {"params": others},
        {"params": shared, "lr": config.shared_rate * config.learning_rate},
    ]
    return torch.optim.Adam(groups, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)
