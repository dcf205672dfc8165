"""The world model of a log of actions: what a user answers to an action, whether they leave, and what is seen next.

    r  ~ softmax f(s, a)             over the rewards that the log holds, or 64 groups of them by size, as their means
    e  ~ Bernoulli(σ(g(s, a, r)))    whether the session ends with this request
    s' = s + Δ(s, a, r) + ε          of the numeric features, ε ~ N(0, σ²), within the range of the log; others stay

f and (g, Δ) are two networks, fitted by likelihood (Δ by least squares on standardised changes) and kept at the pass
with the best validation loss. It is a `ContinuousEnvironment`, so every agent of continuous actions learns in it;
sessions begin with what logged ones began with, and none is longer than the longest of them. How far it can be trusted
is asked in `evaluation/action_trust.py`.

Shape letters: M requests, B users, S numbers of an observation, F numeric ones of them, A of an action, R rewards.
"""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from jaxtyping import Bool, Float, Int
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional

from components.environments.continuous import Outcome
from components.errors import InputError
from components.interactions.continuous_batches import LoggedActions, numeric_columns, read_actions
from components.interactions.log_folder import Log
from components.interactions.tensor_record import TensorRecord
from components.policies.continuous_policy import layers
from components.world_model.training import Epoch, Progress

WEIGHTS, SHAPE = "action_model.safetensors", "action_model.json"
#: Rewards of which each is an outcome of its own; of more, groups of about as many requests are.
MOST_REWARDS = 64
#: Logged sessions whose first observations are kept, for new ones to begin with.
MOST_FIRST = 20_000
#: Change of a feature below which it counts as never varied.
_LEAST_DEVIATION = 1e-6


class ActionModelConfig(BaseModel):
    """The world model of a log of actions."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    hidden: tuple[int, ...] = Field(default=(128, 128), min_length=1, description="Units of each network's layers.")
    max_epochs: int = Field(default=15, ge=1, le=500, description="Passes over the training requests, at most.")
    patience: int = Field(default=3, ge=1, le=50, description="Passes without a better loss before stopping.")
    batch: int = Field(default=1_024, ge=1, description="Requests of a step.")
    learning_rate: float = Field(default=2e-3, gt=0, le=1, description="Adam's step size at first; it falls to 0.")
    weight_decay: float = Field(default=1e-4, ge=0, description="Pull of all weights towards zero.")


class ActionModelShape(BaseModel):
    """Sizes from which a model is built."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    observation_size: int
    action_size: int
    n_rewards: int
    n_numeric: int
    hidden: tuple[int, ...]
    n_first: int = Field(description="First observations that are kept.")


@dataclass(frozen=True)
class ActionState(TensorRecord):
    """What B users see, and how many requests they have answered."""

    observations: Float[Tensor, "B S"]
    steps: Int[Tensor, " B"]


class ActionModel(nn.Module):
    """Networks and what is known of the log: untrained until `fit_action_model` or `load_action_model`.

    Args:
        shape: its sizes.
        generator: of the initial weights.
    """

    def __init__(self, shape: ActionModelShape, generator: torch.Generator) -> None:
        super().__init__()
        self.shape = shape
        self.observation_size, self.action_size = shape.observation_size, shape.action_size
        inputs = shape.observation_size + shape.action_size
        self.response = layers((inputs, *shape.hidden, shape.n_rewards), generator)
        self.after = layers((inputs + 1, *shape.hidden, 1 + shape.n_numeric), generator)
        for name, size in (
            ("rewards", shape.n_rewards),
            ("observation_scale", shape.observation_size),
            ("edges", shape.n_rewards - 1),
            *((name, shape.n_numeric) for name in ("change_mean", "change_deviation", "noise", "lowest", "highest")),
        ):
            self.register_buffer(name, torch.ones(size))
        self.register_buffer("numeric", torch.zeros(shape.n_numeric, dtype=torch.long))
        self.register_buffer("longest", torch.ones((), dtype=torch.long))
        self.register_buffer("first", torch.zeros(shape.n_first, shape.observation_size))
        self.rewards: Float[Tensor, " R"]
        self.edges: Float[Tensor, " E"]
        self.observation_scale: Float[Tensor, " S"]
        self.change_mean: Float[Tensor, " F"]
        self.change_deviation: Float[Tensor, " F"]
        self.noise: Float[Tensor, " F"]
        self.lowest: Float[Tensor, " F"]
        self.highest: Float[Tensor, " F"]
        self.numeric: Int[Tensor, " F"]
        self.longest: Int[Tensor, ""]
        self.first: Float[Tensor, "N S"]

    def reward_logits(self, observations: Float[Tensor, "M S"], actions: Float[Tensor, "M A"]) -> Float[Tensor, "M R"]:
        """Logits of each of `rewards`."""
        return self.response(torch.cat([observations / self.observation_scale, actions], dim=1))

    def expected_rewards(
        self, observations: Float[Tensor, "M S"], actions: Float[Tensor, "M A"]
    ) -> Float[Tensor, " M"]:
        """E[r | s, a]."""
        return self.reward_logits(observations, actions).softmax(1) @ self.rewards

    def leave_logits_and_changes(
        self, observations: Float[Tensor, "M S"], actions: Float[Tensor, "M A"], rewards: Float[Tensor, " M"]
    ) -> tuple[Float[Tensor, " M"], Float[Tensor, "M F"]]:
        """Logit of leaving, and the standardised change of each numeric feature if the user stays."""
        scaled = rewards / self.rewards.abs().max().clamp(min=_LEAST_DEVIATION)
        outputs = self.after(torch.cat([observations / self.observation_scale, actions, scaled[:, None]], dim=1))
        return outputs[:, 0], outputs[:, 1:]

    def reset(self, n_users: int, generator: torch.Generator) -> ActionState:
        """New users, who begin as logged sessions did."""
        rows = torch.randint(len(self.first), (n_users,), generator=generator, device=self.first.device)
        return ActionState(self.first[rows], torch.zeros_like(rows))

    def observe(self, state: ActionState) -> Float[Tensor, "B S"]:
        """What a policy may see."""
        return state.observations

    @torch.no_grad()
    def step(
        self, state: ActionState, actions: Float[Tensor, "B A"], generator: torch.Generator
    ) -> tuple[Outcome, ActionState]:
        """Act; returns the outcomes and what follows."""
        seen, actions = state.observations, actions.to(state.observations.dtype).clamp(-1, 1)
        drawn = torch.multinomial(self.reward_logits(seen, actions).softmax(1), 1, generator=generator)[:, 0]
        rewards = self.rewards[drawn]
        logits, changes = self.leave_logits_and_changes(seen, actions, rewards)
        left = torch.rand(len(logits), generator=generator, device=logits.device) < torch.sigmoid(logits)
        steps = state.steps + 1
        noise = torch.randn(changes.shape, generator=generator, device=changes.device)
        moved = seen[:, self.numeric] + self.change_mean + self.change_deviation * (changes + self.noise * noise)
        following = seen.clone()
        following[:, self.numeric] = moved.clamp(min=self.lowest, max=self.highest)
        return Outcome(rewards, left | (steps >= self.longest)), ActionState(following, steps)


@dataclass(frozen=True)
class ActionModelTraining:
    """The model at its best validation loss, and how it got there."""

    model: ActionModel
    history: tuple[Epoch, ...]


def fit_action_model(
    train: Log, validation: Log, config: ActionModelConfig, seed: int, progress: Progress
) -> ActionModelTraining:
    """Fit the world model to logged requests, part by part.

    Args:
        train: log of actions.
        validation: another one, of other sessions.
        config: sizes and step sizes.
        seed: of weights and order.
        progress: told how far it is.

    Raises:
        ContractError: a log has no actions.
        InputError: no reward, no end or no first request of a session is known, a categorical feature changes within a
            session, or the loss is no number.
    """
    generator = torch.Generator().manual_seed(seed)
    model = _untrained(train, config, generator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    # Whole passes are planned: where patience runs out earlier, the rest of the schedule is not needed.
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.max_epochs)
    best, waited, history = float("inf"), 0, list[Epoch]()
    state = copy.deepcopy(model.state_dict())
    for epoch in range(config.max_epochs):
        progress("fitting the world model", epoch / config.max_epochs)
        total, n = 0.0, 0
        for part in logged_steps(train):
            for rows in torch.randperm(len(part.rewards), generator=generator).split(config.batch):
                loss = _loss(model, part.select(rows))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total, n = total + float(loss.detach()) * len(rows), n + len(rows)
        schedule.step()
        history.append(Epoch(train=total / n, validation=_mean_loss(model, validation)))
        if not math.isfinite(history[-1].validation):
            raise InputError(
                f"action_model.learning_rate = {config.learning_rate:g}: the world model came to no finite loss; "
                "expected a smaller step size"
            )
        if history[-1].validation < best:
            best, waited, state = history[-1].validation, 0, copy.deepcopy(model.state_dict())
        elif (waited := waited + 1) == config.patience:
            break
    model.load_state_dict(state)
    return ActionModelTraining(model.eval().requires_grad_(False), tuple(history))


@dataclass(frozen=True)
class LoggedSteps(TensorRecord):
    """M logged requests, and what came after each."""

    observations: Float[Tensor, "M S"]
    actions: Float[Tensor, "M A"]
    rewards: Float[Tensor, " M"]
    reward_known: Bool[Tensor, " M"]
    next_observations: Float[Tensor, "M S"]
    """The observation itself where nothing followed."""
    stayed: Bool[Tensor, " M"]
    """Whether a request of the same session followed."""
    left: Bool[Tensor, " M"]
    users: Int[Tensor, " M"]
    steps: Int[Tensor, " M"]


def logged_steps(log: Log) -> Iterator[LoggedSteps]:
    """The log's requests with what followed, part by part.

    Raises:
        ContractError: the log has no actions.
    """
    for part in read_actions(log):
        yield _steps(part)


def _steps(part: LoggedActions) -> LoggedSteps:
    stayed = torch.zeros(len(part.rewards), dtype=torch.bool)
    stayed[:-1] = (part.sessions[1:] == part.sessions[:-1]) & (part.steps[1:] == part.steps[:-1] + 1)
    following = part.observations.clone()
    following[stayed] = part.observations[1:][stayed[:-1]]
    return LoggedSteps(
        observations=part.observations,
        actions=part.actions,
        rewards=part.rewards.float(),
        reward_known=part.reward_known,
        next_observations=following,
        stayed=stayed,
        left=part.ended & ~stayed,
        users=part.users,
        steps=part.steps,
    )


def _untrained(log: Log, config: ActionModelConfig, generator: torch.Generator) -> ActionModel:
    """A model that knows the log's rewards, ranges and first observations, and nothing else yet."""
    numeric = torch.tensor(numeric_columns(log.manifest), dtype=torch.long)
    n_columns = sum(1 if feature.kind == "numeric" else len(feature.values) for feature in log.manifest.context)
    others = torch.ones(n_columns, dtype=torch.bool)
    others[numeric] = False
    rewards, first, scales, ranges, changes, n_left, longest = [], [], [], [], [], 0, 0
    for part in logged_steps(log):
        rewards.append(part.rewards[part.reward_known])
        first.append(part.observations[part.steps == 0])
        scales.append(part.observations.abs().amax(0))
        ranges.append(torch.stack([part.observations[:, numeric].amin(0), part.observations[:, numeric].amax(0)]))
        moved = part.next_observations[part.stayed] - part.observations[part.stayed]
        if bool(moved[:, others].any()):
            raise InputError(
                f"{log.path}: a categorical feature changes within a session; the world model of actions expects those "
                "to stay and only numeric ones to change"
            )
        changes.append(moved[:, numeric])
        n_left += int(part.left.sum())
        longest = max(longest, int(part.steps.max()) + 1)
    known, begun = torch.cat(rewards), torch.cat(first)
    for what, n in (("reward", len(known)), ("end of a session", n_left), ("first request of a session", len(begun))):
        if n == 0:
            raise InputError(f"{log.path}: no {what} is known; a world model of actions needs it")
    begun = begun[torch.randperm(len(begun), generator=generator)[:MOST_FIRST]]
    edges, outcomes = _outcomes(known)
    shape = ActionModelShape(
        observation_size=n_columns,
        action_size=log.manifest.action_size,
        n_rewards=len(outcomes),
        n_numeric=len(numeric),
        hidden=config.hidden,
        n_first=len(begun),
    )
    model, change = ActionModel(shape, generator), torch.cat(changes)
    scale, spread = torch.stack(scales).amax(0), torch.stack(ranges)
    model.edges.copy_(edges)
    model.rewards.copy_(outcomes)
    model.first.copy_(begun)
    model.longest.fill_(longest)
    model.numeric.copy_(numeric)
    model.observation_scale.copy_(torch.where(scale > 0, scale, 1.0))
    model.lowest.copy_(spread[:, 0].amin(0))
    model.highest.copy_(spread[:, 1].amax(0))
    model.noise.zero_()
    if len(change) > 1:
        deviation = change.std(0)
        model.change_mean.copy_(change.mean(0))
        model.change_deviation.copy_(torch.where(deviation > _LEAST_DEVIATION, deviation, 0.0))
    else:
        model.change_mean.zero_()
        model.change_deviation.zero_()
    return model


def _outcomes(rewards: Float[Tensor, " M"]) -> tuple[Float[Tensor, " E"], Float[Tensor, " R"]]:
    """Between which rewards outcomes are told apart, and what each is worth."""
    values = torch.unique(rewards)
    edges = (values[1:] + values[:-1]) / 2
    if len(values) > MOST_REWARDS:
        shares = torch.arange(1, MOST_REWARDS) / MOST_REWARDS
        ordered = rewards.sort().values
        edges = torch.unique(ordered[(shares * len(ordered)).long()])
        # Above the largest reward nothing lies: a group there would be worth nothing that was ever seen.
        edges = edges[edges < values[-1]]
    places = torch.searchsorted(edges, rewards)
    n = torch.bincount(places, minlength=len(edges) + 1)
    means = torch.zeros(len(n), dtype=torch.float64).index_add(0, places, rewards.double()) / n.clamp(min=1)
    return edges, means.float()


def _loss(model: ActionModel, steps: LoggedSteps) -> Float[Tensor, ""]:
    """Nats of rewards and leaving, and half the squared error of standardised changes, a request each."""
    known = steps.reward_known
    places = torch.searchsorted(model.edges, steps.rewards[known])
    reward_nats = functional.cross_entropy(
        model.reward_logits(steps.observations[known], steps.actions[known]), places, reduction="sum"
    )
    judged = known & (steps.stayed | steps.left)
    logits, changes = model.leave_logits_and_changes(
        steps.observations[judged], steps.actions[judged], steps.rewards[judged]
    )
    leave_nats = functional.binary_cross_entropy_with_logits(logits, steps.left[judged].float(), reduction="sum")
    moved = _standardised_changes(model, steps)[judged]
    stayed = steps.stayed[judged][:, None]
    errors = 0.5 * ((changes - moved).square() * stayed).sum()
    return (reward_nats + leave_nats + errors) / len(steps.rewards)


def _standardised_changes(model: ActionModel, steps: LoggedSteps) -> Float[Tensor, "M F"]:
    moved = (steps.next_observations - steps.observations)[:, model.numeric] - model.change_mean
    return torch.where(model.change_deviation > 0, moved / model.change_deviation.clamp(min=_LEAST_DEVIATION), 0.0)


@torch.no_grad()
def _mean_loss(model: ActionModel, log: Log) -> float:
    """Mean loss of a log's requests; what changes miss by, root mean square, becomes the model's noise."""
    total, n, n_known = 0.0, 0, 0
    missed, n_stayed = torch.zeros(model.shape.n_numeric), 0
    for part in logged_steps(log):
        total, n = total + float(_loss(model, part)) * len(part.rewards), n + len(part.rewards)
        n_known += int(part.reward_known.sum())
        followed = part.select(part.stayed & part.reward_known)
        _, changes = model.leave_logits_and_changes(followed.observations, followed.actions, followed.rewards)
        missed += (changes - _standardised_changes(model, followed)).square().sum(0)
        n_stayed += len(followed.rewards)
    if n_known == 0:
        raise InputError(f"{log.path}: no reward is known; a world model of actions needs it")
    model.noise.copy_((missed / max(n_stayed, 1)).sqrt())
    return total / n


def save_action_model(model: ActionModel, folder: Path) -> None:
    """Write a model into a folder that exists."""
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    safetensors.torch.save_file(tensors, folder / WEIGHTS)
    (folder / SHAPE).write_text(model.shape.model_dump_json() + "\n")


def load_action_model(folder: Path) -> ActionModel:
    """The model in a folder that `save_action_model` wrote."""
    shape = ActionModelShape.model_validate_json((folder / SHAPE).read_bytes())
    model = ActionModel(shape, torch.Generator())
    model.load_state_dict(safetensors.torch.load_file(folder / WEIGHTS))
    return model.eval().requires_grad_(False)
