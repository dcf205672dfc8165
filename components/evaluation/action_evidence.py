"""What a log of continuous actions tells of a policy that did not write it.

The estimate is one-request NCIS (`ncis`): log_probs of slates there are log-densities of actions here, and nothing else
changes. DR stands beside it, with a model of the reward fitted to the log (`action_rewards`), and the support distance
(`action_support`).

That the logged densities are densities is tested by a policy whose weights hardly vary: a Gaussian, truncated to the
box, whose middle is regressed on the observation and which is a little narrower than the logged actions lie around it.
Its mean weight is 1 where they are what they should be, whoever logged them; a wider one would have rare giants among
its weights. For each user it is fitted to the other half of the users: one that has seen the actions would fit them too
well.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float64
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from components.evaluation.action_rewards import N_SAMPLES, ActionRewards, fit_action_rewards
from components.evaluation.action_support import ActionSupport, action_cloud, action_support
from components.evaluation.doubly_robust import doubly_robust_sums, doubly_robust_value
from components.evaluation.logged_requests import KnownRewards, LoggedRequests
from components.evaluation.ncis import one_request_sums, one_request_value
from components.evaluation.policy_value import About, Estimand, Estimate, NotIdentified, PolicyValue, identify
from components.evaluation.propensity_check import Expectation, PropensityCheck, judge_expectations
from components.evaluation.ratio_sums import RatioSums, merge_shards
from components.evaluation.support import SupportDistance
from components.evaluation.weights import LARGEST_LOG_WEIGHT, default_cap
from components.interactions.continuous_batches import LoggedActions, observation_scale, read_actions
from components.interactions.contract import RatioAssumption
from components.interactions.log_folder import Log
from components.policies import truncated_gaussian
from components.policies.continuous_policy import ContinuousPolicy, UniformActions
from components.policies.pulled_back import ActionCloud, PulledBack, in_precision_of, radius_for

#: Where log-densities stop: a weight of e^-10,000 is 0, and logarithms of 0 would not be finite.
_LEAST_LOG_PROB = -1e4
#: Name of the policy by which the logged densities are tested.
FITTED = "Gaussian fitted to the logged actions"
#: Of the regression of actions on observations, per request; and what the deviation around it is multiplied by.
RIDGE, NARROWER = 1e-3, 0.95
#: Variance below which a number counts as never varied.
_LEAST_VARIANCE = 1e-12


class ActionEvidence(BaseModel):
    """What a log of actions tells of one policy."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    policy: str
    value: Estimate = Field(description="One-request NCIS, or why there is none.")
    cross_check: PolicyValue | None = Field(description="DR on the same log; None where nothing is identified.")
    support: ActionSupport

    @property
    def distance(self) -> SupportDistance | None:
        """How far the policy lies from the log; None where it gives no value."""
        if not isinstance(self.value, PolicyValue):
            return None
        return SupportDistance(
            policy=self.policy,
            divergence=math.log(self.value.n_units / max(self.value.effective_sample_size, 1.0)),
            outside_share=self.support.outside_share,
            of="actions",
        )


@dataclass(frozen=True)
class StudiedLog:
    """A log of actions with what is learned of it once, whatever policies are judged on it."""

    log: Log
    rewards: KnownRewards
    cloud: ActionCloud
    model: ActionRewards
    densities: PropensityCheck | None
    """Whether the logged densities fit the actions; None where too few users leave nothing to test with."""
    seed: int

    def pulled_back(self, policy: ContinuousPolicy, floor: float) -> PulledBack:
        """The policy pulled back to where this log's actions lie.

        Args:
            policy: whose `mode` is pulled back.
            floor: effective sample size that is to be left.
        """
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
    return StudiedLog(
        log, known_rewards(log), action_cloud(log), fit_action_rewards(log, seed), _check_densities(log), seed
    )


def gaussian_of(cloud: ActionCloud) -> PulledBack:
    """The Gaussian of logged actions, whatever is observed."""
    return PulledBack(UniformActions(len(cloud.mean)), cloud, radius=0.0)


@torch.no_grad()
def _check_densities(log: Log) -> PropensityCheck | None:
    """The mean weight of `FITTED`; None where the users of either half logged fewer than two actions."""
    fitted = [_fit_gaussian(log, half=1 - half) for half in (0, 1)]
    weights, users = [], []
    for part in read_actions(log):
        log_densities = []
        for gaussian in fitted:
            if gaussian is None:
                return None
            middle, deviation = gaussian
            log_densities.append(truncated_gaussian.log_density(part.actions, middle(part.observations), deviation))
        own = torch.stack(log_densities).gather(0, (part.users % 2)[None])[0]
        weights.append((own - part.log_probs).clamp(max=LARGEST_LOG_WEIGHT).exp())
        users.append(part.users)
    expectation = Expectation("mean weight", FITTED, 0.0, "all", 1.0, torch.cat(weights).numpy())
    return judge_expectations([expectation], torch.cat(users).numpy(), estimated=False)


def _fit_gaussian(
    log: Log, half: int
) -> tuple[Callable[[Float[Tensor, "M S"]], Float64[Tensor, "M A"]], Float64[Tensor, " A"]] | None:
    """Middle and deviations of a Gaussian fitted to the actions of one half of the users, by ridge regression.

    None where these have fewer than two actions.
    """
    scale = observation_scale(log).double()

    def inputs(observations: Float[Tensor, "M S"]) -> Float64[Tensor, "M I"]:
        return torch.cat([observations.double() / scale, torch.ones(len(observations), 1, dtype=torch.float64)], dim=1)

    def halves() -> Iterator[tuple[Float64[Tensor, "M I"], Float64[Tensor, "M A"]]]:
        for part in read_actions(log):
            own = part.select(part.users % 2 == half)
            yield inputs(own.observations), own.actions.double()

    size = len(scale) + 1
    squares, products = torch.zeros(size, size).double(), torch.zeros(size, log.manifest.action_size).double()
    n = 0
    for seen, actions in halves():
        squares, products, n = squares + seen.T @ seen, products + seen.T @ actions, n + len(actions)
    if n < 2:
        return None
    # The mean, the last input's weight, is not shrunk.
    penalty = torch.full((size,), RIDGE * n, dtype=torch.float64)
    penalty[-1] = 0.0
    coefficients = torch.linalg.lstsq(squares + penalty.diag(), products, driver="gelsd").solution
    missed = sum((actions - (seen @ coefficients).clamp(-1, 1)).square().sum(0) for seen, actions in halves())
    assert isinstance(missed, Tensor)
    deviation = NARROWER * (missed / n).clamp(min=_LEAST_VARIANCE).sqrt()
    return lambda observations: (inputs(observations) @ coefficients).clamp(-1, 1), deviation


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


@dataclass(frozen=True)
class RadiusChoice:
    """How far from the logged actions a release may go."""

    radius: float
    ess_share: float
    """Share of the log's known requests that stay effective there."""
    kept: float
    """Share of the way from the logged actions' mean to the policy's action that is left, a mean over requests."""
    n_known: int
    """Requests of the log whose reward is known."""


def choose_radius(policy: ContinuousPolicy, cloud: ActionCloud, log: Log, required: float) -> RadiusChoice:
    """The largest of eleven radii at which enough of a log's requests speak of the pulled-back policy.

    Where not even 0 leaves enough, since the logged actions are not spread as one Gaussian's, it is 0, and the gate
    will hold what is released for its sample size. The first is where ESS / n of two Gaussians would be what is
    required; the others are tenths of it.

    Args:
        policy: the one that is pulled back.
        cloud: the actions that it is pulled back to.
        log: others than those, with rewards.
        required: share of its requests that are to stay effective, in (0, 1].
    """
    first, n_known = math.sqrt(math.log(1.0 / required)), known_rewards(log).n_known
    for tenths in range(10, 0, -1) if first > 0 else ():
        radius = first * tenths / 10
        share = effective_share(log, n_known, PulledBack(policy, cloud, radius))
        if share >= required:
            return RadiusChoice(radius, share, _kept(policy, cloud, log, radius), n_known)
    return RadiusChoice(0.0, effective_share(log, n_known, PulledBack(policy, cloud, 0.0)), 0.0, n_known)


@torch.no_grad()
def _kept(policy: ContinuousPolicy, cloud: ActionCloud, log: Log, radius: float) -> float:
    wanted = (policy.mode(in_precision_of(policy, part.observations)) for part in read_actions(log))
    distances = torch.cat([cloud.distances(modes) for modes in wanted])
    return float((radius / distances.clamp(min=radius)).mean())


def effective_share(log: Log, n_known: int, policy: ContinuousPolicy) -> float:
    """Share of a log's n known requests that speak of a policy, ESS / n of its one-request estimate; 0 without any."""
    if not n_known:
        return 0.0
    cap, known = default_cap(n_known), (part.select(part.reward_known) for part in read_actions(log))
    sums = merge_shards({"NCIS": one_request_sums(_requests(part, policy), cap)} for part in known if len(part.rewards))
    return sums["NCIS"].effective.value / n_known


def _about(name: str) -> About:
    return {"policy": name, "ratio": RatioAssumption.FULL_SLATE}


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


def known_rewards(log: Log) -> KnownRewards:
    """What is known of the rewards of a log of actions."""
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
