"""Evidence for the gate, as a challenger that may be promoted brings it; each test changes what it is about."""

from components.evaluation.exploit_probes import ExploitVerdict
from components.evaluation.policy_value import Estimand, PolicyDifference, PolicyValue
from components.evaluation.propensity_check import PropensityCheck, PropensityTest
from components.experiment.ab import AbResult
from components.experiment.arm import ArmMean
from components.experiment.evidence import GateEvidence, TrustSummary
from components.experiment.guardrails import Guardrail, Metric
from components.experiment.sequential import ConfidenceSequence, Look
from components.interactions.contract import RatioAssumption

SUPPORTED = ExploitVerdict(policy="new", supported=True, text="It earns 0.51 in the world model, 0.5 by the log.")


def value(**changes) -> PolicyValue:
    fields = {
        "policy": "new",
        "estimator": "one-request NCIS",
        "estimand": Estimand.ONE_REQUEST,
        "ratio": RatioAssumption.FULL_SLATE,
        "value": 0.5,
        "lower": 0.4,
        "upper": 0.6,
        "confidence": 0.95,
        "effective_sample_size": 2_000.0,
        "n_requests": 40_000,
        "n_units": 40_000,
        "n_users": 5_000,
        "cap": 200.0,
        "cap_share": 0.001,
        "max_weight": 200.0,
        "mean_weight": 1.01,
        "mean_weight_lower": 0.96,
        "mean_weight_upper": 1.06,
        "behavior_value": 0.3,
        "difference": 0.2,
        "difference_lower": 0.1,
        "difference_upper": 0.3,
        "propensities_estimated": False,
        "interval": "user-clustered delta method",
    }
    return PolicyValue(**(fields | changes))


def difference(**changes) -> PolicyDifference:
    fields = {
        "policy": "new",
        "reference": "old",
        "estimand": Estimand.ONE_REQUEST,
        "difference": 0.1,
        "lower": 0.02,
        "upper": 0.18,
        "confidence": 0.95,
        "n_users": 5_000,
    }
    return PolicyDifference(**(fields | changes))


def guardrail(metric: Metric, treatment: float = 1.0, control: float = 1.0, error: float = 0.01) -> Guardrail:
    """A metric whose mean is known up to `error` in each arm."""
    treatment_arm, control_arm = (
        ArmMean(n_users=1_000, n_sessions=3_000, mean=mean, variance=error**2, session_variance=error**2)
        for mean in (treatment, control)
    )
    return Guardrail(metric=metric, treatment=treatment_arm, control=control_arm)


def guarded(changed: Guardrail | None = None) -> tuple[Guardrail, ...]:
    """All metrics unchanged but one."""
    return tuple(changed if changed and changed.metric is metric else guardrail(metric) for metric in Metric)


def sequence(lower: float, upper: float) -> ConfidenceSequence:
    """One look whose 95 % interval is so wide by Student's t; the sequence's own is wider."""
    error = (upper - lower) / 2 / 1.96
    look = Look(
        day=3,
        n_users=2_010,
        n_sessions=6_030,
        difference=(lower + upper) / 2,
        standard_error=error,
        clock=6_030.0,
        lower=(lower + upper) / 2 - 3.05 * error,
        upper=(lower + upper) / 2 + 3.05 * error,
    )
    return ConfidenceSequence(confidence=0.95, planned_sessions=6_030, looks=(look,))


def ab(**changes) -> AbResult:
    fields = {
        "label": "live",
        "treatment": "new",
        "control": "old",
        "treatment_users": 1_000,
        "control_users": 1_010,
        "treatment_sessions": 3_000,
        "control_sessions": 3_030,
        "planned_share": 0.5,
        "treatment_mean": 1.2,
        "control_mean": 1.0,
        "difference": 0.2,
        "lower": 0.1,
        "upper": 0.3,
        "confidence": 0.95,
        "relative_difference": 0.2,
        "sample_ratio_p_value": 0.8,
        "minimum_detectable_effect": 0.14,
        "degrees_of_freedom": 2_000.0,
        "guardrails": guarded(),
    } | changes
    fields |= {"standard_error": changes.get("standard_error", (fields["upper"] - fields["lower"]) / 2 / 1.96)}
    return AbResult(**fields, conclusive=fields["lower"] > 0 or fields["upper"] < 0)


def consistency(*p_values: float, estimated: bool = False) -> PropensityCheck:
    tests = [
        PropensityTest(
            kind="mean weight",
            target=f"policy {number}",
            strength=0.5,
            slates="all",
            expected=1.0,
            observed=1.02,
            lower=0.98,
            upper=1.06,
            p_value=p_value,
        )
        for number, p_value in enumerate(p_values)
    ]
    return PropensityCheck(estimated=estimated, tolerance=0.002, n_requests=40_000, n_users=5_000, tests=tests)


def evidence(**changes) -> GateEvidence:
    fields = {
        "challenger": "new",
        "champion_policy": None,
        "ab_started": changes.get("ab", True) is not None,
        "ratio_assumption": RatioAssumption.FULL_SLATE,
        "data_passed": True,
        "data_text": "12 of 40,012 requests were quarantined.",
        "trust": TrustSummary(passed=True, reasons=("Clicks are calibrated.",)),
        "exploit": SUPPORTED,
        "offline": value(),
        "cross_check": value(estimator="DR"),
        "propensities": consistency(1.0, 0.3),
        "ab": ab(),
    }
    return GateEvidence(**(fields | changes))
