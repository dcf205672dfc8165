import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from virtual_taobao_weights import published_weights

from components.environments.virtual_taobao import VirtualTaobao
from components.errors import InputError
from components.evaluation.agent_comparison import LOOKS, ROWS, Kind, run_row
from components.evaluation.best_constant import best_constant


@pytest.fixture(scope="module")
def environment() -> VirtualTaobao:
    return VirtualTaobao(published_weights())


def test_rows_that_learn_nothing_have_the_known_click_through_rates(environment: VirtualTaobao) -> None:
    random, zero = (run_row(environment, name, seed=0) for name in ("random", "zero"))

    assert random["ctr"] == pytest.approx(0.019, abs=0.004)
    assert zero["ctr"] == pytest.approx(0.056, abs=0.006)
    assert random["steps"] == zero["steps"] == zero["collapse"] == zero["action_variance"] == zero["reach"] == 0
    # Numbers that are uniform in a box of width 2.
    assert random["action_variance"] == pytest.approx(1 / 3, abs=0.01)
    assert random["action_click_variance"] > 100 * random["user_variance"]
    assert math.isnan(random["solved_steps"])


def test_the_best_constant_gets_nearly_every_click_well_inside_of_the_box(environment: VirtualTaobao) -> None:
    result = run_row(environment, "best-constant", seed=0)

    assert result["ctr"] > 0.995
    assert result["episodes_ctr"] > 0.995
    assert result["reach"] < 0.9
    assert result["action_variance"] == 0


def test_the_best_constant_of_a_seed_is_the_same_every_time(environment: VirtualTaobao) -> None:
    before = torch.get_rng_state()

    one, again = (best_constant(environment, seed=3, starts=2) for _ in range(2))

    assert torch.equal(one, again)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_row_that_learns_is_looked_at_on_the_way(environment: VirtualTaobao) -> None:
    share = 8_000 / ROWS["constant-cem"].steps
    one, again = (run_row(environment, "constant-cem", 0, share) for _ in range(2))

    looks = [[one[f"look.{number}.{key}"] for number in range(3)] for key in ("steps", "seconds", "ctr")]
    assert all(values == sorted(values) for values in looks)
    assert 3 <= sum(name.endswith(".ctr") for name in one) <= LOOKS + 1
    assert one["best_ctr"] == max(value for name, value in one.items() if name.endswith(".ctr"))
    assert one["collapse"] == pytest.approx(one["best_ctr"] - one["late_ctr"])
    timed = {name for name in one if name.endswith("seconds")}
    assert {name: value for name, value in one.items() if name not in timed and not math.isnan(value)} == {
        name: value for name, value in again.items() if name not in timed and not math.isnan(value)
    }


def test_an_unknown_row_is_refused_with_the_names_of_all(environment: VirtualTaobao) -> None:
    with pytest.raises(InputError, match="unknown row 'dqn'; the rows are: random, zero, best-constant"):
        run_row(environment, "dqn", seed=0)


def test_every_agent_has_a_row_with_another_discount_beside_its_tuned_one() -> None:
    tuned = [name for name, row in ROWS.items() if row.kind is Kind.TUNED]
    others = [name for name, row in ROWS.items() if row.kind is Kind.DISCOUNT]

    assert len(tuned) == len(others) > 0
    assert all(name.startswith(tuple(tuned)) for name in others)


def test_a_row_runs_alone_without_data_frames_or_the_platform(environment: VirtualTaobao, tmp_path: Path) -> None:
    program = (
        "import sys; from components.evaluation.agent_comparison import main; main(*sys.argv[1:]); "
        "print([name for name in ('polars', 'pandas', 'pyarrow', 'prefect') if name in sys.modules])"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, str(published_weights()), "zero", "4", str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )

    assert run.stdout.strip() == "[]"
    assert [file.name for file in tmp_path.iterdir()] == ["zero-4.json"]
    assert json.loads((tmp_path / "zero-4.json").read_text())["ctr"] == run_row(environment, "zero", 4)["ctr"]
