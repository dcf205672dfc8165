"""How long an A/B has to last: users and days from the difference that it should find.

A gain e, as a share of the control's mean m of a session, is taken to scale what users earn: R_u becomes (1 + e) R_u
over the same n_u sessions. A user's influence (R_u − m n_u) / n̄ on the ratio of sums (`arm.py`) is then scaled as well,
so an A/B of N users, a share p of them in the treatment, knows the difference with

    se² = s² ((1 + e)² / pN + 1 / (1 − p)N)

where s is the standard deviation of a user's influence in the control: Var m = s² / U in an arm of U users. The gain is
found with probability 1 − β at the planned end where e m = (z + z_β) se:

    N = (z + z_β)² (s / m)² ((1 + e)² / p + 1 / (1 − p)) / e²

with z = Φ⁻¹(1 − α) for a test at the planned end alone, and z the boundary of the confidence sequence at its planned
end for one that may be looked at any day (`sequential.py`). That needs about twice the users in the worst case, and
often fewer, since it may stop at any look: half of its A/Bs have passed where the expected difference meets the bound.
Student's t, by which the end is judged, would ask for about z² / 2 users more, two at the default level (Guenther
1981).

What N users find solves the same equation, a quadratic in e. With a = (z + z_β)² s² / (m² p N) and b the same over
1 − p instead of p,

    e = (a + √(a + b − a b)) / (1 − a)

and nothing where a ≥ 1: the treatment's spread then grows faster with its gain than the gain does.

A guardrail is a difference of its margin: that of a metric which does not change is shown by as many users as would
find such a difference. All of a gate's A/B checks pass together with probability 1 − β where each of k passes with
1 − β/k (union bound).
"""

import math
from dataclasses import dataclass

import numpy as np
import polars as pl
from pydantic import BaseModel, ConfigDict, Field
from scipy import optimize, stats

from components.errors import InputError
from components.experiment.arm import ArmSums, arm_sums
from components.experiment.guardrails import GuardrailMargins, Metric
from components.experiment.logged_sessions import REWARD, logged_sessions
from components.experiment.sequential import boundary
from components.interactions.log_folder import Log

#: Days of the curve of detectable effects.
CURVE_DAYS = 10


class Baseline(BaseModel):
    """What is known of a metric before the A/B."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    mean: float = Field(description="Mean over sessions.")
    standard_deviation: float = Field(
        ge=0, description="Of a user's influence on the mean: the mean over U users has this over √U."
    )


class LoggedBaseline(BaseModel):
    """What a log says of the users that an A/B will meet."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    reward: Baseline
    guardrails: dict[Metric, Baseline]
    users_per_day: float | None = Field(description="Users over days of the log; None where it has no times.")


class AbDesign(BaseModel):
    """What an A/B should find, and how."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    relative_effect: float = Field(gt=0, description="Gain over the control's mean that should be found.")
    level: float = Field(default=0.03, gt=0, lt=0.5, description="How often equal policies pass: one-sided level.")
    power: float = Field(default=0.8, ge=0.5, lt=1, description="How often such a gain is found.")
    treatment_share: float = Field(default=0.5, gt=0, lt=1, description="Share of users who see the challenger.")
    users_per_day: float = Field(gt=0, description="Users who come into the A/B each day.")


class PlannedTest(BaseModel):
    """Size of an A/B by one way of testing."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    users: int = Field(ge=2, description="Users of both arms.")
    treatment_users: int = Field(ge=1)
    control_users: int = Field(ge=1)
    days: int = Field(ge=1, description="Days until so many users have come.")


class PlannedDay(BaseModel):
    """What an A/B can find by the end of one day, as shares of the mean, with the power that was asked for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    day: int = Field(ge=1)
    users: int = Field(ge=1, description="Users of both arms by then.")
    fixed: float | None = Field(
        description="Detectable effect where this day is the planned end; None where too few users came to find any."
    )
    sequential: float | None = Field(
        description="Detectable effect of the confidence sequence at this look; None likewise."
    )


class PlannedGuardrail(BaseModel):
    """Users from which a metric that is truly unchanged is shown to lie within its margin."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    metric: Metric
    margin: float
    test: PlannedTest | None = Field(description="None where the log never saw the metric.")


class AbPlan(BaseModel):
    """How long an A/B has to last."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    baseline: Baseline
    design: AbDesign
    fixed: PlannedTest = Field(description="Analysed once, at its planned end.")
    sequential: PlannedTest = Field(description="Looked at whenever one likes.")
    inflation: float = Field(ge=1, description="Users of the sequential A/B over those of the fixed one.")
    half_passed_by_day: int = Field(
        ge=1, description="Day by which half of the sequential A/Bs with such a gain have passed."
    )
    curve: tuple[PlannedDay, ...]
    guardrails: tuple[PlannedGuardrail, ...] = Field(
        description="For the test at the planned end; a challenger that improves a metric needs fewer users."
    )
    together: PlannedTest = Field(
        description="At its planned end: the gain is found and unchanged metrics are shown to be unharmed, all at once."
    )


def plan_ab(
    baseline: Baseline,
    design: AbDesign,
    guardrails: dict[Metric, Baseline] | None = None,
    margins: GuardrailMargins | None = None,
) -> AbPlan:
    """Size an A/B; see the module's text.

    Args:
        baseline: of the reward of a session.
        design: what should be found.
        guardrails: what is known of the guarded metrics.
        margins: by how much they may be worse; the gate's by default.

    Raises:
        InputError: the mean is not above 0, or rewards do not differ, so that there is no effect to plan for.
    """
    if baseline.mean <= 0:
        raise InputError(f"mean: {baseline.mean:g}; expected a mean reward above 0, since effects are shares of it")
    if baseline.standard_deviation == 0:
        raise InputError("standard deviation: 0; expected rewards that differ between users")
    margins = GuardrailMargins() if margins is None else margins
    at_end, anytime = float(stats.norm.ppf(1 - design.level)), boundary(1.0, design.level, 1.0)
    gain = _Question(baseline, design.relative_effect, treatment_scale=1 + design.relative_effect)
    fixed, sequential = _test(at_end, gain, design), _test(anytime, gain, design)
    guarded = {metric: _Question(known, margins.of(metric)) for metric, known in (guardrails or {}).items()}
    asked = [gain, *(question for question in guarded.values() if question.baseline.mean > 0)]
    strict = design.model_copy(update={"power": 1 - (1 - design.power) / len(asked)})
    found = anytime + float(stats.norm.ppf(design.power))
    halfway = optimize.brentq(lambda share: found * math.sqrt(share) - boundary(share, design.level, 1.0), 1e-6, 1.0)
    return AbPlan(
        baseline=baseline,
        design=design,
        fixed=fixed,
        sequential=sequential,
        inflation=sequential.users / fixed.users,
        half_passed_by_day=math.ceil(halfway * sequential.users / design.users_per_day),
        curve=tuple(
            _day(int(day), sequential.users, baseline, design)
            for day in np.unique(np.linspace(1, sequential.days, CURVE_DAYS).round())
        ),
        guardrails=tuple(
            PlannedGuardrail(
                metric=metric,
                margin=question.relative_effect,
                test=_test(at_end, question, design) if question.baseline.mean > 0 else None,
            )
            for metric, question in guarded.items()
        ),
        together=max((_test(at_end, question, strict) for question in asked), key=lambda test: test.users),
    )


def logged_baseline(log: Log) -> LoggedBaseline:
    """What a log says of the users that an A/B will meet: as many sessions a user as in the log, as different.

    Raises:
        InputError: the log knows no rewards, or has fewer than two users.
    """
    sessions = logged_sessions(log)
    rewarded = sessions.drop_nulls(REWARD)
    if rewarded.is_empty():
        raise InputError(f"{log.path}: knows no rewards; give --mean and --sd instead of --log")
    if rewarded["user_id"].n_unique() < 2:
        raise InputError(f"{log.path}: has one user; expected at least 2")
    users_per_day = None
    if log.manifest.has_times:
        days: int = sessions["timestamp"].dt.date().n_unique()
        users_per_day = sessions["user_id"].n_unique() / days
    return LoggedBaseline(
        reward=_baseline(rewarded, REWARD),
        guardrails={metric: _baseline(sessions, metric.value) for metric in Metric},
        users_per_day=users_per_day,
    )


def _baseline(sessions: pl.DataFrame, column: str) -> Baseline:
    sums: ArmSums = arm_sums(sessions["user_id"].rank("dense").cast(pl.Int64).to_numpy(), sessions[column].to_numpy())
    mean = sums.mean()
    return Baseline(mean=mean.mean, standard_deviation=math.sqrt(mean.variance * mean.n_users))


@dataclass(frozen=True)
class _Question:
    """What an A/B should find: a share of the control's mean, with the spread that the treatment then has."""

    baseline: Baseline
    relative_effect: float
    treatment_scale: float = 1.0
    """Spread of the treatment over that of the control."""


def _test(z: float, question: _Question, design: AbDesign) -> PlannedTest:
    share, known = design.treatment_share, question.baseline
    effect = question.relative_effect * known.mean / known.standard_deviation if known.standard_deviation else math.inf
    spread = question.treatment_scale**2 / share + 1 / (1 - share)
    users = (z + float(stats.norm.ppf(design.power))) ** 2 * spread / effect**2
    treatment, control = max(1, math.ceil(share * users)), max(1, math.ceil((1 - share) * users))
    return PlannedTest(
        users=treatment + control,
        treatment_users=treatment,
        control_users=control,
        days=math.ceil((treatment + control) / design.users_per_day),
    )


def _day(day: int, planned_users: int, baseline: Baseline, design: AbDesign) -> PlannedDay:
    users = day * design.users_per_day
    return PlannedDay(
        day=day,
        users=max(1, round(users)),
        fixed=_detectable(float(stats.norm.ppf(1 - design.level)), users, baseline, design),
        sequential=_detectable(boundary(users, design.level, planned_users), users, baseline, design),
    )


def _detectable(z: float, users: float, baseline: Baseline, design: AbDesign) -> float | None:
    """The gain that so many users find, as a share of the mean; None where they find none, however large."""
    found = (z + float(stats.norm.ppf(design.power))) * baseline.standard_deviation / baseline.mean
    of_treatment, of_control = (
        found**2 / (share * users) for share in (design.treatment_share, 1 - design.treatment_share)
    )
    if of_treatment >= 1:
        return None
    return (of_treatment + math.sqrt(of_treatment + of_control - of_treatment * of_control)) / (1 - of_treatment)
