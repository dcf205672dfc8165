"""Entries of a ledger, and results of A/Bs, as the tests of this folder need them."""

from datetime import UTC, datetime, timedelta
from typing import Any

from components.evaluation.policy_value import Estimand
from components.experiment.ab import AbLabel, AbResult
from components.experiment.gate import Outcome
from components.experiment.ledger import LedgerAb, LedgerEntry, OfflineDifference


def ab_result(difference: float = 0.2, label: AbLabel = "live", **changes: Any) -> AbResult:
    """An A/B whose interval is the difference ± 0.1."""
    lower, upper = difference - 0.1, difference + 0.1
    fields = {
        "label": label,
        "treatment": "reinforce",
        "control": "cem",
        "treatment_users": 5_000,
        "control_users": 5_000,
        "treatment_sessions": 9_000,
        "control_sessions": 9_000,
        "planned_share": 0.5,
        "treatment_mean": 1.0 + difference,
        "control_mean": 1.0,
        "difference": difference,
        "lower": lower,
        "upper": upper,
        "confidence": 0.95,
        "relative_difference": difference,
        "sample_ratio_p_value": 0.6,
        "minimum_detectable_effect": 0.12,
        "standard_error": 0.051,
        "degrees_of_freedom": 9_000.0,
        "conclusive": lower > 0 or upper < 0,
    }
    return AbResult.model_validate(fields | changes)


def ledger_entry(
    day: int = 0, offline: float = 0.05, ab: AbResult | None = None, *, passed: bool = True, **changes: Any
) -> LedgerEntry:
    """The entry of one day's run; `offline` is against the A/B's control, and against the log it is 0.1 more."""
    differences = tuple(
        OfflineDifference(
            estimator="one-request NCIS",
            estimand=Estimand.ONE_REQUEST,
            reference=reference,
            difference=difference,
            lower=None,
            upper=None,
            effective_sample_size=900.0,
        )
        for reference, difference in ((None, offline + 0.1), ("cem", offline))
    )
    fields = {
        "run": f"shop-{day}",
        "started": datetime(2026, 4, 1, tzinfo=UTC) + timedelta(days=day),
        "loop": "shop",
        "source": "storefront",
        "reward": "clicks version 1: 1 × clicked",
        "data_digest": f"log-{day}",
        "challenger": "reinforce",
        "champion": None,
        "offline": differences,
        "passed": passed,
        "outcome": Outcome.CANARY if passed else Outcome.HOLD,
        "ab": None if ab is None else LedgerAb.of(ab),
    }
    return LedgerEntry.model_validate(fields | changes)
