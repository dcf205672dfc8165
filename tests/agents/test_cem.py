"""CEM finds the weights that a known objective wants, and the same seed finds the same."""

import pytest
import torch

from components.agents import cem
from components.agents.cem import CemConfig, train_cem
from components.environments.rollout import rollout
from components.environments.storefront import Config, Storefront
from components.interactions.batching import SessionReader
from components.interactions.covisitation import count_covisitation
from components.interactions.log_folder import Log
from components.interactions.vocabulary import FIRST_ITEM, Vocabulary
from components.policies.ranking_policy import RankingPolicy
from components.policies.request_features import RequestFeatures
from components.policies.session_encoder import EncoderConfig, EncoderShape, SessionEncoder

CONFIG = CemConfig(iterations=5, population=10, elite=3, sessions=150, max_steps=8)
SHOP = Config(n_users=150, n_items=60, personal=0.0)


def untrained(log: Log) -> RankingPolicy:
    vocabulary = Vocabulary.fit(log)
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
        policy = RankingPolicy(RequestFeatures(encoder), 4)
    batch = next(SessionReader(log, vocabulary).batches(200))
    known = batch.mask.flatten()
    policy.features.fit(encoder.states(batch).select(known), batch.requests().select(known), vocabulary.counts())
    return policy


def reward(policy: RankingPolicy) -> float:
    users = torch.arange(150).repeat(10)
    generator = torch.Generator().manual_seed(5)
    return float(rollout(Storefront(SHOP), policy, users, generator, 8).rewards.sum((1, 2)).mean())


def test_it_earns_more_than_random_weights_where_one_slate_fits_all(storefront_log: Log):
    policy = untrained(storefront_log)
    before = reward(policy)
    train_cem(policy, Storefront(SHOP), torch.arange(150), CONFIG, 0, lambda message, share: None)
    assert reward(policy) > 1.2 * before
    # The rating is the only trace of what everybody wants.
    shop = Storefront(SHOP)
    requests = shop.observe(shop.reset(torch.arange(150), torch.Generator().manual_seed(6)))
    utility = policy.logits(policy.start(requests), requests).flatten()
    rating = shop.rating[requests.candidates - FIRST_ITEM].flatten()
    assert float(torch.corrcoef(torch.stack([utility, rating]))[0, 1]) > 0.3


def test_the_same_seed_finds_the_same_weights(storefront_log: Log):
    first, again = untrained(storefront_log), untrained(storefront_log)
    short = CONFIG.model_copy(update={"iterations": 2})
    for policy in (first, again):
        train_cem(policy, Storefront(SHOP), torch.arange(150), short, 3, lambda message, share: None)
    assert torch.equal(first.weights, again.weights)


def test_the_search_starts_at_the_policys_weights(storefront_log: Log):
    policy = untrained(storefront_log)
    start = torch.linspace(-1.0, 1.0, policy.features.width)
    policy.weights.copy_(start)
    still = CONFIG.model_copy(update={"iterations": 1, "initial_deviation": 1e-6, "deviation_floor": 0.0})
    train_cem(policy, Storefront(SHOP), torch.arange(150), still, 0, lambda message, share: None)
    torch.testing.assert_close(policy.weights, start, rtol=0, atol=1e-5)


@pytest.mark.parametrize("at_once", [1, 16_384])
def test_each_vector_of_a_population_is_judged_by_its_own_ranking(
    at_once: int, storefront_log: Log, monkeypatch: pytest.MonkeyPatch
):
    policy = untrained(storefront_log)
    train_cem(policy, Storefront(SHOP), torch.arange(150), CONFIG, 0, lambda message, share: None)
    good = policy.weights.clone()
    vectors, users = torch.stack([good, -good, torch.zeros_like(good), good]), torch.arange(150).repeat(10)

    monkeypatch.setattr(cem, "ROLLOUT_SESSIONS", at_once)
    judged = cem._mean_rewards(policy, vectors, Storefront(SHOP), users, torch.Generator().manual_seed(5), 8)

    alone = []
    for vector in vectors:
        policy.weights.copy_(vector)
        alone.append(reward(policy))
    # Means of 1,500 sessions whose rewards spread by about 5.
    assert judged.tolist() == pytest.approx(alone, abs=0.6)
    assert float(judged[[0, 3]].min()) > float(judged[2]) > float(judged[1])
