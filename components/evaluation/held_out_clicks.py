"""What clicks cost that a model never saw: mean negative log-likelihood in nats, with an interval clustered by session.

    nats = Σ_s ℓ_s / Σ_s n_s,      standard error = √(Σ_s (ℓ_s − nats · n_s)²) / Σ_s n_s

ℓ_s is the loss of session s, n_s the number of its clicks: a ratio, since sessions differ in length.
"""

from dataclasses import dataclass

import numpy as np
import polars as pl
import torch

from components.interactions.batching import SessionReader
from components.world_model.user_model import UserModel


@dataclass(frozen=True)
class HeldOutNats:
    """Nats a click, and how well they are known."""

    nats: float
    standard_error: float
    n_clicks: int
    n_sessions: int


def held_out_nats(sessions: pl.DataFrame) -> HeldOutNats:
    """Mean loss of a click, from each session's sums in the columns `loss` and `n_clicks`."""
    losses, clicks = (sessions[name].cast(pl.Float64).to_numpy() for name in ("loss", "n_clicks"))
    total = float(clicks.sum())
    nats = float(losses.sum()) / total
    error = float(np.sqrt(np.square(losses - nats * clicks).sum())) / total
    return HeldOutNats(nats, error, round(total), int((clicks > 0).sum()))


def nats_gained(sessions: pl.DataFrame, reference: pl.DataFrame) -> HeldOutNats:
    """How much less clicks cost than under a reference, session by session: what both find hard cancels.

    Raises:
        ValueError: the two were not judged on the same clicks.
    """
    paired = sessions.join(reference, on="session_id", how="inner", suffix="_reference", validate="1:1")
    counted = paired.filter(pl.col("n_clicks") == pl.col("n_clicks_reference"))
    if not counted.height == sessions.height == reference.height:
        raise ValueError(f"{sessions.height} and {reference.height} sessions, {counted.height} with the same clicks")
    return held_out_nats(counted.with_columns(loss=pl.col("loss_reference") - pl.col("loss")))


@torch.inference_mode()
def session_losses(user_model: UserModel, reader: SessionReader, batch_sessions: int) -> pl.DataFrame:
    """Columns session_id, loss and n_clicks of all sessions with clicks; the softmax over a catalogue is exact."""
    user_model.eval()
    parts = []
    for table in reader.tables():
        for chunk in torch.argsort(table.lengths, stable=True).split(batch_sessions):
            losses, clicks = user_model.click_losses(table.batch(chunk))
            parts.append(
                pl.DataFrame(
                    {
                        "session_id": table.session_ids.gather(chunk.numpy()),
                        "loss": losses.double().sum(1).numpy(),
                        "n_clicks": clicks.double().sum(1).numpy(),
                    }
                )
            )
    return pl.concat(parts).filter(pl.col("n_clicks") > 0)
