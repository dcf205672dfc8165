import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from components.environments.rollout import rollout
from components.environments.storefront import BehaviorPolicy, Storefront
from components.errors import InputError
from components.interactions.batching import Requests, SessionBatch
from components.interactions.contract import Responses, Reward
from components.interactions.covisitation import count_covisitation
from components.interactions.log_folder import Log
from components.interactions.vocabulary import Vocabulary
from components.policies.policy_folder import (
    DESCRIPTION,
    WEIGHTS,
    PolicyDescription,
    StoredPolicy,
    load_policy,
    save_policy,
    shape_of,
)
from components.policies.ranking_policy import GAP_BOUND, EncodedPolicy, NeuralSlatePolicy, RankingPolicy, bounded
from components.policies.request_features import RequestFeatures
from components.policies.session_encoder import EncoderConfig, EncoderShape, SessionEncoder
from components.policies.slate_policy import OraclePolicy, PopularityPolicy, SlatePolicy, UniformPolicy

K = 4
POLICIES = ("uniform", "popularity", "ranking", "neural", "lstm")
MakePolicy = Callable[[str], SlatePolicy]


@pytest.fixture(scope="module")
def vocabulary(storefront_log: Log) -> Vocabulary:
    return Vocabulary.fit(storefront_log)


@pytest.fixture(scope="module")
def sessions(storefront: Storefront) -> SessionBatch:
    """Forty sessions under the shop's own policy."""
    generator = torch.Generator().manual_seed(4)
    return rollout(storefront, BehaviorPolicy(storefront), torch.arange(40), generator, max_steps=6)


@pytest.fixture(scope="module")
def make_policy(storefront_log: Log, vocabulary: Vocabulary, sessions: SessionBatch) -> MakePolicy:
    """A policy of each kind, its weights random as if it had been trained."""

    def make(kind: str) -> SlatePolicy:
        if kind == "uniform":
            return UniformPolicy(K)
        if kind == "popularity":
            return PopularityPolicy(K, vocabulary.counts())
        with torch.random.fork_rng():
            torch.manual_seed(0)
            items = vocabulary.item_features(storefront_log.items())
            shape = EncoderShape(
                n_indices=vocabulary.size,
                n_item_features=items.shape[1],
                n_context=vocabulary.context_width,
                config=EncoderConfig(
                    cell="lstm" if kind == "lstm" else "gru", item_width=6, hidden_width=8, recent_items=4
                ),
            )
            encoder = SessionEncoder(shape)
            encoder.know_items(items, count_covisitation(storefront_log, vocabulary))
            features = RequestFeatures(encoder)
            policy = (RankingPolicy if kind == "ranking" else NeuralSlatePolicy)(features, K)
            for module in policy.modules():
                for parameter in module.parameters(recurse=False):
                    parameter.data += 0.2 * torch.randn_like(parameter)
                if isinstance(module, nn.Embedding):
                    module.weight.data[0] = 0.0  # training leaves the vector of padding zero
            features.fit(encoder.states(sessions), sessions.requests(), vocabulary.counts())
            if isinstance(policy, RankingPolicy):
                policy.weights.copy_(torch.randn(features.width))
        return policy.eval()

    return make


def request_rows(batch: SessionBatch) -> tuple[Requests, torch.Tensor, torch.Tensor]:
    """Requests, slates and mask of a batch as B·T rows."""
    return batch.requests(), batch.slates.flatten(0, 1), batch.mask.flatten()


@pytest.mark.parametrize("kind", POLICIES)
def test_a_policy_gives_its_own_slates_the_log_prob_with_which_it_chose_them(
    kind: str, make_policy: MakePolicy, sessions: SessionBatch
) -> None:
    policy = make_policy(kind)
    requests, _, mask = request_rows(sessions)
    state, requests = policy.states(sessions).select(mask), requests.select(mask)

    choice = policy.act(state, requests, torch.Generator().manual_seed(1))

    with torch.no_grad():
        asked = policy.log_prob(state, requests, choice.slates)
    assert torch.equal(choice.log_probs, asked)
    assert torch.equal(requests.candidates.gather(1, choice.places), choice.slates)
    assert bool((choice.log_probs <= 0).all())
    assert bool((choice.slates.sort(1).values.diff(dim=1) > 0).all()), "an item is shown twice"


@pytest.mark.parametrize("kind", POLICIES)
def test_following_a_session_request_by_request_gives_the_states_of_the_whole_session(
    kind: str, make_policy: MakePolicy, sessions: SessionBatch
) -> None:
    policy = make_policy(kind)
    n, n_steps = sessions.mask.shape

    def at(step: int) -> Requests:
        return Requests(sessions.candidates[:, step], sessions.context[:, step], sessions.events[:, step])

    with torch.no_grad():
        whole = policy.states(sessions)
        state = policy.start(at(0))
        for step in range(n_steps):
            if step:
                answered = (sessions.slates, sessions.clicks, sessions.purchases)
                state = policy.advance(state, *(values[:, step - 1] for values in answered), at(step))
            there = sessions.mask[:, step]
            expected = whole.select(torch.arange(n) * n_steps + step)
            assert torch.allclose(state.hidden[there], expected.hidden[there], atol=1e-6)
            assert torch.equal(state.recent[there], expected.recent[there])


@pytest.mark.parametrize("kind", ["ranking", "neural", "lstm"])
def test_a_rolled_out_policy_gives_its_whole_sessions_the_log_probs_that_it_logged(
    kind: str, make_policy: MakePolicy, storefront: Storefront
) -> None:
    policy = make_policy(kind)

    batch = rollout(storefront, policy, torch.arange(30), torch.Generator().manual_seed(2), max_steps=5)

    requests, slates, mask = request_rows(batch)
    with torch.no_grad():
        asked = policy.log_prob(policy.states(batch).select(mask), requests.select(mask), slates[mask])
    assert torch.allclose(asked.double().sum(1), batch.log_probs[batch.mask], atol=1e-4)


@pytest.mark.parametrize("kind", POLICIES)
def test_padded_candidates_have_no_utility_and_are_not_shown(
    kind: str, make_policy: MakePolicy, sessions: SessionBatch
) -> None:
    policy = make_policy(kind)
    requests, _, mask = request_rows(sessions)
    short = requests.select(mask).candidates.clone()
    short[:, 3:] = 0
    requests = replace(requests.select(mask), candidates=short)
    state = policy.states(sessions).select(mask)

    choice = policy.act(state, requests, torch.Generator().manual_seed(1))

    assert bool(torch.isneginf(policy.logits(state, requests)[:, 3:]).all())
    assert bool((choice.slates[:, 3] == 0).all())
    assert bool((choice.slates[:, :3] > 0).all())
    assert bool(torch.isfinite(choice.log_probs).all())


@pytest.mark.parametrize("kind", POLICIES)
def test_the_order_of_the_candidates_does_not_change_a_slate_s_log_prob(
    kind: str, make_policy: MakePolicy, sessions: SessionBatch
) -> None:
    policy = make_policy(kind)
    requests, slates, mask = request_rows(sessions)
    state, requests, slates = policy.states(sessions).select(mask), requests.select(mask), slates[mask]
    turned = replace(requests, candidates=requests.candidates.flip(1))

    with torch.no_grad():
        difference = policy.log_prob(state, requests, slates) - policy.log_prob(state, turned, slates)

    assert float(difference.abs().max()) < 1e-4


@pytest.mark.parametrize("kind", ["ranking", "neural"])
def test_however_large_its_weights_a_policy_keeps_the_stated_floor(
    kind: str, make_policy: MakePolicy, sessions: SessionBatch
) -> None:
    policy = make_policy(kind)
    if isinstance(policy, RankingPolicy):
        policy.weights.mul_(1e6)
    elif isinstance(policy, NeuralSlatePolicy):
        policy.strength.fill_(1e6)
    requests, _, mask = request_rows(sessions)

    with torch.no_grad():
        logits = policy.logits(policy.states(sessions).select(mask), requests.select(mask))

    finite = logits[logits.isfinite()]
    assert float(finite.max() - finite.min()) > 0.99 * GAP_BOUND, "the weights are too small to test the floor"
    assert float(finite.min()) >= -1.001 * GAP_BOUND
    chances = logits.softmax(1)[logits.isfinite()]
    assert float(chances.min()) >= math.exp(-1.001 * GAP_BOUND) / logits.shape[1]


@pytest.mark.parametrize("size", [1.0, 1e3, 1e6])
def test_the_bound_keeps_the_order_and_the_proportions_of_all_candidates(size: float) -> None:
    utility = size * torch.tensor([[3.0, -1.0, 2.5, 0.0, 9.0]])
    requests = Requests(torch.tensor([[2, 3, 4, 5, 0]]), torch.zeros(1, 0), torch.zeros(1, 0, dtype=torch.long))

    logits = bounded(utility, requests)

    assert logits[0, 4] == -torch.inf
    torch.testing.assert_close(logits[0, :4] / logits[0, 1], torch.tensor([0.0, 1.0, 0.125, 0.75]))
    assert float(logits[0, 1]) == pytest.approx(-min(4.0 * size, GAP_BOUND))


def test_the_uniform_policy_finds_every_slate_equally_likely(sessions: SessionBatch) -> None:
    policy = UniformPolicy(K)
    requests, slates, mask = request_rows(sessions)
    n_candidates = sessions.candidates.shape[2]

    log_probs = policy.log_prob(policy.states(sessions), requests, slates)[mask].sum(1)

    # 12 · 11 · 10 · 9 ordered slates of 4 of 12 candidates.
    assert log_probs.numpy() == pytest.approx(-math.log(math.perm(n_candidates, K)), abs=1e-5)


def test_popularity_ranks_by_log_counts() -> None:
    counts = torch.tensor([0.0, 0.0, 7.0, 0.0, 3.0])
    policy = PopularityPolicy(1, counts, sharpness=2.0)
    requests = Requests(torch.tensor([[2, 3, 4, 0]]), torch.zeros(1, 0), torch.zeros(1, 1, dtype=torch.long))

    logits = policy.logits(policy.start(requests), requests)

    assert logits[0, :3].tolist() == pytest.approx([2 * math.log(8), 0.0, 2 * math.log(4)])


def test_at_strength_zero_a_neural_policy_is_its_behavior_estimate(
    make_policy: MakePolicy, sessions: SessionBatch
) -> None:
    policy = make_policy("neural")
    assert isinstance(policy, NeuralSlatePolicy)
    state, requests = policy.states(sessions), sessions.requests()

    trained = policy.logits(state, requests)
    policy.strength.fill_(0.0)

    assert torch.equal(policy.logits(state, requests), policy.behavior_logits(state, requests))
    assert not torch.allclose(trained, policy.logits(state, requests))


def test_the_oracle_asks_for_a_revealed_truth(sessions: SessionBatch) -> None:
    policy = OraclePolicy(K)

    with pytest.raises(ValueError, match="reveal_truth=True"):
        policy.logits(policy.states(sessions), sessions.requests())


@pytest.mark.parametrize("kind", ["ranking", "neural"])
def test_a_policy_read_back_from_its_folder_gives_the_same_log_probs(
    kind: str, make_policy: MakePolicy, vocabulary: Vocabulary, sessions: SessionBatch, tmp_path: Path
) -> None:
    policy = make_policy(kind)
    assert isinstance(policy, RankingPolicy | NeuralSlatePolicy)
    stored = stored_policy(policy, vocabulary)
    save_policy(stored, tmp_path)

    loaded = load_policy(tmp_path)

    requests, slates, mask = request_rows(sessions)
    with torch.no_grad():
        before, after = (
            asked.log_prob(asked.states(sessions).select(mask), requests.select(mask), slates[mask])
            for asked in (policy, loaded.policy)
        )
    assert loaded.description == stored.description
    assert torch.equal(before, after)


def stored_policy(policy: EncodedPolicy, vocabulary: Vocabulary) -> StoredPolicy:
    assert isinstance(policy, RankingPolicy | NeuralSlatePolicy)
    description = PolicyDescription(name="test-1", loop="shop", shape=shape_of(policy), vocabulary=vocabulary)
    return StoredPolicy(description, policy)


def test_loading_a_policy_draws_nothing_from_the_global_generator(
    make_policy: MakePolicy, vocabulary: Vocabulary, tmp_path: Path
) -> None:
    policy = make_policy("neural")
    assert isinstance(policy, EncodedPolicy)
    save_policy(stored_policy(policy, vocabulary), tmp_path)
    before = torch.random.get_rng_state()

    load_policy(tmp_path)

    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_folder_without_a_policy_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"{tmp_path}: holds no policy; expected {DESCRIPTION} and {WEIGHTS}"):
        load_policy(tmp_path)


def test_weights_of_another_shape_and_unknown_keys_are_refused(
    make_policy: MakePolicy, vocabulary: Vocabulary, tmp_path: Path
) -> None:
    ranking, neural = make_policy("ranking"), make_policy("neural")
    assert isinstance(ranking, EncodedPolicy)
    assert isinstance(neural, EncodedPolicy)
    save_policy(stored_policy(neural, vocabulary), tmp_path)
    weights = (tmp_path / WEIGHTS).read_bytes()
    save_policy(stored_policy(ranking, vocabulary), tmp_path)
    (tmp_path / WEIGHTS).write_bytes(weights)
    with pytest.raises(InputError, match=f"{WEIGHTS}: does not fit {DESCRIPTION}"):
        load_policy(tmp_path)

    text = (tmp_path / DESCRIPTION).read_text()
    (tmp_path / DESCRIPTION).write_text(text.replace('"loop":', '"lop":'))
    with pytest.raises(InputError, match=f"{DESCRIPTION}: loop: Field required"):
        load_policy(tmp_path)


@pytest.mark.parametrize("n_bytes", [0, 5, 200])
def test_truncated_weights_are_refused(
    n_bytes: int, make_policy: MakePolicy, vocabulary: Vocabulary, tmp_path: Path
) -> None:
    policy = make_policy("ranking")
    assert isinstance(policy, EncodedPolicy)
    save_policy(stored_policy(policy, vocabulary), tmp_path)
    (tmp_path / WEIGHTS).write_bytes((tmp_path / WEIGHTS).read_bytes()[:n_bytes])

    with pytest.raises(InputError, match=WEIGHTS):
        load_policy(tmp_path)


@pytest.mark.parametrize(("responses", "sells"), [("per_position", True), ("per_position", False), ("choice", True)])
def test_expected_reward_weights_rank_as_the_user_model_expects_near_the_mean(
    responses: Responses, sells: bool, make_policy: MakePolicy
) -> None:
    policy, reward, step = make_policy("ranking"), Reward(weights={"clicked": 1.0, "purchased": 3.0}), 1e-3
    assert isinstance(policy, RankingPolicy)

    weights = policy.features.expected_reward_weights(reward, responses=responses, sells=sells)

    def log_reward(click: float, purchase: float) -> float:
        clicked = 1 / (1 + math.exp(-click)) if responses == "per_position" else math.exp(click)
        return math.log(clicked) + math.log(1.0 + (3.0 / (1 + math.exp(-purchase)) if sells else 0.0))

    click, purchase = policy.features.mean[:2].tolist()
    slopes = [
        (log_reward(click + step, purchase) - log_reward(click - step, purchase)) / (2 * step),
        (log_reward(click, purchase + step) - log_reward(click, purchase - step)) / (2 * step),
    ]
    by_logit = weights / policy.features.scale  # weights are for one deviation
    assert by_logit[:2].tolist() == pytest.approx(slopes, rel=1e-3, abs=1e-5)
    assert not by_logit[2:].any()


def test_expected_reward_weights_are_zero_where_nothing_is_expected(make_policy: MakePolicy) -> None:
    policy, reward = make_policy("ranking"), Reward(weights={"purchased": 3.0})
    assert isinstance(policy, RankingPolicy)

    assert not policy.features.expected_reward_weights(reward, responses="per_position", sells=False).any()


def test_before_training_a_neural_policy_is_what_it_starts_at(make_policy: MakePolicy, sessions: SessionBatch) -> None:
    made, ranking = make_policy("neural"), make_policy("ranking")
    assert isinstance(made, NeuralSlatePolicy)
    assert isinstance(ranking, RankingPolicy)
    requests, _, mask = request_rows(sessions)
    requests, state = requests.select(mask), made.states(sessions).select(mask)

    made.start_at_behavior()
    with torch.no_grad():
        torch.testing.assert_close(made.logits(state, requests), made.behavior_logits(state, requests))

    fresh = NeuralSlatePolicy(ranking.features, K)
    fresh.start_at(ranking.weights)
    state = ranking.states(sessions).select(mask)
    with torch.no_grad():
        torch.testing.assert_close(fresh.logits(state, requests), ranking.logits(state, requests), rtol=1e-4, atol=1e-4)
