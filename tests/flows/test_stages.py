"""What stages refuse before they spend minutes, and what they leave out or estimate where a log knows less."""

import json
import math
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from components.agents.reinforce import ReinforceConfig
from components.environments.storefront import Config as Storefront
from components.environments.storefront import write_storefront_log
from components.errors import InputError
from components.evaluation.trust_score import TrustScore, trust_score
from components.evaluation.world_model_trust import WorldModelTrust
from components.experiment.gate import Outcome
from components.interactions.batching import SessionReader
from components.interactions.contract import Evidence, Manifest, RatioAssumption, Reward
from components.interactions.covisitation import count_covisitation
from components.interactions.log_folder import Log, write_log
from components.interactions.vocabulary import Vocabulary
from components.policies.policy_folder import PolicyDescription, StoredPolicy, save_policy, shape_of
from components.policies.ranking_policy import RankingPolicy
from components.policies.request_features import RequestFeatures
from components.policies.session_encoder import EncoderConfig, EncoderShape, SessionEncoder
from components.validation.checks import DataChecks
from components.world_model.user_model import UserModel
from components.world_model.user_model_folder import load_user_model, save_user_model
from flows import stages
from flows.command_line import app
from flows.config import LoopConfig
from flows.stage_store import Stage


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
    rows = log.scan().collect().with_columns(slate_log_prob=None, position_log_probs=None, **columns)
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


LEARN_LITTLE = {
    "source": {"name": "table"},
    "encoder": {"item_width": 8, "hidden_width": 16},
    "user_model": {"max_epochs": 1},
    "behavior": {"epochs": 1},
    "adversarial": {"rounds": 0},
    "trust": {"sessions": 100},
    "reinforce": {"iterations": 2, "sessions": 50},
    "cem": {"iterations": 1, "population": 4, "elite": 2, "sessions": 50},
    "ab": {"sessions": 400},
}


def test_a_log_of_few_users_and_no_log_probs_ends_in_a_hold_that_says_so(tmp_path: Path) -> None:
    """Five users: one of the two folds has nobody to fit or to calibrate, and the holdout nobody for two arms."""
    shop = write_storefront_log(Storefront(n_users=20, n_sessions=400, n_items=60), "shop", tmp_path / "shop")
    users = shop.scan().select("user_id").collect()["user_id"].unique().sort().head(5)
    rows = shop.scan().filter(pl.col("user_id").is_in(users.implode())).collect()
    few = write_log(tmp_path / "few", shop.manifest, [rows], shop.items())
    forgetful(few, tmp_path / "checked" / "log")
    checks = DataChecks(
        n_requests=len(rows), n_sessions=rows["session_id"].n_unique(), n_users=5, n_items=60, n_quarantined=0,
        quarantine_reasons={}, examples=(), expectations=(), profile={}, passed=True,
    )  # fmt: skip
    (tmp_path / "checked" / "checks.json").write_text(checks.model_dump_json())
    config = LoopConfig.model_validate(LEARN_LITTLE)
    done = {"checked": tmp_path / "checked"}

    def run(stage: Stage, name: str, *upstream: str) -> None:
        done[name] = tmp_path / name
        done[name].mkdir()
        folders = {part: done[part] for part in upstream}
        stage.compute(config, **folders, out=done[name], progress=lambda message, share: None)

    run(stages.split_sessions, "split", "checked")
    run(stages.fit_user_model, "users", "split")
    run(stages.fit_behavior, "behavior", "split", "users")
    run(stages.fit_world_model, "world", "split", "users", "behavior")
    run(stages.train_policy, "policy", "split", "world", "behavior")
    run(stages.train_baseline, "baseline", "split", "world")
    run(stages.estimate_policies, "estimates", "split", "behavior", "world", "policy", "baseline")
    run(stages.probe_world_model, "probes", "split", "behavior", "world", "policy", "baseline", "estimates")
    run(stages.run_ab, "ab", "split", "policy", "baseline")
    run(stages.judge_evidence, "gate", "checked", "split", "probes", "estimates", "ab")

    decision = stages.read_decision(done["gate"])
    assert decision.outcome is Outcome.HOLD
    reasons = {reason.check: reason for reason in decision.reasons}
    assert not reasons["identification of the challenger"].passed
    assert "too few users were logged to estimate it" in reasons["identification of the challenger"].text
    assert reasons["A/B"].allows is Outcome.HOLD
    assert "at least two users in each arm" in reasons["A/B"].text


N_ARMS, N_OFFERED = 20, 6


def single_requests(n: int, out: Path) -> Log:
    """Two of six offered items, shown at random to a user who never comes back; each has a click rate of its own."""
    generator = np.random.default_rng(0)
    rates = 1 / (1 + np.exp(-np.random.default_rng(7).normal(-0.4, 1.2, N_ARMS)))
    offered = np.argsort(generator.random((n, N_ARMS)), axis=1)[:, :N_OFFERED]
    clicks = generator.random((n, 2)) < rates[offered[:, :2]]
    manifest = Manifest(
        loop="arms",
        source="by-hand",
        evidence=Evidence.PROPENSITIES,
        ratio_assumption=RatioAssumption.CASCADE,
        responses="per_position",
        slate_size=2,
        has_purchases=False,
        reward=Reward(weights={"clicked": 1.0}),
    )
    names = [f"arm-{number:02d}" for number in range(N_ARMS)]
    ids = [f"v{number:05d}" for number in range(n)]
    shown_at = [datetime(2026, 1, 1, tzinfo=UTC) + timedelta(minutes=number) for number in range(n)]
    blank = dict.fromkeys(manifest.schema()) | {"loop": "arms", "policy": "uniform", "step": 0, "events": []}
    columns = {
        "request_id": ids, "session_id": ids, "user_id": ids, "timestamp": shown_at, "available_at": shown_at,
        "candidates": [sorted(names[item] for item in row) for row in offered.tolist()],
        "slate": [[names[item] for item in row] for row in offered[:, :2].tolist()],
        "slate_log_prob": [-math.log(N_OFFERED * (N_OFFERED - 1))] * n, "clicked": clicks.tolist(),
        "session_end": ["censored"] * n,
    }  # fmt: skip
    rows = pl.DataFrame(
        {name: columns.get(name, [value] * n) for name, value in blank.items()}, schema=manifest.schema(), strict=False
    )
    return write_log(out, manifest, [rows], pl.DataFrame({"item_id": names}))


def turned(model: UserModel) -> Tensor:
    """What the model knows of the last item is taken for the first one's, and so on."""
    return model.encoder.id_rows[2:].flip(0)


def test_a_world_model_of_single_requests_is_trusted_by_its_requests_and_a_corrupted_one_is_not(tmp_path: Path) -> None:
    single_requests(9_000, tmp_path / "checked" / "log")
    config = LoopConfig.model_validate(LEARN_LITTLE | {"user_model": {"max_epochs": 3}, "trust": {"sessions": 1_000}})

    def run(stage: Stage, out: Path, **upstream: Path) -> Path:
        out.mkdir()
        stage.compute(config, **upstream, out=out, progress=lambda message, share: None)
        return out

    split = run(stages.split_sessions, tmp_path / "split", checked=tmp_path / "checked")
    users = run(stages.fit_user_model, tmp_path / "users", split=split)
    behavior = run(stages.fit_behavior, tmp_path / "behavior", split=split, users=users)

    def judged(name: str, corrupt: Callable[[UserModel], object]) -> TrustScore:
        stored = load_user_model(users)
        corrupt(stored.user_model)
        (tmp_path / name).mkdir()
        save_user_model(stored, tmp_path / name)
        world = run(
            stages.fit_world_model, tmp_path / f"{name}-judged", split=split, users=tmp_path / name, behavior=behavior
        )
        return trust_score(WorldModelTrust.model_validate_json((world / "trust.json").read_bytes()).parts)

    sound = judged("sound", lambda model: None)
    held = {part.name: part.passed for part in sound.parts}
    assert sound.passed
    assert [name for name, passed in held.items() if passed is None] == ["requests of a session", "reward of a session"]
    assert {"reward of a request", "clicks at position 1", "clicks at position 2", "two-sample test"} <= set(held)

    def failed(name: str, corrupt: Callable[[UserModel], object]) -> set[str]:
        return {part.name for part in judged(name, corrupt).parts if part.passed is False}

    often = failed("clicks-too-often", lambda model: model.encoder.click_bias.weight.data.add_(0.4))
    assert {"reward of a request", "clicks at position 1", "clicks at position 2"} <= often
    # About right on average, and wrong on every item.
    assert "likelihood gain" in failed("other-items", lambda model: model.encoder.id_rows[2:].copy_(turned(model)))


def test_where_no_end_is_known_requests_have_a_value_and_sessions_have_none(
    storefront_log: Log, ranking: StoredPolicy, tmp_path: Path
) -> None:
    save_policy(ranking, tmp_path)
    first = storefront_log.scan().filter(pl.col("step") == 0).with_columns(session_end=pl.lit("censored")).collect()
    write_log(tmp_path / "log", storefront_log.manifest, [first], storefront_log.items())
    answer = CliRunner().invoke(app, ["evaluate", "--policy", str(tmp_path), "--log", str(tmp_path / "log"), "--json"])
    assert answer.exit_code == 0, answer.output
    estimates = json.loads(answer.stdout)
    assert {part["estimand"] for part in estimates if part["kind"] == "value"} == {"one_request"}
    (session,) = (part for part in estimates if part["kind"] == "not_identified")
    assert session["estimand"] == "session"
    assert "No session is known to have ended" in session["reason"]


def test_too_few_users_of_a_log_to_evaluate_on_are_named(
    storefront_log: Log, ranking: StoredPolicy, tmp_path: Path
) -> None:
    user = storefront_log.scan().select("user_id").first().collect().item()
    one = storefront_log.scan().filter(pl.col("user_id") == user).collect()
    log = forgetful(
        write_log(tmp_path / "one", storefront_log.manifest, [one], storefront_log.items()), tmp_path / "log"
    )
    reader = stages.read_to_judge(log, ranking, LoopConfig(), lambda message, share: None)
    assert "too few users" in (stages.not_identified(reader, stages.rewards_to_judge(reader)) or "")


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
        # Sums merge exactly (tests of ratio_sums); a policy's logits are in single precision and, on some processors,
        # round by batch.
        assert {name: value[name] for name in numbers} == pytest.approx(
            {name: expected[name] for name in numbers}, rel=1e-7, abs=1e-7
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
