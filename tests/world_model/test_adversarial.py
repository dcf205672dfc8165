import torch

from components.environments.rollout import rollout
from components.interactions.batching import SessionReader
from components.policies.slate_policy import UniformPolicy
from components.world_model.adversarial import AdversarialConfig, generate_with_beliefs, join, train_adversarially
from components.world_model.discriminator import Discriminator
from components.world_model.environment import WorldModel
from components.world_model.user_model import UserModel

CONFIG = AdversarialConfig(
    rounds=1, sessions=60, discriminator_epochs=1, user_steps=1, step_sessions=20, completions=3, max_steps=5,
    batch_sessions=20,
)  # fmt: skip


def world_of(model: UserModel, reader: SessionReader) -> WorldModel:
    manifest = reader.log.manifest
    counts = reader.vocabulary.counts()
    return WorldModel(model, next(reader.tables()), manifest.reward, manifest.slate_size, 12, counts)


def discriminator_of(model: UserModel) -> Discriminator:
    torch.manual_seed(0)
    return Discriminator(model.encoder)


def test_a_sessions_last_request_is_believed_as_much_as_the_session(
    shop_model: UserModel, reader: SessionReader
) -> None:
    world, discriminator = world_of(shop_model, reader), discriminator_of(shop_model)
    behavior = UniformPolicy(world.slate_size)

    batch, beliefs = generate_with_beliefs(world, behavior, discriminator, CONFIG, torch.Generator().manual_seed(0))

    last = (batch.lengths - 1)[:, None]
    whole = torch.sigmoid(discriminator.session_logits(batch))
    assert beliefs.shape == batch.mask.shape == (CONFIG.step_sessions, batch.mask.shape[1])
    torch.testing.assert_close(beliefs.gather(1, last)[:, 0], whole)
    assert not bool(beliefs[~batch.mask].any())
    assert bool(((beliefs > 0) & (beliefs < 1))[batch.mask].all())


def test_a_discriminator_without_opinion_believes_all_prefixes_alike(
    shop_model: UserModel, reader: SessionReader
) -> None:
    world, discriminator = world_of(shop_model, reader), discriminator_of(shop_model)
    with torch.no_grad():
        for parameter in discriminator.parameters():
            parameter.zero_()

    batch, beliefs = generate_with_beliefs(
        world, UniformPolicy(world.slate_size), discriminator, CONFIG, torch.Generator().manual_seed(0)
    )

    torch.testing.assert_close(beliefs, 0.5 * batch.mask)


def test_a_completed_prefix_is_the_prefix_followed_by_the_completion(
    shop_model: UserModel, reader: SessionReader
) -> None:
    world = world_of(shop_model, reader)
    behavior, users = UniformPolicy(world.slate_size), torch.arange(20)
    first, second = (rollout(world, behavior, users, torch.Generator().manual_seed(seed), 5) for seed in (0, 1))

    joined = join(first, 2, second)

    assert joined.mask.shape[1] == 2 + second.mask.shape[1]
    assert torch.equal(joined.slates[:, :2], first.slates[:, :2])
    assert torch.equal(joined.slates[:, 2:], second.slates)
    assert torch.equal(joined.users, first.users)


def test_a_round_that_costs_likelihood_is_undone(shop_model: UserModel, reader: SessionReader) -> None:
    before = {name: value.clone() for name, value in shop_model.state_dict().items()}
    world = world_of(shop_model, reader)
    config = CONFIG.model_copy(update={"user_rate": 1.0, "max_loss": 0.0})

    training = train_adversarially(
        world, UniformPolicy(world.slate_size), reader, reader, config, 0, lambda message, share: None
    )

    assert [part.kept for part in training.history] == [False]
    assert all(torch.equal(value, before[name]) for name, value in shop_model.state_dict().items())


def test_the_same_seed_plays_the_same_game(shop_model: UserModel, reader: SessionReader) -> None:
    begin = {name: value.clone() for name, value in shop_model.state_dict().items()}
    config = CONFIG.model_copy(update={"max_loss": 10.0})
    games = []
    for _ in range(2):
        shop_model.load_state_dict(begin)
        world = world_of(shop_model, reader)
        games.append(
            train_adversarially(
                world, UniformPolicy(world.slate_size), reader, reader, config, 5, lambda message, share: None
            )
        )

    assert games[0].history == games[1].history
    assert games[0].history[0].kept
    weights = [game.discriminator.state_dict() for game in games]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_the_discriminator_reads_leaving_as_far_as_the_user_model_knows_it(
    shop_model: UserModel, reader: SessionReader
) -> None:
    for knows in (True, False):
        shop_model.knows_leaving.fill_(knows)
        world = world_of(shop_model, reader)
        training = train_adversarially(
            world, UniformPolicy(world.slate_size), reader, reader, CONFIG, 0, lambda message, share: None
        )
        assert bool(training.discriminator.reads_leaving) == knows
