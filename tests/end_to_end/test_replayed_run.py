"""A finished run is computed again from its lineage, and comes to the same."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from endpoint_log import KEY, write_interactions
from slateloop_process import LEARN_LITTLE, STAGES, Answer, Place

from components.interactions.log import Heard, InteractionLog
from components.interactions.log_folder import Log, open_log

RESULTS = ["data", "policy reinforce", "policy cem", "gating estimate", "estimates", "A/B", "decision"]


def results(answer: Answer) -> dict[str, bool]:
    return {part["what"]: part["equal"] for part in json.loads(answer.output)["compared"]}


def kept(place: Place) -> dict[str, bytes]:
    """Every file of the ledger, the data and the runs, which a replay has no business with."""
    folders = [place.root / name for name in ("home/ledger", "home/bentoml", "data", "runs")]
    return {str(file): file.read_bytes() for folder in folders for file in folder.rglob("*") if file.is_file()}


def test_a_run_replayed_has_the_same_bytes_and_decision_and_changes_nothing(first_run: Answer, shop: Place) -> None:
    before = kept(shop)
    stages = sorted((shop.root / "home" / "stages").glob("*/*"))
    answer = shop.call("replay", first_run.document["run"]["run"], "--json")
    assert answer.code == 0, answer.errors
    assert results(answer) == dict.fromkeys(RESULTS, True)
    policy = answer.document["compared"][1]
    assert policy["replayed"] == policy["recorded"] == first_run.document["lineage"]["policy_digest"][:12]
    computed = [stage for stage in STAGES if stage not in ("data-version", "package", "drift-reference")]
    assert answer.stages("done") == computed
    assert kept(shop) == before
    assert sorted((shop.root / "home" / "stages").glob("*/*")) == stages
    assert shop.half_written() == []


def add_later_rows(url: str, source: Log) -> None:
    """The same users come again, and one more piece of feedback on what was shown long ago."""
    log = InteractionLog(url)
    with log.reading() as connection:
        (first,) = connection.exec_driver_sql("SELECT min(request_id) FROM recommendations").one()
    end = log.end("shop")
    assert end is not None
    log.write(
        [], [Heard(first, "late", round(end.timestamp() * 1e6) + 1, clicked=(True,) * source.manifest.slate_size)]
    )
    log.engine.dispose()
    later = source.scan().collect()
    write_interactions(source, url, later=int((end - later["timestamp"].min()).total_seconds()) + 3_600)


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.slow
@pytest.mark.timeout(1_800)
def test_rows_that_came_later_do_not_count_and_what_cannot_be_had_again_is_refused(
    storefront_log: Log, prefect_api: str, tmp_path: Path
) -> None:
    place = Place(tmp_path / "own", prefect_api)
    place.environment["SLATELOOP_USER_KEY"] = KEY
    place.write("loop.toml", LEARN_LITTLE)
    (place.root / "home").mkdir()
    url = f"sqlite:///{place.root / 'home' / 'interactions.db'}"
    write_interactions(storefront_log, url)
    run = place.call("run", "--source", "log", "--config", "loop.toml", "--json", timeout=900).document
    assert run["lineage"]["config"]["as_of"] is not None
    folder = Path(run["run"]["folder"])
    add_later_rows(url, storefront_log)

    answer = place.call("replay", folder.name, "--json", timeout=900)
    assert answer.code == 0, answer.errors
    assert results(answer) == dict.fromkeys(RESULTS, True)
    assert place.call("import", "--source", "log", "--out", "now").code == 0
    assert open_log(place.root / "now").manifest.content_digest != run["lineage"]["data_digest"]

    other = shutil.copytree(folder, tmp_path / "other")
    edit(other / "lineage.json", code_digest="0" * 64)
    edit(other / "decision.json", outcome="promote")
    refused = place.call("replay", str(other))
    assert refused.code == 2
    assert "is not replayable as it was:\n- code: digest 000000000000 then, " in refused.errors
    differing = place.call("replay", str(other), "--anyway", "--json", timeout=900)
    assert differing.code == 1
    assert differing.errors.startswith("warning: code: digest 000000000000 then, ")
    assert differing.errors.endswith("slateloop: run other: its replay differs in: decision\n")
    assert results(differing) == dict.fromkeys(RESULTS, True) | {"decision": False}

    edit(other / "lineage.json", code_digest=run["lineage"]["code_digest"], data_digest="0" * 64)
    refused = place.call("replay", str(other))
    assert refused.code == 2
    assert "its data are no longer what they were: digest 000000000000 then, " in refused.errors
    name = storefront_log.scan().collect()["user_id"][0]
    assert place.call("forget", name).code == 0
    refused = place.call("replay", folder.name)
    assert refused.code == 2
    assert "Not replayable: rows of 1 user were deleted from its data" in refused.errors
    assert place.half_written() == []
