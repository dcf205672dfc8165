"""Agents of continuous actions on Virtual Taobao, each judged alike: one row an agent and its setting.

A row and a seed give one result, which depends on nothing else, so rows may run anywhere beside each other:

    python -m components.evaluation.agent_comparison WEIGHTS ROW SEED OUT

writes OUT/ROW-SEED.json. What runs here needs torch, numpy and pydantic, and `cmaes` for one row; no data frames.

The click-through rate (CTR) is clicks / pages / 10, of whole sessions under the policy's mode. While an agent learns it
is taken on the same users every time, and neither its steps nor its seconds count as the agent's.

Shape letters: B users.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from pydantic import BaseModel
from torch import Tensor

from components.agents import ddpg, ppo, two_stream_ppo
from components.agents.a2c import A2cConfig, train_a2c
from components.agents.cma_es import CmaEsConfig, train_cma_es
from components.agents.constant_cem import ConstantCemConfig, train_constant_cem
from components.agents.constant_search import constant_policy
from components.agents.continuous_reinforce import ContinuousReinforceConfig, train_continuous_reinforce
from components.agents.ddpg import DdpgConfig, train_ddpg
from components.agents.ppo import PpoConfig, train_ppo
from components.agents.sac import SacConfig, train_sac
from components.agents.td3 import Td3Config, train_td3
from components.agents.two_stream_ppo import TwoStreamPpoConfig, train_two_stream_ppo
from components.agents.watch import Watch
from components.environments.continuous import ContinuousEnvironment, run_sessions
from components.environments.virtual_taobao import CLICK_COUNTS, ITEMS_OF_A_PAGE, VirtualTaobao
from components.errors import InputError
from components.evaluation.best_constant import best_constant
from components.policies.continuous_policy import ContinuousPolicy, UniformActions

#: Users on whom a policy is judged, episodes as the literature judges, and users of the table of everybody's actions.
USERS, EPISODES, CROSSED_USERS = 2_000, 50, 200
#: Looks at an agent while it learns.
LOOKS = 30
#: CTR from which Virtual Taobao counts as solved.
SOLVED = 0.99
#: The last part of training, which is compared with the best.
LAST_TENTH = 0.9
JUDGE_SEED = 20_190_127

Config = TypeVar("Config", bound=BaseModel)


class Kind(StrEnum):
    """What a row is in the comparison for."""

    REFERENCE = "reference"
    CONSTANT = "constant"
    PUBLISHED = "published"
    TUNED = "tuned"
    DISCOUNT = "another discount"
    NEUTRAL = "the expected reward alone"


@dataclass(frozen=True)
class Row:
    """An agent with its setting."""

    kind: Kind
    steps: int
    """Environment steps for which it learns; 0 where there is nothing to learn from them."""
    train: Callable[[Any, int, int, Watch], ContinuousPolicy]
    """Called with the environment (Virtual Taobao, or for agents another one), steps, a seed and who watches."""


def agent(kind: Kind, train: Callable[[Any, Config, int, Watch], ContinuousPolicy], config: Config) -> Row:
    """The row of an agent whose configuration has `steps`."""

    def train_for(environment: ContinuousEnvironment[Any], steps: int, seed: int, watch: Watch) -> ContinuousPolicy:
        return train(environment, config.model_copy(update={"steps": steps}), seed, watch)

    return Row(kind, config.model_dump()["steps"], train_for)


def agents(
    name: str,
    train: Callable[[Any, Config, int, Watch], ContinuousPolicy],
    tuned: Config,
    published: Config | None = None,
) -> dict[str, Row]:
    """The rows of an agent: tuned, published, and tuned but for γ = 0 (0.95 where it is 0) and for `seeking` = 0."""
    discounts = tuned.model_dump()["gamma"] > 0
    other, gamma = ("gamma-0", 0.0) if discounts else ("discounting", 0.95)
    rows = {name: agent(Kind.TUNED, train, tuned)}
    if published is not None:
        rows[f"{name}-published"] = agent(Kind.PUBLISHED, train, published)
    rows[f"{name}-{other}"] = agent(Kind.DISCOUNT, train, tuned.model_copy(update={"gamma": gamma}))
    if "seeking" in type(tuned).model_fields:
        rows[f"{name}-neutral"] = agent(Kind.NEUTRAL, train, tuned.model_copy(update={"seeking": 0.0}))
    return rows


def untrained(make: Callable[[VirtualTaobao, int], ContinuousPolicy]) -> Row:
    """The row of a policy that takes no steps; it is given the seed."""
    return Row(Kind.REFERENCE, 0, lambda environment, steps, seed, watch: make(environment, seed))


class _Random(UniformActions):
    """Uniform actions, of which none is more typical: the mode is drawn."""

    def __init__(self, environment: VirtualTaobao, seed: int) -> None:
        super().__init__(environment.action_size)
        self._generator = torch.Generator(environment.device).manual_seed(seed)

    def mode(self, observations: Float[Tensor, "B S"]) -> Float[Tensor, "B A"]:
        return self.act(observations, self._generator).actions


ROWS: dict[str, Row] = {
    "random": untrained(_Random),
    "zero": untrained(lambda environment, _: UniformActions(environment.action_size)),
    "best-constant": untrained(lambda environment, seed: constant_policy(best_constant(environment, seed))),
    "constant-cem": agent(Kind.CONSTANT, train_constant_cem, ConstantCemConfig()),
    "cma-es": agent(Kind.CONSTANT, train_cma_es, CmaEsConfig()),
    **agents("ddpg", train_ddpg, DdpgConfig(), published=ddpg.PUBLISHED),
    **agents("td3", train_td3, Td3Config()),
    **agents("sac", train_sac, SacConfig()),
    **agents("ppo", train_ppo, PpoConfig(), published=ppo.PUBLISHED),
    **agents("two-stream-ppo", train_two_stream_ppo, TwoStreamPpoConfig(), published=two_stream_ppo.PUBLISHED),
    **agents("a2c", train_a2c, A2cConfig()),
    **agents("reinforce", train_continuous_reinforce, ContinuousReinforceConfig()),
}


def run_row(environment: VirtualTaobao, name: str, seed: int, share: float = 1.0) -> dict[str, float]:
    """Train a row's agent and judge it.

    Args:
        environment: where it learns and is judged.
        name: of the row.
        seed: of the agent.
        share: of the row's steps that it takes.

    Returns:
        `ctr` of 2,000 users and `episodes_ctr` of 50 sessions at the end; `best_ctr` and `late_ctr`, the best look and
        the mean of the last tenth, and `collapse`, their difference; `steps` and CPU `seconds` of the agent, and those
        at the first look with a CTR of at least 0.99 (`solved_steps`, `solved_seconds`; NaN without one);
        `action_variance` between users on their first page, mean of an action's numbers; the variance of expected
        clicks between users (`user_variance`) and between actions (`action_click_variance`), with everybody's action
        given to everybody; `reach`, the largest size of a number of an action; and `look.K.steps`, `.seconds`, `.ctr`.

    Raises:
        InputError: there is no such row.
    """
    if name not in ROWS:
        raise InputError(f"unknown row {name!r}; the rows are: {', '.join(ROWS)}")
    row = ROWS[name]
    steps = round(row.steps * share)
    looks = _Looks(environment, steps)
    policy = row.train(environment, steps, seed, looks)
    looks.finish(policy)
    points = looks.points
    best = max(point.ctr for point in points)
    late = [point.ctr for point in points if point.steps >= LAST_TENTH * points[-1].steps]
    solved = next((point for point in points if point.ctr >= SOLVED), None)
    curve = {
        f"look.{number}.{key}": float(value)
        for number, point in enumerate(points)
        for key, value in vars(point).items()
    }
    return {
        "ctr": points[-1].ctr,
        "episodes_ctr": click_through_rate(environment, policy, EPISODES, seed),
        "best_ctr": best,
        "late_ctr": fmean(late),
        # A difference of means would leave rounding errors where the last looks are the best.
        "collapse": fmean(best - ctr for ctr in late),
        "steps": float(points[-1].steps),
        "seconds": points[-1].seconds,
        "solved_steps": float(solved.steps) if solved else float("nan"),
        "solved_seconds": solved.seconds if solved else float("nan"),
        **_variances(environment, policy),
        **curve,
    }


def click_through_rate(environment: VirtualTaobao, policy: ContinuousPolicy, n_users: int, seed: int) -> float:
    """Clicks / pages / 10 of whole sessions of new users, all pages alike."""
    generator = torch.Generator(environment.device).manual_seed(seed)
    return run_sessions(environment, policy.mode, n_users, generator).mean_reward / ITEMS_OF_A_PAGE


@dataclass(frozen=True)
class Look:
    """An agent at one moment."""

    steps: int
    seconds: float
    """CPU time, user and system, without that of looking."""
    ctr: float


class _Looks:
    """Watches an agent: looks at it when a part of its steps is done."""

    def __init__(self, environment: VirtualTaobao, steps: int) -> None:
        self.points: list[Look] = []
        self._environment = environment
        self._every = steps / LOOKS
        self._steps = 0
        self._looking = 0.0
        self._started = time.process_time()

    def __call__(self, policy: ContinuousPolicy, steps: int) -> None:
        self._steps = steps
        if steps >= self._every * (len(self.points) + 1):
            self._look(policy)

    def finish(self, policy: ContinuousPolicy) -> None:
        """Look at what training gave, unless the last look did."""
        if not self.points or self.points[-1].steps < self._steps:
            self._look(policy)

    def _look(self, policy: ContinuousPolicy) -> None:
        begun = time.process_time()
        seconds = begun - self._started - self._looking
        ctr = click_through_rate(self._environment, policy, USERS, JUDGE_SEED)
        self.points.append(Look(self._steps, seconds, ctr))
        self._looking += time.process_time() - begun


@torch.no_grad()
def _variances(environment: VirtualTaobao, policy: ContinuousPolicy) -> dict[str, float]:
    state = environment.reset(USERS, torch.Generator(environment.device).manual_seed(JUDGE_SEED))
    actions = policy.mode(environment.observe(state)).clamp(-1, 1)
    users = torch.arange(CROSSED_USERS, device=environment.device)
    pages = environment.page(
        state.select(users.repeat_interleave(CROSSED_USERS)), actions[users].repeat(CROSSED_USERS, 1)
    )
    counts = torch.arange(CLICK_COUNTS, dtype=torch.float64, device=environment.device)
    clicks = (pages.clicks.double() @ counts).view(CROSSED_USERS, CROSSED_USERS)
    return {
        "action_variance": float(actions.var(0).mean()),
        "user_variance": float(clicks.mean(1).var()),
        "action_click_variance": float(clicks.mean(0).var()),
        "reach": float(actions.abs().max()),
    }


def main(weights: str, row: str, seed: str, out: str) -> None:
    """Run one row with one seed and write its result."""
    torch.set_num_threads(1)
    Path(out).mkdir(parents=True, exist_ok=True)
    result = run_row(VirtualTaobao(Path(weights)), row, int(seed))
    file = Path(out) / f"{row}-{seed}.json"
    staging = file.with_suffix(".tmp")
    staging.write_text(json.dumps(result))
    staging.rename(file)


if __name__ == "__main__":
    main(*sys.argv[1:])
