"""Looks in Evidently's workspace, read again by Evidently."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from components.errors import InputError
from monitoring.drift_tests import Sample
from monitoring.workspace import add_look

NOON = datetime(2026, 11, 2, 12, tzinfo=UTC)


def sample(n: int) -> Sample:
    rng = np.random.default_rng(n)
    devices = np.array(["desktop", "phone", None], dtype=object)
    nothing = np.full(n, np.nan)
    columns = {"reward": rng.normal(size=n), "device": devices[rng.integers(3, size=n)], "unknown": nothing}
    return Sample(np.arange(n), np.zeros(n, dtype=np.int64), columns)


def test_the_newest_looks_stay_with_their_figures_under_one_project(tmp_path: Path) -> None:
    from evidently.ui.workspace import Workspace

    for hour, before in enumerate((None, sample(300), sample(300), sample(300))):
        added = add_look(
            tmp_path / "evidently", "shop", at=NOON + timedelta(hours=hour), before=before, now=sample(200),
            figures={"reward": float(hour), "moved_share": 0.25, "entropy": float("nan")}, kept=2,
        )  # fmt: skip
    space = Workspace.create(str(tmp_path / "evidently"))
    (project,) = space.search_project("shop")
    runs = [space.get_run(project.id, run) for run in space.list_runs(project.id)]
    assert sorted(run.timestamp for run in runs if run is not None) == [
        NOON + timedelta(hours=2),
        NOON + timedelta(hours=3),
    ]
    assert added in map(str, space.list_runs(project.id))
    newest = space.get_run(project.id, added)
    assert newest is not None
    shown = {result.display_name: result for result in newest.metric_results.values()}
    assert any("look.reward" in name for name in shown) and any("device" in name for name in shown)
    assert not any("unknown" in name or "look.entropy" in name for name in shown)


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file/evidently: cannot be made"):
        add_look(tmp_path / "file" / "evidently", "shop", at=NOON, before=None, now=sample(10), figures={})
