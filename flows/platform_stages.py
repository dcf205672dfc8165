"""The stages that hand a run's results to the platform: DVC, BentoML, Evidently."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import polars as pl

from components.errors import InputError
from components.experiment.evidence import GateEvidence
from components.experiment.gate import GateRecord
from components.interactions.log_folder import Log, open_log, replace_folder, require_log_or_nothing
from components.interactions.splits import TEST, TRAIN
from components.policies.policy_folder import load_policy
from components.world_model.training import Progress
from components.world_model.user_model_folder import load_user_model
from flows.config import LoopConfig
from flows.data_versions import add_to_cache
from flows.disk_space import disk_full_told
from flows.lineage import LIBRARY, code_digest, folder_digest, git_commit, lock_digest
from flows.run_record import POLICY_FILES, Package
from flows.settings import PlatformSettings
from flows.stage_store import clear_abandoned, stage, staging_beside
from flows.stages import read_decision
from monitoring.drift_reference import drift_report, write_drift_reference
from services.packaging import build_bento
from services.policy_store import load_model, save_model

PLATFORM = (*LIBRARY, "flows/platform_stages.py", "flows/data_versions.py", "services", "monitoring")


def _is_published(version: Path) -> bool:
    recorded = json.loads((version / "version.json").read_text())
    try:
        published = open_log(PlatformSettings().data / recorded["source"])
    except InputError:
        return False
    return published.manifest.content_digest == str(recorded["content"])


@stage("data-version", "source", code=PLATFORM, still_there=_is_published)
def version_data(config: LoopConfig, dataset: Path, out: Path, progress: Progress) -> None:
    """Put the imported log where `data.dvc` looks for it, and into DVC's cache; git's files stay as they are."""
    progress("recording the data version", 0.0)
    log = open_log(dataset / "log")
    folder = PlatformSettings().data.resolve() / log.manifest.source
    with disk_full_told(folder.parent, "SLATELOOP_DATA"):
        publish_log(log, folder)
        version = {
            "source": log.manifest.source,
            "content": log.manifest.content_digest,
            "dvc": add_to_cache(folder),
        }
    (out / "version.json").write_text(json.dumps(version, indent=2))


def publish_log(log: Log, folder: Path) -> None:
    """Copy a log's files into a folder, in one rename; links are used where the file system has them.

    Raises:
        InputError: the folder holds something else than a log.
    """
    require_log_or_nothing(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    clear_abandoned(folder.parent)
    staging = staging_beside(folder)
    try:
        shutil.copytree(log.path, staging, copy_function=_link_or_copy)
        replace_folder(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _link_or_copy(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
    return target


def _is_stored(package: Path) -> bool:
    packaged = Package.model_validate_json((package / "package.json").read_bytes())
    try:
        load_model(packaged.policy_tag)
        load_model(packaged.baseline_tag)
    except InputError:
        return False
    return True


@stage("package", code=PLATFORM, still_there=_is_stored)
def package_policy(
    config: LoopConfig, dataset: Path, policy: Path, baseline: Path, gate: Path, out: Path, progress: Progress
) -> None:
    """Policy and baseline as BentoML models with lineage and decision, and the Bento that serves them."""
    progress("packaging", 0.0)
    decision = read_decision(gate).model_dump(mode="json")
    lineage = {
        "data_digest": open_log(dataset / "log").manifest.content_digest,
        "code_digest": code_digest(),
        "lock_digest": lock_digest(),
        "commit": git_commit(),
        "config": config.model_dump(mode="json"),
    }
    # BentoML's own default where nothing is set.
    tags, store = {}, Path(os.environ.get("BENTOML_HOME", Path.home() / "bentoml"))
    record = GateRecord(
        evidence=GateEvidence.model_validate_json((gate / "evidence.json").read_bytes()), config=config.gate
    )
    for arm, folder, verdict, judged in (
        ("challenger", policy, decision, record),
        ("baseline", baseline, {}, None),
    ):
        name = f"{config.loop}-{load_policy(folder).description.name}"
        with disk_full_told(store, "BENTOML_HOME"):
            tags[arm] = save_model(folder, name=name, lineage=lineage, decision=verdict, gate=judged)
    progress("building the Bento", 0.3)
    with disk_full_told(store, "BENTOML_HOME"):
        bento_tag = build_bento(tags.values())
    package = Package(
        policy_tag=tags["challenger"],
        baseline_tag=tags["baseline"],
        bento_tag=bento_tag,
        policy_digest=folder_digest(policy, POLICY_FILES),
    )
    (out / "package.json").write_text(package.model_dump_json(indent=2))


@stage("drift-reference", code=PLATFORM)
def write_reference(config: LoopConfig, split: Path, users: Path, out: Path, progress: Progress) -> None:
    """What normal looks like, for monitoring; and a first Evidently report of the test split against it."""
    progress("drift reference", 0.0)
    vocabulary = load_user_model(users).vocabulary
    write_drift_reference(open_log(split / TRAIN), vocabulary, out / "reference", config.seed)
    test = open_log(split / TEST)
    current = write_drift_reference(test, vocabulary, out / "current", config.seed)
    progress("drift report", 0.4)
    # Evidently correlates columns that never vary, and numpy warns of each.
    with np.errstate(invalid="ignore"):
        drift_report(pl.read_parquet(out / "reference" / current.name), pl.read_parquet(current), out)
