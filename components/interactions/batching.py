"""Logged requests as tensors: the one place where lists are padded and masks are made.

Shape letters: B sessions, T requests of a session, M requests, N candidates, K positions, E events, C context.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import polars as pl
import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from components.interactions.contract import Manifest, reward_per_position
from components.interactions.log_folder import Log
from components.interactions.tensor_record import TensorRecord
from components.interactions.vocabulary import PADDING, Vocabulary

#: Most recent organic events that are kept of one request.
MAX_EVENTS = 8


@dataclass(frozen=True)
class Requests(TensorRecord):
    """What a policy sees of one request of each of B users; the first dimension may also be B·T."""

    candidates: Int[Tensor, "B N"]
    """Items that may be shown; 0 is padding."""
    context: Float[Tensor, "B C"]
    events: Int[Tensor, "B E"]
    """Items of the organic events since the last request, latest in the last column; 0 is padding, before them."""
    truth: Float[Tensor, "B N"] | None = None
    """Expected reward of each candidate, filled in by simulators that are asked to; only oracles read it."""


@dataclass(frozen=True)
class SessionBatch(TensorRecord):
    """B sessions padded to T requests, logged or generated: the two cannot be told apart.

    Unknown feedback is 0 with its `observed` mask false. Everything beyond a session's end is 0 or false.
    """

    mask: Bool[Tensor, "B T"]
    users: Int[Tensor, " B"]
    """Code of each session's user: sessions of one user share it."""
    candidates: Int[Tensor, "B T N"]
    context: Float[Tensor, "B T C"]
    events: Int[Tensor, "B T E"]
    slates: Int[Tensor, "B T K"]
    log_probs: Float64[Tensor, "B T"]
    """Of the ordered slate under the policy that chose it; NaN where unknown."""
    clicks: Float[Tensor, "B T K"]
    purchases: Float[Tensor, "B T K"]
    observed: Bool[Tensor, "B T K"]
    """Positions whose click is known: shown, and not null; what was out of view is known not to be clicked."""
    purchase_observed: Bool[Tensor, "B T K"]
    rewards: Float[Tensor, "B T K"]
    reward_known: Bool[Tensor, "B T"]
    """Whether all feedback that the reward weighs is known; where it is not, unknown feedback counts as none."""
    left: Bool[Tensor, "B T"]
    """The user left after this request."""
    leave_observed: Bool[Tensor, "B T"]
    """Whether staying or leaving after this request is known: false at a censored end."""
    position_log_probs: Float64[Tensor, "B T K"] | None = None
    """Of each position given those above it, 0 where nothing was shown; NaN where unknown, None where all are."""

    def requests(self) -> Requests:
        """What the policy saw, with B and T as separate dimensions joined: B·T rows."""
        return Requests(self.candidates.flatten(0, 1), self.context.flatten(0, 1), self.events.flatten(0, 1))

    @property
    def rewarded(self) -> Bool[Tensor, " B"]:
        """Whether all rewards of each session are known."""
        return (self.reward_known | ~self.mask).all(1)

    @property
    def lengths(self) -> Int[Tensor, " B"]:
        """Requests of each session."""
        return self.mask.sum(1)

    def trim(self) -> "SessionBatch":
        """The batch without requests that are padding in every session."""
        return self.first_steps(int(self.lengths.max()) if len(self.users) else 0)

    def first_steps(self, n_steps: int) -> "SessionBatch":
        """The first requests of each session; ends that are cut off are unknown."""
        columns = {name: value if name == "users" else value[:, :n_steps] for name, value in self.columns().items()}
        return SessionBatch(**columns)

    def columns(self) -> dict[str, Tensor]:
        """Every column by its name; all but `users` have the dimensions B and T."""
        return {name: value for name, value in self._tensors().items() if value is not None}


@runtime_checkable
class Sessions(Protocol):
    """Sessions that can be read again and again in the same order: a log on disk, or one in memory."""

    def batches(self, size: int) -> Iterator[SessionBatch]:
        """All sessions, at most `size` of them at a time."""
        ...


@dataclass(frozen=True)
class SessionTable:
    """The sessions of one part of a log as flat tensors, one row a request; sessions are consecutive rows."""

    rows: SessionBatch
    """Every request as a session of its own: B = M, T = 1."""
    starts: Int[Tensor, " S"]
    lengths: Int[Tensor, " S"]
    user_ids: pl.Series
    """User of each session."""
    session_ids: pl.Series

    def __len__(self) -> int:
        return len(self.starts)

    def batch(self, sessions: Int[Tensor, " B"]) -> SessionBatch:
        """Some sessions, padded to the longest of them."""
        lengths = self.lengths[sessions]
        steps = torch.arange(int(lengths.max()))
        mask = steps[None, :] < lengths[:, None]
        index = torch.where(mask, self.starts[sessions][:, None] + steps[None, :], 0)
        columns = {}
        for name, value in self.rows.columns().items():
            if name == "users":
                columns[name] = value[index[:, 0]]
                continue
            gathered = value[:, 0][index]
            columns[name] = torch.where(
                mask.reshape(*mask.shape, *[1] * (gathered.dim() - 2)), gathered, torch.zeros((), dtype=gathered.dtype)
            )
        return SessionBatch(**(columns | {"mask": mask}))

    def batches(self, size: int) -> Iterator[SessionBatch]:
        """All sessions once, in batches of like length."""
        for chosen in self.lengths.argsort(stable=True).split(size):
            yield self.batch(chosen)

    def samples(self, size: int, generator: torch.Generator, n_pieces: int = 1) -> Iterator[list[SessionBatch]]:
        """All sessions once, in random samples: what a step learns from.

        Args:
            size: sessions of a sample.
            generator: of the order.
            n_pieces: batches of like length that each sample comes in; more of them hold less padding.
        """
        for chosen in torch.randperm(len(self), generator=generator).split(size):
            ordered = chosen[self.lengths[chosen].argsort(stable=True)]
            yield [self.batch(piece) for piece in ordered.tensor_split(n_pieces) if len(piece)]


class SessionReader:
    """Reads a log's parts as session tables; a log of one part is kept, a larger one is read anew each time."""

    #: Whether log_probs are a fitted estimate, not the log's own.
    propensities_estimated = False

    def __init__(self, log: Log, vocabulary: Vocabulary) -> None:
        self.log = log
        self.vocabulary = vocabulary
        self._candidates = log.candidate_table()
        self._kept: SessionTable | None = None

    @cached_property
    def knows_position_log_probs(self) -> bool:
        """Whether the log_prob of each position is known at every request."""
        if "position_log_probs" not in self.log.manifest.schema():
            return False
        known = pl.col("position_log_probs").is_not_null().all()
        return bool(self.log.scan().select(known).collect(engine="streaming").item())

    def tables(self) -> Iterator[SessionTable]:
        """The parts in order."""
        yield from map(self._table, self.log.part_paths)

    def _table(self, path: Path) -> SessionTable:
        if self._kept is not None:
            return self._kept
        table = self.read(pl.read_parquet(path))
        if len(self.log.part_paths) == 1:
            self._kept = table
        return table

    def sample(self, n_sessions: int, generator: torch.Generator) -> SessionTable:
        """So many whole sessions drawn at random from all parts; every session where the log holds no more.

        All session ids of the log are read; of the rows only those that are drawn.
        """
        rows = self.log.scan()
        ids = rows.select(pl.col("session_id").unique().sort()).collect().to_series()
        if len(ids) <= n_sessions and len(self.log.part_paths) == 1:
            return next(self.tables())
        chosen = ids.gather(torch.randperm(len(ids), generator=generator)[:n_sessions].numpy())
        frame = rows.join(chosen.to_frame().lazy(), on="session_id", how="semi").collect()
        return self.read(frame)

    def read(self, frame: pl.DataFrame) -> SessionTable:
        """Rows of the log, sessions whole, as a table."""
        return read_sessions(frame, self.log.manifest, self.vocabulary, self._candidates)

    def batches(self, size: int) -> Iterator[SessionBatch]:
        """All sessions once, in batches of like length."""
        for table in self.tables():
            yield from table.batches(size)

    def samples(self, size: int, generator: torch.Generator, n_pieces: int = 1) -> Iterator[list[SessionBatch]]:
        """All sessions once, in random samples of one part after the other, the parts in random order."""
        paths = self.log.part_paths
        for number in torch.randperm(len(paths), generator=generator).tolist():
            yield from self._table(paths[number]).samples(size, generator, n_pieces)


def read_sessions(
    frame: pl.DataFrame, manifest: Manifest, vocabulary: Vocabulary, candidate_table: pl.DataFrame
) -> SessionTable:
    """The requests of whole sessions as tensors.

    Args:
        frame: rows of the contract, sessions whole; they are put in row order.
        manifest: what the rows mean.
        vocabulary: turns ids and features into numbers.
        candidate_table: candidate lists that rows name by digest.
    """
    frame = frame.sort("session_id", "step")
    if candidate_table.height:
        written = frame.join(
            candidate_table, on="candidates_digest", how="left", suffix="_named", maintain_order="left"
        )
        frame = frame.with_columns(candidates=pl.coalesce(written["candidates"], written["candidates_named"]))
    n_requests = frame.height
    n_positions = manifest.slate_size
    slates = _indices(frame["slate"], n_positions, vocabulary)
    shown = slates != PADDING
    clicks, click_known = _responses(frame["clicked"], n_positions)
    purchases, purchase_known = _responses(frame["purchased"], n_positions)
    exposed, exposed_known = _responses(frame["exposed"], n_positions)
    unseen = shown & exposed_known & (exposed == 0)
    # Clicked or bought though out of view: nothing of it is believed.
    contradicted = unseen & ((click_known & (clicks > 0)) | (purchase_known & (purchases > 0)))
    click_known = shown & (click_known | unseen) & ~contradicted
    if manifest.responses == "choice":
        # That nothing was chosen is known only where no position is unknown.
        decided = (click_known & (clicks > 0)).any(1) | (click_known | ~shown).all(1)
        click_known = click_known & decided[:, None]
    clicks = clicks * click_known
    purchase_known = shown & ~unseen & purchase_known
    known = {"clicked": click_known, "purchased": purchase_known | (click_known & (clicks == 0))}
    reward_known = np.ones(n_requests, dtype=bool)
    for name in manifest.reward.weights:
        if name not in known:
            known[name] = (unseen & ~contradicted) | _responses(frame[f"signals.{name}"], n_positions)[1]
        reward_known &= (known[name] | ~shown).all(1)
    rewards, _ = _responses(frame.select(reward_per_position(manifest)).to_series(), n_positions)
    candidates_width = int(frame["candidates"].list.len().max() or 0)  # type: ignore[arg-type]
    # Latest first, so that padding comes before the events once the columns are turned; a search names no item.
    events = frame["events"].list.eval(pl.element().struct.field("item_id").drop_nulls()).list.reverse()
    context = frame.select("context").unnest("context") if manifest.context else pl.DataFrame({"": [0.0] * n_requests})
    ends = frame["session_end"]
    last = np.append(frame["session_id"].to_numpy()[1:] != frame["session_id"].to_numpy()[:-1], True)
    left = (ends == "left").fill_null(False).to_numpy()
    first = np.append(True, last[:-1])
    starts = np.flatnonzero(first)
    # A hash, so that a user has the same code in every part of a log.
    users = (frame["user_id"].hash(0) // 2).cast(pl.Int64).to_numpy(writable=True)
    log_probs = frame["slate_log_prob"].fill_null(float("nan")).to_numpy()
    position_log_probs = None
    if "position_log_probs" in frame.columns and frame["position_log_probs"].null_count() < n_requests:
        position_log_probs = _position_log_probs(frame["position_log_probs"], n_positions)

    def column(values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.array(values[:, None]))

    rows = SessionBatch(
        mask=torch.ones(n_requests, 1, dtype=torch.bool),
        users=torch.from_numpy(users),
        candidates=column(_indices(frame["candidates"], candidates_width, vocabulary)),
        context=column(vocabulary.encode_context(context)),
        events=column(_indices(events, MAX_EVENTS, vocabulary)[:, ::-1]),
        slates=column(slates),
        log_probs=column(log_probs),
        position_log_probs=None if position_log_probs is None else column(position_log_probs),
        clicks=column(clicks),
        purchases=column(purchases * purchase_known),
        observed=column(click_known),
        purchase_observed=column(purchase_known),
        rewards=column(rewards.astype(np.float32) * ~(unseen & ~contradicted)),
        reward_known=column(reward_known),
        left=column(left),
        leave_observed=column(~last | left),
    )
    return SessionTable(
        rows=rows,
        starts=torch.from_numpy(starts),
        lengths=torch.from_numpy(np.diff(np.append(starts, n_requests))),
        user_ids=frame["user_id"].gather(starts),
        session_ids=frame["session_id"].gather(starts),
    )


def _places(lists: pl.Series, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row and position of every element of M lists, and which elements lie within `width` positions."""
    lengths = lists.list.len().fill_null(0).to_numpy().astype(np.int64)
    rows = np.repeat(np.arange(len(lists)), lengths)
    positions = np.arange(len(rows)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return rows, positions, positions < width


def _elements(lists: pl.Series) -> pl.Series:
    return lists.filter(lists.list.len() > 0).explode() if len(lists) else lists


def _indices(lists: pl.Series, width: int, vocabulary: Vocabulary) -> Int[np.ndarray, "M width"]:
    """Padded item indices of M lists of item ids."""
    rows, positions, kept = _places(lists, width)
    padded = np.full((len(lists), width), PADDING, dtype=np.int32)
    padded[rows[kept], positions[kept]] = vocabulary.indices(_elements(lists))[kept]
    return padded


def _position_log_probs(lists: pl.Series, width: int) -> Float64[np.ndarray, "M width"]:
    """Padded log_probs of M lists, 0 beyond their ends; NaN where a list is null."""
    rows, positions, kept = _places(lists, width)
    values = np.where(lists.is_null().to_numpy()[:, None], np.nan, np.zeros(width))
    values[rows[kept], positions[kept]] = _elements(lists).to_numpy()[kept]
    return values


def _responses(lists: pl.Series, width: int) -> tuple[Float[np.ndarray, "M width"], Bool[np.ndarray, "M width"]]:
    """Padded numbers of M lists and which of them are known; unknown ones are 0."""
    rows, positions, kept = _places(lists, width)
    elements = _elements(lists)
    values = np.zeros((len(lists), width), dtype=np.float32)
    known = np.zeros((len(lists), width), dtype=bool)
    values[rows[kept], positions[kept]] = elements.cast(pl.Float64).fill_null(0.0).to_numpy()[kept]
    known[rows[kept], positions[kept]] = elements.is_not_null().to_numpy()[kept]
    return values, known
