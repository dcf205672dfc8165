import math

import pytest
import torch
from torch import Tensor

from components.evaluation.logged_policy import logged_requests
from components.evaluation.ncis import one_request_ncis, one_request_sums
from components.evaluation.support import outside_share, support_distance
from components.interactions.batching import Requests, SessionReader
from components.interactions.contract import RatioAssumption
from components.interactions.log_folder import Log
from components.interactions.vocabulary import Vocabulary
from components.policies.slate_policy import MemorylessPolicy, SessionState, UniformPolicy


class FirstCandidate(MemorylessPolicy):
    """The first candidate is so many nats better than all others, which are alike."""

    slate_size = 4

    def __init__(self, nats: float) -> None:
        super().__init__()
        self.nats = nats

    def logits(self, state: SessionState, requests: Requests) -> Tensor:
        utility = torch.zeros(requests.candidates.shape)
        utility[:, 0] = self.nats
        return utility


@pytest.fixture
def reader(storefront_log: Log) -> SessionReader:
    return SessionReader(storefront_log, Vocabulary.fit(storefront_log))


@pytest.mark.parametrize("nats", [-4.0, -1.0, 2.0])
def test_the_share_outside_is_what_the_policy_gives_to_candidates_that_are_hardly_shown(
    nats: float, reader: SessionReader
) -> None:
    (table,) = reader.tables()
    # Of 12 candidates the first has 1 / (1 + 11 e^4) under this logging policy, far below a tenth of chance.
    avoids_the_first = FirstCandidate(-4.0)
    share = outside_share(FirstCandidate(nats), avoids_the_first, table)
    assert share == pytest.approx(math.exp(nats) / (math.exp(nats) + 11), rel=1e-4)


def test_nothing_lies_outside_where_the_log_shows_everything(reader: SessionReader) -> None:
    (table,) = reader.tables()
    assert outside_share(FirstCandidate(9.0), UniformPolicy(4), table) == 0.0


@pytest.mark.parametrize("ratio", RatioAssumption)
def test_the_divergence_is_that_of_the_effective_sample_size_of_whole_slates(
    ratio: RatioAssumption, reader: SessionReader
) -> None:
    (table,) = reader.tables()
    policy = FirstCandidate(0.5)
    log = logged_requests(reader, policy, ratio).requests
    estimate = one_request_ncis(log, policy="it", ratio=RatioAssumption.FULL_SLATE)
    effective = one_request_sums(log, estimate.cap, ratio).effective
    distance = support_distance("it", effective, policy, UniformPolicy(4), table)
    assert distance.policy == "it"
    assert estimate.n_requests * math.exp(-distance.divergence) == pytest.approx(estimate.effective_sample_size)
