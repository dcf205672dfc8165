"""The loop: logged sessions in, a gated and packaged policy with its evidence out."""

from datetime import UTC, datetime
from pathlib import Path

import torch
from prefect import flow
from prefect.logging import get_run_logger
from prefect.states import Cancelled

from components.errors import InputError
from components.experiment.gate import Outcome
from components.interactions.importers import interaction_log, table
from components.interactions.log import InteractionLog
from flows import action_stages, platform_stages, stages
from flows.as_of import pinned
from flows.config import LoopConfig, interaction_database, logs_actions, require_device, source_path
from flows.events import LoopEvent, emit
from flows.lineage import digest_of, folder_digest
from flows.releasing import RefusedError, let_out, open_releases
from flows.run_artifacts import publish_run
from flows.run_folder import FinishedRun, enter_in_ledger, leave_run_folder
from flows.run_record import RunSummary
from flows.settings import PlatformSettings
from flows.stage_store import StageRef, progress_sink
from flows.tasks import Run, publish
from flows.turns import note_waking, too_soon, turn


@flow(name="retraining", timeout_seconds=PlatformSettings().run_hours * 3600)
def retraining(
    config: LoopConfig,
    path: Path | None = None,
    runs: Path | None = None,
    fresh: bool = False,
    woken_by: str | None = None,
) -> RunSummary:
    """Run the loop once, when it is its turn.

    Args:
        config: everything that decides the result.
        path: file or folder that the source reads; the storefront needs none.
        runs: folder in which the run leaves its own; the platform's by default.
        fresh: compute every stage anew.
        woken_by: the event that asks for this run, in words; nothing but whether it runs depends on it.
    """
    settings = PlatformSettings()
    with turn(config.loop, settings.home, tell_of_waiting):
        if woken_by is not None:
            now = datetime.now(UTC)
            if reason := too_soon(config.loop, settings.home, settings.cooldown_hours, now):
                # Who calls the flow is told by Prefect's CancelledRun.
                return Cancelled(name="Skipped", message=reason)  # type: ignore[return-value]
            note_waking(config.loop, settings.home, woken_by, now)
            get_run_logger().warning("woken by: %s", woken_by)
        return retrain(config, path, runs, fresh)


def retrain(config: LoopConfig, path: Path | None, runs: Path | None, fresh: bool) -> RunSummary:
    """The loop, stage by stage."""
    require_device(config)
    torch.set_num_threads(config.threads)
    settings = PlatformSettings()
    is_of_now = config.as_of is None
    config = pinned(config, path)
    run = Run.open(config, settings.home, runs or settings.runs, fresh=fresh, path=path)
    source = source_ref(config, path)

    dataset = run(stages.import_source, path=source)
    version = run(platform_stages.version_data, dataset=dataset)
    checked = validated(run, dataset)
    learned = learn_and_judge(run, checked)
    if not logs_actions(config):
        make_servable(run, dataset, learned)
    ledger = enter_in_ledger(run, settings.home)

    finished = leave_run_folder(run, version=version, ledger=ledger)
    publish_run(finished)
    tell_of_hold(finished)
    if is_of_now:
        begin_ab(finished)
    return finished.run


def learn_and_judge(run: Run, checked: StageRef) -> dict[str, StageRef]:
    """From a log that was checked to a decision; returns the run's stages by name."""
    if logs_actions(run.config):
        return learn_and_judge_actions(run, checked)
    split = run(stages.split_sessions, checked=checked)
    users = run(stages.fit_user_model, split=split)
    behavior = run(stages.fit_behavior, split=split, users=users)
    world = run(stages.fit_world_model, split=split, users=users, behavior=behavior)
    policy = run(stages.train_policy, split=split, world=world, behavior=behavior)
    baseline = run(stages.train_baseline, split=split, world=world)
    judged = {"split": split, "behavior": behavior, "world": world, "policy": policy, "baseline": baseline}
    estimates = run(stages.estimate_policies, **judged)
    probes = run(stages.probe_world_model, **judged, estimates=estimates)
    ab = run(stages.run_ab, split=split, policy=policy, baseline=baseline)
    run(stages.judge_evidence, checked=checked, split=split, probes=probes, estimates=estimates, ab=ab)
    return run.stages


def learn_and_judge_actions(run: Run, checked: StageRef) -> dict[str, StageRef]:
    """The same for a log of actions."""
    split = run(stages.split_sessions, checked=checked)
    world = run(action_stages.fit_world_model, split=split)
    policy = run(action_stages.train_policy, split=split, world=world)
    baseline = run(action_stages.train_baseline, split=split, world=world)
    judged = {"split": split, "policy": policy, "baseline": baseline}
    estimates = run(action_stages.estimate_policies, **judged)
    probes = run(action_stages.probe_world_model, **judged, world=world)
    simulator = source_ref(run.config, run.path)
    ab = run(action_stages.run_ab, source=simulator, policy=policy, baseline=baseline)
    run(stages.judge_evidence, checked=checked, split=split, probes=probes, estimates=estimates, ab=ab)
    return run.stages


def make_servable(run: Run, dataset: StageRef, learned: dict[str, StageRef]) -> None:
    """What the endpoint and the drift monitor need of a run: the packaged policy, and the reference."""
    policy, baseline, gate = learned["policy"], learned["baseline"], learned["gate"]
    run(platform_stages.package_policy, dataset=dataset, policy=policy, baseline=baseline, gate=gate)
    run(platform_stages.write_reference, split=learned["split"], users=learned["user-model"])


def tell_of_waiting(message: str, share: float) -> None:
    """Tell Prefect's page of the run, and whoever started it, that it is not its turn yet, or is now."""
    get_run_logger().warning(message)
    progress_sink.get()("turn", message, share)


def validated(run: Run, dataset: StageRef) -> StageRef:
    """The checked log; a log that is refused is told to whoever watches the loop.

    Raises:
        InputError: the log is refused.
    """
    try:
        return run(stages.validate_log, dataset=dataset)
    except InputError as error:
        emit(LoopEvent.CHECK_FAILED, run.config.loop, str(error), {"dataset": dataset.digest})
        raise


def tell_of_hold(finished: FinishedRun) -> None:
    """Tell whoever watches the loop that the gate holds its new policy, and why."""
    if finished.decision.outcome is Outcome.HOLD:
        reasons = [reason.text for reason in finished.decision.reasons if not reason.passed]
        emit(LoopEvent.HELD, finished.run.loop, " ".join(reasons), {"run": finished.run.run, "reasons": reasons})


def begin_ab(finished: FinishedRun) -> None:
    """Let a policy that the gate does not hold out to some users, where the loop is to do that by itself.

    What stands in the way is said, and is no failure of the run.

    Raises:
        LogUnavailableError: the endpoint's database cannot be written.
    """
    loop, plan = finished.run.loop, finished.lineage.config.release
    share, policy = plan.canary_share, finished.lineage.policy_tag
    if share is None or finished.decision.outcome is Outcome.HOLD:
        return
    try:
        if policy is None:
            raise InputError("nothing serves actions")
        releases = open_releases(writing=False)
        release = let_out(releases, loop, policy, share=share, planned_sessions=plan.planned_sessions)
    except (InputError, RefusedError) as reason:
        told = f"No canary: {reason}"
    else:
        told = f"Release {release.number}: {policy} serves {share:.3g} of the users."
        evidence = {"run": finished.run.run, "policy": policy, "to_release": release.number}
        emit(LoopEvent.CANARY, loop, told, evidence)
    get_run_logger().warning("%s", told)
    publish(f"{loop}-release", told)


def source_ref(config: LoopConfig, path: Path | None) -> StageRef:
    """What the source reads, by content; a simulator reads nothing.

    Raises:
        InputError: the source needs a path and got none, or there is nothing at the path.
    """
    read = source_path(config, path)
    if isinstance(config.source, interaction_log.Config):
        files = [] if config.source.items is None else [config.source.items]
        state = InteractionLog(interaction_database(read)).state(config.loop, config.as_of)
        return StageRef(path=read or Path(), digest=digest_of(state, *map(folder_digest, files)))
    if read is None:
        return StageRef(path=Path(), digest=digest_of("simulated"))
    files = table.files_read(config.source, read) if isinstance(config.source, table.Config) else [read]
    return StageRef(path=read, digest=digest_of(*map(folder_digest, files)))
