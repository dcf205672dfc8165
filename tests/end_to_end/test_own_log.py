"""A user's own log, mapped from CSV, through the whole loop: few bad rows are put aside, many stop it."""

from pathlib import Path

import polars as pl
import pytest
from own_table import write_own_log
from slateloop_process import LEARN_LITTLE, Place

from components.interactions.log_folder import Log


@pytest.fixture
def place(storefront_log: Log, prefect_api: str, tmp_path: Path) -> Place:
    """The shop's log as a CSV of one's own, whose first eight rows show an item twice."""
    place = Place(tmp_path / "own", prefect_api)
    place.write("loop.toml", LEARN_LITTLE)
    write_own_log(storefront_log, place.root / "log")
    return place


def test_few_bad_rows_are_put_aside_and_the_loop_goes_on_and_too_many_stop_it(place: Place) -> None:
    command = ("run", "--source", "table", "--path", "log", "--config", "loop.toml")
    stopped = place.call(*command, "--set", "validation.max_quarantined_share=0.005")
    assert stopped.code == 2
    assert "Traceback" not in stopped.errors
    assert "8 of 1200 rows (0.67%) are bad; max_quarantined_share allows 0.50%" in stopped.errors
    assert "- slate_repeats_an_item: 8 rows, such as request" in stopped.errors
    assert stopped.errors.count("What was found is in") == 1
    (rejected,) = (place.root / "home" / "stages" / "rejected").iterdir()
    assert "slate_repeats_an_item" in pl.read_parquet(rejected / "quarantine" / "rows.parquet")["reasons"].explode()
    assert not list((place.root / "runs").iterdir())

    decided = place.call(*command, "--json")
    data = decided.document["evidence"]["data"]
    assert data["quarantine_reasons"]["slate_repeats_an_item"] == 8
    assert data["n_quarantined"] >= 8
    assert decided.stages("reused") == ["import-data", "data-version"]
    assert pl.read_parquet(Path(decided.document["run"]["folder"]) / "quarantine" / "rows.parquet").height >= 8
    ab = decided.document["evidence"]["ab"]
    assert ab["label"] == "simulated in a world model"
    # Simulated users have no past.
    assert ab["adjustment"] is None
    assert len(ab["guardrails"]) == 4
    # Users are what is assigned and counted, however many sessions each of them replays.
    visitors = pl.read_csv(place.root / "log" / "log.csv")["visitor"].n_unique()
    assert (
        ab["treatment_users"] + ab["control_users"]
        <= visitors
        < 400
        == ab["treatment_sessions"] + ab["control_sessions"]
    )

    mapping = place.root / "log" / "mapping.toml"
    mapping.write_text(mapping.read_text() + '[reward]\nname = "buys"\nweights = { bought = 1 }\n')
    changed = place.call(*command)
    assert changed.code == 2
    assert "mapping.toml" in changed.errors
    assert "bought" in changed.errors
