"""The learned user model as an environment: what agents train in when there is no simulator.

What users bring along (candidates, context, organic events) is replayed from logged sessions; what they answer is
sampled. Beyond the end of the replayed session candidates and events are those of another session's request; the
context stays. Where training never saw whether a user stayed, a session ends with the one that it replays. Where a log
has no slates the model draws the next item from the catalogue: it is a click where the slate holds it, an organic event
in either case, and a retrieval stage (followers of the last item, then popular items) yields the candidates.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from components.environments.interface import Feedback
from components.environments.rollout import position_rewards
from components.interactions.batching import Requests, SessionBatch, SessionTable
from components.interactions.contract import Reward
from components.interactions.tensor_record import TensorRecord
from components.policies.slate_policy import SessionState
from components.world_model.training import NegativeSampler
from components.world_model.user_model import UserModel

#: Sessions whose requests are replayed, at most: drawn from the whole log, so that a larger one need not fit in memory.
POOL_SESSIONS = 50_000
#: Items that stand for the catalogue when next items are drawn.
N_DRAWN = 2_000
#: Draws of the retrieval stage for each candidate: popular items are drawn more than once, and count once.
DRAWS_PER_CANDIDATE = 3


@dataclass(frozen=True)
class WorldModelState(TensorRecord):
    """B sessions inside the model."""

    session: Int[Tensor, " B"]
    """Replayed session."""
    step: Int[Tensor, " B"]
    row: Int[Tensor, " B"]
    """Replayed request."""
    hidden: Float[Tensor, "B H"]
    recent: Int[Tensor, "B R"]
    candidates: Int[Tensor, "B N"]
    context: Float[Tensor, "B C"]
    events: Int[Tensor, "B E"]
    memory: Float[Tensor, "B H"] | None


class WorldModel:
    """Sessions of the user model over the requests of logged sessions."""

    def __init__(
        self,
        user_model: UserModel,
        pool: SessionTable,
        reward: Reward,
        slate_size: int,
        n_candidates: int,
        counts: Float[Tensor, " V"],
    ) -> None:
        self.user_model = user_model.eval()
        self.pool = pool
        self.reward = reward
        self.slate_size = slate_size
        self.n_users = len(pool)
        self.n_candidates = n_candidates
        self.counts = counts
        self.sampler = NegativeSampler.of(counts, N_DRAWN)

    @torch.no_grad()
    def reset(self, users: Int[Tensor, " B"], generator: torch.Generator) -> WorldModelState:
        """Open the replay of the logged sessions with the given numbers."""
        row = self.pool.starts[users]
        requests = self._requests(row, generator, None)
        opened = self.user_model.encoder.start(requests)
        if self.user_model.slate_size == 0:
            requests = self._requests(row, generator, opened)
        return WorldModelState(
            users, torch.zeros_like(users), row, opened.hidden, opened.recent,
            requests.candidates, requests.context, requests.events, opened.memory,
        )  # fmt: skip

    def observe(self, state: WorldModelState) -> Requests:
        """The current requests."""
        return Requests(state.candidates, state.context, state.events)

    def session(self, state: WorldModelState) -> SessionState:
        """The user model's own state of each session."""
        return SessionState(state.hidden, state.recent, state.memory)

    @torch.no_grad()
    def step(
        self, state: WorldModelState, slates: Int[Tensor, "B K"], generator: torch.Generator
    ) -> tuple[Feedback, WorldModelState]:
        """Sample responses and take the next requests."""
        model, session = self.user_model, self.session(state)
        step = state.step + 1
        row = self._next_rows(state, step, generator)
        if model.slate_size == 0:
            chosen = model.sample_next_items(session, *self.sampler.draw(generator), generator)
            nothing = session.hidden[:, :0]
            left = model.sample_leaving(session, slates[:, :0], nothing, nothing, generator)
            left = self._ends(state, left)
            # Who leaves turns to no next item.
            clicks = ((slates == chosen[:, None]) & ~left[:, None]).float()
            purchases = torch.zeros_like(clicks)
            events = torch.nn.functional.pad(chosen[:, None], (state.events.shape[1] - 1, 0)).to(state.events.dtype)
            requests = Requests(state.candidates, state.context, events)
            following = model.encoder.advance(session, slates, clicks, purchases, requests)
            requests = Requests(self.retrieve(following, generator), state.context, events)
        else:
            clicks, purchases, left = model.sample_responses(session, slates, generator)
            left = self._ends(state, left)
            requests = self._requests(row, generator, None)
            replayed = (step < self.pool.lengths[state.session])[:, None]
            requests = replace(requests, context=torch.where(replayed, requests.context, state.context))
            following = model.encoder.advance(session, slates, clicks, purchases, requests)
        return Feedback(clicks, purchases, left), WorldModelState(
            state.session, step, row, following.hidden, following.recent,
            requests.candidates, requests.context, requests.events, following.memory,
        )  # fmt: skip

    @torch.no_grad()
    def expected_rewards(self, batch: SessionBatch) -> Float[Tensor, "B T K"]:
        """E[reward | session so far, slate, clicks above] at each position of generated sessions; zeros beyond them.

        Averaged over the clicks above, which were drawn, it is the mean of the reward that was drawn.
        """
        flat = batch.mask.flatten()
        session = self.user_model.encoder.states(batch).select(flat)
        slates, clicks = batch.slates.flatten(0, 1)[flat], batch.clicks.flatten(0, 1)[flat]
        click = self.user_model.click_probabilities(session, slates, clicks)
        purchase = torch.sigmoid(self.user_model.encoder.purchase_logits(session, slates)) * self.user_model.sells
        expected = position_rewards(self.reward, click, click * purchase) * (slates > 0)
        return torch.zeros_like(batch.rewards).masked_scatter(batch.mask[..., None], expected.to(batch.rewards.dtype))

    def _ends(self, state: WorldModelState, left: Bool[Tensor, " B"]) -> Bool[Tensor, " B"]:
        """Whose session ends: who leaves or, where leaving is not known, is at the end of the replayed session."""
        return left if self.user_model.knows_leaving else state.step + 1 >= self.pool.lengths[state.session]

    def _next_rows(
        self, state: WorldModelState, step: Int[Tensor, " B"], generator: torch.Generator
    ) -> Int[Tensor, " B"]:
        elsewhere = torch.randint(len(self.pool.rows.mask), step.shape, generator=generator)
        within = step < self.pool.lengths[state.session]
        return torch.where(within, self.pool.starts[state.session] + step, elsewhere)

    def _requests(self, row: Int[Tensor, " B"], generator: torch.Generator, session: SessionState | None) -> Requests:
        rows = self.pool.rows
        candidates = rows.candidates[row, 0] if session is None else self.retrieve(session, generator)
        return Requests(candidates, rows.context[row, 0], rows.events[row, 0])

    def retrieve(self, session: SessionState, generator: torch.Generator) -> Int[Tensor, "B N"]:
        """Candidates where the log has none: followers of the last item, then distinct draws by popularity.

        Few are padding where draws repeat themselves more than expected.
        """
        n_sessions, encoder = len(session.hidden), self.user_model.encoder
        followers = encoder.neighbors[session.recent[:, 0].long()]
        n_draws = n_sessions * DRAWS_PER_CANDIDATE * self.n_candidates
        draws = torch.multinomial(self.counts, n_draws, replacement=True, generator=generator)
        line = torch.cat([followers, draws.reshape(n_sessions, -1)], dim=1)
        ordered, order = line.sort(dim=1, stable=True)
        is_first = torch.ones_like(line, dtype=torch.bool)
        is_first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
        kept = torch.zeros_like(is_first).scatter(1, order, is_first) & (line > 0)
        place = torch.where(kept, kept.cumsum(1) - 1, self.n_candidates).clamp(max=self.n_candidates)
        # One column more takes in what is not kept.
        candidates = line.new_zeros(n_sessions, self.n_candidates + 1).scatter(1, place, line)
        return candidates[:, :-1].to(session.recent.dtype)
