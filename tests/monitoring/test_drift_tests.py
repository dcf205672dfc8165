"""The tests of drift against traffic whose truth is known."""

import numpy as np

from monitoring.drift_tests import Baseline, Bins, Difference, Sample, Volume, shares_against_unknown_times, volume

N_USERS = 2_000


class Crowd:
    """Users with lasting tastes and segments, who come back."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.taste = self.rng.normal(size=N_USERS)
        self.segment = np.array(list("abcde"), dtype=object)[self.rng.choice(5, N_USERS, p=[0.4, 0.3, 0.2, 0.08, 0.02])]

    def visits(self, n_sessions: int, n_windows: int, shift: float = 0.0, more_of_a: float = 1.0) -> Sample:
        weights = np.where(self.segment == "a", more_of_a, 1.0)
        users = self.rng.choice(N_USERS, size=n_sessions, p=weights / weights.sum())
        lengths = self.rng.geometric(0.3, size=n_sessions)
        user = np.repeat(users, lengths)
        window = np.repeat(self.rng.integers(n_windows, size=n_sessions), lengths)
        clicked = self.rng.random(len(user)) < 1 / (1 + np.exp(1.5 - self.taste[user] - shift))
        return Sample(
            user,
            window,
            {
                "segment": self.segment[user],
                "seen": self.taste[user] + shift + self.rng.normal(size=len(user)),
                "reward": clicked * self.rng.integers(1, 5, len(user)).astype(float),
                "log_weight": (0.3 + 0.3 * shift) * self.rng.normal(size=len(user)),
            },
        )


def each_test(before: Baseline, now: Sample) -> dict[str, Difference | None]:
    return {
        "segment": before.shares(now, "segment"),
        "seen": before.shares(now, "seen"),
        "reward": before.means(now, "reward"),
        "log_weight": before.effective_share(now, "log_weight"),
        "segment, times unknown": shares_against_unknown_times(before.sample, now, "segment"),
    }


def test_stable_traffic_rings_as_often_as_it_may() -> None:
    n = 120
    p_values: dict[str, list[float]] = {}
    for repetition in range(n):
        crowd = Crowd(repetition // 10)
        crowd.rng = np.random.default_rng([1, repetition])
        for name, found in each_test(Baseline(crowd.visits(2_800, 7)), crowd.visits(400, 1)).items():
            assert found is not None
            p_values.setdefault(name, []).append(found.p_value)
    for name, values in p_values.items():
        at_05, at_01 = (np.mean(np.array(values) <= level) for level in (0.05, 0.01))
        # Three standard errors of the share.
        assert at_05 <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / n), (name, at_05)
        assert at_01 <= 0.01 + 3 * np.sqrt(0.01 * 0.99 / n), (name, at_01)
        if name != "segment, times unknown":  # That one may ring less.
            assert at_05 >= 0.05 - 3 * np.sqrt(0.05 * 0.95 / n), (name, at_05)


def test_counting_requests_as_if_each_were_a_user_of_its_own_would_ring_far_too_often() -> None:
    rings = 0
    for repetition in range(30):
        crowd = Crowd(repetition)
        before, now = crowd.visits(2_800, 7), crowd.visits(400, 1)
        alone = [Sample(np.arange(len(side.user)), side.window, side.columns) for side in (before, now)]
        found = Baseline(alone[0]).shares(alone[1], "segment")
        rings += found is not None and found.p_value <= 0.05
    assert rings > 10


def test_every_kind_of_shift_is_found() -> None:
    crowd = Crowd(3)
    before = Baseline(crowd.visits(7_000, 7))
    moved = each_test(before, crowd.visits(1_000, 1, shift=0.7, more_of_a=2.0))
    for name, found in moved.items():
        assert found is not None and found.p_value < 1e-4, (name, found)
    reward = moved["reward"]
    assert reward is not None and reward.before is not None and reward.now is not None and reward.now > reward.before
    effective = moved["log_weight"]
    assert effective is not None and effective.now is not None and effective.before is not None
    assert effective.now < effective.before


def test_values_that_nobody_has_had_before_and_missing_ones_are_moves() -> None:
    crowd = Crowd(4)
    before, now = crowd.visits(3_000, 7), crowd.visits(600, 1)
    tenth = now.user % 10 == 0
    new, gone = now.columns["segment"].copy(), now.columns["seen"].copy()
    new[tenth], gone[tenth] = "unheard-of", np.nan
    changed = Sample(now.user, now.window, {"segment": new, "seen": gone})
    for name in ("segment", "seen"):
        found = Baseline(before).shares(changed, name)
        assert found is not None and found.p_value < 1e-6, (name, found)


def test_what_never_varies_is_not_tested_and_any_change_of_it_is_found() -> None:
    user, window = np.arange(500), np.zeros(500, dtype=np.int64)

    def constant(value: float) -> Sample:
        return Sample(user, window, {"x": np.full(500, value)})

    before = Baseline(constant(0.0))
    assert before.shares(constant(0.0), "x") is None and before.means(constant(0.0), "x") is None
    for found in (before.shares(constant(1.0), "x"), before.means(constant(1.0), "x")):
        assert found is not None and found.p_value < 1e-6
    assert before.means(constant(float("nan")), "x") is None


def test_bins_hold_a_tenth_each_and_frequent_values_alone() -> None:
    bins = Bins.of(np.arange(1_000.0))
    counts = np.bincount(bins.codes(np.arange(1_000.0)))
    assert counts.max() <= 101 and counts.sum() == 1_000
    often = np.array([0.0] * 800 + [float(number) for number in range(1, 201)])
    assert (np.bincount(Bins.of(often).codes(often)) == 800).sum() == 1
    assert Bins.of(often).codes(np.array([np.nan]))[0] == Bins.of(often).size - 1


def test_volume_follows_the_earlier_days_and_needs_three() -> None:
    rng = np.random.default_rng(2)

    def day(mean: float) -> Volume:
        visits = rng.geometric(0.3, size=rng.poisson(mean))
        return Volume(int(visits.sum()), int(np.square(visits).sum()))

    days = [day(1_000) for _ in range(14)]
    assert volume(days[:2], day(1_000)) is None and volume([], Volume(0, 0)) is None
    rings = 0
    for _ in range(200):
        found = volume([day(1_000) for _ in range(14)], day(1_000))
        rings += found is not None and found.p_value <= 0.05
    assert rings <= 0.05 * 200 + 3 * np.sqrt(200 * 0.05 * 0.95)
    for fewer in (day(600), Volume(0, 0)):
        found = volume(days, fewer)
        assert found is not None and found.p_value < 1e-5


def test_a_shop_whose_days_differ_much_does_not_ring_for_one_more_of_them() -> None:
    rng = np.random.default_rng(6)
    rings = 0
    for _ in range(300):
        counts = rng.poisson(4_000 * np.exp(0.3 * rng.normal(size=15)))
        found = volume([Volume(int(n), int(n)) for n in counts[:-1]], Volume(int(counts[-1]), int(counts[-1])))
        rings += found is not None and found.p_value <= 0.05
    assert rings <= 0.05 * 300 + 3 * np.sqrt(300 * 0.05 * 0.95)
