import pytest
import torch

from components.interactions.batching import Requests
from components.policies.probe_policies import ConstantPolicy, InvertedPolicy

REQUESTS = Requests(
    candidates=torch.tensor([[2, 3, 4, 0], [5, 4, 0, 0]]), context=torch.zeros(2, 1), events=torch.zeros(2, 8).int()
)


@pytest.fixture
def constant() -> ConstantPolicy:
    return ConstantPolicy(2, torch.tensor([9.0, 9.0, 1.0, 2.0, 3.0, 9.0]), torch.tensor([0.0, 0.0, 5.0, 5.0, 5.0, 0.0]))


def test_a_constant_policy_gives_a_nat_for_a_standard_deviation_and_nothing_to_items_it_does_not_know(
    constant: ConstantPolicy,
) -> None:
    logits = constant.logits(constant.start(REQUESTS), REQUESTS)
    far = (3 / 2) ** 0.5  # 1, 2 and 3 have a standard deviation of √(2/3).
    assert logits.tolist() == [
        pytest.approx([-far, 0.0, far, float("-inf")]),
        pytest.approx([0.0, far, float("-inf"), float("-inf")]),
    ]


def test_items_that_are_all_alike_are_ranked_at_random() -> None:
    alike = ConstantPolicy(2, torch.full((6,), 0.3), torch.ones(6))
    assert alike.logits(alike.start(REQUESTS), REQUESTS)[0].tolist() == [0.0, 0.0, 0.0, float("-inf")]


def test_an_inverted_policy_prefers_what_the_other_avoids_and_never_shows_padding(constant: ConstantPolicy) -> None:
    inverted = InvertedPolicy(constant)
    own, turned = (policy.logits(policy.start(REQUESTS), REQUESTS) for policy in (constant, inverted))
    offered = REQUESTS.candidates > 0
    assert torch.equal(turned[offered], -own[offered])
    assert torch.isneginf(turned[~offered]).all()
    choice = inverted.act(inverted.start(REQUESTS), REQUESTS, torch.Generator().manual_seed(0))
    assert (choice.slates > 0).all()
