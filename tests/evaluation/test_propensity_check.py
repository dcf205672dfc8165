"""Wrong log_probs are found out, and right ones are left alone about as often as the stated level says."""

from collections.abc import Callable
from dataclasses import replace
from math import log

import numpy as np
import pytest
import torch
from torch import Tensor

from components.environments.rollout import rollout
from components.environments.storefront import BehaviorPolicy, Config, Storefront
from components.evaluation.propensity_check import (
    Expectation,
    batch_logits,
    check_propensities,
    holm,
    judge_expectations,
)
from components.interactions.batching import Requests, SessionBatch
from components.interactions.contract import RatioAssumption
from components.policies.slate_policy import MemorylessPolicy, PopularityPolicy, SessionState, UniformPolicy

N_LOGS, SESSIONS = 200, 60


class Tasted(MemorylessPolicy):
    """Another version of a policy: its utilities scaled, and a taste of its own for each item added."""

    def __init__(self, policy: BehaviorPolicy, taste: float, seed: int = 0, scale: float = 1.0) -> None:
        super().__init__()
        self.policy, self.scale, self.slate_size = policy, scale, policy.slate_size
        self.taste = taste * torch.randn(policy.score.shape, generator=torch.Generator().manual_seed(seed))

    def logits(self, state: SessionState, requests: Requests) -> Tensor:
        return self.scale * self.policy.logits(state, requests) + self.taste[requests.candidates]


@pytest.fixture(scope="module")
def shop() -> Storefront:
    return Storefront(Config(n_users=N_LOGS * SESSIONS // 2, n_items=60))


@pytest.fixture(scope="module")
def behavior(shop: Storefront) -> BehaviorPolicy:
    return BehaviorPolicy(shop)


@pytest.fixture(scope="module")
def redrawn(shop: Storefront, behavior: BehaviorPolicy) -> list[SessionBatch]:
    """Logs of 60 sessions, two a user."""
    users = torch.arange(N_LOGS * SESSIONS) // 2
    sessions = rollout(shop, behavior, users, torch.Generator().manual_seed(11), max_steps=12)
    return [sessions.select(rows).trim() for rows in torch.arange(N_LOGS * SESSIONS).split(SESSIONS)]


@pytest.fixture(scope="module")
def p_value(behavior: BehaviorPolicy) -> Callable[..., float]:
    """The smallest corrected p-value of some sessions, with a fitted logging policy that is somewhat wrong."""
    fitted = batch_logits(Tasted(behavior, 0.3))
    counts = 300.0 * torch.rand(behavior.score.shape, generator=torch.Generator().manual_seed(1))
    targets = {
        "uniform": UniformPolicy(4),
        "popularity": PopularityPolicy(4, counts),
        "challenger": Tasted(behavior, 2.0, seed=3),
        "baseline": Tasted(behavior, 0.5, seed=4),
    }

    def smallest(*sessions: SessionBatch, seed: int = 0, ratio: RatioAssumption = RatioAssumption.FULL_SLATE) -> float:
        generator = torch.Generator().manual_seed(seed)
        check = check_propensities(sessions, fitted, targets, generator, ratio=ratio)
        assert check is not None
        return check.worst.p_value

    return smallest


@pytest.mark.parametrize(
    "ratio", [RatioAssumption.FULL_SLATE, pytest.param(RatioAssumption.CASCADE, marks=pytest.mark.slow)]
)
def test_sound_logs_are_called_wrong_no_more_often_than_the_level_says(
    ratio: RatioAssumption, redrawn: list[SessionBatch], p_value: Callable[..., float]
) -> None:
    found = np.array([p_value(sessions, seed=number, ratio=ratio) for number, sessions in enumerate(redrawn)])
    # Of 200 sound logs a test of level 5 % calls 10 wrong; more than 18 have probability 0.6 %.
    assert 1 <= np.count_nonzero(found < 0.05) <= 18
    assert np.count_nonzero(found < 0.001) <= 2


def log_probs_of(policy: MemorylessPolicy, sessions: SessionBatch) -> Tensor:
    requests, slates = sessions.requests(), sessions.slates.flatten(0, 1)
    return policy.log_prob(policy.start(requests), requests, slates).double().sum(1).view(sessions.mask.shape)


def of_another_version(taste: float, scale: float) -> Callable[[SessionBatch, BehaviorPolicy], Tensor]:
    return lambda sessions, behavior: log_probs_of(Tasted(behavior, taste, seed=9, scale=scale), sessions)


def of_another_request(sessions: SessionBatch, behavior: BehaviorPolicy) -> Tensor:
    log_probs = sessions.log_probs.clone()
    known = log_probs[sessions.mask]
    log_probs[sessions.mask] = known[torch.randperm(len(known), generator=torch.Generator().manual_seed(2))]
    return log_probs


@pytest.mark.parametrize(
    "claim",
    [
        pytest.param(lambda sessions, behavior: torch.zeros_like(sessions.log_probs), id="all 0"),
        pytest.param(lambda sessions, behavior: sessions.log_probs / log(10), id="to base 10"),
        pytest.param(lambda sessions, behavior: sessions.log_probs.exp(), id="probabilities"),
        pytest.param(of_another_request, id="of another request"),
        pytest.param(of_another_version(0.3, 1.0), id="of another version: other tastes"),
        pytest.param(of_another_version(0.0, 0.7), id="of another version: flatter"),
        pytest.param(of_another_version(0.0, 1.4), id="of another version: sharper"),
    ],
)
def test_log_probs_that_are_not_those_of_the_slates_are_found_out(
    redrawn: list[SessionBatch],
    behavior: BehaviorPolicy,
    p_value: Callable[..., float],
    claim: Callable[[SessionBatch, BehaviorPolicy], Tensor],
) -> None:
    logs = redrawn[:8]
    assert p_value(*logs) > 0.001
    assert p_value(*(replace(sessions, log_probs=claim(sessions, behavior)) for sessions in logs)) < 0.001


def test_log_probs_that_are_those_of_other_positions_are_found_out_where_the_cascade_rests_on_them(
    redrawn: list[SessionBatch], p_value: Callable[..., float]
) -> None:
    logs = redrawn[:8]
    turned = [
        replace(sessions, position_log_probs=sessions.position_log_probs.flip(2))
        for sessions in logs
        if sessions.position_log_probs is not None
    ]
    assert p_value(*logs, ratio=RatioAssumption.CASCADE) > 0.001
    assert p_value(*turned) > 0.001
    assert p_value(*turned, ratio=RatioAssumption.CASCADE) < 0.001


@pytest.mark.parametrize(("version", "sound"), [((0.05, 1.0), True), ((0.0, 0.3), False)])
def test_calibration_judges_an_estimate_whose_own_weights_are_all_1(
    redrawn: list[SessionBatch], behavior: BehaviorPolicy, version: tuple[float, float], sound: bool
) -> None:
    taste, scale = version
    estimate = Tasted(behavior, taste, scale=scale)
    claimed = [replace(part, log_probs=log_probs_of(estimate, part)) for part in redrawn[:60]]
    check = check_propensities(claimed, batch_logits(estimate), {}, torch.Generator().manual_seed(0), estimated=True)
    assert check is not None
    assert check.estimated
    assert {test.kind for test in check.tests} == {"calibration"}
    assert sum(test.observed for test in check.tests) == pytest.approx(1.0)
    # Slates that a too flat estimate calls likely are shown more often than it says.
    assert (check.tests[-1].observed < 1.1 * check.tests[-1].expected) == sound
    assert (check.worst.p_value > 0.05) == sound


def test_a_policy_that_is_all_but_the_logging_one_is_no_finding(redrawn: list[SessionBatch]) -> None:
    """Where a log was written at random, the uniform policy's weights are 1 but for rounding."""
    uniform = UniformPolicy(4)
    claimed = []
    for part in redrawn[:3]:
        claimed.append(replace(part, log_probs=log_probs_of(uniform, part) + 1e-6))
    check = check_propensities(claimed, batch_logits(uniform), {"uniform": uniform}, torch.Generator())
    assert check is not None
    assert [test.p_value for test in check.tests if test.kind == "mean weight"] == [1.0, 1.0]


def test_requests_of_unknown_log_prob_are_left_out_and_one_user_is_too_few(redrawn: list[SessionBatch]) -> None:
    uniform = UniformPolicy(4)
    part = redrawn[0]
    unknown = part.users != part.users[0]
    hidden = replace(part, log_probs=torch.where(unknown[:, None], torch.nan, part.log_probs))
    assert check_propensities([hidden], batch_logits(uniform), {}, torch.Generator()) is None
    nothing = replace(part, log_probs=torch.full_like(part.log_probs, torch.nan))
    assert check_propensities([nothing], batch_logits(uniform), {}, torch.Generator()) is None


def test_requests_of_one_user_count_as_one_observation() -> None:
    """A user's request copied nine times says no more than once: the p-value stays."""
    weights = np.random.default_rng(0).normal(1.4, 1.0, 40)
    users = np.arange(40)

    def worst(times: int) -> float:
        expectation = Expectation("mean weight", "uniform", 1.0, "all", 1.0, np.repeat(weights, times))
        check = judge_expectations([expectation], np.repeat(users, times), estimated=False)
        assert check is not None
        return check.worst.p_value

    assert worst(9) == pytest.approx(worst(1))
    assert worst(1) < 0.1


def test_holm_multiplies_by_how_many_are_left_and_keeps_the_order() -> None:
    assert holm(np.array([0.04, 0.01, 0.03])) == pytest.approx([0.06, 0.03, 0.06])
    assert holm(np.array([0.6, 0.9])) == pytest.approx([1.0, 1.0])


def test_users_too_few_to_ever_show_a_mistake_are_not_tested() -> None:
    # The statistic of U users is at most √U: 12 users never reach 0.001, and calling their log sound would be hope.
    def judged(n_users: int) -> object:
        users = np.arange(n_users)
        wrong = Expectation("mean weight", "any", 0.0, "all", 1.0, np.full(n_users, 20.0))
        return judge_expectations([wrong], users, estimated=False)

    assert judged(12) is None
    tested = judged(40)
    assert tested is not None
    assert tested.tests[0].p_value < 0.001  # type: ignore[attr-defined]
