import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from components.policies import plackett_luce

UTILITIES = st.floats(-8.0, 8.0, width=32)
PADDING = -math.inf


def probability(logits: list[float], places: list[int]) -> float:
    """Probability of one ordered slate."""
    return math.exp(float(plackett_luce.log_prob(torch.tensor([logits]), torch.tensor([places])).double().sum()))


def ordered_slates(n: int, k: int) -> list[list[int]]:
    return [list(places) for places in itertools.permutations(range(n), k)]


@pytest.mark.parametrize(("n", "k"), [(1, 1), (3, 1), (4, 2), (4, 4), (5, 3)])
def test_probabilities_of_all_ordered_slates_sum_to_one(n: int, k: int) -> None:
    logits = torch.linspace(-2.0, 1.5, n).tolist()

    assert sum(probability(logits, places) for places in ordered_slates(n, k)) == pytest.approx(1.0, abs=1e-5)


def test_log_prob_equals_the_product_of_softmaxes_done_by_hand() -> None:
    # Utilities log 1, log 2, log 3: first 3/6, then 1 of the remaining 1 + 2.
    logits = torch.tensor([[math.log(1), math.log(2), math.log(3)]])

    log_probs = plackett_luce.log_prob(logits, torch.tensor([[2, 0]]))

    assert log_probs[0].tolist() == pytest.approx([math.log(3 / 6), math.log(1 / 3)], abs=1e-6)


def test_the_last_of_all_candidates_is_certain() -> None:
    log_probs = plackett_luce.log_prob(torch.tensor([[0.3, -1.0]]), torch.tensor([[1, 0]]))

    assert float(log_probs[0, 1]) == pytest.approx(0.0, abs=1e-6)


def test_sampled_slates_are_as_frequent_as_log_prob_says() -> None:
    logits = [0.0, 1.0, -1.0, 0.5]
    n = 24_000

    places = plackett_luce.sample(torch.tensor([logits]).expand(n, -1), 2, torch.Generator().manual_seed(11))

    slates = ordered_slates(4, 2)
    counts = [int((places == torch.tensor(slate)).all(1).sum()) for slate in slates]
    expected = [n * probability(logits, slate) for slate in slates]
    scale = n / sum(expected)
    assert sum(counts) == n
    assert chisquare(counts, [count * scale for count in expected]).pvalue > 0.001


def test_padding_is_never_sampled_and_takes_no_probability() -> None:
    padded, plain = [0.4, PADDING, -0.2, PADDING, 1.0], [0.4, -0.2, 1.0]

    places = plackett_luce.sample(torch.tensor([padded]).expand(2_000, -1), 2, torch.Generator().manual_seed(0))

    assert set(places.flatten().tolist()) == {0, 2, 4}
    assert probability(padded, [4, 0]) == pytest.approx(probability(plain, [2, 0]), rel=1e-6)


def test_a_slate_of_padding_or_with_a_repeated_candidate_is_impossible() -> None:
    assert probability([0.4, PADDING, 1.0], [1, 0]) == 0.0
    assert probability([0.4, 0.2, 1.0], [2, 2]) == 0.0


@pytest.mark.parametrize("logits", [[0.4, PADDING, 1.0, PADDING], [0.4, 1.0]])
def test_positions_without_a_candidate_are_minus_one_and_certain(logits: list[float]) -> None:
    places = plackett_luce.sample(torch.tensor([logits]), 4, torch.Generator().manual_seed(0))

    log_probs = plackett_luce.log_prob(torch.tensor([logits]), places)

    assert places.shape == (1, 4)
    assert places[0, 2:].tolist() == [-1, -1]
    assert sorted(logits[place] for place in places[0, :2].tolist()) == [0.4, 1.0]
    assert log_probs[0, 2:].tolist() == [0.0, 0.0]


def test_a_request_without_candidates_gets_an_empty_slate() -> None:
    nothing = torch.full((1, 3), PADDING)

    places = plackett_luce.sample(nothing, 2, torch.Generator().manual_seed(0))

    assert places.tolist() == [[-1, -1]]
    assert plackett_luce.log_prob(nothing, places).tolist() == [[0.0, 0.0]]


def test_gradients_stay_finite_beside_padding_and_beyond_the_last_candidate() -> None:
    logits = torch.tensor([[0.3, 0.2, PADDING], [PADDING, PADDING, PADDING]], requires_grad=True)

    plackett_luce.log_prob(logits, torch.tensor([[1, 0, -1], [-1, -1, -1]])).sum().backward()

    assert logits.grad is not None
    assert bool(torch.isfinite(logits.grad).all())
    # ∂ log softmax(u)₁ / ∂u = 1[j = 1] − softmax(u)_j; the second position is certain.
    share = 1 / (1 + math.exp(-0.1))
    assert logits.grad[0].tolist() == pytest.approx([-share, share, 0.0], abs=1e-6)


def test_the_same_generator_state_gives_the_same_slates() -> None:
    logits = torch.zeros(50, 6)

    first, second, other = (plackett_luce.sample(logits, 3, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))

    assert torch.equal(first, second)
    assert not torch.equal(first, other)


@settings(deadline=None, max_examples=50)
@given(utilities=st.lists(UTILITIES, min_size=2, max_size=7), data=st.data())
def test_permuting_the_candidates_leaves_the_probability_of_a_slate(
    utilities: list[float], data: st.DataObject
) -> None:
    n = len(utilities)
    order = torch.tensor(data.draw(st.permutations(range(n))))
    k = data.draw(st.integers(1, n))
    candidates = torch.arange(n)[None] + 10
    slate = torch.tensor([data.draw(st.permutations(range(n)))[:k]]) + 10
    logits = torch.tensor([utilities])

    plain = plackett_luce.log_prob(logits, plackett_luce.places_of(slate, candidates))
    permuted = plackett_luce.log_prob(logits[:, order], plackett_luce.places_of(slate, candidates[:, order]))

    assert permuted[0].tolist() == pytest.approx(plain[0].tolist(), abs=1e-4)


@settings(deadline=None, max_examples=50)
@given(utilities=st.lists(UTILITIES, min_size=1, max_size=7), shift=UTILITIES)
def test_only_differences_of_utilities_count(utilities: list[float], shift: float) -> None:
    logits, places = torch.tensor([utilities]), torch.arange(len(utilities))[None]

    plain = plackett_luce.log_prob(logits, places)
    shifted = plackett_luce.log_prob(logits + shift, places)

    assert shifted[0].tolist() == pytest.approx(plain[0].tolist(), abs=1e-4)


@settings(deadline=None, max_examples=50)
@given(
    utilities=st.lists(UTILITIES, min_size=1, max_size=8), slate_size=st.integers(1, 6), seed=st.integers(0, 2**32 - 1)
)
def test_sampled_slates_hold_distinct_candidates_and_are_possible(
    utilities: list[float], slate_size: int, seed: int
) -> None:
    logits = torch.tensor([utilities])

    places = plackett_luce.sample(logits, slate_size, torch.Generator().manual_seed(seed))

    filled = places[0][places[0] >= 0].tolist()
    assert len(filled) == len(set(filled)) == min(slate_size, len(utilities))
    assert bool(torch.isfinite(plackett_luce.log_prob(logits, places)).all())


def test_entropy_and_divergence_are_those_of_the_first_position() -> None:
    logits = torch.tensor([[math.log(1), math.log(3), PADDING]])
    even = torch.tensor([[0.0, 0.0, PADDING]])

    assert float(plackett_luce.entropy(even)) == pytest.approx(math.log(2), abs=1e-6)
    assert float(plackett_luce.entropy(logits)) == pytest.approx(-(0.25 * math.log(0.25) + 0.75 * math.log(0.75)))
    # Order 2: log Σ π² / reference, the logarithm of the importance weights' second moment.
    expected = math.log(0.25**2 / 0.5 + 0.75**2 / 0.5)
    assert float(plackett_luce.divergence(logits, even)) == pytest.approx(expected, abs=1e-6)
    assert float(plackett_luce.divergence(logits, logits)) == pytest.approx(0.0, abs=1e-6)


def test_places_of_a_slate_are_those_of_its_items_among_the_candidates() -> None:
    candidates = torch.tensor([[7, 5, 9, 0], [3, 4, 0, 0]])

    places = plackett_luce.places_of(torch.tensor([[9, 7], [4, 0]]), candidates)

    assert places.tolist() == [[2, 0], [1, -1]]


def test_an_item_that_is_no_candidate_is_named_with_its_request_and_position() -> None:
    with pytest.raises(ValueError, match="request 1, position 1: item 8 is not a candidate"):
        plackett_luce.places_of(torch.tensor([[3, 4], [3, 8]]), torch.tensor([[3, 4], [3, 4]]))


@settings(deadline=None, max_examples=50)
@given(utilities=st.lists(st.floats(-40.0, 40.0, width=32), min_size=1, max_size=7), data=st.data())
def test_values_and_gradients_are_those_of_the_product_of_softmaxes(
    utilities: list[float], data: st.DataObject
) -> None:
    n = len(utilities)
    slate = data.draw(st.permutations(range(n)))[: data.draw(st.integers(1, n))]
    logits = torch.tensor(utilities, dtype=torch.float64, requires_grad=True)
    left = [[place for place in range(n) if place not in slate[:position]] for position in range(len(slate))]
    by_hand = torch.stack([logits[place] - logits[rest].logsumexp(0) for place, rest in zip(slate, left, strict=True)])

    log_probs = plackett_luce.log_prob(logits[None], torch.tensor([slate]))[0]

    assert log_probs.tolist() == pytest.approx(by_hand.tolist(), abs=1e-9)
    (expected,) = torch.autograd.grad(by_hand.sum(), logits)
    (gradient,) = torch.autograd.grad(log_probs.sum(), logits)
    assert gradient.tolist() == pytest.approx(expected.tolist(), abs=1e-9)


def test_items_that_the_vocabulary_does_not_know_take_one_place_each() -> None:
    places = plackett_luce.places_of(torch.tensor([[1, 4, 1], [1, 3, 0]]), torch.tensor([[3, 1, 4, 1], [3, 4, 1, 0]]))

    assert places.tolist() == [[1, 2, 3], [2, 0, -1]]
    with pytest.raises(ValueError, match="request 0, position 1: item 1 is not a candidate"):
        plackett_luce.places_of(torch.tensor([[1, 1]]), torch.tensor([[3, 1]]))
