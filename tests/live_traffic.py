"""What a release with a challenger would have shown and heard, written into its database."""

import time

import numpy as np

from components.experiment.ab import Assignment
from components.interactions.log import Heard, InteractionLog, Recommended
from services.releases import Releases, arm_of

#: Settings under which all of it can be read at once.
ANSWERED_AT_ONCE = ("source.attribution_minutes=0.001", "source.session_gap_minutes=0.001")


def live_traffic(log: InteractionLog, gain: float, n_users: int = 600) -> None:
    """Two requests of each user, as the release assigns them; the challenger's users click more often by `gain`."""
    release = Releases(log).serving("shop")
    assignment = Assignment(release.salt)
    rng = np.random.default_rng(3)
    calls, pieces = [], []
    for number in range(n_users):
        user = f"user-{number}"
        arm = arm_of(release, assignment, user)
        for step in range(2):
            name = f"{release.number}-{user}-{step}"
            moment = release.released_at + 1_000 * step
            clicked = tuple(bool(drawn) for drawn in rng.random(2) < 0.4 + gain * (arm == "challenger"))
            calls.append(
                Recommended(
                    name, "shop", user, f"visit-{release.number}", moment, ("a", "b", "c"), False, ("a", "b"),
                    (-1.0, -0.5), (), {}, release.policies()[arm], arm, release.experiment, "",
                )
            )  # fmt: skip
            pieces.append(Heard(name, "f", moment + 1, clicked=clicked, purchased=clicked))
    log.write([calls], pieces)
    time.sleep(0.1)  # until all windows are over
