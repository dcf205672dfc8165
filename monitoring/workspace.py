"""Evidently's workspace: a project for each loop, to which every look adds a run; `evidently ui` shows them.

A run holds Evidently's own PSI of each column on samples of both sides, and the look's figures as means of columns that
hold nothing else, so that any installation of Evidently can read them. What is decided, and from how many requests,
stands in the look.
"""

import warnings
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from components.errors import InputError
from monitoring.drift_tests import Sample

if TYPE_CHECKING:
    from evidently.core.report import Snapshot
    from evidently.ui.workspace import Project

#: Looks that are kept of a loop, the newest. The page of a project reads all its runs: thousands make it slow.
KEPT_LOOKS = 500
#: Requests of each side that Evidently is shown.
SHOWN = 5_000
FIGURE = "look."
#: Panels by title: what they say, and the figures that they draw.
PANELS: dict[str, tuple[str, tuple[str, ...]]] = {
    "Moved": ("Share of the tests of a look that found a move.", ("moved_share",)),
    "Alarm": ("1 where the look raised one.", ("alarm",)),
    "Reward": ("Mean reward of a request.", ("reward",)),
    "Clicks and purchases": ("Rate of the positions.", ("click_rate", "purchase_rate")),
    "Effective requests": ("Share of the requests that are effective for the champion.", ("effective_share",)),
    "Exploration": ("Entropy of the champion's first choice, nats.", ("entropy",)),
    "Volume": ("Requests of the window.", ("requests",)),
    "Delay": ("Seconds until the first feedback, mean.", ("feedback_seconds",)),
    "User model": ("Nats by which it misses the clicks.", ("user_model_nats",)),
}


def add_look(
    workspace: Path,
    loop: str,
    *,
    at: datetime,
    before: Sample | None,
    now: Sample,
    figures: Mapping[str, float],
    kept: int = KEPT_LOOKS,
) -> str:
    """Add a look to the loop's project, made with its panels where it is not there; returns the run's id.

    Args:
        workspace: folder of the workspace.
        loop: name of the project.
        at: time of the look.
        before: the side that was compared with; None where there is none yet.
        now: the window.
        figures: numbers of the look by name; panels draw those that `PANELS` names.
        kept: runs that the project keeps, the newest.

    Raises:
        InputError: the folder cannot be written.
    """
    from evidently.ui.workspace import Workspace  # takes seconds

    try:
        workspace.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{workspace}: cannot be made: {error.strerror}; set SLATELOOP_HOME") from None
    space = Workspace.create(str(workspace))
    found = [project for project in space.search_project(loop) if project.name == loop]
    project = found[0] if found else _new_project(space, loop)
    run = space.add_run(project.id, _snapshot(before, now, figures, at), include_data=False)
    # Names of runs grow with time.
    for old in sorted(space.list_runs(project.id), key=str)[:-kept]:
        space.delete_run(project.id, old)
    return str(run.id)


def _new_project(space: Any, loop: str) -> "Project":
    from evidently.sdk.models import DashboardPanelPlot, PanelMetric

    project = space.create_project(loop, description=f"Looks at the traffic of loop {loop}.")
    for title, (subtitle, names) in PANELS.items():
        values = [
            PanelMetric(legend=name, metric="MeanValue", metric_labels={"column": FIGURE + name}) for name in names
        ]
        project.dashboard.add_panel(
            DashboardPanelPlot(
                title=title, subtitle=subtitle, size="half", values=values, plot_params={"plot_type": "line"}
            )
        )
    project.save()
    return project


def _snapshot(before: Sample | None, now: Sample, figures: Mapping[str, float], at: datetime) -> "Snapshot":
    from evidently import DataDefinition, Dataset, Report
    from evidently.metrics import MeanValue, ValueDrift

    current, reference = _frame(now), None if before is None else _frame(before)
    known = [name for name in current.columns if current[name].notna().any()]
    compared = (
        [] if reference is None else [name for name in known if name in reference and reference[name].notna().any()]
    )
    drawn = {FIGURE + name: value for name, value in figures.items() if np.isfinite(value)}
    current = current[compared].assign(**drawn) if len(current) else pd.DataFrame([drawn])
    numbers = [name for name in current.columns if pd.api.types.is_numeric_dtype(current[name])]
    definition = DataDefinition(
        numerical_columns=numbers, categorical_columns=[name for name in current.columns if name not in numbers]
    )
    # A report shows them in this order: what can be looked at before what only feeds the panels.
    report = Report(
        [*(ValueDrift(column=name, method="psi") for name in compared), *(MeanValue(column=name) for name in drawn)]
    )
    with warnings.catch_warnings(), np.errstate(invalid="ignore", divide="ignore"):
        # Evidently draws columns that do not vary, too, and numpy complains of each.
        warnings.simplefilter("ignore", RuntimeWarning)
        return report.run(
            Dataset.from_pandas(current, data_definition=definition),
            None
            if reference is None
            else Dataset.from_pandas(reference[compared].assign(**drawn), data_definition=definition),
            timestamp=at,
        )


def _frame(sample: Sample) -> pd.DataFrame:
    """Requests that lie evenly in a sample, so many as Evidently is shown."""
    rows = np.unique(np.linspace(0, len(sample.user) - 1, min(SHOWN, len(sample.user))).astype(np.int64))
    return pd.DataFrame({name: values[rows] for name, values in sample.columns.items()})
