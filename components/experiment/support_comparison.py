"""What a log leaves of agents that learned in the simulator itself: the gate's word on each, and its truth.

A policy of middling quality writes a log of Virtual Taobao. A world model is learned from one part of it, and on the
other each agent of `agent_comparison` is judged (`continuous_gate`): as it was trained in the simulator, the same
pulled back to the logged actions, and one that was trained in the simulator under this constraint
(`constrained_actions`). What each really earns is then asked of the simulator, which the gate never sees.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from components.agents.watch import unwatched
from components.environments.constrained_actions import ConstrainedActions
from components.environments.continuous import run_sessions
from components.environments.virtual_taobao import ITEMS_OF_A_PAGE, VirtualTaobao
from components.environments.virtual_taobao_log import Config, write_virtual_taobao_log
from components.evaluation.action_evidence import gaussian_of, study
from components.evaluation.action_trust import judge_action_model
from components.evaluation.agent_comparison import JUDGE_SEED, ROWS, USERS, Kind, click_through_rate
from components.evaluation.policy_value import Estimate, PolicyValue
from components.evaluation.world_model_trust import TrustConfig
from components.experiment.continuous_gate import Judge, judge_continuous, judge_policy, pulled_back
from components.experiment.gate import Decision, GateConfig, Outcome
from components.interactions.log_folder import open_log
from components.interactions.splits import TEST, TRAIN, VALIDATION, SplitConfig, split_log
from components.policies.continuous_policy import ContinuousPolicy
from components.validation.checks import ValidationConfig, validate
from components.world_model.action_model import ActionModelConfig, fit_action_model


@dataclass(frozen=True)
class LoggedJudge:
    """Who judges, and whether the log that it judges by met its data checks."""

    judge: Judge
    data_passed: bool
    logged_ctr: float
    """True click-through rate of the Gaussian of the logged actions."""


def judge_of_a_middling_log(
    environment: VirtualTaobao, weights: Path, folder: Path, log: Config, model: ActionModelConfig, seed: int
) -> LoggedJudge:
    """Write a log, check it, learn the world model from its training part and study its test part.

    Args:
        environment: the simulator.
        weights: folder of the simulator's weights.
        folder: empty; for the log and its parts.
        log: what is logged.
        model: of the world model.
        seed: of the world model and the reward model.
    """
    written = write_virtual_taobao_log(log, weights, folder / "log", "virtual-taobao")
    for name in ("checked", "split"):
        (folder / name).mkdir()
    checks = validate(written, ValidationConfig(), folder / "checked")
    split_log(open_log(folder / "checked" / "log"), SplitConfig(), folder / "split", with_holdout=False)
    train, validation, test = (open_log(folder / "split" / name) for name in (TRAIN, VALIDATION, TEST))
    fitted = fit_action_model(train, validation, model, seed, lambda message, share: None).model
    limits = TrustConfig()
    judge = Judge(study(test, seed), fitted, judge_action_model(fitted, test, limits), GateConfig(), limits)
    return LoggedJudge(judge, checks.passed, true_ctr(environment, gaussian_of(judge.studied.cloud)))


def judge_row(environment: VirtualTaobao, logged: LoggedJudge, name: str, seed: int, share: float) -> dict[str, float]:
    """Train a row's agent in the simulator, and judge it by the log.

    Args:
        environment: where it learns, and which knows the truth.
        logged: who judges.
        name: of the row.
        seed: of the agent.
        share: of the row's steps that it takes.

    Returns:
        `logged_ctr`, `trained_ctr` and `left_ctr`, the true ones of who wrote the log, of the agent's most typical
        action and of what is pulled back; `left_estimate`, NCIS of the latter as a CTR; `promised`, what the world
        model says of the agent as a CTR; `held` and `left_held`, whether the gate holds either; `exploit`, whether that
        is a reason. Of agents that learn, `constrained_ctr`, `_estimate` and `_held`: the same of one that was trained
        under the constraint.
    """
    row = ROWS[name]
    policy = row.train(environment, round(row.steps * share), seed, unwatched)
    verdict = judge_continuous(logged.judge, policy, name, data_passed=logged.data_passed)
    left = pulled_back(logged.judge, policy)
    constrained = {}
    if row.kind is not Kind.REFERENCE:
        within = ConstrainedActions(environment, left.cloud, left.radius)
        learned = row.train(within, round(row.steps * share), seed, unwatched)
        released = pulled_back(logged.judge, learned)
        evidence, _, decision = judge_policy(logged.judge, released, name, logged.data_passed)
        constrained = {
            "constrained_ctr": true_ctr(environment, released),
            "constrained_estimate": _ctr(evidence.value),
            "constrained_held": float(decision.outcome is Outcome.HOLD),
        }
    return constrained | {
        "logged_ctr": logged.logged_ctr,
        "trained_ctr": click_through_rate(environment, policy, USERS, JUDGE_SEED),
        "left_ctr": true_ctr(environment, left),
        "left_estimate": _ctr(verdict.pulled_back_evidence.value),
        "promised": float("nan") if verdict.probe is None else verdict.probe.model_value / ITEMS_OF_A_PAGE,
        "held": float(verdict.decision.outcome is Outcome.HOLD),
        "exploit": float(_exploits(verdict.decision)),
        "left_held": float(verdict.pulled_back_decision.outcome is Outcome.HOLD),
    }


def true_ctr(environment: VirtualTaobao, policy: ContinuousPolicy) -> float:
    """Clicks / pages / 10 of 2,000 sessions of a policy as it acts, its chance included."""
    generator = torch.Generator(environment.device).manual_seed(JUDGE_SEED)

    def act(observations: Float[Tensor, "B 91"]) -> Float[Tensor, "B 27"]:
        return policy.act(observations, generator).actions.float()

    return run_sessions(environment, act, USERS, generator).mean_reward / ITEMS_OF_A_PAGE


def _ctr(estimate: Estimate) -> float:
    return estimate.value / ITEMS_OF_A_PAGE if isinstance(estimate, PolicyValue) else float("nan")


def _exploits(decision: Decision) -> bool:
    return any(reason.check == "exploit" and reason.allows is Outcome.HOLD for reason in decision.reasons)
