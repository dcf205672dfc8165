"""What stages refuse before they spend minutes, and what they leave out or estimate where a log knows less."""

import json
from pathlib import Path

import polars as pl
import pytest
import torch
from typer.testing import CliRunner

from components.agents.reinforce import ReinforceConfig
from components.errors import InputError
from components.interactions.batching import SessionReader
from components.interactions.contract import Evidence, Manifest, RatioAssumption, Reward
from components.interactions.covisitation import count_covisitation
from components.interactions.log_folder import Log, write_log
from components.interactions.vocabulary import Vocabulary
from components.policies.policy_folder import PolicyDescription, StoredPolicy, save_policy, shape_of
from components.policies.ranking_policy import RankingPolicy
from components.policies.request_features import RequestFeatures
from components.policies.session_encoder import EncoderConfig, EncoderShape, SessionEncoder
from flows import stages
from flows.command_line import app
from flows.config import LoopConfig


def test_a_reward_that_no_world_model_can_earn_is_named(storefront_log: Log, tmp_path: Path) -> None:
    manifest = storefront_log.manifest.model_copy(
        update={"signals": ("watch_time",), "reward": Reward(weights={"clicked": 1.0, "watch_time": 0.1})}
    )
    rows = storefront_log.scan().collect()
    rows = rows.with_columns(rows["clicked"].cast(manifest.schema()["signals.watch_time"]).alias("signals.watch_time"))
    write_log(tmp_path / "split" / "train", manifest, [rows], storefront_log.items())

    with pytest.raises(InputError, match=r"reward\.weights\.watch_time: .* expected weights of clicked and purchased"):
        stages.fit_user_model.compute(
            LoopConfig(), split=tmp_path / "split", out=tmp_path, progress=lambda message, share: None
        )


@pytest.mark.parametrize(
    ("changes", "credit"),
    [
        ({}, "positions"),
        ({"ratio_assumption": RatioAssumption.FULL_SLATE}, "slate"),
        ({"responses": "choice"}, "slate"),
    ],
)
def test_positions_have_credit_of_their_own_where_nothing_below_them_matters(
    storefront_log: Log, changes: dict[str, object], credit: str
) -> None:
    manifest = storefront_log.manifest.model_copy(update=changes)
    assert stages.reinforce_on(manifest, ReinforceConfig()).credit == credit
    assert stages.reinforce_on(manifest, ReinforceConfig(credit="clicks")).credit == "clicks"


def test_where_nothing_was_shown_nothing_pulls(storefront_log: Log) -> None:
    clicks: Manifest = storefront_log.manifest.model_copy(update={"evidence": Evidence.CLICKS})
    assert stages.reinforce_on(clicks, ReinforceConfig()).pull == 0.0
    assert stages.reinforce_on(storefront_log.manifest, ReinforceConfig()) == ReinforceConfig()


def forgetful(log: Log, out: Path, **columns: pl.Expr) -> Log:
    """A log that does not know with which probability its slates were shown."""
    manifest = log.manifest.model_copy(update={"evidence": Evidence.SLATES})
    rows = log.scan().collect().with_columns(slate_log_prob=pl.lit(None, dtype=pl.Float64), **columns)
    return write_log(out, manifest, [rows], log.items())


@pytest.fixture
def ranking(storefront_log: Log) -> StoredPolicy:
    """A ranking policy over an encoder that knows the shop's items."""
    vocabulary = Vocabulary.fit(storefront_log)
    items = vocabulary.item_features(storefront_log.items())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = SessionEncoder(
            EncoderShape(
                n_indices=vocabulary.size,
                n_item_features=items.shape[1],
                n_context=vocabulary.context_width,
                config=EncoderConfig(item_width=8, hidden_width=8),
            )
        )
    encoder.know_items(items, count_covisitation(storefront_log, vocabulary))
    features = RequestFeatures(encoder)
    batch = next(SessionReader(storefront_log, vocabulary).batches(400))
    real = batch.mask.flatten()
    features.fit(encoder.states(batch).select(real), batch.requests().select(real), vocabulary.counts())
    policy = RankingPolicy(features, slate_size=4)
    policy.weights.copy_(0.3 * torch.randn(features.width, generator=torch.Generator().manual_seed(5)))
    description = PolicyDescription(name="tiny", loop="shop", shape=shape_of(policy), vocabulary=vocabulary)
    return StoredPolicy(description, policy)


def test_a_log_without_log_probs_is_judged_by_estimated_ones_and_every_line_says_so(
    storefront_log: Log, ranking: StoredPolicy, tmp_path: Path
) -> None:
    save_policy(ranking, tmp_path)
    forgetful(storefront_log, tmp_path / "log")
    answer = CliRunner().invoke(app, ["evaluate", "--policy", str(tmp_path), "--log", str(tmp_path / "log")])
    assert answer.exit_code == 0, answer.output
    lines = answer.stdout.splitlines()
    assert len(lines) == 7
    assert all(line.endswith(", propensities estimated") for line in lines)

    plain = CliRunner().invoke(app, ["evaluate", "--policy", str(tmp_path), "--log", str(storefront_log.path)])
    assert len(plain.stdout.splitlines()) == 7
    assert "propensities estimated" not in plain.stdout


def test_a_log_in_parts_is_evaluated_like_the_same_log_in_one(
    storefront_log: Log, ranking: StoredPolicy, tmp_path: Path
) -> None:
    save_policy(ranking, tmp_path)
    rows = storefront_log.scan().collect()
    parts = [rows.filter(pl.col("session_id").rank("dense") % 3 == number) for number in range(3)]
    cut = write_log(tmp_path / "log", storefront_log.manifest, parts, storefront_log.items())
    answers = [
        CliRunner().invoke(app, ["evaluate", "--policy", str(tmp_path), "--log", str(log.path), "--json"])
        for log in (cut, storefront_log)
    ]
    one, other = (json.loads(answer.stdout) for answer in answers)
    assert len(one) == len(other) == 7
    for value, expected in zip(one, other, strict=True):
        numbers = {name for name, known in expected.items() if isinstance(known, float)}
        assert {name: value[name] for name in numbers} == pytest.approx(
            {name: expected[name] for name in numbers}, rel=1e-12, abs=1e-12
        )
        assert {name: value[name] for name in expected.keys() - numbers} == {
            name: expected[name] for name in expected.keys() - numbers
        }


def test_log_probs_are_not_estimated_where_no_value_could_follow(
    storefront_log: Log, ranking: StoredPolicy, tmp_path: Path
) -> None:
    none = pl.col("clicked").list.eval(pl.lit(False))
    log = forgetful(storefront_log, tmp_path / "log", clicked=none, purchased=none)
    reader = stages.read_to_judge(log, ranking, LoopConfig(), lambda message, share: None)
    assert not reader.propensities_estimated
    assert "no estimate of it" in (stages.not_identified(reader, stages.rewards_to_judge(reader)) or "")
