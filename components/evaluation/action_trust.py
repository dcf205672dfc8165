"""How far the world model of a log of actions can be trusted, on requests that it never saw.

Held-out likelihood of rewards against the best constant prediction; calibration of "more than the mean" and of leaving;
what is expected of the logged actions against what they earned. And of policies: what the world model promises of each,
against what the log says (`exploit_probes`). An agent that trains in a learned model finds what the model gets wrong,
and actions of many numbers leave it much room: nearly all of the box lies where no logged action does.

Shape letters: M requests, S numbers of an observation, A of an action.
"""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from components.errors import InputError
from components.evaluation.action_evidence import ActionEvidence, StudiedLog
from components.evaluation.exploit_probes import Probe, compare_values
from components.evaluation.policy_value import PolicyValue
from components.evaluation.trust_score import right_or_wrong
from components.evaluation.world_model_trust import (
    REQUEST_REWARD,
    TrustConfig,
    WorldModelTrust,
    calibration,
    calibration_part,
    gap_of_requests,
    gap_part,
)
from components.evaluation.world_model_value import ModelValue, mean_by_user
from components.interactions.log_folder import Log
from components.policies.continuous_policy import ContinuousPolicy
from components.policies.pulled_back import in_precision_of
from components.world_model.action_model import ActionModel, logged_steps

BASELINE = "the shares of rewards"


@torch.no_grad()
def judge_action_model(model: ActionModel, test: Log, config: TrustConfig) -> WorldModelTrust:
    """The trust report on a world model of actions.

    Args:
        model: the one that is judged.
        test: log that it never saw.
        config: where trust ends.

    Raises:
        InputError: the log has no known reward.
    """
    nats, places, above, leaving, rewards = [], [], [], [], []
    middle = _mean_reward(test)
    for part in logged_steps(test):
        known = part.select(part.reward_known)
        log_p = model.reward_logits(known.observations, known.actions).log_softmax(1).double()
        place = torch.searchsorted(model.edges, known.rewards)
        nats.append(-log_p.gather(1, place[:, None])[:, 0])
        places.append(place)
        rate = log_p.exp()[:, model.rewards > middle].sum(1).clamp(max=1.0)
        above.append((rate.float(), (model.rewards[place] > middle).float()))
        rewards.append((log_p.exp() @ model.rewards.double(), known.rewards.double(), known.users))
        ends = known.select(known.stayed | known.left)
        logits, _ = model.leave_logits_and_changes(ends.observations, ends.actions, ends.rewards)
        leaving.append((torch.sigmoid(logits), ends.left.float()))
    shares = torch.bincount(torch.cat(places)).double()
    shares = shares[shares > 0] / shares.sum()
    mean_nats, baseline = float(torch.cat(nats).mean()), float(-(shares * shares.log()).sum())
    calibrations = tuple(
        calibration(
            name, torch.cat([rate for rate, _ in pairs]).float(), torch.cat([seen for _, seen in pairs]).float()
        )
        for name, pairs in (("more than the mean reward", above), ("leaving", leaving))
        # What was never observed says nothing.
        if sum(len(rate) for rate, _ in pairs)
    )
    gap = gap_of_requests(REQUEST_REWARD, *(torch.cat(column).numpy() for column in zip(*rewards, strict=True)))
    no_gap = "Requests cannot be compared in what they earn: too few users, or nothing but zeros, were heard."
    return WorldModelTrust(
        click_nats=mean_nats,
        baseline_nats=baseline,
        baseline=BASELINE,
        calibrations=calibrations,
        sessions=() if gap is None else (gap,),
        two_sample=None,
        parts=(
            right_or_wrong(
                "likelihood gain",
                mean_nats < baseline,
                f"Held-out rewards cost {mean_nats:.3f} nats; by {BASELINE} alone they cost {baseline:.3f}.",
            ),
            *(calibration_part(part, config) for part in calibrations),
            right_or_wrong(REQUEST_REWARD, False, no_gap)
            if gap is None
            else gap_part(gap, "What is expected of logged requests differs", config),
        ),
    )


def _mean_reward(log: Log) -> float:
    known = [part.rewards[part.reward_known].double() for part in logged_steps(log)]
    together = torch.cat(known)
    if not len(together):
        raise InputError(f"{log.path}: holds no known reward, so the world model cannot be judged on it")
    return float(together.mean())


def probe_action_policy(
    model: ActionModel, studied: StudiedLog, policy: ContinuousPolicy, evidence: ActionEvidence, needed_ess: float
) -> Probe:
    """What the world model promises of a policy against what the log says of it.

    Args:
        model: of the world model.
        studied: the log, of which the value is known.
        policy: the one that is asked.
        evidence: what that log tells of it, a value.
        needed_ess: effective requests from which that value counts.
    """
    assert isinstance(evidence.value, PolicyValue)
    assert evidence.distance is not None
    return compare_values(evidence.value, promised(model, studied, policy), evidence.distance, needed_ess)


@torch.no_grad()
def promised(model: ActionModel, studied: StudiedLog, policy: ContinuousPolicy) -> ModelValue:
    """Mean expected reward of a request by the world model, an action of the policy drawn at each logged state."""
    generator = torch.Generator().manual_seed(studied.seed)
    values: list[Float[Tensor, " M"]] = []
    users = []
    for part in logged_steps(studied.log):
        known = part.select(part.reward_known)
        actions = policy.act(in_precision_of(policy, known.observations), generator).actions.float().clamp(-1, 1)
        values.append(model.expected_rewards(known.observations, actions).double())
        users.append(known.users)
    return mean_by_user(torch.cat(values).numpy(), np.concatenate([part.numpy() for part in users]))
