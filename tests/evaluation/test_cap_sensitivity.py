import numpy as np
import pytest

from components.evaluation.cap_sensitivity import cap_sensitivity
from components.evaluation.ncis import fixed_cap_ncis, one_request_ncis
from components.interactions.contract import RatioAssumption

NAMES = {"policy": "challenger", "ratio": RatioAssumption.FULL_SLATE}


def test_the_curve_holds_the_usual_and_the_gating_estimate(random_log):
    curve = cap_sensitivity(random_log, **NAMES)
    by_cap = {point.cap: point for point in curve.points}
    usual, gating = fixed_cap_ncis(random_log, **NAMES), one_request_ncis(random_log, **NAMES)
    assert (curve.usual_cap, curve.gating_cap) == (10.0, gating.cap)
    for estimate in (usual, gating):
        point = by_cap[estimate.cap]
        assert (point.value, point.lower, point.effective_sample_size) == pytest.approx(
            (estimate.value, estimate.lower, estimate.effective_sample_size)
        )


def test_the_grid_rises_and_ever_less_is_cut(random_log):
    points = cap_sensitivity(random_log, **NAMES).points
    assert np.all(np.diff([point.cap for point in points]) > 0)
    assert np.all(np.diff([point.cap_share for point in points]) <= 0)
    assert points[0].cap_share > 0.2
    assert points[-1].cap_share == 0
