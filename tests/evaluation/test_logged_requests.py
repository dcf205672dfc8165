import numpy as np
import pytest
from jaxtyping import TypeCheckError

from components.errors import InputError
from components.evaluation.logged_requests import WholeSessions


def test_an_array_of_another_length_is_named(make_log):
    # With the tests' shape annotations on, jaxtyping is at the door before our own check.
    with pytest.raises((InputError, TypeCheckError), match="user"):
        make_log([1, 2, 3], [0, 0, 0], user=[0, 1])


def test_an_empty_log_is_refused(make_log):
    with pytest.raises(InputError, match="at least one request"):
        make_log([], [])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_log_prob_that_is_no_finite_number_is_named_with_its_row(make_log, bad):
    with pytest.raises(InputError, match=r"target_log_probs: 1 of 3 values are not finite.*at row 1"):
        make_log([1, 2, 3], [0, bad, 0])


def test_a_session_with_a_missing_step_is_named(make_log):
    with pytest.raises(InputError, match="session 7 has step 2 where 1 should be"):
        WholeSessions.of(make_log([1, 2], [0, 0], session=[7, 7], step=[0, 2], user=[0, 0]))


def test_a_session_of_two_users_is_refused(make_log):
    with pytest.raises(InputError, match="session 7 has more than one user"):
        WholeSessions.of(make_log([1, 2], [0, 0], session=[7, 7], step=[0, 1], user=[0, 1]))


def test_running_sums_stay_within_their_session(make_log):
    log = make_log([0] * 5, [0] * 5, session=[2, 1, 2, 1, 2], step=[1, 0, 0, 1, 2], user=[0] * 5)
    sessions = WholeSessions.of(log)
    assert sessions.cumulative(np.array([1.0, 2, 10, 20, 30])).tolist() == [1, 3, 10, 30, 60]
