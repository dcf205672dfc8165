import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from components.interactions.batching import SessionBatch, SessionReader
from components.policies.slate_policy import SessionState
from components.world_model.training import NegativeSampler
from components.world_model.user_model import UserModel, next_items

SESSIONS = [[5, 9, 5, 30], [7, 7], [12, 3, 38], [20]]


def test_the_target_of_a_view_is_the_next_view(views: Callable[..., SessionBatch]) -> None:
    assert next_items(views(SESSIONS)).tolist() == [[9, 5, 30, 0], [7, 0, 0, 0], [3, 38, 0, 0], [0, 0, 0, 0]]


def test_catalogue_logits_are_the_click_logits_of_every_item(
    make_model: Callable[..., UserModel], views: Callable[..., SessionBatch]
) -> None:
    encoder = make_model(0).encoder
    state = encoder.states(views(SESSIONS))
    listed = torch.randperm(encoder.shape.n_indices - 1, generator=torch.Generator().manual_seed(0))[:25] + 1

    for items in (torch.arange(1, encoder.shape.n_indices), listed):
        one_by_one = encoder.click_logits(state, items.expand(len(state.hidden), -1))
        torch.testing.assert_close(encoder.catalogue_logits(state, items), one_by_one)


def test_weights_of_pair_features_learn_the_same_from_a_list_as_from_single_items(
    make_model: Callable[..., UserModel], views: Callable[..., SessionBatch]
) -> None:
    encoder = make_model(0).encoder
    items = torch.arange(1, encoder.shape.n_indices)
    gradients = []
    for whole in (True, False):
        state = encoder.states(views(SESSIONS))
        expanded = items.expand(len(state.hidden), -1)
        logits = encoder.catalogue_logits(state, items) if whole else encoder.click_logits(state, expanded)
        encoder.zero_grad()
        logits.log_softmax(1)[:, 4].sum().backward()
        gradients.append(encoder.click_pair.weight.grad)

    torch.testing.assert_close(*gradients)


def test_states_of_whole_sessions_are_those_of_one_request_after_the_other(
    shop_model: UserModel, reader: SessionReader
) -> None:
    batch = next(reader.batches(40)).trim()
    encoder = shop_model.encoder
    at_once = encoder.states(batch)
    state = encoder.start(batch.first_steps(1).requests())
    for step in range(1, batch.mask.shape[1]):
        requests = SessionBatch(
            **{name: v if name == "users" else v[:, step : step + 1] for name, v in batch.columns().items()}
        ).requests()
        before = step - 1
        state = encoder.advance(
            state, batch.slates[:, before], batch.clicks[:, before], batch.purchases[:, before], requests
        )
        here = at_once.select(torch.arange(len(batch.users)) * batch.mask.shape[1] + step)
        torch.testing.assert_close(here.hidden, state.hidden)
        assert torch.equal(here.recent, state.recent)


def test_recent_items_are_the_latest_views(
    make_model: Callable[..., UserModel], views: Callable[..., SessionBatch]
) -> None:
    state = make_model(0).encoder.states(views([[5, 9, 5, 30, 8]]))

    assert state.recent.tolist() == [[5, 0, 0, 0], [9, 5, 0, 0], [5, 9, 5, 0], [30, 5, 9, 5], [8, 30, 5, 9]]


def test_the_likelihood_of_a_tiny_log_is_that_done_by_hand(
    make_model: Callable[..., UserModel], views: Callable[..., SessionBatch]
) -> None:
    model = make_model(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.encoder.click_bias.weight[9] = math.log(2.0)
        model.leave.get_parameter("2.bias").fill_(math.log(3.0))

    likelihood = model.log_likelihood(views([[5, 9, 5], [7, 9]], censored=(1,)))

    # Item 9 has weight 2, the 38 others (the unknown one among them) 1: 9, 5 and 9 follow.
    assert float(likelihood.click) == pytest.approx(3 * math.log(40) - 2 * math.log(2))
    assert float(likelihood.n_click) == 3
    # Leaving has probability 3/4. Session 1 stays, stays, leaves; session 2 stays, and its end is not known.
    assert float(likelihood.leave) == pytest.approx(3 * math.log(4) + math.log(4 / 3))
    assert float(likelihood.n_leave) == 4
    assert float(likelihood.purchase) == float(likelihood.n_purchase) == 0


def test_a_choice_costs_its_share_of_the_slate_and_of_none(
    make_model: Callable[..., UserModel], views: Callable[..., SessionBatch]
) -> None:
    model = make_model(3, "choice")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.position.copy_(torch.tensor([2.0, 1.0, 5.0]).log())
    blank = views([[5, 6]])
    slates = torch.tensor([[[10, 11, 0], [12, 13, 0]]], dtype=torch.int32)
    clicks = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]])
    batch = replace(
        blank, slates=slates, clicks=clicks, purchases=torch.zeros_like(clicks), observed=slates > 0,
        purchase_observed=slates > 0, rewards=clicks,
    )  # fmt: skip

    losses, n = model.click_losses(batch)

    # Weights 2, 1 and 1 for none: the third position is padding.
    assert losses.tolist() == [pytest.approx([math.log(2), math.log(4)])]
    assert n.tolist() == [[1.0, 1.0]]


def test_requests_weigh_in_the_likelihood_as_told(shop_model: UserModel, reader: SessionReader) -> None:
    batch = next(reader.batches(30))
    whole = shop_model.log_likelihood(batch)
    halves = shop_model.log_likelihood(batch, torch.full(batch.mask.shape, 0.5))

    torch.testing.assert_close(halves.total * 2, whole.total)
    torch.testing.assert_close(halves.per_request, whole.per_request)


def test_padding_adds_nothing_to_the_likelihood(shop_model: UserModel, reader: SessionReader) -> None:
    batch = next(reader.batches(30)).trim()
    padded = SessionBatch(
        **{
            name: v if name == "users" else functional.pad(v, (0, 0) * (v.dim() - 2) + (0, 3))
            for name, v in batch.columns().items()
        }
    )

    torch.testing.assert_close(shop_model.log_likelihood(padded).total, shop_model.log_likelihood(batch).total)


def test_sampled_softmax_approaches_the_exact_loss_as_negatives_grow(
    make_model: Callable[..., UserModel], views: Callable[..., SessionBatch]
) -> None:
    model, batch = make_model(0), views(SESSIONS)
    counts = torch.ones(model.encoder.shape.n_indices)
    counts[0] = 0.0
    exact = float(model.log_likelihood(batch).click)
    generator = torch.Generator().manual_seed(0)

    def error(n_draws: int) -> float:
        sampler = NegativeSampler.of(counts, n_draws)
        drawn = [model.log_likelihood(batch, None, *sampler.draw(generator)).click for _ in range(40)]
        return float((torch.stack(drawn) - exact).square().mean().sqrt())

    few, more, all_of_them = error(8), error(60), error(2_000)
    assert few > more > all_of_them
    assert all_of_them == pytest.approx(0.0, abs=1e-4)


def test_rare_items_share_the_unknown_items_embedding(make_model: Callable[..., UserModel]) -> None:
    encoder = make_model(0).encoder
    vectors = encoder.item_vectors(torch.arange(8))

    # Item i was touched i times, and five touches give an embedding of its own.
    assert all(torch.equal(vectors[item], vectors[1]) for item in (2, 3, 4))
    assert not any(torch.equal(vectors[item], vectors[1]) for item in (5, 6, 7))
    assert not bool(vectors[0].any())


def test_a_visit_that_was_counted_is_left_out_of_training_and_of_nothing_else(
    make_model: Callable[..., UserModel], views: Callable[..., SessionBatch]
) -> None:
    encoder = make_model(0).encoder
    state = encoder.states(views([[5]]))
    follower = encoder.neighbors[5, :1][None]
    item = torch.stack([follower, follower])
    counted = torch.stack([torch.zeros_like(follower), follower])

    asked, learned = (float(encoder.pair_features(state, i, c)[0, 0, 3]) for i, c in zip(item, counted, strict=True))

    weight = float(encoder.neighbor_weights[5, 0])
    assert asked == pytest.approx(math.log1p(weight / 0.01), rel=1e-5)
    assert learned == pytest.approx(math.log1p(max(weight - 0.05, 0.0) / 0.01), rel=1e-5)


def test_a_follower_that_the_visit_at_hand_alone_has_listed_is_learned_from_like_one_that_is_not(
    make_model: Callable[..., UserModel], views: Callable[..., SessionBatch]
) -> None:
    encoder = make_model(0).encoder
    weight = float(encoder.neighbor_weights[5, 0])
    encoder.neighbor_weights[5] = weight
    state, follower = encoder.states(views([[5]])), encoder.neighbors[5, :1][None]

    def learned(unlisted: float) -> float:
        encoder.unlisted[5] = unlisted
        return float(encoder.pair_features(state, follower, follower)[0, 0, 3])

    assert weight > 0.1
    assert learned(weight - 0.05) == 0.0
    assert learned(weight - 0.1) == pytest.approx(math.log1p((weight - 0.05) / 0.01), rel=1e-5)


def test_sampled_responses_have_the_modelled_frequencies(make_model: Callable[..., UserModel]) -> None:
    model = make_model(3)
    with torch.no_grad():
        model.position.copy_(torch.tensor([1.0, 0.0, -1.0]))
        model.clicks_above.fill_(-2.0)
    n = 20_000
    slates = torch.tensor([[4, 8, 15]]).expand(n, -1)
    alike = SessionState(torch.zeros(n, 12), torch.zeros(n, 4, dtype=torch.int32))

    clicks, purchases, left = model.sample_responses(alike, slates, torch.Generator().manual_seed(0))

    predicted = model.click_probabilities(alike, slates, clicks)
    torch.testing.assert_close(clicks.mean(0), predicted.mean(0), atol=0.015, rtol=0.0)
    hazard = torch.sigmoid(model.leave_logits(alike, slates, clicks, purchases))
    assert float(left.float().mean()) == pytest.approx(float(hazard.mean()), abs=0.015)
    assert bool((purchases <= clicks).all())


def test_the_visits_of_a_session_itself_are_those_after_its_last_item(
    make_model: Callable[..., UserModel], views: Callable[..., SessionBatch]
) -> None:
    encoder, batch = make_model(0).encoder, views([[5, 9, 5, 30], [7, 8]])

    own = encoder.own_followers(batch, encoder.states(batch))

    # After 5 come 9 and 30, whichever of them is next; after 9 comes 5; nothing comes after 30.
    assert [sorted(set(row) - {0}) for row in own.tolist()[:6]] == [[9, 30], [5], [9, 30], [], [8], []]


@pytest.mark.parametrize("responses", ["per_position", "choice"])
def test_expected_responses_are_those_of_every_possible_answer(
    responses: str, make_model: Callable[..., UserModel]
) -> None:
    model = make_model(3, responses)
    torch.nn.init.constant_(model.clicks_above, -1.5)
    state = SessionState(torch.randn(4, 12, generator=torch.Generator().manual_seed(0)), torch.zeros(4, 4).int())
    slates = torch.tensor([[5, 9, 30], [7, 12, 0], [20, 3, 38], [11, 0, 0]])

    clicks, purchases = model.expected_responses(state, slates)

    expected = torch.zeros(4, 3)
    if responses == "choice":
        expected = model.click_probabilities(state, slates, torch.zeros(4, 3))
    else:
        for answer in itertools.product((0.0, 1.0), repeat=3):
            clicked = torch.tensor(answer).expand(4, -1)
            chance = model.click_probabilities(state, slates, clicked)
            expected += clicked * torch.where(clicked > 0, chance, 1.0 - chance).prod(1, keepdim=True)
    torch.testing.assert_close(clicks, expected)
    assert (clicks[slates == 0] == 0).all()
    torch.testing.assert_close(purchases, clicks * torch.sigmoid(model.encoder.purchase_logits(state, slates)))
    model.sells.fill_(False)
    assert not model.expected_responses(state, slates)[1].any()
