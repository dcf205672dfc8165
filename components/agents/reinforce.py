"""REINFORCE of a slate policy, in an environment and on logged sessions (IRecGAN, section 3.2, eq. 5); or actor-critic.

    maximise  λ₁ Σ_generated Σ_{t,k} A_{t,k} log π(a_{t,k} | s_t, a_{t,<k})
            + λ₂ Σ_logged ω_t Σ_{t,k} A_{t,k} log π(a_{t,k} | s_t, a_{t,<k})
            + η H(π) − κ log E[π² / behavior²]

    A_{t,k} = G_{t,k} − V_k(s_t),   G_{t,k} = Σ_{j≥k} q_t r_{t,j} + γ G_{t+1},   ω_t = min(π(slate_t) / b(slate_t), cap)

q_t is the discriminator's belief that a generated session is real, over its mean at step t (1 for logged sessions, and
where there is no discriminator), V a learned baseline that does not depend on the slate. In a world model r_{t,j} is
E[r | s_t, slate, clicks above j] instead of the reward that was drawn, where that is known: the same mean, less noise.

With `critic = "td"` the baseline's own V₁(s_{t+1}) takes the place of G_{t+1}: A is the one-step TD error, V learns by
TD(0), and REINFORCE becomes the actor-critic (Sutton and Barto 2018, section 13.5): less noise, and the critic's bias.

Credit: `positions` gives each position what it and those below it earn: valid where responses depend on nothing below
them (the cascade). `slate` gives each position all that its slate earns: valid everywhere, noisier. `clicks`, the
paper's form, lets clicked positions learn and no others.

Shape letters: B sessions, T requests, M = B·T requests, K positions, N candidates.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float, Int
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional

from components.environments.interface import Environment, State
from components.environments.rollout import rollout
from components.errors import InputError
from components.interactions.batching import SessionBatch, SessionReader
from components.objectives.policy_gradient import capped_weights, policy_gradient_loss
from components.objectives.returns import discounted_returns, position_returns
from components.policies import plackett_luce
from components.policies.ranking_policy import NeuralSlatePolicy
from components.policies.slate_policy import SessionState
from components.policies.tabular_policy import TabularSlatePolicy
from components.world_model.training import Progress

#: Belief that each request of generated sessions is real: (B, T) from a batch.
Discriminate = Callable[[SessionBatch], Float[Tensor, "B T"]]
#: Reward that was to be expected at each position of generated sessions: (B, T, K) from a batch.
Expect = Callable[[SessionBatch], Float[Tensor, "B T K"]]


class ReinforceConfig(BaseModel):
    """REINFORCE inside the world model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    start: float = Field(
        default=12.0,
        ge=0,
        le=100,
        description="How sharply the policy ranks by what the world model expects of items before its first step, in "
        "nats for each nat of expected reward; 0 starts as the logging policy.",
    )
    iterations: int = Field(default=100, ge=1, le=100_000, description="Policy steps; each collects sessions anew.")
    sessions: int = Field(default=768, ge=1, description="Sessions generated for a step (the paper: 200).")
    max_steps: int = Field(default=20, ge=1, le=1_000, description="Requests after which generated sessions are cut.")
    critic: Literal["returns", "td"] = Field(
        default="td",
        description="What later requests are worth: 'td' takes the baseline's value of the next request (actor-critic: "
        "less noise), 'returns' what the session went on to earn (the paper's REINFORCE).",
    )
    gamma: float = Field(default=0.9, ge=0, le=1, description="Discount per request; 0 looks at one request alone.")
    generated_weight: float = Field(
        default=1.0, ge=0, description="λ₁: weight of generated sessions; 0 generates none and learns from the log."
    )
    logged_weight: float = Field(default=0.2, ge=0, description="λ₂: weight of logged sessions; 0 leaves them out.")
    logged_sessions: int = Field(default=256, ge=1, description="Logged sessions of a step.")
    weight_cap: float = Field(default=5.0, ge=1, description="Cap of the one-request importance weights.")
    entropy: float = Field(default=0.002, ge=0, description="η: reward per nat of entropy; keeps slates varied.")
    pull: float = Field(
        default=0.01,
        ge=0,
        description="κ: cost per nat of distance to the logging policy; keeps the log able to judge.",
    )
    learning_rate: float = Field(default=1e-3, gt=0, le=1, description="Adam's step size at first.")
    schedule: Literal["cosine", "constant"] = Field(
        default="cosine",
        description="Step sizes: with 'cosine' they fall to 0 and the last steps average the noise out, with "
        "'constant' noise goes on exploring.",
    )
    clip_norm: float = Field(default=1.0, gt=0, description="Largest norm of a gradient.")
    baseline_rate: float = Field(default=6e-3, gt=0, le=1, description="Adam's step size of the baseline at first.")
    credit: Literal["positions", "slate", "clicks"] = Field(
        default="positions",
        description="What a position is credited with: 'positions' needs the cascade assumption (on logs without it "
        "the loop takes 'slate'), 'slate' does not, 'clicks' is the paper's form.",
    )


@dataclass(frozen=True)
class Iteration:
    """What one policy step saw: of generated sessions, or of logged ones where none are generated."""

    mean_session_reward: float
    mean_session_length: float
    entropy: float
    divergence: float


@dataclass(frozen=True)
class ReinforceTraining:
    """How training went; the policy is trained in place."""

    history: tuple[Iteration, ...]


class Baseline(nn.Module):
    """V_k(s): expected reward-to-go of each position, from the state alone."""

    def __init__(self, n_inputs: int, slate_size: int) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(n_inputs, 64), nn.Tanh(), nn.Linear(64, slate_size))

    def forward(self, state: SessionState, context: Float[Tensor, "M C"]) -> Float[Tensor, "M K"]:
        """Baselines of M requests."""
        values: Tensor = self.network(torch.cat([state.hidden, context], dim=1))
        return values


def train_reinforce(
    policy: NeuralSlatePolicy | TabularSlatePolicy,
    environment: Environment[State],
    users: Int[Tensor, " U"],
    logged: SessionReader | None,
    config: ReinforceConfig,
    seed: int,
    progress: Progress,
    discriminate: Discriminate | None = None,
    expect: Expect | None = None,
) -> ReinforceTraining:
    """Train a policy by its gradient, in any environment.

    Args:
        policy: trained in place; its encoder and behavior part stay as they are.
        environment: world model or simulator.
        users: codes of users whose sessions may be generated.
        logged: logged sessions; None leaves the second sum out.
        config: sizes, weights and step sizes.
        seed: of the only generator.
        progress: told after each step.
        discriminate: belief that generated requests are real; None counts all as real.
        expect: reward that was to be expected of generated slates, which takes the place of what was drawn: the same
            gradient with less noise. None where the environment cannot tell; `credit = "clicks"` asks for what was
            drawn.

    Raises:
        InputError: neither generated nor logged sessions have a weight.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        requests = environment.observe(environment.reset(users[:1], torch.Generator().manual_seed(seed)))
        n_inputs = policy.start(requests).hidden.shape[1] + requests.context.shape[1]
        baseline = Baseline(n_inputs, policy.slate_size)
    optimizer = torch.optim.Adam(
        [
            {"params": policy.learned.parameters(), "lr": config.learning_rate},
            {"params": baseline.parameters(), "lr": config.baseline_rate},
        ],
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.iterations)
    use_log = logged is not None and config.logged_weight > 0
    if config.generated_weight == 0 and not use_log:
        raise InputError(
            f"reinforce.generated_weight = 0, reinforce.logged_weight = {config.logged_weight:g}: there is "
            "nothing to learn from; expected one above 0, and for the logged one a log with log_probs"
        )
    logged_batches = _samples_without_end(logged, config.logged_sessions, generator) if logged and use_log else None
    history = []
    for iteration in range(config.iterations):
        sums: list[tuple[float, SessionBatch, _Terms]] = []
        if config.generated_weight > 0:
            chosen = users[torch.randint(len(users), (config.sessions,), generator=generator)]
            generated = rollout(environment, policy, chosen, generator, config.max_steps)
            if expect is not None and config.credit != "clicks":
                generated = replace(generated, rewards=expect(generated))
            belief = discriminate(generated) if discriminate else generated.mask.float()
            sums.append((config.generated_weight, generated, _terms(policy, baseline, generated, config, belief, None)))
        if logged_batches is not None:
            batch = next(logged_batches)
            # What a session earned is known only where all of its rewards are.
            batch = batch.select(torch.nonzero(batch.rewarded)[:, 0])
            if len(batch.users):
                real = _terms(policy, baseline, batch, config, batch.mask.float(), config.weight_cap)
                sums.append((config.logged_weight, batch, real))
        if not sums:
            continue
        # Entropy is that of the requests that the policy leads to, the pull that of the log's, where both are there.
        (_, seen, terms), (_, _, pulled) = sums[0], sums[-1]
        loss = config.pull * pulled.divergence - config.entropy * terms.entropy
        for weight, _, part in sums:
            loss = loss + weight * (part.policy_loss + part.baseline_loss)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.learned.parameters(), config.clip_norm)
        optimizer.step()
        if config.schedule == "cosine":
            schedule.step()
        history.append(
            Iteration(
                mean_session_reward=float(seen.rewards.sum((1, 2)).mean()),
                mean_session_length=float(seen.lengths.float().mean()),
                entropy=float(terms.entropy.detach()),
                divergence=float(pulled.divergence.detach()),
            )
        )
        progress(
            f"policy: step {iteration + 1}, {history[-1].mean_session_reward:.3f} a session",
            (iteration + 1) / config.iterations,
        )
    return ReinforceTraining(tuple(history))


@dataclass(frozen=True)
class _Terms:
    policy_loss: Float[Tensor, ""]
    baseline_loss: Float[Tensor, ""]
    entropy: Float[Tensor, ""]
    divergence: Float[Tensor, ""]


def _terms(
    policy: NeuralSlatePolicy | TabularSlatePolicy,
    baseline: Baseline,
    batch: SessionBatch,
    config: ReinforceConfig,
    belief: Float[Tensor, "B T"],
    weight_cap: float | None,
) -> _Terms:
    """The parts of the loss on one batch; importance weights are applied where a cap is given (logged sessions)."""
    flat = batch.mask.flatten()
    with torch.no_grad():
        state = policy.states(batch).select(flat)
    requests, slates = batch.requests().select(flat), batch.slates.flatten(0, 1)[flat]
    logits = policy.logits(state, requests)
    log_probs = plackett_luce.log_prob(logits, plackett_luce.places_of(slates, requests.candidates))
    values = baseline(state, requests.context)
    # All that a request and those after it earn is what its first position is credited with.
    critic = torch.zeros(batch.mask.shape).masked_scatter(batch.mask, values[:, 0].detach())
    returns = _returns(batch.rewards * belief[..., None], critic, config).flatten(0, 1)[flat]
    advantages = returns - values
    if weight_cap is not None:
        behavior = batch.log_probs.flatten()[flat].float()
        weights = capped_weights(log_probs.sum(1), behavior, weight_cap)
        advantages = advantages * torch.where(behavior.isfinite(), weights, 0.0)[:, None]
    mask = slates > 0
    if config.credit == "clicks":
        mask = mask & (batch.clicks.flatten(0, 1)[flat] > 0)
    return _Terms(
        policy_loss=policy_gradient_loss(log_probs, advantages, mask) * policy.slate_size,
        baseline_loss=(values - returns).square().mean(),
        entropy=plackett_luce.entropy(logits).mean(),
        divergence=_ess_loss(logits, policy.behavior_logits(state, requests).detach(), policy.slate_size),
    )


def _ess_loss(
    logits: Float[Tensor, "M N"], behavior_logits: Float[Tensor, "M N"], slate_size: int
) -> Float[Tensor, ""]:
    """About −log(ESS / n): log of the mean second moment of slates' weights, taking all positions for the first.

    The mean of exponentials minds the few states where the policy has gone far: it is they that cost effective
    requests.
    """
    per_slate = slate_size * plackett_luce.divergence(logits, behavior_logits)
    return per_slate.logsumexp(0) - math.log(len(per_slate))


def _returns(
    rewards: Float[Tensor, "B T K"], values: Float[Tensor, "B T"], config: ReinforceConfig
) -> Float[Tensor, "B T K"]:
    """What each position is credited with; the values are the critic's, 0 beyond the ends of sessions."""
    earned = rewards.sum(2)
    onward = values if config.critic == "td" else discounted_returns(earned, config.gamma)
    following = functional.pad(onward[:, 1:], (0, 1))
    if config.credit == "slate":
        return (earned + config.gamma * following)[..., None].expand(rewards.shape)
    return position_returns(rewards, following, config.gamma)


def _samples_without_end(logged: SessionReader, size: int, generator: torch.Generator) -> Iterator[SessionBatch]:
    while True:
        for (batch,) in logged.samples(size, generator):
            yield batch
