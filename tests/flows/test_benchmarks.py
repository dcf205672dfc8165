import math
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from components.environments.irecgan_mdp import IRecGanMdp
from components.environments.rollout import rollout
from components.environments.storefront import BehaviorPolicy, Storefront
from components.evaluation.logged_policy import logged_requests
from components.interactions.batching import SessionReader
from components.interactions.contract import RatioAssumption
from components.interactions.importers import table as table_source
from components.interactions.log_folder import Log, open_log
from components.interactions.vocabulary import Vocabulary
from components.policies.slate_policy import UniformPolicy
from components.world_model.training import Progress
from flows.benchmarks import Document, Figure, _hidden_state, names, section
from flows.benchmarks._figures import mean_of_seeds, share_of
from flows.benchmarks._stages import StageRunner, mdp_log
from flows.benchmarks.coverage import RedrawnLog
from flows.benchmarks.coverage import _figures as coverage_figures
from flows.benchmarks.drift import SIZES
from flows.benchmarks.drift import _figures as drift_figures
from flows.benchmarks.gate import draw_users
from flows.benchmarks.sessions import mean_figure, mixture_parts, tune_weights
from flows.benchmarks.speed import PublishedLayout, _write_table, normalized_bootstrap
from flows.benchmarks.trivago import Clickouts, _fit_logit, _losses
from flows.config import LoopConfig
from flows.figures import ErrorPoint, bias_and_error
from flows.stage_store import stage


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


def test_a_mean_of_seeds_has_students_interval_which_lies_above_the_target_as_a_whole() -> None:
    values = np.array([1.0, 2.0, 3.0])

    figure, above_less = (mean_of_seeds(values, "clicks", "enough", above=above) for above in (0.0, -1.0))

    # The variance is 1, and Student's 97.5 % quantile with two degrees of freedom 4.303.
    reach = 4.303 / math.sqrt(3)
    assert figure.value == 2.0
    assert figure.interval == pytest.approx((2.0 - reach, 2.0 + reach), abs=1e-3)
    assert (figure.holds, above_less.holds) == (False, True)
    assert mean_of_seeds(values, "clicks").holds is None


@pytest.mark.parametrize("values", [[2.0], [2.0, 2.0, 2.0]])
def test_seeds_that_cannot_differ_or_do_not_have_no_interval(values: list[float]) -> None:
    figure = mean_of_seeds(np.array(values), "clicks", "above 1", above=1.0)

    assert (figure.value, figure.interval, figure.holds) == (2.0, None, True)


def test_a_share_has_the_exact_binomial_interval() -> None:
    never = share_of(0, 10, "logs", "at most 0.1", lambda share: share <= 0.1)
    often = share_of(9, 10, "logs", "at most 0.1", lambda share: share <= 0.1)

    # The largest p that gives no hit in ten with a chance of 2.5 %.
    assert (never.value, never.unit, never.holds) == (0.0, "share of 10 logs", True)
    assert never.interval == pytest.approx((0.0, 1.0 - 0.025**0.1))
    assert (often.value, often.holds) == (0.9, False)


def test_a_stage_is_computed_once_for_the_same_settings_and_upstream(tmp_path: Path) -> None:
    computed = []

    @stage("noted", "reinforce")
    def note(config: LoopConfig, out: Path, progress: Progress, before: Path | None = None) -> None:
        computed.append((config.seed, before and (before / "seed").read_text()))
        (out / "seed").write_text(str(config.seed))

    first, second = LoopConfig(seed=1), LoopConfig(seed=2)
    for run in (StageRunner(tmp_path), StageRunner(tmp_path)):
        refs = [run(config, note) for config in (first, second)]
        of_second = run(first, note, before=refs[1])
        assert [(ref.path / "seed").read_text() for ref in (*refs, of_second)] == ["1", "2", "1"]
        # A setting that the stage does not read changes nothing.
        assert run(first.model_copy(update={"candidates": 7}), note) == refs[0]

    assert computed == [(1, None), (2, None), (1, "2")]


def test_a_log_of_the_mdp_is_that_of_the_configurations_seed(tmp_path: Path) -> None:
    run, log = StageRunner(tmp_path), mdp_log(IRecGanMdp(n_items=8, slate_size=2, seed=0), UniformPolicy(2), 20, 5)

    one, two = (open_log(run(LoopConfig(loop="mdp", seed=seed), log).path / "log") for seed in (1, 2))

    assert one.manifest.loop == "mdp"
    assert one.scan().collect()["session_id"].n_unique() == 20
    assert one.manifest.content_digest != two.manifest.content_digest


def test_a_skipped_figure_says_why_and_shows_no_number() -> None:
    figure = Figure(value=math.nan, unit="times", target="at least 10", skipped="no peer")

    written = section(Document(name="speed", figures={"ratio": figure}, budget="", lineage={"code": "c"}))

    assert "| ratio | skipped: no peer | times | at least 10 |  |" in written


def test_the_shifts_of_the_drift_benchmark_stand_in_a_row_for_each_kind() -> None:
    def weeks(*hours: float) -> list[dict[str, float]]:
        return [{"hours": one, "tests": 18.0} | ({"panel.reward": 1.0} if one < math.inf else {}) for one in hours]

    shifted = {(kind, size): weeks(math.inf, math.inf, 8.0) for kind, sizes in SIZES.items() for size in sizes}
    shifted["taste", 0.5] = weeks(4.0, 12.0, 4.0)
    figures = drift_figures(
        weeks(math.inf, math.inf), shifted, {"requests": 1e6, "importing": 45.0, "seconds": 61.0, "gigabytes": 0.8}
    )  # fmt: skip

    written = section(Document(name="drift", figures=figures, budget="", lineage={"code": "c"}))

    assert "| stable.false_alarms | 0 (0 to 0.8419) | share of 2 stable weeks | at most 0.05 | yes |" in written
    assert (
        "s to import 1,000,000 requests from a database, read and compare them | at most 60 | **missed** |" in written
    )
    # Where most weeks are silent there is no median of the hours.
    taste = "| taste | tastes turn, share of half a circle | 0.1: 33% | 0.25: 33% | 0.5: 100%, 4 h | reward 100% |"
    assert taste in written
    assert not any("taste." in line for line in written.splitlines())


def test_the_published_layout_is_the_same_sessions_with_work_for_every_padded_place(storefront_log: Log) -> None:
    vocabulary = Vocabulary.fit(storefront_log)
    plain = SessionReader(storefront_log, vocabulary)
    lists = ("slates", "position_log_probs", "clicks", "purchases", "observed", "purchase_observed", "rewards")
    published = PublishedLayout(storefront_log, vocabulary, lists)
    (ours,) = next(plain.samples(50, torch.Generator().manual_seed(0)))
    (theirs,) = next(published.samples(50, torch.Generator().manual_seed(0)))

    assert bool(theirs.mask.all())
    assert theirs.mask.shape == ours.mask.shape
    assert theirs.slates.shape[2] == 120
    torch.testing.assert_close(theirs.slates[..., :4][ours.mask], ours.slates[ours.mask])
    torch.testing.assert_close(theirs.clicks[..., :4][ours.mask], ours.clicks[ours.mask])
    assert not bool(theirs.slates[..., 4:].any())


def test_bounds_of_normalised_values_are_those_of_their_mean() -> None:
    generator = np.random.default_rng(0)
    values = generator.normal(2.0, 1.0, 400)

    low, high = normalized_bootstrap(values, 2_000, generator)

    reach = 1.96 * values.std() / math.sqrt(len(values))
    assert (low, high) == pytest.approx((values.mean() - reach, values.mean() + reach), abs=0.01)


def test_the_large_table_is_the_block_s_log_again_and_again(storefront_log: Log, tmp_path: Path) -> None:
    _write_table(storefront_log, 3, tmp_path / "table")

    log = table_source.import_log(table_source.Config(), tmp_path / "table", tmp_path / "log", "shop")

    block, rows = storefront_log.scan().collect(), log.scan().collect()
    assert rows["request_id"].n_unique() == rows.height == 3 * block.height
    assert rows["user_id"].n_unique() == 3 * block["user_id"].n_unique()
    second = rows.filter(pl.col("session_id").str.starts_with("001-")).sort("session_id", "step")
    for column in ("candidates", "slate", "clicked", "slate_log_prob", "session_end", "timestamp"):
        assert second[column].to_list() == block[column].to_list()


def test_what_benchmarks_share_is_no_benchmark() -> None:
    assert {"coverage", "gate", "speed", "virtual-taobao"} <= set(names())
    assert not [name for name in names() if name.startswith("_")]


def test_users_are_drawn_with_all_their_sessions_and_count_anew_each_time() -> None:
    user = np.array([3, 3, 5, 7, 7, 7])

    drawn = draw_users(user, 200, np.random.default_rng(0))

    for number in range(200):
        rows = drawn.rows[drawn.users == number]
        assert len(set(user[rows])) == 1
        assert sorted(rows) == sorted(np.flatnonzero(user == user[rows[0]]))
    assert set(user[drawn.rows]) == {3, 5, 7}


def test_a_redrawn_log_is_read_as_often_as_one_likes_in_the_same_order(storefront: Storefront) -> None:
    users = torch.arange(40)
    batch = rollout(storefront, BehaviorPolicy(storefront), users, torch.Generator().manual_seed(0), 10)
    log = RedrawnLog(batch)

    first, second = (torch.cat([part.users for part in log.batches(7)]) for _ in range(2))

    assert torch.equal(first, users)
    assert torch.equal(second, users)
    judged = logged_requests(log, UniformPolicy(storefront.slate_size), RatioAssumption.CASCADE)
    assert len(judged.requests.rewards) == int(batch.mask.sum())


def test_errors_are_drawn_with_their_figures_in_words() -> None:
    points = [ErrorPoint(250, -0.04, 0.01, 0.2), ErrorPoint(2_000, -0.01, 0.005, 0.07)]

    drawn = bias_and_error({"NCIS": points, "IS": points}, title="storefront")

    assert "NCIS bias −1 %, error 7 %" in drawn.caption.replace("\N{NO-BREAK SPACE}", " ").replace("-", "−")
    assert drawn.file.startswith('<svg xmlns="http://www.w3.org/2000/svg"')
    assert all(f">{size}</text>" in drawn.file for size in ("250", "2,000"))
    assert "mathdefault" not in drawn.file


def test_coverage_holds_within_the_binomial_interval_and_an_estimator_without_logs_is_missed() -> None:
    counted = {"n": 1_000.0, "hits": 950.0, "ess": 6e5}
    total = {f"gating.one-request NCIS.{key}": value for key, value in counted.items()}
    total |= {f"below.IS.{key}": value for key, value in (counted | {"hits": 100.0}).items()}

    figures = coverage_figures("mdp", total)
    low = coverage_figures("mdp", total | {"gating.one-request NCIS.hits": 930.0})

    assert figures["mdp.coverage.one-request NCIS"].holds is True
    assert low["mdp.coverage.one-request NCIS"].holds is False
    assert figures["mdp.coverage.DR"].holds is False
    assert figures["mdp.coverage.DR"].skipped == "no log reached the ESS floor"
    assert figures["mdp.coverage_below_floor.IS"].holds is None


@pytest.mark.slow
def test_a_policy_of_a_short_log_of_the_hidden_mdp_beats_random_slates_and_not_the_exact_filter() -> None:
    result = _hidden_state.learn_from_log(1, quick=True)

    assert result["bayes_nats"] < result["user_model_nats"] < result["bayes_nats"] + 0.2
    assert result["random"] < result["reinforce"] < result["bayes_slates"]
