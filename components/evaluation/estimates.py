"""Every estimate of a policy from a log that is judged part by part.

A part leaves its sums per user and nothing else (`ratio_sums`), and these add. So memory grows with a log's users and
not with its requests, and a log has the same estimates however it is cut into parts. What all parts must agree on, the
caps, is known beforehand: it depends on how many rewards are known, and on no policy.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from components.evaluation.cap_sensitivity import CapSensitivity, cap_sums, curve_from_sums
from components.evaluation.doubly_robust import doubly_robust_sums, doubly_robust_value
from components.evaluation.importance_sampling import (
    importance_value,
    per_decision_sums,
    per_decision_value,
    session_importance_sums,
    session_importance_value,
)
from components.evaluation.literature_ncis import literature_sums, literature_value
from components.evaluation.logged_policy import JudgedRequests
from components.evaluation.logged_requests import KnownRewards
from components.evaluation.ncis import USUAL_CAP, fixed_cap_value, one_request_sums, one_request_value
from components.evaluation.point_ncis import point_sums, point_value
from components.evaluation.policy_value import About, PolicyValue
from components.evaluation.ratio_sums import RatioSums, merge_shards
from components.evaluation.session_ncis import session_sums, session_value
from components.evaluation.weights import EffectiveSize, default_cap
from components.interactions.contract import RatioAssumption

#: Every estimator: what it makes of the merged sums of a log, in the order in which estimates are told.
ESTIMATORS: dict[str, Callable[..., PolicyValue]] = {
    "one-request NCIS": one_request_value,
    "DR": doubly_robust_value,
    "PointNCIS": point_value,
    "IS": importance_value,
    "fixed cap": fixed_cap_value,
    "session NCIS": session_value,
    "PDIS": per_decision_value,
    "session IS": session_importance_value,
    "literature NCIS": literature_value,
}
#: Those that have a cascade; all others weigh whole slates and say so, whichever ratio is asked for.
BY_POSITION = frozenset({"one-request NCIS", "DR", "IS", "fixed cap"})


@dataclass(frozen=True)
class PolicyEstimates:
    """What a log says of a policy."""

    values: tuple[PolicyValue, ...]
    """In the order of `ESTIMATORS`: first those that gate."""
    effective: EffectiveSize
    """Of one-request NCIS."""
    cap_sensitivity: CapSensitivity | None
    """Where it was asked for."""


def estimate(
    parts: Iterable[JudgedRequests], rewards: KnownRewards, about: About, *, with_caps: bool = False
) -> PolicyEstimates:
    """Every estimate that the parts of a log allow.

    DR and PointNCIS need a world model's view of the slates; estimates of sessions need one that is whole, and one that
    is known to have ended.

    Args:
        parts: of whole sessions; each is asked for when the one before it has been summed up.
        rewards: of the whole log; at least one is known.
        about: names the policy and its ratio.
        with_caps: along a grid of caps too, which takes as much memory as all estimators together.

    Raises:
        InputError: the parts hold other requests than `rewards` counts.
    """
    sums = merge_shards(_sums(part, rewards, about["ratio"], with_caps) for part in parts)
    caps = {cap: sums.pop(cap) for cap in list(sums) if isinstance(cap, float)}
    curve = curve_from_sums(caps, **about) if with_caps else None
    effective, of_slates = sums["one-request NCIS"].effective, about | {"ratio": RatioAssumption.FULL_SLATE}
    values = []
    for name, value_of in ESTIMATORS.items():
        if name in sums:
            value = value_of(sums.pop(name), **(about if name in BY_POSITION else of_slates))
            values.append(value.model_copy(update={"unknown_share": 1.0 - value.n_requests / rewards.n_requests}))
    return PolicyEstimates(tuple(values), effective, curve)


def _sums(
    judged: JudgedRequests, rewards: KnownRewards, ratio: RatioAssumption, with_caps: bool
) -> dict[str | float, RatioSums]:
    """What a part leaves, by estimator, and by cap where caps are asked for."""
    requests, slates, cap = judged.requests, judged.slates, default_cap(rewards.n_known)
    sums: dict[str | float, RatioSums] = {
        "one-request NCIS": one_request_sums(requests, cap, ratio),
        "IS": one_request_sums(requests, cap, ratio, normalized=False),
        "fixed cap": one_request_sums(requests, USUAL_CAP, ratio),
    }
    if slates is not None:
        sums["DR"] = doubly_robust_sums(requests, slates.model, cap, ratio)
        if slates.log_ratios is not None:
            sums["PointNCIS"] = point_sums(requests, slates.log_ratios)
    if rewards.ends_known and judged.in_whole_session.any():
        whole, cap = judged.whole_sessions, default_cap(rewards.n_whole_sessions)
        sums["session NCIS"] = session_sums(whole, cap)
        sums["PDIS"] = per_decision_sums(whole, cap)
        sums["session IS"] = session_importance_sums(whole, cap)
        sums["literature NCIS"] = literature_sums(whole)
    if with_caps:
        sums.update(cap_sums(requests, rewards.n_known, ratio).items())
    return sums
