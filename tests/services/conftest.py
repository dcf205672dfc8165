"""A tiny policy in a model store of the tests' own."""

import os
from pathlib import Path

import pytest
import torch

from components.interactions.batching import SessionReader
from components.interactions.covisitation import count_covisitation
from components.interactions.log_folder import Log
from components.interactions.vocabulary import Vocabulary
from components.policies.policy_folder import PolicyDescription, StoredPolicy, load_policy, save_policy, shape_of
from components.policies.ranking_policy import RankingPolicy
from components.policies.request_features import RequestFeatures
from components.policies.session_encoder import EncoderConfig, EncoderShape, SessionEncoder


@pytest.fixture(scope="session")
def bentoml_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """BentoML's stores for this process: a folder of the tests' own, unless the process is bound to one already."""
    os.environ["BENTOML_DO_NOT_TRACK"] = "True"
    os.environ["BENTOML_HOME"] = str(tmp_path_factory.mktemp("bentoml"))
    from bentoml._internal.configuration.containers import BentoMLContainer

    return Path(BentoMLContainer.bentoml_home.get())


@pytest.fixture(scope="session")
def policy_folder(storefront_log: Log, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ranking policy over the shop's items, its weights drawn at random."""
    vocabulary = Vocabulary.fit(storefront_log)
    item_features = vocabulary.item_features(storefront_log.items())
    shape = EncoderShape(
        n_indices=vocabulary.size,
        n_item_features=item_features.shape[1],
        n_context=vocabulary.context_width,
        config=EncoderConfig(item_width=8, hidden_width=8),
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        encoder = SessionEncoder(shape)
    encoder.know_items(item_features, count_covisitation(storefront_log, vocabulary))
    features = RequestFeatures(encoder)
    batch = next(SessionReader(storefront_log, vocabulary).batches(400))
    real = batch.mask.flatten()
    with torch.no_grad():
        features.fit(encoder.states(batch).select(real), batch.requests().select(real), vocabulary.counts())
    policy = RankingPolicy(features, slate_size=4)
    policy.weights.copy_(torch.randn(features.width, generator=torch.Generator().manual_seed(5)))
    folder = tmp_path_factory.mktemp("policy")
    description = PolicyDescription(name="tiny-1", loop="shop", shape=shape_of(policy), vocabulary=vocabulary)
    save_policy(StoredPolicy(description, policy), folder)
    return folder


@pytest.fixture(scope="session")
def stored(policy_folder: Path) -> StoredPolicy:
    """The policy as read back."""
    return load_policy(policy_folder)


@pytest.fixture(scope="session")
def policy_tag(policy_folder: Path, bentoml_home: Path) -> str:
    """The policy's tag in the store."""
    from services.policy_store import save_model

    return save_model(policy_folder, name="shop-policy", lineage={"seed": 3}, decision={"verdict": "canary"})
