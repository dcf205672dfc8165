from collections.abc import Callable
from dataclasses import replace

import torch
from torch.nn import functional

from components.interactions.batching import SessionBatch, SessionReader
from components.world_model.discriminator import Discriminator
from components.world_model.user_model import UserModel


def pad(batch: SessionBatch, n_steps: int) -> SessionBatch:
    return SessionBatch(
        **{
            name: value if name == "users" else functional.pad(value, (0, 0) * (value.dim() - 2) + (0, n_steps))
            for name, value in batch.columns().items()
        }
    )


def test_padding_never_changes_a_sessions_value(shop_model: UserModel, reader: SessionReader) -> None:
    torch.manual_seed(0)
    discriminator = Discriminator(shop_model.encoder)
    batch = next(reader.samples(30, torch.Generator().manual_seed(0)))[0].trim()

    short, long = discriminator.session_logits(batch), discriminator.session_logits(pad(batch, 5))

    torch.testing.assert_close(long, short)


def test_the_belief_in_a_whole_session_is_that_in_its_last_prefix(shop_model: UserModel, reader: SessionReader) -> None:
    torch.manual_seed(0)
    discriminator = Discriminator(shop_model.encoder)
    batch = next(reader.batches(30))
    last = (batch.lengths - 1)[:, None]

    beliefs = discriminator.beliefs(batch)

    torch.testing.assert_close(beliefs.gather(1, last)[:, 0], torch.sigmoid(discriminator.session_logits(batch)))
    assert not bool(beliefs[~batch.mask].any())


def test_a_belief_knows_nothing_of_what_comes_later(shop_model: UserModel, reader: SessionReader) -> None:
    torch.manual_seed(0)
    discriminator = Discriminator(shop_model.encoder)
    table = next(reader.tables())
    batch = table.batch(torch.nonzero(table.lengths >= 3)[:20, 0])

    torch.testing.assert_close(discriminator.beliefs(batch.first_steps(2)), discriminator.beliefs(batch)[:, :2])


def test_relative_beliefs_average_to_one_at_each_step(shop_model: UserModel, reader: SessionReader) -> None:
    torch.manual_seed(0)
    batch = next(reader.samples(60, torch.Generator().manual_seed(0)))[0].trim()

    relative = Discriminator(shop_model.encoder).relative_beliefs(batch)

    torch.testing.assert_close(relative.sum(0) / batch.mask.sum(0), torch.ones(batch.mask.shape[1]))


def test_what_was_shown_and_not_wanted_counts_too(shop_model: UserModel, reader: SessionReader) -> None:
    torch.manual_seed(0)
    discriminator = Discriminator(shop_model.encoder)
    batch = next(reader.batches(30))
    others = {**batch.columns(), "slates": batch.slates.flip(0)}

    assert not torch.allclose(discriminator.session_logits(SessionBatch(**others)), discriminator.session_logits(batch))


def test_without_logged_slates_sessions_are_told_apart_by_what_users_did_alone(
    make_model: Callable[..., UserModel], views: Callable[..., SessionBatch]
) -> None:
    torch.manual_seed(0)
    discriminator = Discriminator(make_model(0).encoder)
    real = views([[5, 9, 5, 30], [7, 7]])
    slates = torch.ones(2, 4, 3, dtype=torch.int32)
    made = replace(
        real, slates=slates, clicks=slates.float(), purchases=slates.float(), rewards=slates.float(),
        observed=slates > 0, purchase_observed=slates > 0,
    )  # fmt: skip

    assert torch.equal(discriminator.session_logits(made), discriminator.session_logits(real))


def test_leaving_is_read_only_where_real_sessions_tell_of_it(shop_model: UserModel, reader: SessionReader) -> None:
    torch.manual_seed(0)
    discriminator = Discriminator(shop_model.encoder)
    batch = next(reader.batches(30))
    censored = replace(batch, left=torch.zeros_like(batch.left))

    assert not torch.equal(discriminator.session_logits(batch), discriminator.session_logits(censored))
    discriminator.reads_leaving.fill_(False)
    torch.testing.assert_close(discriminator.session_logits(batch), discriminator.session_logits(censored))
