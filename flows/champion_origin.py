"""What the run that made a policy left of itself: its drift reference, its user model, the log that it learned from.

A package cannot name the reference: it is made before it. The run's own `lineage.json` names both, the policy's tag and
the stages' keys, so it is looked for there. The newest run that made the tag counts, since the same lineage makes the
same policy again.
"""

from dataclasses import dataclass
from pathlib import Path

import polars as pl

from components.errors import InputError
from components.interactions.log_folder import open_log
from components.interactions.splits import TRAIN
from components.world_model.user_model_folder import StoredUserModel, load_user_model
from flows.run_folder import past_runs, read_lineage
from flows.settings import PlatformSettings
from flows.stage_store import StageStore
from monitoring.drift_tests import Sample
from monitoring.traffic_watch import read_reference


@dataclass(frozen=True)
class Origin:
    """What is still there of the run that made a policy."""

    reference: Sample | None = None
    user_model: StoredUserModel | None = None
    items: pl.DataFrame | None = None
    missing: tuple[str, ...] = ()
    """What is not, in sentences."""


def find_origin(tag: str, settings: PlatformSettings) -> Origin:
    """The origin of a policy, by its exact tag.

    Raises:
        InputError: a run's lineage is damaged.
    """
    runs = [Path(run.folder) for run in past_runs(settings.runs)][::-1]
    for run in runs:
        lineage = read_lineage(run)
        if tag in (lineage.get("policy_tag"), lineage.get("baseline_tag")):
            return _read(run, lineage.get("stages", {}), StageStore(settings.home.resolve() / "stages"))
    return Origin(
        missing=(
            f"no run in {settings.runs} made {tag}: there is no drift reference, so what users bring is not compared "
            "with the log that it learned from, and no user model is asked",
        )
    )


def _read(run: Path, stages: dict[str, str], store: StageStore) -> Origin:
    reference, user_model, items, missing = None, None, None, []
    try:
        reference = read_reference(run / "drift_reference" / "reference")
    except InputError as error:
        missing.append(f"what users bring is not compared with the log that was learned from: {error}")
    users = stages.get("user-model", "")
    if store.is_complete("user-model", users):
        user_model = load_user_model(store.folder("user-model", users))
    else:
        missing.append(f"the user model is not asked: {run.name}'s stage user-model is not in {store.root} any more")
    split = stages.get("split", "")
    if store.is_complete("split", split):
        items = open_log(store.folder("split", split) / TRAIN).items()
    return Origin(reference, user_model, items, tuple(missing))
