from collections import Counter
from collections.abc import Sequence
from itertools import permutations
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from pydantic import ValidationError
from scipy import stats

from components.errors import InputError
from components.interactions.batching import read_sessions
from components.interactions.contract import CANDIDATE_SCHEMA, Evidence, Feature, Manifest, RatioAssumption
from components.interactions.vocabulary import FeatureCode, Vocabulary
from components.policies import plackett_luce
from components.policies.live_policy import LivePolicy, LiveSession, PastRequest
from components.policies.policy_folder import PolicyDescription, StoredPolicy, shape_of
from components.policies.ranking_policy import NeuralSlatePolicy
from components.policies.request_features import RequestFeatures
from components.policies.session_encoder import EncoderConfig, EncoderShape, SessionEncoder

HOUR = Feature(name="hour", kind="numeric")
DEVICE = Feature(name="device", kind="categorical", values=("desktop", "phone"))
MANIFEST = Manifest(
    loop="shop",
    source="storefront",
    evidence=Evidence.SLATES,
    ratio_assumption=RatioAssumption.CASCADE,
    responses="per_position",
    slate_size=3,
    context=(HOUR, DEVICE),
)


@pytest.fixture(scope="module")
def policy() -> LivePolicy:
    """A policy with random weights over ten items."""
    return a_policy(spread=0.5)


def a_policy(spread: float, n_items: int = 10) -> LivePolicy:
    vocabulary = Vocabulary(
        item_ids=tuple(f"item-{number}" for number in range(n_items)),
        item_counts=(5,) * n_items,
        context_codes=(FeatureCode(feature=HOUR, mean=12.0, scale=6.0), FeatureCode(feature=DEVICE)),
    )
    shape = EncoderShape(
        n_indices=vocabulary.size,
        n_item_features=0,
        n_context=vocabulary.context_width,
        config=EncoderConfig(item_width=8, hidden_width=8),
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        policy = NeuralSlatePolicy(RequestFeatures(SessionEncoder(shape)), slate_size=3)
        for parameter in policy.parameters():
            torch.nn.init.normal_(parameter.data, std=spread)
    description = PolicyDescription(name="v1", loop="shop", shape=shape_of(policy), vocabulary=vocabulary)
    return LivePolicy(StoredPolicy(description, policy.eval()))


def logged_session() -> list[dict[str, Any]]:
    """Three requests of a session as a log has them: unknown items, unknown answers, more events than are kept."""
    candidates = [f"item-{number}" for number in range(8)] + ["never-seen"]
    many = [{"type": "view", "item_id": f"item-{number % 10}"} for number in range(12)]
    return [
        {
            "candidates": candidates,
            "slate": ["item-1", "never-seen", "item-3"],
            "clicked": [True, None, False],
            "purchased": None,
            "events": many,
            "context": {"hour": 8.1, "device": "phone"},
        },
        {
            "candidates": candidates,
            "slate": ["item-5", "item-2"],
            "clicked": [False, True],
            "purchased": [False, True],
            "events": [{"type": "search", "item_id": "item-9"}],
            "context": {"hour": None, "device": "a-fridge"},
        },
        {
            "candidates": candidates,
            "slate": ["item-7", "item-0", "item-6"],
            "clicked": None,
            "purchased": None,
            "events": [],
            "context": {"hour": 9.0, "device": "desktop"},
        },
    ]


def live(requests: list[dict[str, Any]]) -> LiveSession:
    """The same session as an endpoint is told of it at its last request."""
    past = [{name: value for name, value in request.items() if name != "candidates"} for request in requests[:-1]]
    current = {name: requests[-1][name] for name in ("candidates", "events", "context")}
    return LiveSession.model_validate({**current, "past_requests": past})


@pytest.mark.parametrize("step", [0, 1, 2])
def test_a_live_request_has_the_state_and_log_prob_of_the_same_request_in_a_log(policy: LivePolicy, step: int) -> None:
    rows = [
        {"session_id": "s", "user_id": "u", "step": number, **request}
        for number, request in enumerate(logged_session())
    ]
    log = pl.DataFrame(rows, schema=MANIFEST.schema())
    table = read_sessions(log, MANIFEST, policy.description.vocabulary, pl.DataFrame(schema=CANDIDATE_SCHEMA))
    batch = table.batch(torch.tensor([0]))
    states = policy.policy.states(batch)
    logged = policy.policy.log_prob(states, batch.requests(), batch.slates.flatten(0, 1))

    state, request = policy.encode([live(logged_session()[: step + 1])])

    torch.testing.assert_close(state.hidden[0], states.hidden[step])
    assert state.recent[0].tolist() == states.recent[step].tolist()
    live_log_prob = policy.policy.log_prob(state, request, batch.slates[:, step])
    torch.testing.assert_close(live_log_prob[0], logged[step])


def test_a_recommendation_has_the_log_prob_that_the_policy_gives_its_slate(policy: LivePolicy) -> None:
    session = live(logged_session())
    (chosen,) = policy.recommend([session], torch.Generator().manual_seed(1))
    places = torch.tensor([[policy.candidates(session).index(item_id) for item_id in chosen.slate]])
    expected = plackett_luce.log_prob(policy.logits([session]), places)
    assert chosen.log_probs == pytest.approx(expected[0].tolist(), abs=1e-5)
    assert chosen.log_prob == pytest.approx(float(expected.sum()), abs=1e-5)


def test_slates_are_as_frequent_as_their_logged_probability() -> None:
    """All 20 ordered slates of 2 out of 5 items, in 100,000 recommendations of one session."""
    policy = a_policy(spread=0.25)
    session = LiveSession(candidates=("item-1", "item-4", "item-7", "new-a", "item-9"), slate_size=2)
    generator = torch.Generator().manual_seed(0)
    counts: Counter[tuple[str, ...]] = Counter()
    log_probs: dict[tuple[str, ...], float] = {}
    for _ in range(100):
        for chosen in policy.recommend([session] * 1_000, generator):
            counts[chosen.slate] += 1
            assert abs(log_probs.setdefault(chosen.slate, chosen.log_prob) - chosen.log_prob) < 1e-5
    assert len(counts) == 20
    expected = np.exp([log_probs[slate] for slate in counts])
    assert expected.sum() == pytest.approx(1.0, abs=1e-5)
    assert expected.min() < 0.5 * expected.max()  # it is not the uniform policy that is tested
    assert stats.chisquare(list(counts.values()), 100_000 * expected / expected.sum()).pvalue > 0.001


def inclusion(p: np.ndarray, slate_size: int) -> np.ndarray:
    """Probability that each item is on a Plackett-Luce slate, by quadrature.

    Items that come at the times of independent Poisson processes of rates p come in the order of such a slate. So an
    item is on it where, of the others, fewer than K have come before it.
    """
    log_times = np.linspace(np.log(1e-9), np.log(60.0 / p.min()), 400)
    rate_times = p[:, None] * np.exp(log_times)
    come = -np.expm1(-rate_times)

    def counts(come: np.ndarray) -> np.ndarray:
        """How many of the items before each have come: probabilities of 0 ... K - 1 at every time."""
        told = np.zeros((come.shape[1], slate_size))
        told[:, 0] = 1.0
        rows = []
        for one in come[:, :, None]:
            rows.append(told)
            told = told * (1.0 - one) + np.pad(told, ((0, 0), (1, 0)))[:, :-1] * one
        return np.stack(rows)

    before, after = counts(come), counts(come[::-1])[::-1]
    fewer = (before * after.cumsum(2)[:, :, ::-1]).sum(2)
    return np.asarray((rate_times * np.exp(-rate_times) * fewer).sum(1) * (log_times[1] - log_times[0]))


def test_inclusion_by_quadrature_is_that_of_exact_enumeration() -> None:
    p = np.random.default_rng(0).dirichlet(np.full(8, 0.7))
    expected = np.zeros(8)
    for slate in permutations(range(8), 3):
        left = 1.0 - np.cumsum([0.0, *p[list(slate[:-1])]])
        expected[list(slate)] += np.prod(p[list(slate)] / left)
    np.testing.assert_allclose(inclusion(p, 3), expected, atol=1e-9)


def test_every_item_is_shown_as_often_as_its_marginal_says() -> None:
    """A catalog of 1,000 items, slates of 10, 10,000 recommendations."""
    n_items, n_sessions = 1_000, 10_000
    policy = a_policy(spread=0.2, n_items=n_items)
    session = LiveSession(slate_size=10)
    p = torch.softmax(policy.logits([session])[0].double(), 0).numpy()
    expected = inclusion(p, 10)
    assert expected.sum() == pytest.approx(10.0, abs=1e-6)
    assert np.quantile(expected, 0.1) < 0.5 * np.quantile(expected, 0.9)
    place = {item_id: number for number, item_id in enumerate(policy.candidates(session))}
    generator = torch.Generator().manual_seed(2)
    shown = [chosen for _ in range(20) for chosen in policy.recommend([session] * (n_sessions // 20), generator)]
    slates = np.array([[place[item_id] for item_id in chosen.slate] for chosen in shown])
    np.testing.assert_allclose([chosen.log_probs[0] for chosen in shown], np.log(p[slates[:, 0]]), atol=1e-4)
    counts = np.bincount(slates.ravel(), minlength=n_items)
    assert n_sessions * expected.min() > 9
    z = (counts - n_sessions * expected) / np.sqrt(n_sessions * expected * (1 - expected))
    # Of 1,000 standard normals one exceeds 4.9 with a probability of 0.001.
    assert np.abs(z).max() < 4.9
    assert (z**2).mean() == pytest.approx(1.0, abs=0.15)


def test_sessions_that_are_answered_together_are_answered_as_alone(policy: LivePolicy) -> None:
    sessions = [live(logged_session()[: step + 1]) for step in range(3)] + [LiveSession(candidates=("item-2", "new"))]
    together = policy.logits(sessions)
    for row, session in enumerate(sessions):
        alone = policy.logits([session])[0]
        torch.testing.assert_close(together[row, : len(alone)], alone)
        assert bool(together[row, len(alone) :].isinf().all())


def test_a_long_session_does_not_pad_all_others_to_its_length(
    policy: LivePolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = LiveSession(past_requests=tuple(PastRequest(slate=("item-1",) * 3) for _ in range(50)))
    sessions = [LiveSession(slate_size=1 + number % 3) for number in range(9)]
    sessions.insert(4, long)
    monkeypatch.setattr("components.policies.live_policy.MAX_CELLS", 160)
    encoded: list[int] = []
    encode = policy.encode

    def counted(chunk: Sequence[LiveSession]) -> Any:
        encoded.append(len(chunk))
        return encode(chunk)

    monkeypatch.setattr(policy, "encode", counted)
    chosen = policy.recommend(sessions, torch.Generator().manual_seed(0))
    assert encoded == [4, 1, 5]
    assert [len(one.slate) for one in chosen] == [1, 2, 3, 1, 3, 2, 3, 1, 2, 3]


def test_without_candidates_all_known_items_may_be_shown_unless_they_are_too_many(
    policy: LivePolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    (chosen,) = policy.recommend([LiveSession(slate_size=10)], torch.Generator().manual_seed(0))
    assert sorted(chosen.slate) == sorted(policy.description.vocabulary.item_ids)
    monkeypatch.setattr("components.policies.live_policy.MAX_CANDIDATES", 9)
    with pytest.raises(InputError, match="candidates: the policy knows 10 items; name the ones that may be shown"):
        policy.check(LiveSession())


def test_the_same_seed_recommends_the_same_slates(policy: LivePolicy) -> None:
    first, second = (torch.Generator().manual_seed(7) for _ in range(2))
    session = live(logged_session())
    assert [policy.recommend([session], first) for _ in range(5)] == [
        policy.recommend([session], second) for _ in range(5)
    ]


def test_several_unknown_candidates_can_be_shown_together_under_their_own_ids(policy: LivePolicy) -> None:
    session = LiveSession(candidates=("new-a", "new-b", "new-c"))
    (chosen,) = policy.recommend([session], torch.Generator().manual_seed(0))
    assert sorted(chosen.slate) == ["new-a", "new-b", "new-c"]
    # Nothing tells them apart, so each order is as likely as any other.
    assert chosen.log_prob == pytest.approx(torch.tensor(1 / 6).log().item(), abs=1e-5)


def test_few_candidates_give_a_short_slate(policy: LivePolicy) -> None:
    (chosen,) = policy.recommend([LiveSession(candidates=("item-1",))], torch.Generator().manual_seed(0))
    assert chosen.slate == ("item-1",)
    assert chosen.log_prob == pytest.approx(0.0, abs=1e-6)


def test_unknown_and_absent_values_of_the_context_are_zeros(policy: LivePolicy) -> None:
    for context in ({}, {"device": "a-fridge"}, {"hour": None}):
        _, request = policy.encode([LiveSession(candidates=("item-1",), context=context)])
        assert request.context.tolist() == [[0.0, 0.0, 0.0]]


@pytest.mark.parametrize(
    ("context", "words"),
    [
        ({"colour": "red"}, r"'colour' is unknown; the policy's features are \['device', 'hour'\]"),
        ({"hour": "noon"}, "'hour' is 'noon'; expected a number"),
        ({"device": 3.0}, "'device' is 3.0; expected text"),
    ],
)
def test_a_context_that_does_not_fit_the_policy_is_refused(
    policy: LivePolicy, context: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        policy.encode([LiveSession(candidates=("item-1",), context=context)])


def test_a_session_that_contradicts_itself_is_refused() -> None:
    with pytest.raises(ValidationError, match="'a' twice"):
        LiveSession(candidates=("a", "a"))
    with pytest.raises(ValidationError, match="clicked has 1 values; expected 2"):
        LiveSession.model_validate({"candidates": ["a"], "past_requests": [{"slate": ["a", "b"], "clicked": [True]}]})
