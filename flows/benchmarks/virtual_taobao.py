"""Agents of continuous actions on Virtual Taobao, beside the constant action that beats them.

Each row is an agent with its setting, and is run with every seed (`components/evaluation/agent_comparison.py`, which
also runs a row alone). As published, the simulator is a contextual bandit whose users hardly differ, so rows with one
action for everybody stand in the same table; `docs/virtual-taobao.md` tells how to read it.

A second table has the gate's word on the same agents, by a log that a policy of middling quality wrote, and what is
left of them under the constraint that this log can judge them (`components/experiment/support_comparison.py`).
"""

from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from jaxtyping import Float

from components.environments import virtual_taobao_log
from components.environments.virtual_taobao import VirtualTaobao
from components.evaluation.agent_comparison import ROWS, SOLVED, Kind, run_row
from components.experiment.support_comparison import LoggedJudge, judge_of_a_middling_log, judge_row
from components.world_model.action_model import ActionModelConfig
from flows.benchmarks import Budget, Context, Figure, figures_table
from flows.benchmarks._figures import columns, mean_of_seeds
from flows.figures import CurveOfSeeds, curves_of_seeds
from flows.numbers import number
from flows.settings import REPOSITORY

BUDGET = Budget(full=300, quick=5)
DEFAULT_PATH = REPOSITORY.parent / "shared" / "data" / "virtual_taobao"
SEEDS = 10
#: Rows that run quick, and the share of their steps that they take.
QUICK_ROWS, QUICK_SHARE = ("random", "zero", "constant-cem", "ppo"), 0.02
MOST_COLLAPSE = 0.02
#: Seeds with which an agent is trained anew and judged by the log; and of a quick run, its sessions.
JUDGED_SEEDS, QUICK_SESSIONS = 3, 4_000
#: What the report on Virtual Taobao shows of agents at its settings.
REPORTED = {
    "ddpg-published": "the report's: 0.5, then 0.42",
    "ppo-published": "the report's: 0.37",
    "two-stream-ppo-published": "the report's: about 1.0",
}
UNITS = {
    "ctr": "CTR of 2,000 users at the end",
    "episodes_ctr": "CTR of 50 sessions at the end",
    "best_ctr": "CTR of 2,000 users, the best look",
    "late_ctr": "CTR of 2,000 users, last tenth of training",
    "collapse": "CTR, the best look minus the last tenth",
    "steps_per_second": "environment steps a CPU-second, learning included",
    "action_variance": "between users on their first page, mean of the 27 numbers",
    "user_variance": "clicks², of expected clicks between users",
    "action_click_variance": "clicks², of expected clicks between the actions of users",
    "reach": "largest size of a number of an action",
}
JUDGED_UNITS = {
    "logged_ctr": "CTR of who wrote the log, the truth",
    "trained_ctr": "CTR as trained, the truth",
    "promised": "CTR as trained, what the world model of the log says",
    "left_ctr": "CTR pulled back to the logged actions, the truth",
    "left_estimate": "CTR pulled back to the logged actions, by NCIS",
    "constrained_ctr": "CTR trained under the constraint, the truth",
    "constrained_estimate": "CTR trained under the constraint, by NCIS",
}
LEFT = {"left": "pulled back", "constrained": "trained under the constraint"}
UNTIL = {"solved_steps": "environment steps", "solved_seconds": "CPU-seconds"}
NEVER = f"no seed reached {SOLVED}"
#: Rows that are drawn, and the file: a panel each of what constants and tuned agents do, and of published settings.
DRAWN = ((Kind.CONSTANT, Kind.TUNED), (Kind.PUBLISHED,))
DRAWINGS = {
    "steps": ("environment steps", "virtual-taobao-steps.svg"),
    "seconds": ("CPU-seconds", "virtual-taobao-seconds.svg"),
}


def measure(context: Context) -> dict[str, Figure]:
    """CTR, stability, budget and variances of every row; the two drawings of a whole run."""
    names = QUICK_ROWS if context.quick else tuple(ROWS)
    n_seeds = context.seeds or (1 if context.quick else SEEDS)
    share = QUICK_SHARE if context.quick else 1.0
    environment = VirtualTaobao(context.path or DEFAULT_PATH)
    results = {
        name: [
            context.keep(f"{name}-{seed}", partial(run_row, environment, name, seed, share)) for seed in range(n_seeds)
        ]
        for name in names
    }
    if not context.quick and context.seeds is None:
        draw(results, REPOSITORY / "docs")
    figures = {"agents_that_solve_it": _solvers(results)}
    for name, of_seeds in results.items():
        figures |= {f"{name}.{key}": figure for key, figure in _row_figures(name, of_seeds).items()}
    for name, of_seeds in _judged(context, environment, names, min(n_seeds, JUDGED_SEEDS), share).items():
        figures |= {f"{name}.{key}": figure for key, figure in _judged_figures(of_seeds).items()}
    return figures


def _judged(
    context: Context, environment: VirtualTaobao, names: tuple[str, ...], n_seeds: int, share: float
) -> dict[str, list[dict[str, float]]]:
    """What the gate says of the constants that were searched for and of the tuned agents, by row and seed."""
    config = virtual_taobao_log.Config()
    if context.quick:
        config = config.model_copy(update={"n_sessions": QUICK_SESSIONS})
    with TemporaryDirectory() as folder:

        @cache
        def judge() -> LoggedJudge:
            weights = context.path or DEFAULT_PATH
            return judge_of_a_middling_log(environment, weights, Path(folder), config, ActionModelConfig(), seed=0)

        def judged(name: str, seed: int) -> dict[str, float]:
            return judge_row(environment, judge(), name, seed, share)

        return {
            name: [context.keep(f"judged-{name}-{seed}", partial(judged, name, seed)) for seed in range(n_seeds)]
            for name in names
            if ROWS[name].kind in (Kind.CONSTANT, Kind.TUNED) or name == "best-constant"
        }


def _judged_figures(of_seeds: list[dict[str, float]]) -> dict[str, Figure]:
    """What the world model promises and the simulator knows; and how often the gate holds, and says why."""
    values, n = columns(of_seeds), len(of_seeds)
    figures = {key: mean_of_seeds(values[key], unit) for key, unit in JUDGED_UNITS.items() if key in values}
    exploits = int(values["exploit"].sum())
    figures["held"] = Figure(
        value=values["held"].mean(),
        unit=f"share of {n} seeds that the gate holds as trained; as an exploit {exploits} of {n}",
        target="1, each as an exploit",
        holds=bool(values["held"].all() and exploits == n),
    )
    for key, whom in LEFT.items():
        if f"{key}_held" not in values:
            continue
        figures[f"{key}_held"] = Figure(
            value=values[f"{key}_held"].mean(), unit=f"share of {n} seeds that the gate holds {whom}; others: a canary"
        )
        gain = values["trained_ctr"] - values["logged_ctr"]
        kept = (values[f"{key}_ctr"] - values["logged_ctr"]) / gain
        figures[f"{key}_share"] = mean_of_seeds(kept, f"share of the true gain over the log that is left {whom}")
    return figures


def _solvers(results: dict[str, list[dict[str, float]]]) -> Figure:
    """Agents, constants not among them, that end at the CTR that counts as solved whatever their seed."""
    solvers = [
        name
        for name, of_seeds in results.items()
        if ROWS[name].kind not in (Kind.REFERENCE, Kind.CONSTANT)
        and min(result["ctr"] for result in of_seeds) >= SOLVED
    ]
    return Figure(
        value=len(solvers),
        unit=f"agents that end with a CTR of at least {SOLVED} in every seed: {', '.join(solvers) or 'none'}",
        target="at least 1",
        holds=bool(solvers),
    )


def _row_figures(name: str, of_seeds: list[dict[str, float]]) -> dict[str, Figure]:
    scalars = [{key: value for key, value in result.items() if not key.startswith("look.")} for result in of_seeds]
    values = columns(scalars)
    with np.errstate(invalid="ignore"):
        values["steps_per_second"] = values["steps"] / values["seconds"]
    learns = ROWS[name].steps > 0
    keys = [key for key in UNITS if learns or key in ("ctr", "episodes_ctr") or key.endswith(("variance", "reach"))]
    figures = {key: mean_of_seeds(values[key], UNITS[key]) for key in keys}
    if name in REPORTED:
        figures["best_ctr"] = figures["best_ctr"].model_copy(update={"target": REPORTED[name]})
    if ROWS[name].kind is Kind.TUNED:
        stays = bool(values["collapse"].max() <= MOST_COLLAPSE)
        update = {"target": f"at most {MOST_COLLAPSE} in every seed", "holds": stays}
        figures["collapse"] = figures["collapse"].model_copy(update=update)
    if learns:
        figures |= {key: _until_solved(values[key], unit) for key, unit in UNTIL.items()}
    return figures


def _until_solved(values: Float[np.ndarray, " S"], unit: str) -> Figure:
    """Mean over the seeds that got there."""
    there = values[np.isfinite(values)]
    unit = f"{unit} until CTR {SOLVED}; {len(there)} of {len(values)} seeds"
    if not len(there):
        return Figure(value=np.nan, unit=unit, skipped=NEVER)
    return mean_of_seeds(there, unit)


def draw(results: dict[str, list[dict[str, float]]], folder: Path) -> None:
    """CTR against steps and against seconds, of all rows that learn but those of another discount."""
    for key, (label, file) in DRAWINGS.items():
        panels = [
            [_curve(name, results[name], key) for name, row in ROWS.items() if name in results and row.kind in kinds]
            for kinds in DRAWN
        ]
        drawn = curves_of_seeds([panel for panel in panels if panel], x=label, y="CTR of 2,000 users")
        staging = (folder / file).with_suffix(".tmp")
        staging.write_text(drawn.file)
        staging.rename(folder / file)


def _curve(name: str, of_seeds: list[dict[str, float]], key: str) -> CurveOfSeeds:
    looks = [_looks(result, key) for result in of_seeds]
    return CurveOfSeeds(name, tuple(x for x, _ in looks), tuple(ctr for _, ctr in looks))


def _looks(result: dict[str, float], key: str) -> tuple[Float[np.ndarray, " L"], Float[np.ndarray, " L"]]:
    """Where the looks at an agent stand on the axis, and the CTR that they found."""
    n = sum(name.startswith("look.") and name.endswith(".ctr") for name in result)
    return (
        np.array([result[f"look.{number}.{key}"] for number in range(n)]),
        np.array([result[f"look.{number}.ctr"] for number in range(n)]),
    )


#: Columns of the table of rows.
COLUMNS = {
    "CTR of 2,000 users": "ctr",
    "of 50 sessions": "episodes_ctr",
    "best look": "best_ctr",
    "collapse": "collapse",
    f"steps until {SOLVED}": "solved_steps",
    f"CPU-seconds until {SOLVED}": "solved_seconds",
    "steps a CPU-second": "steps_per_second",
    "variance of actions between users": "action_variance",
    "of expected clicks between users": "user_variance",
    "between the users' actions": "action_click_variance",
}


#: Columns of the table of what the log supports of each row.
JUDGED_COLUMNS = {
    "CTR of who wrote the log": "logged_ctr",
    "as trained": "trained_ctr",
    "the world model's promise": "promised",
    "held": "held",
    "CTR pulled back": "left_ctr",
    "of the gain": "left_share",
    "pulled back, held": "left_held",
    "CTR trained under the constraint": "constrained_ctr",
    "by NCIS": "constrained_estimate",
    "of the gain under it": "constrained_share",
    "under it, held": "constrained_held",
}


def tables(figures: dict[str, Figure]) -> str:
    """What had targets, a table with one line a row, and what the log supports of the rows that it judged."""
    targets = {name: figure for name, figure in figures.items() if figure.target is not None}
    rows = list(dict.fromkeys(name.partition(".")[0] for name in figures if "." in name))
    judged = [row for row in rows if f"{row}.held" in figures]
    parts = [figures_table(targets), _table(figures, rows, COLUMNS)]
    return "\n\n".join([*parts, *([_table(figures, judged, JUDGED_COLUMNS)] if judged else [])])


def _table(figures: dict[str, Figure], rows: list[str], columns: dict[str, str]) -> str:
    lines = [
        f"| {row} | {' | '.join(_cell(figures.get(f'{row}.{key}')) for key in columns.values())} |" for row in rows
    ]
    return "\n".join([f"| row | {' | '.join(columns)} |", "| --- |" + " --- |" * len(columns), *lines])


def _cell(figure: Figure | None) -> str:
    if figure is None:
        return ""
    if figure.skipped is not None:
        return "never"
    seeds = figure.unit.rpartition("; ")[2] if figure.unit.endswith("seeds") else ""
    half = "" if figure.interval is None else f" ± {number(figure.interval[1] - figure.value, 2)}"
    return f"{number(figure.value, 3)}{half}" + (f" ({seeds})" if seeds else "")
