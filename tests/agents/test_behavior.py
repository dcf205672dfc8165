"""The estimate of the logging policy comes close to the logging policy that is known."""

import torch

from components.agents.behavior import BehaviorConfig, train_behavior
from components.interactions.batching import SessionReader
from components.interactions.covisitation import count_covisitation
from components.interactions.log_folder import Log
from components.interactions.vocabulary import Vocabulary
from components.policies.ranking_policy import NeuralSlatePolicy
from components.policies.request_features import RequestFeatures
from components.policies.session_encoder import EncoderConfig, EncoderShape, SessionEncoder


def test_its_log_probs_approach_the_logged_ones(storefront_log: Log):
    vocabulary = Vocabulary.fit(storefront_log)
    features = vocabulary.item_features(storefront_log.items())
    reader = SessionReader(storefront_log, vocabulary)
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
        encoder.know_items(features, count_covisitation(storefront_log, vocabulary))
        policy = NeuralSlatePolicy(RequestFeatures(encoder), 4)
    batch = next(reader.batches(400))
    known = batch.mask.flatten()
    requests, state = batch.requests().select(known), encoder.states(batch).select(known)
    policy.features.fit(state, requests, vocabulary.counts())
    policy.strength.fill_(0.0)

    def distance() -> float:
        with torch.no_grad():
            estimated = policy.log_prob(state, requests, batch.slates.flatten(0, 1)[known]).sum(1)
        return float((estimated - batch.log_probs.flatten()[known]).square().mean().sqrt())

    before = distance()
    config = BehaviorConfig(epochs=8, batch_sessions=50, learning_rate=3e-3)
    training = train_behavior(policy, reader, config, torch.Generator().manual_seed(0), lambda message, share: None)
    assert training.history[-1] < training.history[0]
    assert distance() < 0.75 * before
