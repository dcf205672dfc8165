from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import polars as pl
import pytest
import torch
from torch import Tensor

from components.environments.interface import Feedback
from components.environments.rollout import (
    Point,
    Survivors,
    continue_sessions,
    log_rows,
    open_sessions,
    position_rewards,
    rollout,
)
from components.interactions.batching import Requests, SessionBatch
from components.interactions.contract import Evidence, Feature, Manifest, RatioAssumption, Reward
from components.interactions.tensor_record import TensorRecord
from components.policies.slate_policy import SessionState, SlatePolicy, UniformPolicy


@dataclass(frozen=True)
class Visit(TensorRecord):
    user: Tensor
    step: Tensor


@dataclass
class Corridor:
    """User n stays for n + 1 requests, clicks the first position, and buys at the last request; nothing is random."""

    slate_size: int = 2
    reward: Reward = field(default_factory=lambda: Reward(weights={"clicked": 1.0, "purchased": 3.0}))
    stepped: list[list[int]] = field(default_factory=list)

    def reset(self, users: Tensor, generator: torch.Generator) -> Visit:
        return Visit(users, torch.zeros_like(users))

    def observe(self, state: Visit) -> Requests:
        n = len(state.user)
        context = torch.nn.functional.one_hot(state.step.clamp(max=2), 3).float()
        return Requests(torch.tensor([[2, 3, 4]]).expand(n, -1), context, torch.zeros(n, 8, dtype=torch.long))

    def step(self, state: Visit, slates: Tensor, generator: torch.Generator) -> tuple[Feedback, Visit]:
        self.stepped.append(state.user.tolist())
        left = state.step == state.user
        clicks = torch.tensor([1.0, 0.0]).expand(len(slates), -1)
        return Feedback(clicks, clicks * left[:, None], left), Visit(state.user, state.step + 1)


class Scribe(SlatePolicy):
    """Shows items 3 and 2, and carries in its state how often each session was advanced."""

    slate_size = 2

    def __init__(self) -> None:
        super().__init__()
        self.advanced: list[tuple[list[list[int]], list[list[float]]]] = []

    def start(self, requests: Requests) -> SessionState:
        return SessionState(torch.zeros(len(requests.candidates), 1), requests.candidates[:, :0])

    def advance(
        self, state: SessionState, slates: Tensor, clicks: Tensor, purchases: Tensor, requests: Requests
    ) -> SessionState:
        self.advanced.append((slates.tolist(), clicks.tolist()))
        return SessionState(state.hidden + 1, state.recent)

    def states(self, batch: SessionBatch) -> SessionState:
        raise NotImplementedError

    def logits(self, state: SessionState, requests: Requests) -> Tensor:
        assert torch.equal(state.hidden[:, 0], requests.context.argmax(1).float()), "a session got another one's state"
        return torch.tensor([[50.0, 100.0, 0.0]]).expand(len(requests.candidates), -1)


@pytest.fixture
def batch() -> SessionBatch:
    """Users 1, 0 and 2, censored after two requests."""
    return rollout(Corridor(), Scribe(), torch.tensor([1, 0, 2]), torch.Generator().manual_seed(0), max_steps=2)


def test_sessions_last_as_long_as_their_users_stay(batch: SessionBatch) -> None:
    assert batch.users.tolist() == [1, 0, 2]
    assert batch.mask.tolist() == [[True, True], [True, False], [True, True]]
    assert batch.left.tolist() == [[False, True], [True, False], [False, False]]


def test_only_the_end_that_the_step_limit_makes_is_unobserved(batch: SessionBatch) -> None:
    assert batch.leave_observed.tolist() == [[True, True], [True, False], [True, False]]


def test_slates_feedback_and_rewards_stand_where_they_happened(batch: SessionBatch) -> None:
    assert batch.slates.tolist() == [[[3, 2], [3, 2]], [[3, 2], [0, 0]], [[3, 2], [3, 2]]]
    assert batch.clicks[..., 0].tolist() == [[1.0, 1.0], [1.0, 0.0], [1.0, 1.0]]
    assert batch.purchases[..., 0].tolist() == [[0.0, 1.0], [1.0, 0.0], [0.0, 0.0]]
    # One for a click, three more where it was bought.
    assert batch.rewards[..., 0].tolist() == [[1.0, 4.0], [4.0, 0.0], [1.0, 1.0]]
    assert float(batch.rewards[..., 1].sum()) == 0.0


def test_everything_beyond_a_session_s_end_is_zero(batch: SessionBatch) -> None:
    for name in ("candidates", "context", "events", "slates", "log_probs", "clicks", "observed", "purchase_observed"):
        assert not bool(getattr(batch, name)[1, 1].any()), name


def test_users_who_left_are_not_stepped_again() -> None:
    corridor = Corridor()

    rollout(corridor, Scribe(), torch.tensor([1, 0, 2]), torch.Generator(), max_steps=5)

    assert corridor.stepped == [[1, 0, 2], [1, 2], [2]]


def test_feedback_is_told_with_its_rows_before_the_policy_goes_on() -> None:
    scribe, told = Scribe(), []

    def hear(rows: Tensor, feedback: Feedback) -> None:
        told.append((rows.tolist(), feedback.left.tolist(), len(scribe.advanced)))

    rollout(Corridor(), scribe, torch.tensor([1, 0, 2]), torch.Generator(), max_steps=5, on_feedback=hear)

    assert told == [([0, 1, 2], [False, True, False], 0), ([0, 2], [True, False], 1), ([2], [True], 2)]


def test_a_policy_s_state_follows_its_own_sessions() -> None:
    scribe = Scribe()

    rollout(Corridor(), scribe, torch.tensor([0, 1]), torch.Generator(), max_steps=5)

    assert scribe.advanced == [([[3, 2]], [[1.0, 0.0]])]


def test_after_each_step_is_told_which_sessions_go_on() -> None:
    corridor, scribe, generator = Corridor(), Scribe(), torch.Generator()
    opened = open_sessions(corridor, scribe, torch.tensor([1, 0, 2]), generator)
    told: list[tuple[list[int], list[int], list[int]]] = []

    def tell(going_on: Survivors[Visit]) -> None:
        point = going_on.point
        told.append((going_on.rows.tolist(), point.users.tolist(), point.requests.context.argmax(1).tolist()))

    continue_sessions(corridor, scribe, opened, generator, 5, on_step=tell)

    assert told == [([0, 2], [1, 2], [1, 1]), ([2], [2], [2])]


def test_a_session_can_be_gone_on_with_from_any_of_its_requests() -> None:
    corridor, scribe, generator = Corridor(), Scribe(), torch.Generator()
    users = torch.tensor([1, 0, 2])
    points: list[Point[Visit]] = []
    opened = open_sessions(corridor, scribe, users, generator)
    whole = continue_sessions(
        corridor, scribe, opened, generator, 5, on_step=lambda going_on: points.append(going_on.point)
    )

    twice = points[0].select(torch.tensor([1, 1]))
    rest = continue_sessions(corridor, scribe, twice, generator, 5)

    assert rest.users.tolist() == [2, 2]
    for copy in range(2):
        assert torch.equal(rest.rewards[copy], whole.rewards[2, 1:])
        assert torch.equal(rest.context[copy], whole.context[2, 1:])


def test_the_same_generator_gives_the_same_sessions() -> None:
    users = torch.arange(20) % 4

    first, second, other = (
        rollout(Corridor(), UniformPolicy(2), users, torch.Generator().manual_seed(seed), 4) for seed in (1, 1, 2)
    )

    assert torch.equal(first.slates, second.slates)
    assert not torch.equal(first.slates, other.slates)


def test_position_rewards_weigh_clicks_and_purchases() -> None:
    clicks, purchases = torch.tensor([[1.0, 1.0, 0.0]]), torch.tensor([[0.0, 1.0, 0.0]])

    rewards = position_rewards(Reward(weights={"clicked": 0.5, "purchased": 2.0}), clicks, purchases)

    assert rewards.tolist() == [[0.5, 2.5, 0.0]]
    assert position_rewards(Reward(weights={"clicked": 1.0}), clicks, purchases).tolist() == [[1.0, 1.0, 0.0]]


@pytest.fixture
def rows(batch: SessionBatch) -> pl.DataFrame:
    manifest = Manifest(
        loop="corridor",
        source="corridor",
        evidence=Evidence.PROPENSITIES,
        ratio_assumption=RatioAssumption.FULL_SLATE,
        responses="per_position",
        slate_size=2,
        context=(Feature(name="door", kind="categorical", values=("first", "second", "later")),),
    )
    morning = datetime(2026, 3, 1, 8, tzinfo=UTC)
    return log_rows(
        batch,
        manifest=manifest,
        item_ids=["red", "green", "blue"],
        user_ids=["ann", "bob", "cem"],
        started=pl.Series([morning, morning + timedelta(hours=1), morning + timedelta(hours=2)]),
        request_gap=timedelta(seconds=30),
        feedback_delay=timedelta(minutes=5),
        policy="scribe-1",
    )


def test_log_rows_have_a_row_for_each_request_with_the_names_of_users_and_items(rows: pl.DataFrame) -> None:
    assert rows["user_id"].to_list() == ["bob", "bob", "ann", "cem", "cem"]
    assert rows["step"].to_list() == [0, 1, 0, 0, 1]
    assert rows["session_id"].n_unique() == 3
    assert rows["request_id"].n_unique() == 5
    assert rows["slate"].to_list() == [["green", "red"]] * 5
    assert rows["candidates"].to_list() == [["red", "green", "blue"]] * 5
    assert rows["purchased"].to_list() == [[False, False], [True, False], [True, False], [False, False], [False, False]]
    assert rows["context"].struct.field("door").to_list() == ["first", "second", "first", "first", "second"]
    assert set(rows["policy"]) == {"scribe-1"}


def test_log_rows_say_how_each_session_ended(rows: pl.DataFrame) -> None:
    assert rows["session_end"].to_list() == [None, "left", "left", None, "censored"]


def test_log_rows_space_the_requests_of_a_session_and_delay_their_feedback(rows: pl.DataFrame) -> None:
    morning = datetime(2026, 3, 1, 8, tzinfo=UTC)

    assert rows["timestamp"][:3].to_list() == [
        morning,
        morning + timedelta(seconds=30),
        morning + timedelta(hours=1),
    ]
    assert set(rows["available_at"] - rows["timestamp"]) == {timedelta(minutes=5)}
