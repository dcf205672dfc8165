"""Simulated shoppers at the endpoint: a rollout that asks for its slates over HTTP, and hands in what users did.

The shop's users step together, as in any rollout: each step asks for the slates of all open sessions, lets the users
act, and hands in what they did before the next step asks again. What comes back is an ordinary batch, so the true
rewards are known, and the endpoint's log can be held against them.
"""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import numpy as np
import polars as pl
import torch
from jaxtyping import Float, Int
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from components.environments.interface import Feedback
from components.environments.rollout import context_values, rollout
from components.environments.storefront import MAX_STEPS, Config, Storefront
from components.environments.true_value import TrueValue, true_session_value
from components.errors import InputError, SlateloopError
from components.experiment.arm import arm_sums
from components.interactions.batching import Requests, SessionBatch
from components.interactions.vocabulary import FIRST_ITEM, PADDING, UNKNOWN
from components.policies import plackett_luce
from components.policies.policy_folder import StoredPolicy
from components.policies.slate_policy import SessionState, SlateChoice
from components.world_model.training import Progress
from flows.endpoint_client import Endpoint, EndpointClient
from services.messages import RecommendResponse

#: Sessions that step together: all are shown a slate before feedback on the first is handed in, a second or so later.
OPEN_SESSIONS = 1_000


class SessionRewards(BaseModel):
    """What sessions earned."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    users: int
    sessions: int
    requests: int
    mean_reward: float = Field(description="Of a session, summed over its requests.")
    standard_error: float | None = Field(description="Of the mean, clustered by user; null with a single user.")


class SimulationSummary(BaseModel):
    """What simulated shoppers saw of an endpoint.

    A session counts for the arm, and for the policy, that answered its first request.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    loop: str
    seed: int
    total: SessionRewards
    arms: dict[str, SessionRewards]
    policies: dict[str, SessionRewards] = Field(description="By exact tag.")
    not_logged: int = Field(description="Slates that were shown and could not be logged.")
    seconds: float
    requests_per_second: float


@dataclass(frozen=True)
class Visits:
    """One session of each of B users at an endpoint."""

    batch: SessionBatch
    answers: list[list[RecommendResponse]]
    """Of each session, in the order of its requests."""


def simulate(
    config: Config,
    endpoint: Endpoint,
    *,
    n_users: int,
    n_sessions: int = 1,
    seed: int = 0,
    progress: Progress = lambda message, share: None,
) -> SimulationSummary:
    """Let different users of the shop, drawn at random, visit an endpoint.

    Args:
        config: the shop.
        endpoint: shows the slates.
        n_users: users; up to `OPEN_SESSIONS` visit at the same time.
        n_sessions: visits of each user; the next begins when all have made theirs.
        seed: of the users' draw and of what they do: given the same slates they do the same.
        progress: told how far it is.

    Raises:
        InputError: the shop has fewer users, nobody answers at the URL, or the endpoint refuses a request.
        SlateloopError: the endpoint fails.
    """
    if n_users > config.n_users:
        raise InputError(f"{n_users} users: the shop has {config.n_users}; source.n_users gives it more")
    shop = Storefront(config)
    generator = torch.Generator().manual_seed(seed)
    users = torch.randperm(config.n_users, generator=generator)[:n_users]
    started, n_answered, n_over = time.perf_counter(), 0, 0
    # Sessions of another simulation are other sessions, whatever its seed.
    name = uuid4().hex[:12]
    sessions: list[_Session] = []

    def on_answers(n_answers: int) -> None:
        nonlocal n_answered
        n_answered += n_answers
        pace = n_answered / (time.perf_counter() - started)
        told = f"{n_over:,} of {n_users * n_sessions:,} sessions over; {n_answered:,} requests, {pace:,.0f} a second"
        progress(told, n_over / (n_users * n_sessions))

    def on_left(n_left: int) -> None:
        nonlocal n_over
        n_over += n_left

    not_logged = 0
    with EndpointClient(endpoint, on_answers) as client:
        for number, group in enumerate(users.split(OPEN_SESSIONS) * n_sessions):
            visits = visit_endpoint(shop, client, group, f"{name}-{number}", generator, on_left)
            rewards = visits.batch.rewards.double().sum((1, 2)).tolist()
            for user, reward, answers in zip(group.tolist(), rewards, visits.answers, strict=True):
                sessions.append(_Session(user, reward, len(answers), answers[0].arm, answers[0].policy))
            n_over = len(sessions)
            not_logged += sum(not answer.logged for answers in visits.answers for answer in answers)
    seconds = time.perf_counter() - started
    progress(f"done in {seconds:.0f} s", 1.0)
    return SimulationSummary(
        loop=endpoint.loop,
        seed=seed,
        total=_rewards(sessions),
        arms=_by(lambda session: session.arm, sessions),
        policies=_by(lambda session: session.policy, sessions),
        not_logged=not_logged,
        seconds=seconds,
        requests_per_second=n_answered / seconds,
    )


def visit_endpoint(
    shop: Storefront,
    client: EndpointClient,
    users: Int[Tensor, " B"],
    visit: str,
    generator: torch.Generator,
    on_left: Callable[[int], None] = lambda n_left: None,
) -> Visits:
    """One whole session of each user, named `visit`, with slates of an endpoint.

    Args:
        shop: whose users visit.
        client: of the endpoint.
        users: their codes.
        visit: name of their sessions.
        generator: of what they do.
        on_left: told after each step how many left.

    Raises:
        InputError: as `simulate`.
        SlateloopError: as `simulate`.
    """
    visitors = _Visitors(shop, client, [shop.user_ids[user] for user in users.tolist()], visit)

    def on_feedback(rows: Int[Tensor, " A"], feedback: Feedback) -> None:
        visitors.tell(rows, feedback)
        on_left(int(feedback.left.sum()))

    batch = rollout(shop, visitors, users, generator, MAX_STEPS, on_feedback=on_feedback)
    return Visits(batch, visitors.answers)


def true_reward(config: Config, stored: StoredPolicy, *, n_sessions: int = 40_000, seed: int = 0) -> TrueValue:
    """Mean reward of a session in the shop under a stored policy, asked here and not over HTTP.

    Raises:
        InputError: the policy numbers items or context otherwise than the shop does.
    """
    shop = Storefront(config)
    vocabulary = stored.description.vocabulary
    own = [(feature.name, feature.values) for feature in shop.manifest(stored.description.loop).context]
    if vocabulary.item_ids != shop.item_ids:
        raise InputError(
            f"policy {stored.description.name!r}: knows {len(vocabulary.item_ids)} items; expected the shop's "
            f"{len(shop.item_ids)}, from {shop.item_ids[0]} to {shop.item_ids[-1]}"
        )
    if [(code.feature.name, code.feature.values) for code in vocabulary.context_codes] != own:
        raise InputError(f"policy {stored.description.name!r}: has other context features than the shop's {own}")
    generator = torch.Generator().manual_seed(seed)
    users = torch.randint(config.n_users, (n_sessions,), generator=generator)
    return true_session_value(shop, stored.policy, users, generator, MAX_STEPS)


class _Visitors:
    """Chooses slates by asking an endpoint, and keeps what a client must keep: who visits, and each session so far.

    The state of a session is its number (H = 1): its row in the rollout's batch.
    """

    def __init__(self, shop: Storefront, client: EndpointClient, user_ids: Sequence[str], visit: str) -> None:
        self.answers: list[list[RecommendResponse]] = [[] for _ in user_ids]
        self._shop, self._client, self._visit = shop, client, visit
        self._user_ids = user_ids
        self._manifest = shop.manifest(client.endpoint.loop)
        self._names = np.array(["", "", *shop.item_ids], dtype=object)
        self._index = {item_id: index for index, item_id in enumerate(shop.item_ids, FIRST_ITEM)}
        self._past: list[list[dict[str, Any]]] = [[] for _ in user_ids]
        self._contexts: list[dict[str, str]] = [{} for _ in user_ids]

    def start(self, requests: Requests) -> SessionState:
        numbers = torch.arange(len(self._user_ids), dtype=torch.float64)[:, None]
        return SessionState(numbers, requests.candidates.new_zeros(len(numbers), 0))

    def advance(
        self,
        state: SessionState,
        slates: Int[Tensor, "B K"],
        clicks: Float[Tensor, "B K"],
        purchases: Float[Tensor, "B K"],
        requests: Requests,
    ) -> SessionState:
        return state

    def act(self, state: SessionState, requests: Requests, generator: torch.Generator) -> SlateChoice:
        rows = state.hidden[:, 0].long().tolist()
        contexts = pl.DataFrame(context_values(self._manifest, requests.context)).to_dicts()
        candidates = self._names[requests.candidates.numpy()].tolist()
        answers = self._client.recommend(
            [
                self._question(row, offered, context)
                for row, offered, context in zip(rows, candidates, contexts, strict=True)
            ]
        )
        for row, answer, context in zip(rows, answers, contexts, strict=True):
            self.answers[row].append(answer)
            self._contexts[row] = context
        return self._choice(answers, requests)

    def tell(self, rows: Int[Tensor, " A"], feedback: Feedback) -> None:
        """Hand in what the users of some sessions did with their last slate."""
        pieces = []
        responses = (feedback.clicks.bool().tolist(), feedback.purchases.bool().tolist(), feedback.left.tolist())
        for row, clicked, purchased, left in zip(rows.tolist(), *responses, strict=True):
            answer = self.answers[row][-1]
            response = {"clicked": clicked[: len(answer.slate)], "purchased": purchased[: len(answer.slate)]}
            self._past[row].append({"slate": answer.slate, "context": self._contexts[row], **response})
            # The endpoint knows nothing of a slate that it could not log.
            if answer.logged:
                pieces.append({"request_id": answer.request_id, "left": left, **response})
        self._client.tell(pieces)

    def _question(self, row: int, candidates: list[str], context: dict[str, str]) -> dict[str, Any]:
        return {
            "loop": self._client.endpoint.loop,
            "user_id": self._user_ids[row],
            "session_id": self._visit,
            "candidates": candidates,
            "slate_size": self._shop.slate_size,
            "context": context,
            "past_requests": self._past[row],
            "idempotency_key": f"{self._visit}/{row}/{len(self._past[row])}",
        }

    def _choice(self, answers: Sequence[RecommendResponse], requests: Requests) -> SlateChoice:
        size = self._shop.slate_size
        indices = [[self._index.get(item_id, UNKNOWN) for item_id in answer.slate] for answer in answers]
        slates = torch.tensor([(shown + [PADDING] * size)[:size] for shown in indices], dtype=requests.candidates.dtype)
        log_probs = [(*answer.log_probs, *[0.0] * size)[:size] for answer in answers]
        try:
            places = plackett_luce.places_of(slates, requests.candidates)
        except ValueError as error:
            raise SlateloopError(f"{self._client.endpoint.url}: shows what was no candidate: {error}") from None
        return SlateChoice(slates, places, torch.tensor(log_probs, dtype=torch.float64))


@dataclass(frozen=True)
class _Session:
    user: int
    reward: float
    n_requests: int
    arm: str
    policy: str


def _by(label: Callable[[_Session], str], sessions: Iterable[_Session]) -> dict[str, SessionRewards]:
    grouped: dict[str, list[_Session]] = {}
    for session in sessions:
        grouped.setdefault(label(session), []).append(session)
    return {name: _rewards(grouped[name]) for name in sorted(grouped)}


def _rewards(sessions: Sequence[_Session]) -> SessionRewards:
    sums = arm_sums(
        np.array([session.user for session in sessions]), np.array([session.reward for session in sessions])
    )
    return SessionRewards(
        users=sums.n_users,
        sessions=sums.n_sessions,
        requests=sum(session.n_requests for session in sessions),
        mean_reward=sums.total / sums.n_sessions,
        standard_error=math.sqrt(sums.mean().variance) if sums.n_users > 1 else None,
    )
