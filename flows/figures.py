"""Figures of the report: matplotlib drawings as inline SVG. Text stays text, and the same data give the same bytes.

What is seen is told by shape, position and words; color only repeats it.
"""

import io
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import numpy as np
from jaxtyping import Float
from markupsafe import Markup
from scipy import stats

from components.evaluation.cap_sensitivity import CapSensitivity
from components.evaluation.exploit_probes import Probe
from components.evaluation.policy_value import Estimand, PolicyValue
from components.evaluation.world_model_trust import Calibration
from components.experiment.ab import AbResult
from components.experiment.gate import GateConfig
from components.experiment.ledger import Score
from components.experiment.sequential import ConfidenceSequence
from flows.numbers import interval, number, share
from flows.run_record import Curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

#: Inches; on the page an inch is 96 pixels, so this fills its width.
_WIDTH = 9.0
_INK, _QUIET, _FAINT, _ACCENT = "#1d2126", "#5b636d", "#d5d9de", "#1f5f99"
#: Keys are matplotlib's rcParams.
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "slateloop",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _QUIET,
    "axes.linewidth": 0.8,
    "axes.labelcolor": _QUIET,
    "axes.titlesize": 9.5,
    "text.color": _INK,
    "xtick.color": _QUIET,
    "ytick.color": _QUIET,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
}
_NAME_LENGTH = 22
#: Said wherever an estimate is shown that rests on fitted probabilities.
ESTIMATED = "propensities estimated"


@dataclass(frozen=True)
class Figure:
    """A drawing, and in a sentence what is seen on it."""

    svg: Markup
    caption: str

    @property
    def file(self) -> str:
        """The drawing as a file of its own, on white."""
        return str(self.svg).replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg" style="background: white"', 1)


def needed_ess(estimate: PolicyValue, gate: GateConfig) -> float | None:
    """Effective sample size from which an estimate counts; None where it never does."""
    if estimate.estimand is Estimand.SESSION_AVERAGE:
        return None
    return gate.ess_floor(estimate.n_units)


def forest(estimates: Sequence[PolicyValue], *, challenger: str, gate: GateConfig) -> Figure:
    """Values of one estimand with their intervals, against the logged mean.

    Args:
        estimates: at least one, all of the same estimand.
        challenger: the policy that is drawn in the accent color.
        gate: its ESS floor is written beside each estimate.
    """
    estimand = estimates[0].estimand
    n = len(estimates)
    top, bottom, row = 0.4, 0.5, 0.56
    height = top + n * row + bottom
    with _canvas(_WIDTH, height) as canvas:
        axes = canvas.add_axes((0.235, bottom / height, 0.365, n * row / height))
        axes.set(ylim=(n - 0.5, -0.5), yticks=[], xlabel=f"Reward per {_unit(estimand)}")
        axes.locator_params(axis="x", nbins=6)
        axes.spines["left"].set_visible(False)
        logged = estimates[0].behavior_value
        axes.axvline(logged, color=_QUIET, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        axes.annotate(
            f"logged mean {number(logged)}",
            (logged, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 4),
            textcoords="offset points",
            ha="center",
            color=_QUIET,
            fontsize=8.5,
        )
        for position, estimate in enumerate(estimates):
            color = _ACCENT if estimate.policy == challenger else _INK
            _interval(axes, position, estimate.value, estimate.lower, estimate.upper, color)
            role = "challenger, " if estimate.policy == challenger else ""
            _beside(axes, position, -0.03, "right", _short(estimate.policy), f"{role}{estimate.estimator}", color)
            _beside(axes, position, 1.04, "left", _value_text(estimate), _weight_text(estimate, gate), _INK)
            if estimate.propensities_estimated:
                _below(axes, position, 1.04, ESTIMATED)
        axes.margins(x=0.08)
        return _finish(canvas, f"forest-{estimand.value}", _forest_caption(estimates))


def _unit(estimand: Estimand) -> str:
    return "session" if estimand is Estimand.SESSION else "request"


def _value_text(estimate: PolicyValue) -> str:
    if estimate.lower is None or estimate.upper is None:
        return f"{number(estimate.value)} (no interval claimed)"
    return f"{number(estimate.value)} ({interval(estimate.lower, estimate.upper)})"


def _weight_text(estimate: PolicyValue, gate: GateConfig) -> str:
    floor, size = needed_ess(estimate, gate), estimate.effective_sample_size
    if floor is None:
        verdict = "never gates"
    elif size < floor:
        verdict = f"below its floor {number(floor)}"
    else:
        verdict = f"floor {number(floor)}"
    return f"ESS {size:,.0f}, {verdict}; {share(estimate.cap_share)} capped"


def _forest_caption(estimates: Sequence[PolicyValue]) -> str:
    first = estimates[0]
    parts = [f"{estimate.policy} {_value_text(estimate)} by {estimate.estimator}" for estimate in estimates]
    closed = any(estimate.lower is not None for estimate in estimates)
    marks = [f"lines are {first.confidence:.0%} intervals"] if closed else []
    marks += ["open marks claim none"] if any(estimate.lower is None for estimate in estimates) else []
    marks += [ESTIMATED] if any(estimate.propensities_estimated for estimate in estimates) else []
    return (
        f"Estimated reward per {_unit(first.estimand)}: {'; '.join(parts)}. The dashed line is what the policy that "
        f"wrote the log earned, {number(first.behavior_value)}; {', '.join(marks)}."
    )


def cap_sensitivity(curve: CapSensitivity) -> Figure:
    """The gating estimate along the grid of caps; the cap of the literature and the gate's are marked."""
    caps = [point.cap for point in curve.points]
    with _canvas(_WIDTH * 0.75, 2.7) as canvas:
        (axes,) = _panels(canvas, 1, 1)
        lower, upper = ([getattr(point, end) for point in curve.points] for end in ("lower", "upper"))
        if None not in lower:
            axes.fill_between(caps, lower, upper, color=_FAINT, alpha=0.55, linewidth=0)
        axes.plot(caps, [point.value for point in curve.points], "o-", color=_ACCENT, markersize=4, linewidth=1.2)
        _log_axis(axes, [10.0**power for power in range(9) if caps[0] <= 10.0**power <= caps[-1]])
        axes.set(xlabel="cap on a request's weight", ylabel="reward per request")
        for cap, name in ((curve.usual_cap, "usual cap"), (curve.gating_cap, "gate's cap")):
            axes.axvline(cap, color=_QUIET, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
            axes.annotate(
                f"{name} {number(cap, 3)}",
                (cap, 1.0),
                xycoords=("data", "axes fraction"),
                xytext=(3, 2),
                textcoords="offset points",
                color=_QUIET,
                fontsize=8.5,
            )
        marked = {
            name: next(point for point in curve.points if point.cap == cap)
            for name, cap in (("usual cap", curve.usual_cap), ("gate's cap", curve.gating_cap))
        }
        texts = [
            f"{number(point.value)} at the {name} {number(point.cap, 3)} ({share(point.cap_share)} of requests cut)"
            for name, point in marked.items()
        ]
        return _finish(
            canvas,
            "caps",
            f"One-request NCIS of {curve.policy} under different caps: {'; '.join(texts)}. A value that moves with the "
            "cap rests on few requests; the band is the interval under each cap.",
        )


@dataclass(frozen=True)
class ErrorPoint:
    """Relative error of an estimator on logs of one size."""

    n_sessions: int
    bias: float
    standard_error: float
    """Of the bias."""
    root_mean_square: float


def bias_and_error(curves: Mapping[str, Sequence[ErrorPoint]], *, title: str) -> Figure:
    """Bias and error of estimators against the size of a log, as shares of the true value."""
    markers = "osD^vP"
    with _canvas(_WIDTH, 3.4) as canvas:
        left, right = _panels(canvas, 1, 2)
        for (name, points), marker in zip(curves.items(), markers, strict=False):
            sizes = [point.n_sessions for point in points]
            style: dict[str, Any] = {"marker": marker, "markersize": 4.5, "linewidth": 1.2, "label": name}
            left.errorbar(
                sizes, [point.bias for point in points], [1.96 * point.standard_error for point in points], **style
            )
            right.plot(sizes, [point.root_mean_square for point in points], **style)
        for axes, label in ((left, "bias / true value"), (right, "root mean square error / true value")):
            _log_axis(axes, sorted({point.n_sessions for points in curves.values() for point in points}))
            axes.set(xlabel="sessions of a log", ylabel=label)
            axes.axhline(0, color=_QUIET, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        left.set_title(title, loc="left")
        right.legend(frameon=False, fontsize=8.5, loc="upper left", bbox_to_anchor=(1.0, 1.0))
        last = "; ".join(
            f"{name} bias {share(points[-1].bias, signed=True)}, error {share(points[-1].root_mean_square)}"
            for name, points in curves.items()
        )
        return _finish(
            canvas, "errors", f"Errors of one-request estimates by the size of a log. At the largest: {last}."
        )


def calibrations(parts: Sequence[Calibration]) -> Figure:
    """Predicted against observed rates, one panel for each response; on the diagonal they agree."""
    with _canvas(min(_WIDTH, 3.0 * len(parts)), 2.9) as canvas:
        for axes, part in zip(_panels(canvas, 1, len(parts)), parts, strict=True):
            highest = max(*part.predicted, *part.observed) * 1.08 or 1.0
            lowest = min(*part.predicted, *part.observed)
            lowest = 0.0 if lowest < 0.4 * highest else lowest * 0.92
            axes.plot([lowest, highest], [lowest, highest], color=_QUIET, linewidth=1, linestyle=(0, (4, 3)))
            axes.plot(part.predicted, part.observed, "o-", color=_ACCENT, markersize=4.5, linewidth=1)
            axes.set(xlim=(lowest, highest), ylim=(lowest, highest), aspect="equal")
            axes.set(xlabel="predicted rate", ylabel="observed rate")
            axes.set_title(f"{part.response}: off by {number(part.error, 2)}", loc="left")
            axes.locator_params(nbins=4)
        errors = "; ".join(
            f"{part.response} off by {number(part.error, 2)} on average over {part.n:,} predictions" for part in parts
        )
        return _finish(
            canvas,
            "calibration",
            f"What the world model predicts against what happened on sessions it never saw: {errors}. "
            "On the dashed diagonal the two agree.",
        )


def exploit_probes(probes: Sequence[Probe], *, challenger: str) -> Figure:
    """Each policy's value by the world model (diamond) and by the log (dot with its interval), joined by the gap.

    Args:
        probes: at least one.
        challenger: the policy that is drawn in the accent color.
    """
    n = len(probes)
    top, bottom, row = 0.4, 0.5, 0.5
    height = top + n * row + bottom
    with _canvas(_WIDTH, height) as canvas:
        axes = canvas.add_axes((0.235, bottom / height, 0.365, n * row / height))
        axes.set(ylim=(n - 0.5, -0.5), yticks=[], xlabel="Reward per request")
        axes.locator_params(axis="x", nbins=6)
        axes.spines["left"].set_visible(False)
        for position, probe in enumerate(probes):
            color = _ACCENT if probe.policy == challenger else _INK
            log, counts = probe.log_value, probe.weighed
            axes.plot([log.value, probe.model_value], [position, position], ":", color=color, linewidth=1.2, zorder=1)
            _interval(axes, position, log.value, log.lower if counts else None, log.upper if counts else None, color)
            axes.plot(
                [probe.model_value], [position], "D", color=color, markerfacecolor="white", markersize=6, zorder=4
            )
            role = "challenger" if probe.policy == challenger else f"{probe.support.divergence:.2f} nats away"
            _beside(axes, position, -0.03, "right", _short(probe.policy), role, color)
            size = f"ESS {log.effective_sample_size:,.0f}{'' if counts else ', too few to count'}"
            _beside(axes, position, 1.04, "left", _gap_text(probe), size, _INK)
        axes.margins(x=0.08)
        values = "; ".join(
            f"{probe.policy} {number(probe.model_value)} by the world model, {number(probe.log_value.value)} by the log"
            for probe in probes
        )
        return _finish(
            canvas,
            "probes",
            "Reward per request by the world model (diamond) and by the log (dot; the line is its interval, an open "
            f"dot has too few effective requests to count): {values}. Where the diamond lies clearly to the right of "
            "the interval, a policy can live off an error of the world model.",
        )


def _gap_text(probe: Probe) -> str:
    bounds = (
        "no interval claimed" if probe.gap_lower is None else interval(probe.gap_lower, probe.gap_upper, 3, signed=True)
    )
    return f"gap {number(probe.gap, 3, signed=True)} ({bounds})"


def learning_curves(curves: Sequence[Curve]) -> Figure:
    """Small multiples, one panel for each curve."""
    from matplotlib.ticker import MaxNLocator

    columns = min(3, len(curves))
    rows = -(-len(curves) // columns)
    with _canvas(_WIDTH * columns / 3, 2.3 * rows) as canvas:
        for axes, curve in zip(_panels(canvas, rows, columns), curves, strict=False):
            steps = range(1, len(curve.values) + 1)
            axes.plot(steps, curve.values, color=_ACCENT, linewidth=1.4, marker="o" if len(steps) < 15 else "", ms=3)
            axes.set_title(textwrap.shorten(curve.name, 42, placeholder="…"), loc="left")
            axes.set(xlabel=curve.x, ylabel=textwrap.fill(curve.y, 28))
            axes.locator_params(axis="y", nbins=4)
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            axes.grid(axis="y", color=_FAINT, linewidth=0.6)
            axes.margins(x=0.04, y=0.15)
        for axes in canvas.axes[len(curves) :]:
            axes.remove()
        ends = "; ".join(
            f"{curve.name} from {number(curve.values[0], 3)} to {number(curve.values[-1], 3)}"
            if curve.values
            else f"{curve.name} has no steps"
            for curve in curves
        )
        return _finish(canvas, "curves", f"How training went, from the first step to the last: {ends}.")


@dataclass(frozen=True)
class CurveOfSeeds:
    """What several seeds of one method gave while they learned; seeds may be looked at in different places."""

    name: str
    places: tuple[Float[np.ndarray, " L"], ...]
    """Of the looks of each seed on the x axis, ascending."""
    values: tuple[Float[np.ndarray, " L"], ...]

    def band(self) -> tuple[Float[np.ndarray, " P"], Float[np.ndarray, " P"], Float[np.ndarray, " P"] | None]:
        """Places that all seeds reached, the mean there, and half of Student's 95 % interval of several seeds."""
        first, last = max(x[0] for x in self.places), min(x[-1] for x in self.places)
        longest = max(self.places, key=len)
        places = np.unique(np.clip(longest, first, max(first, last)))
        of_seeds = np.stack([np.interp(places, x, y) for x, y in zip(self.places, self.values, strict=True)])
        n = len(of_seeds)
        half = None
        if n > 1:
            half = stats.t.ppf(0.975, n - 1) * of_seeds.std(0, ddof=1) / np.sqrt(n)
        return places, of_seeds.mean(0), half


def curves_of_seeds(panels: Sequence[Sequence[CurveOfSeeds]], *, x: str, y: str) -> Figure:
    """Means over seeds with bands of their 95 % intervals, in panels beside each other."""
    markers = "osD^vP*XhH<>"
    ends = []
    with _canvas(_WIDTH, 3.4 * len(panels)) as canvas:
        for axes, curves in zip(_panels(canvas, len(panels), 1), panels, strict=True):
            powers: set[float] = set()
            for curve, marker in zip(curves, markers * len(curves), strict=False):
                places, mean, half = curve.band()
                (line,) = axes.plot(
                    places, mean, marker=marker, markersize=3.5, markevery=3, linewidth=1.2, label=curve.name
                )
                if half is not None:
                    axes.fill_between(places, mean - half, mean + half, color=line.get_color(), alpha=0.2, linewidth=0)
                powers |= {10.0**power for power in range(-3, 9) if places[0] <= 10.0**power <= places[-1]}
                ends.append(f"{curve.name} {number(mean[-1], 3)}")
            _log_axis(axes, sorted(powers))
            axes.set(xlabel=x, ylabel=y, ylim=(-0.03, 1.03))
            axes.grid(axis="y", color=_FAINT, linewidth=0.6)
            axes.legend(frameon=False, fontsize=8.5, loc="upper left", bbox_to_anchor=(1.0, 1.0))
        return _finish(
            canvas,
            f"seeds-{x.replace(' ', '-')}",
            f"{y} against {x}, means and 95 % intervals over seeds. At the end: {'; '.join(ends)}.",
        )


def ab_difference(ab: AbResult) -> Figure:
    """The difference of the arms with its interval, against 0 and against what an A/B of this size can detect."""
    height = 1.75
    with _canvas(_WIDTH, height) as canvas:
        axes = canvas.add_axes((0.03, 0.5 / height, 0.94, 0.75 / height))
        axes.set(ylim=(-0.5, 0.5), yticks=[], xlabel=f"Reward per session: {ab.treatment} minus {ab.control}")
        axes.spines["left"].set_visible(False)
        detectable = ab.minimum_detectable_effect
        axes.axvspan(-detectable, detectable, color=_FAINT, alpha=0.55, linewidth=0, zorder=0)
        axes.axvline(0, color=_QUIET, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        _interval(axes, 0, ab.difference, ab.lower, ab.upper, _ACCENT)
        text = f"{number(ab.difference, 3, signed=True)} ({interval(ab.lower, ab.upper, 3, signed=True)})"
        axes.annotate(
            text,
            (ab.difference, 0),
            xytext=(0, 8),
            textcoords="offset points",
            ha="center",
            color=_ACCENT,
            weight="bold",
        )
        reach = 1.25 * max(abs(ab.lower), abs(ab.upper), detectable) or 1.0
        axes.set_xlim(-reach, reach)
        for place, alignment, better in (
            (0.0, "left", f"← {ab.control} better"),
            (1.0, "right", f"{ab.treatment} better →"),
        ):
            axes.annotate(
                better,
                (place, 1.0),
                xycoords="axes fraction",
                xytext=(0, 8),
                textcoords="offset points",
                ha=alignment,
                color=_QUIET,
            )
        return _finish(
            canvas,
            "ab",
            f"{ab.treatment} minus {ab.control}, in reward per session: {text}, a {ab.confidence:.0%} interval. The "
            f"dashed line is no difference; the shaded band is what an A/B of this size would often miss (below "
            f"{number(detectable, 3)}).",
        )


def ledger_points(scores: Sequence[Score], *, run: str) -> Figure:
    """Offline differences against those of the A/Bs that followed, one panel for each score.

    Args:
        scores: at least one, each with at least one point.
        run: the run that is marked.
    """
    columns = min(3, len(scores))
    rows = -(-len(scores) // columns)
    with _canvas(max(_WIDTH * columns / 3, 4.2), 3.2 * rows) as canvas:
        for axes, score in zip(_panels(canvas, rows, columns), scores, strict=False):
            axes.axhline(0, color=_QUIET, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
            axes.axvline(0, color=_QUIET, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
            for point in score.points:
                own = point.run == run
                color = _ACCENT if own else _INK
                axes.plot([point.offline] * 2, [point.ab_lower, point.ab_upper], color=color, linewidth=1.2, zorder=2)
                axes.plot(
                    [point.offline],
                    [point.ab],
                    "D" if own else "o",
                    color=color,
                    markerfacecolor=color if point.ab_lower > 0 or point.ab_upper < 0 else "white",
                    markersize=8 if own else 5.5,
                    zorder=4 if own else 3,
                )
            axes.set_title(f"{score.label}: {score.n} A/B{'' if score.n == 1 else 's'}", loc="left")
            axes.set(xlabel=f"offline: {score.judge}", ylabel="A/B: reward per session")
            axes.locator_params(nbins=5)
            axes.margins(x=0.15, y=0.12)
        for axes in canvas.axes[len(scores) :]:
            axes.remove()
        return _finish(canvas, "ledger", _ledger_caption(scores, run))


def _ledger_caption(scores: Sequence[Score], run: str) -> str:
    own = [point for score in scores for point in score.points if point.run == run]
    marked = "".join(
        f" The diamond is this run: offline {number(point.offline, 3, signed=True)}, in the A/B "
        f"{number(point.ab, 3, signed=True)}."
        for point in own[:1]
    )
    return (
        "What was predicted against what the A/B then showed; in the upper right and lower left they agree. Lines are "
        f"the A/Bs' intervals, open marks A/Bs that were not decided.{marked}"
    )


def confidence_sequence(ab: AbResult, sequence: ConfidenceSequence) -> Figure:
    """The difference at each look with its bounds, which hold at all looks together."""
    from matplotlib.ticker import MaxNLocator

    looks = sequence.looks
    days = [look.day for look in looks]
    with _canvas(_WIDTH, 2.6) as canvas:
        (axes,) = _panels(canvas, 1, 1)
        axes.axhline(0, color=_QUIET, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        axes.fill_between(
            days,
            [look.lower for look in looks],
            [look.upper for look in looks],
            color=_FAINT,
            alpha=0.55,
            linewidth=0,
            zorder=0,
        )
        for look in looks:
            axes.plot([look.day] * 2, [look.lower, look.upper], "_-", color=_ACCENT, linewidth=1.2, markersize=7)
        axes.plot(days, [look.difference for look in looks], "o-", color=_ACCENT, linewidth=1.2, markersize=5, zorder=3)
        axes.set(xlabel="day", ylabel=textwrap.fill(f"{ab.treatment} minus {ab.control}, reward per session", 28))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.locator_params(axis="y", nbins=5)
        axes.margins(x=0.03)
        last = looks[-1]
        return _finish(
            canvas,
            "looks",
            f"{ab.treatment} minus {ab.control} as it stood at each look: with {sequence.confidence:.0%} probability "
            f"all intervals hold the true difference at once, so one may look every day. At the last look, day "
            f"{last.day} with {last.n_users:,} users, it was {number(last.difference, 3, signed=True)} "
            f"({interval(last.lower, last.upper, 3, signed=True)}).",
        )


def _log_axis(axes: "Axes", ticks: Sequence[float]) -> None:
    """A logarithmic x axis with plain numbers at the ticks: matplotlib's own labels are math, which stays unparsed."""
    from matplotlib.ticker import NullLocator

    axes.set_xscale("log")
    axes.set_xticks(ticks, [number(tick) for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())


def _interval(
    axes: "Axes", position: float, value: float, lower: float | None, upper: float | None, color: str
) -> None:
    """A value with its interval, or an open mark where there is none."""
    if lower is None or upper is None:
        axes.plot([value], [position], "o", color=color, markerfacecolor="white", markersize=7, zorder=3)
        return
    axes.plot([lower, upper], [position, position], "|-", color=color, linewidth=1.8, markersize=8, zorder=2)
    axes.plot([value], [position], "o", color=color, markersize=7, zorder=3)


def _beside(axes: "Axes", position: int, place: float, alignment: str, title: str, text: str, color: str) -> None:
    """Two lines of text beside a row: a title, and quieter what belongs to it."""
    for line, lift, style in (
        (title, 2, {"weight": "bold", "color": color}),
        (text, -10, {"fontsize": 8.5, "color": _QUIET}),
    ):
        axes.annotate(
            line,
            (place, position),
            xycoords=("axes fraction", "data"),
            xytext=(0, lift),
            textcoords="offset points",
            ha=alignment,
            **style,
        )


def _below(axes: "Axes", position: int, place: float, text: str) -> None:
    """A third line beside a row: what must not be overlooked."""
    axes.annotate(
        f"▲ {text}",
        (place, position),
        xycoords=("axes fraction", "data"),
        xytext=(0, -21),
        textcoords="offset points",
        fontsize=8.5,
        color=_INK,
    )


def _short(name: str) -> str:
    return name if len(name) <= _NAME_LENGTH else name[: _NAME_LENGTH - 1] + "…"


@contextmanager
def _canvas(width: float, height: float) -> Iterator["Canvas"]:
    """A canvas in our style, in inches. No window system and no global figure is touched."""
    import matplotlib
    from matplotlib.figure import Figure as Canvas

    with matplotlib.rc_context(_STYLE):
        yield Canvas(figsize=(width, height))


def _panels(canvas: "Canvas", rows: int, columns: int) -> list["Axes"]:
    canvas.set_layout_engine("constrained", w_pad=0.12, h_pad=0.12)
    panels = canvas.subplots(rows, columns, squeeze=False)
    return list(panels.flat)


def _finish(canvas: "Canvas", name: str, caption: str) -> Figure:
    """The drawing as an `<svg>` element that may stand beside others: without namespaces, and with ids of its own."""
    file = io.StringIO()
    canvas.savefig(file, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    root = ElementTree.fromstring(file.getvalue())
    for element in root.iter():
        element.tag = _local(element.tag)
        element.attrib = {_local(key): _own_ids(value, _local(key), name) for key, value in element.attrib.items()}
    root.attrib |= {"role": "img", "aria-label": caption}
    # Both matplotlib and ElementTree escape the texts that are drawn.
    return Figure(svg=Markup(ElementTree.tostring(root, encoding="unicode")), caption=caption)


def _local(name: str) -> str:
    return name.rpartition("}")[2]


def _own_ids(value: str, attribute: str, name: str) -> str:
    if attribute == "id":
        return f"{name}-{value}"
    if attribute == "href":
        return value.replace("#", f"#{name}-", 1)
    return value.replace("url(#", f"url(#{name}-")
