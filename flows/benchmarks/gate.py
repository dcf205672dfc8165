"""How often is the gate wrong? 500 comparisons of each kind, with logs and A/Bs drawn anew from large populations.

Members of the pool, altered, ask to take the place of the policy that wrote the log:

    equal      random likings of items, and as much of what a member learned as makes its one-request value equal;
               in the A/B both arms are the logging policy
    worse      a member turned around until its sessions earn 20 % less
    better     a member released until its sessions earn 20 % more
    exploit    a policy that shows the items which its world model was made to overrate, by +1, +1.5 or +2 in the logit

Each has a population of sessions: logged ones with their weights, and its own in the shop. A comparison draws users of
both with replacement, so the population's value is the truth and equality holds exactly. A/Bs have the size that the
plan for a gain of 20 % and unharmed guardrails asks for; the reward alone is also judged at the size that finds such a
gain with 80 % probability. What does not depend on the draw (data checks, trust in the world model) is taken as
passed; log_probs are tested on the population. Comparisons of one challenger share its population and its truth.
"""

import copy
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import optimize, stats
from torch import Tensor

from components.environments.rollout import rollout
from components.evaluation.direct_method import SampledSlates, sample_slates
from components.evaluation.doubly_robust import doubly_robust
from components.evaluation.exploit_probes import compare_values, judge_exploit
from components.evaluation.logged_policy import logged_requests
from components.evaluation.logged_requests import LoggedRequests
from components.evaluation.ncis import one_request_ncis, one_request_sums
from components.evaluation.policy_value import About
from components.evaluation.propensity_check import batch_logits, check_propensities
from components.evaluation.support import SupportDistance, support_distance
from components.evaluation.weights import default_cap, ess_floor
from components.evaluation.world_model_trust import TrustConfig
from components.evaluation.world_model_value import ModelValue, model_value
from components.experiment.ab import AbResult, analyze_ab
from components.experiment.arm import arm_sums
from components.experiment.evidence import GateEvidence, TrustSummary
from components.experiment.gate import GateConfig, Outcome, decide, decide_offline
from components.experiment.guardrails import Metric, session_metrics
from components.experiment.plan import AbDesign, AbPlan, Baseline, plan_ab
from components.experiment.sequential import confidence_sequence
from components.interactions.batching import Requests, SessionBatch
from components.interactions.contract import RatioAssumption
from components.policies.ranking_policy import EncodedPolicy, NeuralSlatePolicy, bounded
from components.policies.slate_policy import SessionState, SlatePolicy, UniformPolicy
from components.world_model.user_model import UserModel
from flows.benchmarks import Budget, Context, Figure
from flows.benchmarks._figures import share_of
from flows.benchmarks._pool import Pool, storefront_pool
from flows.benchmarks.coverage import RedrawnLog

BUDGET = Budget(full=90, quick=5)
N_COMPARISONS, N_CHALLENGERS = 500, 5
#: Users of a log, and of the populations that logs and A/Bs are drawn from.
LOG_USERS, POPULATION_SESSIONS = 6_000, 40_000
DAYS = 14
#: Click logits that the world model of an exploit adds to items, and to how many.
OVERRATED, N_OVERRATED = {"exploit_1": 1.0, "exploit_1.5": 1.5, "exploit": 2.0}, 24
#: Spread in nats of an equal challenger's random likings, and by how much an exploit prefers overrated items.
LIKING, EXPLOIT_BONUS = 0.5, 1.0
#: Seeds of the challengers' and the logging policy's sessions in A/Bs.
OWN, LOGGING = 3, 4
NAME, CHAMPION = "challenger", "logging policy"
#: Users of the shop read from the top.
RATIO = RatioAssumption.CASCADE


class Altered(EncodedPolicy):
    """So far from the logging policy, as a member fitted it, to what the member learned; and a bonus per item."""

    def __init__(self, member: NeuralSlatePolicy) -> None:
        super().__init__(member.features, member.slate_size)
        self.member = member
        self.strength = 0.0
        self.bonus = torch.zeros(member.features.encoder.shape.n_indices)

    def logits(self, state: SessionState, requests: Requests) -> Float[Tensor, "B N"]:
        """Bounded utilities."""
        member, phi = self.member, self.features(state, requests)
        utility = self.bonus[requests.candidates] + (1.0 - self.strength) * member.behavior(
            self.features, phi, state, requests
        )
        if self.strength:
            utility = utility + self.strength * member.learned(self.features, phi, state, requests)
        return bounded(utility, requests)


@dataclass(frozen=True)
class Arm:
    """What the sessions of one policy earned, ordered by user: what A/Bs are drawn from."""

    user: Int[np.ndarray, " S"]
    rewards: Float[np.ndarray, " S"]
    metrics: dict[Metric, Float[np.ndarray, " S"]]

    @classmethod
    def of(cls, batch: SessionBatch) -> "Arm":
        """The sessions of a batch."""
        order = torch.argsort(batch.users, stable=True)
        ordered = batch.select(order)
        rewards = ordered.rewards.double().sum((1, 2)).numpy()
        return cls(ordered.users.numpy(), rewards, dict(session_metrics(ordered)))


@dataclass(frozen=True)
class Population:
    """Sessions that comparisons are drawn from, and what the world model says of the challenger."""

    log: LoggedRequests
    slates: SampledSlates
    own: Arm
    logging: Arm
    model_value: ModelValue
    support: SupportDistance
    ess_share: float


def measure(context: Context) -> dict[str, Figure]:
    """Share of comparisons that each kind of challenger passes, and of equal A/Bs that pass when looked at daily."""
    n_comparisons = 40 if context.quick else N_COMPARISONS
    n_challengers = 2 if context.quick else N_CHALLENGERS
    pool = storefront_pool(context.shared / "storefront", 2 if context.quick else 20)
    world = _World(pool)
    kinds: dict[str, Callable[[int], tuple[SlatePolicy, UserModel]]] = {
        "equal": world.equal,
        "worse": partial(world.valued, gain=-0.2),
        "better": partial(world.valued, gain=0.2),
        **{kind: partial(world.exploit, overrated=overrated) for kind, overrated in OVERRATED.items()},
    }
    counts: dict[str, float] = defaultdict(float)
    for kind, make in kinds.items():
        # Milder exploits are shown without a target: one challenger of each.
        for number in range(1 if kind in OVERRATED and kind != "exploit" else n_challengers):
            part = context.keep(
                f"{kind}-{number}", partial(world.judge, make, kind, number, n_comparisons // n_challengers)
            )
            counts[f"{kind}.challengers"] += 1
            for key, value in part.items():
                counts[f"{kind}.{key}"] += value
    peeking = context.keep("peeking", partial(world.peek, n_comparisons))
    return _figures(counts, peeking, world.plan)


class _World:
    """The pool's shop with one large log of it."""

    def __init__(self, pool: Pool) -> None:  # type: ignore[type-arg]
        self.pool = pool
        users = torch.randint(pool.n_users, (POPULATION_SESSIONS,), generator=torch.Generator().manual_seed(77))
        self.users = users
        self.sessions = self._roll(pool.behavior, 1)
        self.logging = Arm.of(self._roll(pool.behavior, LOGGING))
        self.log = RedrawnLog(self.sessions)
        rewards = self.sessions.rewards.double().sum((1, 2)).numpy()
        self.propensities = check_propensities(
            self.log.batches(1_024),
            batch_logits(pool.behavior),
            {"uniform policy": UniformPolicy(pool.environment.slate_size)},
            torch.Generator().manual_seed(78),
            ratio=RATIO,
            estimated=False,
        )
        self.baseline = _baseline(users.numpy(), rewards)
        metrics = {
            metric: _baseline(users.numpy(), values) for metric, values in session_metrics(self.sessions).items()
        }
        design = AbDesign(relative_effect=0.2, level=GateConfig().ab_level, users_per_day=1_000)
        self.plan = plan_ab(self.baseline, design, metrics)

    def _roll(self, policy: SlatePolicy, seed: int) -> SessionBatch:
        generator = torch.Generator().manual_seed(seed)
        return rollout(self.pool.environment, policy, self.users, generator, self.pool.max_steps)

    def _policy(self, number: int) -> NeuralSlatePolicy:
        policy = self.pool.members[number].policy
        assert isinstance(policy, NeuralSlatePolicy)
        return policy

    def equal(self, number: int) -> tuple[SlatePolicy, UserModel]:
        """Random likings, and as much of a member's lesson as makes the population's estimate the logged mean."""
        policy = Altered(self._policy(number))
        policy.bonus = LIKING * torch.randn(len(policy.bonus), generator=torch.Generator().manual_seed(800 + number))

        def gain(strength: float) -> float:
            policy.strength = strength
            return one_request_ncis(
                logged_requests(self.log, policy, RATIO).requests, policy=NAME, ratio=RATIO
            ).difference

        policy.strength = float(optimize.brentq(gain, -1.0, 1.0, xtol=1e-4))
        return policy, self.pool.members[number].user_model

    def valued(self, number: int, gain: float) -> tuple[SlatePolicy, UserModel]:
        """A member at the strength where its sessions earn so much more; below 0 it does the opposite."""
        policy = Altered(self._policy(number))

        def missing(strength: float) -> float:
            policy.strength = strength
            return self._gain(Arm.of(self._roll(policy, OWN))) - gain

        policy.strength = float(optimize.brentq(missing, *((0.0, 1.5) if gain > 0 else (-1.5, 0.0)), xtol=0.01))
        return policy, self.pool.members[number].user_model

    def _gain(self, own: Arm) -> float:
        """Relative gain of a population of sessions over the logging policy's."""
        return float(own.rewards.mean() / self.logging.rewards.mean()) - 1.0

    def exploit(self, number: int, overrated: float) -> tuple[SlatePolicy, UserModel]:
        """A policy that likes what its world model overrates: items that truly earn no more than others."""
        member = self.pool.members[number]
        broken = copy.deepcopy(member.user_model)
        n_items = broken.encoder.shape.n_indices
        generator = torch.Generator().manual_seed(900 + number)
        items = 2 + torch.randperm(n_items - 2, generator=generator)[:N_OVERRATED]
        rows = broken.encoder.id_rows[items]
        with torch.no_grad():
            broken.encoder.click_bias.weight[rows] += overrated
        policy = Altered(self._policy(number))
        policy.bonus[items] = EXPLOIT_BONUS
        return policy, broken

    def judge(
        self, make: Callable[[int], tuple[SlatePolicy, UserModel]], kind: str, number: int, n_comparisons: int
    ) -> dict[str, float]:
        """Outcomes of the comparisons of one challenger."""
        policy, users = make(number)
        population = self._population(
            policy, users, self.logging if kind == "equal" else Arm.of(self._roll(policy, OWN))
        )
        generator = np.random.default_rng([5_000, number, *kind.encode()])
        counts: dict[str, float] = defaultdict(float)
        counts |= {"ess_share": population.ess_share, "gain": self._gain(population.own)}
        for _ in range(n_comparisons):
            evidence = self._evidence(population, generator)
            decision = decide(evidence, GateConfig())
            small = _ab(population.own, population.logging, self.plan.fixed.users, generator)
            bounds = small.bounds(GateConfig().ab_level)
            counts["ab_at_fixed_size"] += bounds is not None and bounds.lower > 0
            reasons = {reason.check: reason for reason in decision.reasons}
            offline = decide_offline(evidence, GateConfig()).outcome is not Outcome.HOLD
            counts["n"] += 1
            counts["promoted"] += decision.outcome is Outcome.PROMOTE
            counts["released"] += decision.outcome is not Outcome.HOLD
            counts["offline"] += offline
            counts["offline_gain"] += reasons["gain"].passed
            counts["ab"] += reasons["A/B"].passed
            counts["exploit"] += "lives off an error" in reasons["exploit"].text
            for check, reason in reasons.items():
                counts[f"failed.{check}"] += not reason.passed
        return dict(counts)

    def _population(self, policy: SlatePolicy, users: UserModel, own: Arm) -> Population:
        judged = logged_requests(self.log, policy, RATIO)
        logging = self.pool.behavior
        slates = sample_slates(self.log, policy, users, self.pool.environment.reward, torch.Generator().manual_seed(79))
        effective = one_request_sums(judged.requests, default_cap(len(judged.requests.rewards)), RATIO).effective
        order = np.argsort(judged.requests.user, kind="stable")
        probed = RedrawnLog(self.sessions.select(torch.arange(2_000)))
        return Population(
            log=judged.requests.take(order),
            slates=slates.take(order),
            own=own,
            logging=self.logging,
            model_value=model_value(
                users, self.pool.environment.reward, policy, probed, torch.Generator().manual_seed(1)
            ),
            support=support_distance(NAME, effective, policy, logging, probed),
            ess_share=effective.value / effective.n,
        )

    def _evidence(self, population: Population, generator: np.random.Generator) -> GateEvidence:
        drawn = draw_users(population.log.user, LOG_USERS, generator)
        log = replace(population.log.take(drawn.rows), user=drawn.users)
        about = About(policy=NAME, ratio=RATIO)
        offline = one_request_ncis(log, **about)
        probe = compare_values(
            offline,
            population.model_value,
            population.support,
            ess_floor(offline.n_requests),
        )
        return GateEvidence(
            challenger=NAME,
            champion_policy=None,
            ab_started=True,
            ratio_assumption=RATIO,
            data_passed=True,
            trust=TrustSummary(passed=True),
            exploit=judge_exploit(probe, TrustConfig()),
            offline=offline,
            cross_check=doubly_robust(log, population.slates.model.take(drawn.rows), **about),
            propensities=self.propensities,
            ab=_ab(population.own, population.logging, self.plan.together.users, generator),
        )

    def peek(self, n_comparisons: int) -> dict[str, float]:
        """Equal A/Bs looked at each day: how often a bound of the sequence, or of a test for one look, lies above 0."""
        level = GateConfig().ab_level
        rewards, users = self.logging.rewards, self.logging.user
        generator = np.random.default_rng(31)
        n_users = self.plan.sequential.users
        counts: dict[str, float] = defaultdict(float)
        for _ in range(n_comparisons):
            drawn = draw_users(users, n_users, generator)
            treated = (drawn.users % 2).astype(bool)
            day = generator.integers(0, DAYS, size=len(drawn.rows))
            sequence = confidence_sequence(
                drawn.users,
                day,
                rewards[drawn.rows],
                treated,
                planned_sessions=len(drawn.rows),
                confidence=1 - 2 * level,
            )
            assert sequence is not None
            naive = stats.norm.ppf(1 - level)
            counts["n"] += 1
            counts["sequence"] += any(look.lower > 0 for look in sequence.looks)
            counts["naive"] += any(look.difference > naive * look.standard_error for look in sequence.looks)
        return dict(counts)


@dataclass(frozen=True)
class Drawn:
    """Rows of users who were drawn with replacement."""

    rows: Int[np.ndarray, " R"]
    users: Int[np.ndarray, " R"]
    """Users anew: one who is drawn twice is two."""


def draw_users(user: Int[np.ndarray, " M"], n_users: int, generator: np.random.Generator) -> Drawn:
    """All rows of users drawn with replacement; rows of a user stand together."""
    starts = np.flatnonzero(np.diff(user, prepend=user[0] - 1))
    lengths = np.diff(starts, append=len(user))
    chosen = generator.integers(len(starts), size=n_users)
    counts = lengths[chosen]
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return Drawn(np.repeat(starts[chosen], counts) + within, np.repeat(np.arange(n_users), counts))


def _ab(own: Arm, logging: Arm, n_users: int, generator: np.random.Generator) -> AbResult:
    """An A/B of the planned size, its users drawn from both arms' populations."""
    control, treatment = (draw_users(arm.user, n_users // 2, generator) for arm in (logging, own))

    def both(of_control: Float[np.ndarray, " S"], of_treatment: Float[np.ndarray, " S"]) -> Float[np.ndarray, " R"]:
        return np.concatenate([of_control[control.rows], of_treatment[treatment.rows]])

    return analyze_ab(
        np.concatenate([2 * control.users, 2 * treatment.users + 1]),
        both(logging.rewards, own.rewards),
        np.repeat([False, True], [len(control.rows), len(treatment.rows)]),
        label="live",
        treatment=NAME,
        control=CHAMPION,
        planned_share=0.5,
        metrics={metric: both(logging.metrics[metric], own.metrics[metric]) for metric in Metric},
    )


def _baseline(user: Int[np.ndarray, " S"], values: Float[np.ndarray, " S"]) -> Baseline:
    mean = arm_sums(user, values).mean()
    return Baseline(mean=mean.mean, standard_deviation=float(np.sqrt(mean.variance * mean.n_users)))


def _figures(counts: dict[str, float], peeking: dict[str, float], plan: AbPlan) -> dict[str, Figure]:
    def of(kind: str, key: str, target: str | None = None, holds: Callable[[float], bool] | None = None) -> Figure:
        what = f"comparisons of {counts[f'{kind}.challengers']:.0f} challengers"
        return share_of(counts[f"{kind}.{key}"], counts[f"{kind}.n"], what, target, holds)

    def mean(kind: str, key: str, unit: str) -> Figure:
        return Figure(value=counts[f"{kind}.{key}"] / counts[f"{kind}.challengers"], unit=unit)

    return {
        "plan.users_at_fixed_size": Figure(value=plan.fixed.users, unit="users that find +20 % with 80 % probability"),
        "plan.users_with_guardrails": Figure(value=plan.together.users, unit="users of the A/Bs"),
        "equal.offline_gain_passed": of(
            "equal", "offline_gain", "designed 0.025, at most 0.05", lambda value: value <= 0.05
        ),
        "equal.ab_passed": of("equal", "ab", "designed 0.03, at most 0.05", lambda value: value <= 0.05),
        "equal.promoted": of("equal", "promoted"),
        "worse.true_gain": mean("worse", "gain", "share, mean of the challengers"),
        "worse.promoted": of("worse", "promoted", "0", lambda value: value == 0),
        "worse.released_at_all": of("worse", "released", "0", lambda value: value == 0),
        "better.true_gain": mean("better", "gain", "share, mean of the challengers"),
        "better.ab_passed_at_fixed_size": of(
            "better", "ab_at_fixed_size", "designed 0.8, at least 0.75", lambda value: value >= 0.75
        ),
        "better.passed_offline": of("better", "offline"),
        "better.promoted": of("better", "promoted", "at least 0.8", lambda value: value >= 0.8),
        "better.held_as_exploit": of("better", "exploit"),
        "exploit.held_for_it": of("exploit", "exploit", "at least 0.99", lambda value: value >= 0.99),
        "exploit_1.5.held_for_it": of("exploit_1.5", "exploit"),
        "exploit_1.held_for_it": of("exploit_1", "exploit"),
        "exploit.promoted": of("exploit", "promoted", "0", lambda value: value == 0),
        "peeking.sequence_passed": share_of(
            peeking["sequence"], peeking["n"], "equal A/Bs", "at most 0.03", lambda value: value <= 0.03
        ),
        "peeking.one_look_test_passed": share_of(peeking["naive"], peeking["n"], "equal A/Bs"),
    }
