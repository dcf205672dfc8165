"""What is refused before anything is replayed; tests/end_to_end replays runs."""

import json
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from components.errors import InputError
from flows.command_line import app
from flows.config import LoopConfig, load_config
from flows.lineage import code_digest, lock_digest
from flows.run_folder import mark_forgotten


def lineage(**changes: Any) -> dict[str, Any]:
    return {
        "config": LoopConfig().model_dump(mode="json"),
        "code_digest": code_digest(),
        "lock_digest": lock_digest(),
        "data_digest": "d" * 64,
        "commit": None,
        "path": None,
    } | changes


@pytest.fixture
def run(place: Path) -> Path:
    """A run's folder, with a lineage that can be replayed."""
    folder = place / "runs" / "shop-1"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text("{}")
    (folder / "lineage.json").write_text(json.dumps(lineage()))
    return folder


def change(run: Path, **changes: Any) -> None:
    (run / "lineage.json").write_text(json.dumps(lineage(**changes)))


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["replay", *map(str, arguments)])


def refused(*arguments: str | Path) -> str:
    answer = call(*arguments)
    assert answer.exit_code == 2, (answer.output, answer.exception)
    assert "Traceback" not in answer.stderr
    return " ".join(answer.stderr.split())


def test_a_run_is_named_by_its_folder_its_name_or_a_beginning(run: Path) -> None:
    from flows.replay import read_recorded

    for name in (str(run), "shop-1", "sho"):
        recorded = read_recorded(name, run.parent)
        assert (recorded.folder, recorded.config, recorded.changed) == (run, LoopConfig(), ())
    assert "run 'cart': 0 runs in" in refused("cart")


def test_users_that_were_forgotten_make_a_run_not_replayable(run: Path) -> None:
    mark_forgotten(run, 2, datetime(2026, 5, 1, tzinfo=UTC))
    said = refused("shop-1", "--anyway")
    assert "run shop-1: Not replayable: rows of 2 users were deleted from its data, last on 2026-05-01." in said


def test_code_and_lock_that_changed_are_named_and_gone_on_with_if_asked(run: Path) -> None:
    from flows.replay import read_recorded

    change(run, code_digest="0" * 64, lock_digest="1" * 64)
    said = refused("shop-1")
    assert f"- code: digest 000000000000 then, {code_digest()[:12]} now (components and the stages of flows)" in said
    assert f"- lock: digest 111111111111 then, {lock_digest()[:12]} now (constraints.txt)" in said
    assert "compare all the same with --anyway" in said
    assert [part.partition(":")[0] for part in read_recorded("shop-1", run.parent, anyway=True).changed] == [
        "code",
        "lock",
    ]


def test_the_files_that_changed_since_the_runs_commit_are_named(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows import lineage

    repository = tmp_path / "repository"
    (repository / "components").mkdir(parents=True)
    (repository / "components" / "gate.py").write_text("LEVEL = 0.05\n")
    (repository / "README.md").write_text("before\n")

    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=t", "-c", "user.email=t@example.com")
        return subprocess.run(
            ["git", *identity, *arguments], cwd=repository, capture_output=True, text=True, check=True
        ).stdout.strip()

    git("init")
    git("add", ".")
    git("commit", "-m", "before")
    commit = git("rev-parse", "HEAD")
    (repository / "components" / "gate.py").write_text("LEVEL = 0.1\n")
    (repository / "README.md").write_text("after\n")
    monkeypatch.setattr(lineage, "REPOSITORY", repository)
    change(run, code_digest="0" * 64, commit=f"{commit}+changes")
    assert f"; since commit {commit[:12]}: components/gate.py Check" in refused("shop-1")
    change(run, code_digest="0" * 64, commit="0" * 40)
    assert f", of commit {'0' * 40} Check" in refused("shop-1")


def test_what_a_lineage_lacks_or_another_version_wrote_is_named(run: Path) -> None:
    (run / "lineage.json").write_text("{}")
    assert "lineage.json: config is missing" in refused("shop-1")
    (run / "lineage.json").write_text("{")
    assert "is no run's lineage" in refused("shop-1")
    change(run, config=LoopConfig().model_dump(mode="json") | {"gamma": 1})
    assert "its configuration is another version's: gamma: Extra inputs are not permitted" in refused("shop-1")


def test_what_the_source_read_must_still_be_there(run: Path, tmp_path: Path) -> None:
    config = load_config(None, [], "table").model_dump(mode="json")
    change(run, config=config, path=str(tmp_path / "gone"))
    assert f"run shop-1: {tmp_path}/gone: no such file or folder" in refused("shop-1")
    change(run, config=config)
    assert "give it with --path" in refused("shop-1")
    from flows.replay import read_recorded

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert read_recorded("shop-1", run.parent, elsewhere).path == elsewhere
    with pytest.raises(InputError, match="no such file"):
        read_recorded("shop-1", run.parent, tmp_path / "nowhere")
