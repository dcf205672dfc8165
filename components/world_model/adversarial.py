"""The adversarial step: the user model learns from sessions that it made up, weighted by the discriminator's belief.

    ∇ Σ_t (q_D(τ_{1..t}) − mean q_D at t) log p(response_t | s_t)
    q_D(prefix) = mean_m D(prefix, completed at random),  m = 1..M

(IRecGAN, section 3.2, after SeqGAN.) Subtracting the mean is our addition: without it every generated response is
reinforced, the unlikely ones less. Each adversarial step is followed by a likelihood step on logged sessions, which
anchors it.
"""

import copy
from dataclasses import dataclass

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.nn import functional

from components.environments.rollout import Survivors, continue_sessions, open_sessions, rollout
from components.interactions.batching import SessionBatch, SessionReader, SessionTable
from components.policies.slate_policy import SlatePolicy
from components.world_model.discriminator import Discriminator
from components.world_model.environment import POOL_SESSIONS, WorldModel, WorldModelState
from components.world_model.training import Progress, evaluate_likelihood

#: Validation sessions on which a round is judged, at most.
VALIDATION_SESSIONS = 5_000


class AdversarialConfig(BaseModel):
    """Adversarial training of the user model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rounds: int = Field(default=2, ge=0, le=100, description="Rounds of discriminator and user steps; 0: none.")
    sessions: int = Field(default=1_000, ge=10, description="Sessions generated for the discriminator (paper: 1,000).")
    discriminator_epochs: int = Field(default=3, ge=1, description="Passes over real and generated sessions a round.")
    user_steps: int = Field(default=3, ge=1, description="User-model steps of a round.")
    step_sessions: int = Field(default=200, ge=1, description="Sessions generated for a user step (paper: 200).")
    completions: int = Field(default=5, ge=1, le=100, description="M: random completions of each prefix (paper: 5).")
    max_steps: int = Field(default=20, ge=1, description="Requests after which generated sessions are cut.")
    batch_sessions: int = Field(default=128, ge=1, description="Sessions of a discriminator step.")
    discriminator_rate: float = Field(default=2e-3, gt=0, description="Adam's step size of the discriminator.")
    user_rate: float = Field(default=3e-4, gt=0, description="Adam's step size of the user model.")
    max_loss: float = Field(
        default=0.002,
        ge=0,
        description="Validation nats a request that all rounds together may cost; the round that exceeds it is undone.",
    )


@dataclass(frozen=True)
class Round:
    """What one round saw."""

    discriminator_accuracy: float
    """On sessions that it did not learn from; 0.5 is chance."""
    validation: float
    kept: bool


@dataclass(frozen=True)
class AdversarialTraining:
    """The discriminator, trained against the final user model, and the rounds; the user model is trained in place."""

    discriminator: Discriminator
    history: tuple[Round, ...]


def train_adversarially(
    world: WorldModel,
    behavior: SlatePolicy,
    train: SessionReader,
    validation: SessionReader,
    config: AdversarialConfig,
    seed: int,
    progress: Progress,
) -> AdversarialTraining:
    """Play the user model against a discriminator.

    Args:
        world: holds the user model; trained in place.
        behavior: the (estimated) logging policy, under which sessions are generated: real and generated ones then
            differ in their responses alone.
        train: real sessions to learn from.
        validation: real sessions that undo a round which costs likelihood.
        config: sizes and step sizes.
        seed: of the only generator.
        progress: told after each round.
    """
    generator = torch.Generator().manual_seed(seed)
    model = world.user_model
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        discriminator = Discriminator(model.encoder)
    discriminator.reads_leaving.copy_(model.knows_leaving)
    judge = torch.optim.Adam(discriminator.parameters(), lr=config.discriminator_rate)
    sampler = world.sampler if model.slate_size == 0 else None
    pool = train.sample(POOL_SESSIONS, generator)
    judged = validation.sample(VALIDATION_SESSIONS, generator)
    history: list[Round] = []
    allowed = float(evaluate_likelihood(model, judged).per_request) + config.max_loss
    for number in range(config.rounds):
        accuracy = _train_discriminator(discriminator, judge, world, behavior, pool, config, generator)
        before = copy.deepcopy(model.state_dict())
        user = torch.optim.Adam(model.parameters(), lr=config.user_rate)
        for _ in range(config.user_steps):
            generated, beliefs = generate_with_beliefs(world, behavior, discriminator, config, generator)
            mean_belief = beliefs.sum(0) / generated.mask.sum(0).clamp(min=1)
            weights = (beliefs - mean_belief) * generated.mask
            batch = _random_sessions(pool, config.step_sessions, generator)
            negatives, log_q = sampler.draw(generator) if sampler else (None, None)
            for sessions, weight in ((generated, weights), (batch, None)):
                likelihood = model.log_likelihood(sessions, weight, negatives, log_q, counted=sessions is batch)
                user.zero_grad()
                (likelihood.total / len(sessions.users)).backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                user.step()
        held_out = float(evaluate_likelihood(model, judged).per_request)
        kept = held_out <= allowed
        if not kept:
            model.load_state_dict(before)
        history.append(Round(accuracy, held_out, kept))
        progress(f"adversarial round {number + 1}: told apart {accuracy:.1%}", (number + 1) / config.rounds)
    if config.rounds:
        _train_discriminator(discriminator, judge, world, behavior, pool, config, generator)
    model.eval()
    return AdversarialTraining(discriminator.eval(), tuple(history))


def generate_with_beliefs(
    world: WorldModel,
    behavior: SlatePolicy,
    discriminator: Discriminator,
    config: AdversarialConfig,
    generator: torch.Generator,
) -> tuple[SessionBatch, Float[Tensor, "B T"]]:
    """Sessions and q_D of each of their prefixes; a session's last request is judged by the session itself."""
    users = torch.randint(world.n_users, (config.step_sessions,), generator=generator)
    survivors: list[Survivors[WorldModelState]] = []
    start = open_sessions(world, behavior, users, generator)
    batch = continue_sessions(world, behavior, start, generator, config.max_steps, survivors.append)
    with torch.no_grad():
        whole = torch.sigmoid(discriminator.session_logits(batch))
        beliefs = whole[:, None] * batch.mask
        for step, alive in enumerate(survivors):
            many = torch.arange(len(alive.rows)).repeat_interleave(config.completions)
            suffix = continue_sessions(
                world, behavior, alive.point.select(many), generator, config.max_steps - step - 1
            )
            completed = join(batch.select(alive.rows[many]), step + 1, suffix)
            belief = torch.sigmoid(discriminator.session_logits(completed))
            beliefs[alive.rows, step] = belief.reshape(-1, config.completions).mean(1)
    return batch, beliefs


def join(batch: SessionBatch, n_steps: int, suffix: SessionBatch) -> SessionBatch:
    """The first requests of sessions, followed by others."""
    return SessionBatch(
        **{
            name: value if name == "users" else torch.cat([value[:, :n_steps], getattr(suffix, name)], dim=1)
            for name, value in batch.columns().items()
        }
    )


def discriminator_loss(discriminator: Discriminator, real: SessionBatch, generated: SessionBatch) -> Float[Tensor, ""]:
    """Cross-entropy in nats a session of telling real sessions from generated ones."""
    logits = torch.cat([discriminator.session_logits(real), discriminator.session_logits(generated)])
    is_real = torch.cat([torch.ones(len(real.users)), torch.zeros(len(generated.users))])
    return functional.binary_cross_entropy_with_logits(logits, is_real)


def _train_discriminator(
    discriminator: Discriminator,
    optimizer: torch.optim.Optimizer,
    world: WorldModel,
    behavior: SlatePolicy,
    pool: SessionTable,
    config: AdversarialConfig,
    generator: torch.Generator,
) -> float:
    """Train on distinct real and as many freshly generated sessions; accuracy on a fifth of them that is kept apart."""
    chosen = torch.randperm(len(pool), generator=generator)[: config.sessions]
    genuine_sessions = pool.batch(chosen).first_steps(config.max_steps)
    users = torch.randint(world.n_users, (len(chosen),), generator=generator)
    fake = rollout(world, behavior, users, generator, config.max_steps)
    apart, learned = torch.arange(len(chosen)).tensor_split([max(1, len(chosen) // 5)])
    rows = learned.split(config.batch_sessions)
    real, generated = ([sessions.select(part).trim() for part in rows] for sessions in (genuine_sessions, fake))
    for _ in range(config.discriminator_epochs):
        for genuine, made in zip(real, generated, strict=True):
            optimizer.zero_grad()
            discriminator_loss(discriminator, genuine, made).backward()
            optimizer.step()
    with torch.no_grad():
        genuine_rate = (discriminator.session_logits(genuine_sessions.select(apart)) > 0).float().mean()
        made_rate = (discriminator.session_logits(fake.select(apart)) <= 0).float().mean()
    return float((genuine_rate + made_rate) / 2)


def _random_sessions(pool: SessionTable, n_sessions: int, generator: torch.Generator) -> SessionBatch:
    """Sessions drawn at random: batches of like length would differ from generated ones by their lengths alone."""
    return pool.batch(torch.randint(len(pool), (n_sessions,), generator=generator))
