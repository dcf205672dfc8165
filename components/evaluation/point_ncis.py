"""PointNCIS: each request normalised by the weight that its own state expects. Reported only.

    V = 1/n Σ_i w_i r_i / w̄(s_i),      w̄(s) = E[min(π / β, c) | s, a ~ β] = E[min(1, c β / π) | s, a ~ π]

A cap cuts a state's weights by a share that depends on the state; NCIS makes up for the mean share, PointNCIS for each
state's own (Gilotte et al. 2018, with the cap of the literature, 10). w̄ needs the probability of slates that were *not*
shown under both policies, so a fitted logging policy has to stand in where only logged log_probs are known. What the
cap took is replaced by the mean of what it left, which is a guess: the bias does not vanish as the log grows.
"""

from typing import Unpack

import numpy as np
from jaxtyping import Float

from components.errors import InputError
from components.evaluation.logged_requests import LoggedRequests
from components.evaluation.ncis import USUAL_CAP
from components.evaluation.policy_value import About, Estimand, PolicyValue
from components.evaluation.ratio_sums import Column, RatioSums, sum_by_user, value_from_sums
from components.evaluation.weights import capped_log_weights


def kept_shares(sampled_log_ratios: Float[np.ndarray, "M S"], cap: float) -> Float[np.ndarray, " M"]:
    """w̄ of M states: mean of min(1, c β / π) over S slates sampled from the target policy."""
    return np.exp(np.minimum(0.0, np.log(cap) - sampled_log_ratios)).mean(axis=1)


def point_ncis(
    log: LoggedRequests,
    sampled_log_ratios: Float[np.ndarray, "M S"],
    *,
    cap: float = USUAL_CAP,
    **about: Unpack[About],
) -> PolicyValue:
    """The one-request value of a policy on a log.

    Args:
        log: held-out requests with both policies' log_probs.
        sampled_log_ratios: log(π / β) of S slates sampled from the target policy at each request.
        cap: of the weights.
        about: names the policy and its ratio.

    Raises:
        InputError: the cap is not above 0, or the sampled ratios do not fit the log or are not finite.
    """
    return point_value(point_sums(log, sampled_log_ratios, cap), **about)


def point_sums(log: LoggedRequests, sampled_log_ratios: Float[np.ndarray, "M S"], cap: float = USUAL_CAP) -> RatioSums:
    """Sums per user of one shard of a log.

    Raises:
        InputError: the cap is not above 0, or the sampled ratios do not fit the log or are not finite.
    """
    log_ratios = log.log_ratios
    log_weights = capped_log_weights(log_ratios, cap)
    if len(sampled_log_ratios) != len(log_ratios) or not np.isfinite(sampled_log_ratios).all():
        raise InputError(
            f"sampled_log_ratios: shape {sampled_log_ratios.shape}, "
            f"{np.count_nonzero(~np.isfinite(sampled_log_ratios))} not finite; expected finite numbers in "
            f"{len(log_ratios)} rows, one for each request"
        )
    weights = np.exp(log_weights) / kept_shares(sampled_log_ratios, cap)
    return sum_by_user(
        log.user,
        [Column(weights * log.rewards, np.ones(len(weights)))],
        log_ratios=log_ratios,
        rewards=log.rewards,
        n_requests=len(weights),
        n_capped=int(np.count_nonzero(log_weights < log_ratios)),
        cap=cap,
    )


def point_value(sums: RatioSums, **about: Unpack[About]) -> PolicyValue:
    """The one-request value from the merged sums of a log."""
    return value_from_sums(sums, "PointNCIS", Estimand.ONE_REQUEST, **about)
