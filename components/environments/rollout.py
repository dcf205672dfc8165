"""Roll a policy out in an environment: sessions as a batch, or as a log that keeps the data contract."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Generic

import numpy as np
import polars as pl
import torch
from jaxtyping import Float, Int
from torch import Tensor

from components.environments.interface import Environment, Feedback, State
from components.interactions.batching import Requests, SessionBatch
from components.interactions.contract import Manifest, Reward
from components.policies.slate_policy import SessionState, SlateChooser

#: Feedback that environments give, and that a reward in them can weigh.
LEARNED_FEEDBACK = ("clicked", "purchased")


def position_rewards(
    reward: Reward, clicks: Float[Tensor, "*B K"], purchases: Float[Tensor, "*B K"]
) -> Float[Tensor, "*B K"]:
    """Reward of each position, Σ weight · feedback over `LEARNED_FEEDBACK`."""
    return reward.weights.get("clicked", 0.0) * clicks + reward.weights.get("purchased", 0.0) * purchases


@dataclass(frozen=True)
class Point(Generic[State]):
    """Open sessions at their next request: where a rollout starts, and where another may go on."""

    users: Int[Tensor, " B"]
    state: State
    requests: Requests
    session: SessionState

    def select(self, index: Int[Tensor, " A"]) -> "Point[State]":
        """Some of the sessions; one may be named more than once."""
        return Point(
            self.users[index], self.state.select(index), self.requests.select(index), self.session.select(index)
        )


@dataclass(frozen=True)
class Survivors(Generic[State]):
    """Sessions that went on after a step of a rollout."""

    rows: Int[Tensor, " A"]
    """Their rows in the rollout's batch."""
    point: Point[State]


@torch.no_grad()  # not inference_mode: what is rolled out may be learned from
def open_sessions(
    environment: Environment[State], policy: SlateChooser, users: Int[Tensor, " B"], generator: torch.Generator
) -> Point[State]:
    """A new session of each user, at its first request."""
    state = environment.reset(users, generator)
    requests = environment.observe(state)
    return Point(users, state, requests, policy.start(requests))


@torch.no_grad()
def continue_sessions(
    environment: Environment[State],
    policy: SlateChooser,
    point: Point[State],
    generator: torch.Generator,
    max_steps: int,
    on_step: Callable[[Survivors[State]], None] | None = None,
    on_feedback: Callable[[Int[Tensor, " A"], Feedback], None] | None = None,
) -> SessionBatch:
    """Show slates to open sessions until their users leave.

    Args:
        environment: simulator or learned world model.
        policy: chooses the slates.
        point: the open sessions.
        generator: the only source of chance.
        max_steps: sessions with more requests than this are censored there.
        on_step: told after each step which sessions go on, and how they stand.
        on_feedback: told after each step what the users did, those who leave among them, and in which rows they are.
    """
    n = len(point.users)
    alive = torch.arange(n, device=point.users.device)
    users = point.users
    steps: list[SessionBatch] = []
    for step in range(max_steps):
        choice = policy.act(point.session, point.requests, generator)
        feedback, state = environment.step(point.state, choice.slates, generator)
        if on_feedback is not None:
            on_feedback(alive, feedback)
        shown = choice.slates != 0
        row = {
            "mask": torch.ones_like(alive, dtype=torch.bool),
            "candidates": point.requests.candidates,
            "context": point.requests.context,
            "events": point.requests.events,
            "slates": choice.slates,
            "log_probs": choice.log_probs.double().sum(1),
            "position_log_probs": choice.log_probs.double(),
            "clicks": feedback.clicks,
            "purchases": feedback.purchases,
            "observed": shown,
            "purchase_observed": shown,
            "rewards": position_rewards(environment.reward, feedback.clicks, feedback.purchases),
            "reward_known": torch.ones_like(feedback.left),
            "left": feedback.left,
            "leave_observed": torch.full_like(feedback.left, step + 1 < max_steps) | feedback.left,
        }
        columns = {name: _spread(value, alive, n)[:, None] for name, value in row.items()}
        steps.append(SessionBatch(users=users, **columns))
        stay = torch.nonzero(~feedback.left)[:, 0]
        if len(stay) == 0 or step + 1 == max_steps:
            break
        alive, state = alive[stay], state.select(stay)
        requests = environment.observe(state)
        session = policy.advance(
            point.session.select(stay), choice.slates[stay], feedback.clicks[stay], feedback.purchases[stay], requests
        )
        point = Point(point.users[stay], state, requests, session)
        if on_step is not None:
            on_step(Survivors(alive, point))
    return SessionBatch(
        users=users, **{name: torch.cat([getattr(batch, name) for batch in steps], dim=1) for name in row}
    )


def rollout(
    environment: Environment[State],
    policy: SlateChooser,
    users: Int[Tensor, " B"],
    generator: torch.Generator,
    max_steps: int,
    on_feedback: Callable[[Int[Tensor, " A"], Feedback], None] | None = None,
) -> SessionBatch:
    """One whole session of each user; see `continue_sessions`."""
    point = open_sessions(environment, policy, users, generator)
    return continue_sessions(environment, policy, point, generator, max_steps, on_feedback=on_feedback)


def _spread(values: Tensor, alive: Int[Tensor, " A"], n: int) -> Tensor:
    """Rows of the users who are still there, put back among all n; zeros elsewhere."""
    if len(alive) == n:
        return values
    spread = values.new_zeros(n, *values.shape[1:])
    spread[alive] = values
    return spread


def context_values(manifest: Manifest, context: Float[Tensor, "M C"]) -> dict[str, np.ndarray]:
    """Each feature's values at M requests: `context` is one-hot over the manifest's categorical features, in order."""
    codes = context.split([len(feature.values) for feature in manifest.context], dim=1)
    return {
        feature.name: np.array(feature.values)[code.argmax(1).numpy()]
        for feature, code in zip(manifest.context, codes, strict=True)
    }


def log_rows(
    batch: SessionBatch,
    *,
    manifest: Manifest,
    item_ids: Sequence[str],
    user_ids: Sequence[str],
    started: pl.Series,
    request_gap: timedelta,
    feedback_delay: timedelta,
    policy: str,
) -> pl.DataFrame:
    """Rolled-out sessions as rows of the data contract.

    Args:
        batch: B sessions; for its context see `context_values`.
        manifest: of the log that the rows are for.
        item_ids: id of each item from index 2 on.
        user_ids: id of each user code.
        started: B times in UTC at which the sessions began.
        request_gap: time between a session's requests.
        feedback_delay: time after which a request's feedback is known.
        policy: version of the policy that chose the slates.
    """
    sessions, steps = (index.numpy() for index in torch.nonzero(batch.mask, as_tuple=True))
    names = np.array(["", "", *item_ids])
    flat = batch.mask.flatten()

    def lists(values: Tensor, dtype: type[np.generic] | None = None) -> pl.Series:
        array = values.flatten(0, 1)[flat].numpy()
        array = names[array] if dtype is None else array.astype(dtype)
        elements = pl.Series(array.reshape(-1))
        return elements.reshape((-1, array.shape[1])).cast(pl.List(elements.dtype))

    last = steps == (batch.lengths.numpy()[sessions] - 1)
    left = batch.left.flatten()[flat].numpy()
    session_names = pl.Series(np.arange(len(batch.users))).cast(pl.String).str.zfill(7)
    by_position = batch.position_log_probs
    frame = pl.DataFrame(
        {
            "session_id": ("session-" + session_names).gather(sessions),
            "user_id": np.array(user_ids)[batch.users.numpy()[sessions]],
            "step": steps.astype(np.int32),
            "candidates": lists(batch.candidates),
            "slate": lists(batch.slates),
            "slate_log_prob": batch.log_probs.flatten()[flat].numpy(),
            "position_log_probs": None if by_position is None else lists(by_position, np.float64),
            "clicked": lists(batch.clicks, np.bool_),
            "purchased": lists(batch.purchases, np.bool_),
            "session_end": pl.Series(np.where(left, "left", np.where(last, "censored", ""))).replace("", None),
            "timestamp": started.gather(sessions) + pl.Series(steps) * request_gap,
        },
        strict=False,
    ).with_columns(
        available_at=pl.col("timestamp") + feedback_delay,
        request_id=pl.format("{}-{}", "session_id", "step"),
        loop=pl.lit(manifest.loop),
        policy=pl.lit(policy),
    )
    if manifest.context:
        context = context_values(manifest, batch.context.flatten(0, 1)[flat])
        frame = frame.with_columns(context=pl.struct(pl.Series(name, values) for name, values in context.items()))
    absent = {column: dtype for column, dtype in manifest.schema().items() if column not in frame.columns}
    return frame.with_columns(pl.lit(None, dtype=dtype).alias(column) for column, dtype in absent.items())
