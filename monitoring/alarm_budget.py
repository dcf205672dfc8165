"""When to ring: many tests at many looks share one number, the share of stable weeks with a false alarm.

**Over looks** the number α of a week is spent evenly over its time (a linear spending function, Lan and DeMets,
Biometrika 1983): a look may use

    α · (time since the last look that judged, or since the week began) / one week

so hourly looks have α / 168 each, and a look after a day of silence α / 7. The chance that any of a week's looks errs
is at most the sum, α, however much the looks' windows overlap: it is a union bound, which asks for no independence.
What it costs is small: at 168 looks the normal quantile grows from 2.0 to 3.6. Weeks are counted from the release.

**Over the tests of one look** Holm's step-down (Scandinavian Journal of Statistics 1979) holds the chance of naming any
column that did not move to what the look may use, again whatever their dependence.

A column is named only if it also moved far enough to matter (`floor`): with a million requests everything is
significant. The floor only takes alarms away.
"""

from collections.abc import Sequence
from datetime import datetime, timedelta

from monitoring.drift_tests import Difference

WEEK = timedelta(days=7)


def look_level(weekly: float, began: datetime, previous: datetime | None, now: datetime) -> float:
    """What a look may spend of the weekly share of false alarms.

    Args:
        weekly: share of stable weeks that may have a false alarm.
        began: when the weeks began to be counted.
        previous: when a look judged last; None where none has.
        now: the time of this look, after both.
    """
    week_began = began + WEEK * ((now - began) // WEEK)
    since = week_began if previous is None else max(previous, week_began)
    return weekly * max((now - since) / WEEK, 0.0)


def moved(differences: Sequence[Difference], level: float, floor: float) -> list[bool]:
    """Which of the tests of one look have found something, at a level for all of them together.

    Args:
        differences: what the tests found.
        level: chance that any is named though nothing moved.
        floor: score below which a move is too small to matter.
    """
    named = [False] * len(differences)
    order = sorted(range(len(differences)), key=lambda place: differences[place].p_value)
    for rank, place in enumerate(order):
        if differences[place].p_value > level / (len(order) - rank):
            break
        named[place] = differences[place].score >= floor
    return named
