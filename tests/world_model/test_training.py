from pathlib import Path

import polars as pl
import pytest
import torch

from components.interactions.batching import SessionReader
from components.interactions.log_folder import write_log
from components.world_model.training import (
    LikelihoodConfig,
    LikelihoodTraining,
    NegativeSampler,
    evaluate_likelihood,
    train_by_likelihood,
)
from components.world_model.user_model import UserModel


def train(model: UserModel, reader: SessionReader, **settings: int) -> LikelihoodTraining:
    config = LikelihoodConfig(**({"max_epochs": 3, "batch_sessions": 64} | settings))
    generator = torch.Generator().manual_seed(0)
    counts = reader.vocabulary.counts()
    return train_by_likelihood(model, reader, reader, config, counts, generator, lambda message, share: None)


def test_training_improves_the_likelihood_and_keeps_the_best_pass(shop_model: UserModel, reader: SessionReader) -> None:
    before = float(evaluate_likelihood(shop_model, reader).per_request)

    training = train(shop_model, reader)

    after = float(evaluate_likelihood(shop_model, reader).per_request)
    assert after < 0.97 * before
    assert after == pytest.approx(min(epoch.validation for epoch in training.history), rel=1e-5)
    assert not training.user_model.training


def test_the_same_seed_gives_the_same_weights(shop_model: UserModel, reader: SessionReader) -> None:
    begin = {name: value.clone() for name, value in shop_model.state_dict().items()}
    trained = []
    for _ in range(2):
        shop_model.load_state_dict(begin)
        train(shop_model, reader, max_epochs=1)
        trained.append({name: value.clone() for name, value in shop_model.state_dict().items()})

    assert all(torch.equal(trained[0][name], trained[1][name]) for name in begin)


def test_sparse_gradients_of_look_ups_are_those_of_dense_ones(shop_model: UserModel, reader: SessionReader) -> None:
    batch = next(reader.batches(30))
    gradients = []
    for sparse in (True, False):
        shop_model.zero_grad()
        shop_model.encoder.train(sparse)
        shop_model.log_likelihood(batch).total.backward()
        gradient = shop_model.encoder.id_embedding.weight.grad
        assert gradient is not None and gradient.is_sparse == sparse
        gradients.append(gradient.to_dense() if sparse else gradient)

    torch.testing.assert_close(*gradients)


def test_negatives_are_distinct_and_known_with_their_chance_to_be_drawn() -> None:
    counts = torch.tensor([0.0, 0.0, 1.0, 16.0, 81.0])
    sampler = NegativeSampler.of(counts, 3)
    generator = torch.Generator().manual_seed(0)

    drawn = torch.zeros(5)
    for _ in range(4_000):
        items, log_q = sampler.draw(generator)
        drawn[items] += 1

    # count^0.75 is 1, 8 and 27 of 36; an item is missed three times in a row with (1 - p)^3.
    expected = 1 - (1 - torch.tensor([0.0, 0.0, 1.0, 8.0, 27.0]) / 36) ** 3
    torch.testing.assert_close(drawn / 4_000, expected, atol=0.025, rtol=0.0)
    torch.testing.assert_close(log_q, expected[items].log())


def test_where_training_saw_no_purchase_none_is_sampled(
    shop_model: UserModel, reader: SessionReader, tmp_path: Path
) -> None:
    log = reader.log
    unsold = log.scan().with_columns(purchased=pl.lit(None, dtype=pl.List(pl.Boolean))).collect()
    without = SessionReader(write_log(tmp_path / "log", log.manifest, [unsold], log.items()), reader.vocabulary)
    batch = next(reader.batches(400))
    state, slates = shop_model.encoder.states(batch), batch.slates.flatten(0, 1)

    def purchases() -> float:
        return float(shop_model.sample_responses(state, slates, torch.Generator().manual_seed(0))[1].sum())

    train(shop_model, reader, max_epochs=1)
    assert purchases() > 0
    train(shop_model, without, max_epochs=1)
    assert purchases() == 0


def test_where_no_request_tells_who_stayed_losses_are_per_request_and_leaving_is_not_known(
    shop_model: UserModel, reader: SessionReader, tmp_path: Path
) -> None:
    log = reader.log
    first = log.scan().filter(pl.col("step") == 0).with_columns(session_end=pl.lit("censored")).collect()
    single = SessionReader(write_log(tmp_path / "log", log.manifest, [first], log.items()), reader.vocabulary)

    trained = train(shop_model, reader, max_epochs=1)
    assert trained.user_model.knows_leaving
    trained = train(shop_model, single, max_epochs=1)
    assert not trained.user_model.knows_leaving
    whole = evaluate_likelihood(shop_model, single)
    assert float(whole.n_leave) == 0.0
    assert float(whole.per_request) == pytest.approx(float(whole.total) / first.height)
