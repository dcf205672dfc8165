"""What a log of continuous actions tells of a policy that did not write it.

The estimate is one-request NCIS (`ncis`): log_probs of slates there are log-densities of actions here, and nothing else
changes. DR stands beside it, with a model of the reward fitted to the log (`action_rewards`), and the support distance
(`action_support`).

That the logged densities are densities is tested by a policy whose weights hardly vary: the Gaussian, truncated to the
box, of the logged actions' own mean and deviations. Its mean weight is 1 where they are what they should be.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from components.evaluation.action_rewards import N_SAMPLES, ActionRewards, fit_action_rewards
from components.evaluation.action_support import (
    ActionCloud,
    ActionSupport,
    PulledBack,
    action_cloud,
    action_support,
    in_precision_of,
    radius_for,
)
from components.evaluation.doubly_robust import doubly_robust_sums, doubly_robust_value
from components.evaluation.logged_requests import KnownRewards, LoggedRequests
from components.evaluation.ncis import one_request_sums, one_request_value
from components.evaluation.policy_value import About, Estimand, Estimate, NotIdentified, PolicyValue, identify
from components.evaluation.ratio_sums import RatioSums, merge_shards
from components.evaluation.weights import default_cap, ess_floor
from components.interactions.continuous_batches import LoggedActions, read_actions
from components.interactions.contract import RatioAssumption
from components.interactions.log_folder import Log
from components.policies.continuous_policy import ContinuousPolicy, UniformActions

#: Where log-densities stop: a weight of e^-10,000 is 0, and logarithms of 0 would not be finite.
_LEAST_LOG_PROB = -1e4
#: Name of the policy by which the logged densities are tested.
FITTED = "Gaussian of the logged actions"


class ActionEvidence(BaseModel):
    """What a log of actions tells of one policy."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    policy: str
    value: Estimate = Field(description="One-request NCIS, or why there is none.")
    cross_check: PolicyValue | None = Field(description="DR on the same log; None where nothing is identified.")
    support: ActionSupport


@dataclass(frozen=True)
class StudiedLog:
    """A log of actions with what is learned of it once, whatever policies are judged on it."""

    log: Log
    rewards: KnownRewards
    cloud: ActionCloud
    model: ActionRewards
    densities: PolicyValue | None
    """NCIS of `FITTED`, for its mean weight; None where nothing is identified."""
    seed: int

    def pulled_back(self, policy: ContinuousPolicy, floor: float | None = None) -> PulledBack:
        """The policy pulled back to where this log's actions lie.

        Args:
            policy: whose `mode` is pulled back.
            floor: effective sample size that is to be left; the gate's by default.
        """
        floor = ess_floor(self.rewards.n_known) if floor is None else floor
        return PulledBack(policy, self.cloud, radius_for(self.rewards.n_known, floor))


def study(log: Log, seed: int = 0) -> StudiedLog:
    """Learn of a log what every judgement on it needs.

    Args:
        log: of actions, validated.
        seed: of the reward model and of policies' draws.

    Raises:
        ContractError: the log has no actions.
        InputError: it has fewer than two.
    """
    rewards, cloud = _known_rewards(log), action_cloud(log)
    densities = None
    if identify(log.manifest.evidence, rewards) is None:
        fitted = PulledBack(UniformActions(log.manifest.action_size), cloud, radius=0.0)
        densities = one_request_value(_sums(log, rewards, fitted), **_about(FITTED))
    return StudiedLog(log, rewards, cloud, fit_action_rewards(log, seed), densities, seed)


def action_evidence(studied: StudiedLog, policy: ContinuousPolicy, name: str) -> ActionEvidence:
    """Estimate, cross-check and support distance of a policy.

    Args:
        studied: the log.
        policy: the one that is judged.
        name: of the policy.

    Raises:
        InputError: the policy's log-densities are no numbers.
    """
    rewards, cap = studied.rewards, default_cap(studied.rewards.n_known)
    identified = identify(studied.log.manifest.evidence, rewards)
    generator = torch.Generator().manual_seed(studied.seed)
    distances = []

    def sums() -> Iterator[dict[str, RatioSums]]:
        for part in read_actions(studied.log):
            drawn = _draws(part, policy, generator)
            distances.append(studied.cloud.distances(drawn[0]))
            known = part.select(part.reward_known)
            if identified is None and len(known.rewards):
                requests = _requests(known, policy)
                model = studied.model.of(known, drawn[:, part.reward_known])
                yield {"NCIS": one_request_sums(requests, cap), "DR": doubly_robust_sums(requests, model, cap)}

    shards = sums()
    if identified is not None:
        # Nothing is summed, but the draws are looked at.
        deque(shards, maxlen=0)
        support = action_support(name, torch.cat(distances), studied.cloud)
        value = NotIdentified(policy=name, estimand=Estimand.ONE_REQUEST, reason=identified)
        return ActionEvidence(policy=name, value=value, cross_check=None, support=support)
    merged = merge_shards(shards)
    unknown = {"unknown_share": 1.0 - rewards.n_known / rewards.n_requests}
    return ActionEvidence(
        policy=name,
        value=one_request_value(merged["NCIS"], **_about(name)).model_copy(update=unknown),
        cross_check=doubly_robust_value(merged["DR"], **_about(name)).model_copy(update=unknown),
        support=action_support(name, torch.cat(distances), studied.cloud),
    )


def _about(name: str) -> About:
    return {"policy": name, "ratio": RatioAssumption.FULL_SLATE}


def _known_parts(log: Log) -> Iterator[LoggedActions]:
    for part in read_actions(log):
        known = part.select(part.reward_known)
        if len(known.rewards):
            yield known


def _sums(log: Log, rewards: KnownRewards, policy: ContinuousPolicy) -> RatioSums:
    cap = default_cap(rewards.n_known)
    return merge_shards({"NCIS": one_request_sums(_requests(part, policy), cap)} for part in _known_parts(log))["NCIS"]


@torch.no_grad()
def _draws(part: LoggedActions, policy: ContinuousPolicy, generator: torch.Generator) -> Float[Tensor, "D M A"]:
    observations = in_precision_of(policy, part.observations)
    return torch.stack([policy.act(observations, generator).actions for _ in range(N_SAMPLES)])


@torch.no_grad()
def _requests(part: LoggedActions, policy: ContinuousPolicy) -> LoggedRequests:
    observations, actions = in_precision_of(policy, part.observations), in_precision_of(policy, part.actions)
    target = policy.log_prob(observations, actions).double().clamp(min=_LEAST_LOG_PROB)
    return LoggedRequests(
        rewards=part.rewards.numpy(),
        behavior_log_probs=part.log_probs.numpy(),
        target_log_probs=target.numpy(),
        user=part.users.numpy(),
        session=part.sessions.numpy(),
        step=part.steps.numpy(),
    )


def _known_rewards(log: Log) -> KnownRewards:
    n_requests = n_known = n_whole = 0
    lowest, highest, ends_known = np.inf, -np.inf, False
    for part in read_actions(log):
        known = part.rewards[part.reward_known]
        n_requests, n_known = n_requests + len(part.rewards), n_known + len(known)
        if len(known):
            lowest, highest = min(lowest, float(known.min())), max(highest, float(known.max()))
        ends_known = ends_known or bool(part.ended.any())
        broken = part.sessions[~part.reward_known]
        n_whole += len(np.setdiff1d(part.sessions.numpy(), broken.numpy()))
    return KnownRewards(n_requests, n_known, n_whole, lowest, highest, ends_known)
