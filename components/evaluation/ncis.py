"""One-request NCIS: the off-policy estimate that the gate reads.

    w_i = min(π(slate_i | state_i) / β(slate_i | state_i), c)        V = Σ_i w_i r_i / Σ_i w_i

over all requests i of a log (pooled), with the ratio of that request only. Where responses depend on the positions
above alone, each position may be weighted by the ratio of the slate down to it (cascade):

    w_ik = min(Π_{j ≤ k} π(a_ij | above) / β(a_ij | above), c)        V = Σ_k  Σ_i w_ik r_ik / Σ_i w_ik

Estimand `one_request`: the mean over logged requests of E[reward | logged state, slate ~ target]. States stay those
that the behavior policy led to, so nothing is said about sessions that the target policy would lengthen or cut short;
the A/B judges that. Log_probs may be log densities of continuous actions.

Bias is of order 1/n; at target = behavior it is the logged mean; a constant reward gives that constant; as c -> ∞ it is
self-normalised importance sampling (Swaminathan & Joachims 2015). Intervals: `ratio_sums`.
"""

from typing import Unpack

import numpy as np

from components.evaluation.logged_requests import LoggedRequests
from components.evaluation.policy_value import About, Estimand, PolicyValue
from components.evaluation.ratio_sums import Column, RatioSums, sum_by_user, value_from_sums
from components.evaluation.weights import capped_log_weights, check_cap, default_cap
from components.interactions.contract import RatioAssumption

#: The cap of the literature.
USUAL_CAP = 10.0


def one_request_ncis(log: LoggedRequests, *, cap: float | None = None, **about: Unpack[About]) -> PolicyValue:
    """The one-request value of a policy on a log.

    Args:
        log: held-out requests with both policies' log_probs.
        cap: of the weights, at least √n; √n where none is given.
        about: names the policy and its ratio.

    Raises:
        InputError: the cap is below √n, or the ratio is `cascade` and the log has no positions.
    """
    cap = default_cap(len(log.rewards)) if cap is None else cap
    return one_request_value(one_request_sums(log, cap, about["ratio"]), **about)


def one_request_sums(
    log: LoggedRequests,
    cap: float,
    ratio: RatioAssumption = RatioAssumption.FULL_SLATE,
    *,
    normalized: bool = True,
) -> RatioSums:
    """Sums per user of one shard of a log; the cap is that of the whole log. Not normalized, they are those of IS.

    The mean weight is that of whole slates, the effective sample size that of all positions (`weights`).
    """
    columns, positions, capped = [], [], np.zeros(len(log.rewards), dtype=bool)
    for rewards, log_ratios in log.columns(ratio):
        log_weights = capped_log_weights(log_ratios, cap)
        capped |= log_weights < log_ratios
        positions.append((rewards, log_weights))
        scale = float(log_weights.max()) if normalized else 0.0
        weights = np.exp(log_weights - scale)
        columns.append(Column(weights * rewards, weights if normalized else np.ones(len(weights)), scale))
    return sum_by_user(
        log.user,
        columns,
        log_ratios=log_ratios,
        rewards=log.rewards,
        n_requests=len(log.rewards),
        n_capped=int(np.count_nonzero(capped)),
        cap=cap,
        positions=positions,
    )


def one_request_value(sums: RatioSums, **about: Unpack[About]) -> PolicyValue:
    """The one-request value from the merged sums of a log.

    Raises:
        InputError: the cap is below √n.
    """
    check_cap(sums.cap, sums.n_requests)
    return value_from_sums(sums, "one-request NCIS", Estimand.ONE_REQUEST, **about)


def fixed_cap_ncis(log: LoggedRequests, *, cap: float = USUAL_CAP, **about: Unpack[About]) -> PolicyValue:
    """One-request NCIS with a cap that does not grow with the log, so neither does its bias vanish. Reported only.

    Raises:
        InputError: the cap is not above 0, or the ratio is `cascade` and the log has no positions.
    """
    return fixed_cap_value(one_request_sums(log, cap, about["ratio"]), **about)


def fixed_cap_value(sums: RatioSums, **about: Unpack[About]) -> PolicyValue:
    """The same from the merged sums of a log."""
    return value_from_sums(sums, f"NCIS with cap {sums.cap:g}", Estimand.ONE_REQUEST, **about)
