from pathlib import Path

import numpy as np
import pytest
import torch
from virtual_taobao_weights import write_random_weights

from components.environments.continuous import RunningSessions
from components.environments.virtual_taobao import VirtualTaobao
from flows.benchmarks import Context, _continuous_speed
from flows.benchmarks._continuous_speed import OneUser
from flows.benchmarks._timing import rate_figures


def context(path: Path) -> Context:
    return Context(quick=True, full=False, seeds=None, path=path, kept=path, shared=path)


def test_without_the_published_weights_all_figures_say_so(tmp_path: Path) -> None:
    figures = _continuous_speed.measure(context(tmp_path / "nowhere"))

    assert {"environment.original.ratio", "environment.floor.ratio", "ppo.ratio", "updates.sac.ratio"} <= set(figures)
    assert all("nowhere: no such folder" in str(figure.skipped) for figure in figures.values())
    assert all(figure.holds is None for figure in figures.values())


def test_a_ratio_below_its_target_is_a_miss() -> None:
    rates = {"ours": 30.0, "theirs": 20.0, "ratio": 1.5}

    assert rate_figures("part", rates, "steps", "peer", at_least=1.6)["part.ratio"].holds is False
    assert rate_figures("part", rates, "steps", "peer", at_least=1.5)["part.ratio"].holds is True


def test_the_original_form_is_the_same_simulator(tmp_path: Path) -> None:
    weights, n = write_random_weights(tmp_path), 3_000
    actions = 2.0 * torch.rand(n, 27, generator=torch.Generator().manual_seed(1)) - 1.0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        user = OneUser(weights)
        steps = [user.step(action) for action in actions.numpy()]
    sessions = RunningSessions(VirtualTaobao(weights), n // 10, torch.Generator().manual_seed(0))
    transitions = [sessions.step(actions[start : start + n // 10]) for start in range(0, n, n // 10)]
    # Beyond their first pages the sessions are at all of theirs, as the single one is.
    transitions += [sessions.step(actions[start : start + n // 10]) for start in range(0, n, n // 10)]

    rewards = torch.cat([step.rewards for step in transitions[10:]])
    left = torch.cat([step.ended for step in transitions[10:]]).float()

    clicks, leaving = np.array([step[1] for step in steps]), np.array([step[2] for step in steps], dtype=float)
    # Four standard errors of a difference of means, twice as large since a user's pages are alike.
    assert clicks.mean() == pytest.approx(float(rewards.mean()), abs=8 * clicks.std() * (2 / n) ** 0.5)
    assert leaving.mean() == pytest.approx(float(left.mean()), abs=8 * leaving.std() * (2 / n) ** 0.5)
    assert all(step[0].shape == (91,) for step in steps)
