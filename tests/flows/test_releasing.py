"""`slateloop release` and `slateloop ab-report` on a real database and a real model store."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from gate_evidence import ab, evidence, value
from ledger_entries import ledger_entry
from live_traffic import ANSWERED_AT_ONCE, live_traffic
from typer.testing import CliRunner

from components.errors import InputError
from components.experiment.ab import AbResult
from components.experiment.gate import GateConfig, GateRecord
from components.interactions.log import InteractionLog
from flows.command_line import app
from flows.ledger_store import add_entry, read_ledger
from flows.releasing import RefusedError, let_out, open_releases
from services.policy_store import save_model

NOW = tuple(part for setting in ANSWERED_AT_ONCE for part in ("--set", setting))


@pytest.fixture
def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bentoml_home: Path) -> InteractionLog:
    monkeypatch.setenv("SLATELOOP_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SLATELOOP_DATABASE", f"sqlite:///{tmp_path / 'interactions.db'}")
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "prefect"))
    monkeypatch.setenv("COLUMNS", "200")
    return InteractionLog(f"sqlite:///{tmp_path / 'interactions.db'}")


@pytest.fixture
def tags(policy_folder: Path, database: InteractionLog) -> dict[str, str]:
    """A policy without evidence, one that may be a canary, and one that the gate holds."""
    records = {
        "first": None,
        # Its run had an A/B in a true simulator: live, that promotes nobody.
        "good": GateRecord(evidence=evidence(ab=ab(label="true simulator")), config=GateConfig()),
        "held": GateRecord(evidence=evidence(ab=None, offline=value(effective_sample_size=80.0)), config=GateConfig()),
    }
    return {
        name: save_model(policy_folder, name=f"shop-{name}", lineage={}, decision={}, gate=record)
        for name, record in records.items()
    }


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def done(*arguments: str | Path) -> Any:
    answer = call(*arguments, "--json")
    assert answer.exit_code == 0, (answer.output, answer.exception)
    return json.loads(answer.stdout)


def test_who_serves_is_released_and_rolled_back_by_commands(tags: dict[str, str]) -> None:
    first = done("release", "promote", "--policy", tags["first"])
    assert (first["number"], first["champion"], first["challenger"]) == (1, tags["first"], None)
    assert done("release", "status", "--history") == [first]
    canary = done("release", "canary", "--policy", tags["good"], "--share", "0.05", "--planned-sessions", "800")
    assert (canary["challenger"], canary["challenger_share"], canary["reason"]) == (
        tags["good"],
        0.05,
        "the gate: promote",
    )
    shadow = done("release", "shadow", "--policy", tags["held"])
    assert (shadow["shadow"], shadow["challenger"]) == (tags["held"], tags["good"])
    refused = call("release", "baseline", "--policy", tags["held"], "--share", "0.1")
    assert refused.exit_code == 1 and "the gate does not let it out" in refused.stderr
    baseline = done("release", "baseline", "--policy", tags["first"], "--share", "0.1")
    assert baseline["baseline_share"] == 0.1
    back = done("release", "rollback", "--reason", "carts are down")
    assert (back["champion"], back["challenger"], back["reason"]) == (tags["first"], None, "carts are down")
    history = done("release", "status", "--history")
    assert [row["action"] for row in history] == ["promote", "canary", "shadow", "baseline", "rollback"]
    assert done("release", "status") == back
    table = call("release", "status", "--history").output
    assert f"challenger 0.05: {tags['good']}" in " ".join(table.split())


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("status",), 2, "interactions.db: no such file"),
        (("rollback",), 2, "nothing is released"),
        (("canary", "--policy", "{good}"), 2, "nothing is released"),
        (("promote", "--policy", "shop-good:latest"), 2, "latest is never served"),
        (("promote", "--policy", "{good}", "--loop", "news"), 2, "is of loop 'shop'; expected 'news'"),
        (("promote",), 2, "nothing is released"),
    ],
)
def test_what_cannot_be_released_is_refused_with_a_sentence(
    tags: dict[str, str], arguments: tuple[str, ...], code: int, words: str
) -> None:
    answer = call("release", *(part.format(**tags) for part in arguments))
    assert answer.exit_code == code, answer.output
    assert words in answer.stderr and "Traceback" not in answer.output


def test_no_canary_passes_by_the_gate(tags: dict[str, str]) -> None:
    done("release", "promote", "--policy", tags["first"])
    held = call("release", "canary", "--policy", tags["held"])
    assert held.exit_code == 1
    assert "the gate holds it" in held.stderr and "an effective 80 of" in held.stderr
    unjudged = call("release", "canary", "--policy", tags["first"])
    assert unjudged.exit_code == 2
    # It serves already; another one without evidence says that it has none.
    assert "without evidence" in unjudged.stderr
    again = call("release", "promote", "--policy", tags["good"])
    assert again.exit_code == 2 and "has a champion already" in again.stderr


def test_a_policy_is_let_out_by_itself_once_and_never_beside_another(
    tags: dict[str, str], policy_folder: Path, database: InteractionLog
) -> None:
    record = GateRecord(evidence=evidence(ab=None), config=GateConfig())
    other = save_model(policy_folder, name="shop-other", lineage={}, decision={}, gate=record)
    done("release", "promote", "--policy", tags["first"])
    releases = open_releases()
    let = partial(let_out, releases, "shop", share=0.1, planned_sessions=900)
    with pytest.raises(InputError, match="nothing is released"):
        let_out(releases, "news", tags["good"], share=0.1, planned_sessions=900)
    with pytest.raises(RefusedError, match="the gate holds it"):
        let(tags["held"])
    with pytest.raises(RefusedError, match="served already in release 1"):
        let(tags["first"])
    release = let(tags["good"])
    assert (release.action, release.challenger, release.challenger_share) == ("canary", tags["good"], 0.1)
    assert release.planned_sessions == 900
    with pytest.raises(RefusedError, match=f"release 2 compares {tags['good']!r}, whose A/B comes first"):
        let(other)
    done("release", "rollback")
    with pytest.raises(RefusedError, match="served already in release 2; it comes back only by hand"):
        let(tags["good"])
    assert let(other).number == 4
    # By hand it may.
    done("release", "rollback")
    assert done("release", "canary", "--policy", tags["good"])["challenger"] == tags["good"]


def test_a_canary_is_promoted_by_its_live_ab_and_not_without(
    tags: dict[str, str], database: InteractionLog, tmp_path: Path
) -> None:
    done("release", "promote", "--policy", tags["first"])
    done("release", "canary", "--policy", tags["good"], "--share", "0.5", "--planned-sessions", "600")
    early = call("release", "promote", *NOW)
    assert early.exit_code == 1 and "the gate says hold" in early.stderr
    other_time = call("ab-report", *NOW, "--set", "as_of=2090-01-01T00:00:00Z")
    assert other_time.exit_code == 2 and "a live A/B is of this moment" in other_time.stderr
    assert done("ab-report", *NOW)["result"] is None
    live_traffic(database, gain=0.3)
    report = done("ab-report", *NOW, "--out", tmp_path / "ab.json")
    result = AbResult.model_validate(report["result"])
    assert (result.label, result.treatment, result.control) == ("live", "new", tags["first"])
    assert result.difference == pytest.approx(0.3 * 4 * 4, abs=1.2)  # 4 positions, a click and a purchase earn 4
    assert report["decision"]["outcome"] == "promote" and report["harm"] == []
    assert AbResult.model_validate_json((tmp_path / "ab.json").read_bytes()) == result
    assert "promote" in call("ab-report", *NOW).output
    promoted = done("release", "promote", *NOW)
    assert (promoted["champion"], promoted["challenger"]) == (tags["good"], None)
    back = done("release", "rollback")
    assert back["champion"] == tags["first"]


def test_the_result_goes_into_the_ledger(tags: dict[str, str], database: InteractionLog, tmp_path: Path) -> None:
    add_entry(tmp_path / "home", ledger_entry(run="shop-1", challenger="new"))
    done("release", "promote", "--policy", tags["first"])
    done("release", "canary", "--policy", tags["good"], "--share", "0.5", "--planned-sessions", "600")
    live_traffic(database, gain=0.3)
    done("ab-report", *NOW, "--out", tmp_path / "ab.json")
    recorded = call("record-ab", "shop-1", tmp_path / "ab.json")
    assert recorded.exit_code == 0 and "live A/B recorded, improvement" in recorded.output
    assert any(entry.ab is not None and entry.ab.label == "live" for entry in read_ledger(tmp_path / "home"))


def test_the_guard_takes_a_harmful_challenger_away_and_nobody_else(
    tags: dict[str, str], database: InteractionLog
) -> None:
    done("release", "promote", "--policy", tags["first"])
    done("release", "canary", "--policy", tags["good"], "--share", "0.5", "--planned-sessions", "600")
    live_traffic(database, gain=-0.3)
    looked = done("ab-report", *NOW)
    assert looked["harm"] and looked["rolled_back"] is None
    assert done("release", "status")["challenger"] == tags["good"]
    guarded = done("ab-report", *NOW, "--guard")
    assert guarded["rolled_back"]["action"] == "guard"
    status = done("release", "status")
    assert status["challenger"] is None and "clicks of a session" in status["reason"]
    refused = call("ab-report", *NOW, "--guard")
    assert refused.exit_code == 2 and "has no challenger in release 3" in refused.stderr
