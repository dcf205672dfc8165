"""Two small worlds: a shop that shows slates, and a site of which only the views are known."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from components.environments.storefront import Config
from components.interactions.batching import SessionBatch, SessionReader
from components.interactions.contract import Responses
from components.interactions.covisitation import Covisitation, count_covisitation
from components.interactions.log_folder import Log
from components.interactions.vocabulary import Vocabulary
from components.policies.session_encoder import EncoderConfig, EncoderShape, SessionEncoder
from components.world_model.user_model import UserModel

SIZE = EncoderConfig(item_width=8, hidden_width=12, recent_items=4)
N_INDICES = 40

Sessions = list[list[int]]


@pytest.fixture
def reader(storefront_log: Log) -> SessionReader:
    return SessionReader(storefront_log, Vocabulary.fit(storefront_log))


@pytest.fixture
def shop_model(reader: SessionReader, storefront_config: Config) -> UserModel:
    """An untrained user model of the storefront's log."""
    vocabulary, log = reader.vocabulary, reader.log
    features = vocabulary.item_features(log.items())
    torch.manual_seed(0)
    encoder = SessionEncoder(
        EncoderShape(
            n_indices=vocabulary.size,
            n_item_features=features.shape[1],
            n_context=vocabulary.context_width,
            config=SIZE,
        )
    )
    encoder.know_items(features, count_covisitation(log, vocabulary))
    return UserModel(encoder, storefront_config.slate_size, "per_position").eval()


@pytest.fixture
def make_model() -> Callable[..., UserModel]:
    """A model with random weights of items without features, each with two random followers."""

    def make(slate_size: int, responses: Responses = "per_position") -> UserModel:
        torch.manual_seed(1)
        shape = EncoderShape(
            n_indices=N_INDICES, n_item_features=0, n_context=0, reads_slates=slate_size > 0, config=SIZE
        )
        encoder = SessionEncoder(shape)
        nn.init.normal_(encoder.click_pair_query.weight)
        nn.init.normal_(encoder.click_bias.weight)
        followers = torch.randint(2, N_INDICES, (N_INDICES, 2))
        followers[:2] = 0
        weights = torch.rand(N_INDICES, 2) / 4 * (followers > 0)
        covisitation = Covisitation(
            nn.functional.pad(followers, (0, encoder.neighbors.shape[1] - 2)),
            nn.functional.pad(weights, (0, encoder.neighbors.shape[1] - 2)),
            torch.arange(N_INDICES).float(),
            torch.full((N_INDICES,), 0.05),
            torch.zeros(N_INDICES),
        )
        encoder.know_items(torch.zeros(N_INDICES, 0), covisitation)
        return UserModel(encoder, slate_size, responses).eval()

    return make


@pytest.fixture
def views() -> Callable[..., SessionBatch]:
    """Sessions of views as a batch; a session whose end is censored may have left at any time after."""

    def batch(sessions: Sessions, censored: tuple[int, ...] = ()) -> SessionBatch:
        longest = max(map(len, sessions))
        events = torch.tensor([items + [0] * (longest - len(items)) for items in sessions], dtype=torch.int32)
        mask = events > 0
        lengths = mask.sum(1)
        last = torch.arange(longest)[None] == lengths[:, None] - 1
        cut = torch.zeros(len(sessions), dtype=torch.bool)
        cut[list(censored)] = True
        nothing = torch.zeros(len(sessions), longest, 0)
        return SessionBatch(
            mask=mask,
            users=torch.arange(len(sessions)),
            candidates=nothing.int(),
            context=nothing,
            events=events[..., None],
            slates=nothing.int(),
            log_probs=torch.full(mask.shape, torch.nan, dtype=torch.float64),
            clicks=nothing,
            purchases=nothing,
            observed=nothing.bool(),
            purchase_observed=nothing.bool(),
            rewards=nothing,
            reward_known=mask,
            left=last & ~cut[:, None],
            leave_observed=mask & ~(last & cut[:, None]),
        )

    return batch
