"""Estimated log_probs against the known ones: a shop's log that forgot them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from components.agents.behavior import BehaviorConfig
from components.agents.propensities import (
    CrossFittedBehavior,
    EstimatedReader,
    cross_fit,
    load_cross_fitted,
    save_cross_fitted,
)
from components.environments.storefront import Config, write_storefront_log
from components.evaluation.logged_policy import choose_strength, logged_requests, ratio_of
from components.evaluation.ncis import one_request_ncis
from components.evaluation.policy_value import PolicyValue
from components.evaluation.propensity_check import check_propensities
from components.interactions.batching import SessionReader
from components.interactions.contract import Evidence, RatioAssumption
from components.interactions.covisitation import count_covisitation
from components.interactions.log_folder import Log, write_log
from components.interactions.splits import TEST, TRAIN, SplitConfig, split_log
from components.interactions.vocabulary import Vocabulary
from components.policies.ranking_policy import NeuralSlatePolicy
from components.policies.request_features import RequestFeatures
from components.policies.session_encoder import EncoderConfig, EncoderShape, SessionEncoder
from components.policies.slate_policy import PopularityPolicy, SlatePolicy, UniformPolicy

N_SESSIONS = 2_500


def silent(message: str, share: float) -> None:
    pass


def forget_log_probs(log: Log, out: Path) -> Log:
    manifest = log.manifest.model_copy(update={"evidence": Evidence.SLATES})
    rows = log.scan().collect().with_columns(slate_log_prob=None, position_log_probs=None)
    return write_log(out, manifest, [rows], log.items())


def untrained(reader: SessionReader) -> NeuralSlatePolicy:
    """A policy over an encoder that knows the items and learned nothing else."""
    vocabulary, log = reader.vocabulary, reader.log
    features = vocabulary.item_features(log.items())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = SessionEncoder(
            EncoderShape(
                n_indices=vocabulary.size,
                n_item_features=features.shape[1],
                n_context=vocabulary.context_width,
                config=EncoderConfig(item_width=8, hidden_width=8),
            )
        )
        encoder.know_items(features, count_covisitation(log, vocabulary))
        policy = NeuralSlatePolicy(RequestFeatures(encoder), log.manifest.slate_size)
    batch = next(reader.batches(400))
    known = batch.mask.flatten()
    policy.features.fit(encoder.states(batch).select(known), batch.requests().select(known), vocabulary.counts())
    return policy


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Log]:
    folder = tmp_path_factory.mktemp("shop")
    config = Config(n_users=1_000, n_sessions=N_SESSIONS, n_items=60)
    log = write_storefront_log(config, "shop", folder / "log")
    return split_log(log, SplitConfig(), folder / "split", with_holdout=False)


@pytest.fixture(scope="module")
def forgotten(splits: dict[str, Log], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Log]:
    folder = tmp_path_factory.mktemp("forgotten")
    return {name: forget_log_probs(log, folder / name) for name, log in splits.items()}


@pytest.fixture(scope="module")
def vocabulary(splits: dict[str, Log]) -> Vocabulary:
    return Vocabulary.fit(splits[TRAIN])


@pytest.fixture(scope="module")
def fitted(forgotten: dict[str, Log], vocabulary: Vocabulary) -> CrossFittedBehavior:
    train = SessionReader(forgotten[TRAIN], vocabulary)
    return cross_fit(untrained(train), train, BehaviorConfig(batch_sessions=64), 0, silent)


def log_probs(reader: SessionReader) -> np.ndarray:
    return next(reader.tables()).rows.log_probs[:, 0].numpy()


def test_the_estimate_comes_close_to_the_truth_on_later_sessions_of_users_it_never_saw(
    splits: dict[str, Log], forgotten: dict[str, Log], vocabulary: Vocabulary, fitted: CrossFittedBehavior
) -> None:
    """The gap in likelihood is KL(logging policy || estimate) in nats a slate; a random slate's is 0.4."""
    true = log_probs(SessionReader(splits[TEST], vocabulary))
    estimated = log_probs(EstimatedReader(forgotten[TEST], vocabulary, fitted))
    uniform = -np.log(12 * 11 * 10 * 9)
    assert (true - uniform).mean() > 0.35
    assert 0.0 < (true - estimated).mean() < 0.1


@pytest.mark.parametrize("name", ["uniform", "popularity"])
def test_values_with_estimated_log_probs_are_those_with_true_ones_within_their_intervals(
    splits: dict[str, Log],
    forgotten: dict[str, Log],
    vocabulary: Vocabulary,
    fitted: CrossFittedBehavior,
    name: str,
) -> None:
    target: SlatePolicy = (
        UniformPolicy(4) if name == "uniform" else PopularityPolicy(4, vocabulary.counts(), sharpness=2.0)
    )

    def value(reader: SessionReader) -> PolicyValue:
        return one_request_ncis(
            logged_requests(reader, target).requests,
            policy=name,
            ratio=RatioAssumption.FULL_SLATE,
            propensities_estimated=reader.propensities_estimated,
        )

    true = value(SessionReader(splits[TEST], vocabulary))
    estimated = value(EstimatedReader(forgotten[TEST], vocabulary, fitted))
    assert true.lower is not None and true.upper is not None
    assert (true.propensities_estimated, estimated.propensities_estimated) == (False, True)
    # The same requests: only log_probs differ, so the shift is bias. Stated tolerance: half the interval's half-width.
    assert abs(estimated.value - true.value) < 0.5 * (true.upper - true.lower) / 2


def test_a_users_own_slates_have_no_part_in_the_estimate_of_them(storefront_log: Log, tmp_path: Path) -> None:
    """Turning one user's slates upside down changes what users of other folds get, and nothing in the user's own."""
    manifest = storefront_log.manifest.model_copy(update={"evidence": Evidence.SLATES})
    rows = storefront_log.scan().collect().sort("session_id", "step")
    user = rows["user_id"][0]
    turned = rows.with_columns(
        pl.when(pl.col("user_id") == user).then(pl.col(name).list.reverse()).otherwise(pl.col(name)).alias(name)
        for name in ("slate", "clicked", "purchased")
    )
    config = BehaviorConfig(epochs=1, batch_sessions=400)
    fits, readers = [], []
    for name, frame in (("as-shown", rows), ("turned", turned)):
        log = write_log(tmp_path / name, manifest, [frame], storefront_log.items())
        readers.append(SessionReader(log, Vocabulary.fit(log)))
        fits.append(cross_fit(untrained(readers[0]), readers[-1], config, 0, silent))
    code = next(readers[0].tables()).rows.users[:1]
    sessions = next(readers[0].batches(400))
    own_fold = fits[0].folds(sessions.users) == fits[0].folds(code)
    assert 0 < int(own_fold.sum()) < len(own_fold)

    own, others = sessions.select(own_fold), sessions.select(~own_fold)
    assert torch.equal(fits[0].logits(own), fits[1].logits(own))
    assert not torch.equal(fits[0].logits(others), fits[1].logits(others))


def test_an_overconfident_fit_is_calibrated(storefront_log: Log) -> None:
    reader = SessionReader(storefront_log, Vocabulary.fit(storefront_log))
    config = BehaviorConfig(epochs=3, batch_sessions=16, learning_rate=0.03)
    record = cross_fit(untrained(reader), reader, config, 0, silent).record
    assert min(record.temperatures) > 1.2
    assert all(after < before - 0.03 for before, after in zip(record.nats_before, record.nats, strict=True))


def test_what_is_stored_gives_the_same_estimates(
    forgotten: dict[str, Log], vocabulary: Vocabulary, fitted: CrossFittedBehavior, tmp_path: Path
) -> None:
    save_cross_fitted(fitted, "shop", vocabulary, tmp_path / "cross-fitted")
    loaded = load_cross_fitted(tmp_path / "cross-fitted")
    assert loaded is not None
    before, after = (log_probs(EstimatedReader(forgotten[TEST], vocabulary, part)) for part in (fitted, loaded))
    assert np.array_equal(before, after)
    assert load_cross_fitted(tmp_path / "nothing") is None


def test_estimates_take_the_place_of_unknown_log_probs_and_of_nothing_else(
    forgotten: dict[str, Log], vocabulary: Vocabulary, fitted: CrossFittedBehavior
) -> None:
    plain = next(SessionReader(forgotten[TEST], vocabulary).batches(200))
    filled = next(EstimatedReader(forgotten[TEST], vocabulary, fitted).batches(200))
    assert bool(plain.log_probs[plain.mask].isnan().all())
    assert bool((filled.log_probs[filled.mask] < 0).all())
    assert plain.position_log_probs is None
    assert filled.position_log_probs is not None
    assert torch.allclose(filled.position_log_probs.sum(2), filled.log_probs)
    before, after = plain.columns(), filled.columns()
    assert all(torch.equal(before[name], after[name]) for name in before if name != "log_probs")


def test_the_release_can_be_chosen_by_estimated_log_probs(
    forgotten: dict[str, Log], vocabulary: Vocabulary, fitted: CrossFittedBehavior
) -> None:
    policy = untrained(SessionReader(forgotten[TRAIN], vocabulary))
    policy.behavior.load_state_dict(fitted.policies[0].behavior.state_dict())
    taste = torch.randn(policy.learned.bias.weight.shape, generator=torch.Generator().manual_seed(0))
    policy.learned.bias.weight.data.copy_(2.0 * taste)
    reader = EstimatedReader(forgotten[TEST], vocabulary, fitted)
    assert ratio_of(reader) is RatioAssumption.CASCADE
    choice = choose_strength(policy, reader, 0.3, RatioAssumption.FULL_SLATE)
    assert 0.0 < choice.strength < 1.0
    assert choice.ess_share >= 0.3


def test_an_estimate_of_the_shop_fits_its_slates_and_one_that_is_too_sharp_does_not(
    forgotten: dict[str, Log], vocabulary: Vocabulary, fitted: CrossFittedBehavior
) -> None:
    def p_value(behavior: CrossFittedBehavior) -> float:
        sessions = EstimatedReader(forgotten[TEST], vocabulary, behavior).batches(1_024)
        generator = torch.Generator().manual_seed(0)
        check = check_propensities(sessions, behavior.logits, {"uniform": UniformPolicy(4)}, generator, estimated=True)
        assert check is not None
        return check.worst.p_value

    sharper = replace(fitted, record=fitted.record.model_copy(update={"temperatures": (0.4, 0.4)}))
    assert p_value(fitted) > 0.05
    assert p_value(sharper) < 0.001


@pytest.mark.parametrize(("n_users", "suffice"), [(1, False), (3, False), (30, True)])
def test_too_few_users_give_no_estimate(storefront_log: Log, tmp_path: Path, n_users: int, suffice: bool) -> None:
    rows = storefront_log.scan().collect()
    few = rows.filter(pl.col("user_id").is_in(rows["user_id"].unique().sort().head(n_users).implode()))
    log = write_log(tmp_path / "log", storefront_log.manifest, [few], storefront_log.items())
    reader = SessionReader(log, Vocabulary.fit(log))
    fitted = cross_fit(untrained(reader), reader, BehaviorConfig(epochs=1), 0, silent)
    assert (fitted is not None) == suffice
