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
from components.evaluation.weights import capped_log_weights, effective_sample_size


def literature_ncis(log: LoggedRequests, *, cap: float = USUAL_CAP, **about: Unpack[About]) -> PolicyValue:
    """The number that papers print, without bounds.

    Raises:
        InputError: the cap is not above 0, or a session is not whole or has more than one user.
    """
    sessions = WholeSessions.of(log)
    requests, starts, lengths = sessions.requests, sessions.starts, sessions.lengths
    log_ratios = requests.log_ratios
    log_weights = capped_log_weights(log_ratios, cap)
    # Each session has its own scale: it cancels, and a session of tiny weights must not vanish.
    weights = np.exp(log_weights - np.repeat(np.maximum.reduceat(log_weights, starts), lengths))
    per_session = np.add.reduceat(weights * requests.rewards, starts) / np.add.reduceat(weights, starts)
    value = float(per_session.mean())
    behavior_value = float((np.add.reduceat(requests.rewards, starts) / lengths).mean())
    return PolicyValue(
        policy=about["policy"],
        estimator="literature NCIS",
        estimand=Estimand.SESSION_AVERAGE,
        ratio=about["ratio"],
        value=value,
        lower=None,
        upper=None,
        confidence=0.95,
        effective_sample_size=effective_sample_size(log_weights),
        n_requests=len(log_weights),
        n_units=len(log_weights),
        n_users=len(np.unique(requests.user)),
        cap=cap,
        cap_share=float(np.mean(log_weights < log_ratios)),
        max_weight=float(np.exp(log_weights.max())),
        mean_weight=float(np.exp(log_weights).mean()),
        mean_weight_lower=None,
        mean_weight_upper=None,
        behavior_value=behavior_value,
        difference=value - behavior_value,
        difference_lower=None,
        difference_upper=None,
        propensities_estimated=about.get("propensities_estimated", False),
        interval="none",
    )
