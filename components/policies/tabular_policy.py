"""One utility for each pair of state and item, where the context is the state's one-hot code."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from components.interactions.batching import Requests
from components.policies.slate_policy import MemorylessPolicy, SessionState


class TabularSlatePolicy(MemorylessPolicy):
    """u_i = bound · tanh(table[state, i] / bound), uniform before training: for MDPs with few states."""

    def __init__(self, n_states: int, n_indices: int, slate_size: int, bound: float) -> None:
        super().__init__()
        self.slate_size = slate_size
        self.bound = bound
        self.learned = nn.Linear(n_states, n_indices, bias=False)
        nn.init.zeros_(self.learned.weight)

    def logits(self, state: SessionState, requests: Requests) -> Float[Tensor, "B N"]:
        """Bounded utilities of the candidates in the state that the context names."""
        utility = self.learned(requests.context).gather(1, requests.candidates.long())
        return torch.where(requests.candidates > 0, self.bound * torch.tanh(utility / self.bound), -torch.inf)

    def behavior_logits(self, state: SessionState, requests: Requests) -> Float[Tensor, "B N"]:
        """Of the uniform policy, from which this one starts."""
        return torch.where(requests.candidates > 0, 0.0, -torch.inf)
