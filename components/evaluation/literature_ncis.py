"""Literature NCIS: normalised inside each trajectory, as published with ResAct (ICLR 2023). Reported, and no evidence.

    V = 1/S Σ_s  Σ_{t ∈ s} ρ̃_t r_t / Σ_{t ∈ s} ρ̃_t,    ρ̃ = min(π / β, c),    c = 10 by default

The weight of a session as a whole cancels. On sessions of one request V is the logged mean for every policy; on longer
ones it only says on which requests of the same session the policies agree. It estimates no policy's value, so it claims
no interval and the gate never reads it; it is here because papers print it.
"""

from typing import Unpack

import numpy as np

from components.evaluation.logged_requests import LoggedRequests, WholeSessions
from components.evaluation.ncis import USUAL_CAP
from components.evaluation.policy_value import About, Estimand, PolicyValue
from components.evaluation.ratio_sums import Column, RatioSums, sum_by_user, value_from_sums
from components.evaluation.weights import capped_log_weights


def literature_ncis(log: LoggedRequests, *, cap: float = USUAL_CAP, **about: Unpack[About]) -> PolicyValue:
    """The number that papers print, without bounds.

    Raises:
        InputError: the cap is not above 0, or a session is not whole or has more than one user.
    """
    return literature_value(literature_sums(log, cap), **about)


def literature_sums(log: LoggedRequests, cap: float = USUAL_CAP) -> RatioSums:
    """Sums per user of one shard of whole sessions: a session of L requests is split among them, 1 / L each.

    Raises:
        InputError: the cap is not above 0, or a session is not whole or has more than one user.
    """
    sessions = WholeSessions.of(log)
    requests, starts, lengths = sessions.requests, sessions.starts, sessions.lengths
    log_ratios = requests.log_ratios
    log_weights = capped_log_weights(log_ratios, cap)
    # Each session has its own scale: it cancels, and a session of tiny weights must not vanish.
    weights = np.exp(log_weights - np.repeat(np.maximum.reduceat(log_weights, starts), lengths))
    weights /= np.repeat(np.add.reduceat(weights, starts), lengths)
    shares = np.repeat(1 / lengths, lengths)
    return sum_by_user(
        requests.user,
        [Column(weights * requests.rewards, shares)],
        log_ratios=log_ratios,
        rewards=shares * requests.rewards,
        n_requests=len(log_ratios),
        n_capped=int(np.count_nonzero(log_weights < log_ratios)),
        cap=cap,
    )


def literature_value(sums: RatioSums, **about: Unpack[About]) -> PolicyValue:
    """The same from the merged sums of a log."""
    value = value_from_sums(sums, "literature NCIS", Estimand.SESSION_AVERAGE, **about)
    # Weights are counted over requests, means are taken over sessions.
    behavior_value = float(sums.rewards.sum() / sums.denominators.sum())
    bounds = ("lower", "upper", "difference_lower", "difference_upper", "mean_weight_lower", "mean_weight_upper")
    return value.model_copy(
        update={
            "behavior_value": behavior_value,
            "difference": value.value - behavior_value,
            "interval": "none",
            **dict.fromkeys(bounds),
        }
    )
