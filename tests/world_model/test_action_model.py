"""The world model of a log of actions, on logs whose truth is known by hand."""

from pathlib import Path

import pytest
import torch
from action_log import BEST, MANIFEST, Row, hand_log, row, save

from components.environments.continuous import ContinuousEnvironment, run_sessions
from components.errors import InputError
from components.interactions.log_folder import Log
from components.world_model.action_model import (
    MOST_REWARDS,
    ActionModel,
    ActionModelConfig,
    fit_action_model,
    load_action_model,
    logged_steps,
    save_action_model,
)

SMALL = ActionModelConfig(hidden=(32,), max_epochs=20, batch=128, learning_rate=5e-3)
N_SESSIONS = 600


def quiet(message: str, share: float) -> None:
    """Progress that nobody looks at."""


def clocked(path: Path, seed: int) -> Log:
    """Sessions whose hour grows by one a request, who stay while they click; clicks by the sign of the first number.

    Four requests at most: whoever clicks at the fourth leaves too.
    """
    generator = torch.Generator().manual_seed(seed)
    rows: list[Row] = []
    for session in range(N_SESSIONS):
        hour = float(torch.randint(5, 9, (), generator=generator))
        for step in range(4):
            action = (2 * torch.rand(2, generator=generator) - 1).tolist()
            clicks = 3.0 if action[0] > 0 else 0.0
            left = clicks == 0 or step == 3
            rows.append(
                row(session, step, action=action, action_log_prob=-1.4, session_end="left" if left else None)
                | {"request_signals": {"clicks": clicks, "seconds": 0.0}}
                | {"context": {"device": ("phone", "desk")[session % 2], "hour": hour + step}}
            )
            if left:
                break
    return save(path, [rows])


@pytest.fixture(scope="module")
def clock(tmp_path_factory: pytest.TempPathFactory) -> ActionModel:
    folder = tmp_path_factory.mktemp("clock")
    train, validation = (clocked(folder / str(seed), seed) for seed in (1, 2))
    config = SMALL.model_copy(update={"max_epochs": 60, "patience": 60, "batch": 64, "learning_rate": 1e-2})
    return fit_action_model(train, validation, config, 0, quiet).model


def test_what_an_action_earns_is_learned_where_actions_were_logged(tmp_path: Path) -> None:
    train, validation = (hand_log(tmp_path / str(seed), 6_000, seed=seed) for seed in (1, 2))
    model = fit_action_model(train, validation, SMALL, 0, quiet).model

    actions = torch.tensor([[0.0, 0.0], [0.1, 0.0], [-0.1, 0.0], [0.0, 0.1]])
    expected = model.expected_rewards(torch.tensor([[1.0, 0.0, 7.0]]).expand(4, -1), actions)

    truth = 1 - (actions - torch.tensor(BEST)).square().sum(1)
    torch.testing.assert_close(expected, truth, atol=0.04, rtol=0)


def test_more_rewards_than_outcomes_are_groups_that_keep_the_mean(tmp_path: Path) -> None:
    log = hand_log(tmp_path / "log", 3_000, seed=1)
    model = fit_action_model(log, log, SMALL.model_copy(update={"max_epochs": 1}), 0, quiet).model

    rewards = torch.cat([part.rewards for part in logged_steps(log)])
    places = torch.searchsorted(model.edges, rewards)
    assert len(model.rewards) == MOST_REWARDS
    assert float(model.rewards[places].mean()) == pytest.approx(float(rewards.mean()), abs=1e-5)
    assert torch.bincount(places).min() > 3_000 / MOST_REWARDS / 2


def test_no_outcome_lies_above_the_largest_reward(tmp_path: Path) -> None:
    values = torch.cat([torch.full((100,), -50.0), torch.linspace(-100, -51, 400)]).tolist()
    rows = [row(number, 0, session_end="left") for number in range(500)]
    for written, value in zip(rows, values, strict=True):
        written["request_signals"] = {"clicks": value, "seconds": 0.0}
    log = save(tmp_path / "log", [rows])

    model = fit_action_model(log, log, SMALL.model_copy(update={"max_epochs": 1}), 0, quiet).model

    assert -51 < float(model.rewards.max()) <= -50
    assert float(model.rewards.min()) >= -100.0


def test_a_loss_that_is_no_number_names_the_step_size(tmp_path: Path) -> None:
    log = hand_log(tmp_path / "log", 200, seed=1)
    wild = SMALL.model_copy(update={"learning_rate": 1e30})

    with pytest.raises(InputError, match=r"action_model\.learning_rate = 1e\+30"):
        fit_action_model(log, log, wild, 0, quiet)


def test_few_rewards_are_outcomes_of_their_own(clock: ActionModel) -> None:
    assert clock.rewards.tolist() == [0.0, 3.0]


def test_sessions_go_on_as_they_were_logged(clock: ActionModel) -> None:
    assert isinstance(clock, ContinuousEnvironment)
    generator = torch.Generator().manual_seed(0)
    state = clock.reset(400, generator)
    before = clock.observe(state)
    actions = torch.tensor([[0.8, 0.0], [-0.8, 0.0]]).repeat(200, 1)

    outcome, after = clock.step(state, actions, generator)

    clicked = torch.tensor([True, False]).repeat(200)
    assert (outcome.rewards[clicked] == 3).float().mean() > 0.97
    assert (outcome.rewards[~clicked] == 0).float().mean() > 0.97
    assert outcome.ended[~clicked].float().mean() > 0.95
    assert outcome.ended[clicked].float().mean() < 0.1
    assert torch.equal(clock.observe(after)[:, :2], before[:, :2])
    torch.testing.assert_close(clock.observe(after)[:, 2], before[:, 2] + 1, atol=0.2, rtol=0)


def test_no_session_is_longer_than_the_longest_logged_one(clock: ActionModel) -> None:
    always = torch.tensor([[0.8, 0.0]])

    totals = run_sessions(clock, lambda seen: always.expand(len(seen), -1), 500, torch.Generator().manual_seed(0))

    assert int(totals.steps.max()) == 4
    assert float(totals.rewards.mean()) == pytest.approx(12, abs=1.5)


def test_new_sessions_begin_as_logged_ones_did(clock: ActionModel) -> None:
    hours = clock.observe(clock.reset(1_000, torch.Generator().manual_seed(0)))[:, 2]

    assert set(hours.tolist()) == {5.0, 6.0, 7.0, 8.0}


def test_the_same_seed_gives_the_same_model_and_it_is_the_same_from_disk(tmp_path: Path) -> None:
    log = hand_log(tmp_path / "log", 800, seed=1, parts=2)
    first, second = (fit_action_model(log, log, SMALL, 3, quiet).model for _ in range(2))
    (tmp_path / "model").mkdir()
    save_action_model(first, tmp_path / "model")

    loaded = load_action_model(tmp_path / "model")

    for other in (second, loaded):
        assert all(torch.equal(value, other.state_dict()[name]) for name, value in first.state_dict().items())


def test_the_model_with_the_best_validation_loss_is_kept(tmp_path: Path) -> None:
    train, validation = (hand_log(tmp_path / str(seed), n, seed=seed) for seed, n in ((1, 60), (2, 600)))
    config = ActionModelConfig(hidden=(64,), max_epochs=200, patience=5, batch=16, learning_rate=1e-2)

    history = fit_action_model(train, validation, config, 0, quiet).history

    losses = [epoch.validation for epoch in history]
    assert len(history) < 200
    assert losses.index(min(losses)) == len(losses) - 6


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"request_signals": {"clicks": None, "seconds": None}}, "no reward is known"),
        ({"session_end": None}, "no end of a session is known"),
        ({"step": 3}, "no first request of a session is known"),
    ],
)
def test_what_cannot_be_learned_from_is_said(changes: Row, told: str, tmp_path: Path) -> None:
    log = save(tmp_path / "log", [[row(session, 1) | changes for session in range(6)]])

    with pytest.raises(InputError, match=told):
        fit_action_model(log, log, SMALL, 0, quiet)


def test_a_categorical_feature_that_changes_within_a_session_is_refused(tmp_path: Path) -> None:
    rows = [row(0, 0, context={"device": "phone", "hour": 1.0}), row(0, 1, context={"device": "desk", "hour": 1.0})]

    with pytest.raises(InputError, match="categorical feature changes within a session"):
        fit_action_model(*[save(tmp_path / "log", [rows], MANIFEST)] * 2, SMALL, 0, quiet)


def test_requests_of_which_the_next_is_missing_are_neither_stayed_nor_left(tmp_path: Path) -> None:
    log = save(tmp_path / "log", [[row(0, 0), row(0, 2, session_end="left"), row(1, 0, session_end="censored")]])

    (steps,) = logged_steps(log)

    assert steps.stayed.tolist() == [False, False, False]
    assert steps.left.tolist() == [False, True, False]


def test_parts_of_a_log_are_learned_from_alike(tmp_path: Path) -> None:
    one, three = (hand_log(tmp_path / str(parts), 900, seed=1, parts=parts) for parts in (1, 3))

    first, second = (fit_action_model(log, one, SMALL, 0, quiet).model for log in (one, three))

    assert torch.equal(first.rewards, second.rewards)
    torch.testing.assert_close(first.observation_scale, second.observation_scale)
