"""Logs of Virtual Taobao: sessions under a stated policy whose densities are exact.

A row is a page. What is logged of an action is its float32, and of its density what the policy says of that float32 in
float64: whoever asks the same policy of the log gets the same number.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl
import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor

from components.environments.constant_actions import middling_constant
from components.environments.irecgan_mdp import FEEDBACK_DELAY, FIRST_SESSION, REQUEST_GAP, SESSION_GAP
from components.environments.virtual_taobao import ACTION_SIZE, GROUPS, VirtualTaobao
from components.interactions.contract import OF_REQUEST, Evidence, Feature, Manifest, RatioAssumption, Reward
from components.interactions.log_folder import Log, write_log
from components.interactions.tensor_record import TensorRecord
from components.policies.constant_action import ConstantAction
from components.policies.continuous_policy import ContinuousPolicy, UniformActions
from components.policies.deterministic_policy import DeterministicPolicy

#: Sessions that are rolled out together, and become one part of the log.
PART_SESSIONS = 4_096
#: Features of the user, one a group of the simulator's one-hot numbers, and of the page before.
USER_FEATURES = tuple(f"user_{number}" for number in range(len(GROUPS)))
PAGE_FEATURES = ("last_clicks", "last_page_action", "page")


class Config(BaseModel):
    """What is logged, and under which policy."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["virtual-taobao"] = "virtual-taobao"
    policy: Literal["uniform", "constant"] = Field(
        default="constant",
        description="Who chooses the logged actions: all of the box alike, or a Gaussian around one action, cut to "
        "the box.",
    )
    action: Literal["mid-quality"] | tuple[float, ...] = Field(
        default="mid-quality",
        description="Middle of `constant`: 27 numbers within -0.999 and 0.999, or one that the simulator's gradient "
        "leads to.",
    )
    level: float = Field(
        default=0.4, gt=0, lt=1, description="Click-through rate of `constant` around the action `mid-quality`."
    )
    deviation: float = Field(default=0.2, ge=0.01, le=2, description="Deviation of the Gaussian of `constant`.")
    n_sessions: int = Field(default=20_000, ge=1, description="Sessions in the log, each of a user of its own.")
    log_seed: int = Field(default=0, ge=0, lt=2**31, description="Seed of users, actions and clicks.")

    @field_validator("action")
    @classmethod
    def _inside_the_box(cls, action: str | tuple[float, ...]) -> str | tuple[float, ...]:
        if isinstance(action, tuple):
            if len(action) != ACTION_SIZE:
                raise ValueError(f"{len(action)} numbers; expected {ACTION_SIZE}")
            if outside := [number for number in action if not abs(number) <= 0.999]:
                raise ValueError(f"{outside[0]} is outside; expected numbers within -0.999 and 0.999")
        return action


@dataclass(frozen=True)
class LoggedPages(TensorRecord):
    """M pages of whole sessions, ordered by session and page."""

    sessions: Tensor
    """Number of the session, from 0."""
    steps: Tensor
    observations: Float[Tensor, "M 91"]
    actions: Float[Tensor, "M 27"]
    log_probs: Tensor
    """In float64."""
    clicks: Tensor
    page_actions: Tensor
    ended: Tensor


def gaussian_around(action: Float[Tensor, " A"], deviation: float) -> DeterministicPolicy:
    """Truncated Gaussian actions around one action, whatever is observed; in float64."""
    return DeterministicPolicy(ConstantAction(action.double().atanh()), deviation).requires_grad_(False)


def logging_policy(config: Config, environment: VirtualTaobao) -> ContinuousPolicy:
    """The policy that a configuration states.

    Raises:
        InputError: no constant action reaches `level` with this deviation.
    """
    if config.policy == "uniform":
        return UniformActions(ACTION_SIZE)
    if isinstance(config.action, tuple):
        return gaussian_around(torch.tensor(config.action), config.deviation)
    return gaussian_around(middling_constant(environment, config.deviation, config.level, seed=0), config.deviation)


@torch.no_grad()
def roll_out_pages(
    environment: VirtualTaobao, policy: ContinuousPolicy, n_sessions: int, generator: torch.Generator
) -> LoggedPages:
    """Whole sessions of new users, with the log-density of each action as it is logged."""
    state = environment.reset(n_sessions, generator)
    alive = torch.arange(n_sessions, device=environment.device)
    pages: list[LoggedPages] = []
    while len(alive):
        observations = environment.observe(state)
        actions = policy.act(observations, generator).actions.float()
        log_probs = policy.log_prob(observations.double(), actions.double())
        outcome, state = environment.step(state, actions, generator)
        page_actions = environment.observe(state)[:, -2]
        steps = torch.full_like(alive, len(pages))
        pages.append(
            LoggedPages(
                alive, steps, observations, actions, log_probs.double(), outcome.rewards, page_actions, outcome.ended
            )
        )
        stay = torch.nonzero(~outcome.ended)[:, 0]
        alive, state = alive[stay], state.select(stay)
    names = LoggedPages.__dataclass_fields__
    together = LoggedPages(**{name: torch.cat([getattr(page, name) for page in pages]) for name in names})
    # Pages come step by step, so an order that is stable in sessions is that of their steps.
    return together.select(together.sessions.argsort(stable=True))


def page_rows(pages: LoggedPages, manifest: Manifest, first_session: int, policy: str) -> pl.DataFrame:
    """Pages as rows of the data contract.

    Args:
        pages: of sessions from number 0 on.
        manifest: of the log that the rows are for.
        first_session: number of the first of these sessions in the whole log.
        policy: version of the policy that chose the actions.
    """
    numbers = pl.Series(pages.sessions.numpy()) + first_session
    steps = pl.Series(pages.steps.numpy())
    groups = pages.observations[:, : sum(GROUPS)].split(GROUPS, dim=1)
    context = {
        feature.name: np.array(feature.values)[group.argmax(1).numpy()]
        for feature, group in zip(manifest.context, groups, strict=False)
    } | dict(zip(PAGE_FEATURES, pages.observations[:, -len(PAGE_FEATURES) :].T.numpy(), strict=True))
    started = pl.Series([FIRST_SESSION]).cast(pl.Datetime("us", "UTC"))
    name = numbers.cast(pl.String).str.zfill(8)
    frame = pl.DataFrame(
        {
            "session_id": "session-" + name,
            "user_id": "user-" + name,
            "step": steps.cast(pl.Int32),
            "action": pl.Series(pages.actions.numpy()).cast(pl.List(pl.Float32)),
            "action_log_prob": pages.log_probs.numpy(),
            "request_signals": pl.DataFrame(
                {"clicks": pages.clicks.numpy(), "page_action": pages.page_actions.numpy()}
            ).to_struct(),
            "session_end": pl.Series(np.where(pages.ended.numpy(), "left", "")).replace("", None),
            "context": pl.DataFrame(context).to_struct(),
            "timestamp": started.item() + numbers * SESSION_GAP + steps * REQUEST_GAP,
        }
    ).with_columns(
        request_id=pl.format("{}-{}", "session_id", "step"),
        available_at=pl.col("timestamp") + FEEDBACK_DELAY,
        loop=pl.lit(manifest.loop),
        policy=pl.lit(policy),
    )
    absent = {column: dtype for column, dtype in manifest.schema().items() if column not in frame.columns}
    return frame.with_columns(pl.lit(None, dtype=dtype).alias(column) for column, dtype in absent.items())


def manifest_of(config: Config, policy: ContinuousPolicy, loop: str) -> Manifest:
    """What a log of Virtual Taobao means."""
    users = (
        Feature(name=name, kind="categorical", values=tuple(map(str, range(size))))
        for name, size in zip(USER_FEATURES, GROUPS, strict=True)
    )
    return Manifest(
        loop=loop,
        source="virtual-taobao",
        evidence=Evidence.PROPENSITIES,
        ratio_assumption=RatioAssumption.FULL_SLATE,
        responses="per_position",
        slate_size=0,
        action_size=ACTION_SIZE,
        has_purchases=False,
        context=(*users, *(Feature(name=name, kind="numeric") for name in PAGE_FEATURES)),
        request_signals=("clicks", "page_action"),
        reward=Reward(name="clicks", weights={f"{OF_REQUEST}clicks": 1.0}),
        limits=(
            _stated(config, policy),
            "The users are simulated by a network that was learned from a shop's logs: its true values are known, and "
            "say nothing about a real shop.",
            "Each session is of a user of its own, and neither clicks nor pages depend on earlier actions.",
        ),
    )


def write_virtual_taobao_log(config: Config, weights: Path, out: Path, loop: str) -> Log:
    """Simulate a log, part by part; the same configuration and weights give the same log.

    Args:
        config: what is logged.
        weights: folder of the published weights.
        out: folder of the log.
        loop: name of the loop that the log is for.

    Raises:
        InputError: the weights are missing or not readable, or no constant action reaches `level`.
    """
    environment = VirtualTaobao(weights)
    policy = logging_policy(config, environment)
    manifest = manifest_of(config, policy, loop)

    def parts() -> Iterator[pl.DataFrame]:
        generator = torch.Generator().manual_seed(config.log_seed)
        for first in range(0, config.n_sessions, PART_SESSIONS):
            n_sessions = min(PART_SESSIONS, config.n_sessions - first)
            pages = roll_out_pages(environment, policy, n_sessions, generator)
            yield page_rows(pages, manifest, first, config.policy)

    return write_log(out, manifest, parts(), pl.DataFrame({"item_id": []}, schema={"item_id": pl.String}))


def _stated(config: Config, policy: ContinuousPolicy) -> str:
    if config.policy == "uniform":
        return f"The logging policy draws each of the {ACTION_SIZE} numbers from [-1, 1], all values alike."
    middle = policy.mode(torch.zeros(1, sum(GROUPS) + len(PAGE_FEATURES)))[0]
    numbers = ", ".join(f"{number:.3f}" for number in middle.tolist())
    return (
        f"The logging policy is a Gaussian of deviation {config.deviation:g}, truncated to the box, around the action "
        f"({numbers})."
    )
