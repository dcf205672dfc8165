"""The A/B of a release in live traffic, from the log of what its arms showed and heard.

A session counts where all of its requests belong to the release and to one arm; one that the beginning of the release
cut in two is left out. A session that still goes on counts with what it has earned so far: users come to both arms at
the same times, so that makes no difference between them.

Anyone can act on such an A/B on any day, and the guard does, so what counts are bounds that hold at every look.
"""

from dataclasses import dataclass
from typing import Final

import polars as pl

from components.experiment.ab import FEWEST_USERS, AbResult, analyze_ab
from components.experiment.gate import GateConfig
from components.experiment.guardrails import Metric
from components.experiment.logged_sessions import REWARD, logged_sessions
from components.interactions.log_folder import Log

CHALLENGER: Final = "challenger"
CHAMPION: Final = "champion"


@dataclass(frozen=True)
class LiveSessions:
    """What an A/B rests on."""

    by_arm: dict[str, int]
    """Sessions of each arm, the baseline's among them."""
    n_cut: int
    """Sessions that belong to the release in part only."""
    n_unknown: int
    """Sessions of which no feedback is known."""


def live_ab(
    log: Log, *, experiment: str, treatment: str, control: str, planned_share: float, planned_sessions: int
) -> tuple[AbResult | None, LiveSessions]:
    """Compare challenger and champion of one release; no result where an arm has fewer than two users.

    Args:
        log: what was shown since a while before the release.
        experiment: name of the release in the log.
        treatment: name of the challenger.
        control: name of the champion.
        planned_share: share of the users of both arms that was meant to get the challenger.
        planned_sessions: sessions of both arms that were planned before the release.

    Raises:
        InputError: the log has no times, so there are no looks.
    """
    place = log.scan().group_by("session_id").agg(pl.col("arm", "experiment").unique()).collect()
    place = place.filter(pl.col("experiment").list.contains(experiment))
    whole = place.filter(pl.col("experiment").list.len() == 1, pl.col("arm").list.len() == 1)
    sessions = logged_sessions(log).join(
        whole.select("session_id", pl.col("arm").list.first()), on="session_id", maintain_order="left"
    )
    known = sessions.drop_nulls(REWARD)
    by_arm = {str(arm): int(count) for arm, count in known.group_by("arm").len().sort("arm").iter_rows()}
    counted = LiveSessions(by_arm, place.height - whole.height, whole.height - known.height)
    both = known.filter(pl.col("arm").is_in([CHALLENGER, CHAMPION]))
    users = dict(both.group_by("arm").agg(pl.col("user_id").n_unique()).iter_rows())
    if min(users.get(arm, 0) for arm in (CHALLENGER, CHAMPION)) < FEWEST_USERS:
        return None, counted
    result = analyze_ab(
        both["user_id"].rank("dense").to_numpy(),
        both[REWARD].to_numpy(),
        (both["arm"] == CHALLENGER).to_numpy(),
        label="live",
        treatment=treatment,
        control=control,
        planned_share=planned_share,
        metrics={metric: both[metric.value].to_numpy() for metric in Metric},
        day=(both["timestamp"] - both["timestamp"].min()).dt.total_days().to_numpy(),
        planned_sessions=planned_sessions,
        looked_early=True,
    )
    return result, counted


def proven_harm(ab: AbResult, config: GateConfig) -> tuple[str, ...]:
    """What an A/B has shown to be worse with the treatment, in sentences: the reward, or a guardrail beyond its margin.

    Each is asked at an equal part of the gate's level, so a challenger that harms nothing is found harmful at any look,
    ever, with at most that probability (union bound; margins only lower it).
    """
    level = config.ab_level / (1 + len(ab.guardrails))
    found = []
    bounds = ab.bounds(level)
    if bounds is not None and bounds.upper < 0:
        found.append(
            f"a session earns {ab.difference:+.4g} with the challenger (upper bound {bounds.upper:+.4g} at level "
            f"{level:.2g})"
        )
    for guardrail in ab.guardrails:
        margin = config.guardrails.of(guardrail.metric)
        judged = ab.judge(guardrail, margin, level)
        if judged is not None and judged.verdict == "inferior":
            found.append(
                f"{guardrail.metric.text}: {guardrail.treatment.mean:.4g} against {guardrail.control.mean:.4g}, beyond "
                f"the margin of {margin:.0%}"
            )
    return tuple(found)
