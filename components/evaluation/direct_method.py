"""The direct method: what a world model expects of slates at logged states.

    q(s, a) = Σ_k q_k(s, a),    q_k = weight_click · P(click k | s, a) + weight_purchase · P(purchase k | s, a)
    v(s)    = 1/S Σ_j q(s, a_j),    a_j ~ π(· | s)

Both read the logged sessions: the user model with its encoder, the policy with its own.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from components.environments.rollout import position_rewards
from components.evaluation.doubly_robust import ModelRewards
from components.interactions.batching import Requests, Sessions
from components.interactions.contract import Reward
from components.policies.slate_policy import SessionState, SlateChoice, SlatePolicy
from components.world_model.user_model import UserModel

BATCH_SESSIONS = 1_024
#: Slates of the target policy that v averages over.
N_SAMPLES = 4


@dataclass(frozen=True)
class SampledSlates:
    """What a world model and two policies say of M logged requests, and of slates that the target would have shown."""

    model: ModelRewards
    log_ratios: Float[np.ndarray, "M S"] | None
    """log(π / β) of the sampled slates; None where no logging policy was given."""

    def take(self, rows: Int[np.ndarray, " R"] | Bool[np.ndarray, " M"]) -> "SampledSlates":
        """Those of some requests."""
        return SampledSlates(self.model.take(rows), None if self.log_ratios is None else self.log_ratios[rows])


def expected_rewards(
    user_model: UserModel, reward: Reward, state: SessionState, slates: Int[Tensor, "M K"]
) -> Float[Tensor, "M K"]:
    """q_k(s, a) of each position of M slates that nobody has answered yet; exact.

    Args:
        user_model: of slates.
        reward: of a request.
        state: the user model's own, of each request.
        slates: what is shown; 0 is padding.
    """
    clicks, purchases = user_model.expected_responses(state, slates)
    return position_rewards(reward, clicks, purchases).double()


def draw_like_logged(
    policy: SlatePolicy,
    state: SessionState,
    requests: Requests,
    logged: Int[Tensor, "M K"],
    generator: torch.Generator,
) -> SlateChoice:
    """Slates of a policy, each as long as the one that was shown: a log's values are of slates of its own lengths.

    The first positions of a Plackett-Luce slate are a Plackett-Luce slate of that length.
    """
    choice, shown = policy.act(state, requests, generator), logged > 0
    return SlateChoice(
        torch.where(shown, choice.slates, 0),
        torch.where(shown, choice.places, -1),
        torch.where(shown, choice.log_probs, 0.0),
    )


@torch.inference_mode()
def sample_slates(
    sessions: Sessions,
    target: SlatePolicy,
    user_model: UserModel,
    reward: Reward,
    generator: torch.Generator,
    behavior: SlatePolicy | None = None,
) -> SampledSlates:
    """Sample the target policy's slates at every logged request and ask the world model what it expects of them.

    Args:
        sessions: the log; requests keep the order of `logged_requests`.
        target: the policy that is judged.
        user_model: of slates; it must not have learned from this log.
        reward: of a request.
        generator: where the slates come from.
        behavior: the logging policy or its estimate.
    """
    logged, sampled, ratios = [], [], []
    for batch in sessions.batches(BATCH_SESSIONS):
        flat = batch.mask.flatten()
        requests, slates = batch.requests().select(flat), batch.slates.flatten(0, 1)[flat]
        users = user_model.encoder.states(batch).select(flat)
        state = target.states(batch).select(flat)
        behavior_state = None if behavior is None else behavior.states(batch).select(flat)
        logged.append(expected_rewards(user_model, reward, users, slates))
        values, log_ratios = [], []
        for _ in range(N_SAMPLES):
            choice = draw_like_logged(target, state, requests, slates, generator)
            values.append(expected_rewards(user_model, reward, users, choice.slates).sum(1))
            if behavior is not None and behavior_state is not None:
                its = behavior.log_prob(behavior_state, requests, choice.slates)
                log_ratios.append((choice.log_probs.double() - its.double()).sum(1))
        sampled.append(torch.stack(values, dim=1).mean(1))
        if behavior is not None:
            ratios.append(torch.stack(log_ratios, dim=1))
    positions = torch.cat(logged).numpy()
    model = ModelRewards(positions.sum(axis=1), torch.cat(sampled).numpy(), positions)
    return SampledSlates(model, torch.cat(ratios).numpy() if ratios else None)
