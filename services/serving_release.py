"""What a worker serves: the newest release of each loop, its policies loaded and warm.

A thread looks for changes. New policies are loaded and asked once before anybody else asks them; then one reference is
replaced. Whoever is being answered keeps what they began with, so a change drops no request.
"""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice

import torch

from components.errors import InputError, SlateloopError
from components.experiment.ab import Assignment
from components.policies.live_policy import MAX_SLATE, LivePolicy, LiveSession
from components.policies.policy_folder import StoredPolicy
from services.releases import Arm, Release, Releases, arm_of


@dataclass(frozen=True, eq=False)
class ServingRelease:
    """A release and its policies."""

    release: Release
    policies: Mapping[str, LivePolicy]
    """By tag, the shadow's among them."""
    assignment: Assignment

    def arm_of(self, user_id: str) -> Arm:
        """The arm that serves a user."""
        return arm_of(self.release, self.assignment, user_id)

    def policy_of(self, arm: Arm) -> tuple[str, LivePolicy]:
        """The policy of an arm, with its tag."""
        tag = self.release.policies()[arm]
        return tag, self.policies[tag]


class ReleaseFollower:
    """Keeps up with the releases of all loops.

    Args:
        releases: where they stand.
        load: gives the policy of an exact tag.
        seconds: between two looks.
        warn: told what whoever runs the service should know.
        on_served: told of each release that is taken up.
    """

    def __init__(
        self,
        releases: Releases,
        load: Callable[[str], StoredPolicy],
        seconds: float,
        *,
        warn: Callable[[str], None],
        on_served: Callable[[Release], None],
    ) -> None:
        self.releases = releases
        self.load = load
        self._seconds = seconds
        self._warn = warn
        self._on_served = on_served
        self._failed: dict[str, int] = {}
        self._unread = ""
        self._stopped = threading.Event()
        self.serving: Mapping[str, ServingRelease] = {}
        """By loop; replaced as a whole."""
        self.refresh()
        self._thread = threading.Thread(target=self._follow, name="releases", daemon=True)
        self._thread.start()

    def refresh(self) -> None:
        """Take up what has changed.

        A release whose policy cannot be loaded is tried again next time; until then the one before it serves on.

        Raises:
            LogUnavailableError: the database cannot be reached.
        """
        serving = dict(self.serving)
        loaded = {tag: live for one in serving.values() for tag, live in one.policies.items()}
        for loop, release in self.releases.current().items():
            if loop in serving and serving[loop].release == release:
                continue
            try:
                serving[loop] = self._prepared(release, loaded)
            except Exception as error:  # whatever it is, other loops go on, and so does this one's last release
                if self._failed.get(loop) != release.number:
                    self._warn(f"release {release.number} of loop {loop} cannot be served yet: {_cause(error)}")
                    self._failed[loop] = release.number
                continue
            self._failed.pop(loop, None)
            self._on_served(release)
        self.serving = serving

    def close(self) -> None:
        """Look no more."""
        self._stopped.set()
        self._thread.join(timeout=self._seconds + 1.0)

    def _prepared(self, release: Release, loaded: Mapping[str, LivePolicy]) -> ServingRelease:
        tags = {*release.policies().values(), *([] if release.shadow is None else [release.shadow])}
        policies = {tag: loaded[tag] if tag in loaded else self._warm(tag, release.loop) for tag in sorted(tags)}
        return ServingRelease(release, policies, Assignment(release.salt))

    def _warm(self, tag: str, loop: str) -> LivePolicy:
        live = LivePolicy(self.load(tag))
        if live.description.loop != loop:
            raise InputError(f"policy {tag!r}: is of loop {live.description.loop!r}")
        some = tuple(islice(live.description.vocabulary.item_ids, MAX_SLATE)) or ("any",)
        live.recommend([LiveSession(candidates=some)], torch.Generator())
        return live

    def _follow(self) -> None:
        while not self._stopped.wait(self._seconds):
            try:
                self.refresh()
            except Exception as error:  # whatever it is, the next look may go well
                if str(error) != self._unread:
                    self._warn(f"releases cannot be read: {_cause(error)}")
                self._unread = str(error)
            else:
                self._unread = ""


def _cause(error: Exception) -> str:
    return str(error) if isinstance(error, SlateloopError) else f"{type(error).__name__}: {error}"
