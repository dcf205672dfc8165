"""An arm of an A/B: sums over its users, and what they say of the mean of a session.

Users are assigned, and one user's sessions depend on each other, so an arm's mean is a ratio of sums over its U users
and its variance is clustered by user (delta method):

    m = Σ_u R_u / Σ_u n_u        Var m = U / (U − 1) Σ_u (R_u − m n_u)² / (Σ_u n_u)²

with R_u the user's summed value and n_u the number of the user's sessions. Both follow from U, Σ n, Σ R, Σ R², Σ R n
and Σ n², which add up over parts of the users and over changes from day to day; Σ r² over single sessions tells what
the variance would be were all sessions independent.
"""

import math
from dataclasses import astuple, dataclass

import numpy as np
from jaxtyping import Float, Int
from pydantic import BaseModel, ConfigDict, Field
from scipy import stats


@dataclass(frozen=True)
class ArmSums:
    """Sums over an arm's users; those of different users, and changes by later sessions, add up in any order."""

    n_users: int
    n_sessions: int
    total: float
    """Σ R over users."""
    user_squares: float
    """Σ R² over users."""
    user_products: float
    """Σ R n over users."""
    session_counts_squared: float
    """Σ n² over users."""
    session_squares: float
    """Σ r² over sessions."""

    def __add__(self, other: "ArmSums") -> "ArmSums":
        return ArmSums(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))

    def mean(self) -> "ArmMean":
        """The mean of a session and its variance; at least two users are needed."""
        mean = self.total / self.n_sessions
        residuals = self.user_squares - 2 * mean * self.user_products + mean**2 * self.session_counts_squared
        # The terms cancel where all users are alike; what is left of rounding may be below 0.
        spread = max(self.session_squares - self.n_sessions * mean**2, 0.0)
        return ArmMean(
            n_users=self.n_users,
            n_sessions=self.n_sessions,
            mean=mean,
            variance=self.n_users / (self.n_users - 1) * max(residuals, 0.0) / self.n_sessions**2,
            session_variance=spread / self.n_sessions**2,
        )


def daily_sums(
    user: Int[np.ndarray, " S"], day: Int[np.ndarray, " S"], values: Float[np.ndarray, " S"], n_days: int
) -> list[ArmSums]:
    """What each day's sessions add to an arm's sums: their running total is the sums over all users up to that day.

    A returning user's R and n grow, so the change of R² is (R + r)² − R²: it needs what the user had before.

    Args:
        user: code of each session's user.
        day: 0 to n_days − 1, of each session.
        values: reward, or another metric, of each session.
        n_days: days to tell of; a day without sessions adds zeros.
    """
    order = np.lexsort((day, user))
    user, day, values = user[order], day[order], values[order]
    first = np.ones(len(user), dtype=bool)
    first[1:] = user[1:] != user[:-1]
    starts = np.flatnonzero(first)
    lengths = np.diff(np.append(starts, len(user)))
    n_before = np.arange(len(user)) - np.repeat(starts, lengths)
    running = np.cumsum(values) - values
    before = running - np.repeat(running[starts], lengths)
    changes = {
        "n_users": first,
        "n_sessions": np.ones(len(user)),
        "total": values,
        "user_squares": 2 * before * values + values**2,
        "user_products": before + (n_before + 1) * values,
        "session_counts_squared": 2 * n_before + 1,
        "session_squares": values**2,
    }
    columns = {name: np.bincount(day, change, minlength=n_days).tolist() for name, change in changes.items()}
    return [
        ArmSums(
            **{name: int(column[index]) if name.startswith("n_") else column[index] for name, column in columns.items()}
        )
        for index in range(n_days)
    ]


def arm_sums(user: Int[np.ndarray, " S"], values: Float[np.ndarray, " S"]) -> ArmSums:
    """The sums over all users of an arm from its sessions."""
    return daily_sums(user, np.zeros_like(user), values, 1)[0]


class ArmMean(BaseModel):
    """The mean of a session in one arm."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    n_users: int = Field(ge=2, description="Users of the arm.")
    n_sessions: int = Field(ge=2, description="Their sessions.")
    mean: float = Field(description="Mean over sessions.")
    variance: float = Field(ge=0, description="Of the mean, clustered by user.")
    session_variance: float = Field(ge=0, description="Of the mean, were all sessions independent.")


@dataclass(frozen=True)
class Bounds:
    """A lower and an upper bound, each of which is wrong with at most the probability that it was made for."""

    lower: float
    upper: float


@dataclass(frozen=True)
class Contrast:
    """treatment − factor · control, with the arms independent of each other."""

    value: float
    variance: float
    session_variance: float
    """Of the value, were all sessions independent."""
    degrees: float
    """Welch and Satterthwaite's degrees of freedom."""
    n_sessions: int

    @classmethod
    def between(cls, treatment: ArmMean, control: ArmMean, factor: float = 1.0) -> "Contrast":
        """The contrast of two arms' means; a factor other than 1 asks whether one is that many times the other."""
        weighted = factor**2 * control.variance
        variance = treatment.variance + weighted
        degrees = float(treatment.n_users + control.n_users - 2)
        if variance > 0:
            degrees = variance**2 / (
                treatment.variance**2 / (treatment.n_users - 1) + weighted**2 / (control.n_users - 1)
            )
        return cls(
            value=treatment.mean - factor * control.mean,
            variance=variance,
            session_variance=treatment.session_variance + factor**2 * control.session_variance,
            degrees=degrees,
            n_sessions=treatment.n_sessions + control.n_sessions,
        )

    @property
    def standard_error(self) -> float:
        """Of the value."""
        return math.sqrt(self.variance)


def fixed_bounds(contrast: Contrast, level: float) -> Bounds:
    """One-sided bounds on a contrast that is looked at once, at the planned end: Student's t with Welch's degrees."""
    half_width = float(stats.t.ppf(1 - level, contrast.degrees)) * contrast.standard_error
    return Bounds(contrast.value - half_width, contrast.value + half_width)
