"""Guardrails: metrics that a challenger must not harm, whatever it earns.

A guardrail asks for non-inferiority within a relative margin m: that the challenger's mean is at least (1 − m) times
the control's, or at most (1 + m) times where less is better. What is tested is the slack

    s = T − (1 − m) C   or   s = (1 + m) C − T

by its one-sided bounds: non-inferior where the lower one is at least 0, inferior where the upper one is below 0, and
unclear between. Every guardrail must hold, so each may use the whole level: a challenger that is inferior in any of
them passes all with at most that probability (intersection-union test; Berger 1982).
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

import numpy as np
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field

from components.experiment.arm import ArmMean, Contrast, fixed_bounds
from components.experiment.sequential import sequential_bounds
from components.interactions.batching import SessionBatch


class Metric(StrEnum):
    """What is guarded, each a mean over sessions."""

    SESSION_LENGTH = "session_length"
    CLICKS = "clicks"
    PURCHASES = "purchases"
    FIRST_REQUEST_EXITS = "first_request_exits"

    @property
    def text(self) -> str:
        """The metric in words."""
        return _TEXTS[self]

    @property
    def less_is_better(self) -> bool:
        """Whether a smaller mean is the better one."""
        return self is Metric.FIRST_REQUEST_EXITS


_TEXTS = {
    Metric.SESSION_LENGTH: "requests of a session",
    Metric.CLICKS: "clicks of a session",
    Metric.PURCHASES: "purchases of a session",
    Metric.FIRST_REQUEST_EXITS: "share of sessions left after the first request",
}


class GuardrailMargins(BaseModel):
    """By which share of the control's mean a challenger may be worse. Bounds let margins shrink, never grow."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    session_length: float = Field(default=0.05, gt=0, le=0.05, description="Fewer requests of a session.")
    clicks: float = Field(default=0.05, gt=0, le=0.05, description="Fewer clicks of a session.")
    # Rarer events: an A/B that finds 5 % of the reward knows these less precisely.
    purchases: float = Field(default=0.1, gt=0, le=0.1, description="Fewer purchases of a session.")
    first_request_exits: float = Field(
        default=0.1, gt=0, le=0.1, description="More sessions that are left after the first request."
    )

    def of(self, metric: Metric) -> float:
        """The margin of a metric."""
        margin: float = getattr(self, metric.value)
        return margin


class Guardrail(BaseModel):
    """One guarded metric in both arms."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    metric: Metric = Field(description="What is guarded.")
    treatment: ArmMean = Field(description="Its mean over the treatment's sessions.")
    control: ArmMean = Field(description="Its mean over the control's sessions.")


@dataclass(frozen=True)
class GuardrailVerdict:
    """What a guardrail showed against its margin. Changes are shares of the control's mean; None where that is 0."""

    verdict: Literal["non-inferior", "inferior", "unclear"]
    change: float | None
    """Treatment over control, minus 1."""
    worst_change: float | None
    """The change at its worse bound: within the margin where the verdict is non-inferior."""


def judge_guardrail(
    guardrail: Guardrail, margin: float, level: float, planned_sessions: int | None = None
) -> GuardrailVerdict:
    """Judge a metric against its margin.

    Args:
        guardrail: the metric in both arms.
        margin: share of the control's mean by which the treatment may be worse.
        level: of each one-sided bound.
        planned_sessions: given where the bounds must hold at every look; None for bounds at the planned end.
    """
    treatment, control = guardrail.treatment, guardrail.control
    sign, factor = (-1.0, 1.0 + margin) if guardrail.metric.less_is_better else (1.0, 1.0 - margin)
    contrast = Contrast.between(treatment, control, factor)
    around = (
        fixed_bounds(contrast, level)
        if planned_sessions is None
        else sequential_bounds(contrast, level, planned_sessions)
    )
    least, most = (around.lower, around.upper) if sign > 0 else (-around.upper, -around.lower)
    return GuardrailVerdict(
        verdict="non-inferior" if least >= 0 else "inferior" if most < 0 else "unclear",
        change=treatment.mean / control.mean - 1.0 if control.mean else None,
        worst_change=sign * (least / control.mean - margin) if control.mean else None,
    )


def session_metrics(batch: SessionBatch) -> dict[Metric, Float[np.ndarray, " B"]]:
    """The guarded metrics of each session."""
    exits = (batch.lengths == 1) & batch.left[:, 0]
    columns = {
        Metric.SESSION_LENGTH: batch.lengths,
        Metric.CLICKS: batch.clicks.sum((1, 2)),
        Metric.PURCHASES: batch.purchases.sum((1, 2)),
        Metric.FIRST_REQUEST_EXITS: exits,
    }
    return {metric: values.double().numpy() for metric, values in columns.items()}
