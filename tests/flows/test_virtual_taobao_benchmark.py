import math
from pathlib import Path

import numpy as np
import pytest
from virtual_taobao_weights import published_weights

from components.errors import InputError
from components.evaluation.agent_comparison import ROWS, Kind
from flows.benchmarks import run
from flows.benchmarks.virtual_taobao import NEVER, QUICK_ROWS, _judged_figures, _row_figures, _solvers, draw, tables
from flows.figures import CurveOfSeeds

TUNED = next(name for name, row in ROWS.items() if row.kind is Kind.TUNED)


def result(ctr: float, best: float, solved: float = math.nan) -> dict[str, float]:
    """Of a seed that was looked at twice."""
    return {
        "ctr": ctr,
        "episodes_ctr": ctr,
        "best_ctr": best,
        "late_ctr": ctr,
        "collapse": best - ctr,
        "steps": 2_000.0,
        "seconds": 4.0,
        "solved_steps": solved,
        "solved_seconds": solved / 500,
        "action_variance": 0.1,
        "user_variance": 0.0,
        "action_click_variance": 0.0,
        "reach": 0.5,
        "look.0.steps": 1_000.0,
        "look.0.seconds": 2.0,
        "look.0.ctr": best,
        "look.1.steps": 2_000.0,
        "look.1.seconds": 4.0,
        "look.1.ctr": ctr,
    }


def test_a_row_that_collapses_in_one_seed_misses_its_target() -> None:
    figures = _row_figures(TUNED, [result(1.0, 1.0, 1_000.0), result(0.9, 1.0, 1_000.0)])

    assert figures["collapse"].value == pytest.approx(0.05)
    assert figures["collapse"].holds is False
    assert figures["steps_per_second"].value == 500
    assert _row_figures(TUNED, [result(0.99, 1.0), result(1.0, 1.0)])["collapse"].holds is True


def test_the_budget_until_it_is_solved_is_that_of_the_seeds_that_got_there() -> None:
    figures = _row_figures(TUNED, [result(1.0, 1.0, 1_000.0), result(0.5, 0.6)])
    never = _row_figures(TUNED, [result(0.5, 0.6)])["solved_steps"]

    assert figures["solved_steps"].value == 1_000
    assert figures["solved_steps"].unit.endswith("1 of 2 seeds")
    assert never.skipped == NEVER


def test_an_agent_counts_as_solving_it_only_where_every_seed_does_and_constants_never() -> None:
    some, every = [result(1.0, 1.0), result(0.98, 1.0)], [result(1.0, 1.0), result(0.995, 1.0)]

    missed, met = (_solvers({"best-constant": every, "constant-cem": every, TUNED: seeds}) for seeds in (some, every))

    assert (missed.value, missed.holds) == (0, False)
    assert (met.value, met.holds) == (1, True)
    assert TUNED in met.unit


def test_the_table_has_one_line_a_row_and_says_what_never_happened() -> None:
    of_seeds = [result(0.5, 0.6), result(0.6, 0.6)]
    figures = {f"{TUNED}.{key}": figure for key, figure in _row_figures(TUNED, of_seeds).items()}

    targets, rows = tables(figures).split("\n\n")

    assert "| **missed** |" in targets
    assert rows.count("\n") == 2
    assert f"| {TUNED} | 0.550 ± 0.64 |" in rows
    assert "| never |" in rows


def judged(held: float, exploit: float, *, constrained: bool = True) -> dict[str, float]:
    """Of a seed whose agent earns all, and by half of that when it is trained under the constraint."""
    under = {"constrained_ctr": 0.7, "constrained_estimate": 0.69, "constrained_held": 0.0}
    return (under if constrained else {}) | {
        "logged_ctr": 0.4,
        "trained_ctr": 1.0,
        "left_ctr": 0.1,
        "left_estimate": 0.11,
        "promised": 0.9,
        "held": held,
        "exploit": exploit,
        "left_held": 1.0,
    }


def test_the_second_table_says_what_the_log_leaves_of_an_agent_and_what_the_gate_says() -> None:
    of_seeds = [judged(1.0, 1.0), judged(1.0, 1.0)]
    figures = {f"{TUNED}.{key}": figure for key, figure in _judged_figures(of_seeds).items()}
    constant = {
        f"best-constant.{key}": figure for key, figure in _judged_figures([judged(1, 1, constrained=False)]).items()
    }

    _, _, left = tables(figures | constant).split("\n\n")

    assert figures[f"{TUNED}.held"].holds is True
    assert figures[f"{TUNED}.constrained_share"].value == pytest.approx(0.5)
    assert figures[f"{TUNED}.left_share"].value == pytest.approx(-0.5)
    assert left.count("\n") == 3
    assert "| best-constant | 0.400 | 1 | 0.900 | 1 | 0.100 | −0.500 | 1 |  |  |  |  |" in left


@pytest.mark.parametrize("seed", [judged(0.0, 0.0), judged(1.0, 0.0)])
def test_an_agent_that_is_let_out_as_trained_or_held_for_another_reason_is_a_miss(seed: dict[str, float]) -> None:
    assert _judged_figures([judged(1.0, 1.0), seed])["held"].holds is False


def test_curves_meet_where_all_seeds_were_looked_at() -> None:
    curve = CurveOfSeeds(
        "agent", (np.array([1.0, 3.0]), np.array([1.0, 2.0])), (np.array([0.0, 1.0]), np.array([0.5, 1.0]))
    )

    places, mean, half = curve.band()

    assert places.tolist() == [1.0, 2.0]
    assert mean.tolist() == [0.25, 0.75]
    # Student's 97.5 % quantile with one degree of freedom is 12.706; the seeds differ by a half at both places.
    assert half == pytest.approx(12.706 * 0.25, rel=1e-4)


def test_both_drawings_name_what_they_show(tmp_path: Path) -> None:
    draw({TUNED: [result(0.9, 0.95), result(0.8, 0.9)]}, tmp_path)

    files = sorted(file.name for file in tmp_path.iterdir())
    assert files == ["virtual-taobao-seconds.svg", "virtual-taobao-steps.svg"]
    for file, label in zip(files, ("CPU-seconds", "environment steps"), strict=True):
        svg = (tmp_path / file).read_text()
        assert f"CTR of 2,000 users against {label}" in svg
        assert f"{TUNED} 0.850" in svg


def test_a_folder_without_the_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"generator_model\.pt: no such file"):
        run("virtual-taobao", quick=True, seeds=None, path=tmp_path)


def test_a_quick_run_judges_its_few_rows_and_goes_on_where_it_stopped() -> None:
    weights = published_weights()
    one, again = (run("virtual-taobao", quick=True, seeds=None, path=weights) for _ in range(2))

    assert {name.rpartition(".")[0] for name in one.figures if "." in name} == set(QUICK_ROWS)
    assert one.figures["zero.ctr"].value == pytest.approx(0.056, abs=0.006)
    # Times are those of the first run: nothing was computed twice.
    assert {name: figure for name, figure in again.figures.items() if figure.skipped is None} == {
        name: figure for name, figure in one.figures.items() if figure.skipped is None
    }
