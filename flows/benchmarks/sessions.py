"""How well does the user model foresee the next item of click sequences? Diginetica, or another folder of `sessions`.

Beside it stand popularity and a first-order Markov model, both interpolated and tuned on the same validation sessions:

    P(j | i) = w₁ · n(i → j) / n(i) + w₂ · n(j) / n + w₃ / V,      w by expectation maximisation

with weights of their own for items that were left about 1, 2, 4, 8, ... times. All are judged on the same held-out
sessions, over the whole catalogue; nothing is sampled.
"""

import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import polars as pl
from jaxtyping import Float, Int

from components.errors import InputError
from components.evaluation.held_out_clicks import HeldOutNats, held_out_nats, nats_gained, session_losses
from components.interactions.batching import SessionReader
from components.interactions.covisitation import touched_items
from components.interactions.importers import sessions
from components.interactions.log_folder import Log, open_log
from components.interactions.splits import TEST, TRAIN, VALIDATION, SplitConfig, split_log
from components.world_model.training import LikelihoodConfig
from components.world_model.user_model_folder import load_user_model
from flows import stages
from flows.benchmarks import Budget, Context, Figure
from flows.benchmarks._stages import silent
from flows.config import LoopConfig
from flows.settings import REPOSITORY

BUDGET = Budget(full=90, quick=5)
DEFAULT_PATH = REPOSITORY.parent / "shared" / "data" / "diginetica"
#: No holdout is needed without an A/B, and next items are many: most sessions can teach.
SPLIT = SplitConfig(validation_share=0.05, test_share=0.1)
CONFIG = LoopConfig(source=sessions.Config(), split=SPLIT)
UNIT = "nats a next item"
EM_STEPS = 50
#: Columns of the mixture's parts.
MARKOV, POPULARITY, CHANCE = range(3)


def measure(context: Context) -> dict[str, Figure]:
    """Held-out nats of the next item."""
    path = context.path or DEFAULT_PATH
    if not path.is_dir():
        raise InputError(f"{path}: no such folder; give one of diginetica's or yoochoose's sessions with --path DIR")
    config, n_seeds = CONFIG, context.seeds or 3
    if context.quick:
        brief = {"source": sessions.Config(max_sessions=20_000), "user_model": LikelihoodConfig(max_epochs=2)}
        config, n_seeds = config.model_copy(update=brief), context.seeds or 1
    with TemporaryDirectory() as scratch:
        root = Path(scratch)
        log = sessions.import_log(sessions.Config.model_validate(config.source), path, root / "log", config.loop)
        split = root / "split"
        split_log(log, config.split, split, with_holdout=False)
        popularity, markov = judge_baselines(split)
        by_seed = [
            context.keep(
                f"user-model-{seed}",
                lambda seed=seed: fit_and_judge(config.model_copy(update={"seed": seed}), split, markov),  # type: ignore[misc]
            )
            for seed in range(n_seeds)
        ]
    return {
        "popularity.nats": mean_figure([record(held_out_nats(popularity))], UNIT),
        "markov.nats": mean_figure([record(held_out_nats(markov))], UNIT),
        "user_model.nats": mean_figure(by_seed, UNIT),
        "user_model.gain_over_markov": mean_figure(by_seed, UNIT, "gain", "interval above 0"),
        "user_model.train_seconds": Figure(
            value=float(np.mean([result["cpu_seconds"] for result in by_seed])), unit="CPU-seconds a seed"
        ),
        "user_model.seeds": Figure(value=n_seeds, unit="seeds"),
        "held_out.next_items": Figure(value=by_seed[0]["n_clicks"], unit="next items"),
        "held_out.sessions": Figure(value=by_seed[0]["n_sessions"], unit="sessions"),
    }


def mean_figure(results: list[dict[str, float]], unit: str, name: str = "nats", target: str | None = None) -> Figure:
    """Mean over seeds; its interval holds chance between held-out sessions and, with several seeds, between them."""
    values = np.array([result[name] for result in results])
    mean, variance = float(values.mean()), float(np.mean([result[f"{name}_error"] ** 2 for result in results]))
    if len(values) > 1:
        variance += float(values.var(ddof=1)) / len(values)
    low, high = mean - 1.96 * variance**0.5, mean + 1.96 * variance**0.5
    return Figure(value=mean, interval=(low, high), unit=unit, target=target, holds=None if target is None else low > 0)


def fit_and_judge(config: LoopConfig, split: Path, reference: pl.DataFrame) -> dict[str, float]:
    """The loop's own stage, then the held-out sessions, beside a reference's losses on them."""
    with TemporaryDirectory() as scratch:
        started = time.process_time()
        stages.fit_user_model.compute(config, split=split, out=Path(scratch), progress=silent)
        seconds = time.process_time() - started
        stored = load_user_model(Path(scratch))
        reader = SessionReader(open_log(split / TEST), stored.vocabulary)
        losses = session_losses(stored.user_model, reader, 32)
    gain = nats_gained(losses, reference)
    return record(held_out_nats(losses)) | {
        "gain": gain.nats,
        "gain_error": gain.standard_error,
        "cpu_seconds": seconds,
    }


def record(result: HeldOutNats) -> dict[str, float]:
    """What is kept of a result."""
    return {
        "nats": result.nats,
        "nats_error": result.standard_error,
        "n_clicks": float(result.n_clicks),
        "n_sessions": float(result.n_sessions),
    }


def judge_baselines(split: Path) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Popularity and Markov, tuned on validation: what the test sessions cost under each."""
    train, validation, test = (transitions(open_log(split / name)) for name in (TRAIN, VALIDATION, TEST))
    n_items = open_log(split / TRAIN).items().height
    (tuning, groups), (judged, judged_groups) = (mixture_parts(part, train, n_items) for part in (validation, test))

    def losses(*columns: int) -> pl.DataFrame:
        weights = tune_weights(tuning[:, columns], groups)
        nats = -np.log((judged[:, columns] * weights[judged_groups]).sum(1))
        by_session = test.select("session_id", loss=pl.Series(nats)).group_by("session_id", maintain_order=True)
        return by_session.agg(pl.col("loss").sum(), n_clicks=pl.len().cast(pl.Float64))

    return losses(POPULARITY, CHANCE), losses(MARKOV, POPULARITY, CHANCE)


def transitions(log: Log) -> pl.DataFrame:
    """Consecutive items of sessions: columns session_id, item_id, next_id."""
    return (
        touched_items(log.scan(), log.manifest)
        .sort("session_id", "step", "place", maintain_order=True)
        .select("session_id", "item_id", next_id=pl.col("item_id").shift(-1).over("session_id"))
        .drop_nulls("next_id")
        .collect()
    )


def mixture_parts(
    judged: pl.DataFrame, train: pl.DataFrame, n_items: int
) -> tuple[Float[np.ndarray, "M 3"], Int[np.ndarray, " M"]]:
    """Probability of each transition by Markov, popularity and chance, and the group of its first item.

    The group is 0 for items that training never left, else 1 + the whole part of the binary logarithm of their visits.
    """
    pairs = train.group_by("item_id", "next_id").agg(n_pair=pl.len())
    visits = train.group_by("item_id").agg(n_item=pl.len())
    popularity = train.group_by("next_id").agg(n_next=pl.len())
    counts = (
        judged.join(pairs, on=["item_id", "next_id"], how="left", maintain_order="left")
        .join(visits, on="item_id", how="left", maintain_order="left")
        .join(popularity, on="next_id", how="left", maintain_order="left")
        .select(pl.col("n_pair", "n_item", "n_next").fill_null(0).cast(pl.Float64))
    )
    pair, item, following = counts.to_numpy().T
    chance = np.full(len(item), 1.0 / n_items)
    groups = np.where(item > 0, 1 + np.floor(np.log2(np.maximum(item, 1.0))), 0).astype(np.int64)
    return np.stack([pair / np.maximum(item, 1.0), following / train.height, chance], axis=1), groups


def tune_weights(probabilities: Float[np.ndarray, "M P"], groups: Int[np.ndarray, " M"]) -> Float[np.ndarray, "G P"]:
    """Mixture weights of each group with the highest likelihood, by expectation maximisation."""
    members = np.eye(32)[groups]
    weights = np.full((32, probabilities.shape[1]), 1.0 / probabilities.shape[1])
    for _ in range(EM_STEPS):
        shares = probabilities * weights[groups]
        shares /= shares.sum(1, keepdims=True)
        # One imagined transition of every part: no weight becomes exactly 0.
        weights = members.T @ shares + 1.0 / probabilities.shape[1]
        weights /= weights.sum(1, keepdims=True)
    return weights
