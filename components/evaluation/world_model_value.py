"""What a policy is worth by the world model, with the same estimand as the log's estimate: `one_request`.

    V = 1/n Σ_i E_model[reward | logged state i, slate_i],    slate_i ~ target policy at logged state i

over the requests i of logged sessions whose reward is known. States and candidates are the log's, as in one-request
NCIS; only who answers differs. Given the slate the expectation is exact, so chance enters by the drawn slates, and by
the sessions where they are a sample of the log's.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import stats
from torch import Tensor
from torch.nn import functional

from components.evaluation.direct_method import draw_like_logged, expected_rewards
from components.interactions.batching import Sessions
from components.interactions.contract import Reward
from components.policies.slate_policy import SlatePolicy
from components.world_model.user_model import UserModel

BATCH_SESSIONS = 1_024


@dataclass(frozen=True)
class ModelValue:
    """Mean expected reward of a request."""

    value: float
    half_width: float | None
    """Half of its interval, clustered by user; None with fewer than two users."""


@torch.inference_mode()
def model_value(
    user_model: UserModel,
    reward: Reward,
    policy: SlatePolicy,
    sessions: Sessions,
    generator: torch.Generator,
    confidence: float = 0.95,
) -> ModelValue:
    """The value of a policy at logged states, by the user model alone.

    Args:
        user_model: of the world model.
        reward: what a response is worth.
        policy: draws one slate at each request.
        sessions: logged ones with at least one known reward.
        generator: of the slates.
        confidence: of the interval.
    """
    rewards, users = [], []
    for batch in sessions.batches(BATCH_SESSIONS):
        known = batch.mask & batch.reward_known
        rows, flat = torch.nonzero(known)[:, 0], known.flatten()
        state, requests, logged = (
            policy.states(batch).select(flat),
            batch.requests().select(flat),
            batch.slates.flatten(0, 1)[flat],
        )
        choice = draw_like_logged(policy, state, requests, logged, generator)
        users_state = user_model.encoder.states(batch).select(flat)
        rewards.append(expected_rewards(user_model, reward, users_state, choice.slates).sum(1))
        users.append(batch.users[rows])
    return mean_by_user(torch.cat(rewards).numpy(), torch.cat(users).numpy(), confidence)


def mean_by_user(values: Float[np.ndarray, " M"], users: Int[np.ndarray, " M"], confidence: float = 0.95) -> ModelValue:
    """Mean of requests' values, with an interval in which requests of one user may depend on each other.

    Args:
        values: at least one.
        users: code of each request's user.
        confidence: of the interval.
    """
    found, codes = np.unique(users, return_inverse=True)
    mean, n_users = float(values.mean()), len(found)
    if n_users < 2:
        return ModelValue(mean, None)
    influence = np.bincount(codes, values - mean) / len(values)
    deviation = np.sqrt(n_users / (n_users - 1) * np.square(influence).sum())
    return ModelValue(mean, float(stats.t.ppf((1 + confidence) / 2, n_users - 1) * deviation))


@dataclass(frozen=True)
class ItemRewards:
    """What a user model expects of each item alone on a slate, on average over the requests that offer it."""

    mean: Float[Tensor, " V"]
    n_requests: Float[Tensor, " V"]
    """Requests that the item was a candidate of; where 0, the mean is 0 and says nothing."""


@torch.inference_mode()
def item_rewards(user_model: UserModel, reward: Reward, sessions: Sessions) -> ItemRewards:
    """Mean expected reward of every item at logged requests."""
    total, n = torch.zeros(2, user_model.encoder.shape.n_indices, dtype=torch.float64)
    for batch in sessions.batches(BATCH_SESSIONS):
        flat = batch.mask.flatten()
        state, items = user_model.encoder.states(batch).select(flat), batch.requests().candidates[flat]
        rows, places = torch.nonzero(items > 0, as_tuple=True)
        offered = items[rows, places].long()
        alone = functional.pad(offered[:, None], (0, user_model.slate_size - 1))
        total.index_add_(0, offered, expected_rewards(user_model, reward, state.select(rows), alone)[:, 0])
        n.index_add_(0, offered, torch.ones(len(offered), dtype=torch.float64))
    return ItemRewards((total / n.clamp(min=1)).float(), n.float())
