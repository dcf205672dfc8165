"""How often do intervals hold the truth? Every estimator on logs drawn anew, in environments whose values are known.

Each member of the pool is released as far as the gate's ESS floor allows on logs of this size, judged on logs of its
own, and counted where the log has the floor, as the gate does. A second, stronger release shows what happens below it.
On the storefront, whose users read from the top, both are made and judged by the cascade's ratio too.
"""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from scipy import stats

from components.environments.rollout import rollout
from components.environments.true_value import true_one_request_value, true_session_value
from components.evaluation.direct_method import sample_slates
from components.evaluation.estimates import estimate
from components.evaluation.logged_policy import JudgedRequests, logged_requests
from components.evaluation.ncis import one_request_ncis
from components.evaluation.policy_value import About, Estimand, PolicyValue
from components.evaluation.weights import ess_floor
from components.interactions.batching import SessionBatch, SessionReader
from components.interactions.contract import RatioAssumption
from components.interactions.importers import obd
from components.interactions.vocabulary import Vocabulary
from components.policies.slate_policy import UniformPolicy
from flows.benchmarks import Budget, Context, Figure
from flows.benchmarks._figures import share_of
from flows.benchmarks._pool import Member, Pool, mdp_pool, storefront_pool
from flows.figures import ErrorPoint, bias_and_error
from flows.settings import REPOSITORY
from flows.stages import CROSS_CHECK, GATING

BUDGET = Budget(full=240, quick=5)
LOG_SESSIONS = {"storefront": 1_500, "mdp": 4_000}
#: Parts of a log from whose estimates bias and error are read against its size.
PARTS = (0.125, 0.25, 0.5, 1.0)
#: Steps of a release, furthest first.
STRENGTHS = tuple(np.round(np.geomspace(1.0, 0.05, 30), 3).tolist())
#: ESS over the floor that the release is chosen for, and how far below it the stronger one lies.
MARGIN, BELOW = 1.15, 0.3
TRUTH_SESSIONS = {"storefront": 40_000, "mdp": 100_000}
OPEN_BANDIT = REPOSITORY.parent / "shared" / "data" / "obd"
#: The ratios that are valid in each environment.
RATIOS = {
    "storefront": (RatioAssumption.FULL_SLATE, RatioAssumption.CASCADE),
    "mdp": (RatioAssumption.FULL_SLATE,),
}
#: What the names of estimates by the cascade's ratio end with.
CASCADE = ", cascade"
#: Estimators whose bias and error are drawn.
DRAWN = (GATING, CROSS_CHECK, "IS", "NCIS with cap 10", "PointNCIS")


@dataclass(frozen=True)
class RedrawnLog:
    """Sessions in memory that are read as a log's."""

    batch: SessionBatch

    def batches(self, size: int) -> Iterator[SessionBatch]:
        """All sessions, in their order."""
        for rows in torch.arange(len(self.batch.users)).split(size):
            yield self.batch.select(rows)


def redraw(pool: Pool, n_sessions: int, generator: torch.Generator) -> RedrawnLog:  # type: ignore[type-arg]
    """A new log of the pool's environment under its logging policy."""
    if pool.n_users:
        users = torch.randint(pool.n_users, (n_sessions,), generator=generator)
    else:
        users = torch.arange(n_sessions)
    return RedrawnLog(rollout(pool.environment, pool.behavior, users, generator, pool.max_steps))


def measure(context: Context) -> dict[str, Figure]:
    """Coverage, bias and error of every estimator in both environments."""
    n_members = context.seeds or (2 if context.quick else 20)
    n_logs = 5 if context.quick else 52
    figures: dict[str, Figure] = {}
    for name, make in (("storefront", storefront_pool), ("mdp", mdp_pool)):
        pool = make(context.shared / name, n_members)
        parts = [
            context.keep(f"{name}-{number}", partial(_judge_member, pool, member, number, n_logs))
            for number, member in enumerate(pool.members)
        ]
        total: dict[str, float] = defaultdict(float)
        for part in parts:
            for key, value in part.items():
                total[key] += value
        figures |= _figures(name, total)
        if not context.quick and context.seeds is None:
            drawn = bias_and_error(_curves(name, total), title=name)
            (REPOSITORY / "docs" / f"coverage-{name}.svg").write_text(drawn.file)
    return figures | open_bandit(context.path or OPEN_BANDIT)


def open_bandit(path: Path) -> dict[str, Figure]:
    """The uniform policy's click rate from the other policy's log, minus what it had in its own."""
    figures = {}
    for campaign in ("all", "men", "women"):
        unit = "clicks a request, uniform by bts minus uniform observed"
        target = "the interval holds 0"
        name = f"open_bandit.{campaign}.difference"
        if not path.is_dir():
            figures[name] = Figure(
                value=np.nan, unit=unit, target=target, skipped=f"no data at {path.name}: give --path"
            )
            continue
        with TemporaryDirectory() as scratch:
            logs = {
                policy: obd.import_log(
                    obd.Config(campaign=campaign, policy=policy), path, Path(scratch) / policy, "obd"
                )
                for policy in ("bts", "random")
            }
            reader = SessionReader(logs["bts"], Vocabulary.fit(logs["bts"]))
            uniform = UniformPolicy(slate_size=1)
            estimated = one_request_ncis(
                logged_requests(reader, uniform).requests, policy="uniform", ratio=RatioAssumption.FULL_SLATE
            )
            own = SessionReader(logs["random"], Vocabulary.fit(logs["random"]))
            observed = logged_requests(own, uniform).requests.rewards
        assert estimated.lower is not None and estimated.upper is not None
        difference = estimated.value - float(observed.mean())
        spread = 1.96 * float(observed.std(ddof=1)) / np.sqrt(len(observed))
        reach = float(np.hypot((estimated.upper - estimated.lower) / 2, spread))
        figures[name] = Figure(
            value=difference,
            interval=(difference - reach, difference + reach),
            unit=f"{unit} ({observed.mean():.4f}); ESS {estimated.effective_sample_size:.0f}",
            target=target,
            holds=abs(difference) <= reach,
        )
    return figures


def _curves(environment: str, total: dict[str, float]) -> dict[str, list[ErrorPoint]]:
    """Relative bias and root mean square error of the one-request estimators by the sessions of a log."""
    curves: dict[str, list[ErrorPoint]] = {}
    for name in DRAWN:
        for size in PARTS:
            key = f"gating.{name}.{size:g}"
            n = total[f"{key}.n"]
            if n:
                bias, square = total[f"{key}.error"] / n, total[f"{key}.square"] / n
                point = ErrorPoint(
                    round(size * LOG_SESSIONS[environment]),
                    bias,
                    np.sqrt(max(square - bias**2, 0.0) / n),
                    np.sqrt(square),
                )
                curves.setdefault(name, []).append(point)
    return curves


def _judge_member(pool: Pool, member: Member, number: int, n_logs: int) -> dict[str, float]:  # type: ignore[type-arg]
    """Sums over the logs of one member: hits, errors, widths."""
    generator = torch.Generator().manual_seed(10_000 + number)
    n_sessions = LOG_SESSIONS[pool.name]
    sums: dict[str, float] = defaultdict(float)
    probe = redraw(pool, 5 * n_sessions, generator)
    releases = product(RATIOS[pool.name], (("gating", MARGIN), ("below", BELOW)))
    for ratio, (place, share) in releases:
        _release(member, pool, probe, share, ratio)
        truths = _truths(pool, member, generator)
        for _ in range(n_logs if place == "gating" else n_logs // 4):
            log = redraw(pool, n_sessions, generator)
            for value, size in _estimates(pool, member, log, generator, ratio, with_model=place == "gating"):
                truth = truths[value.estimand]
                counted = place == "below" or value.effective_sample_size >= ess_floor(value.n_requests)
                key = f"{place}.{value.estimator}"
                error = (value.value - truth) / abs(truth)
                if size == 1.0 and counted and value.lower is not None and value.upper is not None:
                    sums[f"{key}.n"] += 1
                    sums[f"{key}.hits"] += float(value.lower <= truth <= value.upper)
                    sums[f"{key}.width"] += (value.upper - value.lower) / abs(truth)
                    sums[f"{key}.ess"] += value.effective_sample_size
                sums[f"{key}.{size:g}.n"] += 1
                sums[f"{key}.{size:g}.error"] += error
                sums[f"{key}.{size:g}.square"] += error**2
    return dict(sums)


def _release(
    member: Member,
    pool: Pool,  # type: ignore[type-arg]
    probe: RedrawnLog,
    share: float,
    ratio: RatioAssumption,
) -> None:
    """Set the strength to the largest whose expected ESS on a log is this share of the gate's floor."""

    def enough(strength: float) -> bool:
        member.set_strength(strength)
        requests = logged_requests(probe, member.policy, ratio).requests
        value = one_request_ncis(requests, policy="member", ratio=ratio)
        n = value.n_requests * LOG_SESSIONS[pool.name] / len(probe.batch.users)
        return value.effective_sample_size / value.n_requests * n >= share * ess_floor(round(n))

    # ESS falls as the strength grows.
    found = bisect_left(STRENGTHS, True, key=enough)
    member.set_strength(STRENGTHS[min(found, len(STRENGTHS) - 1)])


def _truths(pool: Pool, member: Member, generator: torch.Generator) -> dict[Estimand, float]:  # type: ignore[type-arg]
    n = max(pool.n_users, 1)
    users = torch.randint(n, (TRUTH_SESSIONS[pool.name],), generator=generator)
    arguments = (users, generator, pool.max_steps)
    one_request = true_one_request_value(pool.environment, pool.behavior, member.policy, *arguments).value
    session = true_session_value(pool.environment, member.policy, *arguments).value
    return {Estimand.ONE_REQUEST: one_request, Estimand.SESSION: session, Estimand.SESSION_AVERAGE: one_request}


def _estimates(
    pool: Pool,  # type: ignore[type-arg]
    member: Member,
    log: RedrawnLog,
    generator: torch.Generator,
    ratio: RatioAssumption,
    *,
    with_model: bool,
) -> Iterator[tuple[PolicyValue, float]]:
    """Every estimator on the log and on its first parts; by the cascade's ratio those that the gate reads."""
    whole = logged_requests(log, member.policy, ratio)
    slates = None
    if with_model:
        slates = sample_slates(log, member.policy, member.user_model, pool.environment.reward, generator, pool.behavior)
    about = About(policy="member", ratio=ratio)
    for size in PARTS:
        rows = whole.requests.session < size * len(log.batch.users)
        judged = JudgedRequests(
            whole.requests.take(rows),
            whole.in_whole_session[rows],
            whole.known[rows],
            whole.ends_known,
            None if slates is None else slates.take(rows),
        )
        for value in estimate([judged], judged.rewards, about).values:
            if ratio is RatioAssumption.FULL_SLATE:
                yield value, size
            elif value.estimator in (GATING, CROSS_CHECK):
                yield value.model_copy(update={"estimator": value.estimator + CASCADE}), size


def _figures(environment: str, total: dict[str, float]) -> dict[str, Figure]:
    gating = [GATING, CROSS_CHECK]
    if RatioAssumption.CASCADE in RATIOS[environment]:
        gating += [name + CASCADE for name in gating]
    figures = {
        f"{environment}.coverage.{name}": Figure(
            value=np.nan, unit="share of logs", target="0.95", holds=False, skipped="no log reached the ESS floor"
        )
        for name in gating
    }
    for place, title in (("gating", "coverage"), ("below", "coverage_below_floor")):
        names = sorted({key.split(".")[1] for key in total if key.startswith(f"{place}.") and key.endswith(".hits")})
        for name in names:
            n, hits = round(total[f"{place}.{name}.n"]), round(total[f"{place}.{name}.hits"])
            figure = share_of(hits, n, f"logs, mean ESS {total[f'{place}.{name}.ess'] / n:.0f}")
            if place == "gating" and name in gating:
                low, high = stats.binom.interval(0.95, n, 0.95)
                target = f"0.95 within the binomial interval ({low / n:.3f} to {high / n:.3f})"
                figure = figure.model_copy(update={"target": target, "holds": bool(low <= hits <= high)})
            figures[f"{environment}.{title}.{name}"] = figure
    return figures
