import pytest

from components.experiment.guardrails import Metric
from components.experiment.logged_sessions import logged_sessions, mean_logged_rewards


def test_sessions_of_a_log_by_hand(corner_log):
    # Reward: clicks + 0.1 · watch time. s1 has clicks 2, 1 and 1 and watches 20 and 5; s2 and s3 have no click.
    sessions = logged_sessions(corner_log)
    assert sessions["session_id"].to_list() == ["s1", "s2", "s3"]
    assert sessions["user_id"].to_list() == ["ann", "bob", "ann"]
    assert sessions["reward"].to_list() == [pytest.approx(6.5), 0, None]
    assert sessions[Metric.SESSION_LENGTH].to_list() == [3, 1, 1]
    assert sessions[Metric.CLICKS].to_list() == [4, 0, 0]
    assert sessions[Metric.PURCHASES].to_list() == [1, 0, 0]
    # s1 was left after its third request, s2 is cut, and how s3 ended is unknown.
    assert sessions[Metric.FIRST_REQUEST_EXITS].to_list() == [0, 0, 0]


def test_the_past_of_a_user_is_the_mean_over_sessions_of_known_reward(corner_log):
    past = mean_logged_rewards([corner_log, corner_log])
    assert dict(past.iter_rows()) == {"ann": pytest.approx(6.5), "bob": 0}


def test_sessions_left_after_their_first_request_are_counted(storefront_log):
    sessions = logged_sessions(storefront_log)
    exits = sessions.filter(sessions[Metric.FIRST_REQUEST_EXITS] == 1)
    assert 0 < exits.height < sessions.height
    assert exits[Metric.SESSION_LENGTH].unique().to_list() == [1]
