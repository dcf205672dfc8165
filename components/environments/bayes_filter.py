"""What the hidden state of IRecGAN's MDP must be, given the session: the exact Bayes filter, and its greedy policy.

A session goes on after a click alone, so all that a policy can know at a request are the slates shown so far and the
item clicked in each. With the law of the MDP known, the belief b over its S states follows exactly:

    b₀ = the start state
    posterior(s) ∝ b(s) · r(s, i)² / Σ_{j in A} r(s, j)         item i of slate A was drawn and clicked
    b(s')        = Σ_s posterior(s) · P(s' | s, i)

Nothing that sees the session alone can predict responses better than

    P(click i | b, A) = Σ_s b(s) · r(s, i)² / Σ_{j in A} r(s, j)

`BayesGreedyPolicy` shows the K items of the largest expected appeal E_b[r(s, i)]. `BayesSlatePolicy` looks at the whole
slate and shows the one that maximises E_b[Σ r²] / E_b[Σ r], all but the chance of a click; it earns more, since
what is drawn for its own appeal should be clicked too. Both look at one request alone, so neither is optimal.

Shape letters: B users, S states, N candidates, K positions.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from components.environments.irecgan_mdp import CERTAIN, START, IRecGanMdp
from components.interactions.batching import Requests, SessionBatch
from components.policies.slate_policy import SessionState, SlatePolicy


class BayesFilter:
    """The belief over the states of sessions whose state is hidden, and what it expects of slates."""

    def __init__(self, mdp: IRecGanMdp) -> None:
        self.mdp = mdp

    def start(self, n_sessions: int) -> Float[Tensor, "B S"]:
        """Belief at the first request: the start state is known."""
        belief = torch.zeros(n_sessions, self.mdp.n_states)
        belief[:, START] = 1.0
        return belief

    def advance(
        self, belief: Float[Tensor, "B S"], slates: Int[Tensor, "B K"], clicks: Float[Tensor, "B K"]
    ) -> Float[Tensor, "B S"]:
        """Belief at the next request; 0 for sessions without a click, which have none."""
        clicked = slates.gather(1, clicks.argmax(1, keepdim=True))[:, 0]
        joint = belief * self._drawn_and_clicked(slates, clicked[:, None])[:, :, 0].T * clicks.sum(1, keepdim=True)
        posterior = joint / joint.sum(1, keepdim=True).clamp(min=torch.finfo(joint.dtype).tiny)
        return torch.einsum("bs,sbt->bt", posterior, self.mdp.transition[:, clicked])

    def states(self, batch: SessionBatch) -> Float[Tensor, "B T S"]:
        """Belief at every request of whole sessions; 0 beyond their ends."""
        beliefs = [self.start(len(batch.users))]
        for step in range(batch.mask.shape[1] - 1):
            beliefs.append(self.advance(beliefs[-1], batch.slates[:, step], batch.clicks[:, step]))
        return torch.stack(beliefs, dim=1) * batch.mask[..., None]

    def expected(
        self, values: Float[Tensor, "S V"], belief: Float[Tensor, "B S"], items: Int[Tensor, "B N"]
    ) -> Float[Tensor, "B N"]:
        """E_b[values(s, i)] of each item."""
        return (belief @ values).gather(1, items.long())

    def click_probabilities(self, belief: Float[Tensor, "B S"], slates: Int[Tensor, "B K"]) -> Float[Tensor, "B K"]:
        """Chance that each item of the slates is the one drawn and is clicked; the rest of 1 is that nothing is."""
        return torch.einsum("bs,sbk->bk", belief, self._drawn_and_clicked(slates, slates))

    def _drawn_and_clicked(self, slates: Int[Tensor, "B K"], items: Int[Tensor, "B X"]) -> Float[Tensor, "S B X"]:
        """r(s, i)² / Σ_{j in A} r(s, j) for items of each slate, in every state; padding has appeal 0."""
        total = self.mdp.appeal[:, slates].sum(2, keepdim=True)
        return self.mdp.appeal[:, items].square() / total.clamp(min=torch.finfo(total.dtype).tiny)


class BayesGreedyPolicy(SlatePolicy):
    """Shows the K items of the largest expected appeal under the exact belief, in random order.

    The state that it keeps of a session is the belief (H = S). Its floor is a formality, as `StateSlatePolicy`'s.
    """

    def __init__(self, mdp: IRecGanMdp) -> None:
        super().__init__()
        self.filter = BayesFilter(mdp)
        self.slate_size = mdp.slate_size

    def start(self, requests: Requests) -> SessionState:
        """The start state, for certain."""
        n = len(requests.candidates)
        return SessionState(self.filter.start(n), requests.candidates.new_zeros(n, 0))

    def advance(
        self,
        state: SessionState,
        slates: Int[Tensor, "B K"],
        clicks: Float[Tensor, "B K"],
        purchases: Float[Tensor, "B K"],
        requests: Requests,
    ) -> SessionState:
        """The belief after a click."""
        return SessionState(self.filter.advance(state.hidden, slates, clicks), state.recent)

    def states(self, batch: SessionBatch) -> SessionState:
        """The belief at every request."""
        beliefs = self.filter.states(batch).flatten(0, 1)
        return SessionState(beliefs, batch.slates.new_zeros(len(beliefs), 0))

    def logits(self, state: SessionState, requests: Requests) -> Float[Tensor, "B N"]:
        """High for the K items, 0 for the others."""
        places = self._best(state.hidden, requests.candidates)
        utility = torch.zeros(requests.candidates.shape).scatter(1, places, CERTAIN)
        return torch.where(requests.candidates > 0, utility, -torch.inf)

    def _best(self, belief: Float[Tensor, "B S"], candidates: Int[Tensor, "B N"]) -> Int[Tensor, "B K"]:
        """Places of the items to show."""
        return self.filter.expected(self.filter.mdp.appeal, belief, candidates).topk(self.slate_size, dim=1).indices


class BayesSlatePolicy(BayesGreedyPolicy):
    """Shows the slate of the largest E_b[Σ r²] / E_b[Σ r], found by Dinkelbach's iteration as in `IRecGanMdp`."""

    def _best(self, belief: Float[Tensor, "B S"], candidates: Int[Tensor, "B N"]) -> Int[Tensor, "B K"]:
        appeal = self.filter.mdp.appeal.double()
        drawn = self.filter.expected(appeal, belief.double(), candidates)
        clicked = self.filter.expected(appeal.square(), belief.double(), candidates)
        ratio = drawn.new_zeros(len(drawn), 1)
        while True:
            places = (clicked - ratio * drawn).topk(self.slate_size, dim=1).indices
            larger = clicked.gather(1, places).sum(1, keepdim=True) / drawn.gather(1, places).sum(1, keepdim=True)
            if not bool((larger > ratio + 1e-12).any()):
                return places
            ratio = larger
