"""One user is forgotten wherever a run on the endpoint's own log has put their rows."""

import json
from pathlib import Path

import polars as pl
import pytest
from endpoint_log import KEY, write_interactions
from slateloop_process import LEARN_LITTLE, Answer, Place

from components.interactions.log_folder import Log, open_log
from flows.run_record import Lineage
from services.settings import user_hash


@pytest.fixture
def place(storefront_log: Log, prefect_api: str, tmp_path: Path) -> Place:
    """A home with the endpoint's log, in a DVC repository of its own."""
    from dvc.repo import Repo

    place = Place(tmp_path / "own", prefect_api)
    Repo.init(str(place.root), no_scm=True).close()
    place.environment["SLATELOOP_USER_KEY"] = KEY
    place.write("loop.toml", LEARN_LITTLE)
    (place.root / "home").mkdir()
    write_interactions(storefront_log, f"sqlite:///{place.root / 'home' / 'interactions.db'}")
    return place


def traces(place: Place, user: str) -> list[str]:
    """Every file that names the user in its bytes, or in a column of a Parquet file."""
    found = []
    for file in sorted(path for path in place.root.rglob("*") if path.is_file()):
        content = file.read_bytes()
        if content.startswith(b"PAR1"):
            content = pl.read_parquet(file).write_ndjson().encode()
        if user.encode() in content:
            found.append(str(file.relative_to(place.root)))
    return found


def run(place: Place) -> Answer:
    return place.call("run", "--source", "log", "--config", "loop.toml", "--json")


@pytest.mark.slow
def test_a_forgotten_user_is_in_no_file_and_no_later_run(place: Place, storefront_log: Log) -> None:
    folder = Path(run(place).document["run"]["folder"])
    names = {user_hash(KEY.encode(), name): name for name in storefront_log.scan().collect()["user_id"].unique()}
    (train,) = (place.root / "home" / "stages" / "split").glob("*/train")
    user = open_log(train).scan().group_by("user_id").len().sort("len", "user_id").collect()["user_id"][-1]
    name = names[user]
    assert place.call("data", "pin").code == 0
    before = open_log(place.root / "data" / "log").manifest
    held = traces(place, user)
    for part in ("data/log/", "home/stages/import-data", "home/stages/split", "home/interactions.db", ".dvc/cache/"):
        assert any(file.startswith(part) for file in held), part
    reference = pl.read_parquet(folder / "drift_reference" / "reference" / "drift_reference.parquet")

    answer = place.call("forget", name, "--json")
    done = answer.document
    assert traces(place, user) == []
    assert (done["users"], done["left"], done["under_way"], done["erased"]) == (1, [], [], True)
    n_rows = storefront_log.scan().filter(pl.col("user_id") == name).collect().height
    assert (done["requests"], done["feedback"]) == (n_rows, n_rows)
    assert (done["stages"], done["logs_rewritten"], done["pinned"]) == (15, 1, True)
    assert done["runs"] == [folder.name]
    rewritten = open_log(place.root / "data" / "log").manifest
    assert rewritten.content_digest != before.content_digest
    assert rewritten.n_requests < before.n_requests
    assert pl.read_parquet(folder / "drift_reference/reference/drift_reference.parquet").height < reference.height
    lineage = Lineage.model_validate_json((folder / "lineage.json").read_bytes())
    assert lineage.forgotten is not None and lineage.forgotten.users == 1
    assert "Not replayable: rows of 1 user were deleted" in place.call("show", folder.name).output
    assert json.loads(place.call("runs", "--json").output)[0]["forgotten"]["users"] == 1
    assert place.half_written() == []

    again = place.call("forget", name)
    assert again.code == 0
    assert again.output == "No rows were found; 1 user left a tombstone all the same.\n"

    second = run(place)
    assert second.stages("reused") == []
    assert second.document["run"]["run"] != folder.name
    assert open_log(place.root / "data" / "log").manifest.n_requests == rewritten.n_requests
    assert traces(place, user) == []
    assert second.document["lineage"]["forgotten"] is None
