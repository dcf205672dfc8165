from pathlib import Path

import polars as pl
import pytest
import torch
from action_log import MANIFEST, Row, row, save
from pydantic import ValidationError

from components.errors import ContractError
from components.interactions.continuous_batches import actions_of, read_actions
from components.interactions.contract import Manifest, request_reward
from components.interactions.log_folder import Log


def test_rows_become_tensors_in_row_order(tmp_path: Path) -> None:
    log = save(
        tmp_path / "log",
        [
            [row(0, 1), row(0, 0, action=[0.5, 0.0], action_log_prob=0.25, context={"device": "phone", "hour": None})],
            [row(1, 0, context={"device": "watch", "hour": 1.0}, request_signals={"clicks": None, "seconds": None})],
        ],
    )

    first, second = read_actions(log)

    assert first.observations.tolist() == [[1.0, 0.0, 0.0], [0.0, 1.0, 7.0]]
    assert first.actions.tolist() == [[0.5, 0.0], [0.25, -1.0]]
    assert first.log_probs.tolist() == [0.25, -0.5]
    assert first.log_probs.dtype == torch.float64
    assert first.rewards.tolist() == [4.0, 4.0]
    assert first.steps.tolist() == [0, 1]
    assert first.ended.tolist() == [False, True]
    assert second.observations.tolist() == [[0.0, 0.0, 1.0]]
    assert second.reward_known.tolist() == [False]
    assert first.users[0] == second.users[0]
    assert first.sessions[0] != second.sessions[0]


def test_the_reward_counts_what_is_known() -> None:
    signals = [{"clicks": 3.0, "seconds": None}, {"clicks": None, "seconds": None}]
    rows = pl.DataFrame([row(0, step, request_signals=signals[step]) for step in range(2)], schema=MANIFEST.schema())

    assert rows.select(request_reward(MANIFEST)).to_series().to_list() == [3.0, None]


@pytest.mark.parametrize(
    ("changes", "seen"),
    [
        ({"action": [0.5]}, "action of 1 numbers; expected 2"),
        ({"action": None}, "action of None numbers; expected 2"),
        ({"action_log_prob": None}, "1 rows have no action_log_prob"),
    ],
)
def test_rows_that_are_no_actions_are_refused(changes: Row, seen: str) -> None:
    rows = pl.DataFrame([row(0, 0), row(0, 1, **changes)], schema=MANIFEST.schema())

    with pytest.raises(ContractError, match=seen):
        actions_of(rows, MANIFEST)


def test_a_log_of_slates_is_refused(storefront_log: Log) -> None:
    with pytest.raises(ContractError, match="expected a log of actions"):
        next(read_actions(storefront_log))


@pytest.mark.parametrize(
    "changes",
    [
        {"slate_size": 3},
        {"evidence": "slates"},
        {"evidence": "clicks"},
        {"reward": {"weights": {"clicked": 1.0}}},
        {"reward": {"weights": {"request.purchases": 1.0}}},
    ],
)
def test_a_manifest_has_actions_or_slates(changes: Row) -> None:
    with pytest.raises(ValidationError):
        Manifest.model_validate(MANIFEST.model_dump() | changes)


def test_manifests_of_slates_do_not_speak_of_actions(storefront_log: Log) -> None:
    assert "action_size" not in storefront_log.manifest.model_dump_json()
    assert Manifest.model_validate_json(MANIFEST.model_dump_json()) == MANIFEST
