"""One-request NCIS: the off-policy estimate that the gate reads.

    w_i = min(π(slate_i | state_i) / β(slate_i | state_i), c)        V = Σ_i w_i r_i / Σ_i w_i

over all requests i of a log (pooled), with the ratio of that request only. Estimand `one_request`: the mean over logged
requests of E[reward | logged state, slate ~ target]. States stay those that the behavior policy led to, so nothing is
said about sessions that the target policy would lengthen or cut short; the A/B judges that.

Bias is of order 1/n; at target = behavior it is the logged mean; a constant reward gives that constant; as c -> ∞ it is
self-normalised importance sampling (Swaminathan & Joachims 2015). Intervals: `ratio_sums`.
"""

import numpy as np

from components.evaluation.logged_requests import LoggedRequests
from components.evaluation.policy_value import Estimand, PolicyValue
from components.evaluation.ratio_sums import RatioSums, value_from_sums
from components.evaluation.weights import capped_log_weights, check_cap, default_cap
from components.interactions.contract import RatioAssumption


def one_request_ncis(
    log: LoggedRequests,
    *,
    policy: str,
    ratio: RatioAssumption,
    propensities_estimated: bool = False,
    cap: float | None = None,
    confidence: float = 0.95,
) -> PolicyValue:
    """The one-request value of a policy on a log.

    Args:
        log: held-out requests with both policies' log_probs.
        policy: name of the target policy.
        ratio: which ratio the log_probs give.
        propensities_estimated: whether the behavior log_probs were fitted.
        cap: of the weights, at least √n; √n where none is given.
        confidence: of the interval.

    Raises:
        InputError: the cap is below √n.
    """
    cap = default_cap(len(log.rewards)) if cap is None else cap
    return one_request_value(
        one_request_sums(log, cap),
        policy=policy,
        ratio=ratio,
        propensities_estimated=propensities_estimated,
        confidence=confidence,
    )


def one_request_sums(log: LoggedRequests, cap: float) -> RatioSums:
    """Sums per user of one shard of a log; the cap is that of the whole log."""
    log_ratios = log.log_ratios
    log_weights = capped_log_weights(log_ratios, cap)
    log_scale = float(log_weights.max())
    weights = np.exp(log_weights - log_scale)
    users, codes = np.unique(log.user, return_inverse=True)
    return RatioSums(
        users=users,
        numerators=np.bincount(codes, weights * log.rewards)[:, None],
        denominators=np.bincount(codes, weights)[:, None],
        squared_weights=np.bincount(codes, np.square(weights)),
        log_scales=np.array([log_scale]),
        rewards=np.bincount(codes, log.rewards),
        units=np.bincount(codes).astype(np.float64),
        n_requests=len(log.rewards),
        n_capped=int(np.count_nonzero(log_weights < log_ratios)),
        max_log_weight=log_scale,
        cap=cap,
    )


def one_request_value(
    sums: RatioSums,
    *,
    policy: str,
    ratio: RatioAssumption,
    propensities_estimated: bool = False,
    confidence: float = 0.95,
) -> PolicyValue:
    """The one-request value from the merged sums of a log.

    Raises:
        InputError: the cap is below √n.
    """
    check_cap(sums.cap, sums.n_requests)
    return value_from_sums(
        sums,
        policy=policy,
        estimator="one-request NCIS",
        estimand=Estimand.ONE_REQUEST,
        ratio=ratio,
        propensities_estimated=propensities_estimated,
        confidence=confidence,
    )
