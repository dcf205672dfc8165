from dataclasses import replace

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from components.evaluation.logged_requests import KnownRewards
from components.evaluation.ncis import one_request_ncis
from components.evaluation.policy_value import Estimand, Estimate, NotIdentified, identify
from components.interactions.contract import Evidence, RatioAssumption

VARIED = KnownRewards(n_requests=3, n_known=3, lowest=0.0, highest=1.0)


def test_a_log_of_clicks_identifies_no_policy():
    assert "clicks only" in (identify(Evidence.CLICKS, VARIED) or "")
    assert "clicks only" in (identify(Evidence.CLICKS, VARIED, propensities_estimated=True) or "")


def test_slates_without_propensities_identify_a_value_only_by_an_estimate_of_them():
    assert "probability" in (identify(Evidence.SLATES, VARIED) or "")
    assert identify(Evidence.SLATES, VARIED, propensities_estimated=True) is None


def test_a_constant_reward_identifies_no_policy():
    assert "reward 1" in (identify(Evidence.PROPENSITIES, replace(VARIED, lowest=1.0)) or "")


def test_slates_with_propensities_and_varied_rewards_identify_every_policy():
    assert identify(Evidence.PROPENSITIES, VARIED) is None


def test_a_log_without_a_known_reward_identifies_no_policy():
    assert "No request's reward is known" in (identify(Evidence.PROPENSITIES, KnownRewards(n_requests=3)) or "")


def test_estimates_survive_json(random_log):
    value = one_request_ncis(random_log, policy="a", ratio=RatioAssumption.FULL_SLATE)
    unknown = NotIdentified(policy="a", estimand=Estimand.SESSION, reason="No slates.")
    adapter = TypeAdapter(Estimate)
    for estimate in (value, unknown):
        assert adapter.validate_json(estimate.model_dump_json()) == estimate


def test_a_value_that_is_no_number_is_refused(random_log):
    value = one_request_ncis(random_log, policy="a", ratio=RatioAssumption.FULL_SLATE)
    with pytest.raises(ValidationError, match="finite"):
        type(value)(**(value.model_dump() | {"value": np.nan}))
