"""What an off-policy estimate is made from: flat arrays over the requests of a log."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np
from jaxtyping import Bool, Float, Int

from components.errors import InputError
from components.interactions.contract import RatioAssumption


@dataclass(frozen=True)
class KnownRewards:
    """What a log tells before any policy is asked: whether there can be estimates, and by which caps."""

    n_requests: int = 0
    """All of the log's."""
    n_known: int = 0
    """Those whose reward is known."""
    n_whole_sessions: int = 0
    """Sessions of which every reward is known."""
    lowest: float = math.inf
    highest: float = -math.inf
    ends_known: bool = False
    """Whether any session is known to have ended: where none is, what a session earns is not known."""


@dataclass(frozen=True)
class Positions:
    """The same by position: K of each of M requests, 0 where nothing was shown."""

    rewards: Float[np.ndarray, "M K"]
    behavior_log_probs: Float[np.ndarray, "M K"]
    """Given the positions above."""
    target_log_probs: Float[np.ndarray, "M K"]
    """Given the positions above."""

    def take(self, rows: Int[np.ndarray, " R"] | Bool[np.ndarray, " M"]) -> "Positions":
        """Those of some requests."""
        return Positions(self.rewards[rows], self.behavior_log_probs[rows], self.target_log_probs[rows])


@dataclass(frozen=True)
class LoggedRequests:
    """M logged requests, in any order, with the log_probs of what was shown under both policies.

    Raises:
        InputError: an array is empty, of another length or shape than `rewards`, or holds NaN or infinity; or the
            positions do not add up to the requests.
    """

    rewards: Float[np.ndarray, " M"]
    behavior_log_probs: Float[np.ndarray, " M"]
    """Under the policy that wrote the log."""
    target_log_probs: Float[np.ndarray, " M"]
    """Under the policy that is judged."""
    user: Int[np.ndarray, " M"]
    """Codes of the users: requests of one user may depend on each other, those of two may not."""
    session: Int[np.ndarray, " M"]
    """Codes of the sessions."""
    step: Int[np.ndarray, " M"]
    """Position of the request in its session, from 0."""
    positions: Positions | None = None
    """Rewards and log_probs of each position, where they are known: what the cascade needs."""

    def __post_init__(self) -> None:
        """Refuse arrays that do not fit each other, before a broadcast hides it."""
        shape = self.rewards.shape
        if len(shape) != 1 or shape[0] == 0:
            raise InputError(f"rewards: has shape {shape}; expected one number for each of at least one request")
        for field in fields(self)[:-1]:
            values = getattr(self, field.name)
            if values.shape != shape:
                raise InputError(f"{field.name}: has shape {values.shape}; expected {shape}, as rewards have")
            if bad := int(np.count_nonzero(~np.isfinite(values))):
                row = int(np.argmax(~np.isfinite(values)))
                raise InputError(
                    f"{field.name}: {bad} of {shape[0]} values are not finite, first {values[row]} at row {row}; "
                    "expected finite numbers"
                )
        if self.positions is not None:
            for field in fields(self.positions):
                total = getattr(self, field.name)
                if not np.allclose(getattr(self.positions, field.name).sum(axis=1), total, rtol=1e-4, atol=1e-4):
                    raise InputError(f"positions.{field.name}: do not add up to the requests' {field.name}")

    @property
    def log_ratios(self) -> Float[np.ndarray, " M"]:
        """log(π(slate | state) / β(slate | state)) of each request, in float64."""
        return self.target_log_probs.astype(np.float64) - self.behavior_log_probs.astype(np.float64)

    def columns(self, ratio: RatioAssumption) -> Iterator[tuple[Float[np.ndarray, " M"], Float[np.ndarray, " M"]]]:
        """Rewards with the log ratios that weight them: of the whole slate, or of each position with those above it.

        Raises:
            InputError: the ratio is `cascade` and the positions are not known.
        """
        if ratio is RatioAssumption.FULL_SLATE:
            yield self.rewards, self.log_ratios
            return
        if self.positions is None:
            raise InputError("ratio: 'cascade' needs the log_prob of each position; this log has those of whole slates")
        log_ratios = self.positions.target_log_probs - self.positions.behavior_log_probs
        yield from zip(self.positions.rewards.T, log_ratios.cumsum(axis=1).T, strict=True)

    def take(self, rows: Int[np.ndarray, " R"] | Bool[np.ndarray, " M"]) -> "LoggedRequests":
        """The requests at these rows, in that order."""
        taken = {field.name: getattr(self, field.name)[rows] for field in fields(self)[:-1]}
        return LoggedRequests(**taken, positions=None if self.positions is None else self.positions.take(rows))


@dataclass(frozen=True)
class WholeSessions:
    """The same requests ordered by session and step, every session whole."""

    requests: LoggedRequests
    starts: Int[np.ndarray, " S"]
    """Row of each session's first request."""
    lengths: Int[np.ndarray, " S"]

    @classmethod
    def of(cls, log: LoggedRequests) -> "WholeSessions":
        """The sessions of a log.

        Raises:
            InputError: a session does not run through the steps 0, 1, 2, ..., or has more than one user.
        """
        requests = log.take(np.lexsort((log.step, log.session)))
        _, starts, lengths = np.unique(requests.session, return_index=True, return_counts=True)
        expected = np.arange(len(requests.step)) - np.repeat(starts, lengths)
        if (wrong := requests.step != expected).any():
            row = int(np.argmax(wrong))
            raise InputError(
                f"step: session {requests.session[row]} has step {requests.step[row]} where {expected[row]} should be; "
                "expected whole sessions with the steps 0, 1, 2, ..."
            )
        if (wrong := requests.user != np.repeat(requests.user[starts], lengths)).any():
            row = int(np.argmax(wrong))
            raise InputError(f"user: session {requests.session[row]} has more than one user; expected one per session")
        return cls(requests, starts, lengths)

    @property
    def ends(self) -> Int[np.ndarray, " S"]:
        """Row of each session's last request."""
        return self.starts + self.lengths - 1

    @property
    def rewards(self) -> Float[np.ndarray, " S"]:
        """Summed reward of each session."""
        return np.add.reduceat(self.requests.rewards, self.starts)

    @property
    def users(self) -> Int[np.ndarray, " S"]:
        """Code of each session's user."""
        users: Int[np.ndarray, " S"] = self.requests.user[self.starts]
        return users

    def cumulative(self, values: Float[np.ndarray, " M"]) -> Float[np.ndarray, " M"]:
        """Running sum of the values within each session."""
        # Step by step, not cut out of one running sum over the whole log: far into that, digits would be lost.
        totals = values.copy()
        for t in range(1, int(self.lengths.max())):
            rows = self.starts[self.lengths > t] + t
            totals[rows] += totals[rows - 1]
        return totals
