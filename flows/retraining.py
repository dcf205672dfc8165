"""The loop: logged sessions in, a gated and packaged policy with its evidence out."""

from pathlib import Path

from prefect import flow

from components.environments import storefront
from components.errors import InputError
from flows import platform_stages, stages
from flows.config import LoopConfig
from flows.lineage import digest_of, folder_digest
from flows.run_folder import leave_run_folder
from flows.run_record import RunSummary
from flows.settings import PlatformSettings
from flows.stage_store import StageRef
from flows.tasks import Run, publish


@flow(name="retraining")
def retraining(
    config: LoopConfig, path: Path | None = None, runs: Path | None = None, fresh: bool = False
) -> RunSummary:
    """Run the loop once.

    Args:
        config: everything that decides the result.
        path: file or folder that the source reads; the storefront needs none.
        runs: folder in which the run leaves its own; the platform's by default.
        fresh: compute every stage anew.
    """
    settings = PlatformSettings()
    run = Run.open(config, settings.home, runs or settings.runs, fresh=fresh)
    source = source_ref(config, path)

    dataset = run(stages.import_source, path=source)
    version = run(platform_stages.version_data, dataset=dataset)
    checked = run(stages.validate_log, dataset=dataset)
    split = run(stages.split_sessions, checked=checked)
    users = run(stages.fit_user_model, split=split)
    behavior = run(stages.fit_behavior, split=split, users=users)
    world = run(stages.fit_world_model, split=split, users=users, behavior=behavior)
    policy = run(stages.train_policy, split=split, world=world)
    baseline = run(stages.train_baseline, split=split, world=world)
    estimates = run(stages.estimate_policies, split=split, world=world, policy=policy, baseline=baseline)
    ab = run(stages.run_ab, split=split, policy=policy, baseline=baseline)
    gate = run(stages.judge_evidence, checked=checked, split=split, world=world, estimates=estimates, ab=ab)
    package = run(platform_stages.package_policy, dataset=dataset, policy=policy, baseline=baseline, gate=gate)
    reference = run(platform_stages.write_reference, split=split, users=users)

    summary = leave_run_folder(run, version=version, package=package, reference=reference)
    for name, markdown in summary.artifacts().items():
        publish(name, markdown)
    return summary.run


def source_ref(config: LoopConfig, path: Path | None) -> StageRef:
    """What the source reads, by content; a simulator reads nothing.

    Raises:
        InputError: the source needs a path and got none, or there is nothing at the path.
    """
    if isinstance(config.source, storefront.Config):
        return StageRef(path=Path(), digest=digest_of("simulated"))
    name = config.source.name  # type: ignore[attr-defined]
    if path is None:
        raise InputError(f"source {name!r} reads a folder: give it with --path DIR")
    if not path.exists():
        raise InputError(f"{path}: no such file or folder; source {name!r} reads it")
    return StageRef(path=path.resolve(), digest=folder_digest(path))
