"""The loop closes: a policy serves, what it showed trains the next one, which replaces it; then the world breaks.

Everything is real: the commands in processes of their own, a Prefect server, a Bento over HTTP, a database. The shop is
simulated, so what policies are truly worth is known.
"""

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from bento_server import served
from living_shop import DAY_ONE, LATER, Shop, make_tokens, policy_of, world
from slateloop_process import Place

from flows.simulation import true_reward
from monitoring.drift_reference import drift_report, write_drift_reference

SHIFT = 0.75
#: PSI from which on a scalar has drifted; halves of one log differ by less than 0.02.
DRIFT = 0.05


@pytest.fixture
def shop(prefect_api: str, tmp_path: Path) -> Iterator[tuple[Shop, dict[str, Any]]]:
    """The first run's hardly tuned CEM, released and served; and that run."""
    place = Place(tmp_path / "shop", prefect_api)
    place.write("day-one.toml", DAY_ONE)
    place.write("later.toml", LATER)
    first = place.call("run", "--config", "day-one.toml", "--json", timeout=1_500).document
    world(first).items().write_parquet(place.root / "items.parquet")
    tokens = make_tokens(place)
    assert place.call("release", "promote", "--policy", first["lineage"]["baseline_tag"]).code == 0
    variables = {name: place.environment[name] for name in ("SLATELOOP_HOME",)} | {"SLATELOOP_OPEN": "false"}
    with served(first["lineage"]["bento_tag"], place.root / "home" / "bentoml", tmp_path, variables) as address:
        yield Shop(place, address, *tokens), first


@pytest.mark.slow
@pytest.mark.timeout(7_200)
def test_the_loop_closes_and_responds_when_the_world_breaks(shop: tuple[Shop, dict[str, Any]], tmp_path: Path) -> None:
    shop_, first = shop
    config = world(first).config

    # The CEM serves; what it shows is the next run's data.
    collected = shop_.visit(7)
    assert set(collected["policies"]) == {first["lineage"]["baseline_tag"]}
    second = shop_.learn()
    assert second["decision"]["outcome"] == "canary", second["decision"]
    challenger = second["lineage"]["policy_tag"]

    # Half of the users are served by the challenger, until the live A/B and the gate say that it may serve all.
    shop_.release("canary", "--policy", challenger, "--share", "0.5", "--planned-sessions", "12000")
    both = shop_.visit(3)
    assert set(both["arms"]) == {"champion", "challenger"}
    report = shop_.call("ab-report", "--config", "later.toml")
    assert report["decision"]["outcome"] == "promote", report["decision"]
    assert report["sessions"] == {arm: rewards["sessions"] for arm, rewards in both["arms"].items()}
    assert report["result"]["treatment_mean"] == pytest.approx(both["arms"]["challenger"]["mean_reward"])
    promoted = shop_.release("promote", "--config", "later.toml")
    promoted_at = datetime.now(UTC)
    assert (promoted["champion"], promoted["challenger"]) == (challenger, None)

    # The true reward has risen: as shoppers lived it, and by the simulator itself.
    after = shop_.visit(1)
    assert after["total"]["mean_reward"] - 2 * after["total"]["standard_error"] > collected["total"]["mean_reward"]
    before_truly, truly = (
        true_reward(config, policy_of(run, name), n_sessions=10_000)
        for run, name in ((first, "cem"), (second, "reinforce"))
    )
    assert truly.value - before_truly.value > 4 * (truly.standard_error + before_truly.standard_error)

    # The world breaks. Shoppers earn less, the estimate falls, the monitor sees it, and the next run learns from it.
    broken_at = datetime.now(UTC)
    broken = shop_.visit(4, f"source.taste_shift={SHIFT}")
    error = broken["total"]["standard_error"] + after["total"]["standard_error"]
    assert broken["total"]["mean_reward"] < after["total"]["mean_reward"] - 3 * error
    recent = shop_.log_between(broken_at, datetime.now(UTC), tmp_path / "recent")
    estimates = shop_.place.call("evaluate", "--policy", challenger, "--log", str(recent.path), "--json")
    ncis = next(part for part in json.loads(estimates.output) if part.get("estimator") == "one-request NCIS")
    promised = second["evidence"]["gating"]
    assert ncis["upper"] < promised["lower"], (ncis, promised)

    # The same champion before and after: what has moved are the shoppers.
    before = shop_.log_between(promoted_at, broken_at, tmp_path / "before")
    vocabulary = policy_of(second, "reinforce").description.vocabulary
    reference, current = (
        pl.read_parquet(write_drift_reference(log, vocabulary, tmp_path / f"{log.path.name}-reference", 0))
        for log in (before, recent)
    )
    calm = drift_report(*(reference[start::2] for start in range(2)), tmp_path, threshold=DRIFT)
    assert calm.drifted == (), calm.columns
    drift = drift_report(reference, current, tmp_path, threshold=DRIFT)
    assert {"click_rate", "reward"} <= set(drift.drifted), drift.columns

    third = shop_.learn(broken_at)
    shifted = config.model_copy(update={"taste_shift": SHIFT})
    stale, fresh = (
        true_reward(shifted, policy_of(run, name), n_sessions=10_000)
        for run, name in ((second, "reinforce"), (third, "reinforce"))
    )
    assert fresh.value - stale.value > 2 * (fresh.standard_error + stale.standard_error), (stale, fresh)
    print(
        json.dumps(
            {
                "mean reward of shoppers": [part["total"]["mean_reward"] for part in (collected, after, broken)],
                "true reward: cem, reinforce": [before_truly.value, truly.value],
                "true reward in the broken world: champion, next run's": [stale.value, fresh.value],
                "third run": third["decision"]["outcome"],
                "drifted": drift.drifted,
            }
        )
    )
