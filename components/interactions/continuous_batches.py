"""Logs of actions as tensors, part by part.

An observation is the context in the manifest's order: a categorical feature as one number for each of its values (all
0 where the value is none of them), a numeric one as it is (0 where it is unknown).

Shape letters: M requests, S numbers of an observation, A of an action.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import polars as pl
import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from components.errors import ContractError
from components.interactions.contract import ROW_ORDER, Feature, Manifest, request_reward
from components.interactions.log_folder import Log
from components.interactions.tensor_record import TensorRecord


@dataclass(frozen=True)
class LoggedActions(TensorRecord):
    """M requests of whole sessions, in row order."""

    observations: Float[Tensor, "M S"]
    actions: Float[Tensor, "M A"]
    log_probs: Float64[Tensor, " M"]
    """Log-density of each action under the policy that chose it."""
    rewards: Float64[Tensor, " M"]
    """0 where it is unknown."""
    reward_known: Bool[Tensor, " M"]
    users: Int[Tensor, " M"]
    sessions: Int[Tensor, " M"]
    steps: Int[Tensor, " M"]
    ended: Bool[Tensor, " M"]
    """Whether the user left after this request."""


def read_actions(log: Log) -> Iterator[LoggedActions]:
    """The log's requests, part by part; a user has the same code in every part.

    Raises:
        ContractError: the log has no actions, actions of other lengths or without log_probs, or a categorical feature
            whose values the manifest does not name.
    """
    require_actions(log)
    for path, part in zip(log.part_paths, log.parts(), strict=True):
        yield actions_of(part, log.manifest, str(path))


def observation_scale(log: Log) -> Float[Tensor, " S"]:
    """Largest size of each number of an observation in a log, or 1."""
    scale = torch.stack([part.observations.abs().amax(0) for part in read_actions(log)]).amax(0)
    return torch.where(scale > 0, scale, 1.0)


def numeric_columns(manifest: Manifest) -> list[int]:
    """Places of the numeric features among the numbers of an observation."""
    columns, place = [], 0
    for feature in manifest.context:
        if feature.kind == "numeric":
            columns.append(place)
        place += 1 if feature.kind == "numeric" else len(feature.values)
    return columns


def require_actions(log: Log) -> None:
    """Refuse a log that cannot be read as actions.

    Raises:
        ContractError: the log has no actions, or a categorical feature whose values the manifest does not name.
    """
    if not log.manifest.action_size:
        raise ContractError(f"{log.path}: action_size is 0, the log has slates or clicks; expected a log of actions")
    for feature in log.manifest.context:
        if feature.kind == "categorical" and not feature.values:
            raise ContractError(f"{log.path}: context.{feature.name}: its values are not named; expected a vocabulary")


def actions_of(part: pl.DataFrame, manifest: Manifest, where: str = "rows") -> LoggedActions:
    """Rows of whole sessions as tensors.

    Args:
        part: rows of the contract; they are put in row order.
        manifest: what the rows mean; of a log of actions.
        where: what the rows are called in errors.

    Raises:
        ContractError: an action has another length, or lacks its log_prob.
    """
    part = part.sort(ROW_ORDER)
    size, lengths = manifest.action_size, part["action"].list.len()
    if not (fits := (lengths == size).fill_null(False)).all():
        request = part.filter(~fits)[0]
        raise ContractError(
            f"{where}: request {request['request_id'][0]!r} has an action of {request['action'].list.len()[0]} "
            f"numbers; expected {size}. `slateloop validate` puts such rows aside"
        )
    if missing := part["action_log_prob"].null_count():
        raise ContractError(
            f"{where}: {missing} rows have no action_log_prob; `slateloop validate` puts such rows aside"
        )
    rewards = part.select(request_reward(manifest)).to_series()

    def tensor(values: pl.Series) -> Tensor:
        return torch.from_numpy(values.to_numpy(writable=True))

    return LoggedActions(
        observations=_observations(part, manifest),
        actions=tensor(part["action"].explode()).reshape(-1, size),
        log_probs=tensor(part["action_log_prob"]),
        rewards=tensor(rewards.fill_null(0.0)),
        reward_known=tensor(rewards.is_not_null()),
        users=tensor((part["user_id"].hash(0) // 2).cast(pl.Int64)),
        sessions=tensor((part["session_id"].hash(0) // 2).cast(pl.Int64)),
        steps=tensor(part["step"].cast(pl.Int64)),
        ended=tensor((part["session_end"] == "left").fill_null(False)),
    )


def _observations(part: pl.DataFrame, manifest: Manifest) -> Float[Tensor, "M S"]:
    columns = [_numbers(part["context"].struct.field(feature.name), feature) for feature in manifest.context]
    return torch.from_numpy(np.concatenate([*columns, np.zeros((part.height, 0), dtype=np.float32)], axis=1))


def _numbers(cells: pl.Series, feature: Feature) -> Float[np.ndarray, "M W"]:
    if feature.kind == "numeric":
        return cells.fill_null(0.0).cast(pl.Float32).to_numpy()[:, None]
    values = pl.Series(feature.values, dtype=pl.String)
    place = cells.replace_strict(values, range(len(values)), default=len(values), return_dtype=pl.Int64).to_numpy()
    return np.eye(len(values) + 1, dtype=np.float32)[place, :-1]
