"""Which items users turn to next: neighbours of each item by how often one follows the other in a session.

Of an item with more followers than are listed, those are listed that follow it more often than the first that is not.
"""

from dataclasses import dataclass

import numpy as np
import polars as pl
import torch
from jaxtyping import Float, Int
from torch import Tensor

from components.interactions.contract import Manifest
from components.interactions.log_folder import Log
from components.interactions.vocabulary import Vocabulary

N_NEIGHBORS = 20
PSEUDO_VISITS = 10.0


@dataclass(frozen=True)
class Covisitation:
    """The most frequent followers of every item."""

    neighbors: Int[Tensor, "V M"]
    """Item indices, most frequent first; 0 is padding."""
    weights: Float[Tensor, "V M"]
    """P(next item = neighbor | item), shrunk by ten pseudo-visits; a session counts once for each pair."""
    touches: Float[Tensor, " V"]
    """How often users turned to each item."""
    one_visit: Float[Tensor, " V"]
    """What one visit adds to a weight: who learns from the visits that were counted leaves out the one at hand."""
    unlisted: Float[Tensor, " V"]
    """Weight of the most frequent follower that is not listed: those that are listed weigh more."""


def touched_items(rows: pl.LazyFrame, manifest: Manifest) -> pl.LazyFrame:
    """Items that users turned to, in order: columns session_id, step, place, item_id.

    A request's organic events come before the clicks on its slate.
    """
    events = (
        rows.select("session_id", "step", item_id=pl.col("events").list.eval(pl.element().struct.field("item_id")))
        .explode("item_id")
        .with_columns(place=pl.lit(0))
    )
    frames = [events]
    if manifest.slate_size:
        frames.append(
            rows.select("session_id", "step", "slate", "clicked")
            .filter(pl.col("slate").list.len() == pl.col("clicked").list.len())
            .explode("slate", "clicked")
            .filter(pl.col("clicked"))
            .select("session_id", "step", item_id=pl.col("slate"))
            .with_columns(place=pl.lit(1))
        )
    return pl.concat([frame.select("session_id", "step", "place", "item_id") for frame in frames]).drop_nulls("item_id")


def count_covisitation(log: Log, vocabulary: Vocabulary) -> Covisitation:
    """Neighbours of each item, from consecutive touched items of the log's sessions."""
    touched = touched_items(log.scan(), log.manifest)
    counts = touched.group_by("item_id").len().collect()
    pairs = (
        touched.sort("session_id", "step", "place", maintain_order=True)
        .with_columns(next_id=pl.col("item_id").shift(-1).over("session_id"))
        .drop_nulls("next_id")
        .unique(["session_id", "item_id", "next_id"])
        .group_by("item_id", "next_id")
        .len()
        .with_columns(visits=pl.col("len").sum().over("item_id"))
        .sort(["item_id", "len", "next_id"], descending=[False, True, False])
        .with_columns(
            rank=pl.int_range(pl.len()).over("item_id"),
            unlisted=pl.col("len").sort(descending=True).slice(N_NEIGHBORS, 1).sum().over("item_id"),
        )
        .filter(pl.col("rank") < N_NEIGHBORS)
        .collect()
    )
    neighbors = np.zeros((vocabulary.size, N_NEIGHBORS), dtype=np.int64)
    weights = np.zeros((vocabulary.size, N_NEIGHBORS), dtype=np.float32)
    one_visit, unlisted = np.zeros((2, vocabulary.size), dtype=np.float32)
    items, visits = vocabulary.indices(pairs["item_id"]), pairs["visits"].to_numpy() + PSEUDO_VISITS
    one_visit[items] = 1.0 / visits
    unlisted[items] = pairs["unlisted"].to_numpy() / visits
    listed = (pairs["len"] > pairs["unlisted"]).to_numpy()
    place = items[listed], pairs["rank"].to_numpy()[listed]
    neighbors[place] = vocabulary.indices(pairs["next_id"])[listed]
    weights[place] = (pairs["len"].to_numpy() / visits)[listed]
    touches = np.zeros(vocabulary.size, dtype=np.float32)
    touches[vocabulary.indices(counts["item_id"])] = counts["len"].to_numpy()
    return Covisitation(*map(torch.from_numpy, (neighbors, weights, touches, one_visit, unlisted)))
