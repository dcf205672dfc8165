"""How often does monitoring cry wolf, and how soon does it see a shift? Weeks of a simulated shop, drawn from pools.

A member of the pool serves the shop. Its sessions are simulated once for every state of the shop; a week draws its
sessions from them with replacement, so in a stable week nothing moves by construction. Sessions arrive by chance, 2,000
a day with a rush hour. A member's first seven days end a day before a week of looks at the last 24 hours, so that no
window reaches into them, as it is from a champion's second week on. Each look has all tests of a real one.

    taste      segments' tastes turn by a share of half a circle
    items      the retrieval stage prefers a category
    context    more sessions of one segment
    policy     the champion's tag serves with weaker weights than the champion's
    volume     a share of the sessions stays away
    delay      feedback comes later by a factor; what comes after 30 minutes does not count

A shift begins with the week. A week is looked at every four hours until the first alarm.
"""

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import polars as pl
import torch
from jaxtyping import Float, Int
from torch import Tensor

from components.environments.rollout import log_rows, rollout
from components.environments.storefront import (
    CATEGORIES,
    FEEDBACK_DELAY,
    FIRST_DAY,
    MAX_STEPS,
    REQUEST_GAP,
    Config,
    Storefront,
)
from components.interactions.importers import interaction_log
from components.interactions.log import Heard, InteractionLog, Recommended
from components.interactions.log_folder import Log, write_log
from components.interactions.traffic import first_feedback
from components.interactions.vocabulary import FIRST_ITEM, Vocabulary
from components.policies.policy_folder import PolicyDescription, StoredPolicy, load_policy, save_policy, shape_of
from components.policies.ranking_policy import NeuralSlatePolicy
from components.world_model.user_model_folder import StoredUserModel, load_user_model, save_user_model
from flows.benchmarks import Budget, Context, Figure, figures_table
from flows.benchmarks._figures import share_of
from flows.benchmarks._pool import Member, storefront_pool
from monitoring.alarm_budget import look_level
from monitoring.drift_tests import Sample, Volume
from monitoring.traffic_watch import (
    BROUGHT,
    DELAY,
    EFFECTIVE,
    ENTROPY,
    NATS,
    Models,
    Span,
    Traffic,
    Watch,
    WatchConfig,
    compare_volume,
    judge,
    read_traffic,
)

BUDGET = Budget(full=40, quick=5)
#: What its results depend on beside the library.
SOURCES = ("monitoring",)
NAME = "champion"
#: Names of the loop, of its database and of its item table, where a look at a million requests is measured.
LOOP, DATABASE, ITEMS = "shop", "log.sqlite", "items.parquet"
WATCH = WatchConfig(asked_requests=1_000_000)
SESSIONS_A_DAY = 2_000
FIRST_DAYS, WEEK_HOURS, WINDOW_HOURS = 7, 168, 24
#: Hours between looks.
EVERY = 4
#: Days of arrivals before the week, for the volume.
HISTORY_DAYS = 14
#: Sessions of the log that the champion is taken to have learned from, as a drift reference holds them.
REFERENCE_SESSIONS = 5_000
DELAY_SECONDS = 300.0
ATTRIBUTION_SECONDS = 1_800.0
#: Sizes of each kind of shift, small to large; what they are of is said above.
SIZES: dict[str, tuple[float, float, float]] = {
    "taste": (0.1, 0.25, 0.5),
    "items": (0.01, 0.025, 0.05),
    "context": (1.25, 1.5, 2.0),
    "policy": (0.9, 0.75, 0.5),
    "volume": (0.1, 0.2, 0.4),
    "delay": (1.1, 1.25, 2.0),
}
#: The kinds in words, for the table.
SHIFTS = {
    "taste": "tastes turn, share of half a circle",
    "items": "retrieval prefers a category, added to its scores of 0 to 1",
    "context": "sessions of one segment, times as many",
    "policy": "the champion's strength, 1 as released",
    "volume": "share of the sessions that stay away",
    "delay": "time until feedback, times as long",
}
N_STABLE, N_SHIFTED = 200, 50
LARGE_REQUESTS = 1_000_000
_MODELS = (ENTROPY, EFFECTIVE, NATS)


def measure(context: Context) -> dict[str, Figure]:
    """False alarms of stable weeks, detections of shifted ones, and what a look at a million requests costs."""
    n_stable, n_shifted = (20, 4) if context.quick else (N_STABLE, N_SHIFTED)
    world = _World(storefront_pool(context.shared / "storefront", 1).members[0], 8_000 if context.quick else 12_000)
    stable = [context.keep(f"stable-{number}", partial(world.week, number)) for number in range(n_stable)]
    shifted = {
        (kind, size): [
            context.keep(f"{kind}-{size:g}-{number}", partial(world.week, number, kind, size))
            for number in range(n_shifted)
        ]
        for kind, sizes in SIZES.items()
        for size in sizes
    }
    large = context.keep("large", partial(world.large, 100_000 if context.quick else LARGE_REQUESTS))
    return _figures(stable, shifted, large)


class _Assortment(Storefront):
    """The shop with a retrieval stage that prefers a category."""

    def __init__(self, config: Config, preference: float) -> None:
        super().__init__(config)
        self._bonus = preference * (self.category == CATEGORIES.index("category-0"))

    def _draw_candidates(self, n: int, generator: torch.Generator) -> Int[Tensor, "B N"]:
        noise = torch.rand(n, self.config.n_items, generator=generator) + self._bonus
        return noise.topk(self.config.n_candidates, dim=1).indices + FIRST_ITEM


@dataclass(frozen=True)
class _Pool:
    """Sessions of one state of the shop, as what is watched of them."""

    requests: Sample
    starts: Int[np.ndarray, " S"]
    lengths: Int[np.ndarray, " S"]
    segments: Int[np.ndarray, " S"]


class _World:
    """The shop with its champion, and a pool of sessions for each of its states."""

    def __init__(self, member: Member, n_sessions: int) -> None:
        assert isinstance(member.policy, NeuralSlatePolicy)
        self._member, self._n_sessions = member, n_sessions
        self._config = Config()
        self._pools: dict[tuple[str, float], _Pool] = {}
        with TemporaryDirectory() as scratch:
            vocabulary = Vocabulary.fit(self._log(Storefront(self._config), 4_000, Path(scratch) / "log", 1))
        description = PolicyDescription(name=NAME, loop="shop", shape=shape_of(member.policy), vocabulary=vocabulary)
        self._models = Models(
            StoredPolicy(description, member.policy),
            StoredUserModel(member.user_model, vocabulary),
            Storefront(self._config).items(),
        )

    def _log(self, shop: Storefront, n_sessions: int, out: Path, seed: int) -> Log:
        """A log of the champion's sessions, in parts that are simulated one by one."""
        assert isinstance(self._member.policy, NeuralSlatePolicy)
        policy = self._member.policy

        def part(number: int, n: int) -> pl.DataFrame:
            generator = torch.Generator().manual_seed(1_000 * seed + number)
            users = torch.randint(shop.n_users, (n,), generator=generator)
            rows = log_rows(
                rollout(shop, policy, users, generator, MAX_STEPS), manifest=shop.manifest(LOOP),
                item_ids=shop.item_ids, user_ids=shop.user_ids,
                started=pl.Series([FIRST_DAY + timedelta(seconds=14 * 86_400 * place / n) for place in range(n)]),
                request_gap=REQUEST_GAP, feedback_delay=FEEDBACK_DELAY, policy=NAME,
            )  # fmt: skip
            named = pl.lit(f"{number:04d}-")
            return rows.with_columns(session_id=named + pl.col("session_id"), request_id=named + pl.col("request_id"))

        sizes = [min(20_000, n_sessions - start) for start in range(0, n_sessions, 20_000)]
        return write_log(out, shop.manifest(LOOP), (part(*sized) for sized in enumerate(sizes)), shop.items())

    def pool(self, kind: str, size: float) -> _Pool:
        """The sessions of a state; shifts of arrival, context and delay are the stable shop's own."""
        key = (kind, size) if kind in ("taste", "items", "policy") else ("stable", 0.0)
        if key not in self._pools:
            self._pools[key] = self._simulate(*key)
        return self._pools[key]

    def _simulate(self, kind: str, size: float) -> _Pool:
        shop = Storefront(self._config.model_copy(update={"taste_shift": size if kind == "taste" else 0.0}))
        if kind == "items":
            shop = _Assortment(self._config, size)
        self._member.set_strength(size if kind == "policy" else 1.0)
        with TemporaryDirectory() as scratch:
            # Of its own whatever came before it: a benchmark that goes on where it stopped draws the same.
            seed = int(np.random.default_rng([*kind.encode(), round(1_000 * size)]).integers(2, 2**31))
            log = self._log(shop, self._n_sessions, Path(scratch) / "log", seed)
            # The champion that is asked is the one that was released.
            self._member.set_strength(1.0)
            span = Span(NAME, FIRST_DAY, FIRST_DAY + timedelta(days=400), FIRST_DAY, WATCH.window)
            traffic = read_traffic(log, self._models, span, WATCH)
        columns = {**traffic.requests.columns, **traffic.asked.columns}
        starts = np.flatnonzero(columns["step"] == 0)
        segments = columns["context.segment"][starts]
        return _Pool(
            replace(traffic.requests, columns=columns),
            starts,
            np.diff(np.append(starts, traffic.n_requests)),
            np.unique(segments.astype(str), return_inverse=True)[1],
        )

    def week(self, number: int, kind: str = "stable", size: float = 0.0) -> dict[str, float]:
        """Looks at one week, until the first alarm: how many hours it took, or infinity, and which panel rang."""
        chance = np.random.default_rng([number, *kind.encode(), round(1_000 * size)])
        before = _draw(self.pool("stable", 0.0), chance, HISTORY_DAYS * 24)
        week = _draw(self.pool(kind, size), chance, WEEK_HOURS, kind, size)
        day = before.hour // 24 - HISTORY_DAYS
        first_days = before.requests_of((day >= -1 - FIRST_DAYS) & (day < -1), WINDOW_HOURS)
        third = first_days.take(first_days.user % 3 == 0)
        watch = Watch(Traffic(_without(first_days, _MODELS), _only(third, _MODELS)), self._reference(chance))
        arrivals = before.then(week, HISTORY_DAYS * 24)
        previous = None
        for hour in range(EVERY, WEEK_HOURS + 1, EVERY):
            at = FIRST_DAY + timedelta(hours=hour)
            end = HISTORY_DAYS * 24 + hour
            now = arrivals.requests_of((arrivals.hour >= end - WINDOW_HOURS) & (arrivals.hour < end), WINDOW_HOURS)
            columns = watch.compare(Traffic(_without(now, _MODELS), _only(now, _MODELS)))
            columns += compare_volume(*arrivals.volumes(end))
            level = look_level(WATCH.weekly_false_alarms, FIRST_DAY, previous, at - timedelta(microseconds=1))
            previous = at
            judged = judge(columns, level, WATCH.floor)
            if judged[0].moved:
                rang = {f"panel.{column.panel}": 1.0 for column in judged if column.moved}
                return {"hours": float(hour), "tests": float(len(judged)), **rang}
        return {"hours": float("inf"), "tests": float(len(judged))}

    def _reference(self, chance: np.random.Generator) -> Sample:
        """What users brought with them in sessions of the stable shop."""
        pool = self.pool("stable", 0.0)
        first = pool.requests.take(pool.starts[chance.choice(len(pool.starts), REFERENCE_SESSIONS)])
        brought = {
            name: values for name, values in first.columns.items() if name in BROUGHT or name.startswith("context.")
        }
        return replace(first, columns=brought)

    def large(self, n_requests: int) -> dict[str, float]:
        """Seconds and peak memory (GB) of a look at a database of so many requests, in a process of its own."""
        pool = self.pool("stable", 0.0)
        n_sessions = round(n_requests / float(pool.lengths.mean()))
        with TemporaryDirectory() as scratch:
            root = Path(scratch)
            shop = Storefront(self._config)
            _write_database(self._log(shop, n_sessions, root / "simulated", 1), root / DATABASE)
            shop.items().write_parquet(root / ITEMS)
            for name in ("policy", "users"):
                (root / name).mkdir()
            save_policy(self._models.policy, root / "policy")
            assert self._models.user_model is not None
            save_user_model(self._models.user_model, root / "users")
            done = subprocess.run(
                [sys.executable, "-m", "flows.benchmarks.drift", str(root)],
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
        seen: dict[str, float] = json.loads(done.stdout)
        return seen


@dataclass(frozen=True)
class _Arrivals:
    """Sessions with the hour at which each began."""

    pools: tuple[_Pool, ...]
    which: Int[np.ndarray, " A"]
    """Place of its pool."""
    session: Int[np.ndarray, " A"]
    hour: Float[np.ndarray, " A"]
    late: Float[np.ndarray, " A"]
    """Factor on the time until feedback."""
    seed: int

    def then(self, later: "_Arrivals", hours: int) -> "_Arrivals":
        """Both, the later ones so many hours on."""
        return _Arrivals(
            (*self.pools, *later.pools),
            np.concatenate([self.which, later.which + len(self.pools)]),
            np.concatenate([self.session, later.session]),
            np.concatenate([self.hour, later.hour + hours]),
            np.concatenate([self.late, later.late]),
            self.seed,
        )

    def requests_of(self, chosen: np.ndarray, window: int) -> Sample:
        """The requests of some sessions, with delays of their own."""
        parts = []
        for place, pool in enumerate(self.pools):
            mine = np.flatnonzero(chosen & (self.which == place))
            if not len(mine):
                continue
            lengths = pool.lengths[self.session[mine]]
            within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
            sample = pool.requests.take(np.repeat(pool.starts[self.session[mine]], lengths) + within)
            # A session's delays are its own, whichever look sees it.
            draws = np.repeat(mine.astype(np.uint64), lengths) * np.uint64(64) + within.astype(np.uint64)
            seconds = DELAY_SECONDS * np.repeat(self.late[mine], lengths) * _exponential(draws, self.seed)
            seconds = np.where(seconds <= ATTRIBUTION_SECONDS, seconds, np.nan).astype(np.float32)
            windows = np.repeat((self.hour[mine] // window).astype(np.int64), lengths)
            parts.append(Sample(sample.user, windows, {**sample.columns, DELAY: seconds}))
        if len(parts) == 1:
            return parts[0]
        return Sample(
            np.concatenate([part.user for part in parts]),
            np.concatenate([part.window for part in parts]),
            {name: np.concatenate([part.columns[name] for part in parts]) for name in parts[0].columns},
        )

    @cached_property
    def _sizes(self) -> tuple[Int[np.ndarray, " A"], Int[np.ndarray, " A"]]:
        """Requests of each session, and the place of its user."""
        lengths, users = np.zeros((2, len(self.hour)), dtype=np.int64)
        for place, pool in enumerate(self.pools):
            mine = self.which == place
            lengths[mine] = pool.lengths[self.session[mine]]
            users[mine] = pool.requests.user[pool.starts[self.session[mine]]]
        return lengths, np.unique(users, return_inverse=True)[1]

    def volumes(self, end: int) -> tuple[list[Volume], Volume]:
        """Requests of the windows before the last one, and of that."""
        lengths, users = self._sizes
        window = np.floor((self.hour - end) / WINDOW_HOURS).astype(np.int64)
        found = []
        for number in range(-HISTORY_DAYS, 0):
            mine = window == number
            per_user = np.bincount(users[mine], lengths[mine])
            found.append(Volume(int(per_user.sum()), int(np.square(per_user).sum())))
        return found[:-1], found[-1]


def _exponential(draws: np.ndarray, seed: int) -> np.ndarray:
    """Standard exponential numbers, a pure function of what they are for (a splitmix64 step)."""
    with np.errstate(over="ignore"):
        mixed = draws + np.uint64(seed + 1) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed = mixed ^ (mixed >> np.uint64(31))
    return -np.log1p(-(mixed >> np.uint64(11)).astype(np.float64) / 2.0**53)


def _draw(pool: _Pool, chance: np.random.Generator, hours: int, kind: str = "stable", size: float = 0.0) -> _Arrivals:
    """So many hours of sessions, more of them in the evening."""
    rate = SESSIONS_A_DAY / 24 * (1 + 0.5 * np.sin(2 * np.pi * np.arange(hours) / 24))
    counts = chance.poisson(rate * (1 - size if kind == "volume" else 1.0))
    weights = np.where(pool.segments == 0, size, 1.0) if kind == "context" else np.ones(len(pool.starts))
    session = chance.choice(len(pool.starts), size=counts.sum(), p=weights / weights.sum())
    hour = np.repeat(np.arange(hours), counts) + chance.random(counts.sum())
    late = np.full(len(session), size if kind == "delay" else 1.0)
    return _Arrivals((pool,), np.zeros_like(session), session, hour, late, int(chance.integers(2**31)))


def _without(sample: Sample, names: tuple[str, ...]) -> Sample:
    return replace(sample, columns={name: values for name, values in sample.columns.items() if name not in names})


def _only(sample: Sample, names: tuple[str, ...]) -> Sample:
    return replace(sample, columns={name: values for name, values in sample.columns.items() if name in names})


def _figures(
    stable: list[dict[str, float]], shifted: dict[tuple[str, float], list[dict[str, float]]], large: dict[str, float]
) -> dict[str, Figure]:
    stated = WATCH.weekly_false_alarms
    figures = {
        "stable.false_alarms": share_of(
            sum(np.isfinite(week["hours"]) for week in stable), len(stable), "stable weeks", f"at most {stated:g}",
            lambda value: value <= stated,
        ),
        "stable.tests": Figure(value=stable[0]["tests"], unit="tests of a look"),
    }  # fmt: skip
    for (kind, size), weeks in shifted.items():
        hours = np.array([week["hours"] for week in weeks])
        alarms = [week for week in weeks if np.isfinite(week["hours"])]
        key = f"{kind}.{size:g}"
        figures[f"{key}.detected"] = share_of(len(alarms), len(weeks), "shifted weeks")
        # A week without an alarm has waited for ever: the median is known where most weeks have one.
        if np.isfinite(median := float(np.median(hours))):
            figures[f"{key}.delay"] = Figure(value=median, unit="hours until the alarm, median of all weeks")
        for panel in sorted({name for week in alarms for name in week if name.startswith("panel.")}):
            figures[f"{key}.{panel}"] = share_of(sum(panel in week for week in alarms), len(alarms), "alarms")
    seconds, gigabytes = large["seconds"], large["gigabytes"]
    figures["look.seconds"] = Figure(
        value=seconds,
        unit=f"s to import {large['requests']:,.0f} requests from a database, read and compare them",
        target="at most 60",
        holds=seconds <= 60,
    )
    figures["look.importing"] = Figure(value=large["importing"], unit="s of them to import")
    figures["look.memory"] = Figure(value=gigabytes, unit="GB at the peak", target="at most 3", holds=gigabytes <= 3)
    return figures


def tables(figures: Mapping[str, Figure]) -> str:
    """The common table of what has a target, and one of the shifts: a row for each kind, a column for each size."""
    common = {name: figure for name, figure in figures.items() if name.partition(".")[0] not in SIZES}
    rows = [
        f"| {kind} | {SHIFTS[kind]} | " + " | ".join(_cell(figures, f"{kind}.{size:g}", f"{size:g}") for size in sizes)
        + f" | {_panels(figures, f'{kind}.{sizes[-1]:g}')} |"
        for kind, sizes in SIZES.items()
    ]  # fmt: skip
    head = "| shift | size | small | medium | large | panels that ring where it is large |"
    said = (
        "Shifts, by size: share of the weeks with an alarm within the week, and the median of the hours until it (none "
        "where most weeks had no alarm). Looks are four hours apart; each sees the last 24 hours."
    )
    return "\n".join([figures_table(common), "", said, "", head, "| --- " * 6 + "|", *rows])


def _cell(figures: Mapping[str, Figure], key: str, size: str) -> str:
    delay = figures.get(f"{key}.delay")
    return f"{size}: {figures[f'{key}.detected'].value:.0%}" + ("" if delay is None else f", {delay.value:.0f} h")


def _panels(figures: Mapping[str, Figure], key: str) -> str:
    """Panels that rang in at least a tenth of the alarms, the most frequent first."""
    before = f"{key}.panel."
    shares = {name.removeprefix(before): figures[name].value for name in figures if name.startswith(before)}
    ranked = sorted(shares, key=lambda panel: -shares[panel])
    return ", ".join(f"{panel} {shares[panel]:.0%}" for panel in ranked if shares[panel] >= 0.1)


def _write_database(log: Log, path: Path) -> None:
    """Put a log's rows where the endpoint would have."""
    database = InteractionLog(f"sqlite:///{path}")
    database.upgrade()
    for part in log.parts():
        for block in part.with_columns(pl.col("timestamp", "available_at").dt.timestamp("us")).iter_slices(5_000):
            rows = list(block.iter_rows(named=True))
            database.write([[_recommended(row)] for row in rows], [_heard(row) for row in rows])


def _recommended(row: Mapping[str, Any]) -> Recommended:
    return Recommended(
        request_id=row["request_id"], loop=LOOP, user_id=row["user_id"], session_id=row["session_id"],
        shown_at=row["timestamp"], candidates=tuple(row["candidates"]), catalog=False, slate=tuple(row["slate"]),
        log_probs=tuple(row["position_log_probs"]), events=(), context=row["context"], policy=NAME, arm="champion",
        experiment=1, question="",
    )  # fmt: skip


def _heard(row: Mapping[str, Any]) -> Heard:
    return Heard(
        request_id=row["request_id"], feedback_id="answer", received_at=row["available_at"],
        clicked=tuple(row["clicked"]), purchased=tuple(row["purchased"]), left=row["session_end"] == "left",
    )  # fmt: skip


def _look_at(root: Path) -> dict[str, float]:
    """Import a database, read and compare both halves of it, and say what it took."""
    import resource
    import time

    torch.set_num_threads(1)
    started = time.perf_counter()
    watch = WatchConfig()
    source = interaction_log.Config(items=root / ITEMS)
    log = interaction_log.import_log(source, root / DATABASE, root / "log", LOOP)
    imported = time.perf_counter() - started
    models = Models(load_policy(root / "policy"), load_user_model(root / "users"), log.items())
    middle = FIRST_DAY + timedelta(days=7)
    attribution = timedelta(minutes=source.attribution_minutes)

    def half(since: datetime) -> Traffic:
        until = since + timedelta(days=7)
        database = InteractionLog(f"sqlite:///{root / DATABASE}")
        feedback = first_feedback(database, LOOP, since, until, attribution)
        return read_traffic(log, models, Span(NAME, since, until, middle, watch.window), watch, feedback)

    now = half(middle)
    columns = Watch(half(FIRST_DAY), None).compare(now)
    judge(columns, watch.weekly_false_alarms, watch.floor)
    return {
        "requests": float(log.manifest.n_requests),
        "importing": imported,
        "seconds": time.perf_counter() - started,
        "gigabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
    }


if __name__ == "__main__":
    print(json.dumps(_look_at(Path(sys.argv[1]))))
