"""Releases: which policies serve a loop, to which share of its users.

A loop's releases are rows of the interaction log's database that are only ever added to; the newest counts. The
champion serves whoever no other arm serves. A challenger serves the users whose salted hash lies lowest, the baseline
those whose hash lies highest, so that either's share can grow without taking anybody out. A shadow serves nobody: its
choice is logged beside what is shown.

Every change is a release of its own. One that changes who serves whom begins an experiment, which recommendations name:
an A/B is what was shown in one experiment, so no user of one arm has a past in the other within it.
"""

import secrets
import time
from collections.abc import Callable, Sequence
from typing import Literal

import sqlalchemy as sa
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from components.errors import InputError
from components.experiment.ab import Assignment
from components.interactions.log import RELEASES, InteractionLog

Arm = Literal["champion", "challenger", "baseline"]
MAX_REASON = 2_000
#: Shares of users that an unproven policy, and one that stays for comparison, may serve at most.
MOST_CHALLENGED, MOST_COMPARED = 0.5, 0.1


class ReleaseChangedError(InputError):
    """Somebody else made a release meanwhile."""

    def __init__(self, loop: str, number: int) -> None:
        super().__init__(f"loop {loop!r}: somebody else changed what release {number} says; look at it first")


class Release(BaseModel):
    """Who serves a loop from one moment to the next."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    loop: str = Field(description="The recommender.")
    number: int = Field(ge=1, description="Of the loop's releases, from 1.")
    experiment: int = Field(ge=1, description="Number of the release since which the same arms serve the same users.")
    released_at: int = Field(ge=0, description="Microseconds since 1970, UTC.")
    action: str = Field(max_length=16, description="What changed: promote, canary, baseline, shadow, rollback, guard.")
    reason: str = Field(max_length=MAX_REASON, description="Why, in a sentence.")
    champion: str = Field(description="Exact tag of the policy that serves whoever no other arm serves.")
    challenger: str | None = Field(default=None, description="Tag of the policy that asks to serve.")
    challenger_share: float = Field(
        default=0.0, ge=0, le=MOST_CHALLENGED, description="Share of users whom the challenger serves."
    )
    baseline: str | None = Field(default=None, description="Tag of a policy that stays for comparison.")
    baseline_share: float = Field(
        default=0.0, ge=0, le=MOST_COMPARED, description="Share of users whom the baseline serves."
    )
    shadow: str | None = Field(default=None, description="Tag of a policy that is asked, and not shown.")
    salt: str = Field(min_length=1, description="Salt of the hash that assigns users; a new challenger brings its own.")
    planned_sessions: int | None = Field(
        default=None, ge=2, description="Sessions of challenger and champion that were planned before the A/B began."
    )

    @model_validator(mode="after")
    def _shares_fit(self) -> "Release":
        for arm, policy, share in (
            ("challenger", self.challenger, self.challenger_share),
            ("baseline", self.baseline, self.baseline_share),
        ):
            if (policy is None) != (share == 0):
                raise ValueError(
                    f"{arm}_share: is {share:g} with {arm} {policy!r}; expected a share of one that exists"
                )
        if (self.challenger is None) != (self.planned_sessions is None):
            raise ValueError("planned_sessions: expected with a challenger, and only with one")
        return self

    def policies(self) -> dict[Arm, str]:
        """Tag of each arm's policy."""
        arms: dict[Arm, str | None] = {
            "champion": self.champion, "challenger": self.challenger, "baseline": self.baseline,
        }  # fmt: skip
        return {arm: policy for arm, policy in arms.items() if policy is not None}

    def shares(self) -> dict[Arm, float]:
        """Share of users of each arm."""
        shares: dict[Arm, float] = {
            "champion": 1.0 - self.challenger_share - self.baseline_share,
            "challenger": self.challenger_share,
            "baseline": self.baseline_share,
        }
        return {arm: shares[arm] for arm in self.policies()}


def arm_of(release: Release, assignment: Assignment, user_id: str) -> Arm:
    """The arm that serves a user, by the assignment of the release's salt."""
    if assignment.is_lowest(user_id, release.challenger_share):
        return "challenger"
    return "baseline" if assignment.is_highest(user_id, release.baseline_share) else "champion"


class Releases:
    """The releases of all loops, in the database of an interaction log."""

    def __init__(self, log: InteractionLog) -> None:
        self._log = log

    def current(self) -> dict[str, Release]:
        """The newest release of each loop.

        Raises:
            InputError: there is no interaction log.
            LogUnavailableError: the database cannot be reached.
        """
        columns = RELEASES.c
        newest = sa.select(columns.loop, sa.func.max(columns.number).label("number")).group_by(columns.loop).subquery()
        rows = sa.select(RELEASES).join(
            newest, sa.and_(columns.loop == newest.c.loop, columns.number == newest.c.number)
        )
        return {release.loop: release for release in self._read(rows)}

    def history(self, loop: str) -> list[Release]:
        """A loop's releases, oldest first; none where nothing was ever released.

        Raises:
            InputError: there is no interaction log.
            LogUnavailableError: the database cannot be reached.
        """
        return self._read(sa.select(RELEASES).where(RELEASES.c.loop == loop).order_by(RELEASES.c.number))

    def start(self, loop: str, policy: str, reason: str) -> Release:
        """Release a loop's first champion: there is nothing yet that it could be compared with.

        Raises:
            InputError: something serves the loop already.
            LogUnavailableError: the database cannot be written.
        """
        if self.history(loop):
            raise InputError(f"loop {loop!r}: has a champion already; a policy takes its place by a canary and its A/B")
        return self._add(
            Release(
                loop=loop,
                number=1,
                experiment=1,
                released_at=_now(),
                action="promote",
                reason=reason,
                champion=policy,
                salt=_new_salt(),
            )
        )

    def canary(self, loop: str, policy: str, share: float, planned_sessions: int, reason: str) -> Release:
        """Let a challenger serve a share of users; the same challenger's share can grow.

        Raises:
            InputError: nothing serves the loop, the policy is its champion, or the share does not fit.
            LogUnavailableError: the database cannot be written.
        """
        last = self.serving(loop)
        if policy == last.champion:
            raise InputError(f"policy {policy!r}: is the champion of loop {loop!r}; expected another one")
        return self._follow(
            last,
            "canary",
            reason,
            challenger=policy,
            challenger_share=share,
            planned_sessions=planned_sessions,
            salt=last.salt if policy == last.challenger else _new_salt(),
        )

    def promote(self, release: Release, reason: str) -> Release:
        """The challenger of a release takes the champion's place.

        Raises:
            InputError: it has no challenger; `ReleaseChangedError` where it is not the newest any more.
            LogUnavailableError: the database cannot be written.
        """
        if release.challenger is None:
            raise InputError(f"loop {release.loop!r}: has no challenger; expected a canary before a promotion")
        return self._follow(release, "promote", reason, champion=release.challenger, **_NO_CHALLENGER)

    def set_baseline(self, loop: str, policy: str | None, share: float, reason: str) -> Release:
        """Let a policy serve a share of users for comparison; None takes it away.

        Raises:
            InputError: nothing serves the loop, or the share does not fit.
            LogUnavailableError: the database cannot be written.
        """
        return self._follow(self.serving(loop), "baseline", reason, baseline=policy, baseline_share=share)

    def set_shadow(self, loop: str, policy: str | None, reason: str) -> Release:
        """Ask a policy beside what is shown; None asks none.

        Raises:
            InputError: nothing serves the loop.
            LogUnavailableError: the database cannot be written.
        """
        return self._follow(self.serving(loop), "shadow", reason, shadow=policy)

    def roll_back(
        self,
        loop: str,
        reason: str,
        *,
        action: Literal["rollback", "guard"] = "rollback",
        left: int | None = None,
        require: Callable[[str], object] = lambda policy: None,
    ) -> Release:
        """Take the challenger away; without one, bring back the champion before this one.

        Args:
            loop: name of the loop.
            reason: why.
            action: who asks.
            left: number of the release that is to be left; None: whichever is the newest.
            require: raises an InputError where a policy could not be served.

        Raises:
            InputError: nothing serves the loop, there is no earlier champion or it could not be served;
                `ReleaseChangedError` where another release than `left` is the newest.
            LogUnavailableError: the database cannot be written.
        """
        history = self.history(loop)
        if not history:
            raise self._nothing(loop)
        last = history[-1]
        if left not in (None, last.number):
            raise ReleaseChangedError(loop, last.number)
        if last.challenger is not None:
            require(last.champion)
            return self._follow(last, action, reason, **_NO_CHALLENGER)
        champions = _champions(history)
        if len(champions) < 2:
            raise InputError(f"loop {loop!r}: has no challenger and no earlier champion to go back to")
        require(champions[-2])
        return self._follow(last, action, reason, champion=champions[-2])

    def _nothing(self, loop: str) -> InputError:
        return InputError(f"loop {loop!r}: nothing is released; the loops with a release are {sorted(self.current())}")

    def serving(self, loop: str) -> Release:
        """The loop's newest release.

        Raises:
            InputError: nothing was ever released.
            LogUnavailableError: the database cannot be reached.
        """
        history = self.history(loop)
        if not history:
            raise self._nothing(loop)
        return history[-1]

    def _follow(self, last: Release, action: str, reason: str, **changes: object) -> Release:
        changed = {"number": last.number + 1, "released_at": _now(), "action": action, "reason": reason} | changes
        same = all(getattr(last, name) == changed.get(name, getattr(last, name)) for name in _EXPERIMENT)
        changed["experiment"] = last.experiment if same else last.number + 1
        try:
            release = Release.model_validate(last.model_dump() | changed)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False)[0]
            name, message = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
            seen = f"{name} = {first['input']!r}: " if name else ""
            raise InputError(f"release of loop {last.loop!r}: {seen}{message}") from None
        return self._add(release)

    def _add(self, release: Release) -> Release:
        with self._log.writing() as connection:
            try:
                connection.execute(sa.insert(RELEASES).values(release.model_dump()))
            except sa.exc.IntegrityError:
                raise ReleaseChangedError(release.loop, release.number) from None
        return release

    def _read(self, rows: sa.Select[tuple[object, ...]]) -> list[Release]:
        with self._log.reading() as connection:
            return [Release.model_validate(dict(row._mapping)) for row in connection.execute(rows)]


#: What decides who serves whom, and for how long: a plan is made before an experiment begins, never within it.
_EXPERIMENT = (
    "champion", "challenger", "challenger_share", "baseline", "baseline_share", "salt", "planned_sessions",
)  # fmt: skip
_NO_CHALLENGER: dict[str, object] = {"challenger": None, "challenger_share": 0.0, "planned_sessions": None}


def _champions(history: Sequence[Release]) -> list[str]:
    """The champions that led to the newest one; those that were rolled back are gone."""
    champions: list[str] = []
    for release in history:
        if champions and release.champion == champions[-1]:
            continue
        if release.action == "promote":
            champions.append(release.champion)
        else:
            champions.pop()
    return champions


def _now() -> int:
    return time.time_ns() // 1_000


def _new_salt() -> str:
    return secrets.token_hex(8)
