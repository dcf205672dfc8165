"""How well does the user model foresee which hotel of a displayed list is clicked? trivago's clickouts, by time.

Beside it stand conditional logits, P(click k) ∝ exp(p_k + a · [item k is the last one acted on]): display position
alone (a = 0), and with the last organic item, which is the last item that the user acted on before the clickout and
since the clickout before it. Their ridge penalty is tuned on the validation sessions.
"""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import polars as pl
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from components.errors import InputError
from components.evaluation.held_out_clicks import held_out_nats
from components.interactions.batching import SessionReader
from components.interactions.importers import trivago
from components.interactions.log_folder import open_log
from components.interactions.splits import TEST, TRAIN, VALIDATION, split_log
from components.interactions.vocabulary import Vocabulary
from flows.benchmarks import Budget, Context, Figure
from flows.benchmarks.sessions import fit_and_judge, mean_figure, record
from flows.config import LoopConfig
from flows.settings import REPOSITORY

BUDGET = Budget(full=90, quick=5)
DEFAULT_PATH = REPOSITORY.parent / "shared" / "data" / "trivago_2019"
CONFIG = LoopConfig(source=trivago.Config())
UNIT = "nats a clickout"
RIDGES = (1e-5, 1e-4, 1e-3, 1e-2)


def measure(context: Context) -> dict[str, Figure]:
    """Held-out nats of the clicked position."""
    path = context.path or DEFAULT_PATH
    if not path.is_dir():
        raise InputError(f"{path}: no such folder; give trivago's sessions.parquet with --path DIR")
    n_seeds = context.seeds or (1 if context.quick else 5)
    with TemporaryDirectory() as scratch:
        root = Path(scratch)
        log = trivago.import_log(trivago.Config(), path, root / "log", CONFIG.loop)
        split = root / "split"
        split_log(log, CONFIG.split, split, with_holdout=False)
        position, position_and_last = (judge_logit(split, with_last=with_last) for with_last in (False, True))
        by_seed = [
            context.keep(
                f"user-model-{seed}",
                lambda seed=seed: fit_and_judge(  # type: ignore[misc]
                    CONFIG.model_copy(update={"seed": seed}), split, position_and_last
                ),
            )
            for seed in range(n_seeds)
        ]
    return {
        "position.nats": mean_figure([record(held_out_nats(position))], UNIT),
        "position_and_last_item.nats": mean_figure([record(held_out_nats(position_and_last))], UNIT),
        "user_model.nats": mean_figure(by_seed, UNIT),
        "user_model.gain_over_position_and_last_item": mean_figure(by_seed, UNIT, "gain", "interval above 0"),
        "user_model.seeds": Figure(value=n_seeds, unit="seeds"),
        "held_out.clickouts": Figure(value=by_seed[0]["n_clicks"], unit="clickouts"),
        "held_out.sessions": Figure(value=by_seed[0]["n_sessions"], unit="sessions"),
    }


@dataclass(frozen=True)
class Clickouts:
    """Clickouts whose hotel is in their list."""

    session_ids: pl.Series
    clicked: Int[Tensor, " M"]
    """Clicked position."""
    shown: Bool[Tensor, "M K"]
    is_last: Float[Tensor, "M K"]
    """1 where the position holds the item acted on last since the clickout before."""

    @classmethod
    def read(cls, reader: SessionReader) -> "Clickouts":
        """All of a log."""
        (table,) = reader.tables()
        rows = table.rows
        slates, clicks, last = rows.slates[:, 0], rows.clicks[:, 0], rows.events[:, 0, -1:]
        known = clicks.sum(1) > 0
        sessions = np.repeat(np.arange(len(table)), table.lengths.numpy())
        return cls(
            session_ids=table.session_ids.gather(sessions).filter(pl.Series(known.numpy())),
            clicked=clicks[known].argmax(1),
            shown=slates[known] > 0,
            is_last=((slates == last) & (last > 0))[known].float(),
        )


def judge_logit(split: Path, *, with_last: bool) -> pl.DataFrame:
    """A conditional logit, tuned on validation: what the test sessions cost under it."""
    vocabulary = Vocabulary.fit(open_log(split / TRAIN))
    train, validation, test = (
        Clickouts.read(SessionReader(open_log(split / name), vocabulary)) for name in (TRAIN, VALIDATION, TEST)
    )
    fits = [_fit_logit(train, ridge, with_last=with_last) for ridge in RIDGES]
    best = min(fits, key=lambda weights: float(_losses(validation, weights).mean()))
    by_session = pl.DataFrame({"session_id": test.session_ids, "loss": _losses(test, best).double().numpy()}).group_by(
        "session_id", maintain_order=True
    )
    return by_session.agg(pl.col("loss").sum(), n_clicks=pl.len().cast(pl.Float64))


def _fit_logit(train: Clickouts, ridge: float, *, with_last: bool) -> Float[Tensor, " W"]:
    """Weights of the positions and of the last item, which stays 0 where it is not to count."""
    weights = torch.zeros(train.shown.shape[1] + 1, requires_grad=True)
    counts = torch.ones_like(weights)
    counts[-1] = float(with_last)
    optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = _losses(train, weights * counts).mean() + ridge * weights.square().sum()
        value.backward()
        return value.detach()

    optimizer.step(loss)
    return (weights * counts).detach()


def _losses(clickouts: Clickouts, weights: Float[Tensor, " W"]) -> Float[Tensor, " M"]:
    logits = weights[:-1] + weights[-1] * clickouts.is_last
    log_p = torch.where(clickouts.shown, logits, -torch.inf).log_softmax(1)
    return -log_p.gather(1, clickouts.clicked[:, None])[:, 0]
