from collections.abc import Callable

import numpy as np
import pytest

from components.evaluation.logged_requests import LoggedRequests

MakeLog = Callable[..., LoggedRequests]


@pytest.fixture
def make_log() -> MakeLog:
    """A log from rewards and log ratios; by default every request is a session of its own user."""

    def make(rewards, log_ratios, user=None, session=None, step=None):
        rewards = np.asarray(rewards, dtype=np.float64)
        behavior = np.full(rewards.shape, -3.0)
        user = np.arange(len(rewards)) if user is None else np.asarray(user)
        return LoggedRequests(
            rewards=rewards,
            behavior_log_probs=behavior,
            target_log_probs=behavior + np.asarray(log_ratios, dtype=np.float64),
            user=user,
            session=np.arange(len(rewards)) if session is None else np.asarray(session),
            step=np.zeros(len(rewards), dtype=np.int64) if step is None else np.asarray(step),
        )

    return make


@pytest.fixture
def random_log(make_log: MakeLog) -> LoggedRequests:
    """Whole sessions of 1 to 4 requests, users with several of them, rows shuffled."""
    generator = np.random.default_rng(0)
    lengths = generator.integers(1, 5, size=300)
    session = np.repeat(np.arange(300), lengths)
    step = np.arange(len(session)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    user = generator.integers(0, 80, size=300)[session]
    log = make_log(
        generator.normal(size=len(session)), generator.normal(0, 0.7, size=len(session)), user, session, step
    )
    return log.take(generator.permutation(len(session)))
