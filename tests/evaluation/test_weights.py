import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from components.errors import InputError
from components.evaluation.weights import (
    EffectiveSize,
    capped_log_weights,
    check_cap,
    effective_sample_size,
    ess_floor,
)


def test_capped_weights_never_exceed_the_cap():
    log_weights = capped_log_weights(np.array([-700.0, 0.0, 3.0, 700.0]), cap=5.0)
    np.testing.assert_allclose(np.exp(log_weights), [np.exp(-700), 1, 5, 5])


@pytest.mark.parametrize("cap", [0.0, -1.0, np.nan, np.inf])
def test_a_cap_that_is_no_finite_number_above_zero_is_refused(cap):
    with pytest.raises(InputError, match="cap"):
        capped_log_weights(np.zeros(2), cap)


def test_a_cap_below_the_square_root_of_n_is_refused():
    check_cap(10.0, 100)
    with pytest.raises(InputError, match=r"9\.9 is below √n = 10"):
        check_cap(9.9, 100)


def test_equal_weights_have_the_effective_size_of_the_log_at_any_scale():
    for scale in (-700.0, 0.0, 700.0):
        assert effective_sample_size(np.full(8, scale)) == pytest.approx(8)


def test_effective_sample_size_by_hand():
    # (1 + 2 + 3)² / (1 + 4 + 9)
    assert effective_sample_size(np.log([1.0, 2.0, 3.0])) == pytest.approx(36 / 14)


def test_the_floor_is_500_requests_or_one_percent():
    assert (ess_floor(1_000), ess_floor(50_000), ess_floor(200_000)) == (500, 500, 2_000)


@given(
    arrays(np.float64, (7, 3), elements=st.floats(-4, 4)),
    arrays(np.float64, (7, 3), elements=st.floats(0, 3)),
    st.floats(-500, 500),
)
def test_the_effective_size_of_positions_lies_between_theirs_and_is_kishs_for_one(log_weights, rewards, scale):
    sizes = [effective_sample_size(column) for column in log_weights.T]
    columns = [(r, w + scale) for r, w in zip(rewards.T, log_weights.T, strict=True)]

    together = EffectiveSize.of(columns).value

    assert min(sizes) * (1 - 1e-9) <= together <= max(sizes) * (1 + 1e-9)
    assert EffectiveSize.of(columns[:1]).value == pytest.approx(sizes[0])
    assert EffectiveSize.of([columns[0]] * 3).value == pytest.approx(sizes[0])
    shares = rewards.var(axis=0) / rewards.var(axis=0).sum() if rewards.var(axis=0).sum() > 1e-6 else np.zeros(3)
    assert all(size >= share * together * (1 - 1e-6) for size, share in zip(sizes, shares, strict=True))


def test_a_position_whose_reward_never_varies_does_not_count():
    log_weights, rewards = np.log([[1.0, 9.0], [1.0, 1.0], [1.0, 1.0]]), np.array([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    assert EffectiveSize.of(list(zip(rewards.T, log_weights.T, strict=True))).value == pytest.approx(3)
