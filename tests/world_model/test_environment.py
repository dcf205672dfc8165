from collections.abc import Callable

import polars as pl
import pytest
import torch

from components.environments.interface import Environment
from components.environments.rollout import Survivors, continue_sessions, open_sessions, rollout
from components.interactions.batching import SessionBatch, SessionReader, SessionTable
from components.interactions.contract import Reward
from components.policies.session_encoder import SessionEncoder
from components.policies.slate_policy import PopularityPolicy, UniformPolicy
from components.world_model.environment import WorldModel, WorldModelState
from components.world_model.user_model import UserModel

N_SESSIONS = 50


@pytest.fixture
def shop(shop_model: UserModel, reader: SessionReader) -> WorldModel:
    manifest = reader.log.manifest
    counts = reader.vocabulary.counts()
    return WorldModel(shop_model, next(reader.tables()), manifest.reward, manifest.slate_size, 12, counts)


@pytest.fixture
def site(make_model: Callable[..., UserModel], views: Callable[..., SessionBatch]) -> WorldModel:
    """Sessions of views, among 10 candidates each."""
    batch = views([[5, 9, 5, 30], [7, 7], [12, 3, 38], [20, 21]])
    flat = torch.nonzero(batch.mask.flatten())[:, 0]
    rows = {
        name: batch.users.repeat_interleave(batch.lengths) if name == "users" else v.flatten(0, 1)[flat][:, None]
        for name, v in batch.columns().items()
    }
    lengths = batch.lengths
    names = pl.Series(["a", "b", "c", "d"])
    table = SessionTable(SessionBatch(**rows), lengths.cumsum(0) - lengths, lengths, names, names)
    counts = torch.ones(40)
    counts[:2] = 0.0
    return WorldModel(make_model(0), table, Reward(weights={"clicked": 1.0}), 4, 10, counts)


def test_both_kinds_of_world_model_are_environments(shop: WorldModel, site: WorldModel) -> None:
    assert isinstance(shop, Environment) and isinstance(site, Environment)


def test_sessions_start_with_the_logged_requests(shop: WorldModel) -> None:
    users = torch.arange(N_SESSIONS)

    requests = shop.observe(shop.reset(users, torch.Generator().manual_seed(0)))

    logged = shop.pool.batch(users).first_steps(1).requests()
    assert torch.equal(requests.candidates, logged.candidates)
    assert torch.equal(requests.context, logged.context)
    assert torch.equal(requests.events, logged.events)


def test_the_state_is_what_the_encoder_makes_of_the_generated_session(shop: WorldModel) -> None:
    generator = torch.Generator().manual_seed(0)
    policy = UniformPolicy(shop.slate_size)
    state = shop.reset(torch.arange(N_SESSIONS), generator)
    slates = policy.act(policy.start(shop.observe(state)), shop.observe(state), generator).slates

    feedback, following = shop.step(state, slates, generator)

    requests = shop.observe(following)
    encoder = shop.user_model.encoder
    expected = encoder.advance(shop.session(state), slates, feedback.clicks, feedback.purchases, requests)
    torch.testing.assert_close(shop.session(following).hidden, expected.hidden)
    assert torch.equal(shop.session(following).recent, expected.recent)
    assert feedback.clicks.shape == feedback.purchases.shape == slates.shape
    assert bool((feedback.purchases <= feedback.clicks).all())


def test_an_lstm_follows_sessions_that_it_generates_with_its_cell(shop: WorldModel) -> None:
    shape = shop.user_model.encoder.shape
    torch.manual_seed(0)
    config = shape.config.model_copy(update={"cell": "lstm"})
    encoder = SessionEncoder(shape.model_copy(update={"config": config})).eval()
    shop.user_model.encoder = encoder
    visits: list[Survivors[WorldModelState]] = []
    generator, policy = torch.Generator().manual_seed(0), UniformPolicy(shop.slate_size)
    opened = open_sessions(shop, policy, torch.arange(N_SESSIONS), generator)

    batch = continue_sessions(shop, policy, opened, generator, 5, visits.append)

    assert len(visits) > 1
    with torch.no_grad():
        whole = encoder.states(batch).hidden.unflatten(0, batch.mask.shape)
    for step, (rows, point) in enumerate((visit.rows, visit.point) for visit in visits):
        torch.testing.assert_close(shop.session(point.state).hidden, whole[rows, step + 1])


def test_the_same_seed_gives_the_same_sessions(shop: WorldModel, site: WorldModel) -> None:
    for world in (shop, site):
        policy, users = UniformPolicy(world.slate_size), torch.arange(world.n_users)
        first, second = (rollout(world, policy, users, torch.Generator().manual_seed(3), 6) for _ in range(2))

        assert torch.equal(first.slates, second.slates)
        assert torch.equal(first.clicks, second.clicks)
        assert torch.equal(first.left, second.left)


def test_a_click_is_the_next_view_where_the_slate_holds_it(site: WorldModel) -> None:
    generator = torch.Generator().manual_seed(0)
    users = torch.arange(4).repeat(200)
    state = site.reset(users, generator)
    slates = site.observe(state).candidates[:, :4]

    feedback, following = site.step(state, slates, generator)

    viewed = site.observe(following).events[:, -1]
    next_view = (slates == viewed[:, None]).float()
    assert torch.equal(feedback.clicks, next_view * ~feedback.left[:, None])
    # Some of those who left would have clicked: a session of L views has L - 1 next ones.
    assert bool((next_view * feedback.left[:, None]).any())
    assert 0 < float(feedback.clicks.sum()) < len(users)
    assert not bool(feedback.purchases.any())


def test_candidates_are_followers_and_popular_items_each_once(site: WorldModel) -> None:
    generator = torch.Generator().manual_seed(0)
    site.counts[30:] = 0.0
    state = site.reset(torch.arange(4).repeat(50), generator)

    candidates = site.observe(state).candidates

    last = site.session(state).recent[:, 0].long()
    followers = site.user_model.encoder.neighbors[last, :2]
    for row, near in zip(candidates.tolist(), followers.tolist(), strict=True):
        real = [item for item in row if item]
        assert len(set(real)) == len(real) >= 5
        assert set(near) <= set(real)
        assert all(2 <= item < 30 or item in near for item in real)


def test_next_views_have_the_modelled_probabilities(site: WorldModel) -> None:
    generator = torch.Generator().manual_seed(0)
    state = site.session(site.reset(torch.zeros(20_000, dtype=torch.long), generator))
    model = site.user_model

    drawn = model.sample_next_items(state, *site.sampler.draw(generator), generator)

    probabilities = model.encoder.catalogue_logits(state.select(torch.tensor([0])), torch.arange(1, 40))
    seen = torch.bincount(drawn, minlength=40)[1:] / len(drawn)
    # The unknown item (index 1) is never drawn.
    probabilities[:, 0] = -torch.inf
    torch.testing.assert_close(seen, probabilities.softmax(1)[0], atol=0.015, rtol=0.0)


def test_a_popular_slate_is_clicked_as_the_user_model_says(shop: WorldModel) -> None:
    generator = torch.Generator().manual_seed(0)
    policy = PopularityPolicy(shop.slate_size, shop.counts)
    state = shop.reset(torch.randint(shop.n_users, (4_000,), generator=generator), generator)
    slates = policy.act(policy.start(shop.observe(state)), shop.observe(state), generator).slates

    feedback, _ = shop.step(state, slates, generator)

    predicted = shop.user_model.click_probabilities(shop.session(state), slates, feedback.clicks)
    torch.testing.assert_close(feedback.clicks.mean(0), predicted.detach().mean(0), atol=0.03, rtol=0.0)


def test_beyond_the_replayed_session_its_last_context_stays(shop: WorldModel) -> None:
    batch = rollout(shop, UniformPolicy(4), torch.arange(200), torch.Generator().manual_seed(0), 12)

    # Device and segment are a session's own, however far it outlives the one that it replays.
    assert int((batch.lengths > shop.pool.lengths[:200]).sum()) > 20
    first = batch.context[:, :1].expand_as(batch.context)
    assert torch.equal(batch.context[batch.mask], first[batch.mask])


def test_where_leaving_is_not_known_a_session_ends_with_the_one_that_it_replays(
    shop: WorldModel, site: WorldModel
) -> None:
    for world in (shop, site):
        world.user_model.knows_leaving.fill_(False)
        policy, users = UniformPolicy(world.slate_size), torch.arange(world.n_users)

        sessions = rollout(world, policy, users, torch.Generator().manual_seed(0), 100)

        assert torch.equal(sessions.lengths, world.pool.lengths)


def test_expected_rewards_are_the_mean_of_those_that_are_drawn(shop: WorldModel) -> None:
    users = torch.randint(N_SESSIONS, (20_000,), generator=torch.Generator().manual_seed(1))

    sessions = rollout(shop, UniformPolicy(shop.slate_size), users, torch.Generator().manual_seed(2), max_steps=3)
    expected = shop.expected_rewards(sessions)

    # Given the session, the slate and the clicks above, what is left is noise of mean 0 at each position.
    surprise = (sessions.rewards - expected)[sessions.mask].double()
    assert bool((surprise.mean(0).abs() < 4.0 * surprise.std(0) / len(surprise) ** 0.5).all())
    assert float(expected[sessions.mask].std()) < 0.5 * float(sessions.rewards[sessions.mask].std())
    assert not bool(expected[~sessions.mask].any())
