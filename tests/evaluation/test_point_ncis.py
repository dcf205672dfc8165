import numpy as np
import pytest

from components.errors import InputError
from components.evaluation.importance_sampling import importance_sampling
from components.evaluation.logged_requests import LoggedRequests
from components.evaluation.ncis import fixed_cap_ncis
from components.evaluation.point_ncis import kept_shares, point_ncis
from components.interactions.contract import RatioAssumption

NAMES = {"policy": "challenger", "ratio": RatioAssumption.FULL_SLATE}


def test_the_kept_share_of_a_state_by_hand():
    # Ratios 1/2 and 20 under a cap of 10: all of the first is kept, half of the second.
    np.testing.assert_allclose(kept_shares(np.log([[0.5, 20.0], [1.0, 1.0]]), 10.0), [0.75, 1.0])


def test_the_value_by_hand(make_log):
    log = make_log([1.0, 3.0], np.log([40.0, 2.0]))
    value = point_ncis(log, np.log([[20.0], [2.0]]), **NAMES)
    assert value.value == pytest.approx((10 / 0.5 * 1 + 2 * 3) / 2)


def test_without_cut_weights_it_is_importance_sampling(random_log):
    sampled = np.zeros((len(random_log.rewards), 3))
    value, reference = (
        point_ncis(random_log, sampled, **NAMES, cap=1e6),
        importance_sampling(random_log, **NAMES, cap=1e6),
    )
    assert (value.value, value.upper) == pytest.approx((reference.value, reference.upper))


def test_states_that_are_cut_alike_are_made_up_for_each_on_its_own():
    # In state 0 the target's favourite is shown once in 50 requests, in state 1 both agree; reward is the state's own,
    # so an estimator that knows each state's cut is right and one that pools them leans to state 1.
    generator = np.random.default_rng(0)
    n = 40_000
    state = generator.integers(0, 2, size=n)
    rare = (generator.random(n) < 0.02) & (state == 0)
    behavior = np.where(state == 0, np.where(rare, 0.02, 0.98), 1.0)
    target = np.where(state == 0, np.where(rare, 0.9, 0.1), 1.0)
    rewards = np.where(state == 0, 1.0, 0.0)
    index = np.arange(n)
    log = LoggedRequests(rewards, np.log(behavior), np.log(target), index, index, np.zeros(n, dtype=np.int64))
    exact = np.where(state == 0, 0.9 * 10 * 0.02 / 0.9 + 0.1, 1.0)  # w̄ in closed form
    sampled = np.log(10.0 / np.clip(exact, 1e-9, None))[:, None]
    assert kept_shares(sampled, 10.0) == pytest.approx(np.minimum(1, exact))
    assert point_ncis(log, sampled, **NAMES).value == pytest.approx(0.5, abs=0.03)
    assert fixed_cap_ncis(log, **NAMES).value < 0.35


def test_ratios_that_do_not_fit_are_refused(make_log):
    with pytest.raises(InputError, match="sampled_log_ratios"):
        point_ncis(make_log([1, 0], [0, 0]), np.zeros((3, 2)), **NAMES)
