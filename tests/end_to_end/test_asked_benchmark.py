"""The flow `benchmark` against a real Prefect server: its table, and a second run that computes nothing again."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from prefect_server import Server
from virtual_taobao_weights import write_random_weights

RUN = """
import sys
from pathlib import Path
from flows.benchmarking import benchmark
print(benchmark("virtual-taobao", quick=True, path=Path(sys.argv[1])).model_dump_json())
"""


def run_flow(api: str, weights: Path, home: Path) -> dict[str, Any]:
    """The document of one run, in a process of its own."""
    own = {"PREFECT_API_URL": api, "PREFECT_HOME": str(home / "prefect"), "SLATELOOP_HOME": str(home)}
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(weights)], env=os.environ | own, cwd=Path(__file__).parents[2],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.services
def test_the_flow_leaves_its_table_and_goes_on_from_what_an_earlier_run_kept(prefect_api: str, tmp_path: Path) -> None:
    weights = write_random_weights(tmp_path / "weights")
    first, again = (run_flow(prefect_api, weights, tmp_path / "home") for _ in range(2))

    assert first["figures"]["constant-cem.ctr"]["value"] > first["figures"]["zero.ctr"]["value"]
    # CPU times are among the figures: they would differ if anything had been computed twice.
    assert first["figures"]["ppo.steps_per_second"]["value"] > 0
    assert again == first
    server = Server(prefect_api)
    runs = server.runs("benchmark")
    assert [run["state"]["name"] for run in runs] == ["Completed", "Completed"]
    tables = [server.ask("artifacts/filter", artifacts={"flow_run_id": {"any_": [run["id"]]}}) for run in runs]
    assert [[artifact["key"] for artifact in table] for table in tables] == [["benchmark"], ["benchmark"]]
    shown = tables[0][0]["data"]
    assert shown.startswith("## virtual-taobao\n\n`slateloop benchmark virtual-taobao`; at most 5 CPU-minutes, quick;")
    assert "\n| constant-cem | " in shown
    assert tables[1][0]["data"] == shown
