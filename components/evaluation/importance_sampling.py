"""Importance sampling without normalisation: unbiased but for the cap, and of large variance. Reported only.

    one request     V = 1/n Σ_i w_i r_i,               w_i = min(π / β, c) of request i
    session (IS)    V = 1/S Σ_s W_s Σ_t r_st,          W_s = min(Π_t π / β, c) over the requests of session s
    session (PDIS)  V = 1/S Σ_s Σ_t W_st r_st,         W_st = min(Π_{k ≤ t} π / β, c)

Per-decision importance sampling (Precup, Sutton and Singh 2000) leaves out the ratios of later requests, on which a
reward does not depend. None of them gives a constant reward its constant: the weights' own error is the estimate's.
"""

from typing import Unpack

import numpy as np
from jaxtyping import Float

from components.evaluation.logged_requests import LoggedRequests, WholeSessions
from components.evaluation.ncis import one_request_sums
from components.evaluation.policy_value import About, Estimand, PolicyValue
from components.evaluation.ratio_sums import Column, RatioSums, sum_by_user, value_from_sums
from components.evaluation.weights import capped_log_weights, default_cap


def importance_sampling(log: LoggedRequests, *, cap: float | None = None, **about: Unpack[About]) -> PolicyValue:
    """The one-request value, weights not normalised; capped at √n where no cap is given.

    Raises:
        InputError: the cap is not above 0, or the ratio is `cascade` and the log has no positions.
    """
    cap = default_cap(len(log.rewards)) if cap is None else cap
    return importance_value(one_request_sums(log, cap, about["ratio"], normalized=False), **about)


def importance_value(sums: RatioSums, **about: Unpack[About]) -> PolicyValue:
    """The one-request value from the merged sums of a log."""
    return value_from_sums(sums, "IS", Estimand.ONE_REQUEST, **about)


def session_importance_sampling(
    log: LoggedRequests, *, cap: float | None = None, **about: Unpack[About]
) -> PolicyValue:
    """The session's value with one weight for its summed reward; capped at √S where no cap is given.

    Raises:
        InputError: the cap is not above 0, or a session is not whole or has more than one user.
    """
    cap = default_cap(len(np.unique(log.session))) if cap is None else cap
    return session_importance_value(session_importance_sums(log, cap), **about)


def session_importance_sums(log: LoggedRequests, cap: float) -> RatioSums:
    """Sums per user of one shard of whole sessions; the cap is that of the whole log.

    Raises:
        InputError: the cap is not above 0, or a session is not whole or has more than one user.
    """
    sessions = WholeSessions.of(log)
    log_ratios = sessions.cumulative(sessions.requests.log_ratios)
    weighted = np.exp(capped_log_weights(log_ratios, cap))[sessions.ends] * sessions.rewards
    return _session_sums(sessions, log_ratios, weighted, cap)


def session_importance_value(sums: RatioSums, **about: Unpack[About]) -> PolicyValue:
    """The session's value from the merged sums of a log."""
    return value_from_sums(sums, "session IS", Estimand.SESSION, **about)


def per_decision_importance_sampling(
    log: LoggedRequests, *, cap: float | None = None, **about: Unpack[About]
) -> PolicyValue:
    """The session's value with each reward weighted by the ratios up to it; capped at √S where no cap is given.

    Raises:
        InputError: the cap is not above 0, or a session is not whole or has more than one user.
    """
    cap = default_cap(len(np.unique(log.session))) if cap is None else cap
    return per_decision_value(per_decision_sums(log, cap), **about)


def per_decision_sums(log: LoggedRequests, cap: float) -> RatioSums:
    """Sums per user of one shard of whole sessions; the cap is that of the whole log.

    Raises:
        InputError: the cap is not above 0, or a session is not whole or has more than one user.
    """
    sessions = WholeSessions.of(log)
    log_ratios = sessions.cumulative(sessions.requests.log_ratios)
    weighted = np.exp(capped_log_weights(log_ratios, cap)) * sessions.requests.rewards
    return _session_sums(sessions, log_ratios, np.add.reduceat(weighted, sessions.starts), cap)


def per_decision_value(sums: RatioSums, **about: Unpack[About]) -> PolicyValue:
    """The session's value from the merged sums of a log."""
    return value_from_sums(sums, "PDIS", Estimand.SESSION, **about)


def _session_sums(
    sessions: WholeSessions, log_ratios: Float[np.ndarray, " M"], weighted: Float[np.ndarray, " S"], cap: float
) -> RatioSums:
    log_weights = capped_log_weights(log_ratios, cap)
    return sum_by_user(
        sessions.users,
        [Column(weighted, np.ones(len(weighted)))],
        log_ratios=log_ratios[sessions.ends],
        rewards=sessions.rewards,
        n_requests=len(log_ratios),
        n_capped=int(np.count_nonzero(log_weights < log_ratios)),
        cap=cap,
    )
