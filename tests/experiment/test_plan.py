import numpy as np
import pytest
from scipy import stats

from components.errors import InputError
from components.experiment.ab import analyze_ab
from components.experiment.arm import ArmMean, Contrast, arm_sums, fixed_bounds
from components.experiment.guardrails import Metric
from components.experiment.logged_sessions import logged_sessions
from components.experiment.plan import AbDesign, Baseline, logged_baseline, plan_ab
from components.experiment.sequential import boundary

BASELINE = Baseline(mean=2.0, standard_deviation=3.0)


def design(**changes) -> AbDesign:
    return AbDesign(**({"relative_effect": 0.2, "users_per_day": 100.0} | changes))


def test_users_at_the_planned_end_by_hand():
    # (1.8808 + 0.8416)² · 9 · (1.2² / 0.5 + 1 / 0.5) / 0.4² = 2,034.5 users of both arms; 21 days of 100.
    plan = plan_ab(BASELINE, design())
    assert (plan.fixed.users, plan.fixed.treatment_users, plan.fixed.days) == (2_036, 1_018, 21)


def test_users_at_the_planned_end_agree_with_statsmodels():
    power = pytest.importorskip("statsmodels.stats.power")
    for share, level, asked in ((0.5, 0.03, 0.8), (0.1, 0.025, 0.9), (0.7, 0.01, 0.5)):
        plan = plan_ab(BASELINE, design(treatment_share=share, level=level, power=asked))
        # A control whose spread is smaller by 1.2 says as much as one of 1.2² times the users.
        users = power.NormalIndPower().solve_power(
            effect_size=0.4 / (1.2 * 3),
            alpha=level,
            power=asked,
            ratio=1.2**2 * (1 - share) / share,
            alternative="larger",
        )
        assert plan.fixed.treatment_users == pytest.approx(users, abs=1)


def test_looking_every_day_costs_the_ratio_of_the_boundaries_squared():
    plan = plan_ab(BASELINE, design(relative_effect=0.02))
    found = stats.norm.ppf(0.8)
    expected = ((boundary(1.0, 0.03, 1.0) + found) / (stats.norm.ppf(0.97) + found)) ** 2
    assert plan.inflation == pytest.approx(expected, rel=1e-4)
    assert 1.9 < plan.inflation < 2.0


def test_the_detectable_effect_falls_with_the_days_to_what_was_asked_for():
    plan = plan_ab(BASELINE, design())
    for found in ([day.fixed for day in plan.curve], [day.sequential for day in plan.curve]):
        known = [effect for effect in found if effect is not None]
        assert len(known) > 5
        assert found[-len(known) :] == known
        assert (np.diff(known) < 0).all()
    assert all(day.sequential is None or day.sequential > day.fixed for day in plan.curve)
    assert plan.curve[-1].day == plan.sequential.days
    assert plan.curve[-1].sequential <= 0.2 < plan.curve[-2].sequential


@pytest.mark.parametrize("share", [0.1, 0.5, 0.8])
def test_what_a_day_finds_needs_the_users_of_that_day_to_be_found(share):
    plan = plan_ab(BASELINE, design(treatment_share=share, users_per_day=9.0))
    # The spread of a huge gain is all the treatment's, and grows as fast as the gain: fewer users find none at all.
    fewest = plan_ab(BASELINE, design(treatment_share=share, relative_effect=1e9)).fixed.users
    assert plan.curve[0].users < fewest
    for day in plan.curve:
        assert (day.fixed is None) == (day.users < fewest)
        if day.fixed is not None:
            planned = plan_ab(BASELINE, design(treatment_share=share, relative_effect=day.fixed)).fixed.users
            assert planned == pytest.approx(day.users, abs=2)


def simulate(generator, plan, test, relative_effect, *, looks):
    """Users who come once, as many as planned; rewards are skewed, and a gain scales them."""
    users = test.users
    day = np.arange(users) // int(plan.design.users_per_day)
    treated = generator.random(users) < plan.design.treatment_share
    rewards = generator.gamma((2 / 3) ** 2, 9 / 2, size=users) * np.where(treated, 1 + relative_effect, 1.0)
    return analyze_ab(
        np.arange(users), rewards, treated, label="live", treatment="new", control="old",
        planned_share=plan.design.treatment_share, day=day if looks else None, planned_sessions=users,
    )  # fmt: skip


def test_what_is_planned_is_found_as_often_as_asked_for():
    """Stated tolerance: 0.06. With the control's spread in both arms 0.62 are found."""
    generator = np.random.default_rng(0)
    plan = plan_ab(BASELINE, design(relative_effect=0.4, treatment_share=0.4))
    found, equal = (
        np.mean([simulate(generator, plan, plan.fixed, effect, looks=False).bounds(0.03).lower > 0 for _ in range(500)])
        for effect in (0.4, 0.0)
    )
    assert found == pytest.approx(0.8, abs=0.06)
    assert equal == pytest.approx(0.03, abs=0.025)


def test_what_is_planned_from_a_log_is_found_among_its_users(storefront_log):
    """The ratio that is tested: users come more than once. Stated tolerance: 0.05; with one spread 0.64 are."""
    generator = np.random.default_rng(2)
    sessions = logged_sessions(storefront_log)
    per_user = sessions.group_by("user_id", maintain_order=True).agg("reward")["reward"].to_list()
    plan = plan_ab(logged_baseline(storefront_log).reward, design(relative_effect=0.4))

    def arm(n_users: int) -> ArmMean:
        drawn = [per_user[user] for user in generator.integers(len(per_user), size=n_users)]
        return arm_sums(
            np.repeat(np.arange(n_users), [len(rewards) for rewards in drawn]), np.concatenate(drawn)
        ).mean()

    def found() -> bool:
        treatment, control = arm(plan.fixed.treatment_users), arm(plan.fixed.control_users)
        # 1.4 times the rewards of the treatment's users against the control's are these against control / 1.4.
        return fixed_bounds(Contrast.between(treatment, control, 1 / 1.4), plan.design.level).lower > 0

    assert np.mean([found() for _ in range(800)]) == pytest.approx(0.8, abs=0.05)


def test_an_ab_that_is_looked_at_every_day_finds_what_is_planned_and_half_of_them_by_the_day_that_is_named():
    generator = np.random.default_rng(1)
    plan = plan_ab(BASELINE, design(relative_effect=0.25))
    passed_on = []
    for _ in range(300):
        looks = simulate(generator, plan, plan.sequential, 0.25, looks=True).sequence.looks
        passed = [
            look.day
            for look in looks
            if look.difference > boundary(look.clock, 0.03, plan.sequential.users) * look.standard_error
        ]
        passed_on.append(min(passed, default=np.inf))
    # At least: an A/B that passed at an earlier look may stop there.
    assert np.mean(np.isfinite(passed_on)) > 0.8 - 0.06
    # By then at least half; a day earlier by not many more than half, since looks before it count too.
    assert 0.45 < np.mean(np.array(passed_on) <= plan.half_passed_by_day) < 0.7


def test_guardrails_are_planned_for_metrics_that_do_not_change():
    seen = {
        Metric.CLICKS: Baseline(mean=1.0, standard_deviation=1.0),
        Metric.PURCHASES: Baseline(mean=0.0, standard_deviation=0.0),
    }
    plan = plan_ab(BASELINE, design(), seen)
    clicks, purchases = plan.guardrails
    # (1.8808 + 0.8416)² · 4 / 0.05² = 11,859 users.
    assert (clicks.metric, clicks.margin) == (Metric.CLICKS, 0.05)
    assert clicks.test.users == pytest.approx(11_859, abs=2)
    assert purchases.test is None
    # Two checks, each with 90 % probability: (1.8808 + 1.2816)² · 4 / 0.05².
    assert plan.together.users == pytest.approx(16_001, abs=3)
    assert plan_ab(BASELINE, design()).together == plan_ab(BASELINE, design()).fixed


def test_a_log_tells_of_mean_deviation_and_users(storefront_log, corner_log):
    known = logged_baseline(storefront_log)
    assert known.reward.mean > 0
    assert set(known.guardrails) == set(Metric)
    assert known.users_per_day == pytest.approx(storefront_log.scan().collect()["user_id"].n_unique() / 28, rel=0.05)
    # Two users whose rewards are known: Ann's session of 6.5 and Bob's of 0, so the influences are ±3.25.
    corner = logged_baseline(corner_log)
    assert (corner.reward.mean, corner.reward.standard_deviation) == pytest.approx((3.25, 3.25 * np.sqrt(2)))


@pytest.mark.parametrize(
    ("baseline", "message"),
    [
        (Baseline(mean=0.0, standard_deviation=1.0), "mean: 0; expected a mean reward above 0"),
        (Baseline(mean=1.0, standard_deviation=0.0), "standard deviation: 0; expected rewards that differ"),
    ],
)
def test_a_baseline_without_effects_to_plan_for_is_refused(baseline, message):
    with pytest.raises(InputError, match=message):
        plan_ab(baseline, design())
