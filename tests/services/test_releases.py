from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.errors import InputError
from components.experiment.ab import Assignment
from components.interactions.log import InteractionLog
from services.releases import Release, ReleaseChangedError, Releases, arm_of

USERS = [f"user-{number}" for number in range(4_000)]


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.services)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "postgresql":
        database: str = request.getfixturevalue("postgresql").new_database()
        return database
    return f"sqlite:///{tmp_path / 'interactions.db'}"


@pytest.fixture
def releases(url: str) -> Iterator[Releases]:
    log = InteractionLog(url)
    log.upgrade()
    yield Releases(log)
    log.engine.dispose()


def arms(release: Release) -> dict[str, str]:
    assignment = Assignment(release.salt)
    return {user: arm_of(release, assignment, user) for user in USERS}


def test_the_first_champion_serves_everybody_and_is_there_for_another_process(releases: Releases, url: str) -> None:
    first = releases.start("shop", "p:1", "the first one")
    assert set(arms(first).values()) == {"champion"}
    assert Releases(InteractionLog(url)).current() == {"shop": first}
    with pytest.raises(InputError, match="has a champion already"):
        releases.start("shop", "p:2", "again")


def test_a_challenger_s_share_grows_without_taking_anybody_out(releases: Releases) -> None:
    releases.start("shop", "p:1", "")
    small = releases.canary("shop", "p:2", 0.05, 1_000, "")
    large = releases.canary("shop", "p:2", 0.3, 1_000, "")
    few, many = ({user for user, arm in arms(release).items() if arm == "challenger"} for release in (small, large))
    assert few < many
    # Four standard errors of a binomial share of 4,000.
    assert len(few) / len(USERS) == pytest.approx(0.05, abs=0.014)
    assert len(many) / len(USERS) == pytest.approx(0.3, abs=0.029)


def test_another_challenger_gets_users_of_its_own_draw(releases: Releases) -> None:
    releases.start("shop", "p:1", "")
    one = releases.canary("shop", "p:2", 0.2, 1_000, "")
    other = releases.canary("shop", "p:3", 0.2, 1_000, "")
    both = Counter(zip(arms(one).values(), arms(other).values(), strict=True))
    assert both["challenger", "challenger"] / len(USERS) == pytest.approx(0.04, abs=0.0125)


def test_baseline_and_challenger_share_no_users(releases: Releases) -> None:
    releases.start("shop", "p:1", "")
    releases.set_baseline("shop", "cem:1", 0.1, "")
    release = releases.canary("shop", "p:2", 0.5, 1_000, "")
    counts = Counter(arms(release).values())
    for arm, share in release.shares().items():
        assert counts[arm] / len(USERS) == pytest.approx(share, abs=0.032)
    assert release.policies() == {"champion": "p:1", "challenger": "p:2", "baseline": "cem:1"}
    with pytest.raises(InputError, match="baseline_share"):
        releases.set_baseline("shop", "cem:1", 0.2, "")
    assert releases.serving("shop") == release


def test_a_rollback_takes_the_challenger_away_and_then_brings_champions_back_in_turn(releases: Releases) -> None:
    releases.start("shop", "p:1", "")
    for policy in ("p:2", "p:3"):
        releases.promote(releases.canary("shop", policy, 0.5, 1_000, ""), "")
    releases.canary("shop", "p:4", 0.5, 1_000, "")
    seen = [releases.roll_back("shop", "bad") for _ in range(3)]
    assert [(release.champion, release.challenger) for release in seen] == [
        ("p:3", None), ("p:2", None), ("p:1", None),
    ]  # fmt: skip
    with pytest.raises(InputError, match="no earlier champion"):
        releases.roll_back("shop", "bad")
    assert [release.number for release in releases.history("shop")] == list(range(1, 10))


def test_only_a_challenger_is_promoted_and_only_another_policy_challenges(releases: Releases) -> None:
    with pytest.raises(InputError, match=r"nothing is released; the loops with a release are \[\]"):
        releases.canary("shop", "p:2", 0.1, 1_000, "")
    releases.start("shop", "p:1", "")
    with pytest.raises(InputError, match="has no challenger"):
        releases.promote(releases.serving("shop"), "")
    with pytest.raises(InputError, match="is the champion of loop 'shop'"):
        releases.canary("shop", "p:1", 0.1, 1_000, "")


@pytest.mark.parametrize("share", [0.0, 0.51, -0.1, 1.5])
def test_a_challenger_serves_somebody_and_half_of_all_at_most(releases: Releases, share: float) -> None:
    releases.start("shop", "p:1", "")
    with pytest.raises(InputError, match="challenger_share"):
        releases.canary("shop", "p:2", share, 1_000, "")


def test_two_who_release_at_once_do_not_overwrite_each_other(releases: Releases, url: str) -> None:
    last = releases.start("shop", "p:1", "")
    releases.canary("shop", "p:2", 0.1, 1_000, "mine")
    other = Releases(InteractionLog(url))
    other.serving = lambda loop: last  # type: ignore[method-assign]  # read before the other's was written
    with pytest.raises(ReleaseChangedError, match="somebody else changed what release 2 says"):
        other.canary("shop", "p:3", 0.1, 1_000, "theirs")
    assert releases.serving("shop").challenger == "p:2"


def test_what_was_judged_is_promoted_and_nothing_that_came_after(releases: Releases) -> None:
    releases.start("shop", "p:1", "")
    judged = releases.canary("shop", "p:2", 0.1, 1_000, "")
    releases.canary("shop", "p:3", 0.1, 1_000, "")
    with pytest.raises(ReleaseChangedError):
        releases.promote(judged, "")
    with pytest.raises(ReleaseChangedError):
        releases.roll_back("shop", "", left=judged.number)
    assert releases.serving("shop").champion == "p:1"


def test_a_rollback_to_what_cannot_be_served_is_refused(releases: Releases) -> None:
    releases.start("shop", "p:1", "")
    releases.promote(releases.canary("shop", "p:2", 0.1, 1_000, ""), "")

    def require(policy: str) -> None:
        raise InputError(f"policy {policy!r}: is gone")

    with pytest.raises(InputError, match="'p:1': is gone"):
        releases.roll_back("shop", "", require=require)
    assert releases.serving("shop").champion == "p:2"


def test_a_shadow_begins_no_experiment_and_a_share_does(releases: Releases) -> None:
    releases.start("shop", "p:1", "")
    canary = releases.canary("shop", "p:2", 0.1, 1_000, "")
    assert canary.experiment == canary.number == 2
    assert releases.set_shadow("shop", "p:3", "").experiment == 2
    assert releases.canary("shop", "p:2", 0.2, 1_000, "").experiment == 4
    assert releases.canary("shop", "p:2", 0.2, 5_000, "").experiment == 5  # another plan
    assert releases.roll_back("shop", "").experiment == 6
    assert releases.set_shadow("shop", None, "").experiment == 6


@given(
    salt=st.text(min_size=1, max_size=20),
    user=st.text(max_size=20),
    shares=st.tuples(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1)),
)
def test_nobody_is_in_two_arms_and_a_larger_share_keeps_its_users(
    salt: str, user: str, shares: tuple[float, float, float]
) -> None:
    small, large, other = min(shares[:2]), max(shares[:2]), shares[2]
    assignment = Assignment(salt)
    assert assignment.is_lowest(user, large) or not assignment.is_lowest(user, small)
    assert assignment.is_highest(user, large) or not assignment.is_highest(user, small)
    assert assignment.is_lowest(user, 1.0) and not assignment.is_lowest(user, 0.0)
    assert assignment.is_highest(user, 1.0) and not assignment.is_highest(user, 0.0)
    if large + other <= 1:
        assert not (assignment.is_lowest(user, large) and assignment.is_highest(user, other))
