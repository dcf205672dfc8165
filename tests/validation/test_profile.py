"""What logged probabilities say of themselves: exact sums over all slates, and logs that policies truly wrote."""

import math
from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from components.environments.storefront import Config, write_storefront_log
from components.errors import InputError
from components.interactions.contract import Manifest
from components.interactions.log_folder import Log
from components.validation.checks import DataChecks, ValidationConfig, validate
from components.validation.profile import item_profile, profile, sum_part

Row = dict[str, Any]
ITEMS = [f"item-{number:02d}" for number in range(20)]


def numbers(rows: list[Row], manifest: Manifest) -> dict[str, float]:
    frame = pl.DataFrame(rows, schema=manifest.schema())
    n_candidates = pl.col("candidates").list.len().cast(pl.UInt32)
    return profile([sum_part(frame.with_columns(n_candidates=n_candidates), manifest, ())], manifest, ())


def failures(checks: DataChecks) -> dict[str, str]:
    return {result.metric: result.severity for result in checks.expectations if not result.success}


@pytest.mark.parametrize("utilities", [(0.0, 0.0, 0.0, 0.0), (2.0, 0.5, -1.0, 0.3)])
def test_the_weights_of_random_slates_average_to_one_under_any_policy(
    utilities: tuple[float, ...], rows: list[Row], manifest: Manifest
) -> None:
    """Each slate of 2 out of 4 stands in the log as often as its policy shows it, in 1 of 10,000 requests or more."""
    log = []
    for slate in permutations(range(4), 2):
        left, log_prob = list(range(4)), 0.0
        for item in slate:
            log_prob += utilities[item] - math.log(sum(math.exp(utilities[other]) for other in left))
            left.remove(item)
        row = rows[0] | {
            "candidates": ITEMS[:4],
            "slate": [ITEMS[item] for item in slate],
            "slate_log_prob": log_prob,
        }
        log += [row] * round(10_000 * math.exp(log_prob))

    found = numbers(log, manifest)

    assert found["mean_uniform_weight"] == pytest.approx(1.0, abs=5e-3)
    divergence = sum(
        math.exp(row["slate_log_prob"]) * (row["slate_log_prob"] + math.log(12))
        for row in {tuple(row["slate"]): row for row in log}.values()
    )
    assert found["log_prob_over_uniform"] == pytest.approx(divergence, abs=2e-3)
    assert found["equal_log_probs_off_uniform"] == 0.0


def test_slates_without_chance_are_not_compared(rows: list[Row], manifest: Manifest) -> None:
    pinned = rows[0] | {"candidates": ITEMS[:4], "slate": ITEMS[:2], "slate_log_prob": 0.0}
    drawn = pinned | {"slate_log_prob": -math.log(12)}

    found = numbers([pinned, drawn], manifest)

    assert found["share_of_certain_slates"] == found["share_of_uncertain_slates"] == 0.5
    assert found["mean_uniform_weight"] == pytest.approx(1.0)
    assert found["equal_log_probs_off_uniform"] == 0.0


def test_absurd_log_probs_leave_finite_numbers(rows: list[Row], manifest: Manifest) -> None:
    absurd = rows[0] | {"candidates": ITEMS, "slate_log_prob": -1e6}

    assert all(math.isfinite(number) for number in numbers([absurd] * 5, manifest).values())


def test_slates_drawn_at_random_are_honest_though_their_log_probs_are_all_equal(tmp_path: Path) -> None:
    config = Config(n_users=100, n_sessions=150, n_items=60, behavior_sharpness=0.0)
    log = write_storefront_log(config, "shop", tmp_path / "log")
    (tmp_path / "out").mkdir()

    assert failures(validate(log, ValidationConfig(), tmp_path / "out")) == {}


def test_a_sharp_policy_is_reported_and_no_more(rows: list[Row], save: Callable[..., Log], tmp_path: Path) -> None:
    """Utilities so far apart that 180 requests show few of the 6,840 slates: their mean weight is a matter of luck."""
    generator = np.random.default_rng(2)
    for row in rows:
        utilities = generator.permutation(len(ITEMS)).astype(float)
        order = np.argsort(-(utilities + generator.gumbel(size=len(ITEMS))))
        left = [math.log(np.exp(utilities[order[position:]]).sum()) for position in range(3)]
        row |= {"candidates": ITEMS, "candidates_digest": None, "slate": [ITEMS[item] for item in order[:3]]}
        row["slate_log_prob"] = float((utilities[order[:3]] - left).sum())
    (tmp_path / "out").mkdir()

    assert failures(validate(save(rows), ValidationConfig(), tmp_path / "out")) == {"mean_uniform_weight": "warning"}


def test_a_policy_that_mostly_takes_one_item_is_honest(
    rows: list[Row], save: Callable[..., Log], tmp_path: Path
) -> None:
    """ε-greedy over 8 items: all greedy slates have the same log_prob, which is not a random draw's."""
    generator = np.random.default_rng(11)
    for row in rows:
        row |= {"candidates": ITEMS[:8], "candidates_digest": None, "clicked": [row["step"] == 0], "purchased": [False]}
        explored = generator.random() < 0.2
        item = int(generator.integers(8)) if explored else 3
        row |= {"slate": [ITEMS[item]], "slate_log_prob": math.log(0.2 / 8 + 0.8 * (item == 3))}
        row["signals.watch_time"] = [1.0]
    (tmp_path / "out").mkdir()

    assert failures(validate(save(rows), ValidationConfig(), tmp_path / "out")) == {}


def test_log_probs_far_above_a_random_draws_are_refused_where_no_luck_explains_them(
    rows: list[Row], save: Callable[..., Log], tmp_path: Path
) -> None:
    for row in rows:
        row["slate_log_prob"] /= math.log(10)
    (tmp_path / "out").mkdir()

    with pytest.raises(InputError, match="importance weights of slates drawn at random average to 1: mean_uniform"):
        validate(save(rows), ValidationConfig(), tmp_path / "out")


def test_an_item_table_is_held_against_its_manifest(storefront_log: Log) -> None:
    items = storefront_log.items().head(4)
    broken = items.with_columns(
        item_id=pl.Series(["a", "A ", "b", None]),
        category=pl.Series(["category-1", "shoes", "shirts", None]),
        price=pl.lit(2.0, dtype=pl.Float32),
        rating=pl.lit(None, dtype=pl.Float32),
    )

    found = item_profile(broken, storefront_log.manifest)

    assert found == {
        "item_ids_alike": 1.0,
        "null_share.items.category": 0.25,
        "unknown_share.items.category": pytest.approx(2 / 3),
        "null_share.items.price": 0.0,
        "range.items.price": 0.0,
        "null_share.items.rating": 1.0,
    }
    assert item_profile(broken.clear(), storefront_log.manifest) == {}
