"""What came out of each stage, in a few words: for the log of a run and its summary in Prefect."""

import json
from collections.abc import Callable
from pathlib import Path

import polars as pl

from components.evaluation.policy_value import NotIdentified
from components.evaluation.trust_score import TrustScore
from components.evaluation.world_model_trust import WorldModelTrust
from components.interactions.log_folder import open_log
from components.interactions.splits import HOLDOUT, TEST, TRAIN, VALIDATION
from components.validation.checks import DataChecks
from flows.numbers import interval, number
from flows.run_record import Package, Release
from flows.stages import Estimates, read_ab, read_curves, read_decision
from monitoring.drift_reference import REFERENCE


def stage_fact(stage: str, folder: Path) -> str:
    """What came out of a finished stage, without a full stop."""
    return _FACTS[stage](folder)


def _import(folder: Path) -> str:
    manifest = open_log(folder / "log").manifest
    return f"{manifest.n_requests:,} requests from {manifest.source}, evidence: {manifest.evidence.value}"


def _version(folder: Path) -> str:
    version = json.loads((folder / "version.json").read_text())
    return f"content {version['content'][:12]}, DVC {version['dvc'] or 'has no repository here'}"


def _checks(folder: Path) -> str:
    checks = DataChecks.model_validate_json((folder / "checks.json").read_bytes())
    return f"{checks.n_requests:,} requests, {checks.n_quarantined:,} put aside"


def _splits(folder: Path) -> str:
    logs = (folder / name for name in (TRAIN, VALIDATION, TEST, HOLDOUT))
    return ", ".join(f"{log.name} {open_log(log).manifest.n_requests:,}" for log in logs if log.exists()) + " requests"


def _learned(folder: Path) -> str:
    ends = [f"{curve.name} {number(curve.values[-1])} {curve.y}" for curve in read_curves([folder]) if curve.values]
    return ", ".join(ends) or "nothing to learn"


def _policy(folder: Path) -> str:
    release = Release.model_validate_json((folder / "release.json").read_bytes())
    return f"released at strength {number(release.strength)} of 1 from the logging policy; {_learned(folder)}"


def _trust(folder: Path) -> str:
    parts = WorldModelTrust.model_validate_json((folder / "trust.json").read_bytes()).parts
    failed = [part.name for part in parts if part.passed is False]
    return f"trust checks failed: {', '.join(failed)}" if failed else f"{len(parts)} trust checks, none failed"


def _estimates(folder: Path) -> str:
    estimate = Estimates.model_validate_json((folder / "estimates.json").read_bytes()).gating
    if isinstance(estimate, NotIdentified):
        return f"{estimate.policy}: not identified, {estimate.reason.rstrip('.')}"
    return (
        f"{estimate.policy} {number(estimate.value)} a request ({interval(estimate.lower, estimate.upper)}) by "
        f"{estimate.estimator}, ESS {number(estimate.effective_sample_size)}"
    )


def _probes(folder: Path) -> str:
    score = TrustScore.model_validate_json((folder / "trust_score.json").read_bytes())
    return f"trust {number(score.score, 2)} of 1, {'passed' if score.passed else 'failed'}, weakest: {score.weakest}"


def _ab(folder: Path) -> str:
    ab = read_ab(folder)
    if ab is None:
        return "too few users for one"
    return (
        f"{ab.treatment} {number(ab.treatment_mean)} against {ab.control} {number(ab.control_mean)} a session: "
        f"{number(ab.difference, signed=True)} ({interval(ab.lower, ab.upper, signed=True)}), {ab.label}"
    )


def _gate(folder: Path) -> str:
    decision = read_decision(folder)
    against = [reason.check for reason in decision.reasons if not reason.passed]
    return f"{decision.outcome.value}; " + (f"against more: {', '.join(against)}" if against else "all checks passed")


def _package(folder: Path) -> str:
    package = Package.model_validate_json((folder / "package.json").read_bytes())
    return f"{package.policy_tag} and {package.baseline_tag} in {package.bento_tag}"


def _reference(folder: Path) -> str:
    n_requests = pl.scan_parquet(folder / "reference" / REFERENCE).select(pl.len()).collect().item()
    return f"{n_requests:,} requests as reference"


_FACTS: dict[str, Callable[[Path], str]] = {
    "import-data": _import,
    "data-version": _version,
    "validate": _checks,
    "split": _splits,
    "user-model": _learned,
    "behavior": _learned,
    "world-model": _trust,
    "policy": _policy,
    "baseline": _learned,
    "estimates": _estimates,
    "probes": _probes,
    "ab-test": _ab,
    "gate": _gate,
    "package": _package,
    "drift-reference": _reference,
}
