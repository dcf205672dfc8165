import math

import numpy as np
import polars as pl
import pytest
import torch

from flows.benchmarks.sessions import mean_figure, mixture_parts, tune_weights
from flows.benchmarks.trivago import Clickouts, _fit_logit, _losses


def frame(*pairs: tuple[str, str]) -> pl.DataFrame:
    return pl.DataFrame(pairs, schema=["item_id", "next_id"], orient="row")


def test_parts_of_the_mixture_are_rates_done_by_hand() -> None:
    train = frame(("a", "b"), ("a", "b"), ("a", "c"), ("b", "c"))

    parts, groups = mixture_parts(frame(("a", "b"), ("b", "b"), ("z", "c")), train, n_items=5)

    assert parts == pytest.approx(np.array([[2 / 3, 1 / 2, 1 / 5], [0.0, 1 / 2, 1 / 5], [0.0, 1 / 2, 1 / 5]]))
    # a was left three times (group of 2 and 3), b once, z never.
    assert groups.tolist() == [2, 1, 0]


def test_tuning_finds_the_mixture_that_made_the_data() -> None:
    generator = np.random.default_rng(0)
    first = generator.random(20_000) < 0.3
    parts = np.where(first[:, None], [[1.0, 0.1]], [[0.0, 0.1]])

    weights = tune_weights(parts, np.zeros(len(parts), dtype=np.int64))

    # P = w + (1 − w)/10 where the first part could say so, (1 − w)/10 elsewhere: the likelihood peaks at w = 2/9.
    assert weights[0] == pytest.approx([2 / 9, 7 / 9], abs=0.01)
    assert weights.sum(1) == pytest.approx(np.ones(len(weights)))


def test_a_logit_without_the_last_item_learns_the_rate_of_each_position() -> None:
    clicked = torch.tensor([0] * 6 + [1] * 3 + [2])
    clickouts = Clickouts(
        session_ids=pl.Series([str(k) for k in range(10)]),
        clicked=clicked,
        shown=torch.ones(10, 3, dtype=torch.bool),
        is_last=torch.nn.functional.one_hot(clicked, 3).float(),
    )

    position = _fit_logit(clickouts, 1e-6, with_last=False)
    both = _fit_logit(clickouts, 1e-6, with_last=True)

    entropy = -sum(p * math.log(p) for p in (0.6, 0.3, 0.1))
    assert float(_losses(clickouts, position).mean()) == pytest.approx(entropy, abs=1e-3)
    assert float(position[-1]) == 0.0
    assert float(_losses(clickouts, both).mean()) < 0.1


def test_a_figures_interval_holds_chance_of_sessions_and_of_seeds() -> None:
    alone = mean_figure([{"nats": 2.0, "nats_error": 0.1}], "nats")
    several = mean_figure([{"nats": 1.0, "nats_error": 0.1}, {"nats": 3.0, "nats_error": 0.1}], "nats")

    assert alone.interval == pytest.approx((2.0 - 0.196, 2.0 + 0.196))
    # Sessions: 0.1². Seeds: variance 2, over 2 of them.
    reach = 1.96 * math.sqrt(0.01 + 1.0)
    assert several.interval == pytest.approx((2.0 - reach, 2.0 + reach))
