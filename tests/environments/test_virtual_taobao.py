import shutil
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy import stats
from torch import Tensor
from virtual_taobao_weights import GROUPS, SIZES, Reference, published_weights, write_random_weights

from components.environments.continuous import RunningSessions, run_sessions
from components.environments.virtual_taobao import Repetition, VirtualTaobao, VirtualTaobaoState, read_layers
from components.errors import InputError
from components.policies.continuous_policy import UniformActions

N_TRIPLES = 10_000
#: Sessions of which statistics are taken.
N_USERS = 20_000


@pytest.fixture(scope="module")
def random_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_weights(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module", params=["published", "random"])
def weights(request: pytest.FixtureRequest, random_weights: Path) -> Path:
    return published_weights() if request.param == "published" else random_weights


@pytest.fixture(scope="module")
def published() -> VirtualTaobao:
    return VirtualTaobao(published_weights())


@pytest.fixture
def environment(random_weights: Path) -> VirtualTaobao:
    return VirtualTaobao(random_weights)


def chance(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def actions_of(n: int, seed: int = 1, size: float = 1.0) -> Tensor:
    return size * (2.0 * torch.rand(n, 27, generator=chance(seed)) - 1.0)


def on_page(state: VirtualTaobaoState, pages: Tensor) -> VirtualTaobaoState:
    observations = state.observations.clone()
    observations[:, -1] = pages.float()
    return replace(state, observations=observations)


# --- exactness


def test_distributions_are_those_of_the_weights_in_double_precision(weights: Path) -> None:
    environment, reference = VirtualTaobao(weights), Reference(weights)
    users = environment.draw_users(N_TRIPLES, chance())
    # Some actions lie outside of the box, where they are as those on its edge.
    pages, actions = torch.randint(100, (N_TRIPLES,), generator=chance(2)), actions_of(N_TRIPLES, size=1.2)

    page = environment.page(on_page(environment.open(users, chance()), pages), actions)
    leaving = environment.page_count_probabilities(users)

    clicks, page_action = reference.page(users.numpy(), pages.numpy(), actions.numpy())
    np.testing.assert_allclose(page.clicks, clicks, rtol=0, atol=1e-5)
    np.testing.assert_allclose(page.page_action, page_action, rtol=0, atol=1e-5)
    np.testing.assert_allclose(leaving, reference.pages(users.numpy()), rtol=0, atol=1e-5)


def test_expected_clicks_are_those_of_the_weights_in_double_precision_and_have_a_gradient(weights: Path) -> None:
    environment, n = VirtualTaobao(weights), 1_000
    users, pages = environment.draw_users(n, chance()), torch.randint(100, (n,), generator=chance(2))
    actions = actions_of(n).double().requires_grad_()

    clicks = environment.expected_clicks(on_page(environment.open(users, chance()), pages), actions)
    (gradient,) = torch.autograd.grad(clicks.sum(), actions)

    shares, _ = Reference(weights).page(users.numpy(), pages.numpy(), actions.detach().numpy())
    np.testing.assert_allclose(clicks.detach(), shares @ np.arange(11), rtol=0, atol=1e-9)
    assert gradient.isfinite().all()
    assert (gradient != 0).any()


def test_users_are_one_hot_in_each_group_as_often_as_the_weights_say(weights: Path) -> None:
    n = 50_000
    users = VirtualTaobao(weights).draw_users(n, chance())

    for group in users.split(GROUPS, dim=1):
        assert ((group == 0) | (group == 1)).all()
        assert (group.sum(1) == 1).all()
    expected = Reference(weights).user_groups(np.random.default_rng(0).random((n, 128))).mean(0)
    # Both are means of n draws: four standard errors of their difference, at most 4 √(2 · 1/4 / n).
    np.testing.assert_allclose(users.mean(0), expected, rtol=0, atol=4 * (0.5 / n) ** 0.5)


def test_clicks_and_page_actions_are_drawn_as_often_as_they_are_probable(weights: Path) -> None:
    environment, n = VirtualTaobao(weights), 50_000
    # Actions near the middle of the box, where least is certain; of 200 users the one whose both answers are least so.
    users, tried = environment.draw_users(200, chance()), actions_of(200, size=0.1)
    page = environment.page(environment.open(users, chance()), tried)
    unsure = torch.special.entr(page.clicks).sum(1) * torch.special.entr(page.page_action).sum(1)
    row = int(unsure.argmax())
    state = environment.open(users[row : row + 1].expand(n, -1), chance())
    actions = tried[row : row + 1].expand(n, -1)

    outcome, after = environment.step(state, actions, chance(3))

    page = environment.page(state.select(torch.arange(1)), actions[:1])
    assert_drawn_from(page.clicks[0], outcome.rewards)
    assert_drawn_from(page.page_action[0], after.observations[:, -2])
    drawn = torch.stack([outcome.rewards, after.observations[:, -2]]).numpy()
    # Given user and page, both heads are drawn by themselves.
    assert abs(np.corrcoef(drawn)[0, 1]) < 4 / n**0.5


def test_numbers_of_pages_are_drawn_as_often_as_they_are_probable(weights: Path) -> None:
    environment, n = VirtualTaobao(weights), 50_000
    user = environment.draw_users(1, chance())

    pages = environment.open(user.expand(n, -1), chance(3)).pages

    probabilities = environment.page_count_probabilities(user)[0].clone()
    probabilities[1] += probabilities[0]
    probabilities[0] = 0
    assert pages.min() >= 1
    assert_drawn_from(probabilities, pages)


def assert_drawn_from(probabilities: Tensor, drawn: Tensor) -> None:
    """Chi-square test; options expected less than five times count as one."""
    expected = probabilities.double().numpy() * len(drawn)
    seen = np.bincount(drawn.long().numpy(), minlength=len(expected))
    assert seen[expected == 0].sum() == 0
    rare = expected < 5
    expected = np.append(expected[~rare], max(expected[rare].sum(), 1e-9))
    seen = np.append(seen[~rare], seen[rare].sum())
    if expected[-1] < 5:
        assert seen[-1] <= 20
        expected, seen = expected[:-1], seen[:-1]
    assert stats.chisquare(seen, expected * seen.sum() / expected.sum()).pvalue > 1e-3


# --- the original's statistics


def test_pages_of_a_session_are_as_many_as_in_the_original(published: VirtualTaobao) -> None:
    """Mean 7.8, median 4, 90th percentile 18, by enumeration of the draw for each of many users."""
    users = published.draw_users(N_USERS, chance())
    share = published.page_count_probabilities(users).double().mean(0).numpy()
    pages = np.maximum(np.arange(101), 1)
    mean, upto = share @ pages, share.cumsum()

    steps = run_sessions(published, lambda seen: torch.zeros(len(seen), 27), N_USERS, chance(5)).steps.numpy()

    assert mean == pytest.approx(7.8, abs=0.1)
    assert pages[np.searchsorted(upto, 0.5)] == 4
    assert pages[np.searchsorted(upto, 0.9)] == pytest.approx(18, abs=1)
    deviation = np.sqrt(share @ pages**2 - mean**2)
    # Other users and their draws: 4 standard errors of a difference.
    assert steps.mean() == pytest.approx(mean, abs=4 * deviation * (2 / N_USERS) ** 0.5)
    assert np.median(steps) == 4
    assert np.quantile(steps, 0.9) == pytest.approx(18, abs=1)
    assert steps.max() <= 100


def test_random_and_zero_actions_earn_what_they_earn_in_the_original(published: VirtualTaobao) -> None:
    generator = chance()
    uniform = UniformActions(27)

    drawn = run_sessions(published, lambda seen: uniform.act(seen, generator).actions, N_USERS, generator)
    zero = run_sessions(published, lambda seen: torch.zeros(len(seen), 27), N_USERS, generator)

    # About 156,000 pages each: a standard error of the click-through rate is below 0.0002.
    assert drawn.mean_reward / 10 == pytest.approx(0.019, abs=0.001)
    assert zero.mean_reward / 10 == pytest.approx(0.056, abs=0.001)


# --- the original's mechanics


def published_session(
    user: np.ndarray, n_drawn: int, outcomes: Iterator[tuple[float, float]]
) -> Iterator[tuple[np.ndarray, int, float, bool]]:
    """One user's session as published.

    Of each page: the observation after it, the index that the network was shown, the reward, whether the session ended.

    What the original draws comes from `outcomes`. Where it ended, the original puts the next user in the observation's
    place; the terminal observation here is the user's own.
    """
    total_pages = 0
    for clicks, page_action in outcomes:
        shown_index = total_pages
        total_pages += 1
        ended = total_pages >= n_drawn
        yield np.array([*user, clicks, page_action, total_pages]), shown_index, clicks, ended
        if ended:
            return


def test_sessions_are_those_of_the_published_mechanics_step_by_step(weights: Path) -> None:
    environment, reference, n, generator = VirtualTaobao(weights), Reference(weights), 64, chance()
    users = environment.draw_users(n, generator)
    opened = environment.open(users, generator)
    generator_state = generator.get_state()
    n_drawn = torch.where(torch.arange(n) < 2, 0, opened.pages)
    state = replace(opened, pages=n_drawn)
    np.testing.assert_array_equal(environment.observe(state), np.concatenate([users, np.zeros((n, 3))], axis=1))

    steps: list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]] = []
    for number in range(100):
        actions = actions_of(n, seed=number)
        page = environment.page(state, actions)
        outcome, state = environment.step(state, actions, generator)
        steps.append((environment.observe(state), outcome.rewards, outcome.ended, page.clicks, actions))

    assert not torch.equal(generator.get_state(), generator_state)
    for row in range(n):
        drawn = ((float(seen[row, 88]), float(seen[row, 89])) for seen, *_ in steps)
        session = list(published_session(users[row].double().numpy(), int(n_drawn[row]), drawn))
        assert len(session) == max(1, int(n_drawn[row]))
        for (observation, shown_index, reward, ended), step in zip(session, steps, strict=False):
            seen, rewards, over, clicks, actions = step
            np.testing.assert_array_equal(seen[row], observation)
            assert (float(rewards[row]), bool(over[row])) == (reward, ended)
            expected, page_action = reference.page(
                users[row : row + 1].numpy(), np.array([shown_index]), actions[row : row + 1].numpy()
            )
            np.testing.assert_allclose(clicks[row], expected[0], rtol=0, atol=1e-5)
            assert expected[0, int(observation[88])] > 0
            assert page_action[0, int(observation[89])] > 0


def test_terminal_observations_are_the_leaving_users_own(environment: VirtualTaobao) -> None:
    sessions = RunningSessions(environment, 200, chance())
    ended = 0
    for number in range(20):
        transitions = sessions.step(actions_of(200, seed=number))
        before, after = transitions.observations, transitions.next_observations
        assert torch.equal(after[:, :88], before[:, :88])
        assert torch.equal(after[:, 88], transitions.rewards)
        assert torch.equal(after[:, 90], before[:, 90] + 1)
        left = transitions.ended
        assert torch.equal(sessions.observations[~left], after[~left])
        assert (sessions.observations[left][:, 88:] == 0).all()
        ended += int(left.sum())
    assert ended > 100


def test_actions_outside_of_the_box_are_as_those_on_its_edge(environment: VirtualTaobao) -> None:
    state, actions = environment.reset(50, chance()), actions_of(50, size=3.0)

    outcome, after = environment.step(state, actions, chance(1))

    clipped, after_clipped = environment.step(state, actions.clamp(-1, 1), chance(1))
    assert torch.equal(outcome.rewards, clipped.rewards)
    assert torch.equal(after.observations, after_clipped.observations)


def test_same_seed_same_trajectory(environment: VirtualTaobao) -> None:
    def trajectory(seed: int) -> Tensor:
        sessions = RunningSessions(environment, 30, chance(seed))
        return torch.stack([sessions.step(actions_of(30, seed=n)).next_observations for n in range(30)])

    before = torch.random.get_rng_state()
    assert torch.equal(trajectory(1), trajectory(1))
    assert not torch.equal(trajectory(1), trajectory(2))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("repetition", [None, Repetition(recent=2)])
def test_a_step_changes_neither_its_state_nor_its_actions(random_weights: Path, repetition: Repetition | None) -> None:
    environment = VirtualTaobao(random_weights, repetition)
    state, actions = environment.reset(20, chance()), actions_of(20, size=2.0)
    copies = {field.name: getattr(state, field.name).clone() for field in fields(state)}
    shown = actions.clone()

    first = environment.step(state, actions, chance(1))
    environment.page(state, actions)
    second = environment.step(state, actions, chance(1))

    assert torch.equal(actions, shown)
    assert all(torch.equal(getattr(state, name), copy) for name, copy in copies.items())
    assert torch.equal(first[0].rewards, second[0].rewards)
    assert torch.equal(first[1].observations, second[1].observations)


def test_chosen_and_replaced_users_stay_whole(random_weights: Path) -> None:
    environment = VirtualTaobao(random_weights, Repetition(recent=2))
    many, few = environment.reset(6, chance()), environment.reset(2, chance(1))
    actions, rows = actions_of(6), torch.tensor([4, 1])

    chosen, mixed = many.select(rows), many.replaced(rows, few)

    page = environment.page(many, actions)
    torch.testing.assert_close(environment.page(chosen, actions[rows]).clicks, page.clicks[rows])
    both = environment.page(mixed, actions).clicks
    torch.testing.assert_close(both[[0, 2, 3, 5]], page.clicks[[0, 2, 3, 5]])
    torch.testing.assert_close(both[rows], environment.page(few, actions[rows]).clicks)
    assert torch.equal(environment.observe(mixed)[rows], environment.observe(few))


# --- sessions that end by repetition


def along(axis: int, size: float) -> Tensor:
    action = torch.zeros(1, 27)
    action[0, axis] = size
    return action


def length(environment: VirtualTaobao, actions: list[Tensor]) -> int | None:
    """Pages until the session ends; None if it goes on after all actions."""
    generator, state = chance(), environment.reset(1, chance())
    for number, action in enumerate(actions, start=1):
        outcome, state = environment.step(state, action, generator)
        if outcome.ended:
            return number
    return None


def test_a_session_ends_at_an_action_close_to_one_of_its_last(random_weights: Path) -> None:
    def session(recent: int, threshold: float, actions: list[Tensor], max_pages: int = 100) -> int | None:
        repetition = Repetition(recent=recent, threshold=threshold, max_pages=max_pages)
        return length(VirtualTaobao(random_weights, repetition), actions)

    # Distances: 0.8 from first to second; 0.3 from first to third, √(0.8² + 0.3²) = 0.85 from second to third.
    three = [along(0, 0.0), along(0, 0.8), along(1, 0.3)]
    assert session(2, 0.5, three) == 3
    assert session(1, 0.5, three) is None
    assert session(1, 0.8 + 1e-6, three) == 2
    assert session(2, 0.29, three) is None
    # Beyond the edge both are the same action.
    assert session(1, 0.0, [along(0, 1.5), along(0, 9.0)]) == 2
    assert session(1, 0.0, [along(0, 1.0), along(0, -1.0), along(0, 1.0)]) is None
    assert session(1, 0.0, [along(number, 1.0) for number in range(5)], max_pages=4) == 4


def test_where_actions_decide_every_session_may_be_long(random_weights: Path) -> None:
    environment = VirtualTaobao(random_weights, Repetition(threshold=0.0, max_pages=7))

    totals = run_sessions(environment, lambda seen: torch.rand(len(seen), 27, generator=chance(9)), 5, chance())

    # The same actions again and again: every session ends at its second page.
    assert totals.steps.tolist() == [2] * 5
    generator = chance(9)
    totals = run_sessions(environment, lambda seen: torch.rand(len(seen), 27, generator=generator), 5, chance())
    assert totals.steps.tolist() == [7] * 5


def test_more_pages_than_the_networks_know_are_refused() -> None:
    with pytest.raises(ValidationError, match="less than or equal to 100"):
        Repetition(max_pages=101)


# --- reading weights


@pytest.mark.parametrize("name", list(SIZES))
def test_a_missing_file_is_named(random_weights: Path, tmp_path: Path, name: str) -> None:
    folder = shutil.copytree(random_weights, tmp_path / "weights")
    (folder / name).unlink()

    with pytest.raises(InputError, match=f"{name}: no such file; expected the published weights .* action_model.pt"):
        VirtualTaobao(folder)


def cut(raw: bytes) -> bytes:
    return raw[: len(raw) // 2]


@pytest.mark.parametrize(
    "damage", [cut, lambda raw: b"", lambda raw: b"weights", lambda raw: b"\x80\x02}q\x00X\xff\xff"]
)
def test_a_damaged_file_is_refused(random_weights: Path, tmp_path: Path, damage: Any) -> None:
    file = tmp_path / "leave_model.pt"
    file.write_bytes(damage((random_weights / "leave_model.pt").read_bytes()))

    with pytest.raises(InputError, match=r"leave_model.pt: cannot be read as weights: \w+"):
        read_layers(file)


def test_a_folder_in_a_files_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "leave_model.pt").mkdir()

    with pytest.raises(InputError, match=r"leave_model.pt: cannot be read as weights"):
        read_layers(tmp_path / "leave_model.pt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: [*tensors.values()], "holds list; expected the tensors \\['0.weight', '0.bias', '2.weight'"),
        (lambda tensors: tensors | {"6.bias": torch.zeros(1)}, "holds \\['0.weight', .*'6.bias'\\]; expected the ten"),
        (lambda tensors: {7: tensors["0.bias"]}, "holds \\['7'\\]; expected the tensors"),
        (lambda tensors: tensors | {"0.bias": 3}, "holds \\['0.weight', .*; expected the tensors"),
        (
            lambda tensors: tensors | {"2.weight": torch.zeros(256, 127)},
            "layer 1 has weights \\(256, 127\\) and biases \\(256,\\); expected \\(256, 128\\) and \\(256,\\)",
        ),
        (
            lambda tensors: tensors | {"4.bias": torch.zeros(100)},
            "layer 2 has weights \\(101, 256\\) and biases \\(100,\\); expected \\(101, 256\\) and \\(101,\\)",
        ),
        (
            lambda tensors: tensors | {"0.bias": torch.full((128,), torch.nan)},
            "layer 0 holds NaN or infinity; expected finite weights and biases",
        ),
    ],
)
def test_another_network_is_refused(random_weights: Path, tmp_path: Path, change: Any, message: str) -> None:
    file = tmp_path / "leave_model.pt"
    torch.save(change(torch.load(random_weights / file.name, weights_only=True)), file)

    with pytest.raises(InputError, match=f"leave_model.pt: {message}"):
        read_layers(file)
