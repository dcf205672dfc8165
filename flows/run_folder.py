"""The one folder that a run leaves: records, report, packaged policy, Data Docs and drift reference."""

import json
import shutil
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from components.errors import InputError
from components.evaluation.exploit_probes import ExploitProbes
from components.evaluation.policy_value import NotIdentified, PolicyValue
from components.evaluation.trust_score import TrustScore
from components.evaluation.world_model_trust import WorldModelTrust
from components.experiment.evidence import GateEvidence
from components.experiment.gate import Decision
from components.experiment.ledger import LedgerSummary, enter
from components.interactions.contract import Manifest, Reward
from components.interactions.log_folder import open_log, replace_folder
from components.interactions.splits import HOLDOUT, TEST, TRAIN, VALIDATION
from components.interactions.stored_copies import write_whole
from components.validation.checks import DataChecks
from flows.action_stages import names_of
from flows.disk_space import disk_full_told
from flows.ledger_store import add_entry, read_ledger, summary_around
from flows.lineage import code_digest, folder_digest, git_commit, lock_digest
from flows.report import write_report
from flows.run_record import (
    POLICY_FILES,
    Evidence,
    Forgotten,
    Lineage,
    Package,
    Release,
    RunSummary,
    SplitSummary,
    outcome_of,
)
from flows.stage_facts import stage_fact
from flows.stage_store import MANIFEST, StageManifest, StageRef, clear_abandoned, staging_beside
from flows.stages import Estimates, read_ab, read_curves, read_decision
from flows.tasks import Run


@dataclass(frozen=True)
class FinishedRun:
    """A run with what is told of it."""

    run: RunSummary
    evidence: Evidence
    decision: Decision
    lineage: Lineage
    facts: dict[str, str]
    """What came out of each stage, in the order in which they ran."""
    seconds: float
    """From its start until its folder was there."""


def enter_in_ledger(run: Run, home: Path) -> LedgerSummary:
    """Put what was predicted of the run's challenger beside its A/B; returns how right predictions were until now.

    Raises:
        InputError: the ledger cannot be written, or an entry is damaged.
    """
    stages = {name: ref.path for name, ref in run.stages.items()}
    manifest = open_log(stages["import-data"] / "log").manifest
    entry = enter(
        GateEvidence.model_validate_json((stages["gate"] / "evidence.json").read_bytes()),
        Estimates.model_validate_json((stages["estimates"] / "estimates.json").read_bytes()).estimates,
        run.config.gate,
        run=run.folder.name,
        started=run.started,
        loop=run.config.loop,
        source=manifest.source,
        reward=reward_line(manifest.reward),
        data_digest=manifest.content_digest,
    )
    add_entry(home, entry)
    return summary_around(entry, read_ledger(home))


def leave_run_folder(run: Run, *, version: StageRef, ledger: LedgerSummary) -> FinishedRun:
    """Gather a run's results into its folder, in one rename.

    Raises:
        DiskFullError: there is no space for it.
    """
    with disk_full_told(run.folder.parent, "SLATELOOP_RUNS"):
        return _leave_run_folder(run, version, ledger)


def _leave_run_folder(run: Run, version: StageRef, ledger: LedgerSummary) -> FinishedRun:
    stages = {name: ref.path for name, ref in run.stages.items()}
    manifest = open_log(stages["import-data"] / "log").manifest
    decision = read_decision(stages["gate"])
    evidence = _evidence(run, manifest, stages, ledger)
    lineage = _lineage(run, manifest, version.path, stages)
    summary = RunSummary(
        run=run.folder.name,
        loop=run.config.loop,
        source=manifest.source,
        started=run.started,
        outcome=outcome_of(decision),
        folder=str(run.folder),
    )
    clear_abandoned(run.folder.parent)
    staging = staging_beside(run.folder)
    try:
        staging.mkdir(parents=True)
        for name, record in (("evidence", evidence), ("decision", decision), ("lineage", lineage), ("run", summary)):
            (staging / f"{name}.json").write_text(record.model_dump_json(indent=2) + "\n")
        copied = {name: stages["validate"] / name for name in ("data_docs", "quarantine")}
        if "drift-reference" in stages:
            copied["drift_reference"] = stages["drift-reference"]
        for name, source in copied.items():
            shutil.copytree(source, staging / name, ignore=shutil.ignore_patterns(MANIFEST))
        for stage, name in zip(("policy", "baseline"), names_of(run.config), strict=True):
            folder = staging / "policies" / name
            folder.mkdir(parents=True)
            for file in POLICY_FILES:
                shutil.copyfile(stages[stage] / file, folder / file)
        write_report(evidence, decision, lineage, staging / "report.html")
        replace_folder(staging, run.folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    facts = {name: stage_fact(name, path) for name, path in stages.items()}
    return FinishedRun(summary, evidence, decision, lineage, facts, (datetime.now(UTC) - run.started).total_seconds())


def past_runs(folder: Path) -> list[RunSummary]:
    """The runs in a folder, oldest first.

    Raises:
        InputError: a folder's `run.json` is not what a run leaves.
    """
    return sorted((_read_summary(file) for file in _run_files(folder)), key=lambda summary: summary.started)


def find_run(folder: Path, name: str) -> Path:
    """The folder of a past run, by its name or the beginning of it.

    Raises:
        InputError: none or several fit.
    """
    runs = [file.parent for file in _run_files(folder)]
    found = [run for run in runs if run.name == name] or [run for run in runs if run.name.startswith(name)]
    if len(found) != 1:
        known = ", ".join(run.name for run in runs) or "none yet"
        raise InputError(f"run {name!r}: {len(found)} runs in {folder} begin so; the runs are: {known}")
    return found[0]


def read_lineage(run: Path) -> dict[str, Any]:
    """A past run's lineage as plain JSON, since those of earlier versions have other fields; empty where there is none.

    Raises:
        InputError: the file is damaged.
    """
    file = run / "lineage.json"
    try:
        lineage: dict[str, Any] = json.loads(file.read_bytes()) if file.is_file() else {}
    except ValueError as error:
        raise InputError(f"{file}: is no run's lineage: {error}") from None
    return lineage


def read_record(run: Path, name: str) -> dict[str, Any]:
    """One of a past run's records as plain JSON, such as `evidence` or `decision`.

    Raises:
        InputError: it is missing or damaged.
    """
    file = run / f"{name}.json"
    try:
        record: dict[str, Any] = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: is no run's {name}: {error}") from None
    return record


def read_mark(run: Path) -> Forgotten | None:
    """What was deleted from a past run's data; None while its lineage can be replayed.

    Raises:
        InputError: its lineage is damaged.
    """
    mark = read_lineage(run).get("forgotten")
    return None if mark is None else Forgotten.model_validate(mark)


def mark_forgotten(run: Path, users: int, at: datetime) -> None:
    """Write into a past run's lineage that it can be replayed no more, in one rename.

    Raises:
        InputError: its lineage is damaged.
    """
    before = read_mark(run)
    mark = Forgotten(users=users + (before.users if before else 0), at=at)
    lineage = read_lineage(run) | {"forgotten": mark.model_dump(mode="json")}
    write_whole(run / "lineage.json", json.dumps(lineage, indent=2, ensure_ascii=False) + "\n")


def _run_files(folder: Path) -> list[Path]:
    # A name that begins with a dot is a run's folder before it is whole.
    return sorted(folder.glob("[!.]*/run.json"))


def _read_summary(file: Path) -> RunSummary:
    try:
        return RunSummary.model_validate_json(file.read_bytes())
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "document"
        raise InputError(f"{file}: is no run's summary: {where}: {first['msg']}") from None


def _evidence(run: Run, manifest: Manifest, stages: dict[str, Path], ledger: LedgerSummary) -> Evidence:
    estimates = Estimates.model_validate_json((stages["estimates"] / "estimates.json").read_bytes())
    splits = [stages["split"] / name for name in (TRAIN, VALIDATION, TEST, HOLDOUT)]
    logs = {folder.name: open_log(folder) for folder in splits if folder.exists()}
    learned = (name for name in ("user-model", "behavior", "world-model", "policy", "baseline") if name in stages)
    return Evidence(
        loop=run.config.loop,
        source=manifest.source,
        limits=manifest.limits,
        evidence_level=manifest.evidence.value,
        ratio_assumption=manifest.ratio_assumption.value,
        reward=reward_line(manifest.reward),
        data=DataChecks.model_validate_json((stages["validate"] / "checks.json").read_bytes()),
        splits=tuple(
            SplitSummary(
                name=name,
                n_requests=log.manifest.n_requests,
                n_sessions=log.scan().select("session_id").unique().collect().height,
            )
            for name, log in logs.items()
        ),
        trust=WorldModelTrust.model_validate_json((stages["world-model"] / "trust.json").read_bytes()),
        probes=ExploitProbes.model_validate_json((stages["probes"] / "probes.json").read_bytes()),
        trust_score=TrustScore.model_validate_json((stages["probes"] / "trust_score.json").read_bytes()),
        curves=read_curves(stages[name] for name in learned),
        releases={
            names_of(run.config)[0]: Release.model_validate_json((stages["policy"] / "release.json").read_bytes())
        },
        gating=estimates.gating,
        estimates=estimates.estimates,
        cap_sensitivity=estimates.cap_sensitivity,
        support=estimates.support,
        propensity_check=estimates.propensity_check,
        ranking=estimates.ranking,
        ab=read_ab(stages["ab-test"]),
        ledger=ledger,
        seconds={
            name: StageManifest.model_validate_json((folder / MANIFEST).read_bytes()).seconds
            for name, folder in stages.items()
        },
    )


def _lineage(run: Run, manifest: Manifest, version: Path, stages: dict[str, Path]) -> Lineage:
    package = stages.get("package")
    packaged = None if package is None else Package.model_validate_json((package / "package.json").read_bytes())
    return Lineage(
        run=run.folder.name,
        started=run.started,
        config=run.config,
        data_digest=manifest.content_digest,
        dvc_digest=json.loads((version / "version.json").read_text())["dvc"],
        code_digest=code_digest(),
        lock_digest=lock_digest(),
        commit=git_commit(),
        path=None if run.path is None else str(run.path.resolve()),
        seed=run.config.seed,
        threads=run.config.threads,
        stages={name: ref.digest for name, ref in run.stages.items()},
        reused=tuple(run.reused),
        policy_digest=folder_digest(stages["policy"], POLICY_FILES),
        policy_tag=packaged and packaged.policy_tag,
        baseline_tag=packaged and packaged.baseline_tag,
        bento_tag=packaged and packaged.bento_tag,
    )


def reward_line(reward: Reward) -> str:
    """A reward in one line: name, version, weights."""
    weights = " + ".join(f"{weight:g} × {signal}" for signal, weight in reward.weights.items())
    return f"{reward.name} version {reward.version}: {weights}"


def estimate_line(estimate: PolicyValue | NotIdentified) -> str:
    """An estimate in one line: what it is of, its ratio, value, interval, ESS, and if propensities were fitted."""
    if isinstance(estimate, NotIdentified):
        return f"{estimate.policy}: not identified. {estimate.reason}"
    bounds = "" if estimate.lower is None else f" ({estimate.lower:.4f} to {estimate.upper:.4f})"
    return (
        f"{estimate.policy}, {estimate.estimator}, {estimate.estimand.value}, {estimate.ratio.value}: "
        f"{estimate.value:.4f}{bounds}, "
        f"ESS {estimate.effective_sample_size:,.0f}{', propensities estimated' * estimate.propensities_estimated}"
    )
