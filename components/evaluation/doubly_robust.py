"""DR: what the world model says of the policy, mended by what the log says of the world model.

    V = 1/n Σ_i v(s_i)  +  1/n Σ_i w_i (r_i − q(s_i, a_i)),        w_i = min(π / β, c),    v(s) = E[q(s, a) | a ~ π]

q is the world model's expected reward of a slate at a logged state (the direct method). The first term alone is what
a model promises; the second corrects it with what was logged. V is right where the propensities are or where q is, and
varies less than IS by as much as q explains of r (Dudík, Langford and Li 2011). Estimand `one_request`. The gate reads
it beside NCIS, as a cross-check.

Where responses depend on the positions above alone, and q = Σ_k q_k does too, each position is mended by the ratio of
the slate down to it: the second term becomes 1/n Σ_i Σ_k w_ik (r_ik − q_k(s_i, a_i)), with NCIS's w_ik. Its mean is the
same, E[w_ik q_k] = E[q_k(s, a) | a ~ π], whatever q_k is (Kiyohara et al. 2022, cascade DR, for one request).

q may be any function that was not fitted to the log that is judged, and v any unbiased estimate of its mean under π,
such as a mean over sampled slates: its error is part of each user's influence, so the interval knows of it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Unpack

import numpy as np
from jaxtyping import Bool, Float, Int

from components.errors import InputError
from components.evaluation.logged_requests import LoggedRequests
from components.evaluation.policy_value import About, Estimand, PolicyValue
from components.evaluation.ratio_sums import Column, RatioSums, sum_by_user, value_from_sums
from components.evaluation.weights import capped_log_weights, check_cap, default_cap
from components.interactions.contract import RatioAssumption


@dataclass(frozen=True)
class ModelRewards:
    """What a model expects at the states of M logged requests."""

    logged: Float[np.ndarray, " M"]
    """q(s, a): of the slate that was shown."""
    target: Float[np.ndarray, " M"]
    """v(s): of a slate that the target policy would show."""
    positions: Float[np.ndarray, "M K"] | None = None
    """q_k(s, a): `logged` by position, 0 where nothing was shown; the cascade needs it."""

    def take(self, rows: Int[np.ndarray, " R"] | Bool[np.ndarray, " M"]) -> "ModelRewards":
        """Those of some requests."""
        positions = None if self.positions is None else self.positions[rows]
        return ModelRewards(self.logged[rows], self.target[rows], positions)

    def columns(self, ratio: RatioAssumption) -> Iterator[Float[np.ndarray, " M"]]:
        """Q of what each column of `LoggedRequests.columns` holds the rewards of.

        Raises:
            InputError: the ratio is `cascade` and the positions are not known.
        """
        if ratio is RatioAssumption.FULL_SLATE:
            yield self.logged
            return
        if self.positions is None:
            raise InputError("ratio: 'cascade' needs what the model expects of each position; it is known of slates")
        yield from self.positions.T


def doubly_robust(
    log: LoggedRequests, model: ModelRewards, *, cap: float | None = None, **about: Unpack[About]
) -> PolicyValue:
    """The one-request value of a policy on a log, with a world model as direct method.

    Args:
        log: held-out requests with both policies' log_probs.
        model: what the world model expects at each of them.
        cap: of the weights, at least √n; √n where none is given.
        about: names the policy and its ratio.

    Raises:
        InputError: the cap is below √n, the model's rewards do not fit the log or are not finite, or the ratio is
            `cascade` and log or model have no positions.
    """
    cap = default_cap(len(log.rewards)) if cap is None else cap
    return doubly_robust_value(doubly_robust_sums(log, model, cap, about["ratio"]), **about)


def doubly_robust_sums(
    log: LoggedRequests, model: ModelRewards, cap: float, ratio: RatioAssumption = RatioAssumption.FULL_SLATE
) -> RatioSums:
    """Sums per user of one shard of a log; the cap is that of the whole log.

    Raises:
        InputError: the model's rewards do not fit the log or are not finite, or the ratio is `cascade` and log or model
            have no positions.
    """
    for name, values in (("logged", model.logged), ("target", model.target)):
        if values.shape != log.rewards.shape or not np.isfinite(values).all():
            raise InputError(
                f"model rewards ({name}): shape {values.shape}, {np.count_nonzero(~np.isfinite(values))} not finite; "
                f"expected {len(log.rewards)} finite numbers, one for each request"
            )
    ones = np.ones(len(log.rewards))
    columns, positions, capped = [Column(model.target, ones)], [], np.zeros(len(ones), dtype=bool)
    for (rewards, log_ratios), expected in zip(log.columns(ratio), model.columns(ratio), strict=True):
        log_weights = capped_log_weights(log_ratios, cap)
        capped |= log_weights < log_ratios
        columns.append(Column(np.exp(log_weights) * (rewards - expected), ones))
        positions.append((rewards, log_weights))
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


def doubly_robust_value(sums: RatioSums, **about: Unpack[About]) -> PolicyValue:
    """The one-request value from the merged sums of a log.

    Raises:
        InputError: the cap is below √n.
    """
    check_cap(sums.cap, sums.n_requests)
    return value_from_sums(sums, "DR", Estimand.ONE_REQUEST, **about)
