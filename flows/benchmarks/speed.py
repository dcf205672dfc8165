"""How fast is what a loop waits for, beside a peer or the published layout, measured in turns in one process?

Machines are noisy and shared: rates are per CPU-second (user and system time of this process), each is the median of
several repeats, and a ratio is the median of the repeats' own ratios. Memory is the peak of the command's own process.

    intervals     NCIS with resampled ratios and by the delta method, beside obp's SNIPW bootstrap (extra `peers`)
    coverage      how often such intervals hold the truth; obp resamples values that were normalised once
    generation    a thousand users at once in the world model, and the same networks one session at a time
    training      the loop's batches, and IRecGAN's: lists padded to 120, every session to the longest of its batch
    continuous    Virtual Taobao and its agents beside the original and Stable-Baselines3 (`_continuous_speed.py`)
    large logs    validation of 1 M requests; 10 M imported, validated and evaluated by the command line
"""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import torch
from jaxtyping import Float
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional

from components.agents.reinforce import ReinforceConfig, train_reinforce
from components.environments import storefront
from components.environments.rollout import rollout
from components.evaluation.logged_requests import LoggedRequests
from components.evaluation.ncis import one_request_sums, one_request_value
from components.evaluation.ratio_sums import ratio_bootstrap
from components.evaluation.weights import default_cap
from components.interactions.batching import SessionBatch, SessionReader
from components.interactions.contract import RatioAssumption
from components.interactions.covisitation import count_covisitation
from components.interactions.log_folder import Log, open_log, write_log
from components.interactions.vocabulary import Vocabulary
from components.policies.policy_folder import PolicyDescription, StoredPolicy, save_policy, shape_of
from components.policies.ranking_policy import NeuralSlatePolicy
from components.policies.request_features import RequestFeatures
from components.policies.session_encoder import EncoderConfig, EncoderShape, SessionEncoder
from components.world_model.adversarial import discriminator_loss
from components.world_model.discriminator import Discriminator
from components.world_model.environment import WorldModel
from components.world_model.training import LikelihoodConfig, train_by_likelihood
from components.world_model.user_model import UserModel
from flows.benchmarks import Budget, Context, Figure, _continuous_speed
from flows.benchmarks._stages import silent
from flows.benchmarks._timing import cpu_seconds, in_turns, rate_figures

BUDGET = Budget(full=30, quick=2)
#: Hidden width of the networks that IRecGAN published.
PUBLISHED_WIDTH = 512
#: Items to which its code pads every list.
PUBLISHED_LIST = 120
BATCH_SESSIONS = 256
GENERATED_USERS, MAX_STEPS = 1_000, 20
NO_PEER = "obp is not installed; `pip install -e '.[peers]'` adds it"


def measure(context: Context) -> dict[str, Figure]:
    """Every figure; those of 10 M requests only where there is time."""
    kept = partial(_kept, context)
    figures = _large_log_figures(kept("large-log", _large_log)) if not context.quick else {}
    figures |= _validation_figures(kept("validation", _validation))
    # What was kept without the peer must not stand for a run with it.
    beside = "alone" if _snipw() is None else "beside-obp"
    figures |= _interval_figures(kept(f"intervals-{beside}", _intervals))
    figures |= _coverage_figures(kept("coverage", _coverage), n_logs=_n_logs(context.quick))
    for size in ("default", "wide"):
        rates = kept(f"generation-{size}", partial(_generation, _SIZES[size]))
        figures |= rate_figures(f"generation.{size}", rates, "clicks per CPU-second", "one at a time", 20.0)
    for part, compare in _TRAININGS.items():
        rates = kept(f"training-{part}", compare)
        figures |= rate_figures(f"training.{part}", rates, "sequences per CPU-second", "published layout", 3.0)
    return figures | _continuous_speed.measure(context)


def _n_logs(quick: bool) -> int:
    return 100 if quick else 400


def _kept(context: Context, part: str, compute: Callable[[bool], dict[str, float]]) -> dict[str, float]:
    return context.keep(part, partial(compute, context.quick))


# --- intervals


def _intervals(quick: bool) -> dict[str, float]:
    """CPU-milliseconds on 1 M requests in 100 k sessions, each of a user of its own: the dearest case."""
    n_requests, n_sessions, n_resamples, repeats = 1_000_000, 100_000, 1_000, 3 if quick else 7
    generator = np.random.default_rng(0)
    behavior, target = generator.uniform(0.1, 0.9, size=(2, n_requests))
    rewards = generator.normal(1.0, 0.5, n_requests)
    session = np.repeat(np.arange(n_sessions), n_requests // n_sessions)
    step = np.tile(np.arange(n_requests // n_sessions), n_sessions)
    log = LoggedRequests(rewards, np.log(behavior), np.log(target), session, session, step)
    cap = default_cap(n_requests)
    sums = one_request_sums(log, cap)

    def delta() -> object:
        return one_request_value(sums, policy="target", ratio=RatioAssumption.FULL_SLATE)

    def resampled() -> object:
        return ratio_bootstrap(one_request_sums(log, cap), generator, n_resamples=n_resamples)

    times: dict[str, list[float]] = {"delta": [cpu_seconds(delta) for _ in range(10 * repeats)], "ours": []}
    peer, n_peer_resamples = _snipw(), 50
    arguments = {
        "reward": rewards,
        "action": np.zeros(n_requests, dtype=np.int64),
        "pscore": behavior,
        "action_dist": np.stack([target, 1.0 - target], axis=1)[:, :, None],
    }
    for _ in range(repeats):
        ours = cpu_seconds(resampled) / n_resamples
        times["ours"].append(ours)
        if peer is not None:
            interval = partial(peer.estimate_interval, **arguments, n_bootstrap_samples=n_peer_resamples)
            # Without what the point estimate alone costs: the peer's resamples are taken by themselves.
            theirs = cpu_seconds(interval) - cpu_seconds(partial(peer.estimate_policy_value, **arguments))
            times.setdefault("obp", []).append(theirs / n_peer_resamples)
            times.setdefault("ratio", []).append(1e-3 * theirs / n_peer_resamples / ours)
    return {name: 1e3 * float(np.median(values)) for name, values in times.items()}


def _snipw() -> Any:
    """The self-normalised estimator of obp; None where the extra `peers` is not installed."""
    try:
        from obp.ope import SelfNormalizedInverseProbabilityWeighting
    except ImportError:
        return None
    return SelfNormalizedInverseProbabilityWeighting()


def _interval_figures(times: dict[str, float]) -> dict[str, Figure]:
    figures = {
        "interval.ours": Figure(value=times["ours"], unit="CPU-ms a resample, its share of the weights included"),
        "interval.delta_method": Figure(
            value=times["delta"],
            unit="CPU-ms beyond the weights, three intervals",
            target="under 1",
            holds=times["delta"] < 1.0,
        ),
    }
    target = "at least 10"
    if "ratio" not in times:
        return figures | {"interval.ratio": Figure(value=np.nan, unit="times", target=target, skipped=NO_PEER)}
    return figures | {
        "interval.obp": Figure(value=times["obp"], unit="CPU-ms a resample"),
        "interval.ratio": Figure(value=times["ratio"], unit="times", target=target, holds=times["ratio"] >= 10.0),
    }


# --- coverage

#: Three slates under the logging policy and under the one that is judged.
_BEHAVIOR, _TARGET = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.3, 0.5])
#: Mean reward of each slate with each kind of users, and how many requests these make on average.
_REWARDS, _REQUESTS = np.array([[1.0, 1.2, 1.4], [1.5, 1.4, 1.3]]), np.array([3.0, 7.0])
_LOGGED_USERS = 300


def _coverage(quick: bool) -> dict[str, float]:
    """Simulated logs with users of two kinds and of tastes of their own: which intervals hold the true value."""
    n_logs, n_resamples = _n_logs(quick), 300 if quick else 1_000
    truth = float(_REQUESTS @ (_REWARDS @ _TARGET) / _REQUESTS.sum())
    generator = np.random.default_rng(1)
    held = {"delta": 0, "resampled": 0, "normalized": 0}
    widths = []
    for _ in range(n_logs):
        log = _simulated_log(generator)
        sums = one_request_sums(log, default_cap(len(log.rewards)))
        value = one_request_value(sums, policy="target", ratio=RatioAssumption.FULL_SLATE)
        assert value.lower is not None and value.upper is not None
        resampled = ratio_bootstrap(sums, generator, n_resamples=n_resamples)
        weights = np.exp(log.log_ratios)
        low, high = normalized_bootstrap(weights * log.rewards / weights.mean(), n_resamples, generator)
        held["delta"] += value.lower <= truth <= value.upper
        held["resampled"] += resampled.lower <= truth <= resampled.upper
        held["normalized"] += low <= truth <= high
        widths.append((high - low) / (value.upper - value.lower))
    return {name: count / n_logs for name, count in held.items()} | {"widths": float(np.median(widths))}


def normalized_bootstrap(
    values: Float[np.ndarray, " M"], n_resamples: int, generator: np.random.Generator
) -> tuple[float, float]:
    """95 % bounds as obp and SCOPE-RL have them: resampled means of w r / mean(w), whose denominator stands still."""
    means = [generator.choice(values, size=len(values)).mean() for _ in range(n_resamples)]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def _simulated_log(generator: np.random.Generator) -> LoggedRequests:
    kind = generator.integers(2, size=_LOGGED_USERS)
    taste = generator.normal(0.0, 0.1, _LOGGED_USERS)
    user = np.repeat(np.arange(_LOGGED_USERS), 1 + generator.poisson(_REQUESTS[kind] - 1.0))
    slate = generator.choice(3, size=len(user), p=_BEHAVIOR)
    return LoggedRequests(
        rewards=_REWARDS[kind[user], slate] + taste[user] + generator.normal(0.0, 0.3, len(user)),
        behavior_log_probs=np.log(_BEHAVIOR[slate]),
        target_log_probs=np.log(_TARGET[slate]),
        user=user,
        session=user,
        step=np.zeros(len(user), dtype=np.int64),
    )


def _coverage_figures(shares: dict[str, float], n_logs: int) -> dict[str, Figure]:
    unit = f"share of {n_logs} logs"

    def coverage(share: float) -> Figure:
        interval = stats.binomtest(round(share * n_logs), n_logs).proportion_ci(method="wilson")
        bounds = (float(interval.low), float(interval.high))
        return Figure(
            value=share, interval=bounds, unit=unit, target="0.95 within", holds=bounds[0] <= 0.95 <= bounds[1]
        )

    return {
        "coverage.delta_method": coverage(shares["delta"]),
        "coverage.resampled_ratios": coverage(shares["resampled"]),
        "coverage.resampled_normalized": Figure(value=shares["normalized"], unit=f"{unit}, as obp resamples"),
        "coverage.width_of_normalized": Figure(value=shares["widths"], unit="times the delta method's"),
    }


# --- generation


_SIZES = {"default": EncoderConfig(), "wide": EncoderConfig(hidden_width=PUBLISHED_WIDTH)}


def _generation(size: EncoderConfig, quick: bool) -> dict[str, float]:
    """Clicks per CPU-second in the world model: all users at once, and one session after the other."""
    with TemporaryDirectory() as scratch:
        log = storefront.write_storefront_log(storefront.Config(n_sessions=2_000), "shop", Path(scratch) / "log")
        reader = SessionReader(log, Vocabulary.fit(log))
        world, policy = _world_model(reader, size)
    generator = torch.Generator().manual_seed(0)
    users = torch.randint(world.n_users, (GENERATED_USERS,), generator=generator)

    def clicks(chosen: Tensor) -> int:
        return int(rollout(world, policy, chosen, generator, MAX_STEPS).clicks.sum())

    def together() -> int:
        return clicks(users)

    def one_by_one() -> int:
        return sum(clicks(user) for user in users[: 40 if quick else 200].split(1))

    clicks(users[:10])
    return in_turns(together, one_by_one, repeats=3 if quick else 7)


def _world_model(reader: SessionReader, size: EncoderConfig) -> tuple[WorldModel, NeuralSlatePolicy]:
    """Untrained networks that click and leave about as often as the log's users do."""
    table, manifest = next(reader.tables()), reader.log.manifest
    model = _user_model(reader, size, manifest.slate_size).eval()
    leaves = model.leave[-1]
    assert isinstance(leaves, nn.Linear)
    nn.init.constant_(leaves.bias, float(torch.logit(1.0 / table.lengths.float().mean())))
    nn.init.constant_(model.encoder.click_item.bias, float(torch.logit(table.rows.clicks.mean())))
    counts = reader.vocabulary.counts()
    n_candidates = table.rows.candidates.shape[2]
    policy = NeuralSlatePolicy(RequestFeatures(model.encoder), manifest.slate_size)
    return WorldModel(model, table, manifest.reward, manifest.slate_size, n_candidates, counts), policy.eval()


def _user_model(reader: SessionReader, size: EncoderConfig, slate_size: int) -> UserModel:
    vocabulary = reader.vocabulary
    features = vocabulary.item_features(reader.log.items())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        shape = EncoderShape(
            n_indices=vocabulary.size,
            n_item_features=features.shape[1],
            n_context=vocabulary.context_width,
            config=size,
        )
        encoder = SessionEncoder(shape)
        encoder.know_items(features, count_covisitation(reader.log, vocabulary))
        return UserModel(encoder, slate_size, "per_position")


# --- training


_SHOWN = ("slates", "position_log_probs", "clicks", "purchases", "observed", "purchase_observed", "rewards")
_OFFERED = ("candidates",)


class PublishedLayout(SessionReader):
    """A log of one part as IRecGAN's code lays it out.

    Lists are padded to 120 items, and the networks run on to the longest session of a random batch. Beyond a session's
    end its last request is repeated, since our networks skip what a mask leaves out; the work is that of a padded one.
    """

    def __init__(self, log: Log, vocabulary: Vocabulary, lists: tuple[str, ...]) -> None:
        super().__init__(log, vocabulary)
        table = next(self.tables())
        padded = {
            name: functional.pad(value, (0, PUBLISHED_LIST - value.shape[2]))
            for name, value in table.rows.columns().items()
            if name in lists
        }
        self._kept = replace(table, rows=replace(table.rows, **padded))

    def samples(self, size: int, generator: torch.Generator, n_pieces: int = 1) -> Iterator[list[SessionBatch]]:
        """Random batches of whole sessions; none comes in pieces of like length."""
        for (batch,) in super().samples(size, generator):
            steps = torch.minimum(torch.arange(batch.mask.shape[1]), batch.lengths[:, None] - 1)
            rows = torch.arange(len(steps))[:, None]
            columns = batch.columns()
            yield [SessionBatch(**{name: v if name == "users" else v[rows, steps] for name, v in columns.items()})]


def _compare_layouts(
    lists: tuple[str, ...], prepare: Callable[[SessionReader, SessionReader], Callable[[], int]], quick: bool
) -> dict[str, float]:
    """Sequences per CPU-second of one training in both layouts.

    Args:
        lists: columns of lists that the published layout pads.
        prepare: from the training sessions and a handful of others, a function that trains and counts sequences.
        quick: two batches instead of eight.
    """
    with TemporaryDirectory() as scratch:

        def shop_log(name: str, n_sessions: int) -> Log:
            # Ten of twelve: lists about as long as those of the published runs (11).
            config = storefront.Config(n_sessions=n_sessions, slate_size=10)
            return storefront.write_storefront_log(config, "shop", Path(scratch) / name)

        train, few = shop_log("train", BATCH_SESSIONS * (2 if quick else 8)), shop_log("few", 16)
        vocabulary = Vocabulary.fit(train)
        layouts = (SessionReader, partial(PublishedLayout, lists=lists))
        ours, theirs = (prepare(layout(train, vocabulary), layout(few, vocabulary)) for layout in layouts)
        for layout in layouts:
            prepare(layout(few, vocabulary), layout(few, vocabulary))()
        return in_turns(ours, theirs, repeats=2 if quick else 3)


def _user_model_training(train: SessionReader, few: SessionReader) -> Callable[[], int]:
    table = next(train.tables())
    model = _user_model(train, _SIZES["wide"], table.rows.slates.shape[2])
    config = LikelihoodConfig(max_epochs=1, batch_sessions=BATCH_SESSIONS)
    counts, generator = train.vocabulary.counts(), torch.Generator().manual_seed(0)

    def learn() -> int:
        train_by_likelihood(model, train, few, config, counts, generator, silent)
        return len(table)

    return learn


def _policy_training(train: SessionReader, few: SessionReader) -> Callable[[], int]:
    world, policy = _world_model(train, _SIZES["wide"])
    n_batches = len(next(train.tables())) // BATCH_SESSIONS or 1
    # One generated request a step, as the environment wants at least one: the logged sessions are what is timed.
    config = ReinforceConfig(iterations=n_batches, sessions=1, max_steps=1, logged_sessions=BATCH_SESSIONS)

    def learn() -> int:
        train_reinforce(policy, world, torch.zeros(1, dtype=torch.long), train, config, 0, silent)
        return n_batches * BATCH_SESSIONS

    return learn


def _discriminator_training(train: SessionReader, few: SessionReader) -> Callable[[], int]:
    discriminator = Discriminator(_user_model(train, EncoderConfig(), 1).encoder, hidden=PUBLISHED_WIDTH)
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=1e-4)
    generator = torch.Generator().manual_seed(0)

    def learn() -> int:
        n_sequences = 0
        # Other logged sessions stand in for generated ones: what is compared is the layout.
        both = (train.samples(BATCH_SESSIONS, generator) for _ in range(2))
        for (real,), (generated,) in zip(*both, strict=True):
            optimizer.zero_grad()
            discriminator_loss(discriminator, real, generated).backward()
            optimizer.step()
            n_sequences += len(real.users) + len(generated.users)
        return n_sequences

    return learn


_TRAININGS = {
    "user_model": partial(_compare_layouts, _SHOWN, _user_model_training),
    "policy": partial(_compare_layouts, _OFFERED, _policy_training),
    "discriminator": partial(_compare_layouts, _SHOWN, _discriminator_training),
}


# --- large logs

#: About 100,000 requests: the size of an importer's parts.
_BLOCK = storefront.Config(n_sessions=28_500)
_MAPPING = """
[log]
file = "log.parquet"
evidence = "propensities"
responses = "per_position"
ratio_assumption = "cascade"

[columns]
{columns}

[context]
device = {{ column = "device", kind = "categorical" }}
segment = {{ column = "segment", kind = "categorical" }}

[items]
file = "items.parquet"
item_id = "item_id"

[items.features]
category = {{ column = "category", kind = "categorical" }}
price = {{ column = "price", kind = "numeric" }}
rating = {{ column = "rating", kind = "numeric" }}
"""
_MAPPED = (
    "request_id", "session_id", "user_id", "step", "timestamp", "available_at", "candidates", "slate",
    "slate_log_prob", "position_log_probs", "clicked", "purchased", "session_end",
)  # fmt: skip


def _validation(quick: bool) -> dict[str, float]:
    """`slateloop validate` on a log of 1 M requests."""
    with TemporaryDirectory() as scratch:
        root = Path(scratch)
        block = storefront.write_storefront_log(_BLOCK, "shop", root / "block")
        log = write_log(root / "log", block.manifest, _repeated(block, 10), block.items())
        return _command("validate", str(log.path)) | {"requests": float(log.manifest.n_requests)}


def _large_log(quick: bool) -> dict[str, float]:
    """A user's own table of 10 M requests from import to estimates, each command in a process of its own."""
    with TemporaryDirectory() as scratch:
        root = Path(scratch)
        block = storefront.write_storefront_log(_BLOCK, "shop", root / "block")
        _write_table(block, 100, root / "table")
        save_untrained_policy(block, root / "policy")
        usage = {
            "import": _command(
                "import", "--source", "table", "--path", str(root / "table"), "--out", str(root / "log")
            ),
            "validate": _command("validate", str(root / "log"), "--out", str(root / "checks")),
            "evaluate": _command("evaluate", "--policy", str(root / "policy"), "--log", str(root / "checks" / "log")),
        }
        n_requests = open_log(root / "checks" / "log").manifest.n_requests
    measured = {f"{command}.{name}": value for command, used in usage.items() for name, value in used.items()}
    return measured | {"requests": float(n_requests)}


def _repeated(block: Log, times: int) -> Iterator[pl.DataFrame]:
    """The block's rows again and again, each time as other sessions of other users."""
    (rows,) = block.parts()
    for number in range(times):
        names = ("session_id", "request_id", "user_id")
        yield rows.with_columns(pl.concat_str(pl.lit(f"{number:03d}-"), name).alias(name) for name in names)


def _write_table(block: Log, times: int, folder: Path) -> None:
    folder.mkdir()
    (folder / "mapping.toml").write_text(_MAPPING.format(columns="\n".join(f'{n} = "{n}"' for n in _MAPPED)))
    block.items().write_parquet(folder / "items.parquet")
    writer = None
    for part in _repeated(block, times):
        table = part.select(*_MAPPED, "context").unnest("context").to_arrow(compat_level=pl.CompatLevel.oldest())
        writer = writer or pq.ParquetWriter(folder / "log.parquet", table.schema, compression="zstd")
        writer.write_table(table)
    assert writer is not None
    writer.close()


def save_untrained_policy(log: Log, folder: Path) -> None:
    """Write a policy of the default size into a new folder, whose networks have learned nothing."""
    reader = SessionReader(log, Vocabulary.fit(log))
    _, policy = _world_model(reader, _SIZES["default"])
    description = PolicyDescription(name="untrained", loop="shop", shape=shape_of(policy), vocabulary=reader.vocabulary)
    folder.mkdir()
    save_policy(StoredPolicy(description, policy), folder)


#: Runs a command and prints its exit code, CPU-seconds and peak memory in KiB. A small process of its own does so: the
#: peak of a child counts what its parent held when it was started.
_MEASURED = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(code, used.ru_utime + used.ru_stime, used.ru_maxrss)
"""


def _command(*arguments: str) -> dict[str, float]:
    """Seconds, CPU-seconds and peak memory (GB) of one `slateloop` command."""
    started = time.monotonic()
    command = [sys.executable, "-m", "flows.command_line", *arguments]
    measured = subprocess.run(
        [sys.executable, "-c", _MEASURED, *command], stdout=subprocess.PIPE, text=True, check=True
    )
    code, cpu_seconds, kibibytes = map(float, measured.stdout.split())
    if code:
        raise RuntimeError(f"slateloop {' '.join(arguments)}: exit code {code:g}")
    return {
        "seconds": time.monotonic() - started,
        "cpu_seconds": cpu_seconds,
        "gigabytes": kibibytes * 1024 / 1e9,
    }


def _validation_figures(used: dict[str, float]) -> dict[str, Figure]:
    unit = f"seconds, {used['requests']:,.0f} requests"
    seconds = used["seconds"]
    return {
        "validation.seconds": Figure(value=seconds, unit=unit, target="within 20", holds=seconds <= 20.0),
        "validation.cpu_seconds": Figure(value=used["cpu_seconds"], unit="CPU-seconds"),
        "validation.memory": Figure(value=used["gigabytes"], unit="GB at the peak"),
    }


def _large_log_figures(used: dict[str, float]) -> dict[str, Figure]:
    figures = {"large_log.requests": Figure(value=used["requests"], unit="requests")}
    for command in ("import", "validate", "evaluate"):
        peak = used[f"{command}.gigabytes"]
        figures[f"large_log.{command}.memory"] = Figure(
            value=peak, unit="GB at the peak", target="within 3", holds=peak <= 3.0
        )
        figures[f"large_log.{command}.cpu_minutes"] = Figure(
            value=used[f"{command}.cpu_seconds"] / 60, unit="CPU-minutes"
        )
    return figures
