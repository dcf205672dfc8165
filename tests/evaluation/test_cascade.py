"""Ratios by position: what each needs, and that they are right where users read from the top."""

from itertools import permutations

import numpy as np
import pytest
import torch
from scipy import stats
from torch.distributions import Normal

from components.errors import InputError
from components.evaluation.doubly_robust import ModelRewards, doubly_robust
from components.evaluation.importance_sampling import importance_sampling
from components.evaluation.logged_requests import LoggedRequests, Positions
from components.evaluation.ncis import one_request_ncis, one_request_sums, one_request_value
from components.evaluation.ratio_sums import merge
from components.interactions.contract import RatioAssumption
from components.policies import plackett_luce

FULL = {"policy": "challenger", "ratio": RatioAssumption.FULL_SLATE}
CASCADE = {"policy": "challenger", "ratio": RatioAssumption.CASCADE}


def requests(rewards, behavior, target, user=None):
    """A log from [M, K] arrays."""
    index = np.arange(len(rewards))
    return LoggedRequests(
        rewards.sum(1),
        behavior.sum(1),
        target.sum(1),
        index if user is None else user,
        index,
        np.zeros(len(index), dtype=np.int64),
        Positions(rewards, behavior, target),
    )


def test_the_value_by_hand():
    # Ratios by position (2, 1/2) and (1, 3); cumulated (2, 1) and (1, 3).
    log = requests(np.array([[1.0, 2.0], [4.0, 5.0]]), np.zeros((2, 2)), np.log([[2.0, 0.5], [1.0, 3.0]]))
    value = one_request_ncis(log, **CASCADE, cap=10.0)
    assert value.value == pytest.approx((2 * 1 + 1 * 4) / 3 + (1 * 2 + 3 * 5) / 4)
    # Kish's 9/5 and 16/10 of positions whose rewards vary alike.
    assert value.effective_sample_size == pytest.approx(2 / (5 / 9 + 10 / 16))
    assert importance_sampling(log, **CASCADE, cap=10.0).value == pytest.approx((2 + 4) / 2 + (2 + 15) / 2)


class Reader:
    """Four items, slates of two: an item is clicked by its appeal, and what follows a click is read half as often."""

    behavior = torch.tensor([0.5, 0.2, -0.3, 0.0])
    target = torch.tensor([-0.5, 0.4, 0.8, 0.2])
    appeal = np.array([0.1, 0.3, 0.6, 0.4])

    def expected(self, slate) -> np.ndarray:
        first, second = self.appeal[list(slate)]
        return np.array([first, second * (1 - 0.5 * first)])

    def true_value(self) -> float:
        slates = torch.tensor(list(permutations(range(4), 2)))
        chance = plackett_luce.log_prob(self.target.expand(len(slates), -1), slates).sum(1).exp()
        return float(
            sum(p * self.expected(slate).sum() for p, slate in zip(chance.numpy(), slates.numpy(), strict=True))
        )

    def draw(self, n: int, generator: torch.Generator) -> LoggedRequests:
        return self.draw_slates(n, generator)[0]

    def draw_slates(self, n: int, generator: torch.Generator) -> tuple[LoggedRequests, torch.Tensor]:
        logits = self.behavior.expand(n, -1)
        slates = plackett_luce.sample(logits, 2, generator)
        appeal = torch.from_numpy(self.appeal)[slates]
        chance = torch.rand(3, n, generator=generator)
        first = chance[0] < appeal[:, 0]
        second = (chance[1] < appeal[:, 1]) & ~(first & (chance[2] < 0.5))
        log_probs = [
            plackett_luce.log_prob(u.expand(n, -1), slates).double().numpy() for u in (self.behavior, self.target)
        ]
        return requests(torch.stack([first, second], dim=1).double().numpy(), *log_probs), slates


def test_where_users_read_from_the_top_both_ratios_hold_the_truth_and_the_cascade_is_narrower():
    reader, generator = Reader(), torch.Generator().manual_seed(0)
    truth = reader.true_value()
    logs = [reader.draw(400, generator) for _ in range(300)]
    low, high = stats.binom.interval(0.99, len(logs), 0.95)
    widths = {}
    for name, about in (("full", FULL), ("cascade", CASCADE)):
        values = [one_request_ncis(log, **about) for log in logs]
        assert low <= sum(value.lower <= truth <= value.upper for value in values) <= high, name
        widths[name] = np.mean([value.upper - value.lower for value in values])
    assert widths["cascade"] < 0.98 * widths["full"]


def test_so_many_requests_of_equal_weight_would_vary_as_much_as_the_cascade_does():
    # Rewards that do not depend on what is shown: the case that Kish's formula is exact for.
    generator = torch.Generator().manual_seed(6)
    behavior, target = torch.zeros(6), torch.tensor([2.0, 1.0, 0.0, 0.0, -1.0, -1.0])
    rates = torch.tensor([0.5, 0.3, 0.1])
    slates = plackett_luce.sample(behavior.expand(200 * 300, -1), 3, generator)
    log_probs = [plackett_luce.log_prob(u.expand(len(slates), -1), slates).double().numpy() for u in (behavior, target)]
    rewards = (torch.rand(slates.shape, generator=generator) < rates).double().numpy()
    values, sizes = [], {"full": [], "cascade": []}
    for rows in np.split(np.arange(len(slates)), 200):
        log = requests(rewards[rows], *(part[rows] for part in log_probs))
        value = one_request_ncis(log, **CASCADE)
        values.append(value.value)
        sizes["cascade"].append(value.effective_sample_size)
        sizes["full"].append(one_request_ncis(log, **FULL).effective_sample_size)
    varies = float((rates * (1 - rates)).sum()) / np.mean(sizes["cascade"])
    # The variance of 200 values has a standard error of 10 %.
    assert np.var(values) == pytest.approx(varies, rel=0.25)
    assert np.mean(sizes["cascade"]) > 1.5 * np.mean(sizes["full"])


def test_dr_by_the_cascade_is_right_for_any_model_of_the_positions_and_no_wider_than_by_whole_slates():
    reader, generator = Reader(), torch.Generator().manual_seed(5)
    truth = reader.true_value()
    slates = torch.tensor(list(permutations(range(4), 2)))
    chance = plackett_luce.log_prob(reader.target.expand(len(slates), -1), slates).sum(1).exp().numpy()
    model = {tuple(slate): 0.5 * reader.expected(slate) + 0.3 for slate in slates.numpy()}
    promised = float(sum(p * model[tuple(slate)].sum() for p, slate in zip(chance, slates.numpy(), strict=True)))
    assert abs(promised - truth) > 0.1
    log, shown = reader.draw_slates(200 * 400, generator)
    positions = np.array([model[tuple(slate)] for slate in shown.numpy()])
    expected = ModelRewards(positions.sum(1), np.full(len(shown), promised), positions)
    errors = {"full": [], "cascade": []}
    for rows in np.split(np.arange(len(shown)), 200):
        for name, about in (("full", FULL), ("cascade", CASCADE)):
            errors[name].append(doubly_robust(log.take(rows), expected.take(rows), **about).value - truth)
    assert abs(np.mean(errors["cascade"])) < 3 * np.std(errors["cascade"]) / np.sqrt(200)
    assert np.std(errors["cascade"]) < 1.02 * np.std(errors["full"])


def test_shards_of_a_cascade_add_to_the_whole():
    log = Reader().draw(60, torch.Generator().manual_seed(4))
    first, second = (
        one_request_sums(log.take(rows), 8.0, RatioAssumption.CASCADE) for rows in np.split(np.arange(60), [17])
    )
    whole = one_request_ncis(log, **CASCADE, cap=8.0)
    merged = one_request_value(merge(first, second), **CASCADE)
    assert merged.value == pytest.approx(whole.value)
    assert merged.effective_sample_size == pytest.approx(whole.effective_sample_size)


def test_shards_of_a_cascade_keep_their_positions():
    log = Reader().draw(50, torch.Generator().manual_seed(1))
    part = log.take(np.array([3, 1]))
    assert part.positions is not None
    np.testing.assert_array_equal(part.positions.rewards, log.positions.rewards[[3, 1]])


def test_a_log_without_positions_has_no_cascade(make_log):
    with pytest.raises(InputError, match="log_prob of each position"):
        one_request_ncis(make_log([1, 0], [0, 0]), **CASCADE)


def test_positions_that_do_not_add_up_are_refused():
    log = Reader().draw(5, torch.Generator().manual_seed(2))
    wrong = Positions(log.positions.rewards, log.positions.behavior_log_probs - 1, log.positions.target_log_probs)
    with pytest.raises(InputError, match=r"positions\.behavior_log_probs: do not add up"):
        LoggedRequests(
            log.rewards, log.behavior_log_probs, log.target_log_probs, log.user, log.session, log.step, wrong
        )


def test_densities_of_continuous_actions_weigh_as_probabilities_do():
    # Reward 1 - (a - 1)² of a Gaussian action: under the target N(0.6, 0.5²) it is 1 - (0.16 + 0.25) in expectation.
    generator = torch.Generator().manual_seed(3)
    behavior, target = Normal(0.0, 0.7), Normal(0.6, 0.5)
    truth, covered = 1 - (0.4**2 + 0.5**2), 0
    for _ in range(200):
        actions = torch.randn(500, generator=generator, dtype=torch.float64) * 0.7
        rewards = (1 - (actions - 1) ** 2 + 0.2 * torch.randn(500, generator=generator, dtype=torch.float64)).numpy()
        index = np.arange(500)
        log_probs = (density.log_prob(actions).numpy() for density in (behavior, target))
        value = one_request_ncis(LoggedRequests(rewards, *log_probs, index, index, np.zeros(500, dtype=int)), **FULL)
        covered += value.lower <= truth <= value.upper
    low, high = stats.binom.interval(0.99, 200, 0.95)
    assert low <= covered <= high
