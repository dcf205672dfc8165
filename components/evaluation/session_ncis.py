"""Session NCIS: the summed reward of a session, weighted step by step; reported, never read by the gate.

Session s has requests t = 0 .. L_s − 1 with ratios ρ_st. Its weight at step t is the product so far, and past its end
stays what it was there, since an ended session has nothing left on which the policies could differ:

    W_st = min(Π_{k ≤ min(t, L_s − 1)} ρ_sk, c)        V = Σ_t  Σ_s W_st r_st / Σ_s W_st,    r_st = 0 for t ≥ L_s

so each step is normalised over *all* sessions (consistent weighted per-decision importance sampling, with the ended
session as an absorbing state). Normalising over the sessions still running instead would estimate the reward of a step
given that it is reached, and drop what the policy does to the session's length.

Weights multiply along the session, so the effective sample size falls quickly with its length, and intervals held the
truth in 73-92 % of small simulations where 95 % was asked for. Effective sample size and mean weight are those of the
final weights.
"""

from typing import Unpack

import numpy as np

from components.evaluation.logged_requests import LoggedRequests, WholeSessions
from components.evaluation.policy_value import About, Estimand, PolicyValue
from components.evaluation.ratio_sums import Column, RatioSums, sum_by_user, value_from_sums
from components.evaluation.weights import capped_log_weights, check_cap, default_cap


def session_ncis(log: LoggedRequests, *, cap: float | None = None, **about: Unpack[About]) -> PolicyValue:
    """The mean summed reward of a session under a policy.

    Args:
        log: held-out requests of whole sessions with both policies' log_probs.
        cap: of the cumulative weights, at least √(number of sessions); that where none is given.
        about: names the policy; the ratio is the whole slate's.

    Raises:
        InputError: the cap is too low, or a session is not whole or has more than one user.
    """
    cap = default_cap(len(np.unique(log.session))) if cap is None else cap
    return session_value(session_sums(log, cap), **about)


def session_sums(log: LoggedRequests, cap: float) -> RatioSums:
    """Sums per user and step of one shard of whole sessions; the cap is that of the whole log.

    Raises:
        InputError: a session is not whole or has more than one user.
    """
    sessions = WholeSessions.of(log)
    log_ratios = sessions.cumulative(sessions.requests.log_ratios)
    log_weights = capped_log_weights(log_ratios, cap)
    columns = []
    for t in range(int(sessions.lengths.max())):
        running = sessions.lengths > t
        rows = sessions.starts[running] + t
        step_log_weights = log_weights[sessions.ends]
        step_log_weights[running] = log_weights[rows]
        scale = float(step_log_weights.max())
        weights = np.exp(step_log_weights - scale)
        weighted = np.zeros(len(weights))
        weighted[running] = weights[running] * sessions.requests.rewards[rows]
        columns.append(Column(weighted, weights, scale))
    return sum_by_user(
        sessions.users,
        columns,
        log_ratios=log_ratios[sessions.ends],
        rewards=sessions.rewards,
        n_requests=len(log_ratios),
        n_capped=int(np.count_nonzero(log_weights < log_ratios)),
        cap=cap,
    )


def session_value(sums: RatioSums, **about: Unpack[About]) -> PolicyValue:
    """The session value from the merged sums of a log.

    Raises:
        InputError: the cap is below √(number of sessions).
    """
    check_cap(sums.cap, int(sums.units.sum()))
    return value_from_sums(sums, "session NCIS", Estimand.SESSION, **about)
