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

import numpy as np

from components.evaluation.logged_requests import LoggedRequests, WholeSessions
from components.evaluation.policy_value import Estimand, PolicyValue
from components.evaluation.ratio_sums import RatioSums, value_from_sums
from components.evaluation.weights import capped_log_weights, check_cap, default_cap
from components.interactions.contract import RatioAssumption


def session_ncis(
    log: LoggedRequests,
    *,
    policy: str,
    ratio: RatioAssumption,
    propensities_estimated: bool = False,
    cap: float | None = None,
    confidence: float = 0.95,
) -> PolicyValue:
    """The mean summed reward of a session under a policy.

    Args:
        log: held-out requests of whole sessions with both policies' log_probs.
        policy: name of the target policy.
        ratio: which ratio the log_probs give.
        propensities_estimated: whether the behavior log_probs were fitted.
        cap: of the cumulative weights, at least √(number of sessions); that where none is given.
        confidence: of the interval.

    Raises:
        InputError: the cap is too low, or a session is not whole or has more than one user.
    """
    cap = default_cap(len(np.unique(log.session))) if cap is None else cap
    return session_value(
        session_sums(log, cap),
        policy=policy,
        ratio=ratio,
        propensities_estimated=propensities_estimated,
        confidence=confidence,
    )


def session_sums(log: LoggedRequests, cap: float) -> RatioSums:
    """Sums per user and step of one shard of whole sessions; the cap is that of the whole log.

    Raises:
        InputError: a session is not whole or has more than one user.
    """
    sessions = WholeSessions.of(log)
    requests, lengths = sessions.requests, sessions.lengths
    log_ratios = sessions.cumulative(requests.log_ratios)
    log_weights = capped_log_weights(log_ratios, cap)
    final_log_weights = log_weights[sessions.starts + lengths - 1]
    users, codes = np.unique(sessions.users, return_inverse=True)
    n_users, n_steps = len(users), int(lengths.max())

    numerators, denominators = np.zeros((2, n_users, n_steps))
    log_scales = np.zeros(n_steps)
    for t in range(n_steps):
        running = lengths > t
        rows = sessions.starts[running] + t
        step_log_weights = final_log_weights.copy()
        step_log_weights[running] = log_weights[rows]
        log_scales[t] = step_log_weights.max()
        weights = np.exp(step_log_weights - log_scales[t])
        numerators[:, t] = np.bincount(codes[running], weights[running] * requests.rewards[rows], n_users)
        denominators[:, t] = np.bincount(codes, weights, n_users)
    session_rewards = np.add.reduceat(requests.rewards, sessions.starts)
    return RatioSums(
        users=users,
        numerators=numerators,
        denominators=denominators,
        squared_weights=np.bincount(codes, np.square(weights)),
        log_scales=log_scales,
        rewards=np.bincount(codes, session_rewards),
        units=np.bincount(codes).astype(np.float64),
        n_requests=len(requests.rewards),
        n_capped=int(np.count_nonzero(log_weights < log_ratios)),
        max_log_weight=float(log_weights.max()),
        cap=cap,
    )


def session_value(
    sums: RatioSums,
    *,
    policy: str,
    ratio: RatioAssumption,
    propensities_estimated: bool = False,
    confidence: float = 0.95,
) -> PolicyValue:
    """The session value from the merged sums of a log.

    Raises:
        InputError: the cap is below √(number of sessions).
    """
    check_cap(sums.cap, int(sums.units.sum()))
    return value_from_sums(
        sums,
        policy=policy,
        estimator="session NCIS",
        estimand=Estimand.SESSION,
        ratio=ratio,
        propensities_estimated=propensities_estimated,
        confidence=confidence,
    )
