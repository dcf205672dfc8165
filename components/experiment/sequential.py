"""Confidence sequence: bounds on the difference of two arms that hold at every look at once.

An interval made for one look is wrong far more often when it is made daily and the best day counts. These bounds are
wrong at any look, ever, with probability at most α. Robbins' normal mixture, one-sided (Howard, Ramdas, McAuliffe and
Sekhon 2021, "Time-uniform, nonparametric, nonasymptotic confidence sequences": Ville's inequality for a half-normal
mixture, made explicit by 1 − Φ(x) ≤ exp(−x²/2)), in the asymptotic form with the variance estimated at each look
(Waudby-Smith, Arbour, Sinha, Kennedy and Ramdas 2024, "Time-uniform central limit theory and asymptotic confidence
sequences"):

    bound = d ∓ z(κ) · se        z(κ)² = 2 (1 + 1/κ) log(1 + √(1 + κ) / 2α)        κ = clock · κ* / planned clock

d is the difference at the look and se its standard error, clustered by user. κ is the clock relative to the mixture's
scale; κ* = −W₋₁(−4α²/e) − 1 makes the bounds nearly narrowest at the planned end. A wrong plan costs width and never
validity, as long as it was made before the data.

The clock is the variance of the summed difference in units of one session's: n sessions times their design effect,

    clock = n · Var(d) / Var(d were all sessions independent),

which is the number of users where each comes once. Users who come again make the clock run faster than the sessions.
What is claimed then: at each look the estimand is the difference in mean reward of the sessions until that look, and
the bounds hold for all looks together, asymptotically, where a user's earlier sessions do not foretell the opposite of
the later ones (covariance ≥ 0). Sums of such users have at least the correlation of a Brownian motion on the same
clock, and so cross a boundary no more often than it does (Slepian's inequality). The approximation needs many users at
the first look already, so there is none before each arm has `FIRST_LOOK_USERS`.
"""

import math
from itertools import accumulate
from operator import add

import numpy as np
from jaxtyping import Bool, Float, Int
from pydantic import BaseModel, ConfigDict, Field
from scipy import special

from components.experiment.arm import ArmSums, Bounds, Contrast, daily_sums

#: Users of each arm from which on a look counts.
FIRST_LOOK_USERS = 100


class Look(BaseModel):
    """What was seen at the end of one day."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    day: int = Field(ge=1, description="Days since the A/B began.")
    n_users: int = Field(ge=4, description="Users of both arms so far.")
    n_sessions: int = Field(ge=4, description="Their sessions.")
    difference: float = Field(description="Treatment mean minus control mean, so far.")
    standard_error: float = Field(ge=0, description="Of the difference, clustered by user.")
    clock: float = Field(gt=0, description="Sessions times their design effect.")
    lower: float = Field(description="Lower end of the confidence sequence at this look.")
    upper: float = Field(description="Upper end of the confidence sequence at this look.")


class ConfidenceSequence(BaseModel):
    """Looks at an A/B, whose intervals hold the true difference all at once."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    confidence: float = Field(gt=0, lt=1, description="How often all intervals together hold the true difference.")
    planned_sessions: int = Field(ge=1, description="Sessions at the planned end: there the bounds are narrowest.")
    looks: tuple[Look, ...] = Field(min_length=1, description="In order of days.")

    def bounds(self, level: float) -> Bounds:
        """Bounds at the last look, each of which is wrong at any look, ever, with probability at most `level`."""
        last = self.looks[-1]
        return _around(last.difference, last.standard_error, last.clock, level, self.planned_sessions)


def boundary(clock: float, level: float, planned: float) -> float:
    """How many standard errors a one-sided bound of a confidence sequence lies from the estimate.

    Args:
        clock: information at this look, in independent sessions.
        level: probability with which the bound may be wrong at any look.
        planned: the clock's value at the planned end.
    """
    optimum = -special.lambertw(-4 * level**2 / math.e, k=-1).real - 1
    relative = clock * optimum / planned
    return math.sqrt(2 * (1 + 1 / relative) * math.log1p(math.sqrt(1 + relative) / (2 * level)))


def sequential_bounds(contrast: Contrast, level: float, planned_sessions: int) -> Bounds:
    """Bounds on a contrast that may be looked at whenever one likes; see the module's text."""
    return _around(contrast.value, contrast.standard_error, _clock(contrast), level, planned_sessions)


def confidence_sequence(
    user: Int[np.ndarray, " S"],
    day: Int[np.ndarray, " S"],
    values: Float[np.ndarray, " S"],
    treated: Bool[np.ndarray, " S"],
    *,
    planned_sessions: int,
    confidence: float = 0.95,
) -> ConfidenceSequence | None:
    """Look at two arms at the end of each day; None where no look has enough users.

    Args:
        user: code of each session's user.
        day: of each session; the first is 0.
        values: reward of each session.
        treated: whether the session's user is in the treatment.
        planned_sessions: sessions of both arms that were planned before the A/B began.
        confidence: of all intervals together.
    """
    n_days = int(day.max()) + 1
    arms = [daily_sums(user[arm], day[arm], values[arm], n_days) for arm in (treated, ~treated)]
    looks = [
        _look(number, treatment, control, planned_sessions, confidence)
        for number, (treatment, control) in enumerate(zip(*(accumulate(arm, add) for arm in arms), strict=True), 1)
        if min(treatment.n_users, control.n_users) >= FIRST_LOOK_USERS
    ]
    if not looks:
        return None
    return ConfidenceSequence(confidence=confidence, planned_sessions=planned_sessions, looks=tuple(looks))


def _look(day: int, treatment: ArmSums, control: ArmSums, planned_sessions: int, confidence: float) -> Look:
    contrast = Contrast.between(treatment.mean(), control.mean())
    bounds = sequential_bounds(contrast, (1 - confidence) / 2, planned_sessions)
    return Look(
        day=day,
        n_users=treatment.n_users + control.n_users,
        n_sessions=contrast.n_sessions,
        difference=contrast.value,
        standard_error=contrast.standard_error,
        clock=_clock(contrast),
        lower=bounds.lower,
        upper=bounds.upper,
    )


def _clock(contrast: Contrast) -> float:
    # Without any variance there is nothing to be uncertain of, and any clock will do.
    varies = min(contrast.variance, contrast.session_variance) > 0
    design_effect = contrast.variance / contrast.session_variance if varies else 1.0
    return contrast.n_sessions * design_effect


def _around(value: float, standard_error: float, clock: float, level: float, planned_sessions: int) -> Bounds:
    half_width = boundary(clock, level, planned_sessions) * standard_error
    return Bounds(value - half_width, value + half_width)
